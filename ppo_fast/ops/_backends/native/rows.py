"""Shared by the launchers of the C++ row kernels.

Logits are [B, T, V] in float32 or bfloat16, of any strides over B and T; everything per token is [B, T] float32 or, of
one packed row, [N]; contiguous except the targets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import extension, load_error
from ppo_fast.ops._core.inputs import RowInputs
from ppo_fast.ops._core.registry import Implementation
from ppo_fast.ops._core.results import RowStats

# A larger gradient has left the cache before anyone reads it, so it is written past the cache. But only in whole
# lines, of which short rows of an odd size have few.
_LARGE = 8 << 20
_LINE, _PAGE = 64, 4096


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


def _logits_view(x: Tensor, streamed: bool = False) -> Any:
    stride_b, stride_t, _ = x.stride()
    return extension.LogitsView(x.data_ptr(), stride_b, stride_t, x.dtype == torch.bfloat16, streamed)


def gradient_view(gradient: Tensor | None, logits: Tensor) -> Any:
    """Describe where the gradient goes: nowhere, over the logits, or into a buffer of its own."""
    if gradient is None:
        return None
    large = gradient.data_ptr() != logits.data_ptr() and gradient.nbytes >= _LARGE
    if large:
        extension.advise_huge_pages(gradient.data_ptr(), gradient.nbytes)
    row_bytes = gradient.shape[2] * gradient.element_size()
    return _logits_view(gradient, streamed=large and (row_bytes >= _PAGE or row_bytes % _LINE == 0))


def stats_room(
    rows: RowInputs, want_entropy: bool = True, want_kl: bool = False, shape: Sequence[int] | None = None
) -> RowStats:
    """Room for the statistics that are asked for; ``want_kl``: a KL without reference logits too."""
    full = rows.ref_logits is not None
    lse = room(rows.logits.shape[:2] if shape is None else shape, torch.float64)

    def like_lse(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:  # takes half as long as ``room``
        return torch.empty_like(lse, dtype=dtype) if wanted else lse.new_empty(0, dtype=dtype)

    return RowStats(
        like_lse(rows.targets is not None),
        like_lse(want_entropy),
        like_lse(full or want_kl),
        lse,
        like_lse(full, torch.float64),
    )


def rows_view(rows: RowInputs) -> Any:
    """Describe the inputs of every row kernel by address; the rows must outlive the launch."""
    logits, targets, ref_logits, mask, temperature = rows
    B, T, V = logits.shape
    view = None
    if targets is not None:
        stride_t = targets.stride(-1)
        stride_b = targets.stride(0) if targets.dim() == 2 else T * stride_t
        view = extension.TargetsView(targets.data_ptr(), stride_b, stride_t, targets.dtype == torch.int64)
    return extension.Rows(
        logits=_logits_view(logits),
        ref_logits=None if ref_logits is None else _logits_view(ref_logits),
        targets=view,
        mask=mask,
        rows=B * T,
        steps=T,
        vocab=V,
        temperature=temperature,
    )


def as_number(x: Tensor | float | None) -> float | None:
    """A number that may have come in a 0-d tensor."""
    return x.item() if isinstance(x, Tensor) else x


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
