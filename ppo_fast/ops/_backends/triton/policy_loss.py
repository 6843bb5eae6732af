"""The policy loss: the statistics of :mod:`token_stats`, then every per-token term and its gradient in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import clamped, expm1, on_device_of
from ppo_fast.ops._backends.triton.token_stats import token_stats
from ppo_fast.ops._backends.triton.totals import max_or_nan, new_partials, store_partial, totals
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowInputs
from ppo_fast.ops._core.results import METRICS, PolicyLossResult, RowStats

MAX_LOG_RATIO: tl.constexpr = tl.constexpr(20.0)
_TOTALS = 1 + len(METRICS)
_RATIO_MAX = 1 + METRICS.index("ratio_max")


@triton.jit
def kl_estimate(delta, ESTIMATOR: tl.constexpr):
    """(estimate, its derivative in logprobs) for delta = logprobs - ref_logprobs."""
    if ESTIMATOR == "k1":
        value, slope = delta, tl.full(delta.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        value, slope = delta * delta * 0.5, delta
    else:
        x = clamped(-delta, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        rise = expm1(x)
        value, slope = rise - x, tl.where(tl.abs(delta) > MAX_LOG_RATIO, 0.0, -rise)
    return value, slope


@triton.jit
def clipped_objective(r, adv, clip_low, clip_high, dual_clip):
    """(objective, r*A, whether the clip binds, whether the dual clip binds)."""
    unclipped = r * adv
    clipped = clamped(r, 1.0 - clip_low, 1.0 + clip_high) * adv
    is_clipped = clipped < unclipped
    objective = tl.where(is_clipped, clipped, unclipped)
    bound = tl.where(adv < 0.0, dual_clip * adv, -float("inf"))
    is_dual = bound > objective
    return tl.where(is_dual, bound, objective), unclipped, is_clipped, is_dual


@triton.jit
def store_metrics(partials_ptr, counted, entropy, kl, approx_kl, is_clipped, is_dual, r):
    """Partial sums 2 to 9: the metrics after policy_loss, in the order of the op."""
    largest_ptr = partials_ptr + 8 * tl.num_programs(0) + tl.program_id(0)
    store_partial(partials_ptr, 2, entropy)
    store_partial(partials_ptr, 3, tl.where(counted, kl, 0.0))
    store_partial(partials_ptr, 4, approx_kl)
    store_partial(partials_ptr, 5, (is_clipped & counted).to(tl.float32))
    store_partial(partials_ptr, 6, (is_dual & counted).to(tl.float32))
    r = tl.where(counted, r, 0.0)
    store_partial(partials_ptr, 7, r)
    tl.store(largest_ptr, max_or_nan(r, tl.sum(r, 0)))
    store_partial(partials_ptr, 9, counted.to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def terms_kernel(
    logprobs_ptr,
    entropy_ptr,
    full_kl_ptr,
    mask_ptr,
    old_ptr,
    advantages_ptr,
    ref_logprobs_ptr,
    importance_ptr,
    weights_ptr,
    penalty_coef_ptr,
    ent_coef_ptr,
    kl_coef_ptr,
    kl_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,
    d_kl_ptr,
    partials_ptr,
    N,
    clip_low,
    clip_high,
    dual_clip,
    ESTIMATOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per token -importance*objective + penalty*(r - 1 - log r) + kl_coef*kl - ent_coef*H, its gradient and metrics.

    A pointer of None leaves its term out. Partial sums: the loss, then the metrics in the order of the op.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    counted = exists
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + row, exists, other=0) != 0
    logprob = tl.load(logprobs_ptr + row, counted, other=0.0)
    entropy = tl.load(entropy_ptr + row, counted, other=0.0)
    adv = tl.load(advantages_ptr + row, counted, other=0.0)
    weight = tl.load(weights_ptr + row, counted, other=0.0)
    raw = tl.zeros([ROWS], tl.float32)
    if old_ptr is not None:
        raw = logprob - tl.load(old_ptr + row, counted, other=0.0)
    log_r = clamped(raw, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    rise = expm1(log_r)
    r = tl.exp(log_r)
    objective, unclipped, is_clipped, is_dual = clipped_objective(r, adv, clip_low, clip_high, dual_clip)
    slope = tl.where(is_clipped | is_dual, 0.0, -unclipped)
    if importance_ptr is not None:
        importance = tl.load(importance_ptr + row, counted, other=0.0)
        objective, slope = importance * objective, importance * slope
    loss = -objective
    store_partial(partials_ptr, 1, weight * loss)
    if penalty_coef_ptr is not None:
        penalty_coef = tl.load(penalty_coef_ptr)
        loss += penalty_coef * (rise - log_r)
        slope += penalty_coef * rise
    d_logprob = weight * tl.where(tl.abs(raw) > MAX_LOG_RATIO, 0.0, slope)

    kl = tl.zeros([ROWS], tl.float32)
    if full_kl_ptr is not None:
        kl = tl.load(full_kl_ptr + row, counted, other=0.0)
    if ref_logprobs_ptr is not None:
        kl, kl_slope = kl_estimate(logprob - tl.load(ref_logprobs_ptr + row, counted, other=0.0), ESTIMATOR)
        tl.store(kl_ptr + row, tl.where(counted, kl, 0.0), exists)
    if kl_coef_ptr is not None:
        kl_coef = tl.load(kl_coef_ptr)
        loss += kl_coef * kl
        if ref_logprobs_ptr is not None:
            d_logprob += weight * kl_coef * kl_slope
        else:
            tl.store(d_kl_ptr + row, weight * kl_coef, exists)
    if ent_coef_ptr is not None:
        ent_coef = tl.load(ent_coef_ptr)
        loss -= ent_coef * entropy
        tl.store(d_entropy_ptr + row, -weight * ent_coef, exists)
    tl.store(d_logprobs_ptr + row, tl.where(counted, d_logprob, 0.0), exists)

    store_partial(partials_ptr, 0, tl.where(counted, weight * loss, 0.0))
    store_metrics(partials_ptr, counted, entropy, kl, rise - log_r, is_clipped, is_dual, r)


def policy_loss_from_stats(
    stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None = None
) -> PolicyLossResult:
    """The loss and its gradient in the per-token statistics, as ``reference.policy_loss_from_stats``.

    A sequence ratio couples the tokens of a sequence: its loss is the torch one, on [B, T].
    """
    if policy.ratio == "sequence":
        return reference.policy_loss_from_stats(stats, mask, policy, weights)
    logprobs = stats.logprobs
    if weights is None:
        counted = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
        weights = reference.token_weights(
            counted, policy.cu_seqlens, policy.denominator, policy.aggregation, logprobs.dtype
        )
    full = stats.kl.numel() > 0

    def room(wanted: bool) -> Tensor:
        return logprobs.new_empty(logprobs.shape if wanted else (0,))

    kl = room(True) if policy.ref_logprobs is not None else stats.kl
    d_logprobs, d_entropy = room(True), room(policy.ent_coef is not None)
    d_kl = room(full and policy.kl_coef is not None)
    partials = new_partials(logprobs, _TOTALS)
    if logprobs.numel():
        with on_device_of(logprobs):
            terms_kernel[(partials.shape[1],)](
                logprobs,
                stats.entropy,
                stats.kl if full else None,
                mask,
                policy.old_logprobs,
                policy.advantages,
                policy.ref_logprobs,
                policy.importance_weights,
                weights,
                policy.penalty_coef,
                policy.ent_coef,
                policy.kl_coef,
                kl,
                d_logprobs,
                d_entropy,
                d_kl,
                partials,
                logprobs.numel(),
                policy.clip_low,
                policy.clip_high,
                policy.dual_clip,
                ESTIMATOR=policy.kl_estimator,
                ROWS=tuning.ROWS,
            )
    loss, metrics = totals(partials, _RATIO_MAX)
    return PolicyLossResult(
        loss, metrics, logprobs, stats.entropy, kl, stats.lse, stats.ref_lse, d_logprobs, d_entropy, d_kl
    )


def policy_loss(rows: RowInputs, policy: PolicyInputs) -> PolicyLossResult:
    """:func:`token_stats`, then :func:`policy_loss_from_stats` of them."""
    return policy_loss_from_stats(token_stats(rows, True), rows.mask, policy)
