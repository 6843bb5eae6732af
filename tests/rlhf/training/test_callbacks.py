"""Callbacks: what they are given and when, what they may add, how they fail, and that they are saved."""

import dataclasses
import json

import pytest
import torch

from ppo_fast.rlhf import Callback, StepRecord, UserError, train_ppo
from ppo_fast.rlhf.models import tiny
from tests.helpers import raises_exactly
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.supervised_factories import STAGES


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(make_config, tokenizer):
    """run(*callbacks, resume=, **config) -> PPOResult on a new tiny model."""

    def go(*callbacks, resume=False, reward_fn=reward, **values):
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        return train_ppo(
            make_config(**values),
            reward_fn=reward_fn,
            prompts=PROMPTS,
            policy=policy,
            tokenizer=tokenizer,
            callbacks=callbacks,
            resume=resume,
        )

    return go


class Recorder(Callback):
    """Keeps every record with the name of its hook."""

    def __init__(self):
        self.calls = []

    def on_start(self, record):
        self.calls.append(("start", record))

    def on_step(self, record):
        self.calls.append(("step", record))

    def on_checkpoint(self, record):
        self.calls.append(("checkpoint", record))

    def on_end(self, record):
        self.calls.append(("end", record))

    @property
    def steps(self):
        return [record for hook, record in self.calls if hook == "step"]


def test_a_callback_follows_a_run_of_ppo(run, make_config):
    seen, settings = Recorder(), {"updates": 2, "checkpoint": {"every": 2}}
    result = run(seen, **settings)
    assert [(hook, record.step) for hook, record in seen.calls] == [
        ("start", 0),
        ("step", 0),
        ("step", 1),
        ("checkpoint", 1),
        ("end", 1),
    ]
    for _, record in seen.calls:
        assert (record.total, record.directory, record.config) == (2, result.directory, make_config(**settings))
        assert record.models is result.models
        assert record.tokenizer is result.models.tokenizer
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.step = 7
    for record, logged in zip(seen.steps, result.history, strict=True):
        assert {**record.metrics, "nan/skipped_batches": 0.0} == logged
        assert record.seconds == {name: logged[f"time/{name}"] for name in ("rollout", "logprobs", "score", "update")}
        assert record.memory == {}  # on a CPU
        batch = record.batch
        assert batch.rewards.scores.mean().item() == pytest.approx(logged["objective/scores"])
        lengths = batch.rollout.cu_seqlens.diff()
        assert torch.equal(lengths, batch.generation.mask.sum(dim=1))
        assert {len(batch.rollout.logprobs), len(batch.experience.advantages)} == {int(lengths.sum())}
    (checkpoint,) = [record.checkpoint for hook, record in seen.calls if hook == "checkpoint"]
    assert (checkpoint / "state.json").is_file()
    assert [record.batch for hook, record in seen.calls if hook in ("start", "end")] == [None, None]


@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_follows_a_run_of_a_supervised_stage(run_stage, stage):
    seen = Recorder()
    result = run_stage(stage, callbacks=[seen], checkpoint={"every": 2})
    total = len(result.history)
    assert [record.step for record in seen.steps] == [*range(total)]
    assert [record.step for hook, record in seen.calls if hook == "checkpoint"] == [*range(1, total, 2), total - 1][
        : (total + 1) // 2
    ]
    assert seen.calls[-1][0] == "end"
    for record, logged in zip(seen.steps, result.history, strict=True):
        assert record.models is result.trained
        assert record.total == total
        assert record.seconds == {"step": logged["time/step"]}
        assert len(record.batch.examples) == len(record.batch.rows) <= 8
        assert record.metrics["train/loss"] == logged["train/loss"]


def test_what_a_callback_adds_reaches_the_log_and_later_callbacks(run):
    class Adds:
        def on_step(self, record):
            return record.adding({"own/step": torch.tensor(record.step)}, f"step {record.step}")

    seen = Recorder()
    result = run(Adds(), seen)
    assert [metrics["own/step"] for metrics in result.history] == [0, 1]
    assert [record.metrics["own/step"] for record in seen.steps] == [0, 1]
    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["note"] for line in lines] == ["step 0", "step 1"]


def test_a_callback_is_given_the_evaluation_and_the_batch_that_was_skipped(run):
    calls = []

    def sometimes(completion_ids, **_):
        calls.append(1)
        return [float("nan")] * len(completion_ids) if len(calls) == 2 else reward(completion_ids)

    seen = Recorder()
    run(seen, reward_fn=sometimes, updates=3, on_nan="skip")
    assert [bool(record.metrics) for record in seen.steps] == [True, False, True]
    assert [record.skipped for record in seen.steps] == [0, 1, 1]
    skipped = seen.steps[1]
    assert skipped.notes[0].startswith("batch skipped: reward function: expected a finite score")
    assert skipped.batch.rollout is not None
    assert skipped.batch.experience is None


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_checkpoint", "on_end"])
def test_a_callback_that_raises_is_named_and_nothing_saved_is_lost(run, hook):
    class Bad:
        pass

    def fail(record):
        if hook != "on_step" or record.step == 1:
            raise KeyError("x")

    setattr(Bad, hook, staticmethod(fail))
    line = fail.__code__.co_firstlineno + 2
    where = {"on_step": "update 2: ", "on_checkpoint": "update 1: "}.get(hook, "")
    told = f"{where}the callback Bad's 'fail' failed with KeyError: 'x' (test_callbacks.py:{line})"
    with raises_exactly(told, UserError):
        run(Bad(), updates=3, checkpoint={"every": 1})
    if hook != "on_start":
        seen = Recorder()
        resumed = run(seen, updates=3, checkpoint={"every": 1}, resume=True)
        assert seen.calls[0][1].step == {"on_step": 1, "on_checkpoint": 1, "on_end": 3}[hook]
        whole = run(updates=3, checkpoint={"every": 1}, overwrite=True)
        assert resumed.history[2]["objective/kl"] == whole.history[2]["objective/kl"]


class Counter:
    """A callback with a state."""

    def __init__(self):
        self.count = 0

    def on_step(self, record):
        self.count += 1
        return record.adding({"own/count": self.count})

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_the_state_of_a_callback_is_saved_and_restored(run):
    run(Counter(), Counter(), updates=2, checkpoint={"every": 2})
    one, other = Counter(), Counter()
    result = run(one, other, updates=3, checkpoint={"every": 2}, resume=True)
    assert (one.count, other.count) == (3, 3)
    assert [metrics["own/count"] for metrics in result.history] == [1, 2, 3]
    with pytest.raises(UserError, match=r"^resume: expected a run of \['callback Counter', 'callback Counter 2', "):
        run(Counter(), updates=3, checkpoint={"every": 2}, resume=True)


def test_a_state_that_a_checkpoint_cannot_hold_is_refused_at_the_start(run, tmp_path):
    class Odd(Counter):
        def state_dict(self):
            return {"file": object()}

    with pytest.raises(UserError, match=r"^callback Odd's state_dict\.file: expected tensors, .* got object$"):
        run(Odd())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (3, "callbacks: expected a list of callbacks, got 3"),
        (["x"], "callbacks: expected objects with one of on_start, on_step, on_checkpoint, on_end, got 'x'"),
        (
            [StepRecord],
            "callbacks: expected objects with one of on_start, on_step, on_checkpoint, on_end, got "
            "<class 'ppo_fast.rlhf.training.callbacks.StepRecord'>",
        ),
    ],
)
def test_what_is_no_callback_is_refused(run_stage, callbacks, message):
    with raises_exactly(message, UserError):
        run_stage("sft", callbacks=callbacks)


def test_an_answer_of_a_callback_is_checked(run):
    class Answers:
        def __init__(self, answer):
            self.answer = answer

        def on_step(self, record):
            return self.answer(record)

    told = "update 1: the callback Answers: expected on_step to return None or a StepRecord, got 3"
    with raises_exactly(told, UserError):
        run(Answers(lambda record: 3))
    pattern = (
        r"^update 1: the callback Answers's 'on_step' failed with ValueError: x: expected a finite number, got nan"
    )
    with pytest.raises(UserError, match=pattern):
        run(Answers(lambda record: record.adding({"x": float("nan")})), overwrite=True)
