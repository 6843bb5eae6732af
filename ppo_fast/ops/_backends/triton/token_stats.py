"""Log-probability, entropy and KL of each row: one read of the logits, however many rows there are.

Only the vocabulary decides how a row is read. Some thousands of words or fewer are one tile, of which a program takes
several: each is reduced along its own axis. Larger rows are cut into segments. One program reduces one segment of one
row; a second kernel merges a row's segments in their order. So short batches fill the machine and a row's bits do not
depend on the batch.
The partial results are [fields, N, segments] in float32: m, s, w and, with a reference, its m and s, and k (see
:mod:`device <ppo_fast.ops._backends.triton.device>`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import (
    LN2,
    LOG2_E,
    LOWEST,
    floored,
    fold,
    moved_k,
    moved_s,
    moved_w,
    on_device_of,
    row_offset,
    tile,
)
from ppo_fast.ops._core.inputs import RowInputs
from ppo_fast.ops._core.results import RowStats


@triton.jit
def store_segment(out_ptr, m, s, w, ref_m, ref_s, k, scale, ENTROPY: tl.constexpr, REFERENCE: tl.constexpr):
    """Brings the lanes of a program to one maximum and stores their sums."""
    field = tl.num_programs(0).to(tl.int64)
    top = tl.max(m, 0)
    shift = floored((m - top) * scale)
    tl.store(out_ptr, top)
    tl.store(out_ptr + field, tl.sum(moved_s(s, shift), 0))
    if ENTROPY:
        tl.store(out_ptr + 2 * field, tl.sum(moved_w(w, s, shift), 0))
    if REFERENCE:
        ref_top = tl.max(ref_m, 0)
        ref_shift = floored((ref_m - ref_top) * scale)
        tl.store(out_ptr + 3 * field, ref_top)
        tl.store(out_ptr + 4 * field, tl.sum(moved_s(ref_s, ref_shift), 0))
        tl.store(out_ptr + 5 * field, tl.sum(moved_k(k, s, shift, ref_shift), 0))


@triton.jit
def load_words(x_ptr, y_ptr, columns, left, BLOCK: tl.constexpr, GROUP: tl.constexpr, REFERENCE: tl.constexpr):
    """Tiles of an unaligned row with ``left`` words, and of its reference, in float32; -inf after the words.

    They are read word by word. In a whole tile no word is compared with the end of the row, which saves a sixth of the
    instructions of the loop.
    """
    if left >= BLOCK:
        x = tl.load(tile(x_ptr, BLOCK, GROUP, False))
        y = x
        if REFERENCE:
            y = tl.load(tile(y_ptr, BLOCK, GROUP, False))
    else:
        inside = columns < left
        x = tl.load(tile(x_ptr, BLOCK, GROUP, False), inside, other=-float("inf"))
        y = x
        if REFERENCE:
            y = tl.load(tile(y_ptr, BLOCK, GROUP, False), inside, other=-float("inf"))
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit(do_not_specialize=["T", "stride_b", "stride_t", "ref_stride_b", "ref_stride_t"])
def segment_kernel(
    logits_ptr,
    ref_ptr,
    mask_ptr,
    partials_ptr,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    scale,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The partial results of one segment of one row; a row that does not count is not read.

    A lane keeps its own running maximum, so no step waits for another thread; lanes meet once, at the end.
    """
    AXIS: tl.constexpr = 1 if ALIGNED else 0
    LANES: tl.constexpr = BLOCK // GROUP
    segments = tl.cdiv(V, SEGMENT)
    row = tl.program_id(0) // segments
    first = (tl.program_id(0) - row * segments) * SEGMENT
    stop = tl.minimum(first + SEGMENT, V)
    if mask_ptr is not None:
        stop = tl.where(tl.load(mask_ptr + row), stop, first)
    x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED)
    y_ptr = x_ptr
    if ref_ptr is not None:
        y_ptr = ref_ptr + row_offset(row, T, ref_stride_b, ref_stride_t, ALIGNED)
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    w, ref_m, ref_s, k = s, m, s, s
    columns = tile(0, BLOCK, GROUP, ALIGNED)
    for start in range(first, stop, BLOCK):
        if ALIGNED:
            inside = columns < V - start
            x = tl.load(tile(x_ptr + start, BLOCK, GROUP, ALIGNED), inside, other=-float("inf")).to(tl.float32)
        else:
            x, y = load_words(x_ptr + start, y_ptr + start, columns, V - start, BLOCK, GROUP, ref_ptr is not None)
        old_s = s
        m, s, shift, d, e = fold(x, m, old_s, scale, AXIS)
        if ENTROPY:
            w = moved_w(w, old_s, shift) + tl.sum(e * floored(d), AXIS)
        if ref_ptr is not None:
            if ALIGNED:
                y = tl.load(tile(y_ptr + start, BLOCK, GROUP, ALIGNED), inside, other=-float("inf")).to(tl.float32)
            ref_m, ref_s, ref_shift, ref_d, _ = fold(y, ref_m, ref_s, scale, AXIS)
            k = moved_k(k, old_s, shift, ref_shift) + tl.sum(e * tl.where(e == 0.0, 0.0, d - ref_d), AXIS)
    store_segment(partials_ptr + tl.program_id(0), m, s, w, ref_m, ref_s, k, scale, ENTROPY, ref_ptr is not None)


@triton.jit
def merged(part_ptr, field, part, scale):
    """(max, sum, the segments' s, their shifts to the max) of rows, from the fields m and s."""
    m = tl.load(part_ptr, part, other=LOWEST)
    s = tl.load(part_ptr + field, part, other=0.0)
    top = tl.max(m, 1)
    shift = floored((m - top[:, None]) * scale)
    return top, tl.sum(moved_s(s, shift), 1), s, shift


@triton.jit
def merged_rows(
    partials_ptr,
    row,
    counted,
    N,
    scale,
    ENTROPY: tl.constexpr,
    REFERENCE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(m, s, w, m and s of the reference, k) of rows, from their segments; WIDTH >= SEGMENTS."""
    segment = tl.arange(0, WIDTH)[None, :]
    part = counted[:, None] & (segment < SEGMENTS)
    part_ptr = partials_ptr + row[:, None].to(tl.int64) * SEGMENTS + segment
    field = N.to(tl.int64) * SEGMENTS
    top, total, s, shift = merged(part_ptr, field, part, scale)
    w, ref_top, ref_total, k = total, top, total, total
    if ENTROPY:
        w = tl.sum(moved_w(tl.load(part_ptr + 2 * field, part, other=0.0), s, shift), 1)
    if REFERENCE:
        ref_top, ref_total, _, ref_shift = merged(part_ptr + 3 * field, field, part, scale)
        k = tl.sum(moved_k(tl.load(part_ptr + 5 * field, part, other=0.0), s, shift, ref_shift), 1)
    return top, total, w, ref_top, ref_total, k


@triton.jit
def whole(
    logits_ptr,
    ref_ptr,
    row,
    counted,
    T,
    V,
    stride_b,
    stride_t,
    ref_stride_b,
    ref_stride_t,
    scale,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of rows of BLOCK words or fewer, from the logits; a row that does not count is not read."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = counted[:, None] & (column < V)
    x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED)[:, None] + column
    x = tl.load(x_ptr, inside, other=-float("inf")).to(tl.float32)
    top = tl.maximum(tl.max(x, 1), LOWEST)
    d = (x - top[:, None]) * scale
    e = tl.exp2(d)
    total = tl.sum(e, 1)
    w, ref_top, ref_total, k = total, top, total, total
    if ENTROPY:
        w = tl.sum(e * floored(d), 1)
    if ref_ptr is not None:
        y_ptr = ref_ptr + row_offset(row, T, ref_stride_b, ref_stride_t, ALIGNED)[:, None] + column
        y = tl.load(y_ptr, inside, other=-float("inf")).to(tl.float32)
        ref_top = tl.maximum(tl.max(y, 1), LOWEST)
        ref_d = (y - ref_top[:, None]) * scale
        ref_total = tl.sum(tl.exp2(ref_d), 1)
        k = tl.sum(e * tl.where(e == 0.0, 0.0, d - ref_d), 1)
    return top, total, w, ref_top, ref_total, k


@triton.jit
def store_row(ptr, row, value, counted, exists):
    """A result of each row, 0 where it does not count."""
    tl.store(ptr + row, tl.where(counted, value, 0.0), exists)


@triton.jit
def results(
    sums,
    logits_ptr,
    targets_ptr,
    logprobs_ptr,
    entropy_ptr,
    kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    row,
    counted,
    exists,
    T,
    V,
    stride_b,
    stride_t,
    inv_temperature,
):
    """Writes what the rows' pointers ask for; returns the log-probability, entropy and KL, each 0 where not asked."""
    top, total, w, ref_top, ref_total, k = sums
    log_sum = tl.log2(total)
    logprob, entropy, kl = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
    lse = top.to(tl.float64) * inv_temperature + (log_sum * LN2).to(tl.float64)
    store_row(lse_ptr, row, lse, counted, exists)
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, counted, other=0)
        inside = (target >= 0) & (target < V)
        x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, False) + tl.where(inside, target, 0)
        x = tl.load(x_ptr, counted, other=0.0).to(tl.float32)
        # Halved, since a difference of two float32 may overflow; not in base 2, which would overflow sooner.
        logprob = tl.fma(x * 0.5 - top * 0.5, 2.0 * inv_temperature, -log_sum * LN2)
        logprob = tl.where(inside, logprob, float("nan"))
        store_row(logprobs_ptr, row, logprob, counted, exists)
    if entropy_ptr is not None:
        entropy = (log_sum - w / total) * LN2
        store_row(entropy_ptr, row, entropy, counted, exists)
    if kl_ptr is not None:
        ref_log_sum = tl.log2(ref_total)
        kl = (k / total - log_sum + ref_log_sum) * LN2
        store_row(kl_ptr, row, kl, counted, exists)
        ref_lse = ref_top.to(tl.float64) * inv_temperature + (ref_log_sum * LN2).to(tl.float64)
        store_row(ref_lse_ptr, row, ref_lse, counted, exists)
    return logprob, entropy, kl


@triton.jit
def counted_rows(mask_ptr, row, N):
    """(whether each row exists, whether it counts)."""
    exists = row < N
    counted = exists
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + row, exists, other=0) != 0
    return exists, counted


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t", "ref_stride_b", "ref_stride_t"])
def rows_kernel(
    partials_ptr,
    logits_ptr,
    ref_ptr,
    targets_ptr,
    mask_ptr,
    logprobs_ptr,
    entropy_ptr,
    kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    N,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    scale,
    inv_temperature,
    ALIGNED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The statistics of ROWS rows: of SEGMENTS partial results each, or of their logits, WIDTH words or fewer."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists, counted = counted_rows(mask_ptr, row, N)
    ENTROPY: tl.constexpr = entropy_ptr is not None
    REFERENCE: tl.constexpr = kl_ptr is not None
    if partials_ptr is not None:
        sums = merged_rows(partials_ptr, row, counted, N, scale, ENTROPY, REFERENCE, SEGMENTS, WIDTH)
    else:
        sums = whole(
            logits_ptr,
            ref_ptr,
            row,
            counted,
            T,
            V,
            stride_b,
            stride_t,
            ref_stride_b,
            ref_stride_t,
            scale,
            ENTROPY,
            ALIGNED,
            WIDTH,
        )
    results(
        sums,
        logits_ptr,
        targets_ptr,
        logprobs_ptr,
        entropy_ptr,
        kl_ptr,
        lse_ptr,
        ref_lse_ptr,
        row,
        counted,
        exists,
        T,
        V,
        stride_b,
        stride_t,
        inv_temperature,
    )


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these [B, T, V] tensors starts on 16 bytes and V is whole 16-word groups."""
    for x in tensors:
        if x is not None:
            stride_b, stride_t, _ = x.stride()
            if (x.data_ptr() | stride_b | stride_t | x.shape[-1]) % 16 != 0:
                return False
    return True


def row_strides(x: Tensor | None) -> tuple[int, ...]:
    """The strides of B and T; any, where there is no tensor."""
    return (0, 0) if x is None else x.stride()[:2]


def segments(rows: RowInputs, want_entropy: bool) -> Tensor:
    """The partial results [fields, N, segments]."""
    logits, _, ref_logits, mask, temperature = rows
    B, T, V = logits.shape
    whole_groups = aligned(logits, ref_logits)
    size = tuning.forward_tile(logits, whole_groups, ref_logits is not None)
    fields, count = 3 if ref_logits is None else 6, tuning.cdiv(V, size.segment)
    partials = logits.new_empty(fields, B * T, count, dtype=torch.float32)
    segment_kernel[(B * T * count,)](
        logits,
        ref_logits,
        mask,
        partials,
        T,
        V,
        *row_strides(logits),
        *row_strides(ref_logits),
        LOG2_E.value / temperature,
        ENTROPY=want_entropy,
        ALIGNED=whole_groups,
        SEGMENT=size.segment,
        BLOCK=size.block,
        GROUP=tuning.group(logits),
        num_warps=size.warps,
    )
    return partials


def stats_room(rows: RowInputs, want_entropy: bool) -> RowStats:
    """Room for the statistics that are asked for."""
    logits, has_ref = rows.logits, rows.ref_logits is not None
    shape, wide = logits.shape[:2], torch.float64

    def room(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(shape if wanted else (0,), dtype=dtype)

    return RowStats(
        room(rows.targets is not None), room(want_entropy), room(has_ref), room(True, wide), room(has_ref, wide)
    )


def row_arguments(rows: RowInputs, stats: RowStats) -> tuple[Any, ...]:
    """The arguments of a kernel that makes statistics, from the logits to the factors of the temperature."""
    logits, targets, ref_logits, mask, temperature = rows
    B, T, V = logits.shape
    return (
        logits,
        ref_logits,
        None if targets is None else targets.contiguous(),
        mask,
        stats.logprobs,
        stats.entropy if stats.entropy.numel() else None,
        stats.kl if ref_logits is not None else None,
        stats.lse,
        stats.ref_lse,
        B * T,
        T,
        V,
        *row_strides(logits),
        *row_strides(ref_logits),
        LOG2_E.value / temperature,
        1.0 / temperature,
    )


def merging(partials: Tensor) -> dict[str, int]:
    """The constants of a kernel that merges these segments."""
    count = partials.shape[2]
    width = tuning.next_power_of_2(count)
    return {"SEGMENTS": count, "WIDTH": width, "ROWS": max(1, tuning.PARTIALS // width)}


def token_stats(rows: RowInputs, want_entropy: bool) -> RowStats:
    """The statistics of every row."""
    logits = rows.logits
    N, stats, whole_groups = logits.shape[:2].numel(), stats_room(rows, want_entropy), aligned(logits, rows.ref_logits)
    size = tuning.whole_tile(logits, whole_groups)
    if N == 0:
        return stats
    with on_device_of(logits):
        if size is None:
            partials = segments(rows, want_entropy)
            constants = merging(partials) | {"ALIGNED": False}
        else:
            partials = None
            constants = {"SEGMENTS": 1, "WIDTH": size.block, "ROWS": size.rows, "num_warps": size.warps}
            constants["ALIGNED"] = whole_groups
        grid = (tuning.cdiv(N, constants["ROWS"]),)
        rows_kernel[grid](partials, *row_arguments(rows, stats), **constants, enable_fp_fusion=False)
    return stats
