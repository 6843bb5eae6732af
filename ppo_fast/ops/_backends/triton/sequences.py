"""Sequences in kernels: where the one of a program lies, its tokens, and the weight that an aggregation gives them."""

import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton.totals import number


@triton.jit
def span(cu_seqlens_ptr, N, T):
    """(first row, number of rows) of this program's sequence; offsets outside [0, N] are clamped to it."""
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        first, steps = sequence * T, T
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), 0), N)
        steps = (tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), N) - first).to(tl.int32)
    return first, steps


@triton.jit
def steps_of_block(mask_ptr, first, steps, start, ROWS: tl.constexpr):
    """(rows, whether each is of the sequence, whether it counts) of the block of ROWS steps from ``start`` on."""
    step = start + tl.arange(0, ROWS)
    row, exists = first + step, step < steps
    counted = exists
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + row, exists, other=0) != 0
    return row, exists, counted


@triton.jit
def length_of(mask_ptr, first, steps, ROWS: tl.constexpr):
    """The number of tokens of the sequence that count."""
    tokens = tl.zeros([ROWS], tl.float32)
    for start in range(0, steps, ROWS):
        _, _, counted = steps_of_block(mask_ptr, first, steps, start, ROWS)
        tokens += counted.to(tl.float32)
    return tl.sum(tokens, 0)


@triton.jit
def sequence_weight(denominator, length, TOKEN_MEAN: tl.constexpr):
    """The weight of a token of a sequence, 1 / denominator, by TOKEN_MEAN 1 / (denominator * length).

    Without a denominator the totals divide.
    """
    divisor = tl.maximum(length, 1.0) if TOKEN_MEAN else length * 0.0 + 1.0
    if denominator is not None:
        divisor = number(denominator) * divisor
    return tl.div_rn(length * 0.0 + 1.0, divisor)


def count_of(cu_seqlens: Tensor | None, rows: Tensor) -> int:
    """The number of sequences in rows [B, T]."""
    return rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
