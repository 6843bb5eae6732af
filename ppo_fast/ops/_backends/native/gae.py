"""Launcher of GAE in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._core.inputs import GaeInputs
from ppo_fast.ops._core.results import GaeResult


def gae(inputs: GaeInputs) -> GaeResult:
    """Advantages and returns, of inputs of any strides."""
    rewards, values, bootstrap = inputs.rewards, inputs.values, inputs.bootstrap
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    if rewards.dtype != dtype or values.dtype != dtype:
        inputs = inputs._replace(rewards=rewards.to(dtype), values=values.to(dtype))
    if bootstrap is not None:
        inputs = inputs._replace(bootstrap=bootstrap.to(dtype).contiguous())
    contiguous = torch.contiguous_format
    results = GaeResult(
        torch.empty_like(rewards, dtype=dtype, memory_format=contiguous),
        torch.empty_like(rewards, dtype=dtype, memory_format=contiguous),
    )
    extension.gae_cpu(inputs, results, torch.get_num_threads())
    return results
