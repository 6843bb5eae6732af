"""Log-probability, entropy and KL of each row: one read of the logits, however many rows there are.

Only the vocabulary decides how a row is cut into segments. One program reduces one segment of one row; a second kernel
merges a row's segments in their order. So short batches fill the machine and a row's bits do not depend on the batch.
The partial results are [fields, N, segments] in float32: m, s, w and, with a reference, its m and s, and k (see
:mod:`device <ppo_fast.ops._backends.triton.device>`).
"""

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
        inside = columns < V - start
        x = tl.load(tile(x_ptr + start, BLOCK, GROUP, ALIGNED), inside, other=-float("inf")).to(tl.float32)
        old_s = s
        m, s, shift, d, e = fold(x, m, old_s, scale, AXIS)
        if ENTROPY:
            w = moved_w(w, old_s, shift) + tl.sum(e * floored(d), AXIS)
        if ref_ptr is not None:
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
def store_row(ptr, row, value, counted, exists):
    """A result of each row, 0 where it does not count."""
    tl.store(ptr + row, tl.where(counted, value, 0.0), exists)


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t"])
def merge_kernel(
    partials_ptr,
    logits_ptr,
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
    scale,
    inv_temperature,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the segments of ROWS rows and writes what the rows' pointers ask for; WIDTH >= SEGMENTS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    counted = exists
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + row, exists, other=0) != 0
    segment = tl.arange(0, WIDTH)[None, :]
    part = counted[:, None] & (segment < SEGMENTS)
    part_ptr = partials_ptr + row[:, None].to(tl.int64) * SEGMENTS + segment
    field = N.to(tl.int64) * SEGMENTS

    top, total, s, shift = merged(part_ptr, field, part, scale)
    log_sum = tl.log2(total)
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
        w = tl.load(part_ptr + 2 * field, part, other=0.0)
        mean_d = tl.sum(moved_w(w, s, shift), 1) / total
        store_row(entropy_ptr, row, (log_sum - mean_d) * LN2, counted, exists)
    if kl_ptr is not None:
        ref_top, ref_total, _, ref_shift = merged(part_ptr + 3 * field, field, part, scale)
        ref_log_sum = tl.log2(ref_total)
        k = tl.load(part_ptr + 5 * field, part, other=0.0)
        mean_gap = tl.sum(moved_k(k, s, shift, ref_shift), 1) / total
        store_row(kl_ptr, row, (mean_gap - log_sum + ref_log_sum) * LN2, counted, exists)
        ref_lse = ref_top.to(tl.float64) * inv_temperature + (ref_log_sum * LN2).to(tl.float64)
        store_row(ref_lse_ptr, row, ref_lse, counted, exists)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these [B, T, V] tensors starts on 16 bytes and V is whole 16-word groups."""
    given = [x for x in tensors if x is not None]
    strides = (n for x in given for n in (*x.stride()[:-1], x.shape[-1]))
    return all(x.data_ptr() % 16 == 0 for x in given) and all(n % 16 == 0 for n in strides)


def row_strides(x: Tensor | None) -> tuple[int, ...]:
    """The strides of B and T; any, where there is no tensor."""
    return (0, 0) if x is None else x.stride()[:2]


def _partials(rows: RowInputs, want_entropy: bool) -> Tensor:
    """The partial results [fields, N, segments]."""
    logits, _, ref_logits, mask, temperature = rows
    B, T, V = logits.shape
    whole_groups = aligned(logits, ref_logits)
    size = tuning.forward_tile(logits, whole_groups)
    fields, segments = 3 if ref_logits is None else 6, triton.cdiv(V, size.segment)
    partials = logits.new_empty(fields, B * T, segments, dtype=torch.float32)
    segment_kernel[(B * T * segments,)](
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


def token_stats(rows: RowInputs, want_entropy: bool) -> RowStats:
    """The statistics of every row."""
    logits, targets, ref_logits, mask, temperature = rows
    B, T, V = logits.shape

    def room(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty((B, T) if wanted else (0,), dtype=dtype)

    has_ref = ref_logits is not None
    stats = RowStats(
        room(targets is not None),
        room(want_entropy),
        room(has_ref),
        room(True, torch.float64),
        room(has_ref, torch.float64),
    )
    if B * T == 0:
        return stats
    with on_device_of(logits):
        partials = _partials(rows, want_entropy)
        segments = partials.shape[2]
        width = triton.next_power_of_2(segments)
        rows_per_program = max(1, tuning.PARTIALS // width)
        merge_kernel[(triton.cdiv(B * T, rows_per_program),)](
            partials,
            logits,
            None if targets is None else targets.contiguous(),
            mask,
            stats.logprobs,
            stats.entropy if want_entropy else None,
            stats.kl if has_ref else None,
            stats.lse,
            stats.ref_lse,
            B * T,
            T,
            V,
            *row_strides(logits),
            LOG2_E.value / temperature,
            1.0 / temperature,
            SEGMENTS=segments,
            WIDTH=width,
            ROWS=rows_per_program,
            enable_fp_fusion=False,
        )
    return stats
