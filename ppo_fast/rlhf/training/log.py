"""The log of a run: console, JSONL, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ppo_fast.rlhf.config.ppo import PPOConfig, RunConfig
from ppo_fast.rlhf.config.supervised import SupervisedConfig
from ppo_fast.rlhf.data.rows import parse_line
from ppo_fast.rlhf.data.templates import is_messages
from ppo_fast.rlhf.errors import UserError, check, printable, require
from ppo_fast.rlhf.files import remove
from ppo_fast.rlhf.training.callbacks import Callback, StepRecord
from ppo_fast.rlhf.world import current

if TYPE_CHECKING:
    from typing_extensions import Self

METRICS, SAMPLES, EVALUATIONS = "metrics.jsonl", "samples.jsonl", "evaluations.jsonl"
TENSORBOARD, CHECKPOINTS, FINAL, FAILED, BEST = "tensorboard", "checkpoints", "final", "failed", "best"
PHASE = "{task.fields[phase]}"  # of the progress bar
PHASES = {"rollout": "sampling", "resample": "sampling again", "logprobs": "scoring", "score": "reward", "step": ""}
Record = dict[str, Any]  # a line of a JSONL file
RUN_ARTIFACTS = (METRICS, SAMPLES, EVALUATIONS, TENSORBOARD, CHECKPOINTS, FINAL, FAILED, BEST)


def require_free(config: RunConfig) -> None:
    """Raise a UserError when the run would replace what an earlier one completed and `overwrite` is off."""
    directory = Path(config.output_dir)
    held = held_artifacts(directory)
    if held and not config.overwrite:
        resume = ", continue it (--resume)" * (directory / CHECKPOINTS).is_dir()
        others = f"choose another (--out DIR){resume} or replace it (--overwrite)"
        raise UserError(f"output_dir: {config.output_dir!r} already holds {held[0]!r}; {others}")


def held_artifacts(directory: Path) -> list[str]:
    """Return the names of what a run in that directory completed; none after one that ended before its first step.

    Such a run leaves empty files, and events of TensorBoard without a number.
    """
    begun = (directory / METRICS).is_file()
    return [name for name in RUN_ARTIFACTS if not (begun and name == TENSORBOARD) and _holds(directory / name)]


def _holds(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


class StageLog(Callback):
    """Writes the metrics of a step at once, so that a crashed run leaves a readable file.

    Use as a context manager; `history` keeps the metrics of the steps so far. Of several processes rank 0 writes; the
    others keep the history. Raises a UserError before anything is written when the directory holds what another run
    completed and `overwrite` is off. `resume` is the
    `position` of a checkpoint: the files are truncated to it and appended to.
    """

    unit = "step"  # what is counted
    files: tuple[str, ...] = (METRICS,)

    def __init__(
        self,
        config: PPOConfig | SupervisedConfig,
        stage: str,
        total: int,
        console: Console | None = None,
        *,
        resume: Mapping[str, int] | None = None,
    ) -> None:
        self.config, log, self.is_main = config, config.log, current().is_main
        if resume is None:
            current().on_main(lambda: require_free(config))
        self.log, self.stage, self.total, self.resume = log, stage, total, resume
        self.directory = Path(config.output_dir)
        self.history: list[dict[str, float]] = []
        self.console = console or Console(quiet=not (log.console and self.is_main))

    def __enter__(self) -> Self:
        current().on_main(self._begin)
        return self

    def _begin(self) -> None:
        """Open the files and the progress bar."""
        if self.resume is None:
            self._empty_directory()
        else:
            self._cut_back(self.resume)
        mode: Literal["w", "a"] = "w" if self.resume is None else "a"
        with contextlib.ExitStack() as resources:
            self._board, self._wandb = self._open_board(resources), self._open_wandb(resources)
            self._open = {
                name: resources.enter_context((self.directory / name).open(mode, encoding="utf-8"))
                for name in self.files
            }
            columns = (
                TextColumn(self.stage),
                BarColumn(20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn(PHASE),
            )
            bar = Progress(*columns, console=self.console, disable=not self._interactive)
            self._progress = resources.enter_context(bar)
            self._resources = resources.pop_all()
        done = self.resume["done"] if self.resume else 0
        if self.resume:
            self.console.print(f"resumed after {self.unit} {done}", highlight=False)
        self._task = self._progress.add_task(self.stage, total=self.total, completed=done, phase="")

    def __exit__(self, *error: object) -> None:
        if self.is_main:
            self._progress.update(self._task, phase="")
            self._resources.close()

    def introduce(self, lines: Iterable[str]) -> None:
        """Show the lines of `TrainingLoop.describe`."""
        for line in lines if self.is_main else ():
            self._print(line)

    def show(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Name the phase of the step in the progress bar, and how much of it is done."""
        name = PHASES.get(phase, phase)
        if self.is_main:
            self._progress.update(self._task, phase=f"{name} {done}/{total}" if total else name)

    def on_step(self, record: StepRecord) -> None:
        """Record a step that has metrics; show the notes of any."""
        note = "; ".join(record.notes) or None
        if record.metrics:
            metrics = {**record.metrics, "nan/skipped_batches": float(record.skipped)}
            self.write(record.step + 1, metrics, note)
        else:
            self.note(record.step + 1, note)

    def write(self, number: int, metrics: dict[str, float], note: str | None = None) -> None:
        """Record the metrics and the note of step `number`, from 1 in files and on the console."""
        self.history.append(metrics)
        if not self.is_main:
            return
        record: Record = {self.unit: number} | metrics
        _line(self._open[METRICS], record | ({"note": note} if note else {}))
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, number)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=number)
        if self.log.print_every and number % self.log.print_every == 0:
            start = f"{number:>5}/{self.total}  "
            for index, parts in enumerate(self._summary(metrics)):
                self._print_parts(start if not index else " " * len(start), parts)
        self.note(number, note)
        self._progress.update(self._task, completed=number)

    def note(self, number: int, note: str | None) -> None:
        """Show a note, if there is one."""
        if note and self.is_main:
            self._print(f"{self.unit} {number}: {note}", style="yellow")

    def position(self, done: int) -> dict[str, int]:
        """Flush the files and return the steps done and the bytes in each file; a resumed run continues there."""
        if not self.is_main:
            return {"done": done}
        for file in self._open.values():
            os.fsync(file.fileno())
        return {"done": done} | {name: (self.directory / name).stat().st_size for name in self.files}

    def _summary(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Return the lines that the console shows of a step, each as parts that are not divided."""
        shown = [f"{name.removeprefix('train/')} {metrics[name]:.4g}" for name in metrics if name.startswith("train/")]
        shown += [f"lr {metrics['lr']:.3g}"] if "lr" in metrics else []
        shown += [f"{metrics['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in metrics else []
        return [shown, *self._evaluation(metrics)]

    @staticmethod
    def _evaluation(metrics: Mapping[str, float]) -> list[list[str]]:
        found = [f"{name.removeprefix('eval/')} {metrics[name]:.4g}" for name in metrics if name.startswith("eval/")]
        return [["held out:", *found]] if found else []

    @property
    def _interactive(self) -> bool:
        return self.console.is_terminal or self.console.is_jupyter

    def _print(self, text: str, style: str | None = None) -> None:
        """Print a line; a terminal breaks it between words, a file gets it whole."""
        wrapped = not self._interactive
        self.console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=wrapped)

    def _print_parts(self, start: str, parts: Iterable[str]) -> None:
        """Print parts two spaces apart; a terminal breaks the line between parts, and indents what follows."""
        lines, width = [""], self.console.width - len(start) if self._interactive else math.inf
        for part in parts:
            line = f"{lines[-1]}  {part}".lstrip()
            lines[-1:] = [line] if len(line) <= width or not lines[-1] else [lines[-1], part]
        self._print("\n".join((start if not index else " " * len(start)) + line for index, line in enumerate(lines)))

    def _empty_directory(self) -> None:
        """Make the directory and remove an earlier run's files; the target of a link stays."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: cannot make {str(self.directory)!r}: {error.strerror}") from error
        try:
            for path in (self.directory / name for name in RUN_ARTIFACTS):
                if path.is_symlink():
                    warnings.warn(
                        f"output_dir: {str(path)!r} is no longer a link to {os.readlink(path)!r}, which stays as it is",
                        stacklevel=2,
                    )
                remove(path)
        except OSError as error:
            raise UserError(f"output_dir: cannot empty {str(self.directory)!r}: {error.strerror}") from error

    def _cut_back(self, position: Mapping[str, int]) -> None:
        """Truncate the files to the checkpoint, and read the history before it."""
        for name in self.files:
            os.truncate(self.directory / name, position[name])
        records = metric_records(self.directory / METRICS)
        self.history = [{k: v for k, v in record.items() if k not in (self.unit, "note")} for record in records]

    def _open_board(self, resources: contextlib.ExitStack) -> Any:
        if not self.log.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run writes events

        after = self.resume["done"] + 1 if self.resume else None
        return resources.enter_context(SummaryWriter(str(self.directory / TENSORBOARD), purge_step=after))

    def _open_wandb(self, resources: contextlib.ExitStack) -> Any:
        """Start a run of Weights & Biases with the config; a resumed run starts another one, at its next step."""
        if self.log.wandb is None:
            return None
        init = require("wandb", "wandb").init
        where = self.config.output_dir
        run = init(project=self.log.wandb, name=where, dir=where, config=dataclasses.asdict(self.config))
        resources.callback(run.finish)
        return run


def metric_records(path: Path) -> list[Record]:
    """Read the lines of a metrics file: numbers by name and an optional note; see `read_records`."""
    return read_records(path, "numbers by name", _is_metrics)


def sample_records(path: Path, *names: str) -> list[Record]:
    """Read the lines of a file of samples or answers, which have the fields `names`; see `read_records`."""
    return read_records(
        path, f"the fields {', '.join(names)}", lambda record: all(_has(record, name) for name in names)
    )


def read_records(path: Path, expected: str, known: Callable[[Record], bool]) -> list[Record]:
    """Read the objects of a JSONL file of a run; a missing file has none.

    A last line without its newline was cut by a kill or is still being written: it is left out, with a warning.

    Raises:
        UserError: a line is not JSON, or no object that is `known`; the message names file and line.
    """
    records: list[Record] = []
    if not path.is_file():
        return records
    try:
        with path.open("rb") as lines:  # unlike splitlines, not cut at a U+2028 within a text
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if not line.endswith(b"\n"):
                    warnings.warn(f"{where}: the last line is cut short and left out", stacklevel=4)
                    break
                record = parse_line(line, where)
                check(isinstance(record, dict) and known(record), where, expected, record)
                records.append(record)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    return records


def _is_metrics(record: Record) -> bool:
    return all(isinstance(value, str if name == "note" else int | float) for name, value in record.items())


def _has(record: Record, name: str) -> bool:
    value = record.get(name)
    if name in ("update", "reward", "score"):
        return isinstance(value, int | float)
    return isinstance(value, str) or (name == "prompt" and is_messages(value))


def _line(file: TextIO, record: Record) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
