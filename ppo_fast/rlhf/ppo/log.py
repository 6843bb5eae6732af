"""Log of a PPO run: metrics of updates, samples, answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
        """Record the first responses of the rollout and show them as a table, every `samples_every` updates."""
        log = self.config.log
        shown = log.samples_every > 0 and update % log.samples_every == 0
        prompts, scores = rollout.generation.prompts.prompts, rewards.scores.tolist()
        kept = len(scores) if log.all_samples else log.samples * shown
        columns = rollout.generation.prompts.columns
        used = {name: columns[name] for name in TEMPLATE_COLUMNS if name in columns}
        for row, (prompt, response, value) in enumerate(zip(prompts[:kept], rewards.completions, scores, strict=False)):
            record = {"update": update, "prompt": prompt, "completion": response, "score": value}
            asked = {} if isinstance(prompt, str) else {name: values[row] for name, values in used.items()}
            _line(self._open[SAMPLES], record | asked)
        if not shown:
            return
        table = Table("prompt", "response", "score", title=f"samples of update {update}", title_justify="left")
        for prompt, response, value in zip(prompts[: log.samples], rewards.completions, scores, strict=False):
            table.add_row(_one_line(prompt), _one_line(response), f"{value:.3f}")
        self.console.print(table)

    def _summary(self, metrics: dict[str, float]) -> str:
        loss = self.config.loss
        entropy = 0 - loss.ent_coef * metrics["policy/entropy"]
        value = f"value {loss.vf_coef * metrics['loss/value']:+.4f}  " if "loss/value" in metrics else ""
        return (
            f"reward {metrics['objective/rlhf_reward']:+.3f}  "
            f"score {metrics['objective/scores']:+.3f}  KL {metrics['objective/kl']:.3f}  "
            f"loss: policy {metrics['loss/policy']:+.4f}  {value}entropy {entropy:+.4f}  "
            f"total {metrics['loss/total']:+.4f}  {metrics['tokens_per_second']:.0f} tok/s"
        )


def _one_line(text: Prompt) -> Text:
    """Text or messages without line breaks; never read as markup or by the terminal."""
    return Text(printable(" ".join(as_text(text).split())))
