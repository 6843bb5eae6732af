"""The tools beside the benchmarks: tuning runs (interpreted), the GPU script refuses what it does not know."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import profile_update, tables, trl_at_size
from benchmarks import run as runner

ROOT = Path(__file__).resolve().parent.parent


def test_tuning_times_every_candidate(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.tune", "--smoke", "--json", str(tmp_path / "tune.json")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "tune.json").read_text())
    assert {(r["kernel"], tuple(r["tile"])) for r in results} == {
        ("forward", (1024, 1, 4)),
        ("forward", (1024, 4, 4)),
        ("backward", (1024, 1, 4)),
    }
    assert all(r["ms"] > 0 for r in results)
    assert "forward gpt2" in run.stdout


def test_the_gpu_script_names_its_phases() -> None:
    run = subprocess.run(["benchmarks/gpu.sh", "fly"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.strip() == "phase: expected one of test ops tiles rollout 7b profile trl sharded, got fly"


def _shown(path: Path, group: str, product_rate: float | None = None, **info: object) -> str:
    """The table of one result that took 2 ms."""
    common = {"contender": "native", "ratios": {"Python loop": 40.0}, "peak_bytes": 2**21}
    bench = {"group": group, "stats": {"median": 0.002, "iqr": 0.0001}, "extra_info": common | info}
    more = {} if product_rate is None else {"product_rate": product_rate}
    result = {
        "machine_info": {"device": "A CPU", "threads": 1, "torch": "2.13.0", "copy_bandwidth": 2e9, **more},
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": [bench],
    }
    path.write_text(json.dumps(result))
    return tables.table(path)


def test_a_table_shows_machine_commit_command_and_every_result(tmp_path: Path) -> None:
    shown = _shown(tmp_path / "gae.json", "gae 2x3", bytes=2e6, error=1e-7)
    assert "| gae 2x3 | native | 2 ms | 0.1 ms | 40x Python loop | 1 | 50 | 2 MiB | 1.0e-07 |" in shown
    assert "A CPU, 1 thread, torch 2.13.0, measured copy bandwidth 2 GB/s, commit 0123456789" in shown
    assert "`python -m benchmarks.run gae`" in shown


def test_a_table_of_training_runs_shows_what_was_learned_and_no_bandwidth(tmp_path: Path) -> None:
    shown = _shown(tmp_path / "trl.json", "a task", outcome={"score at 10": 0.51234}).splitlines()
    assert shown[0] == "| shape | implementation | median | IQR | speed-up | peak memory | score at 10 |"
    assert shown[2] == "| a task | native | 2 ms | 0.1 ms | 40x Python loop | 2 MiB | 0.512 |"
    assert shown[-1].endswith("`python -m benchmarks.run trl`. Speed-ups are medians over interleaved pairs.")


def test_a_table_of_a_gpu_shows_host_time_and_both_rates(tmp_path: Path) -> None:
    shown = _shown(tmp_path / "ops.json", "scoring", 4e12, flops=4e9, host=1e-4).splitlines()
    assert shown[0] == (
        "| shape | implementation | median | IQR | host | speed-up | TFLOP/s | % of GEMM | peak memory |"
    )
    assert shown[2] == "| scoring | native | 2 ms | 0.1 ms | 0.1 ms | 40x Python loop | 2 | 50 | 2 MiB |"
    assert "copy bandwidth 2 GB/s, GEMM rate 4 TFLOP/s, commit" in shown[-1]
    assert shown[-1].endswith("`python -m benchmarks.ops`. Times are the device's; host: until a call returns.")


def test_every_op_of_the_gpu_suite_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.ops", "--smoke"]
    environment = os.environ | {"PPO_FAST_BENCH_SMOKE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    groups = {line[:48].split(",")[0].strip() for line in lines if " ms " in line}
    assert groups == {"gae", "gae with a mask", "value_loss", "sample_tokens", "token_stats", "policy_loss", "linear"}
    assert not [line for line in lines if "Error" in line]


def test_only_our_own_suites_run_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    for name in ("gae", "trl", "7b"):
        (tmp_path / f"bench_{name}.py").touch()
    assert runner.main([]) == runner.main(["trl"]) == 0
    assert [command[-2] for command in commands] == ["benchmarks/bench_gae.py", "benchmarks/bench_trl.py"]


def test_the_profile_of_an_update_has_a_share_for_every_group() -> None:
    times = profile_update.run("tiny", {"rollout.batch_size": "8", "optim.minibatch_size": "8"})
    assert [*times] == [*profile_update.GROUPS, profile_update.REST]
    assert min(times.values()) > 0
    shown = profile_update.table("tiny", times).splitlines()
    assert shown[0] == "| update, tiny | share | ms |"
    assert len(shown) == 9
    assert shown[-1].startswith("| all | 100% | ")


def test_the_race_at_size_shows_phases_pace_and_memory() -> None:
    ours = {"seconds": {"rollout": 1.0, "scoring": 0.5, "update": 0.5}, "peak_gib": 4.0}
    theirs = {"seconds": {"rollout": 6.0, "scoring": 1.0, "update": 5.0}, "peak_gib": 16.0}
    lines = trl_at_size.table({"ppo_fast": ours, "trl": theirs}).splitlines()
    assert lines[2] == "| ppo_fast | 1.000 | 0.500 | 0.500 | 2.000 | 4.00 |"
    assert lines[-1] == "6.0 times TRL's pace in 0.25 of its memory"


def test_the_phases_of_trl_are_between_its_marks() -> None:
    module = SimpleNamespace(batch_generation=lambda x: x + 1, masked_whiten=lambda x, mask: x)
    marks, clock = trl_at_size.Marks(), iter(range(100))
    marks.now = lambda: float(next(clock))  # type: ignore[method-assign]
    marks.patch(module)
    for _ in range(3):
        assert module.batch_generation(1) == 2
        assert module.masked_whiten(5, mask=None) == 5
    assert marks.seconds() == [{"rollout": 1.0, "scoring": 1.0, "update": 1.0}] * 2


@pytest.mark.filterwarnings("ignore:a bfloat16 weight")
def test_our_side_of_the_race_at_size_runs() -> None:
    updates = trl_at_size.train_ours(trl_at_size.SIZES["tiny"])
    assert len(updates) == trl_at_size.UPDATES
    assert all(seconds > 0 for update in updates for seconds in update.values())
