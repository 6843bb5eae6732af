"""Advantages and returns of the counted tokens, from rewards and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import AdvantageConfig
from ppo_fast.rlhf.data.packing import Array, TokenBatch, offsets, to_device
from ppo_fast.rlhf.ppo.correction import Correction
from ppo_fast.rlhf.ppo.rewards import Rewards
from ppo_fast.rlhf.ppo.rollout import Rollout, response_sums, token_indices


@dataclass(frozen=True)
class Experience:
    """The N counted tokens of B responses, packed: no padding, and no mask."""

    grid: TokenBatch  # prompts and responses
    tokens: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32: old
    ref_logprobs: Tensor  # [N] float32
    values: Tensor  # [N] float32: old
    advantages: Tensor  # [N] float32: whitened over all of them when configured
    returns: Tensor  # [N] float32: advantage by value_lam, before whitening, + old value: target of the value model
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
    """Estimate advantages and returns with value 0 after the last counted token; then whiten the advantages.

    gae: `lam` for the advantages of the policy, `value_lam` for the returns that the value model regresses on.
    sequence: every token has the advantage of the first, A = return - value at the last prompt token, by lam 1.
    group: every token has the return of its response less the mean of its prompt's samples, see `group_advantages`.

    Tokens that the correction leaves out take part only in these estimates; the others are counted from then on.

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16; two lambdas Yuan et al. 2025, arXiv:2503.01491,
    section 3.2; per sequence Ahmadian et al. 2024, arXiv:2402.14740.
    """
    whole, lengths = config.kind != "gae", rollout.grid.lengths
    lam = 1.0 if whole else config.lam
    advantages, returns = _gae(rollout, rewards, config, lam)
    if config.value_lam not in (None, lam):
        _, returns = _gae(rollout, rewards, config, config.value_lam)
    if whole:
        firsts = offsets(lengths)[:-1].repeat(lengths)
        advantages = advantages.index_select(0, to_device(firsts, advantages.device))
    if config.kind == "group":
        advantages = _less_group_mean(rollout, advantages, config)
    old = rollout.logprobs, rollout.ref_logprobs, rollout.values
    weights = None if correction is None else correction.weights
    experience = Experience(rollout.grid, rollout.tokens, *old, advantages, returns, weights)
    if correction is not None and correction.kept is not None:
        experience = experience.keep(correction.kept)
    if config.whitened:
        experience = replace(experience, advantages=ops.whiten(experience.advantages, None))
    return experience


def _gae(
    rollout: Rollout, rewards: Rewards, config: AdvantageConfig, lam: float | Literal["adaptive"]
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [N]."""
    if lam == "adaptive":
        lams = adaptive_lam(rollout.grid.lengths, config.lam_alpha)
        return gae_by_response(rewards.rewards, rollout.values, rollout.grid.lengths, config.gamma, lams)
    return ops.gae_packed(rewards.rewards, rollout.values, rollout.cu_seqlens, gamma=config.gamma, lam=lam)


def _less_group_mean(rollout: Rollout, returns: Tensor, config: AdvantageConfig) -> Tensor:
    """Return the advantages [N] from the return of its response on every token [N]; the old values are 0."""
    groups, lengths = rollout.generation.prompts.groups, rollout.grid.lengths
    assert groups is not None  # samples_per_prompt is 2 or more
    device = returns.device
    per_response = returns.index_select(0, to_device(offsets(lengths)[:-1], device))
    options = {"leave_one_out": config.leave_one_out, "divide_by_std": config.divide_by_std}
    rows = to_device(np.arange(len(lengths)).repeat(lengths), device)
    return group_advantages(per_response, groups, **options).index_select(0, rows)


def group_advantages(returns: Tensor, groups: Array, *, leave_one_out: bool, divide_by_std: bool) -> Tensor:
    """A [B] = R - mean of the n samples of a prompt, or of the n - 1 others; 0 where all are equal, or n = 1.

    With `divide_by_std` in units of their deviation, sqrt(sum (R - mean)^2 / (n - 1)). `groups` [B] rise.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (GRPO); the others' mean Ahmadian et al. 2024,
    arXiv:2402.14740, equation 5 (RLOO); without the deviation Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO).
    """
    sizes, device = np.unique(groups, return_counts=True)[1], returns.device
    rows = to_device(np.arange(len(sizes)).repeat(sizes), device)
    count, lengths = to_device(sizes, device).to(returns.dtype), to_device(sizes, device)
    centered = returns - (response_sums(returns, lengths) / count)[rows]
    others = (count - 1).clamp_min(1)
    advantages = centered * (count / others)[rows] if leave_one_out else centered
    if divide_by_std:
        advantages = advantages / (response_sums(centered**2, lengths) / others).sqrt()[rows]
    return torch.where(agreeing(returns, groups)[rows], 0.0, advantages)


def agreeing(x: Tensor, groups: Array) -> Tensor:
    """Return [G] bool, by group: x [B] is the same in all its rows; `groups` [B] rise."""
    lengths = to_device(np.unique(groups, return_counts=True)[1], x.device)
    low, high = (torch.segment_reduce(x, extreme, lengths=lengths, unsafe=True) for extreme in ("min", "max"))
    return low == high


def adaptive_lam(lengths: Array, alpha: float) -> Array:
    """Return [B] float64: max(0, 1 - 1 / (alpha * length)), so that sum_k lam^k = alpha * length.

    Source: Yue et al. 2025, arXiv:2504.05118, section 4.2.
    """
    return (1 - 1 / (alpha * lengths.clip(min=1))).clip(min=0.0)


def gae_by_response(rewards: Tensor, values: Tensor, lengths: Array, gamma: float, lam: Array) -> tuple[Tensor, Tensor]:
    """:func:`ppo_fast.gae_packed` with one lambda [B] for each response: advantages and returns [N].

    By doubling, in log2(longest response) passes: with c = gamma * lam and S_0 = delta, the TD errors,
    S_{j+1}[t] = S_j[t] + c^(2^j) * S_j[t + 2^j] is the sum of the first 2^(j+1) terms of A[t].
    """
    device = rewards.device
    left = to_device(offsets(lengths)[1:].repeat(lengths) - 1 - np.arange(lengths.sum()), device)  # [N] tokens after t
    factor = to_device((gamma * lam).repeat(lengths), device).to(rewards.dtype)

    def ahead(x: Tensor, step: int) -> Tensor:
        """Return x[t + step], 0 beyond the response."""
        return torch.where(left >= step, torch.roll(x, -step), 0.0)

    advantages, step = rewards + gamma * ahead(values, 1) - values, 1
    while step < lengths.max(initial=0):
        advantages = advantages + factor * ahead(advantages, step)
        factor, step = factor * factor, 2 * step
    return advantages, advantages + values
