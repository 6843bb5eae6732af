"""Signs of reward hacking: the score may rise because the policy has found a fault of the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ppo_fast.rlhf.training.callbacks import Callback, StepRecord
from ppo_fast.rlhf.training.state import State

WINDOW = 5  # updates that a value is the mean of: the first ones are the start, the last ones now


@dataclass(frozen=True)
class Rule:
    """Now above `limit` and above `factor` x start; below both for a metric that falls when something is wrong."""

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
# The other limits are rules of thumb: what the metric does in a run that goes well stays clear of them.
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
    """Watches the metrics of every update; each sign is told once."""

    def __init__(self) -> None:
        self.start: dict[str, list[float]] = {sign.metric: [] for sign in RULES}
        self.recent: dict[str, list[float]] = {sign.metric: [] for sign in RULES}
        self.told: list[str] = []

    def on_step(self, record: StepRecord) -> StepRecord:
        """Add the warnings to the notes of the step."""
        return record.adding({}, *self.update(record.metrics))

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Warnings, if any, after the metrics of one update; none within the first 2 x WINDOW updates."""
        warnings = []
        for sign in RULES:
            if sign.metric not in metrics or sign.metric in self.told:
                continue
            start, recent = self.start[sign.metric], self.recent[sign.metric]
            (start if len(start) < WINDOW else recent).append(metrics[sign.metric])
            del recent[:-WINDOW]
            before, now = sum(start) / WINDOW, sum(recent) / WINDOW
            if len(recent) == WINDOW and sign.triggers(before, now):
                self.told.append(sign.metric)
                warnings.append(
                    f"sign of reward hacking: {sign.meaning} ({sign.metric} {now:.3g}, at the start {before:.3g}); "
                    f"{sign.remedy}"
                )
        return warnings

    def state_dict(self) -> State:
        return dict(vars(self))

    def load_state_dict(self, state: State) -> None:
        vars(self).update(state)
