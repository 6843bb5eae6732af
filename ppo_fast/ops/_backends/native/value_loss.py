"""Launcher of value_loss in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import _token_weights, room, set_addresses
from ppo_fast.ops._core.results import VALUE_METRICS


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    old_values: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    clip: float | None,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`ppo_fast.ops._backends.reference.value_loss`. Values are float32 or bfloat16, of any strides."""
    values = values.contiguous()
    weights = _token_weights(values.shape, mask, cu_seqlens, denominator, aggregation)
    loss, metrics, gradient = room(()), room((len(VALUE_METRICS),)), room(values.shape)
    arguments = extension.ValueLossArguments()
    arguments.bfloat16, arguments.rows = values.dtype == torch.bfloat16, values.numel()
    arguments.clip = 0.0 if clip is None else clip
    set_addresses(arguments, values=values, returns=returns, mask=mask, token_weights=weights, denominator=denominator)
    set_addresses(arguments, old_values=None if clip is None else old_values)
    set_addresses(arguments, gradient=gradient, loss=loss, metrics=metrics)
    extension.value_loss(arguments, threads=torch.get_num_threads())
    return loss, metrics, gradient
