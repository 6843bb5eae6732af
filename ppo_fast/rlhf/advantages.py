"""From rewards and values to the targets of the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    Per sequence, every token has the advantage of the first, A = return - value at the last prompt token, and the
    value model regresses on the Monte Carlo returns.

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16; per sequence Ahmadian et al. 2024, arXiv:2402.14740.
    """
    mask, whole = rollout.mask, config.kind == "sequence"
    lam = 1.0 if whole else config.lam
    advantages, returns = ops.gae(rewards.rewards, rollout.values, mask, gamma=config.gamma, lam=lam)
    if whole:
        advantages = torch.where(mask, advantages[:, :1], 0.0)
    if config.whiten:
        advantages = ops.whiten(advantages, mask)
    return Targets(advantages, returns)
