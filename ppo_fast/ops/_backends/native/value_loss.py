"""Launcher of value_loss in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import room, set_addresses, set_fields, token_weights
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.layout import as_tensor
from ppo_fast.ops._core.results import VALUE_METRICS, ValueLossResult


def value_loss(inputs: ValueInputs) -> ValueLossResult:
    """The loss of float32 or bfloat16 values of any strides."""
    values, mask, clip = inputs.values.contiguous(), inputs.mask, inputs.clip
    denominator = as_tensor(inputs.denominator, inputs.returns)
    weights = token_weights(values.shape, mask, inputs.cu_seqlens, denominator, inputs.aggregation)
    result = ValueLossResult(room(()), room((len(VALUE_METRICS),)), room(values.shape))
    arguments = extension.ValueLossArguments()
    arguments.bfloat16, arguments.rows = values.dtype == torch.bfloat16, values.numel()
    arguments.clip = 0.0 if clip is None else clip
    set_addresses(arguments, values=values, returns=inputs.returns, mask=mask, token_weights=weights)
    set_addresses(arguments, denominator=denominator, old_values=None if clip is None else inputs.old_values)
    set_fields(arguments, result)
    extension.value_loss(arguments, threads=torch.get_num_threads())
    return result
