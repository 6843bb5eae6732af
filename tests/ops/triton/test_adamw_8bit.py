"""The kernel of AdamW with 8-bit moments against its definition in torch."""

import numpy as np
import pytest
import torch

from ppo_fast.ops._backends.reference import adamw_8bit as reference
from ppo_fast.ops._backends.reference.adamw_8bit import BLOCK, AdamWStep, Moments

BLOCKS = 11  # no multiple of those of a program


def new_moments(device):
    codes = (torch.zeros(BLOCKS * BLOCK, dtype=dtype, device=device) for dtype in (torch.int8, torch.uint8))
    return Moments(*codes, *(torch.zeros(BLOCKS, device=device) for _ in range(2)))


def take_steps(adamw_8bit, dtype, device, keep=()):
    """Weights and moments after four steps by gradients of many sizes, the second block's all 0."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(BLOCKS * BLOCK, generator=generator) * 0.02).to(device, dtype)
    moments = new_moments(device)
    for count in range(1, 5):
        gradient = torch.randn(len(weight), generator=generator).pow(5) * 1e-3
        gradient[BLOCK : 2 * BLOCK] = 0
        scalars = [0.7, 1 - 1e-4, 1e-3 / (1 - 0.9**count), (1 - 0.95**count) ** -0.5, float(count in keep)]
        step = AdamWStep(torch.tensor(scalars, device=device), 0.9, 0.95, 1e-5)
        adamw_8bit(weight, gradient.to(device, dtype), moments, step, 12345 * count)
    return [weight, *moments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [(), (2, 4)])
def test_the_kernel_gives_the_bits_of_the_definition(dtype, keep, monkeypatch):
    from ppo_fast.ops._backends.triton.adamw_8bit import adamw_8bit

    # One of 200 roots by torch on a CPU is not rounded to nearest.
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
    found, expected = (take_steps(f, dtype, "cpu", keep) for f in (adamw_8bit, reference.adamw_8bit))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_rounds_a_few_numbers_otherwise(dtype):
    """Products and sums are contracted and roots are approximate: a code or a bfloat16 may be its neighbor."""
    from ppo_fast.ops._backends.triton.adamw_8bit import adamw_8bit

    found, expected = (take_steps(f, dtype, "cuda") for f in (adamw_8bit, reference.adamw_8bit))
    for mine, other in zip(found, expected, strict=True):
        x, y = mine.float(), other.float()
        near = (x - y).abs() <= 1e-5 * y.abs() + 1e-7
        assert near.float().mean() > 0.99
        assert ((x - y).abs() <= 2**-7 * y.abs() + 1.01).all()
