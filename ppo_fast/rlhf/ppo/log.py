"""Log of a PPO run: metrics of updates, samples, answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.data.templates import TEMPLATE_COLUMNS, Prompt, as_text
from ppo_fast.rlhf.errors import printable
from ppo_fast.rlhf.ppo.rewards import Rewards
from ppo_fast.rlhf.ppo.rollout import Rollout
from ppo_fast.rlhf.training.callbacks import StepRecord
from ppo_fast.rlhf.training.log import EVALUATIONS, METRICS, SAMPLES, StageLog, _line


class RunLog(StageLog):
    """The log of a PPO run: updates, and a table of samples now and then."""

    config: PPOConfig
    unit = "update"
    files = (METRICS, SAMPLES, EVALUATIONS)

    def __init__(
        self, config: PPOConfig, console: Console | None = None, *, resume: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(config, "PPO", config.updates, console, resume=resume)

    def on_step(self, record: StepRecord) -> None:
        """Record an update, its samples and its answers to the held-out prompts."""
        if self.is_main:
            self.write_answers(record.step + 1, record.answers)
        super().on_step(record)
        if record.metrics and self.is_main:
            self.write_samples(record.step + 1, record.batch.rollout, record.batch.rewards)

    def write_answers(self, update: int, answers: Iterable[Mapping[str, object]]) -> None:
        """Record the answers to the held-out prompts, for the comparison in `ppo-fast report`."""
        for answer in answers:
            _line(self._open[EVALUATIONS], {"update": update, **answer})

    def write_samples(self, update: int, rollout: Rollout, rewards: Rewards) -> None:
        """Record the first responses of the rollout and show them as a table, at first and every `samples_every`."""
        log = self.config.log
        shown = log.samples_every > 0 and (update == 1 or update % log.samples_every == 0)
        prompts, scores = rollout.generation.prompts.prompts, rewards.scores.tolist()
        kept = len(scores) if log.all_samples else log.samples * shown
        columns = rollout.generation.prompts.columns
        used = {name: columns[name] for name in TEMPLATE_COLUMNS if name in columns}
        rows = [*zip(prompts, rewards.completions, rewards.own.combined.tolist(), scores, strict=True)]
        before = rewards.own.unpenalized.tolist()
        for row, (prompt, response, own, value) in enumerate(rows[:kept]):
            numbers = {"reward": own, "unpenalized": before[row], "score": value}
            record = {"update": update, "prompt": prompt, "completion": response, **numbers}
            asked = {} if isinstance(prompt, str) else {name: values[row] for name, values in used.items()}
            _line(self._open[SAMPLES], record | asked)
        if not shown:
            return
        self.console.print(_table(f"samples of update {update}", rows[: log.samples]))

    def _summary(self, metrics: Mapping[str, float]) -> list[list[str]]:
        seconds = sum(x for name, x in metrics.items() if name.startswith("time/") and not name.endswith("_share"))
        shown = [
            f"reward {_number(metrics['reward/mean'], '+')}",
            f"KL {_number(metrics['objective/kl'])}",
            f"entropy {_number(metrics['objective/entropy'])}",
            f"length {metrics['length/mean']:.1f}",
            f"clip {metrics['policy/clipfrac']:.2f}",
            f"{seconds:.1f} s",
        ]
        return [shown, *self._evaluation(metrics)]


def _table(title: str, rows: Sequence[tuple[Prompt, str, float, float]]) -> Table:
    """Return a table of prompts, responses and their rewards, as the sources gave them, and of scores that differ."""
    columns = ["reward"] + ["score"] * any(own != value for *_, own, value in rows)
    table = Table("prompt", "response", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for prompt, response, *numbers in rows:
        cells = [f"{number:.3f}" for number in numbers[: len(columns)]]
        table.add_row(_one_line(prompt), _one_line(response), *cells)
    return table


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.4g}"


def _one_line(text: Prompt) -> Text:
    """Text or messages without line breaks; never read as markup or by the terminal."""
    return Text(printable(" ".join(as_text(text).split())))
