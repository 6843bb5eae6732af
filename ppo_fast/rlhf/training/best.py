"""Keep the best model by a metric of the evaluations, and end a run that gets no better."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.training.state import State


class BestModel:
    """The best value of one metric so far, and how many evaluations ago it was.

    Args:
        metric: its name; None: no model is kept.
        highest: more is better.
        patience: evaluations in a row without a better one that end the run; 0: none do.
    """

    def __init__(self, metric: str | None, *, highest: bool, patience: int) -> None:
        self.metric, self.sign, self.patience = metric, 1 if highest else -1, patience
        self.best: float | None = None
        self.worse = 0  # evaluations since the best

    def check(self, names: Collection[str]) -> None:
        """Raise a UserError unless the metric is one of `names`."""
        if self.metric is not None and self.metric not in names:
            raise UserError(f"evaluation.best: expected one of {', '.join(names)}, got {self.metric!r}")

    def update(self, metrics: Mapping[str, float], directory: Path, save: Callable[[Path], object]) -> str | None:
        """Save the model in `directory` if it is the best; return a note about that, or about the end of the run."""
        self.check(metrics)
        if self.metric is None:
            return None
        value = metrics[self.metric]
        if self.best is not None and self.sign * value <= self.sign * self.best:
            self.worse += 1
            ended = f"stopped early: no better {self.metric} in {self.patience} evaluations"
            return ended if self.exhausted else None
        self.best, self.worse = value, 0
        save(directory)
        return f"best {self.metric} so far, {value:.4g}: saved in {directory.name}"

    @property
    def exhausted(self) -> bool:
        """`patience` is at its end."""
        return 0 < self.patience <= self.worse

    def state_dict(self) -> State:
        return {"best": self.best, "worse": self.worse}

    def load_state_dict(self, state: State) -> None:
        self.best, self.worse = state["best"], state["worse"]
