"""Callbacks: objects that are called while a run goes on, and the record that each call is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import SupervisedConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.training.runtime import PhaseMemory
from ppo_fast.rlhf.training.state import check_state
from ppo_fast.rlhf.user_code import UserState, call, to_python
from ppo_fast.rlhf.world import current

HOOKS = ("on_start", "on_step", "on_checkpoint", "on_end")

Objects = dict[str, Any]  # `models` and `tokenizer` of a StepRecord


@dataclass(frozen=True)
class StepRecord:
    """The state of a run at a call of a :class:`Callback`; models and batch are the run's own, to be read only."""

    step: int  # from 0, an update of PPO or an optimizer step: the one just taken; in `on_start` the next one
    total: int  # steps of the whole run
    config: PPOConfig | SupervisedConfig
    models: Any  # PPO: `policy`, `reference`, `value` and more; the other stages: the model that is trained
    tokenizer: PreTrainedTokenizerBase
    directory: Path  # of the run: metrics.jsonl, checkpoints/, final/
    metrics: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # empty when on_nan = "skip" skipped the batch
    notes: tuple[str, ...] = ()  # remarks about the step, for the console and metrics.jsonl
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # wall time by phase
    memory: Mapping[str, PhaseMemory] = dataclasses.field(default_factory=dict)  # by phase; empty on a CPU
    batch: Any = None  # PPO: `PPOBatch`; the other stages: `ExampleBatch`; None in `on_start` and `on_end`
    answers: tuple[Mapping[str, object], ...] = ()  # to the held-out prompts, when PPO's evaluation was due
    skipped: int = 0  # batches skipped so far
    checkpoint: Path | None = None  # the directory just written, in `on_checkpoint`

    def adding(self, metrics: Mapping[str, object], *notes: str) -> StepRecord:
        """Return this record with more metrics and notes; ValueError for a metric that is no finite number."""
        numbers = {name: to_python(value) for name, value in metrics.items()}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        return dataclasses.replace(self, metrics={**self.metrics, **numbers}, notes=(*self.notes, *notes))


class Callback:
    """A base for callbacks: each method does nothing. An object with any of the methods is a callback as well.

    Callbacks are called in the order they are passed, on a step after the run's own evaluation and before its log.
    One with `state_dict` and `load_state_dict` is saved in every checkpoint and restored by `resume`. Under torchrun
    every rank has the same ones and calls them, and the state of rank 0 is saved.
    """

    phase = ""  # in the progress bar during a call, where that takes its time
    collective = False  # ranks wait for each other within a call; else an error of one is raised on all

    def on_start(self, record: StepRecord) -> None:
        """Called before the first step, and before the next one of a resumed run."""

    def on_step(self, record: StepRecord) -> StepRecord | None:
        """Called after each step; may return `record.adding(...)`, which later callbacks and the log then get."""

    def on_checkpoint(self, record: StepRecord) -> None:
        """Called after a checkpoint is complete."""

    def on_end(self, record: StepRecord) -> None:
        """Called after the final model is saved; not after an error or an interruption."""


class UserCallback(Callback):
    """A user's object as a callback; its failure is a UserError that names it."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def on_start(self, record: StepRecord) -> None:
        self._call("on_start", record)

    def on_step(self, record: StepRecord) -> StepRecord | None:
        answer = self._call("on_step", record)
        if answer is None or isinstance(answer, StepRecord):
            return answer
        raise UserError(f"the {self.name}: expected on_step to return None or a StepRecord, got {answer!r}")

    def on_checkpoint(self, record: StepRecord) -> None:
        self._call("on_checkpoint", record)

    def on_end(self, record: StepRecord) -> None:
        self._call("on_end", record)

    @property
    def state(self) -> UserState | None:
        """The part of a checkpoint that holds its state, if it has one."""
        return UserState(self.name, self.owner) if hasattr(self.owner, "load_state_dict") else None

    def _call(self, hook: str, record: StepRecord) -> object:
        function = getattr(self.owner, hook, None)
        return None if function is None else call(f"{self.name}'s", function, record)


def user_callbacks(owners: Iterable[object]) -> list[UserCallback]:
    """Wrap the user's callbacks, each named by its class.

    UserError, on all ranks, for an object that is none, and where a rank has others than rank 0.
    """
    world = current()
    found = world.each(lambda: _wrapped(owners))
    names = [callback.name for callback in found]
    first = world.objects(names)[0]
    world.each(lambda: _check_same(names, first, world.rank))
    return found


def _check_same(names: list[str], first: list[str], rank: int) -> None:
    """Raise a UserError for callbacks that are not those of rank 0: the ranks wait for each other after each call."""
    if names != first:
        expected, got = (", ".join(each) or "none" for each in (first, names))
        raise UserError(f"callbacks: expected {expected} on all ranks, as on rank 0, got {got} on rank {rank}")


def _wrapped(owners: Iterable[object]) -> list[UserCallback]:
    if not isinstance(owners, Iterable):
        raise UserError(f"callbacks: expected a list of callbacks, got {owners!r}")
    found: dict[str, UserCallback] = {}
    for owner in owners:
        if isinstance(owner, type) or not any(hasattr(owner, hook) for hook in HOOKS):
            raise UserError(f"callbacks: expected objects with one of {', '.join(HOOKS)}, got {owner!r}")
        kind = f"callback {type(owner).__name__}"
        name = next(name for n in range(1, len(found) + 2) if (name := kind if n == 1 else f"{kind} {n}") not in found)
        found[name] = UserCallback(owner, name)
        state = found[name].state
        if state is not None:
            check_state(state.state_dict(), f"{name}'s state_dict")
    return [*found.values()]
