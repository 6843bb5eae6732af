"""Each example runs as a user runs it, and shows what it says."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from examples import clipped_objective, ppo_llm
from ppo_fast.rlhf.models import tiny

ROOT = Path(__file__).resolve().parent.parent


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tests run side by side
    run = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """As _run, in this process: the imports would take longer than the example."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_bandit_prints_its_table_and_draws(tmp_path: Path) -> None:
    printed = _run("bandit.py", "--out", str(tmp_path))
    rows = dict(re.findall(r"^(clip|penalty|none) +([\d.]+)", printed, re.MULTILINE))
    assert rows.keys() == {"clip", "penalty", "none"}
    assert min(map(float, rows.values())) >= 98
    assert matplotlib.image.imread(tmp_path / "bandit.png").std() > 0.02


def test_clipped_objective_draws(run_here: Callable[..., str], tmp_path: Path) -> None:
    run_here("clipped_objective.py", "--out", str(tmp_path), "--points", "21")
    assert matplotlib.image.imread(tmp_path / "clipped_objective.png").std() > 0.02


def test_ops_in_your_loop_learns(run_here: Callable[..., str]) -> None:
    shares = [float(share) for share in re.findall(r"even tokens ([\d.]+)", run_here("ops_in_your_loop.py"))]
    assert len(shares) == 30
    assert shares[0] < 0.6
    assert shares[-1] > 0.8


def test_train_in_python_learns(run_here: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (before, after) = re.findall(r"score ([\d.]+) -> ([\d.]+)", run_here("train_in_python.py"))[-1]
    assert float(before) < 0.55 < 0.65 < float(after)
    assert (tmp_path / "runs/even/final/config.json").is_file()
    assert len((ROOT / "examples/train_in_python.py").read_text().splitlines()) <= 25


@pytest.mark.slow
def test_cartpole_balances() -> None:
    lengths = [float(steps) for steps in re.findall(r"steps per episode +([\d.]+)", _run("cartpole.py"))]
    assert len(lengths) == 40
    assert lengths[0] < 40
    assert sorted(lengths[-5:])[2] > 150  # the median: single updates differ by the processor


@pytest.mark.slow
def test_patched_trl_learns_with_the_ops() -> None:
    printed = _run("patched_trl.py")
    shares = [float(share) for share in re.findall(r"'rewards/reward/mean': '([\d.]+)'", printed)]
    assert shares[-1] > shares[0] + 0.2
    assert "replaced trl.trainer.utils.selective_log_softmax (3x), 20 calls" in printed


@pytest.mark.slow
def test_ppo_llm_learns_to_write_good_tokens() -> None:
    printed = _run("ppo_llm.py")
    scores = [float(score) for score in re.findall(r"score ([\d.]+)", printed)]
    assert len(scores) == 20
    assert scores[0] < 0.15
    assert scores[-1] >= 0.9
    assert re.findall(r" ratio ([\d.]+)", printed) == ["1.000"] * 20
    assert max(float(diff) for diff in re.findall(r"logprob_diff (\S+)", printed)) <= 2e-5


@pytest.fixture
def rollout() -> Iterator[tuple[Any, ...]]:
    """Policy and critic of the example, and a batch of theirs before the first step."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        policy, reference, critic, prompts = ppo_llm.make_models(None)
        batch = ppo_llm.sample(policy, prompts)
        yield policy, critic, ppo_llm.advantages(ppo_llm.score(policy, reference, critic, batch))


@pytest.fixture
def tempered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another temperature than 1, which hides a division that is missing."""
    monkeypatch.setattr(ppo_llm, "TEMPERATURE", 0.5)
    monkeypatch.setattr(ppo_llm, "LOSS", replace(ppo_llm.LOSS, temperature=0.5))


def test_ppo_llm_starts_at_ratio_1(tempered: None, rollout: tuple[Any, ...]) -> None:
    policy, critic, batch = rollout
    assert not policy.training  # dropout is off
    assert not critic.training
    assert (batch["logprobs"] - batch["sampled_logprobs"]).abs().max() <= 2e-5
    metrics = ppo_llm.backward(policy, critic, ppo_llm.split(batch, 16)[1], micro_batch=8)
    assert metrics["ratio_mean"].item() == pytest.approx(1, abs=1e-6)
    assert metrics["approx_kl"].item() < 1e-10  # the mean of r - 1 - log r
    assert metrics["clipfrac"].item() == 0


def test_ppo_llm_has_the_gradients_of_one_micro_batch_in_four(rollout: tuple[Any, ...]) -> None:
    policy, critic, batch = rollout
    assert len(batch["mask"].sum(1).unique()) > 2
    with torch.no_grad():  # away from ratio 1, and from values of 0
        for parameter in [*policy.parameters(), *critic.parameters()]:
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = []
    for size in (64, 16):
        metrics = ppo_llm.backward(policy, critic, batch, micro_batch=size)
        gradients = [parameter.grad for parameter in [*policy.parameters(), *critic.parameters()]]
        found.append((metrics, gradients))
        policy.zero_grad()
        critic.zero_grad()
    assert 0.05 < found[0][0]["clipfrac"] < 0.95
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-6)


def test_ppo_llm_pays_the_score_on_the_last_counted_token_and_the_kl_on_each(rollout: tuple[Any, ...]) -> None:
    _, _, batch = rollout
    batch = batch | {"ref_logprobs": torch.where(batch["mask"], batch["logprobs"] - 2, 0.0)}
    batch = ppo_llm.advantages(batch)
    assert not batch["mask"].all()
    for row, length in enumerate(batch["mask"].sum(1).tolist()):
        response = batch["ids"][row, -batch["mask"].shape[1] :][:length]
        expected = torch.zeros(batch["mask"].shape[1])
        expected[:length] = -2 * ppo_llm.KL_COEF
        expected[length - 1] += (response % 10 == 0).sum() / 16
        torch.testing.assert_close(batch["rewards"][row], expected)
    counted = batch["advantages"][batch["mask"]]
    torch.testing.assert_close(torch.stack([counted.mean(), counted.std()]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(batch["returns"][:, -1], batch["rewards"][:, -1])  # the value after it is 0


def test_ppo_llm_trains_a_model_with_learned_positions_whose_pad_is_its_eos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny.make_tokenizer(["Count", "to", "ten:", "A", "price", "list,"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = tiny.make_model(len(tokenizer), arch="gpt2", hidden=16, layers=1, heads=2, initializer_range=0.5)
    model.generation_config.repetition_penalty = 1.5  # no part of the policy that is trained
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["ppo_llm.py", "--model", str(tmp_path), "--updates", "1"])
    with torch.random.fork_rng():
        ppo_llm.main()
    printed = capsys.readouterr().out
    (length,) = re.findall(r"length ([\d.]+)", printed)
    assert 1 < float(length) < 16  # some responses end early
    (diff,) = re.findall(r"logprob_diff (\S+)", printed)
    assert float(diff) <= 2e-5
    policy, _, _, prompts = ppo_llm.make_models(str(tmp_path))
    batch = ppo_llm.sample(policy, prompts)
    mask = batch["mask"]
    for response, length in zip(batch["ids"][:, -mask.shape[1] :], mask.sum(1), strict=True):
        assert tokenizer.eos_token_id not in response[: length - 1]
        assert length == mask.shape[1] or response[length - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("advantage", "dual", "values", "slopes"),
    [
        (1.0, False, [0.5, 1.0, 1.2, 1.2], [1.0, 1.0, 0.0, 0.0]),
        (-1.0, False, [-0.8, -1.0, -1.5, -3.5], [0.0, -1.0, -1.0, -1.0]),
        (-1.0, True, [-0.8, -1.0, -1.5, -3.0], [0.0, -1.0, -1.0, 0.0]),
    ],
)
def test_drawn_objective_is_the_formula(advantage: float, dual: bool, values: list[float], slopes: list[float]) -> None:
    ratio = torch.tensor([0.5, 1.0, 1.5, 3.5])
    config = clipped_objective.DUAL if dual else clipped_objective.CLIP
    value, slope = clipped_objective.objective_and_slope(ratio, advantage, config)
    torch.testing.assert_close(value, torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor(slopes, dtype=torch.float64))
