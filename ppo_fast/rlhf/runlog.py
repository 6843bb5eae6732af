"""What a person sees of a run and what stays of it: console, JSONL, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config import PPOConfig
from .errors import UserError, require
from .rewards import Rewards
from .rollout import Rollout

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
TENSORBOARD, CHECKPOINTS, FINAL, FAILED, BEST = "tensorboard", "checkpoints", "final", "failed", "best"
REPLACED = (METRICS, SAMPLES, TENSORBOARD, CHECKPOINTS, FINAL, FAILED, BEST)


class RunLog:
    """Writes every metric of every update at once, so that a crashed run leaves a readable file.

    Use as a context manager; `history` keeps the metrics of the updates so far. UserError, before anything is
    written, for a directory that holds what the run would replace, with `overwrite` off. `resume` is what `position`
    returned at a checkpoint: the files are cut back to it and go on from there.
    """

    def __init__(
        self, config: PPOConfig, console: Console | None = None, *, resume: Mapping[str, int] | None = None
    ) -> None:
        self.resume = resume
        self.config, self.log = config, config.log
        self.directory = Path(config.log.dir)
        self.history: list[dict[str, float]] = []
        self.console = console or Console(quiet=not config.log.console)
        held = [name for name in REPLACED if (self.directory / name).exists()]
        if held and not self.log.overwrite and resume is None:
            raise UserError(
                f"log.dir: {str(self.directory)!r} already holds {held[0]!r}; choose another or set log.overwrite"
            )

    def __enter__(self) -> RunLog:
        if self.resume is None:
            self._empty_directory()
        else:
            self._cut_back(self.resume)
        mode: Literal["w", "a"] = "w" if self.resume is None else "a"
        with contextlib.ExitStack() as resources:
            self._board = self._open_board(resources)
            self._metrics, self._samples = (
                resources.enter_context((self.directory / name).open(mode, encoding="utf-8"))
                for name in (METRICS, SAMPLES)
            )
            columns = (TextColumn("PPO"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = resources.enter_context(Progress(*columns, console=self.console))
            self._resources = resources.pop_all()
        done = self.resume["update"] if self.resume else 0
        if self.resume:
            self.console.print(f"resumed after update {done}", highlight=False)
        self._task = self._progress.add_task("updates", total=self.config.updates, completed=done)
        return self

    def __exit__(self, *error: Any) -> None:
        self._resources.close()

    def write(self, update: int, metrics: dict[str, float], note: str | None = None) -> None:
        """Record the metrics of update number `update`, counted from 1, and a remark about it."""
        self.history.append(metrics)
        record: dict[str, Any] = {"update": update} | metrics
        _line(self._metrics, record | ({"note": note} if note else {}))
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, update)
            self._board.flush()
        if self.log.print_every and update % self.log.print_every == 0:
            self.console.print(self._summary(update, metrics), highlight=False, soft_wrap=True)
        self.note(update, note)
        self._progress.update(self._task, completed=update)

    def note(self, update: int, note: str | None) -> None:
        """Show a remark, if there is one."""
        if note:
            self.console.print(f"update {update}: {note}", style="yellow", highlight=False, soft_wrap=True)

    def position(self, update: int) -> dict[str, int]:
        """The update done last and the bytes in each file, flushed to disk: where a resumed run goes on."""
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())
        sizes = {name: (self.directory / name).stat().st_size for name in (METRICS, SAMPLES)}
        return {"update": update} | sizes

    def write_samples(self, update: int, rollout: Rollout, rewards: Rewards) -> None:
        """Record the first responses of the rollout and show them as a table, every `samples_every` updates."""
        shown = self.log.samples_every > 0 and update % self.log.samples_every == 0
        prompts, scores = rollout.generation.prompts.prompts, rewards.scores.tolist()
        kept = len(scores) if self.log.all_samples else self.log.samples * shown
        for prompt, response, value in zip(prompts[:kept], rewards.completions, scores, strict=False):
            _line(self._samples, {"update": update, "prompt": prompt, "completion": response, "score": value})
        if not shown:
            return
        table = Table("prompt", "response", "score", title=f"samples of update {update}", title_justify="left")
        for prompt, response, value in zip(prompts[: self.log.samples], rewards.completions, scores, strict=False):
            table.add_row(_one_line(prompt), _one_line(response), f"{value:.3f}")
        self.console.print(table)

    def _empty_directory(self) -> None:
        """Make the directory, without what an earlier run left there."""
        for name in REPLACED[2:]:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"log.dir: cannot make {str(self.directory)!r}: {error.strerror}") from error

    def _cut_back(self, position: Mapping[str, int]) -> None:
        """Drop what was written after the checkpoint, and read the history before it."""
        for name in (METRICS, SAMPLES):
            path = self.directory / name
            size = path.stat().st_size if path.is_file() else 0
            if size < position[name]:
                raise UserError(f"resume: expected {position[name]} bytes or more in {str(path)!r}, got {size}")
            os.truncate(path, position[name])
        records = map(json.loads, (self.directory / METRICS).read_text(encoding="utf-8").splitlines())
        self.history = [{k: v for k, v in record.items() if k not in ("update", "note")} for record in records]

    def _open_board(self, resources: contextlib.ExitStack) -> Any:
        if not self.log.tensorboard:
            return None
        require("tensorboard")
        writer = require("torch.utils.tensorboard").SummaryWriter
        after = self.resume["update"] + 1 if self.resume else None
        return resources.enter_context(writer(str(self.directory / TENSORBOARD), purge_step=after))

    def _summary(self, update: int, metrics: dict[str, float]) -> str:
        loss = self.config.loss
        value = loss.vf_coef * metrics["loss/value"]
        entropy = loss.ent_coef * metrics["policy/entropy"]
        return (
            f"{update:>5}/{self.config.updates}  reward {metrics['objective/rlhf_reward']:+.3f}  "
            f"score {metrics['objective/scores']:+.3f}  KL {metrics['objective/kl']:.3f}  "
            f"loss: policy {metrics['loss/policy']:+.4f}  value {value:+.4f}  entropy {-entropy:+.4f}  "
            f"total {metrics['loss/total']:+.4f}  {metrics['tokens_per_second']:.0f} tok/s"
        )


def _line(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _one_line(text: Any) -> Text:
    """Text, or the contents of messages, without line breaks; never read as markup."""
    if not isinstance(text, str):
        text = " ".join(str(message["content"]) for message in text)
    return Text(" ".join(text.split()))
