"""The benchmark of a 7B: every preset and every model, scaled down, on a CPU."""

import itertools
import json

import pytest

from benchmarks import bench_7b
from ppo_fast.rlhf.planning.plan import Plan
from ppo_fast.rlhf.training.runtime import PhaseMemory

PRESETS = ("7b-80g-lora", "7b-80g-full", "7b-24g")


@pytest.mark.parametrize(("preset", "model"), [*zip(PRESETS, itertools.cycle(bench_7b.MODELS))])
def test_a_preset_runs_and_tells_its_phases(preset, model, tmp_path, capsys):
    arguments = ["--preset", preset, "--model", model, "--scale", "tiny", "--updates", "1", "--out", str(tmp_path)]
    assert bench_7b.main([*arguments, "--set", "rollout.max_new_tokens=5"]) == 0
    result = json.loads((tmp_path / f"{model}-{preset}-80-tiny.json").read_text())
    assert [*result["phases"]] == [*bench_7b.PHASES, "all"]
    assert sum(result["phases"][phase]["share"] for phase in bench_7b.PHASES) == pytest.approx(1)
    assert all(x["tokens_per_second"] > 0 and x["peak_gib"] is None for x in result["phases"].values())
    assert all(result["phases"][phase]["planned_gib"] > 0 for phase in ("rollout", "logprobs", "update", "all"))
    assert 0 < result["length_mean"] <= 5
    assert result["changes"] == {"rollout.max_new_tokens": "5"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{model} scaled down, {preset}, 80.0 GiB, CPU: 16 responses of ")
    assert lines[1] == f"first update: {result['first_update_s']:.1f} s"
    assert lines[3].split(" | ")[4] == "of GEMM rate"
    assert len(lines) == 10


def test_the_first_update_is_no_part_of_the_means():
    history = [
        {"time/update": 100.0, "perf/mfu": 0.1},
        {"time/update": 1.0, "perf/mfu": 0.4},
        {"time/update": 3.0, "perf/mfu": 0.5},
    ]
    assert bench_7b.means(history) == {"time/update": 2.0, "perf/mfu": 0.45}
    assert bench_7b.means(history[:1]) == history[0]


@pytest.mark.parametrize(("model", "billions"), [("qwen2.5-7b", 7.616), ("llama3.1-8b", 8.030)])
def test_the_shapes_are_those_of_the_models(model, billions):
    policy = bench_7b.make_policy(model, "full", bench_7b.torch.device("meta"))
    assert sum(p.numel() for p in policy.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert all(p.dtype == bench_7b.torch.bfloat16 for p in policy.parameters())


def test_memory_is_told_by_phase_and_highest():
    metrics = {"tokens_per_second": 1.0}
    metrics |= {
        f"{name}{phase}{end}": 1.0 for phase in bench_7b.PHASES for name, end in (("time/", ""), ("time/", "_share"))
    }
    metrics |= {f"tokens_per_second/{phase}": 1.0 for phase in bench_7b.PHASES}
    GIB = 2**30
    peaks = {phase: PhaseMemory(i * GIB, (10 - i) * GIB) for i, phase in enumerate(bench_7b.PHASES)}
    accounts = {
        "rollout": {"weights": 2 * GIB, "CUDA context": GIB},
        "update": {"weights": GIB, "fragmentation": 9 * GIB},
    }
    found = bench_7b.phases(metrics, peaks, Plan(accounts, host=0, limit=None))
    assert [found[name]["planned_gib"] for name in ("rollout", "logprobs", "update", "all")] == [2.0, None, 1.0, 2.0]
    assert (found["update"]["peak_gib"], found["all"]["peak_gib"], found["all"]["reserved_gib"]) == (3.0, 3.0, 10.0)
    assert found["all"]["seconds"] == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.lrr=1", "error: 7b-24g and flags: unknown key 'optim.lrr', the nearest is 'optim.lr'"),
        ("updates", "error: argument --set: expected KEY=VALUE, got 'updates'"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, change, message):
    arguments = ["--preset", "7b-24g", "--model", "qwen2.5-7b", "--scale", "tiny", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        bench_7b.main([*arguments, "--set", change])
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
