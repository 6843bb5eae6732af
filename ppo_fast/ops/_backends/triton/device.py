"""Shared by the kernels: constants, row addressing, and sums of exponentials kept against a running maximum.

Notation of the sums over words v, in base 2, with d = (x - m)*scale and scale = log2(e) / temperature:
s = sum 2^d, w = sum 2^d*d (the *shifted* entropy sum), k = sum 2^d*(d - d_ref). A sum kept against one maximum moves
to a larger one with shift = (m - new m)*scale <= 0 by the ``moved_*`` functions, without touching the logits again.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The maximum of nothing, finite so that differences of maxima are no NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
# Finite, and 2^FLOOR is 0: stands for a shift of -inf where it is multiplied.
FLOOR: tl.constexpr = tl.constexpr(-3e38)


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the device of ``x``; nothing on CPU tensors."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


@triton.jit
def floored(x):
    """max(x, FLOOR)."""
    return tl.maximum(x, FLOOR)


@triton.jit
def clamped(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def expm1(x):
    """e^x - 1; the Taylor series (relative remainder < 2^-25) where the difference would cancel."""
    series = 1.0 + x / 7 * (1.0 + x / 8)
    series = 1.0 + x / 5 * (1.0 + x / 6 * series)
    series = 1.0 + x / 3 * (1.0 + x / 4 * series)
    series = x * (1.0 + x / 2 * series)
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1.0)


@triton.jit
def row_offset(row, T, stride_b, stride_t, ALIGNED: tl.constexpr):
    """Offset in elements, int64, of flat row b*T + t; a multiple of 16 when ALIGNED."""
    b = row // T
    offset = b.to(tl.int64) * stride_b + (row - b * T).to(tl.int64) * stride_t
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def tile(base, BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """base + 0..BLOCK-1 (columns or pointers), laid out so that one thread holds a lane: the axis of length GROUP.

    Aligned rows: [BLOCK / GROUP, GROUP], GROUP neighbors are one 16-byte access. Else [GROUP, BLOCK / GROUP]: single
    elements, neighboring threads on neighboring words. Added in two steps the second of which is a constant within
    a thread: an immediate of the load, not a 64-bit address for every word.
    """
    LANES: tl.constexpr = BLOCK // GROUP
    lanes, members = tl.arange(0, LANES), tl.arange(0, GROUP)
    if ALIGNED:
        result = (base + lanes * GROUP)[:, None] + members[None, :]
    else:
        result = (base + lanes)[None, :] + (members * LANES)[:, None]
    return result


@triton.jit
def tiles(base, BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """A :func:`tile` for each base of [ROWS], along the first axis."""
    LANES: tl.constexpr = BLOCK // GROUP
    lanes, members = tl.arange(0, LANES), tl.arange(0, GROUP)
    if ALIGNED:
        result = (base[:, None] + (lanes * GROUP)[None, :])[:, :, None] + members[None, None, :]
    else:
        result = (base[:, None] + lanes[None, :])[:, None, :] + (members * LANES)[None, :, None]
    return result


@triton.jit
def moved_s(s, shift):
    """s against the maximum that lies ``shift`` above."""
    return s * tl.exp2(shift)


@triton.jit
def moved_w(w, s, shift):
    """w against the maximum that lies ``shift`` above; what becomes impossible adds 0, not 0 * inf."""
    factor = tl.exp2(shift)
    return tl.where(factor == 0.0, 0.0, factor * (w + shift * s))


@triton.jit
def moved_k(k, s, shift, ref_shift):
    """k against maxima that lie ``shift`` and ``ref_shift`` above; what becomes impossible adds 0, not 0 * inf."""
    factor = tl.exp2(shift)
    return tl.where(factor == 0.0, 0.0, factor * (k + (shift - ref_shift) * s))


@triton.jit
def fold(x, m, s, scale, AXIS: tl.constexpr):
    """Adds a tile to the lanes' (m, s): returns the new m and s, the shift between the maxima, and d and 2^d.

    One exp2 per word, and one per lane. The explicit fma keeps the bits of s the same in every variant of a kernel.
    """
    new_m = tl.maximum(m, tl.max(x, AXIS))
    shift = floored((m - new_m) * scale)
    d = (x - tl.expand_dims(new_m, AXIS)) * scale
    e = tl.exp2(d)
    return new_m, tl.fma(s, tl.exp2(shift), tl.sum(e, AXIS)), shift, d, e
