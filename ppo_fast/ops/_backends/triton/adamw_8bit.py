"""A step of AdamW with 8-bit moments in one kernel: each number is read and written once.

The formulas are those of :mod:`the reference <ppo_fast.ops._backends.reference.adamw_8bit>`, operation by operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.reference import adamw_8bit as reference
from ppo_fast.ops._backends.triton.device import on_device_of

BLOCK: tl.constexpr = tl.constexpr(reference.BLOCK)
MEANS: tl.constexpr = tl.constexpr(reference.MEANS)
ROOTS: tl.constexpr = tl.constexpr(reference.ROOTS)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(reference.SMALLEST_SCALE)
# Of a program. 4 warps were 5 % faster on an H200, but spill on sm100.
_BLOCKS, _WARPS = 8, 8


@triton.jit
def decode(code, scale, HIGHEST: tl.constexpr):
    """The values of codes [blocks, 256] int8 or uint8."""
    code = code.to(tl.float32)
    square = code * code
    return tl.where(code < 0.0, -square, square) * square * (scale * (HIGHEST**-4))[:, None]


@triton.jit
def encode(values, HIGHEST: tl.constexpr):
    """Codes of |values|, int32, and scales."""
    size = tl.abs(values)
    scale = tl.maximum(tl.max(size, axis=1), SMALLEST_SCALE)
    code = (tl.sqrt(tl.sqrt(size * (1.0 / scale)[:, None])) * HIGHEST + 0.5).to(tl.int32)
    return code, scale


@triton.jit
def noise(index, seed):
    """Uniform in [0, 2^16): a hash of index and seed, uint32."""
    x = index.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D + seed.to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) & 0xFFFF


@triton.jit(do_not_specialize=["seed", "n_blocks"])
def step_kernel(
    weight_ptr,
    gradient_ptr,
    mean_ptr,
    root_ptr,
    mean_scale_ptr,
    root_scale_ptr,
    scalars_ptr,
    grow_mean,
    grow_root,
    eps,
    seed,
    n_blocks,
    BLOCKS: tl.constexpr,
):
    """The step of ``BLOCKS`` blocks."""
    factor, decay, rate = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    root_factor, keep = tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    taken = block < tl.where(keep == 0.0, n_blocks, 0)
    index = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = taken[:, None]

    gradient = tl.load(gradient_ptr + index, mask=inside, other=0.0).to(tl.float32) * factor
    mean_scale = tl.load(mean_scale_ptr + block, mask=taken, other=0.0)
    mean = decode(tl.load(mean_ptr + index, mask=inside, other=0), mean_scale, MEANS)
    mean = mean + (gradient - mean) * grow_mean
    root_scale = tl.load(root_scale_ptr + block, mask=taken, other=0.0)
    root = decode(tl.load(root_ptr + index, mask=inside, other=0), root_scale, ROOTS)
    square = root * root
    root = tl.sqrt(square + (gradient * gradient - square) * grow_root)
    weight = tl.load(weight_ptr + index, mask=inside, other=0.0).to(tl.float32)
    value = weight * decay - mean / (root * root_factor + eps) * rate

    if weight_ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True) + noise(index, seed)
        tl.store(weight_ptr + index, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(weight_ptr + index, value.to(weight_ptr.dtype.element_ty), mask=inside)
    code, scale = encode(mean, MEANS)
    tl.store(mean_ptr + index, tl.where(mean < 0.0, -code, code).to(tl.int8), mask=inside)
    tl.store(mean_scale_ptr + block, scale, mask=taken)
    code, scale = encode(root, ROOTS)
    tl.store(root_ptr + index, tl.where(root > 0.0, tl.maximum(code, 1), code).to(tl.uint8), mask=inside)
    tl.store(root_scale_ptr + block, scale, mask=taken)


@torch.no_grad()
def adamw_8bit(
    weight: Tensor, gradient: Tensor, moments: reference.Moments, step: reference.AdamWStep, seed: int
) -> None:
    """As the reference, for moments with scales; one launch."""
    n_blocks = len(weight) // reference.BLOCK
    with on_device_of(weight):
        step_kernel[(triton.cdiv(n_blocks, _BLOCKS),)](
            weight,
            gradient,
            *moments,
            step.scalars,
            1 - step.beta1,
            1 - step.beta2,
            step.eps,
            seed,
            n_blocks,
            BLOCKS=_BLOCKS,
            num_warps=_WARPS,
        )
