"""An original and its replacement on the same inputs: values, dtypes and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers times ``scale``."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def floats(result: Any) -> list[Tensor]:
    """The tensors of a result, in order; a number counts as one."""
    if isinstance(result, dict):
        return floats(tuple(result.values()))
    if isinstance(result, tuple):
        return [x for item in result for x in floats(item)]
    return [] if result is None else [torch.as_tensor(result)]


def outcome(function: Callable[..., Any], differentiable: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """The results of ``function(*differentiable, *args, **kwargs)``, then a gradient of each differentiable input.

    The inputs are copied, and handed over as no leaves, as the logits of a model are.
    """
    leaves = [x.clone().requires_grad_() for x in differentiable]
    results = floats(function(*(x * 1 for x in leaves), *args, **kwargs))
    carrying = [x for x in results if x.requires_grad]
    if carrying:
        upstreams = [rows(17 + i, *x.shape, dtype=x.dtype) for i, x in enumerate(carrying)]
        torch.autograd.backward(carrying, upstreams)
    return [x.detach() for x in results] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_agree(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    """The same number of tensors, each of the same dtype and shape, and near."""
    assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
