"""The (clipped) value loss and its gradient, one kernel over the tokens and one over the partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import clamped, on_device_of
from ppo_fast.ops._backends.triton.scaled import scaled
from ppo_fast.ops._backends.triton.token_stats import counted_rows
from ppo_fast.ops._backends.triton.totals import (
    new_partials,
    store_partial,
    token_weight,
    totals,
    weights_or_denominator,
)
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.results import VALUE_METRICS, ValueLossResult

_TOTALS = 1 + len(VALUE_METRICS)


@triton.jit(do_not_specialize=["N"])
def value_kernel(
    values_ptr,
    returns_ptr,
    mask_ptr,
    old_ptr,
    weights_ptr,
    denominator,
    d_values_ptr,
    partials_ptr,
    N,
    clip,
    ROWS: tl.constexpr,
):
    """0.5 * max((v - R)^2, (old_v + clip(v - old_v, -c, c) - R)^2) per token; without old values 0.5 * (v - R)^2."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists, counted = counted_rows(mask_ptr, row, N)
    v = tl.load(values_ptr + row, counted, other=0.0).to(tl.float32)
    if old_ptr is not None:
        old = tl.load(old_ptr + row, counted, other=0.0)
        v = tl.where(old == old, v, old)  # comparisons would drop a NaN
    target = tl.load(returns_ptr + row, counted, other=0.0)
    weight = token_weight(weights_ptr, denominator, row, counted)
    error = v - target
    square, slope = error * error, error
    is_clipped = tl.zeros([ROWS], tl.int1)
    if old_ptr is not None:
        # Inside the clip this is v itself; old + clip(v - old) would differ by a rounding and count as clipped.
        held_error = clamped(v, old - clip, old + clip) - target
        is_clipped = held_error * held_error > square
        square = tl.where(is_clipped, held_error * held_error, square)
        slope = tl.where(is_clipped, 0.0, error)
    tl.store(d_values_ptr + row, weight * slope, exists)
    loss = weight * square * 0.5
    store_partial(partials_ptr, 0, loss)
    store_partial(partials_ptr, 1, loss)
    store_partial(partials_ptr, 2, is_clipped.to(tl.float32))
    store_partial(partials_ptr, 3, counted.to(tl.float32))


def value_loss(inputs: ValueInputs) -> ValueLossResult:
    """The weights of the tokens come from ``reference.token_weights`` where they differ."""
    values, returns, mask, old_values, _, _, clip, _ = inputs
    weights, denominator = weights_or_denominator(None, mask, inputs, returns)
    d_values, partials = torch.empty_like(returns), new_partials(returns, _TOTALS)
    with on_device_of(values):
        if values.numel():
            value_kernel[(partials.shape[1],)](
                values.contiguous(),
                returns,
                mask,
                None if clip is None else old_values,
                weights,
                denominator,
                d_values,
                partials,
                values.numel(),
                clip or 0.0,
                ROWS=tuning.ROWS,
            )
        by_count = weights is None and denominator is None
        return ValueLossResult(*totals(partials, (d_values,) if by_count else None), d_values)


def value_loss_backward(grad_values: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.value_loss_backward``."""
    return scaled(grad_values, grad_loss, dtype)
