"""Signs of reward hacking: the score may rise because the policy exploits a fault of the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ppo_fast.rlhf.training.callbacks import Callback, StepRecord
from ppo_fast.rlhf.training.state import State

WINDOW = 5  # updates averaged: the first ones as the start, the latest ones as now


@dataclass(frozen=True)
class Rule:
    """Triggers above `limit` and above `factor` x start; below both for a metric that falls when something is wrong."""

    metric: str
    limit: float
    factor: float
    meaning: str
    remedy: str
    falls: bool = False

    def triggers(self, start: float, now: float) -> bool:
        worse = -1 if self.falls else 1
        return worse * now > worse * self.limit and worse * now > worse * self.factor * start


# KL: beyond about 10 nats the gold score of small reward models falls (Gao et al. 2023, arXiv:2210.10760, figure 1).
# The other limits are rules of thumb that runs without reward hacking stay clear of.
RULES = (
    Rule("objective/kl", 10.0, 1.5, "the policy is far from the reference", "raise kl.coef or set kl.adaptive"),
    Rule("hacking/repetition", 0.3, 1.5, "responses repeat themselves", "let the reward punish repetition"),
    Rule(
        "hacking/distinct_n",
        0.3,
        0.5,
        "responses are all alike",
        "raise kl.coef or loss.ent_coef, or lower optim.lr",
        falls=True,
    ),
    Rule("hacking/length_reward_corr", 0.7, 1.2, "the score follows the length", "set reward.length_penalty"),
    Rule(
        "hacking/ensemble_std",
        0.0,
        2.0,
        "the reward models disagree more and more",
        "set reward.combine to 'min' or 'mean-std'",
    ),
)


class RewardHackingMonitor(Callback):
    """Watches the metrics of every update; each rule warns once."""

    def __init__(self) -> None:
        self.start: dict[str, list[float]] = {rule.metric: [] for rule in RULES}
        self.recent: dict[str, list[float]] = {rule.metric: [] for rule in RULES}
        self.warned: list[str] = []

    def on_step(self, record: StepRecord) -> StepRecord:
        """Add the warnings to the notes of the step."""
        return record.adding({}, *self.update(record.metrics))

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings after the metrics of one update; none within the first 2 x WINDOW updates."""
        warnings = []
        for rule in RULES:
            if rule.metric not in metrics or rule.metric in self.warned:
                continue
            start, recent = self.start[rule.metric], self.recent[rule.metric]
            (start if len(start) < WINDOW else recent).append(metrics[rule.metric])
            del recent[:-WINDOW]
            before, now = sum(start) / WINDOW, sum(recent) / WINDOW
            if len(recent) == WINDOW and rule.triggers(before, now):
                self.warned.append(rule.metric)
                warnings.append(
                    f"sign of reward hacking: {rule.meaning} ({rule.metric} {now:.3g}, at the start {before:.3g}); "
                    f"{rule.remedy}"
                )
        return warnings

    def state_dict(self) -> State:
        return dict(vars(self))

    def load_state_dict(self, state: State) -> None:
        vars(self).update(state)
