"""Log-probability, entropy and KL of each row: one read of the logits, however many rows there are.

Every row is cut into segments by the vocabulary alone. One program reduces one segment of one row; a second kernel
merges a row's segments in their order. So short batches fill the machine and a row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._triton import tuning
from ppo_fast.ops._triton.device import (
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
    tile_columns,
)


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
    """(m, s[, w][, ref m, ref s, k]) of one segment of one row, in ``partials`` [fields, N * segments].

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
    m, s = tl.full([LANES], LOWEST, tl.float32), tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    if ref_ptr is not None:
        y_ptr = ref_ptr + row_offset(row, T, ref_stride_b, ref_stride_t, ALIGNED)
        ref_m, ref_s = tl.full([LANES], LOWEST, tl.float32), tl.zeros([LANES], tl.float32)
        k = tl.zeros([LANES], tl.float32)
    for start in range(first, stop, BLOCK):
        columns = start + tile_columns(BLOCK, GROUP, ALIGNED)
        x = tl.load(x_ptr + columns, columns < V, other=-float("inf")).to(tl.float32)
        old_s = s
        m, s, shift, d, e = fold(x, m, old_s, scale, AXIS)
        if ENTROPY:
            w = moved_w(w, old_s, shift) + tl.sum(e * floored(d), AXIS)
        if ref_ptr is not None:
            y = tl.load(y_ptr + columns, columns < V, other=-float("inf")).to(tl.float32)
            ref_m, ref_s, ref_shift, ref_d, _ = fold(y, ref_m, ref_s, scale, AXIS)
            k = moved_k(k, old_s, shift, ref_shift) + tl.sum(e * tl.where(e == 0.0, 0.0, d - ref_d), AXIS)

    field = tl.num_programs(0).to(tl.int64)
    out_ptr = partials_ptr + tl.program_id(0)
    top = tl.max(m, 0)
    shift = floored((m - top) * scale)
    tl.store(out_ptr, top)
    tl.store(out_ptr + field, tl.sum(moved_s(s, shift), 0))
    if ENTROPY:
        tl.store(out_ptr + 2 * field, tl.sum(moved_w(w, s, shift), 0))
    if ref_ptr is not None:
        ref_top = tl.max(ref_m, 0)
        ref_shift = floored((ref_m - ref_top) * scale)
        out_ptr += (2 + ENTROPY) * field
        tl.store(out_ptr, ref_top)
        tl.store(out_ptr + field, tl.sum(moved_s(ref_s, ref_shift), 0))
        tl.store(out_ptr + 2 * field, tl.sum(moved_k(k, s, shift, ref_shift), 0))


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
    """Merges the segments of ROWS rows in their order and writes each row's results, 0 where it does not count."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    counted = exists
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + row, exists, other=0) != 0
    segment = tl.arange(0, WIDTH)
    part = counted[:, None] & (segment < SEGMENTS)[None, :]
    field = N.to(tl.int64) * SEGMENTS
    part_ptr = partials_ptr + row[:, None].to(tl.int64) * SEGMENTS + segment[None, :]

    m = tl.load(part_ptr, part, other=LOWEST)
    s = tl.load(part_ptr + field, part, other=0.0)
    top = tl.max(m, 1)
    shift = floored((m - top[:, None]) * scale)
    total = tl.sum(moved_s(s, shift), 1)
    log_total = tl.log2(total)
    lse = top.to(tl.float64) * inv_temperature + (log_total * LN2).to(tl.float64)
    tl.store(lse_ptr + row, tl.where(counted, lse, 0.0), exists)
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, counted, other=0)
        inside = (target >= 0) & (target < V)
        x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, False) + tl.where(inside, target, 0)
        x = tl.load(x_ptr, counted, other=0.0).to(tl.float32)
        logprob = tl.where(inside, tl.fma(x - top, scale, -log_total) * LN2, float("nan"))
        tl.store(logprobs_ptr + row, tl.where(counted, logprob, 0.0), exists)
    if entropy_ptr is not None:
        w = tl.load(part_ptr + 2 * field, part, other=0.0)
        entropy = (log_total - tl.sum(moved_w(w, s, shift), 1) / total) * LN2
        tl.store(entropy_ptr + row, tl.where(counted, entropy, 0.0), exists)
        part_ptr += field
    if kl_ptr is not None:
        ref_m = tl.load(part_ptr + 2 * field, part, other=LOWEST)
        ref_s = tl.load(part_ptr + 3 * field, part, other=0.0)
        k = tl.load(part_ptr + 4 * field, part, other=0.0)
        ref_top = tl.max(ref_m, 1)
        ref_shift = floored((ref_m - ref_top[:, None]) * scale)
        ref_log_total = tl.log2(tl.sum(moved_s(ref_s, ref_shift), 1))
        kl = (tl.sum(moved_k(k, s, shift, ref_shift), 1) / total - log_total + ref_log_total) * LN2
        ref_lse = ref_top.to(tl.float64) * inv_temperature + (ref_log_total * LN2).to(tl.float64)
        tl.store(kl_ptr + row, tl.where(counted, kl, 0.0), exists)
        tl.store(ref_lse_ptr + row, tl.where(counted, ref_lse, 0.0), exists)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these [B, T, V] tensors starts on 16 bytes and V is whole 16-word groups."""
    given = [x for x in tensors if x is not None]
    strides = (n for x in given for n in (*x.stride()[:-1], x.shape[-1]))
    return all(x.data_ptr() % 16 == 0 for x in given) and all(n % 16 == 0 for n in strides)


def group(logits: Tensor, block: int) -> int:
    """Words per lane: a 16-byte access."""
    return min(16 // logits.element_size(), block)


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, KL(pi || ref), lse, ref_lse), each [B, T]; what is not asked for is empty."""
    B, T, V = logits.shape
    tile = tuning.forward_tile(V, logits.device)
    segments = triton.cdiv(V, tile.segment)
    fields = 2 + want_entropy + 3 * (ref_logits is not None)

    def rows(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty((B, T) if wanted else (0,), dtype=dtype)

    has_ref = ref_logits is not None
    logprobs, entropy, kl = rows(targets is not None), rows(want_entropy), rows(has_ref)
    lse, ref_lse = rows(True, torch.float64), rows(has_ref, torch.float64)
    if B * T == 0:
        return logprobs, entropy, kl, lse, ref_lse
    partials = logits.new_empty(fields, B * T * segments, dtype=torch.float32)
    width = triton.next_power_of_2(segments)
    rows_per_program = max(1, tuning.PARTIALS // width)
    with on_device_of(logits):
        segment_kernel[(B * T * segments,)](
            logits,
            ref_logits,
            mask,
            partials,
            T,
            V,
            *logits.stride()[:2],
            *(ref_logits.stride()[:2] if has_ref else (0, 0)),
            LOG2_E / temperature,
            ENTROPY=want_entropy,
            ALIGNED=aligned(logits, ref_logits),
            SEGMENT=tile.segment,
            BLOCK=tile.block,
            GROUP=group(logits, tile.block),
            num_warps=tile.warps,
        )
        merge_kernel[(triton.cdiv(B * T, rows_per_program),)](
            partials,
            logits,
            None if targets is None else targets.contiguous(),
            mask,
            logprobs,
            entropy if want_entropy else None,
            kl if has_ref else None,
            lse,
            ref_lse,
            B * T,
            T,
            V,
            *logits.stride()[:2],
            LOG2_E / temperature,
            1.0 / temperature,
            SEGMENTS=segments,
            WIDTH=width,
            ROWS=rows_per_program,
            enable_fp_fusion=False,
        )
    return logprobs, entropy, kl, lse, ref_lse
