"""The clipped squared error of the values, with its gradient."""

import torch
from torch import Tensor

from ppo_fast.ops._backends.reference.sequences import counted_mean, token_weights
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.results import ValueLossResult


def value_loss(inputs: ValueInputs) -> ValueLossResult:
    """aggregate(0.5 * max((v - R)^2, (old_v + clip(v - old_v, -c, c) - R)^2)), its metrics and its gradient."""
    values, returns, mask, old_values, cu_seqlens, denominator, clip, aggregation = inputs
    dtype = returns.dtype
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    v = torch.where(counted, values.to(dtype), 0.0)
    old = None if clip is None or old_values is None else torch.where(counted, old_values, 0.0)
    if old is not None:
        v = torch.where(old.isnan(), old, v)  # comparisons would drop a NaN
    error = torch.where(counted, v - returns, 0.0)
    square, slope = error.square(), error
    is_clipped = torch.zeros_like(counted)
    if clip is not None and old is not None:
        # Inside the clip this is v itself; old + clip(v - old) would differ by a rounding and count as clipped.
        held = torch.clamp(v, old - clip, old + clip)
        clipped_square = torch.where(counted, held - returns, 0.0).square()
        is_clipped = clipped_square > square
        square = torch.maximum(square, clipped_square)
        slope = torch.where(is_clipped, 0.0, error)
    weights = token_weights(counted, cu_seqlens, denominator, aggregation, dtype)
    loss = torch.where(counted, weights * square / 2, 0.0).sum()
    metrics = torch.stack([loss, counted_mean(is_clipped.to(dtype), counted), counted.sum().to(dtype)])
    return ValueLossResult(loss, metrics, torch.where(counted, weights * slope, 0.0))


def value_loss_backward(grad_values: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the values in their dtype, from that of the loss in them and ``grad_loss`` []."""
    return (grad_values * grad_loss).to(dtype)
