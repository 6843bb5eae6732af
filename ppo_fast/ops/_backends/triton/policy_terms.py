"""The terms of the policy loss of each token, for the kernels over tokens and over sequences."""

import triton
import triton.language as tl

from ppo_fast.ops._backends.triton.device import clamped, expm1
from ppo_fast.ops._backends.triton.totals import number

MAX_LOG_RATIO: tl.constexpr = tl.constexpr(20.0)


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
def token_terms(
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
    CISPO: tl.constexpr,
    ESTIMATOR: tl.constexpr,
):
    """Per token -importance*objective + penalty*(r - 1 - log r) + kl_coef*kl - ent_coef*H; None leaves a term out.

    With rise = r - 1. Returns this loss, that of the objective, its derivatives in log r and (negated) in the
    log-probability at a constant r, the weighted one of the KL term, then the KL of the estimator, whether the clip and
    the dual clip bind, and r. Writes the KL, and the weighted gradients in entropy and exact KL.
    """
    adv = tl.load(advantages_ptr + row, counted, other=0.0)
    r, none = tl.exp(log_r), tl.zeros(row.shape, tl.float32)
    importance = none + 1.0
    if importance_ptr is not None:
        importance = tl.load(importance_ptr + row, counted, other=0.0)
    slope, at_constant_r, d_kl_term, is_dual = none, none, none, tl.zeros(row.shape, tl.int1)
    if CISPO:
        objective, at_constant_r, is_clipped = cispo_objective(r, adv, importance, logprob, clip_low, clip_high)
    else:
        objective, slope, is_clipped, is_dual = clip_objective(r, adv, importance, clip_low, clip_high, dual_clip)
    objective, slope = -objective, -slope
    loss = objective
    if penalty_coef is not None:
        penalty = number(penalty_coef)
        loss += penalty * (rise - log_r)
        slope += penalty * rise
    if ref_logprobs_ptr is not None:
        kl, kl_slope = kl_estimate(logprob - tl.load(ref_logprobs_ptr + row, counted, other=0.0), ESTIMATOR)
        tl.store(kl_ptr + row, tl.where(counted, kl, 0.0), exists)
    if kl_coef is not None:
        coef = number(kl_coef)
        loss += coef * kl
        if ref_logprobs_ptr is not None:
            d_kl_term = weight * coef * kl_slope
        else:
            tl.store(d_kl_ptr + row, weight * coef, exists)
    if ent_coef is not None:
        bonus = number(ent_coef)
        loss -= bonus * entropy
        tl.store(d_entropy_ptr + row, -weight * bonus, exists)
    return loss, objective, slope, at_constant_r, d_kl_term, kl, is_clipped, is_dual, r
