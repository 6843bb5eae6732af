"""Launchers of the C++ kernels of policy_loss and value_loss. Tensors are as in :mod:`ppo_fast.ops._native_stats`."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops import reference
from ppo_fast.ops._native import extension
from ppo_fast.ops._native_stats import (
    gradient_view,
    per_row,
    readable,
    room,
    rows_of,
    set_addresses,
    token_stats,
    token_stats_backward,
)


def _token_weights(
    shape: torch.Size,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    aggregation: str,
) -> Tensor | None:
    """The weight of each token; None for token-mean, where the kernels weigh all by one number."""
    if aggregation == "token-mean":
        return None
    counted = torch.ones(shape, dtype=torch.bool, device="cpu") if mask is None else mask
    return reference.token_weights(counted, cu_seqlens, denominator, aggregation, torch.float32)


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    *terms: Any,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`ppo_fast.ops.reference.policy_loss`, and in ``out`` the gradient of the loss; it may be the logits."""
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
    loss, metrics = room(()), room((len(reference.METRICS),))
    set_addresses(arguments, d_logprobs=d_logprobs, d_entropy=d_entropy, d_kl=d_kl, loss=loss, metrics=metrics)
    extension.policy_loss(arguments, threads=torch.get_num_threads())
    return loss, metrics, logprobs, entropy, kl, lse, ref_lse, d_logprobs, d_entropy, d_kl


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    old_values: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    clip: float | None,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`ppo_fast.ops.reference.value_loss`. Values are float32 or bfloat16, of any strides."""
    values = values.contiguous()
    weights = _token_weights(values.shape, mask, cu_seqlens, denominator, aggregation)
    loss, metrics, gradient = room(()), room((len(reference.VALUE_METRICS),)), room(values.shape)
    arguments = extension.ValueLossArguments()
    arguments.bfloat16, arguments.rows = values.dtype == torch.bfloat16, values.numel()
    arguments.clip = 0.0 if clip is None else clip
    set_addresses(arguments, values=values, returns=returns, mask=mask, token_weights=weights, denominator=denominator)
    set_addresses(arguments, old_values=None if clip is None else old_values)
    set_addresses(arguments, gradient=gradient, loss=loss, metrics=metrics)
    extension.value_loss(arguments, threads=torch.get_num_threads())
    return loss, metrics, gradient
