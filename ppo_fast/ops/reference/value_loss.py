"""The clipped squared error of the values, with its gradient."""

import torch
from torch import Tensor

from ppo_fast.ops.reference.sequences import counted_mean, token_weights

VALUE_METRICS = ("value_loss", "clipfrac", "tokens")


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
    """aggregate(0.5 * max((v - R)^2, (old_v + clip(v - old_v, -c, c) - R)^2)): (loss, metrics, d loss / d values)."""
    dtype = returns.dtype
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    v = torch.where(counted, values.to(dtype), 0.0)
    error = torch.where(counted, v - returns, 0.0)
    square, slope = error.square(), error
    is_clipped = torch.zeros_like(counted)
    if clip is not None and old_values is not None:
        old = torch.where(counted, old_values, 0.0)
        step = (v - old).clamp(-clip, clip)
        clipped_error = torch.where(counted, old + step - returns, 0.0)
        is_clipped = clipped_error.square() > square
        square = torch.maximum(square, clipped_error.square())
        slope = torch.where(is_clipped, torch.where(step == v - old, clipped_error, 0.0), error)
    weights = token_weights(counted, cu_seqlens, denominator, aggregation, dtype)
    loss = torch.where(counted, weights * square / 2, 0.0).sum()
    metrics = torch.stack([loss, counted_mean(is_clipped.to(dtype), counted), counted.sum().to(dtype)])
    return loss, metrics, torch.where(counted, weights * slope, 0.0)
