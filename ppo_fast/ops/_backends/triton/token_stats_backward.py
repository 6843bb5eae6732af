"""The gradient of the logits from per-row upstream gradients: one read, one write, every block on its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import LN2, LOG2_E, on_device_of, row_offset, tiles
from ppo_fast.ops._backends.triton.token_stats import aligned, counted_rows, row_strides
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats


@triton.jit
def upstream(ptr, row, exists, factor):
    """The upstream gradient of rows times ``factor``; 0 where that statistic has none."""
    value = tl.zeros(row.shape, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + row, exists, other=0.0) * factor
    return value


@triton.jit
def load_block(
    ptr,
    start,
    inside,
    whole,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Words of rows from ``start`` on, in float32. With SHIFTED a whole block on 16 bytes takes 16-byte accesses."""
    if SHIFTED:
        if whole & ((tl.max((ptr + start).to(tl.int64), 0) & 15) == 0):
            x = tl.load(tiles(tl.multiple_of(ptr + start, [16]), BLOCK, GROUP, True))
        else:
            x = tl.load(tiles(ptr + start, BLOCK, GROUP, True), inside, other=0.0)
    else:
        x = tl.load(tiles(ptr + start, BLOCK, GROUP, ALIGNED), inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_block(
    ptr,
    offset,
    x,
    inside,
    exists,
    whole,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Writes words of rows from ``offset`` on, as :func:`load_block` reads; with SHIFTED they lie on 16 bytes."""
    if SHIFTED:
        x = x.to(ptr.dtype.element_ty)
        if whole:
            tl.store(tiles(tl.multiple_of(ptr + offset, [16]), BLOCK, GROUP, True), x)
        else:
            tl.store(tiles(ptr + offset, BLOCK, GROUP, True), x, inside)
    else:
        first, written = ptr + offset, inside & exists[:, None, None]
        tl.store(tiles(first, BLOCK, GROUP, ALIGNED), x.to(ptr.dtype.element_ty), written)


@triton.jit
def log2_softmax(x, lse_ptr, row, exists, scale, temperature, inv_temperature):
    """log2 of the probabilities of logits x of rows, given the rows' lse in float64.

    lse is split at the logit ``pivot`` nearest to it, so that an offset common to all logits cancels exactly.
    """
    lse = tl.load(lse_ptr + row, exists, other=0.0)
    pivot = (lse * temperature).to(tl.float32)
    rest = (lse - pivot.to(tl.float64) * inv_temperature).to(tl.float32) * LOG2_E
    return tl.fma(x - pivot[:, None, None], scale, -rest[:, None, None])


@triton.jit(
    do_not_specialize=["N", "T", "stride_b", "stride_t", "ref_stride_b", "ref_stride_t", "out_stride_b", "out_stride_t"]
)
def gradient_kernel(
    out_ptr,
    logits_ptr,
    ref_ptr,
    targets_ptr,
    mask_ptr,
    grad_loss_ptr,
    g_ptr,
    g_entropy_ptr,
    g_kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    entropy_ptr,
    kl_ptr,
    N,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    out_stride_b: tl.int64,
    out_stride_t: tl.int64,
    scale,
    temperature,
    inv_temperature,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """dlogits[j] = (g*[j = target] + p[j]*(a + b*u[j] + c*w[j])) / temperature for one block of ROWS rows.

    With a = -g - gH*H - gK*KL, b = gK - gH, c = -gK, all times the gradient of the loss where one is given; u and w are
    log2, their ln 2 is in b and c. Rows none of which counts and has an upstream gradient are not read and become 0.
    ``out`` may be the logits.
    SHIFTED is for unaligned rows of several blocks, ROWS = 1: the blocks begin on 16 bytes of ``out``, up to GROUP - 1
    words before the row, so that only its first and last block are ragged. Nothing is summed over words here: the bits
    do not depend on where the blocks begin.
    """
    blocks = tl.cdiv(V + GROUP - 1, BLOCK) if SHIFTED else tl.cdiv(V, BLOCK)
    group = tl.program_id(0) // blocks
    start = (tl.program_id(0) - group * blocks) * BLOCK
    row = group * ROWS + tl.arange(0, ROWS)
    exists, active = counted_rows(mask_ptr, row, N)
    factor = 1.0
    if grad_loss_ptr is not None:
        factor = tl.load(grad_loss_ptr)
    g, g_entropy = upstream(g_ptr, row, active, factor), upstream(g_entropy_ptr, row, active, factor)
    g_kl = upstream(g_kl_ptr, row, active, factor)
    active &= (g != 0.0) | (g_entropy != 0.0) | (g_kl != 0.0)
    if SHIFTED:
        first_ptr = out_ptr + row_offset(group, T, out_stride_b, out_stride_t, False)
        start -= (first_ptr.to(tl.int64) & 15).to(tl.int32) // (16 // GROUP)
    whole = (start >= 0) & (start + BLOCK <= V)
    columns = tiles(tl.zeros([ROWS], tl.int32), BLOCK, GROUP, ALIGNED | SHIFTED)
    inside = columns < V - start
    if SHIFTED:
        inside &= columns >= -start
    gradient = tl.zeros(columns.shape, tl.float32)
    if tl.max(active.to(tl.int32), 0) != 0:
        read = inside & active[:, None, None]
        a, b = -g * inv_temperature, (g_kl - g_entropy) * (inv_temperature * LN2)
        x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED)
        x = load_block(x_ptr, start, read, whole, BLOCK, GROUP, ALIGNED, SHIFTED)
        u = log2_softmax(x, lse_ptr, row, exists, scale, temperature, inv_temperature)
        if g_entropy_ptr is not None:
            a -= g_entropy * tl.load(entropy_ptr + row, exists, other=0.0) * inv_temperature
        if ref_ptr is not None:
            a -= g_kl * tl.load(kl_ptr + row, exists, other=0.0) * inv_temperature
            y_ptr = ref_ptr + row_offset(row, T, ref_stride_b, ref_stride_t, ALIGNED)
            y = load_block(y_ptr, start, read, whole, BLOCK, GROUP, ALIGNED, SHIFTED)
            w = log2_softmax(y, ref_lse_ptr, row, exists, scale, temperature, inv_temperature)
            c = g_kl * (inv_temperature * LN2)
            gradient = a[:, None, None] + b[:, None, None] * u - c[:, None, None] * w
        elif g_entropy_ptr is not None:
            gradient = a[:, None, None] + b[:, None, None] * u
        else:
            gradient += a[:, None, None]
        p = tl.exp2(u)
        gradient = tl.where(p == 0.0, 0.0, p * gradient)
        if g_ptr is not None:
            target = tl.load(targets_ptr + row, exists, other=0)
            target = tl.where((target >= 0) & (target < V), target - start, -1).to(tl.int32)
            hit = columns == target[:, None, None]
            gradient = tl.where(hit, gradient + (g * inv_temperature)[:, None, None], gradient)
        gradient = tl.where(active[:, None, None], gradient, 0.0)
    offset = row_offset(row, T, out_stride_b, out_stride_t, ALIGNED) + start
    store_block(out_ptr, offset, gradient, inside, exists, whole, BLOCK, GROUP, ALIGNED, SHIFTED)


def token_stats_backward(
    grads: RowGrads, rows: RowInputs, stats: RowStats, out: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The gradient in the dtype of the logits, in ``out`` (which may be the logits) or a new contiguous tensor.

    A gradient of None in a statistic leaves its term out of the kernel; ``scale`` [] multiplies all.
    """
    logits, targets, ref_logits, mask, temperature = rows
    B, T, V = logits.shape
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if B * T == 0:
        return out
    ref = None if grads.grad_kl is None else ref_logits
    whole_groups = aligned(logits, ref, out)
    size = tuning.backward_tile(logits, whole_groups)
    group = min(tuning.group(logits), size.block)
    shifted = not whole_groups and tuning.whole_tile(logits, whole_groups) is None
    blocks = tuning.cdiv(V + group - 1 if shifted else V, size.block)
    with on_device_of(logits):
        gradient_kernel[(tuning.cdiv(B * T, size.rows) * blocks,)](
            out,
            logits,
            ref,
            None if grads.grad_logprobs is None or targets is None else targets.contiguous(),
            mask,
            scale,
            grads.grad_logprobs,
            grads.grad_entropy,
            grads.grad_kl,
            stats.lse,
            stats.ref_lse,
            stats.entropy,
            stats.kl,
            B * T,
            T,
            V,
            *row_strides(logits),
            *row_strides(ref),
            *row_strides(out),
            LOG2_E.value / temperature,
            temperature,
            1.0 / temperature,
            ALIGNED=whole_groups,
            ROWS=size.rows,
            BLOCK=size.block,
            GROUP=group,
            SHIFTED=shifted,
            num_warps=size.warps,
        )
    return out
