"""Launcher of value_loss in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import as_number, room, token_weights
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.results import VALUE_METRICS, ValueLossResult


def value_loss(inputs: ValueInputs) -> ValueLossResult:
    """The loss of float32 or bfloat16 values of any strides."""
    values, returns, mask, old_values, cu_seqlens, denominator, clip, aggregation = inputs
    values = values.contiguous()
    result = ValueLossResult(room(()), room((len(VALUE_METRICS),)), room(values.shape))
    extension.value_loss(
        values.numel(),
        values.dtype == torch.bfloat16,
        clip or 0.0,
        as_number(denominator),
        threads=torch.get_num_threads(),
        values=values,
        returns=returns,
        mask=mask,
        token_weights=token_weights(values.shape, mask, cu_seqlens, denominator, aggregation),
        old_values=None if clip is None else old_values,
        **result._asdict(),
    )
    return result
