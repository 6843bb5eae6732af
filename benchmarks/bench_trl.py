"""PPO against TRL's (`trl.experimental.ppo`): the good-token task with the same model, reward and hyper-parameters.

Each trainer is a process of its own that halts where an update's responses are scored, so that they advance by turns,
an update at a time, and what is timed is everything between two scorings. TRL calls `gc.collect` twice an update, at
the cost of an update of a model this small: it runs a second time without.

    pip install trl==1.12.0 && python -m benchmarks.run trl
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from ppo_fast.rlhf.models import tiny
from tests.acceptance import good_token

VERSION = "1.12.0"
OURS, TRL, TRL_LEAN = "ppo_fast", f"TRL {VERSION}", f"TRL {VERSION} without gc.collect"
UPDATES, SEEDS = 20, (0, 1, 2)
FASTER = 1.8  # than TRL as it is
Report = Callable[[float], None]  # gets the mean score of each rollout batch


def train_ours(seed: int, updates: int, report: Report) -> None:
    def reward(**responses: Any) -> list[float]:
        scores = good_token.share_of_good_tokens(**responses)
        report(statistics.mean(scores))
        return scores

    with tempfile.TemporaryDirectory() as directory:
        good_token.train(_config(directory, seed, updates), reward)


def train_trl(seed: int, updates: int, report: Report) -> None:
    import datasets
    import trl
    from trl.experimental.ppo import PPOTrainer

    assert trl.__version__ == VERSION
    policy, tokenizer = good_token.make_policy(seed), tiny.make_tokenizer(good_token.WORDS)
    rows = datasets.Dataset.from_dict({"input_ids": tokenizer(good_token.WORDS * 8)["input_ids"]})
    with tempfile.TemporaryDirectory() as directory:
        PPOTrainer(
            args=_trl_config(directory, seed, updates),
            processing_class=tokenizer,
            model=policy,
            ref_model=copy.deepcopy(policy),
            reward_model=GoodTokens(report),
            train_dataset=rows,
            value_model=_value_model(policy),
        ).train()


def _config(directory: str, seed: int, updates: int) -> Any:
    """TRL does not clip the gradient norm."""
    return good_token.config(Path(directory) / "run", seed, updates, optim={"max_grad_norm": 1e9})


def _trl_config(directory: str, seed: int, updates: int) -> Any:
    """Our run's values under TRL's names; EOS ends a response, nothing is saved or recomputed.

    TRL's learning rate falls once an update, ours every optimizer step.
    """
    from trl.experimental.ppo import PPOConfig

    ours = _config(directory, seed, updates)
    optim, loss = ours.optim, ours.loss
    assert optim.lr == optim.value_lr
    assert loss.clip_low == loss.clip_high
    return PPOConfig(
        output_dir=directory,
        seed=seed,
        use_cpu=harness.DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        num_sample_generations=0,
        total_episodes=updates * ours.rollout.batch_size,
        per_device_train_batch_size=ours.rollout.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=ours.steps_per_epoch,
        num_ppo_epochs=optim.epochs,
        local_rollout_forward_batch_size=ours.rollout.batch_size,
        response_length=ours.rollout.max_new_tokens,
        temperature=ours.rollout.temperature,
        stop_token="eos",
        missing_eos_penalty=ours.reward.missing_eos_penalty or None,
        learning_rate=optim.lr,
        lr_scheduler_type="linear",
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        kl_coef=ours.kl.coef,
        cliprange=loss.clip_low,
        cliprange_value=loss.value_clip,
        vf_coef=loss.vf_coef,
        gamma=ours.advantage.gamma,
        lam=ours.advantage.lam,
    )


def _value_model(policy: Any) -> Any:
    """The policy's backbone with a head of zeros."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(copy.deepcopy(policy.config))
    model.score = nn.Linear(policy.config.hidden_size, 1, bias=False)
    nn.init.zeros_(model.score.weight)
    model.model.load_state_dict(policy.model.state_dict())
    return model


class GoodTokens(nn.Module):
    """The task's score as the reward model that TRL wants: at each position the share of good tokens so far."""

    base_model_prefix = "count"

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report
        self.register_buffer("good", torch.tensor(good_token.GOOD))

    def count(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Shares [B, L, 1] of token ids [B, L]: the first is the prompt, the first pad ends the response."""
        good = torch.isin(input_ids, self.good) & attention_mask.long().cumprod(1).bool()
        good[:, 0] = False
        shares = good.float().cumsum(1) / good_token.LENGTH
        self.report(shares[:, -1].mean().item())
        return SimpleNamespace(hidden_states=[shares[:, :, None]])

    def score(self, shares: Tensor) -> Tensor:
        return shares


def train_trl_lean(seed: int, updates: int, report: Report) -> None:
    """In a process of its own, so nothing is restored."""
    vars(gc)["collect"] = lambda generation=2: 0
    train_trl(seed, updates, report)


TRAINERS = {OURS: train_ours, TRL: train_trl, TRL_LEAN: train_trl_lean}


class Trainer:
    """A process that trains, an update a step; ``curve`` has the score of every rollout batch so far."""

    def __init__(self, name: str, seed: int) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_trl", name, str(seed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.curve = [self._read()]

    def step(self) -> None:
        """Go on to the next scoring: learn from the batch that is there, sample and score one more."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.curve.append(self._read())

    def _read(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def races() -> dict[str, Any]:
    """All by turns, for each seed: ``curves`` by name [seed][update], ``ratios`` of their seconds to ours."""
    curves: dict[str, list[list[float]]] = {name: [] for name in TRAINERS}
    ratios: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for seed in SEEDS:
        with contextlib.ExitStack() as stack:
            trainers = {name: stack.enter_context(Trainer(name, seed)) for name in TRAINERS}
            rounds = [{name: harness.seconds(t.step) for name, t in trainers.items()} for _ in range(1, UPDATES)]
        for name, trainer in trainers.items():
            curves[name].append(trainer.curve)
            ratios[name].append(statistics.median(times[name] / times[OURS] for times in rounds[1:]))
    return {"curves": curves, "ratios": {name: statistics.median(found) for name, found in ratios.items()}}


def _at(races: dict[str, Any], name: str, update: int) -> float:
    return statistics.mean(curve[update - 1] for curve in races["curves"][name])


@pytest.mark.peers
def test_all_learn_the_task_alike(races: dict[str, Any]) -> None:
    reached = [_at(races, name, UPDATES) for name in TRAINERS]
    assert min(reached) >= 0.9
    assert max(reached) - min(reached) <= 0.05


@pytest.mark.peers
def test_ours_is_faster(races: dict[str, Any]) -> None:
    assert races["ratios"][TRL] >= FASTER


@pytest.mark.peers
@pytest.mark.parametrize("name", TRAINERS)
def test_update(benchmark: Any, races: dict[str, Any], name: str) -> None:
    benchmark.group = "good token, 64 responses of 16 tokens, 16 optimizer steps"
    with Trainer(name, SEEDS[0]) as trainer:
        benchmark.pedantic(trainer.step, rounds=UPDATES - 2, iterations=1, warmup_rounds=1)
    benchmark.extra_info |= {
        "contender": name,
        "peak_bytes": int(_printed("memory", name)),
        "ratios": {other: races["ratios"][other] for other in (TRL, TRL_LEAN)} if name == OURS else {},
        "outcome": {f"good tokens at {n}": round(_at(races, name, n), 3) for n in (1, 10, UPDATES)},
        "curves": races["curves"][name],
    }


def _printed(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.bench_trl", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _main(name: str, argument: str) -> None:
    """``NAME SEED``: train, a line in for each line out. ``memory NAME``: the peak bytes of two updates."""
    torch.set_num_threads(1)
    out = sys.stdout

    def halt(score: float) -> None:
        print(score, file=out, flush=True)
        sys.stdin.readline()

    with contextlib.redirect_stdout(sys.stderr):
        if name == "memory":
            print(harness.peak_bytes(lambda: TRAINERS[argument](0, 2, lambda score: None)), file=out)
        else:
            TRAINERS[name](int(argument), UPDATES, halt)


if __name__ == "__main__":
    _main(*sys.argv[1:])
