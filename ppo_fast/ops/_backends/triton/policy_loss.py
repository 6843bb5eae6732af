"""The policy loss: the statistics of :mod:`token_stats`, then every per-token term and its gradient in one kernel."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import clamped, expm1, on_device_of
from ppo_fast.ops._backends.triton.token_stats import (
    aligned,
    counted_rows,
    merged_rows,
    merging,
    results,
    row_arguments,
    segments,
    stats_room,
    token_stats,
)
from ppo_fast.ops._backends.triton.totals import (
    max_or_nan,
    new_partials,
    number,
    store_partial,
    token_weight,
    totals,
    weights_or_denominator,
)
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowGrads, RowInputs, given_grads
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
def clip_objective(r, adv, importance, clip_low, clip_high, dual_clip):
    """(importance*objective, its derivative in log r, whether the clip binds, whether the dual clip binds)."""
    unclipped = r * adv
    clipped = clamped(r, 1.0 - clip_low, 1.0 + clip_high) * adv
    is_clipped = clipped < unclipped
    objective = tl.where(is_clipped, clipped, unclipped)
    bound = tl.where(adv < 0.0, dual_clip * adv, -float("inf"))
    is_dual = bound > objective
    objective = tl.where(is_dual, bound, objective)
    slope = tl.where(is_clipped | is_dual, 0.0, unclipped)
    return importance * objective, importance * slope, is_clipped, is_dual


@triton.jit
def cispo_objective(r, adv, importance, logprob, clip_low, clip_high):
    """(importance*clip(r)*A*logprob, its derivative in logprob at a constant ratio, whether r is outside the clip)."""
    low, high = 1.0 - clip_low, 1.0 + clip_high
    factor = importance * (clamped(r, low, high) * adv)
    return tl.where(factor == 0.0, 0.0, factor * logprob), factor, (r < low) | (r > high)


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


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t", "ref_stride_b", "ref_stride_t"])
def terms_kernel(
    segments_ptr,
    logits_ptr,
    ref_ptr,
    targets_ptr,
    mask_ptr,
    logprobs_ptr,
    entropy_ptr,
    full_kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    N,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    scale,
    inv_temperature,
    old_ptr,
    advantages_ptr,
    ref_logprobs_ptr,
    importance_ptr,
    weights_ptr,
    denominator,
    penalty_coef,
    ent_coef,
    kl_coef,
    kl_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,
    d_kl_ptr,
    partials_ptr,
    clip_low,
    clip_high,
    dual_clip,
    CISPO: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per token -importance*objective + penalty*(r - 1 - log r) + kl_coef*kl - ent_coef*H, its gradient and metrics.

    The statistics are merged from segments of the rows and written, or read where no segments are given. None leaves a
    term out. Partial sums: the loss, then the metrics in the order of the op.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists, counted = counted_rows(mask_ptr, row, N)
    if segments_ptr is not None:
        FULL: tl.constexpr = full_kl_ptr is not None
        sums = merged_rows(segments_ptr, row, counted, N, scale, True, FULL, SEGMENTS, WIDTH)
        logprob, entropy, kl = results(
            sums,
            logits_ptr,
            targets_ptr,
            logprobs_ptr,
            entropy_ptr,
            full_kl_ptr,
            lse_ptr,
            ref_lse_ptr,
            row,
            counted,
            exists,
            T,
            V,
            stride_b,
            stride_t,
            inv_temperature,
        )
        logprob, entropy = tl.where(counted, logprob, 0.0), tl.where(counted, entropy, 0.0)
    else:
        logprob = tl.load(logprobs_ptr + row, counted, other=0.0)
        entropy = tl.load(entropy_ptr + row, counted, other=0.0)
        kl = tl.zeros([ROWS], tl.float32)
        if full_kl_ptr is not None:
            kl = tl.load(full_kl_ptr + row, counted, other=0.0)
    adv = tl.load(advantages_ptr + row, counted, other=0.0)
    weight = token_weight(weights_ptr, denominator, row, counted)
    raw = tl.zeros([ROWS], tl.float32)
    if old_ptr is not None:
        raw = logprob - tl.load(old_ptr + row, counted, other=0.0)
    log_r = clamped(raw, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    rise = expm1(log_r)
    r = tl.exp(log_r)
    importance = tl.full([ROWS], 1.0, tl.float32)
    if importance_ptr is not None:
        importance = tl.load(importance_ptr + row, counted, other=0.0)
    slope, at_constant_r, is_dual = tl.zeros([ROWS], tl.float32), 0.0, tl.zeros([ROWS], tl.int1)
    if CISPO:
        objective, at_constant_r, is_clipped = cispo_objective(r, adv, importance, logprob, clip_low, clip_high)
    else:
        objective, slope, is_clipped, is_dual = clip_objective(r, adv, importance, clip_low, clip_high, dual_clip)
    loss, slope = -objective, -slope
    store_partial(partials_ptr, 1, weight * loss)
    if penalty_coef is not None:
        penalty = number(penalty_coef)
        loss += penalty * (rise - log_r)
        slope += penalty * rise
    d_logprob = weight * (tl.where(tl.abs(raw) > MAX_LOG_RATIO, 0.0, slope) - at_constant_r)

    if ref_logprobs_ptr is not None:
        kl, kl_slope = kl_estimate(logprob - tl.load(ref_logprobs_ptr + row, counted, other=0.0), ESTIMATOR)
        tl.store(kl_ptr + row, tl.where(counted, kl, 0.0), exists)
    if kl_coef is not None:
        coef = number(kl_coef)
        loss += coef * kl
        if ref_logprobs_ptr is not None:
            d_logprob += weight * coef * kl_slope
        else:
            tl.store(d_kl_ptr + row, weight * coef, exists)
    if ent_coef is not None:
        bonus = number(ent_coef)
        loss -= bonus * entropy
        tl.store(d_entropy_ptr + row, -weight * bonus, exists)
    tl.store(d_logprobs_ptr + row, tl.where(counted, d_logprob, 0.0), exists)

    store_partial(partials_ptr, 0, tl.where(counted, weight * loss, 0.0))
    store_metrics(partials_ptr, counted, entropy, kl, rise - log_r, is_clipped, is_dual, r)


class _Terms(NamedTuple):
    """Per-token results of :func:`terms_kernel` [B, T], empty where not used, and its partial sums."""

    kl: Tensor
    grads: tuple[Tensor, Tensor, Tensor]
    partials: Tensor
    by_count: bool  # nothing has been divided by the number of tokens


def _terms(
    rows: tuple[Any, ...],
    segments: Tensor | None,
    stats: RowStats,
    mask: Tensor | None,
    policy: PolicyInputs,
    weights: Tensor | None,
) -> _Terms:
    """Launch :func:`terms_kernel` with its arguments ``rows``."""
    logprobs, full = stats.logprobs, stats.kl.numel() > 0

    def room(wanted: bool) -> Tensor:
        return logprobs.new_empty(logprobs.shape if wanted else (0,))

    kl = room(True) if policy.ref_logprobs is not None else stats.kl
    grads = (
        room(True),
        room(policy.ent_coef is not None),
        room(full and policy.kl_coef is not None),
    )
    weights, denominator = weights_or_denominator(weights, mask, policy, logprobs)
    constants = {"SEGMENTS": 1, "WIDTH": 1, "ROWS": tuning.ROWS} if segments is None else merging(segments)
    partials = new_partials(logprobs, _TOTALS, constants["ROWS"])
    if logprobs.numel():
        with on_device_of(logprobs):
            terms_kernel[(partials.shape[1],)](
                segments,
                *rows,
                policy.old_logprobs,
                policy.advantages,
                policy.ref_logprobs,
                policy.importance_weights,
                weights,
                denominator,
                policy.penalty_coef,
                policy.ent_coef,
                policy.kl_coef,
                kl,
                *grads,
                partials,
                policy.clip_low,
                policy.clip_high,
                policy.dual_clip,
                CISPO=policy.objective == "cispo",
                ESTIMATOR=policy.kl_estimator,
                **constants,
                enable_fp_fusion=False,
            )
    return _Terms(kl, grads, partials, weights is None and denominator is None)


def _loss(stats: RowStats, terms: _Terms) -> PolicyLossResult:
    """Make the totals."""
    with on_device_of(stats.logprobs):
        loss, metrics = totals(terms.partials, terms.grads if terms.by_count else None, _RATIO_MAX)
    return PolicyLossResult(
        loss, metrics, stats.logprobs, stats.entropy, terms.kl, stats.lse, stats.ref_lse, *terms.grads
    )


def _from_stats(stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None) -> _Terms:
    """The terms of statistics that exist."""
    kl = stats.kl if stats.kl.numel() else None
    N = stats.logprobs.numel()
    rows = (None, None, None, mask, stats.logprobs, stats.entropy, kl, None, None, N, 1, 1, *(0,) * 4, 1.0, 1.0)
    return _terms(rows, None, stats, mask, policy, weights)


def _from_rows(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, _Terms]:
    """Statistics and terms; of rows that are cut into segments, the merge and the terms are one kernel."""
    logits = rows.logits
    whole = tuning.whole_tile(logits, aligned(logits, rows.ref_logits)) is not None
    if whole or logits.shape[:2].numel() == 0:
        stats = token_stats(rows, True)
        return stats, _from_stats(stats, rows.mask, policy, weights)
    stats = stats_room(rows, True)
    with on_device_of(logits):
        partials = segments(rows, True)
    return stats, _terms(row_arguments(rows, stats), partials, stats, rows.mask, policy, weights)


def policy_loss_from_stats(
    stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None = None
) -> PolicyLossResult:
    """The loss and its gradient in the per-token statistics, as ``reference.policy_loss_from_stats``.

    A sequence ratio couples the tokens of a sequence: its loss is the torch one, on [B, T].
    """
    if policy.ratio == "sequence":
        return reference.policy_loss_from_stats(stats, mask, policy, weights)
    return _loss(stats, _from_stats(stats, mask, policy, weights))


def policy_gradients(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, RowGrads]:
    """The statistics of some rows of a batch, and the gradients of their loss in these, weighted by token."""
    stats, terms = _from_rows(rows, policy, weights)
    return stats, given_grads(*terms.grads)


def policy_loss(rows: RowInputs, policy: PolicyInputs) -> PolicyLossResult:
    """Statistics and loss."""
    if policy.ratio == "sequence":
        return policy_loss_from_stats(token_stats(rows, True), rows.mask, policy)
    return _loss(*_from_rows(rows, policy, None))
