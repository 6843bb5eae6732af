"""Launcher of value_loss in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import token_weights
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.results import VALUE_METRICS, ValueLossResult


def value_loss(inputs: ValueInputs) -> ValueLossResult:
    """The loss of float32 or bfloat16 values of any strides."""
    values, returns, mask, _, cu_seqlens, denominator, _, aggregation = inputs
    if not values.is_contiguous():
        inputs = inputs._replace(values=values.contiguous())
    weights = token_weights(values.shape, mask, cu_seqlens, denominator, aggregation)
    result = ValueLossResult(returns.new_empty(()), returns.new_empty(len(VALUE_METRICS)), torch.empty_like(returns))
    extension.value_loss(inputs, weights, result, torch.get_num_threads())
    return result
