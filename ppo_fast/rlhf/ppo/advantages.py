"""Advantages and returns of the counted tokens, from rewards and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import AdvantageConfig
from ppo_fast.rlhf.data.packing import Array, TokenBatch, offsets, to_device
from ppo_fast.rlhf.ppo.rewards import Rewards
from ppo_fast.rlhf.ppo.rollout import Rollout, token_indices


@dataclass(frozen=True)
class Experience:
    """The N counted tokens of B responses, packed: no padding, and no mask."""

    grid: TokenBatch  # prompts and responses
    tokens: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32: old
    ref_logprobs: Tensor  # [N] float32
    values: Tensor  # [N] float32: old
    advantages: Tensor  # [N] float32: whitened over all of them when configured
    returns: Tensor  # [N] float32: advantage before whitening + old value: the target of the value model

    @property
    def lengths(self) -> Array:
        """[B] int64, on the host."""
        return self.grid.lengths

    def select(self, rows: Array) -> dict[str, Tensor]:
        """Return the tensors [n] of these responses by name."""
        chosen = token_indices(self.lengths, rows, self.tokens.device)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: value.index_select(0, chosen) for name, value in tensors.items()}


def make_experience(rollout: Rollout, rewards: Rewards, config: AdvantageConfig) -> Experience:
    """Estimate advantages (GAE) with value 0 after the last counted token, then whitening.

    Per sequence, every token has the advantage of the first, A = return - value at the last prompt token, and the
    value model regresses on the Monte Carlo returns.

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16; per sequence Ahmadian et al. 2024, arXiv:2402.14740.
    """
    whole, lengths = config.kind == "sequence", rollout.grid.lengths
    advantages, returns = ops.gae_packed(
        rewards.rewards, rollout.values, rollout.cu_seqlens, gamma=config.gamma, lam=1.0 if whole else config.lam
    )
    if whole:
        firsts = offsets(lengths)[:-1].repeat(lengths)
        advantages = advantages.index_select(0, to_device(firsts, advantages.device))
    if config.whiten:
        advantages = ops.whiten(advantages, None)
    old = rollout.logprobs, rollout.ref_logprobs, rollout.values
    return Experience(rollout.grid, rollout.tokens, *old, advantages, returns)
