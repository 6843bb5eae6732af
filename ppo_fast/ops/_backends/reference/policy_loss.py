"""The policy loss from per-token statistics, with its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._backends.reference.sequences import counted_mean, sequence_sum, to_tokens, token_weights
from ppo_fast.ops._backends.reference.token_stats import token_stats
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import PolicyLossResult, RowStats

MAX_LOG_RATIO = 20.0


def kl_values(delta: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(estimate, its derivative in logprobs) for delta = logprobs - ref_logprobs (Schulman 2020)."""
    if estimator == "k1":
        return delta, torch.ones_like(delta)
    if estimator == "k2":
        return delta.square() / 2, delta
    clamped = (-delta).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rise = clamped.expm1()
    return rise - clamped, torch.where(delta.abs() > MAX_LOG_RATIO, 0.0, -rise)


def _log_ratio(
    logprobs: Tensor, old: Tensor, counted: Tensor, cu_seqlens: Tensor | None, ratio: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(per-token log ratio, the objective's log ratio, where its gradient is 1 or NaN), clamped to +-20."""
    raw = torch.where(counted, logprobs - old, 0.0)
    token = raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if ratio == "token":
        return token, token, ~(raw.abs() > MAX_LOG_RATIO)
    lengths = sequence_sum(counted.to(raw.dtype), cu_seqlens).clamp(min=1)
    mean = to_tokens(sequence_sum(raw, cu_seqlens) / lengths, cu_seqlens, raw.shape)
    clamped = mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return token, clamped, ~(mean.abs() > MAX_LOG_RATIO)


class _Objective(NamedTuple):
    """importance*objective of each token [B, T], its derivatives, and what bounded it."""

    value: Tensor
    d_log_r: Tensor
    d_logprobs: Tensor | None  # at a constant ratio; None: 0
    is_clipped: Tensor
    is_dual: Tensor


def _clip(r: Tensor, adv: Tensor, importance: Tensor, policy: PolicyInputs) -> _Objective:
    """min(r*A, clip(r)*A), and max(objective, dual_clip*A) where A < 0."""
    unclipped = r * adv
    clipped = r.clamp(1.0 - policy.clip_low, 1.0 + policy.clip_high) * adv
    is_clipped = clipped < unclipped
    value = torch.minimum(unclipped, clipped)
    bound = torch.where(adv < 0, policy.dual_clip * adv, -torch.inf)
    is_dual = bound > value
    value, slope = torch.maximum(value, bound), torch.where(is_clipped | is_dual, 0.0, unclipped)
    return _Objective(importance * value, importance * slope, None, is_clipped, is_dual)


def _cispo(r: Tensor, adv: Tensor, importance: Tensor, logprobs: Tensor, policy: PolicyInputs) -> _Objective:
    """clip(r)*A*logprob, where clip(r) is a constant. Where a factor is 0, so is the product: logprob may be -inf."""
    low, high = 1.0 - policy.clip_low, 1.0 + policy.clip_high
    factor = importance * (r.clamp(low, high) * adv)
    value = torch.where(factor == 0, 0.0, factor * logprobs)
    none = torch.zeros_like(r)
    return _Objective(value, none, factor, (r < low) | (r > high), none.bool())


def policy_loss_from_stats(
    stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None = None
) -> PolicyLossResult:
    """aggregate(-weight*objective + penalty_coef*(r - 1 - log r) + kl_coef*kl - ent_coef*H), with its gradient.

    objective: :func:`_clip` or :func:`_cispo`, with clip(r) = clip(r, 1 - clip_low, 1 + clip_high).
    ``weights`` of the tokens come from the aggregation unless they are given, as for some rows of a larger batch.
    """
    logprobs, entropy, full_kl, lse, ref_lse = stats
    cu_seqlens, ratio = policy.cu_seqlens, policy.ratio
    counted = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    adv = torch.where(counted, policy.advantages, 0.0)
    old = logprobs if policy.old_logprobs is None else torch.where(counted, policy.old_logprobs, logprobs)
    token_log_ratio, log_r, inside = _log_ratio(logprobs, old, counted, cu_seqlens, ratio)
    r = log_r.exp()

    importance = (
        torch.ones_like(adv)
        if policy.importance_weights is None
        else torch.where(counted, policy.importance_weights, 0.0)
    )
    clips = policy.objective == "clip"
    objective = _clip(r, adv, importance, policy) if clips else _cispo(r, adv, importance, logprobs, policy)

    if weights is None:
        weights = token_weights(counted, cu_seqlens, policy.denominator, policy.aggregation, logprobs.dtype)
    per_token, d_log_r = -objective.value, -objective.d_log_r
    policy_loss = (weights * per_token).sum()
    if policy.penalty_coef is not None:
        per_token = per_token + policy.penalty_coef * (r - 1 - log_r)
        d_log_r = d_log_r + policy.penalty_coef * (r - 1)
    d_logprobs = weights * torch.where(inside, d_log_r, 0.0)
    if ratio == "sequence":
        lengths = sequence_sum(counted.to(r.dtype), cu_seqlens).clamp(min=1)
        d_mean = sequence_sum(d_logprobs, cu_seqlens) / lengths
        d_logprobs = torch.where(counted, to_tokens(d_mean, cu_seqlens, r.shape), 0.0)
    if objective.d_logprobs is not None:
        d_logprobs = d_logprobs - weights * objective.d_logprobs

    full = full_kl.numel() > 0
    kl, d_entropy, d_kl = full_kl if full else None, None, None
    if policy.ref_logprobs is not None:
        kl, slope = kl_values(torch.where(counted, logprobs - policy.ref_logprobs, 0.0), policy.kl_estimator)
        if policy.kl_coef is not None:
            d_logprobs = d_logprobs + weights * policy.kl_coef * slope
    elif full and policy.kl_coef is not None:
        d_kl = weights * policy.kl_coef
    if policy.kl_coef is not None and kl is not None:
        per_token = per_token + policy.kl_coef * kl
    if policy.ent_coef is not None:
        per_token = per_token - policy.ent_coef * entropy
        d_entropy = -weights * policy.ent_coef

    loss = torch.where(counted, weights * per_token, 0.0).sum()
    metrics = torch.stack(
        [
            policy_loss,
            counted_mean(entropy, counted),
            torch.zeros_like(loss) if kl is None else counted_mean(kl, counted),
            counted_mean(token_log_ratio.expm1() - token_log_ratio, counted),
            counted_mean(objective.is_clipped.to(r.dtype), counted),
            counted_mean(objective.is_dual.to(r.dtype), counted),
            counted_mean(r, counted),
            torch.cat([torch.where(counted, r, 0.0).flatten(), r.new_zeros(1)]).max(),
            counted.sum().to(r.dtype),
        ]
    )
    return PolicyLossResult(
        loss, metrics, logprobs, entropy, kl, lse, ref_lse if full else None, d_logprobs, d_entropy, d_kl
    )


def policy_loss(rows: RowInputs, policy: PolicyInputs) -> PolicyLossResult:
    """:func:`token_stats`, then :func:`policy_loss_from_stats` of them."""
    return policy_loss_from_stats(token_stats(rows, True), rows.mask, policy)


def policy_gradients(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, RowGrads]:
    """The statistics of some rows of a batch, and the gradients of their loss in these, weighted by token."""
    stats = token_stats(rows, True)
    return stats, policy_loss_from_stats(stats, rows.mask, policy, weights).grads
