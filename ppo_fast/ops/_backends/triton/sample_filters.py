"""The smallest logit of each row that top-k and top-p keep, found four bits at a time by several programs a row.

A logit's image is an integer in the order of the logits. One launch measures the words above each of 16 images, in one
segment of one row a program. The programs of the next launch add up what the segments of their row have found, which
fixes four bits of the image, and measure 16 images that differ in the next four. As in ``token_stats`` the segments
depend on the vocabulary only, so a row's result does not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import LOG2_E, LOWEST, floored, moved_s, row_offset
from ppo_fast.ops._backends.triton.token_stats import merged, row_strides
from ppo_fast.ops._core.inputs import SampleInputs

# Upper bits of a float32 that are not 0 when its source has this dtype; float16: 9 and 10 of the mantissa, rounded up.
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 20}


@triton.jit
def ordered(x, BITS: tl.constexpr):
    """Unsigned integers of BITS bits that are ordered as the float32 x."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000) >> (32 - BITS)


@triton.jit
def from_ordered(image, BITS: tl.constexpr):
    """The float32 of the integer; the bits that its dtype cannot set are 0."""
    bits = image << (32 - BITS)
    flipped = ((bits ^ 0xFFFFFFFF) >> (32 - BITS)) << (32 - BITS)
    return tl.where(bits >> 31 != 0, bits & 0x7FFFFFFF, flipped).to(tl.float32, bitcast=True)


@triton.jit
def load_image(images_ptr, row):
    """The image of a row, which is kept in the bits of an int32."""
    return tl.load(images_ptr + row).to(tl.uint32, bitcast=True)


@triton.jit
def row_sums(sums_ptr, row, N, scale, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """(max, sum), each [1], of the words that top-k keeps, from ``sums`` [2, N, SEGMENTS]."""
    segment = tl.arange(0, WIDTH)[None, :]
    field = N.to(tl.int64) * SEGMENTS
    top, total, _, _ = merged(sums_ptr + row.to(tl.int64) * SEGMENTS + segment, field, segment < SEGMENTS, scale)
    return top, total


@triton.jit
def refined(images_ptr, measures_ptr, row, limit, unit, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """The image of a row plus as many units as there are pivots with at least ``limit`` above them.

    ``measures``: [N, SEGMENTS, 16], the words above each pivot by segment.
    """
    segment, pivot = tl.arange(0, WIDTH)[:, None], tl.arange(0, 16)[None, :]
    measures_ptr += (row.to(tl.int64) * SEGMENTS + segment) * 16 + pivot
    above = tl.sum(tl.load(measures_ptr, segment < SEGMENTS, other=0.0), 0)
    return load_image(images_ptr, row) + tl.sum((above >= limit).to(tl.uint32), 0) * unit


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t"])
def sums_kernel(
    logits_ptr,
    least_ptr,
    sums_ptr,
    N,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    scale,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(max, sum of exponentials) of a segment's words, from the image ``least`` of their row on if it is given."""
    row = tl.program_id(0) // SEGMENTS
    first = (tl.program_id(0) - row * SEGMENTS) * SEGMENT
    x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED)
    columns = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    if least_ptr is not None:
        least = load_image(least_ptr, row)
    for start in range(first, tl.minimum(first + SEGMENT, V), BLOCK):
        x = tl.load(x_ptr + start + columns, columns < V - start, other=-float("inf")).to(tl.float32)
        new_m = tl.maximum(m, x)
        e = tl.exp2((x - new_m) * scale)
        if least_ptr is not None:
            e = tl.where(ordered(x, BITS) >= least, e, 0.0)
        s = tl.fma(s, tl.exp2(floored((m - new_m) * scale)), e)
        m = new_m
    top = tl.max(m, 0)
    tl.store(sums_ptr + tl.program_id(0), top)
    total = tl.sum(moved_s(s, floored((m - top) * scale)), 0)
    tl.store(sums_ptr + N.to(tl.int64) * SEGMENTS + tl.program_id(0), total)


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t", "unit"])
def measure_kernel(
    logits_ptr,
    sums_ptr,
    last_images_ptr,
    last_measures_ptr,
    images_ptr,
    measures_ptr,
    N,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    scale,
    limit,
    unit,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The words of a segment above each pivot image + i*unit + unit - 1, i < 16: their number, or p with ``sums``.

    The image of the row follows from what the last launch has measured, with pivots 16*unit apart; None: it is 0.
    ``limit`` is a number of words, or a share of p. Numbers are exact up to 2^24 words.
    """
    row = tl.program_id(0) // SEGMENTS
    first = (tl.program_id(0) - row * SEGMENTS) * SEGMENT
    top = tl.zeros([1], tl.float32)
    if sums_ptr is not None:
        top, total = row_sums(sums_ptr, row, N, scale, SEGMENTS, WIDTH)
        limit *= total
    unit = unit.to(tl.uint32)
    image = unit * 0
    if last_images_ptr is not None:
        image = refined(last_images_ptr, last_measures_ptr, row, limit, unit * 16, SEGMENTS, WIDTH)
    tl.store(images_ptr + row, image.to(tl.int32, bitcast=True), first == 0)
    columns, digits = tl.arange(0, BLOCK)[None, :], tl.arange(0, 16).to(tl.uint32)[:, None]
    pivots = image + digits * unit + (unit - 1)
    x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED)
    measure = tl.zeros([16, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + SEGMENT, V), BLOCK):
        x = tl.load(x_ptr + start + columns, columns < V - start, other=-float("inf")).to(tl.float32)
        weight = tl.full([1, BLOCK], 1.0, tl.float32)
        if sums_ptr is not None:
            weight = tl.exp2((x - top[:, None]) * scale)
        measure += tl.where(ordered(x, BITS) > pivots, weight, 0.0)
    tl.store(measures_ptr + tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16), tl.sum(measure, 1))


@triton.jit(do_not_specialize=["N"])
def smallest_kernel(
    sums_ptr,
    least_ptr,
    last_images_ptr,
    last_measures_ptr,
    images_ptr,
    smallest_ptr,
    N,
    scale,
    limit,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The image of a row with its last four bits, or ``least`` where that is larger, and its logit."""
    row = tl.program_id(0)
    if sums_ptr is not None:
        limit *= row_sums(sums_ptr, row, N, scale, SEGMENTS, WIDTH)[1]
    image = refined(last_images_ptr, last_measures_ptr, row, limit, 1, SEGMENTS, WIDTH)
    if least_ptr is not None:
        image = tl.maximum(image, load_image(least_ptr, row))
    tl.store(images_ptr + row, image.to(tl.int32, bitcast=True))
    tl.store(smallest_ptr + row, from_ordered(image, BITS))


class _Search:
    """Launches the search for the smallest logit [N] that a filter keeps; the vocabulary decides how a row is split."""

    def __init__(self, inputs: SampleInputs, whole_groups: bool) -> None:
        self.logits, self.scale = inputs.logits, LOG2_E.value / inputs.temperature
        B, T, V = self.logits.shape
        size, self.bits = tuning.filter_tile(V), _BITS[self.logits.dtype]
        self.N, self.segments = B * T, tuning.cdiv(V, size.segment)
        self.grid, self.width = (self.N * self.segments,), tuning.next_power_of_2(self.segments)
        self.shape = (self.N, T, V, *row_strides(self.logits), self.scale)
        self.constants = {"BITS": self.bits, "ALIGNED": whole_groups, "SEGMENT": size.segment}
        self.constants |= {"SEGMENTS": self.segments, "BLOCK": size.block, "num_warps": size.warps}

    def sums(self, least: Tensor | None) -> Tensor:
        """Return (max, sum of exponentials) [2, N, segments] of the words from the images ``least`` on."""
        sums = self.logits.new_empty(2, self.N, self.segments, dtype=torch.float32)
        sums_kernel[self.grid](self.logits, least, sums, *self.shape, **self.constants)
        return sums

    def smallest(self, limit: float, sums: Tensor | None, least: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (image, logit) of the smallest logit with less than ``limit`` above it, from ``least`` on."""
        new = self.logits.new_empty
        last: tuple[Tensor | None, Tensor | None] = (None, None)
        for place in range(self.bits - 4, -1, -4):
            found = new(self.N, dtype=torch.int32), new(self.N, self.segments, 16, dtype=torch.float32)
            arguments = (self.logits, sums, *last, *found, *self.shape, limit, 1 << place)
            measure_kernel[self.grid](*arguments, WIDTH=self.width, **self.constants)
            last = found
        result = new(self.N, dtype=torch.int32), new(self.N, dtype=torch.float32)
        arguments = (sums, least, *last, *result, self.N, self.scale, limit, self.bits, self.segments, self.width)
        smallest_kernel[(self.N,)](*arguments, num_warps=1)
        return result


def smallest_kept(inputs: SampleInputs, whole_groups: bool) -> Tensor | None:
    """The smallest logit [N] of each row that the filters keep; None without a filter."""
    if inputs.top_k is None and inputs.top_p is None:
        return None
    least: Tensor | None = None
    search = _Search(inputs, whole_groups)
    if inputs.top_k is not None:
        least, smallest = search.smallest(float(inputs.top_k), None, None)
    if inputs.top_p is not None:
        _, smallest = search.smallest(inputs.top_p, search.sums(least), least)
    return smallest
