"""Shared by the launchers of the C++ row kernels.

Logits are [B, T, V] in float32 or bfloat16, of any strides over B and T; everything per token is [B, T] float32 or, of
one packed row, [N]; contiguous except the targets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import load_error
from ppo_fast.ops._core.inputs import RowInputs
from ppo_fast.ops._core.registry import Implementation

# A larger gradient has left the cache before anyone reads it, so it is written past the cache.
_LARGE = 8 << 20


def implementation(run: Callable[..., Any], fuses_backward: bool = False) -> Implementation:
    """A launcher of these kernels as the registry takes it."""
    return Implementation(
        run,
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        unusable=load_error,
        fuses_backward=fuses_backward,
    )


def readable(rows: RowInputs) -> RowInputs:
    """Copy float16 and float64 reference logits to float32, which the kernels read."""
    if rows.ref_logits is None or rows.ref_logits.dtype in (torch.float32, torch.bfloat16):
        return rows
    return rows._replace(ref_logits=rows.ref_logits.float())


def room(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate an output of a kernel, whatever dtype and device a process has set as default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def is_large(gradient: Tensor | None) -> bool:
    """Whether a gradient has left the cache before anyone reads it."""
    return gradient is not None and gradient.nbytes >= _LARGE


def like(x: Tensor, wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate an output of the shape of ``x``, empty where it is not wanted. Takes half as long as :func:`room`."""
    return torch.empty_like(x, dtype=dtype) if wanted else x.new_empty(0, dtype=dtype)


def token_weights(
    shape: torch.Size,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | float | None,
    aggregation: str,
) -> Tensor | None:
    """The weight of each token; None for token-mean, where the kernels weigh all by one number."""
    if aggregation == "token-mean":
        return None
    counted = torch.ones(shape, dtype=torch.bool, device="cpu") if mask is None else mask
    return reference.token_weights(counted, cu_seqlens, denominator, aggregation, torch.float32)
