"""`ppo-fast doctor`: every op and backend, usable or why not."""

import json

import pytest

import ppo_fast
from ppo_fast import doctor

LOSSES = {"policy_loss", "linear_policy_loss", "value_loss"}
OPS = LOSSES | {"token_logprobs", "token_stats", "linear_token_stats", "entropy", "gae", "gae_packed", "sample_tokens"}


def test_json_holds_versions_devices_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["ppo_fast"] == ppo_fast.__version__
    assert found["versions"]["torch"]
    assert found["devices"][0].startswith("cpu: ")
    assert set(found["ops"]) == OPS
    for op, states in found["ops"].items():
        assert states["torch"] == "ok", op
        assert states[states["auto"]] == "ok", op


def test_table_names_every_op_and_says_why_a_backend_is_unusable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ppo_fast, "backends", lambda: {"gae": {"torch": "ok", "cuda": "no CUDA device", "auto": "torch"}}
    )
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "gae" in printed
    assert "no (1)" in printed
    assert "(1) no CUDA device" in printed


def test_a_missing_package_is_named_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert doctor.report()["versions"]["no-such-package"] == "not installed"
