"""The loop of all stages: steps, callbacks, checkpoints, signals, resuming, and numbers that are not finite."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import SupervisedConfig
from ppo_fast.rlhf.errors import BatchError, UserError, error_prefix, with_origin
from ppo_fast.rlhf.files import settle, settle_all
from ppo_fast.rlhf.training.callbacks import Callback, Objects, StepRecord, UserCallback
from ppo_fast.rlhf.training.checkpoint import Checkpoint, is_complete, save_checkpoint, supersede_newer
from ppo_fast.rlhf.training.log import BEST, CHECKPOINTS, FAILED, FINAL, StageLog
from ppo_fast.rlhf.training.resume import restoring, warn_about_changes
from ppo_fast.rlhf.training.runtime import Stopwatch
from ppo_fast.rlhf.training.signals import Interrupted, StopSignals
from ppo_fast.rlhf.training.state import State, Stateful, restore_rng, rng_state
from ppo_fast.rlhf.world import current

Value = TypeVar("Value")


class TrainingLoop(ABC):
    """A run of steps that continues from a checkpoint bitwise as if it had never stopped."""

    config: PPOConfig | SupervisedConfig
    generator: torch.Generator  # every random number of the run
    inputs: State  # of `resume.inputs`: a resumed run must find the same
    code: Mapping[str, str] = MappingProxyType({})  # of `resume.file_digests`: the user's functions
    total: int  # steps of the whole run
    length: str  # what sets `total`, for messages
    callbacks: Sequence[UserCallback]
    done: int = 0  # steps
    skipped: int = 0  # batches skipped, on_nan = "skip"
    record: StepRecord  # of the latest step; of the run as a whole before the first
    watch: Stopwatch  # of the phases of a step

    @abstractmethod
    def step(self, index: int, log: StageLog, /) -> StepRecord:
        """Take step `index`, from 0."""

    @abstractmethod
    def describe(self) -> list[str]:
        """Return what a person checks before the first step: the model, and the data with the length of the run."""

    @abstractmethod
    def _objects(self) -> Objects:
        """Return `models` and `tokenizer` of a StepRecord."""

    @abstractmethod
    def _own_callbacks(self) -> list[Callback]:
        """Return the callbacks that come before those of the user."""

    @abstractmethod
    def _parts(self) -> dict[str, Stateful]:
        """Return the objects whose state changes during a run, except the weights."""

    @abstractmethod
    def _write(self, directory: Path) -> None:
        """Write the weights and their files into an existing directory."""

    @abstractmethod
    def _load(self, directory: Path) -> None:
        """Copy the weights that `_write` wrote into the models."""

    def loop(self, log: StageLog, stop: StopSignals) -> None:
        """Take the remaining steps; after each one the run can be saved and stopped."""
        current().on_main(lambda: _settle(log.directory))
        every = self.config.checkpoint.every
        callbacks: list[Callback] = [*self._own_callbacks(), *self.callbacks, log]
        self.record = StepRecord(self.done, self.total, self.config, directory=log.directory, **self._objects())
        current().on_main(lambda: log.introduce(self.describe()))
        self.watch.show = log.show
        for callback in callbacks:
            log.show(callback.phase)
            _call(callback, callback.on_start, self.record)
        while not self._finished():
            with error_prefix(f"{log.unit} {self.done + 1}"):
                self.record = self.step(self.done, log)
                for callback in callbacks:
                    log.show(callback.phase)
                    self.record = _call(callback, callback.on_step, self.record) or self.record
            self.done += 1
            finished = self._finished()
            if every and (self.done % every == 0 or finished):
                self.save(log)
            asked = current().objects(stop.request(finished=finished))  # all ranks stop after the same step
            if request := next(filter(None, asked), None):
                raise Interrupted(*request, f"{log.unit} {self.done}", self.save(log))
            self.record = dataclasses.replace(self.record, batch=None)  # freed before the next one is made
        log.show("saving")

    def _finished(self) -> bool:
        """Return whether no step is left to take."""
        return self.done >= self.total

    def end(self) -> None:
        """Call `on_end` of the user's callbacks, after the final model is saved."""
        for callback in self.callbacks:
            callback.on_end(dataclasses.replace(self.record, step=self.done - 1))

    def save(self, log: StageLog) -> Path:
        """Write a checkpoint, unless this step has one, and call `on_checkpoint` of the user's callbacks."""
        target = log.directory / CHECKPOINTS / f"{log.unit}-{self.done:06d}"
        if current().on_main(lambda: is_complete(target)):
            return target
        log.show("saving")
        world, rng = current(), rng_state(self.generator)
        state = world.each(lambda: self._state(log, rng))
        if world.size > 1:  # of the generators that a user's functions may use
            others = world.objects({name: x for name, x in rng.items() if name != "run"})[1:]
            state["rng_of_ranks"] = others
        saved = save_checkpoint(target, self._write, state, keep_last=self.config.checkpoint.keep)
        with error_prefix(f"{log.unit} {self.done}"):
            for callback in self.callbacks:
                _call(callback, callback.on_checkpoint, dataclasses.replace(self.record, checkpoint=saved))
        return saved

    def _state(self, log: StageLog, rng: State) -> State:
        """Return what a checkpoint holds besides the weights."""
        return {
            "config": dataclasses.asdict(self.config),
            "log": log.position(self.done),
            "skipped": self.skipped,
            "inputs": self.inputs,
            "code": dict(self.code),
            "parts": {name: part.state_dict() for name, part in self._all_parts().items()},
            "rng": rng,
        }

    def restore(self, start: Checkpoint) -> None:
        """Restore a checkpoint, and rename the newer ones.

        UserError when the run began with another model or other data, or is over, or the checkpoint is damaged.
        """
        checked = restoring(start.directory)
        current().each(checked(lambda: self._restore(start)))
        current().on_main(checked(lambda: supersede_newer(start.directory)))

    def _restore(self, start: Checkpoint) -> None:
        state, parts = start.state, self._all_parts()
        done = state["log"]["done"]
        if self.total < done:
            raise UserError(f"resume: {self.length}: expected at least the {done} that are done, got {self.total}")
        if parts.keys() != state["parts"].keys():
            raise UserError(f"resume: expected a run of {sorted(state['parts'])}, got {sorted(parts)}")
        for name, found in self.inputs.items():
            if found != state["inputs"][name]:
                raise UserError(f"resume: expected the {name} that the run was begun with, got others")
        warn_about_changes(state["code"], self.code)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self._load(start.directory)
        ranks = [{}, *state.get("rng_of_ranks", [])]
        own = ranks[current().rank] if current().rank < len(ranks) else {}
        restore_rng(state["rng"] | own, self.generator)
        self.done, self.skipped = done, state["skipped"]

    def _all_parts(self) -> dict[str, Stateful]:
        """Return `_parts` and the states of the user's callbacks."""
        return self._parts() | {callback.name: callback.state for callback in self.callbacks if callback.state}

    def give_up(self, index: int, log: StageLog, error: BatchError, save: Callable[[Path, BatchError], Path]) -> str:
        """Skip and count the batch of step `index` and return a note, or stop with it saved by `save`; see `on_nan`."""
        if self.config.on_nan == "skip":
            self.skipped += 1
            return f"batch skipped: {error}"
        saved = save(log.directory / FAILED / f"{log.unit}-{index + 1:06d}", error)
        in_backward = isinstance(self.config, PPOConfig) and self.config.optim.in_backward
        weights = "the weights, of which the step has changed some," if in_backward else "the weights before it"
        message = f"{error}; the batch and {weights} are in {str(saved)!r}"
        raise with_origin(UserError(message), error.origin or 0) from error


def _call(callback: Callback, hook: Callable[[StepRecord], Value], record: StepRecord) -> Value:
    """Return the answer of a callback's method on this rank; an error on one rank is raised on all."""
    return hook(record) if callback.collective else current().each(lambda: hook(record))


def _settle(directory: Path) -> None:
    """Put right what a killed process left in the directory of a run."""
    for name in (FINAL, BEST):
        settle(directory / name)
    for name in (CHECKPOINTS, FAILED):
        settle_all(directory / name)


def describe_model(model: Any, trained: Iterable[nn.Parameter], *others: str) -> str:
    """Return a line: architecture of a model of transformers, its parameters, those trained, device, dtype, others."""
    count, updated = model.num_parameters(), sum({id(p): p.numel() for p in trained if p.requires_grad}.values())
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    where = [str(model.device), "/".join(kinds), *filter(None, others)]
    name = type(model).__name__.removeprefix("FSDP")  # of weights that are split
    return f"{name}: {_short(count)} parameters, {_short(updated)} trained; {', '.join(where)}"


def _short(count: int) -> str:
    for power, letter in ((9, "B"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {letter}"
    return str(count)
