"""Launcher of policy_loss in C++."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import (
    _token_weights,
    gradient_view,
    per_row,
    readable,
    room,
    rows_of,
    set_addresses,
)
from ppo_fast.ops._backends.native.token_stats import token_stats, token_stats_backward
from ppo_fast.ops._core.results import METRICS


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    *terms: Any,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The reference's policy_loss, with the gradient of the loss in ``out``, which may be the logits."""
    ratio = terms[-3]
    run = _one_pass if ratio == "token" else _two_passes
    return run(logits, targets, mask, readable(ref_logits), temperature, *terms, out=out)


def _two_passes(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    *terms: Any,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    """A sequence ratio couples the tokens of a sequence: the statistics of all, their terms, then the gradients."""
    logprobs, entropy, full_kl, lse, ref_lse = token_stats(logits, targets, ref_logits, mask, temperature, True)
    result = reference.policy_terms(logprobs, entropy, full_kl, mask, *terms)
    upstream = result.d_logprobs, result.d_entropy, result.d_kl
    if out is not None:
        g, g_entropy, g_kl = (x.contiguous() if x.numel() else None for x in upstream)
        saved = (lse, ref_lse, entropy, full_kl)
        token_stats_backward(g, g_entropy, g_kl, logits, targets, ref_logits, mask, *saved, temperature, out)
    return result.loss, result.metrics, logprobs, entropy, result.kl, lse, ref_lse, *upstream


def _one_pass(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    penalty_coef: Tensor | None,
    ent_coef: Tensor | None,
    kl_coef: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    ratio: str,
    kl_estimator: str,
    aggregation: str,
    *,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    """Statistics, loss and gradient of a row while it is in the cache."""
    full = ref_logits is not None
    stats = extension.TokenStatsArguments()
    stats.rows = rows_of(logits, targets, ref_logits, mask, temperature)
    logprobs, entropy, kl = per_row(logits), per_row(logits), per_row(logits, full or ref_logprobs is not None)
    lse, ref_lse = per_row(logits, dtype=torch.float64), per_row(logits, full, torch.float64)
    set_addresses(stats, logprobs=logprobs, entropy=entropy, kl=kl, lse=lse, ref_lse=ref_lse)

    arguments = extension.PolicyLossArguments()
    arguments.stats = stats
    arguments.low, arguments.high, arguments.dual_clip = 1.0 - clip_low, 1.0 + clip_high, dual_clip
    arguments.kl_estimator = getattr(extension.KlEstimator, kl_estimator)
    arguments.gradient = gradient_view(out, logits)
    weights = _token_weights(logits.shape[:2], mask, cu_seqlens, denominator, aggregation)
    set_addresses(arguments, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs)
    set_addresses(arguments, importance_weights=importance_weights, token_weights=weights, denominator=denominator)
    set_addresses(arguments, penalty_coef=penalty_coef, ent_coef=ent_coef, kl_coef=kl_coef)

    d_logprobs, d_entropy = per_row(logits), per_row(logits, ent_coef is not None)
    d_kl = per_row(logits, full and kl_coef is not None)
    loss, metrics = room(()), room((len(METRICS),))
    set_addresses(arguments, d_logprobs=d_logprobs, d_entropy=d_entropy, d_kl=d_kl, loss=loss, metrics=metrics)
    extension.policy_loss(arguments, threads=torch.get_num_threads())
    return loss, metrics, logprobs, entropy, kl, lse, ref_lse, d_logprobs, d_entropy, d_kl
