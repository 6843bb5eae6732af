"""From rewards and values to the targets of the update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast import ops

from .config import AdvantageConfig
from .rewards import Rewards
from .rollout import Rollout


@dataclass(frozen=True)
class Targets:
    """What the update regresses on; both [B, T] float32, 0 where masked."""

    advantages: Tensor  # of the policy's tokens, whitened over the rollout batch when configured
    returns: Tensor  # advantage before whitening + old value: the target of the value model


def compute_targets(rollout: Rollout, rewards: Rewards, config: AdvantageConfig) -> Targets:
    """Generalised advantage estimation with value 0 after the last counted token, then whitening.

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    advantages, returns = ops.gae(rewards.rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam)
    if config.whiten:
        advantages = ops.whiten(advantages, rollout.mask)
    return Targets(advantages, returns)
