"""The gradient of the logits from per-row upstream gradients: one read, one write, every block on its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import LN2, LOG2_E, on_device_of, row_offset, tile
from ppo_fast.ops._backends.triton.token_stats import aligned, row_strides
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats


@triton.jit
def upstream(ptr, row):
    """A row's upstream gradient; 0 where that statistic has none."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + row)
    return value


@triton.jit
def log2_softmax(x, lse_ptr, row, scale, temperature, inv_temperature):
    """log2 of the probabilities of logits x, given the row's lse in float64.

    lse is split at the logit ``pivot`` nearest to it, so that an offset common to all logits cancels exactly.
    """
    lse = tl.load(lse_ptr + row)
    pivot = (lse * temperature).to(tl.float32)
    rest = (lse - pivot.to(tl.float64) * inv_temperature).to(tl.float32)
    return tl.fma(x - pivot, scale, -rest * LOG2_E)


@triton.jit(
    do_not_specialize=["T", "stride_b", "stride_t", "ref_stride_b", "ref_stride_t", "out_stride_b", "out_stride_t"]
)
def gradient_kernel(
    out_ptr,
    logits_ptr,
    ref_ptr,
    targets_ptr,
    mask_ptr,
    g_ptr,
    g_entropy_ptr,
    g_kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    entropy_ptr,
    kl_ptr,
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
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dlogits[j] = (g*[j = target] + p[j]*(a + b*u[j] + c*w[j])) / temperature for one block of one row.

    With a = -g - gH*H - gK*KL, b = gK - gH, c = -gK; u and w are log2, their ln 2 is in b and c. A row that does not
    count or has no upstream gradient is not read and becomes 0. ``out`` may be the logits.
    """
    blocks = tl.cdiv(V, BLOCK)
    row = tl.program_id(0) // blocks
    start = (tl.program_id(0) - row * blocks) * BLOCK
    columns = tile(0, BLOCK, GROUP, ALIGNED)
    inside = columns < V - start
    g, g_entropy, g_kl = upstream(g_ptr, row), upstream(g_entropy_ptr, row), upstream(g_kl_ptr, row)
    active = (g != 0.0) | (g_entropy != 0.0) | (g_kl != 0.0)
    if mask_ptr is not None:
        active &= tl.load(mask_ptr + row) != 0
    gradient = tl.zeros(columns.shape, tl.float32)
    if active:
        a, b = -g * inv_temperature, (g_kl - g_entropy) * (inv_temperature * LN2)
        x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED) + start
        x = tl.load(tile(x_ptr, BLOCK, GROUP, ALIGNED), inside, other=0.0).to(tl.float32)
        u = log2_softmax(x, lse_ptr, row, scale, temperature, inv_temperature)
        if g_entropy_ptr is not None:
            a -= g_entropy * tl.load(entropy_ptr + row) * inv_temperature
        if ref_ptr is not None:
            a -= g_kl * tl.load(kl_ptr + row) * inv_temperature
            y_ptr = ref_ptr + row_offset(row, T, ref_stride_b, ref_stride_t, ALIGNED) + start
            y = tl.load(tile(y_ptr, BLOCK, GROUP, ALIGNED), inside, other=0.0).to(tl.float32)
            w = log2_softmax(y, ref_lse_ptr, row, scale, temperature, inv_temperature)
            gradient = a + b * u - g_kl * (inv_temperature * LN2) * w
        elif g_entropy_ptr is not None:
            gradient = a + b * u
        else:
            gradient += a
        p = tl.exp2(u)
        gradient = tl.where(p == 0.0, 0.0, p * gradient)
        if g_ptr is not None:
            target = tl.load(targets_ptr + row)
            target = tl.where((target >= 0) & (target < V), target - start, -1).to(tl.int32)
            gradient = tl.where(columns == target, gradient + g * inv_temperature, gradient)
    out_ptr += row_offset(row, T, out_stride_b, out_stride_t, ALIGNED) + start
    tl.store(tile(out_ptr, BLOCK, GROUP, ALIGNED), gradient.to(out_ptr.dtype.element_ty), inside)


def token_stats_backward(grads: RowGrads, rows: RowInputs, stats: RowStats, out: Tensor | None = None) -> Tensor:
    """The gradient in the dtype of the logits, in ``out`` (which may be the logits) or a new contiguous tensor.

    A gradient of None in a statistic leaves its term out of the kernel.
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
    with on_device_of(logits):
        gradient_kernel[(B * T * triton.cdiv(V, size.block),)](
            out,
            logits,
            ref,
            None if grads.grad_logprobs is None or targets is None else targets.contiguous(),
            mask,
            grads.grad_logprobs,
            grads.grad_entropy,
            grads.grad_kl,
            stats.lse,
            stats.ref_lse,
            stats.entropy,
            stats.kl,
            T,
            V,
            *row_strides(logits),
            *row_strides(ref),
            *row_strides(out),
            LOG2_E.value / temperature,
            temperature,
            1.0 / temperature,
            ALIGNED=whole_groups,
            BLOCK=size.block,
            GROUP=tuning.group(logits),
            num_warps=size.warps,
        )
    return out
