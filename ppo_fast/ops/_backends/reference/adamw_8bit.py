"""A step of AdamW whose moments are stored in 8 bits, in torch operations.

Each block of 256 numbers x has a scale, the largest |x|. A mean is stored as round(127 sign(x) |x / scale|^(1/4)), a
root mean square, by which the second moment is kept, as round(255 (x / scale)^(1/4)), at least 1 above 0. Numbers near
the scale are then off by 1.6 % and 0.8 % at most, numbers 10,000 times smaller by 16 % and 8 %.

Source: Dettmers et al. 2021, arXiv:2110.02861, for blocks. Fourth roots need no table, and weights end nearer to those
of float32 moments than by the codes of the paper where the gradients of a block differ in size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # moments that share a scale
SMALLEST_SCALE = 1e-30
MEANS, ROOTS = 127, 255  # highest codes
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)  # of lowbias32, a hash of 32 bits; as int32


class AdamWStep(NamedTuple):
    """The numbers of one step."""

    # [5] float32: factor of the gradients, 1 - lr * weight_decay, lr / (1 - beta1^t), (1 - beta2^t)^(-1/2), 1: no step
    scalars: Tensor
    beta1: float
    beta2: float
    eps: float


class Moments(NamedTuple):
    """Mean and root mean square of n gradients: codes with scales, or float32 without."""

    mean: Tensor  # [n] int8, or float32
    root: Tensor  # [n] uint8, or float32
    mean_scale: Tensor | None = None  # [n / 256] float32
    root_scale: Tensor | None = None  # [n / 256] float32


@torch.no_grad()
def adamw_8bit(weight: Tensor, gradient: Tensor, moments: Moments, step: AdamWStep, seed: int, first: int = 0) -> None:
    """Take the step in place, of weight [n] by gradient [n]; nothing changes where the last of the scalars is 1.

    A bfloat16 weight becomes one of the two neighbors of its new value, with the probability that makes it right in the
    mean; other dtypes are rounded to nearest. The noise of a number depends only on `seed`, in [0, 2^31), and its index
    from `first`.
    """
    factor, decay, rate, root_factor, keep = step.scalars.unbind()
    gradient = gradient.float() * factor
    mean = decode(moments.mean, moments.mean_scale, MEANS)
    mean = mean + (gradient - mean) * (1 - step.beta1)
    root = decode(moments.root, moments.root_scale, ROOTS)
    square = root * root
    root = (square + (gradient * gradient - square) * (1 - step.beta2)).sqrt()
    value = weight.float() * decay - mean / (root * root_factor + step.eps) * rate
    if weight.dtype == torch.bfloat16:
        value = rounded(value, noise(first, len(value), seed, value.device))
    new = Moments(mean, root)
    if moments.mean_scale is not None:
        (mean_code, mean_scale), (root_code, root_scale) = encode(mean, MEANS), encode(root, ROOTS)
        new = Moments(mean_code.to(torch.int8), root_code.to(torch.uint8), mean_scale, root_scale)
    for old, changed in zip((weight, *moments), (value.to(weight.dtype), *new), strict=True):
        if old is not None and changed is not None:
            old.copy_(torch.where(keep > 0, old, changed))


def encode(values: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Return the codes [n] int32 of values [n] float32 in -highest..highest, and the scales [n / 256] of the blocks."""
    blocks = values.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1).clamp_min(SMALLEST_SCALE)
    size = (blocks.abs() * (1 / scale)[:, None]).sqrt().sqrt() * highest + 0.5
    code = size.int()  # the nearest: sizes are positive
    code = torch.where(blocks < 0, -code, code)
    if highest == ROOTS:  # a root of 0 would make its step infinite
        code = torch.where(blocks > 0, code.clamp_min(1), code)
    return code.view(-1), scale


def decode(codes: Tensor, scale: Tensor | None, highest: int) -> Tensor:
    """Return the values [n] float32 of codes [n]; without a scale they are the values."""
    if scale is None:
        return codes
    code = codes.float().view(-1, BLOCK)
    square = code * code
    return (torch.where(code < 0, -square, square) * square * (scale * highest**-4)[:, None]).view(-1)


def noise(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return [count] int32, uniform in [0, 2^16): a hash of the seed and the indices from `first`."""
    x = torch.arange(first, first + count, dtype=torch.int64, device=device).int()
    x = (x ^ (x >> 16 & 0xFFFF)) * _MIX[0] + seed
    x = (x ^ (x >> 15 & 0x1FFFF)) * _MIX[1]
    return (x ^ (x >> 16 & 0xFFFF)) & 0xFFFF


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 values [n] to a neighboring bfloat16, unbiased if noise [n] is uniform in [0, 2^16)."""
    # A bfloat16 is the upper half of a float32: the carry of the lower halves is the rounding.
    return (values.view(torch.int32) + noise & -0x10000).view(torch.float32).to(torch.bfloat16)
