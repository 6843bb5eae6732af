"""Launchers of the C++ kernels of token_stats and its backward.

Logits are [B, T, V] in float32 or bfloat16, of any strides over B and T; everything per token is [B, T] float32,
contiguous except the targets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import extension, load_error
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.registry import Implementation
from ppo_fast.ops._core.results import RowStats, ValueLossResult

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


def set_addresses(arguments: Any, **tensors: Tensor | None) -> None:
    """Hand tensors to the extension by address, 0 for None and for empty ones; they must outlive the launch."""
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr() if tensor is not None and tensor.numel() else 0)


def set_fields(arguments: Any, group: RowGrads | RowStats | ValueLossResult) -> None:
    """:func:`set_addresses` of the fields of a NamedTuple."""
    for name, tensor in zip(group._fields, group, strict=True):
        setattr(arguments, name, tensor.data_ptr() if tensor is not None and tensor.numel() else 0)


def readable(rows: RowInputs) -> RowInputs:
    """Copy float16 and float64 reference logits to float32, which the kernels read."""
    if rows.ref_logits is None or rows.ref_logits.dtype in (torch.float32, torch.bfloat16):
        return rows
    return rows._replace(ref_logits=rows.ref_logits.float())


def room(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate an output of a kernel, whatever dtype and device a process has set as default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def per_row(logits: Tensor, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for one number per row, or for none."""
    return room(logits.shape[:2] if wanted else (0,), dtype)


def _logits_view(x: Tensor | None, streamed: bool = False) -> Any:
    if x is None:
        return extension.LogitsView(0, 0, 0, False, False)
    return extension.LogitsView(x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16, streamed)


def gradient_view(gradient: Tensor | None, logits: Tensor) -> Any:
    """Describe where the gradient goes: nowhere, over the logits, or into a buffer of its own."""
    if gradient is None:
        return _logits_view(None)
    large = gradient.data_ptr() != logits.data_ptr() and gradient.nbytes >= _LARGE
    if large:
        extension.advise_huge_pages(gradient.data_ptr(), gradient.nbytes)
    row_bytes = gradient.shape[2] * gradient.element_size()
    return _logits_view(gradient, streamed=large and (row_bytes >= _PAGE or row_bytes % _LINE == 0))


def stats_room(rows: RowInputs, want_entropy: bool = True, want_kl: bool = False) -> RowStats:
    """Room for the statistics that are asked for; ``want_kl``: a KL without reference logits too."""
    logits, full = rows.logits, rows.ref_logits is not None
    logprobs, entropy = per_row(logits, rows.targets is not None), per_row(logits, want_entropy)
    lse, ref_lse = per_row(logits, dtype=torch.float64), per_row(logits, full, torch.float64)
    return RowStats(logprobs, entropy, per_row(logits, full or want_kl), lse, ref_lse)


def rows_view(rows: RowInputs) -> Any:
    """Describe the inputs of every row kernel by address; the rows must outlive the launch."""
    logits, targets, ref_logits, mask, temperature = rows
    if targets is None:
        targets_view = extension.TargetsView(0, 0, 0, False)
    else:
        targets_view = extension.TargetsView(targets.data_ptr(), *targets.stride(), targets.dtype == torch.int64)
    return extension.Rows(
        logits=_logits_view(logits),
        ref_logits=_logits_view(ref_logits),
        targets=targets_view,
        mask=0 if mask is None else mask.data_ptr(),
        rows=logits.shape[0] * logits.shape[1],
        steps=logits.shape[1],
        vocab=logits.shape[2],
        temperature=temperature,
    )


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
