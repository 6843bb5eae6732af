"""The terms of the policy loss where a token's depend on its sequence: one program walks the tokens of one sequence."""

import triton
import triton.language as tl

from ppo_fast.ops._backends.triton.device import clamped, expm1
from ppo_fast.ops._backends.triton.policy_terms import MAX_LOG_RATIO, token_terms
from ppo_fast.ops._backends.triton.sequences import length_of, sequence_weight, span, steps_of_block
from ppo_fast.ops._backends.triton.totals import max_or_nan, store_partial


@triton.jit
def log_ratio(logprobs_ptr, old_ptr, row, counted):
    """The log ratio of tokens to the old policy, not clamped; 0 where they do not count."""
    raw = tl.zeros(row.shape, tl.float32)
    if old_ptr is not None:
        raw = tl.load(logprobs_ptr + row, counted, other=0.0) - tl.load(old_ptr + row, counted, other=0.0)
    return raw


@triton.jit
def mean_log_ratio(mask_ptr, logprobs_ptr, old_ptr, first, steps, length, ROWS: tl.constexpr):
    """The mean of :func:`log_ratio` over the tokens of the sequence that count."""
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, steps, ROWS):
        row, _, counted = steps_of_block(mask_ptr, first, steps, start, ROWS)
        total += log_ratio(logprobs_ptr, old_ptr, row, counted)
    return tl.div_rn(tl.sum(total, 0), tl.maximum(length, 1.0))


@triton.jit
def add_to_all(ptr, mask_ptr, first, steps, change, ROWS: tl.constexpr):
    """Adds a number to the tokens of the sequence that count."""
    for start in range(0, steps, ROWS):
        row, _, counted = steps_of_block(mask_ptr, first, steps, start, ROWS)
        tl.store(ptr + row, tl.load(ptr + row, counted, other=0.0) + change, counted)


@triton.jit(do_not_specialize=["N", "T"])
def sequence_terms_kernel(
    cu_seqlens_ptr,
    mask_ptr,
    logprobs_ptr,
    entropy_ptr,
    full_kl_ptr,
    N: tl.int64,
    T,
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
    SEQUENCE_RATIO: tl.constexpr,
    TOKEN_MEAN: tl.constexpr,
    BY_SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """:func:`terms_kernel <ppo_fast.ops._backends.triton.policy_loss.terms_kernel>` of one sequence, from statistics.

    SEQUENCE_RATIO: r = exp(clamp(mean log ratio)), the same for all tokens; each gets an equal share of its gradient.
    TOKEN_MEAN: a token weighs 1 / the number of its sequence's. BY_SEQUENCES: one partial sum more, whether the
    sequence has a token that counts.
    """
    first, steps = span(cu_seqlens_ptr, N, T)
    length = length_of(mask_ptr, first, steps, ROWS)
    shared_weight = sequence_weight(denominator, length, TOKEN_MEAN)
    mean = length * 0.0
    if SEQUENCE_RATIO:
        mean = mean_log_ratio(mask_ptr, logprobs_ptr, old_ptr, first, steps, length, ROWS)
    none = tl.zeros([ROWS], tl.float32)
    losses, objectives, entropies, kls, approx_kls, ratios = none, none, none, none, none, none
    clipped, dual, largest, slopes = none, none, none, none
    for start in range(0, steps, ROWS):
        row, exists, counted = steps_of_block(mask_ptr, first, steps, start, ROWS)
        weight = tl.where(counted, shared_weight, 0.0)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row, counted, other=0.0)
        logprob = tl.load(logprobs_ptr + row, counted, other=0.0)
        entropy = tl.load(entropy_ptr + row, counted, other=0.0)
        kl = none
        if full_kl_ptr is not None:
            kl = tl.load(full_kl_ptr + row, counted, other=0.0)
        own = log_ratio(logprobs_ptr, old_ptr, row, counted)
        raw = none + mean if SEQUENCE_RATIO else own
        log_r = clamped(raw, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        loss, objective, slope, at_constant_r, d_kl_term, kl, is_clipped, is_dual, r = token_terms(
            row,
            exists,
            counted,
            weight,
            log_r,
            expm1(log_r),
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
        slope = tl.where(tl.abs(raw) > MAX_LOG_RATIO, 0.0, slope)
        if SEQUENCE_RATIO:
            slopes += tl.where(counted, weight * slope, 0.0)
            slope = none
        d_logprob = weight * (slope - at_constant_r) + d_kl_term
        tl.store(d_logprobs_ptr + row, tl.where(counted, d_logprob, 0.0), exists)
        own = clamped(own, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        r = tl.where(counted, r, 0.0)
        losses += tl.where(counted, weight * loss, 0.0)
        objectives += weight * objective
        entropies += entropy
        kls += tl.where(counted, kl, 0.0)
        approx_kls += expm1(own) - own
        clipped += (is_clipped & counted).to(tl.float32)
        dual += (is_dual & counted).to(tl.float32)
        ratios += r
        largest = tl.maximum(largest, r)
    if SEQUENCE_RATIO:
        tl.debug_barrier()  # what other threads have written is read
        share = tl.div_rn(tl.sum(slopes, 0), tl.maximum(length, 1.0))
        add_to_all(d_logprobs_ptr, mask_ptr, first, steps, share, ROWS)
    store_partial(partials_ptr, 0, losses)
    store_partial(partials_ptr, 1, objectives)
    store_partial(partials_ptr, 2, entropies)
    store_partial(partials_ptr, 3, kls)
    store_partial(partials_ptr, 4, approx_kls)
    store_partial(partials_ptr, 5, clipped)
    store_partial(partials_ptr, 6, dual)
    store_partial(partials_ptr, 7, ratios)
    tl.store(partials_ptr + 8 * tl.num_programs(0) + tl.program_id(0), max_or_nan(largest, tl.sum(ratios, 0)))
    tl.store(partials_ptr + 9 * tl.num_programs(0) + tl.program_id(0), length)
    if BY_SEQUENCES:
        counts = tl.where(length > 0.0, 1.0, 0.0)
        tl.store(partials_ptr + 10 * tl.num_programs(0) + tl.program_id(0), counts)
