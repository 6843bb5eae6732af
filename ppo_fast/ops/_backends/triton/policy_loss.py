"""The policy loss: the statistics of :mod:`token_stats`, then every per-token term and its gradient in one kernel."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import clamped, expm1, on_device_of
from ppo_fast.ops._backends.triton.policy_sequences import sequence_terms_kernel
from ppo_fast.ops._backends.triton.policy_terms import MAX_LOG_RATIO, token_terms
from ppo_fast.ops._backends.triton.sequences import count_of as sequences_of
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
    store_partial,
    token_weight,
    totals,
)
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import METRICS, PolicyLossResult, RowStats

_TOTALS = 1 + len(METRICS)
_RATIO_MAX = 1 + METRICS.index("ratio_max")


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
    weight = token_weight(weights_ptr, denominator, row, counted)
    raw = tl.zeros([ROWS], tl.float32)
    if old_ptr is not None:
        raw = logprob - tl.load(old_ptr + row, counted, other=0.0)
    log_r = clamped(raw, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    rise = expm1(log_r)
    loss, objective, slope, at_constant_r, d_kl_term, kl, is_clipped, is_dual, r = token_terms(
        row,
        exists,
        counted,
        weight,
        log_r,
        rise,
        logprob,
        entropy,
        kl,
        advantages_ptr,
        ref_logprobs_ptr,
        importance_ptr,
        penalty_coef,
        ent_coef,
        kl_coef,
        kl_ptr,
        d_entropy_ptr,
        d_kl_ptr,
        clip_low,
        clip_high,
        dual_clip,
        CISPO,
        ESTIMATOR,
    )
    store_partial(partials_ptr, 1, weight * objective)
    d_logprob = weight * (tl.where(tl.abs(raw) > MAX_LOG_RATIO, 0.0, slope) - at_constant_r) + d_kl_term
    tl.store(d_logprobs_ptr + row, tl.where(counted, d_logprob, 0.0), exists)
    store_partial(partials_ptr, 0, tl.where(counted, weight * loss, 0.0))
    store_metrics(partials_ptr, counted, entropy, kl, rise - log_r, is_clipped, is_dual, r)


class _Terms(NamedTuple):
    """Per-token results of a kernel of terms [B, T], None where not used, and its partial sums."""

    kl: Tensor | None
    grads: RowGrads
    partials: Tensor
    by_count: bool  # nothing has been divided by the number of tokens, or of sequences
    by_sequences: bool = False  # it is that of sequences, whose partial sums are the last row


def _room(stats: RowStats, policy: PolicyInputs) -> tuple[Tensor | None, RowGrads]:
    """Room for the KL of the estimator and the gradients, as far as they are used."""
    logprobs, full_kl = stats.logprobs, _full_kl(stats)
    return (
        torch.empty_like(logprobs) if policy.ref_logprobs is not None else full_kl,
        RowGrads(
            torch.empty_like(logprobs),
            None if policy.ent_coef is None else torch.empty_like(logprobs),
            None if full_kl is None or policy.kl_coef is None else torch.empty_like(logprobs),
        ),
    )


def _full_kl(stats: RowStats) -> Tensor | None:
    """The KL over the vocabulary; None without reference logits."""
    return stats.kl if stats.kl.numel() else None


def _options(policy: PolicyInputs) -> dict[str, Any]:
    """The constants that every kernel of terms takes."""
    return {
        "CISPO": policy.objective == "cispo",
        "ESTIMATOR": policy.kl_estimator,
        "enable_fp_fusion": False,
    }


def _terms(
    rows: tuple[Any, ...],
    segments: Tensor | None,
    stats: RowStats,
    policy: PolicyInputs,
    weights: Tensor | None,
) -> _Terms:
    """Launch :func:`terms_kernel` with its arguments ``rows``."""
    kl, grads = _room(stats, policy)
    denominator = policy.denominator if weights is None else None
    constants = {"SEGMENTS": 1, "WIDTH": 1, "ROWS": tuning.ROWS} if segments is None else merging(segments)
    partials = new_partials(stats.logprobs, _TOTALS, constants["ROWS"])
    if stats.logprobs.numel():
        with on_device_of(stats.logprobs):
            terms_kernel[(partials.shape[1],)](
                segments,
                *rows,
                policy.old_logprobs,
                policy.advantages,
                policy.ref_logprobs,
                policy.importance_weights,
                None if weights is None else weights.contiguous(),
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
                **_options(policy),
                **constants,
            )
    return _Terms(kl, grads, partials, weights is None and denominator is None)


def _sequence_terms(stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None) -> _Terms:
    """Launch :func:`sequence_terms_kernel`."""
    kl, grads = _room(stats, policy)
    logprobs, cu_seqlens = stats.logprobs, policy.cu_seqlens
    denominator = policy.denominator if weights is None else None
    by_count = weights is None and denominator is None
    by_sequences = by_count and policy.aggregation != "token-mean"
    N, sequences = logprobs.numel(), sequences_of(cu_seqlens, logprobs)
    partials = logprobs.new_empty(_TOTALS + by_sequences, sequences if N else 0)
    if N:
        with on_device_of(logprobs):
            sequence_terms_kernel[(sequences,)](
                cu_seqlens,
                mask,
                logprobs,
                stats.entropy,
                _full_kl(stats),
                N,
                logprobs.shape[1],
                policy.old_logprobs,
                policy.advantages,
                policy.ref_logprobs,
                policy.importance_weights,
                None if weights is None else weights.contiguous(),
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
                SEQUENCE_RATIO=policy.ratio == "sequence",
                TOKEN_MEAN=policy.aggregation == "seq-mean-token-mean",
                BY_SEQUENCES=by_sequences,
                ROWS=tuning.ROWS,
                **_options(policy),
            )
    return _Terms(kl, grads, partials, by_count, by_sequences)


def _loss(stats: RowStats, terms: _Terms) -> PolicyLossResult:
    """Make the totals."""
    with on_device_of(stats.logprobs):
        grads = terms.grads if terms.by_count else None
        loss, metrics = totals(terms.partials, grads, _RATIO_MAX, terms.by_sequences)
    ref_lse = None if _full_kl(stats) is None else stats.ref_lse
    return PolicyLossResult(loss, metrics, stats.logprobs, stats.entropy, terms.kl, stats.lse, ref_lse, *terms.grads)  # type: ignore[arg-type]  # the first is a tensor


def _from_stats(stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None) -> _Terms:
    """The terms of statistics that exist."""
    if policy.ratio == "sequence" or (policy.aggregation != "token-mean" and weights is None):
        return _sequence_terms(stats, mask, policy, weights)
    N, kl = stats.logprobs.numel(), _full_kl(stats)
    rows = (None, None, None, mask, stats.logprobs, stats.entropy, kl, None, None, N, 1, 1, *(0,) * 4, 1.0, 1.0)
    return _terms(rows, None, stats, policy, weights)


def _from_rows(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, _Terms]:
    """Statistics and terms; of rows that are cut into segments, the merge and the terms of tokens are one kernel."""
    logits = rows.logits
    whole = tuning.whole_tile(logits, aligned(logits, rows.ref_logits)) is not None
    by_token = policy.ratio == "token" and (policy.aggregation == "token-mean" or weights is not None)
    if whole or not by_token or logits.shape[:2].numel() == 0:
        stats = token_stats(rows, True)
        return stats, _from_stats(stats, rows.mask, policy, weights)
    stats = stats_room(rows, True)
    with on_device_of(logits):
        partials = segments(rows, True)
    return stats, _terms(row_arguments(rows, stats), partials, stats, policy, weights)


def policy_loss_from_stats(
    stats: RowStats, mask: Tensor | None, policy: PolicyInputs, weights: Tensor | None = None
) -> PolicyLossResult:
    """The loss and its gradient in the per-token statistics, as ``reference.policy_loss_from_stats``."""
    return _loss(stats, _from_stats(stats, mask, policy, weights))


def policy_gradients(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, RowGrads]:
    """The statistics of some rows of a batch, and the gradients of their loss in these, weighted by token."""
    stats, terms = _from_rows(rows, policy, weights)
    return stats, terms.grads


def policy_loss(rows: RowInputs, policy: PolicyInputs) -> PolicyLossResult:
    """Statistics and loss."""
    return _loss(*_from_rows(rows, policy, None))
