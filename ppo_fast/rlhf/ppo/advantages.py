"""From rewards and values to what the update learns from: the counted tokens of all responses, one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import AdvantageConfig
from ppo_fast.rlhf.data.packing import Array, TokenBatch, offsets, ranges, to_device
from ppo_fast.rlhf.ppo.rewards import Rewards
from ppo_fast.rlhf.ppo.rollout import Rollout


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
        """The tensors [n] of these responses, by name."""
        chosen = to_device(ranges(offsets(self.lengths)[rows], self.lengths[rows]), self.tokens.device)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: value.index_select(0, chosen) for name, value in tensors.items()}


def make_experience(rollout: Rollout, rewards: Rewards, config: AdvantageConfig) -> Experience:
    """Generalized advantage estimation with value 0 after the last counted token, then whitening.

    Per sequence, every token has the advantage of the first, A = return - value at the last prompt token, and the
    value model regresses on the Monte Carlo returns.

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16; per sequence Ahmadian et al. 2024, arXiv:2402.14740.
    """
    grid, whole = rollout.generation.grid, config.kind == "sequence"
    device, lengths = grid.ids.device, grid.lengths
    response = grid.loss_mask[:, -rollout.mask.shape[1] :].ravel().nonzero()[0]
    chosen, starts = to_device(response, device), offsets(lengths)

    def pack(x: Tensor) -> Tensor:
        return x.flatten().index_select(0, chosen)

    values = pack(rollout.values)
    lam = 1.0 if whole else config.lam
    advantages, returns = ops.gae_packed(
        pack(rewards.rewards), values, to_device(starts, device), gamma=config.gamma, lam=lam
    )
    if whole:
        advantages = advantages.index_select(0, to_device(starts[:-1].repeat(lengths), device))
    if config.whiten:
        advantages = ops.whiten(advantages, None)
    tokens = rollout.generation.responses.flatten().index_select(0, chosen)
    old = pack(rollout.logprobs), pack(rollout.ref_logprobs)
    return Experience(grid, tokens, *old, values, advantages, returns)
