"""Free leading shapes brought to [B, T] (and [B, T, V]) without copying where strides allow it."""

import math
from typing import overload

import torch
from torch import Tensor

from ppo_fast.ops._core import checks


def grid(shape: torch.Size) -> tuple[int, int]:
    """[..., T] as (B, T); [N] is one row of N tokens, [] one token."""
    if len(shape) == 0:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def as_logits(logits: Tensor) -> Tensor:
    """[..., V] as [B, T, V] with unit stride over V: a view where the leading strides allow it, else one copy."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    shape = logits.shape
    return logits if len(shape) == 3 else logits.reshape(*grid(shape[:-1]), shape[-1])


def as_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """A contiguous tensor in another shape."""
    return x if x.shape == shape else x.view(shape)


def as_grid(x: Tensor, by_address: bool = False) -> Tensor:
    """A per-token tensor in the shape in which a launcher takes it: [B, T].

    One that takes contiguous tensors only by their addresses is spared the views of packed [N] ones.
    """
    dims = x.dim()
    return x if dims == 2 or (dims == 1 and by_address) else x.reshape(grid(x.shape))


@overload
def as_rows(x: Tensor, shape: torch.Size, by_address: bool = False) -> Tensor: ...
@overload
def as_rows(x: None, shape: torch.Size, by_address: bool = False) -> None: ...
def as_rows(x: Tensor | None, shape: torch.Size, by_address: bool = False) -> Tensor | None:
    """A per-token tensor, broadcast to ``shape``, as [B, T] with its own strides where possible. No gradient."""
    if x is None:
        return None
    if x.requires_grad:
        x = x.detach()
    return as_grid(x if x.shape == shape else x.expand(shape), by_address)


def as_floats(x: Tensor | None, shape: torch.Size, dtype: torch.dtype, by_address: bool = False) -> Tensor | None:
    """A per-token tensor as contiguous [B, T] in ``dtype``, without gradient."""
    if x is None:
        return None
    rows = as_rows(x, shape, by_address)
    return (rows if rows.dtype == dtype else rows.to(dtype)).contiguous()


def as_bools(x: Tensor | None, shape: torch.Size, by_address: bool = False) -> Tensor | None:
    """A bool per-token tensor as contiguous [B, T]."""
    return None if x is None else as_rows(x, shape, by_address).contiguous()


def as_scalar(value: float | Tensor | None, like: Tensor) -> float | Tensor | None:
    """Return a tensor on the device of ``like`` in the accumulation dtype, without gradient; a number as a float."""
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=checks.accumulation_dtype(like.dtype))
    return None if value is None else float(value)


def as_tensor(value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """Return what :func:`as_scalar` returned as a 0-d tensor, which the registered ops take."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=checks.accumulation_dtype(like.dtype), device=like.device)
