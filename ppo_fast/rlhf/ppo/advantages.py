"""Advantages and returns of the counted tokens, from rewards and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import AdvantageConfig
from ppo_fast.rlhf.data.packing import Array, TokenBatch, offsets, to_device
from ppo_fast.rlhf.ppo.correction import Correction
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
    weights: Tensor | None = None  # [N] float32: importance weights of the policy loss; None: 1

    @property
    def lengths(self) -> Array:
        """[B] int64, on the host."""
        return self.grid.lengths

    def select(self, rows: Array) -> dict[str, Tensor]:
        """Return the tensors [n] of these responses by name."""
        chosen = token_indices(self.lengths, rows, self.tokens.device)
        return {name: value.index_select(0, chosen) for name, value in self._tensors().items()}

    def keep(self, kept: Tensor) -> Experience:
        """Return the experience in which only the tokens where kept [N] is True are counted; waits for the device."""
        host, loss_mask = kept.cpu().numpy(), self.grid.loss_mask.copy()
        loss_mask[loss_mask] = host
        chosen = to_device(host.nonzero()[0], kept.device)
        tensors = {name: value.index_select(0, chosen) for name, value in self._tensors().items()}
        return replace(self, grid=replace(self.grid, loss_mask=loss_mask), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def make_experience(
    rollout: Rollout, rewards: Rewards, config: AdvantageConfig, correction: Correction | None = None
) -> Experience:
    """Estimate advantages (GAE) with value 0 after the last counted token, then whitening.

    Tokens that the correction leaves out take part in GAE only; the others are counted tokens from then on.

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
    old = rollout.logprobs, rollout.ref_logprobs, rollout.values
    weights = None if correction is None else correction.weights
    experience = Experience(rollout.grid, rollout.tokens, *old, advantages, returns, weights)
    if correction is not None and correction.kept is not None:
        experience = experience.keep(correction.kept)
    if config.whiten:
        experience = replace(experience, advantages=ops.whiten(experience.advantages, None))
    return experience
