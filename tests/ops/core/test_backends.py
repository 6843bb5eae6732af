"""Which backend runs: the one asked for, the one the table names, never another one quietly."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo_fast as pf
from ppo_fast.ops._backends.native import extension
from ppo_fast.ops._core import registry
from tests.helpers import INTERPRETED, backends_under_test, each_backend, raises_exactly
from tests.ops.examples import EXAMPLES, each_example, fresh_inputs, run_with_gradient

OPS = (
    "token_logprobs",
    "token_stats",
    "entropy",
    "policy_loss",
    "sample_tokens",
    "linear_token_stats",
    "linear_policy_loss",
    "value_loss",
    "gae",
    "gae_packed",
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (op, backend) of every launcher that runs, in order."""
    seen: list[tuple[str, str]] = []

    def recorded(op: str, backend: str, entry: registry.Implementation) -> registry.Implementation:
        def launch(*args: Any, **keywords: Any) -> Any:
            seen.append((op, backend))
            return entry.run(*args, **keywords)

        return entry._replace(run=launch)

    for op, entries in registry._TABLE.items():
        for backend, entry in entries.items():
            monkeypatch.setitem(entries, backend, recorded(op, backend, entry))
    return seen


@each_example(*(name for name, example in EXAMPLES.items() if example.op))
def test_the_named_backend_runs_forward_and_backward(name: str, backend: str, launched: list[tuple[str, str]]) -> None:
    run_with_gradient(name, backend, fresh_inputs(name))
    assert launched
    assert {used for _, used in launched} == {backend}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_torch_backend_and_an_automatic_choice(op: str) -> None:
    status = pf.backends()[op]
    assert status["torch"] == "ok"
    assert status[status["auto"]] == "ok"
    assert set(status) <= {"auto", *registry.BACKENDS}


def test_backends_lists_exactly_the_ops() -> None:
    assert set(pf.backends()) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_automatic_choice_on_a_cpu(op: str) -> None:
    native = pf.backends()[op].get("native") == "ok"
    cpu = torch.device("cpu")
    wide = "native" if native and op.startswith("gae") else "torch"
    assert registry.resolve(op, "auto", cpu, torch.float64) == wide
    assert registry.resolve(op, "auto", cpu, torch.float16) == "torch"
    for dtype in (torch.float32, torch.bfloat16):
        assert registry.resolve(op, "auto", cpu, dtype) == ("native" if native else "torch")


def test_the_automatic_choice_runs(launched: list[tuple[str, str]]) -> None:
    pf.gae(torch.zeros(2, 3), torch.zeros(2, 3))
    pf.gae(torch.zeros(2, 3).half(), torch.zeros(2, 3).half())
    chosen = pf.backends()["gae"]["native"] == "ok"
    assert launched == [("gae", "native" if chosen else "torch"), ("gae", "torch")]


def test_the_automatic_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, stand_in = torch.device("cuda"), registry.Implementation(lambda: None, devices=("cuda",))
    for op in ("gae", "value_loss"):
        for backend in ("cuda", "triton"):
            monkeypatch.setitem(registry._TABLE[op], backend, stand_in)
    monkeypatch.delitem(registry._TABLE["value_loss"], "cuda")
    assert registry.resolve("gae", "auto", cuda, torch.float32) == "cuda"
    assert registry.resolve("value_loss", "auto", cuda, torch.float32) == "triton"
    monkeypatch.setitem(registry._TABLE["gae"], "cuda", stand_in._replace(unusable="not built"))
    assert registry.resolve("gae", "auto", cuda, torch.float32) == "triton"
    monkeypatch.delitem(registry._TABLE["gae"], "triton")
    assert registry.resolve("gae", "auto", cuda, torch.float32) == "torch"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unusable": "it was not built"}, "it was not built"),
        ({"devices": ("cuda",)}, "it takes cuda tensors, not cpu"),
        ({"devices": ("cuda", "xpu")}, "it takes cuda or xpu tensors, not cpu"),
        ({"dtypes": (torch.bfloat16,)}, "it does not take torch.float32"),
    ],
)
def test_a_named_backend_that_cannot_run_raises_with_its_reason(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, str]]
) -> None:
    entry = registry._TABLE["gae"]["native"]._replace(**{"unusable": None, **change})
    monkeypatch.setitem(registry._TABLE["gae"], "native", entry)
    with raises_exactly(f"gae: expected a usable backend, got 'native': {reason}"):
        pf.gae(torch.zeros(2, 3), torch.zeros(2, 3), backend="native")
    assert not launched
    pf.gae(torch.zeros(2, 3), torch.zeros(2, 3))
    assert launched == [("gae", "torch")]


def test_the_reason_why_not_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry._TABLE["gae"]["native"]._replace(unusable="no compiler was found")
    monkeypatch.setitem(registry._TABLE["gae"], "native", entry)
    status = pf.backends()["gae"]
    assert status["native"] == "no compiler was found"
    assert status["auto"] == "torch"


def test_native_works_exactly_where_the_extension_loaded() -> None:
    assert pf.backends()["gae"]["native"] == (extension.load_error or "ok")


@each_backend("gae")
def test_this_process_tests_the_backends_it_should(backend: str) -> None:
    assert INTERPRETED == (os.environ.get("TRITON_INTERPRET") == "1") == registry.interpreting()
    working = {b for b, status in pf.backends()["gae"].items() if status == "ok"}
    assert set(backends_under_test("gae")) == working & ({"triton"} if INTERPRETED else {"torch", "native"})
    assert backend in working


def test_the_report_of_the_build_is_read_where_setup_writes_it() -> None:
    assert Path(pf.__file__).parent / "_build.json" == extension._REPORT
