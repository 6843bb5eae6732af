"""A gradient times a number on the device, rounded once: one read and one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import on_device_of


@triton.jit
def scaled_kernel(out_ptr, x_ptr, factor_ptr, N, BLOCK: tl.constexpr):
    """out = x * factor [], in the dtype of out."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(x_ptr + i, i < N, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + i, product.to(out_ptr.dtype.element_ty), i < N)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` for a contiguous x and a factor in float32, in ``dtype``."""
    out = torch.empty_like(x, dtype=dtype)
    if out.numel():
        with on_device_of(out):
            grid = (tuning.cdiv(out.numel(), tuning.ELEMENTS),)
            scaled_kernel[grid](out, x, factor, out.numel(), BLOCK=tuning.ELEMENTS)
    return out
