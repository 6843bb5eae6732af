"""One rollout batch on its way from prompts to experience."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast.rlhf.data.packing import Array
from ppo_fast.rlhf.ppo.advantages import Experience
from ppo_fast.rlhf.ppo.rewards import Rewards
from ppo_fast.rlhf.ppo.rollout import Generation, Rollout, select


@dataclass(frozen=True)
class PPOBatch:
    """The parts of a rollout batch made so far; all without the responses that the filter masks, once it has run."""

    generation: Generation
    rollout: Rollout | None = None
    rewards: Rewards | None = None
    experience: Experience | None = None  # without the truncated ones if `rollout.mask_truncated` is set

    def tensors(self, rows: Array) -> dict[str, Tensor]:
        """Return the tensors of these responses by "part.field": [b, ...] by response or [n] by token."""
        found: dict[str, dict[str, Tensor]] = {"generation": vars(select(self.generation, rows))}
        if self.rollout is not None:
            found["rollout"] = self.rollout.select(rows).packed()
        if self.rollout is not None and self.rewards is not None:
            found["rewards"] = vars(self.rewards.select(rows, self.rollout.grid.lengths))
        if self.experience is not None:
            found["experience"] = self.experience.select(rows)
        return {
            f"{part}.{name}": value
            for part, values in found.items()
            for name, value in values.items()
            if isinstance(value, Tensor) and value.ndim
        }
