"""The best model by a named metric, patience and the clock in the stages of supervised learning."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.supervised.train import Objective, SupervisedEvaluation
from ppo_fast.rlhf.training.callbacks import StepRecord
from ppo_fast.rlhf.training.signals import Interrupted
from tests.helpers import assert_same, raises_exactly
from tests.rlhf.supervised_factories import STAGES

each_stage = pytest.mark.parametrize("stage", STAGES)
EVERY_STEP = {"log": {"eval_every": 1}, "checkpoint": {"every": 1, "keep": 0}}
LOSSES = [3.0, 2.0, 2.5, 2.0, 1.0]  # of the evaluations after each step


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """script(losses): what the evaluation after each step finds."""
    real = SupervisedEvaluation.on_step

    def make(losses: list[float]) -> None:
        loss = [9.0]

        def on_step(self: Any, record: StepRecord) -> StepRecord | None:
            loss[0] = losses[record.step]
            return real(self, record)

        monkeypatch.setattr(SupervisedEvaluation, "on_step", on_step)
        for kind in (Objective, *Objective.__subclasses__()):
            monkeypatch.setattr(kind, "evaluate", lambda *_: {"loss": loss[0], "accuracy": 0.5})

    return make


def stopped_after_every_step(run: Callable[[bool], Any]) -> tuple[list[str], Any]:
    """The messages with which the clock stopped a run, and its result in the end."""
    messages: list[str] = []
    while True:
        try:
            return messages, run(bool(messages))
        except Interrupted as stopped:
            messages.append(str(stopped))


@each_stage
def test_the_best_is_kept_and_patience_ends_a_run_that_the_clock_stops_after_every_step(
    stage: str, run_stage: Any, script: Any
) -> None:
    script(LOSSES)
    settings = {"evaluation": {"best": "eval/loss", "patience": 2}, "max_hours": 1e-9, **EVERY_STEP}
    messages, result = stopped_after_every_step(lambda resume: run_stage(stage, resume=resume, **settings))
    starts = [message.partition(";")[0] for message in messages]
    assert starts == [f"max_hours: stopped after step {step}" for step in (1, 2, 3)]
    assert [metrics["eval/loss"] for metrics in result.history] == LOSSES[:4]
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    best = [f"best eval/loss so far, {loss:.4g}: saved in best" for loss in LOSSES[:2]]
    ended = "stopped early: no better eval/loss in 2 evaluations"
    assert [record.get("note") for record in records] == [*best, None, ended]
    names = ("best", "checkpoints/step-000002", "final")
    kept, second, last = (load_file(result.directory / name / "model.safetensors") for name in names)
    assert_same(kept, second)
    assert any((kept[name] != last[name]).any() for name in kept)
    files = [{path.name for path in (result.directory / name).iterdir()} for name in ("best", "final")]
    assert files[1] == files[0] | {"README.md"}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"best": "eval/accuracy"}, 2), ({"best": "eval/loss"}, 3), ({"best": "eval/loss", "best_is": "max"}, 2)],
)
def test_less_of_a_loss_and_more_of_another_metric_is_better(
    settings: Any, steps: int, run_stage: Any, script: Any
) -> None:
    script([0.9, 0.8, 0.8])
    assert len(run_stage("sft", evaluation={**settings, "patience": 1}, **EVERY_STEP).history) == steps


@each_stage
def test_the_metric_must_exist_before_the_first_step(stage: str, run_stage: Any) -> None:
    with pytest.raises(UserError, match=r"^evaluation\.best: expected one of eval/loss.*, got 'eval/scores'$"):
        run_stage(stage, evaluation={"best": "eval/scores"})
    with raises_exactly("evaluation.best: expected null without held-out examples, got 'eval/loss'", UserError):
        run_stage(stage, evaluation={"best": "eval/loss"}, data={"held_out_frac": 0}, overwrite=True)


def test_patience_needs_a_metric(run_stage: Any) -> None:
    with raises_exactly("config: evaluation.patience: expected 0 without evaluation.best, got 2", UserError):
        run_stage("sft", evaluation={"patience": 2})
