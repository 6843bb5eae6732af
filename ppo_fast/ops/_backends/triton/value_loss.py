"""The (clipped) value loss and its gradient, one kernel over tokens or sequences and one over the partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import clamped, on_device_of
from ppo_fast.ops._backends.triton.scaled import scaled
from ppo_fast.ops._backends.triton.sequences import count_of as sequences_of
from ppo_fast.ops._backends.triton.sequences import length_of, sequence_weight, span, steps_of_block
from ppo_fast.ops._backends.triton.token_stats import counted_rows
from ppo_fast.ops._backends.triton.totals import new_partials, store_partial, token_weight, totals
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.results import VALUE_METRICS, ValueLossResult

_TOTALS = 1 + len(VALUE_METRICS)


@triton.jit
def value_terms(row, exists, counted, weight, values_ptr, returns_ptr, old_ptr, d_values_ptr, clip):
    """(weighted loss, whether the clip binds) of tokens, whose gradients are written.

    0.5 * max((v - R)^2, (old_v + clip(v - old_v, -c, c) - R)^2); without old values 0.5 * (v - R)^2.
    """
    v = tl.load(values_ptr + row, counted, other=0.0).to(tl.float32)
    if old_ptr is not None:
        old = tl.load(old_ptr + row, counted, other=0.0)
        v = tl.where(old == old, v, old)  # comparisons would drop a NaN
    target = tl.load(returns_ptr + row, counted, other=0.0)
    error = v - target
    square, slope = error * error, error
    is_clipped = tl.zeros(row.shape, tl.int1)
    if old_ptr is not None:
        # Inside the clip this is v itself; old + clip(v - old) would differ by a rounding and count as clipped.
        held_error = clamped(v, old - clip, old + clip) - target
        is_clipped = held_error * held_error > square
        square = tl.where(is_clipped, held_error * held_error, square)
        slope = tl.where(is_clipped, 0.0, error)
    tl.store(d_values_ptr + row, weight * slope, exists)
    return weight * square * 0.5, is_clipped


@triton.jit(do_not_specialize=["N"])
def value_kernel(
    values_ptr,
    returns_ptr,
    mask_ptr,
    old_ptr,
    denominator,
    d_values_ptr,
    partials_ptr,
    N,
    clip,
    ROWS: tl.constexpr,
):
    """Terms and partial sums of ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists, counted = counted_rows(mask_ptr, row, N)
    weight = token_weight(None, denominator, row, counted)
    loss, is_clipped = value_terms(row, exists, counted, weight, values_ptr, returns_ptr, old_ptr, d_values_ptr, clip)
    store_partial(partials_ptr, 0, loss)
    store_partial(partials_ptr, 1, loss)
    store_partial(partials_ptr, 2, is_clipped.to(tl.float32))
    store_partial(partials_ptr, 3, counted.to(tl.float32))


@triton.jit(do_not_specialize=["N", "T"])
def value_sequences_kernel(
    cu_seqlens_ptr,
    values_ptr,
    returns_ptr,
    mask_ptr,
    old_ptr,
    denominator,
    d_values_ptr,
    partials_ptr,
    N: tl.int64,
    T,
    clip,
    TOKEN_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same of one sequence. TOKEN_MEAN: a token weighs 1 / the number of its sequence's.

    Without a denominator one partial sum more: whether the sequence has a token that counts.
    """
    first, steps = span(cu_seqlens_ptr, N, T)
    length = length_of(mask_ptr, first, steps, ROWS)
    shared_weight = sequence_weight(denominator, length, TOKEN_MEAN)
    losses, clipped = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, steps, ROWS):
        row, exists, counted = steps_of_block(mask_ptr, first, steps, start, ROWS)
        weight = tl.where(counted, shared_weight, 0.0)
        loss, is_clipped = value_terms(
            row, exists, counted, weight, values_ptr, returns_ptr, old_ptr, d_values_ptr, clip
        )
        losses += loss
        clipped += is_clipped.to(tl.float32)
    store_partial(partials_ptr, 0, losses)
    store_partial(partials_ptr, 1, losses)
    store_partial(partials_ptr, 2, clipped)
    tl.store(partials_ptr + 3 * tl.num_programs(0) + tl.program_id(0), length)
    if denominator is None:
        counts = tl.where(length > 0.0, 1.0, 0.0)
        tl.store(partials_ptr + 4 * tl.num_programs(0) + tl.program_id(0), counts)


def value_loss(inputs: ValueInputs) -> ValueLossResult:
    """One kernel over tokens, or over sequences where they weigh differently, and one over the partial sums."""
    values, returns, mask, old_values, cu_seqlens, denominator, clip, aggregation = inputs
    d_values, N, by_token = torch.empty_like(returns), values.numel(), aggregation == "token-mean"
    by_sequences = not by_token and denominator is None
    with on_device_of(values):
        tensors = (values.contiguous(), returns, mask, None if clip is None else old_values, denominator, d_values)
        if by_token:
            partials = new_partials(returns, _TOTALS)
            if N:
                value_kernel[(partials.shape[1],)](*tensors, partials, N, clip or 0.0, ROWS=tuning.ROWS)
        else:
            sequences = sequences_of(cu_seqlens, values) if N else 0
            partials = returns.new_empty(_TOTALS + by_sequences, sequences)
            if N:
                value_sequences_kernel[(sequences,)](
                    cu_seqlens,
                    *tensors,
                    partials,
                    N,
                    values.shape[-1],
                    clip or 0.0,
                    TOKEN_MEAN=aggregation == "seq-mean-token-mean",
                    ROWS=tuning.ROWS,
                )
        grads = (d_values,) if denominator is None else None
        return ValueLossResult(*totals(partials, grads, by_sequences=by_sequences), d_values)


def value_loss_backward(grad_values: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.value_loss_backward``."""
    return scaled(grad_values, grad_loss, dtype)
