"""Launcher of sample_tokens in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import room
from ppo_fast.ops._core.inputs import SampleInputs
from ppo_fast.ops._core.results import SampledTokens


def sample_tokens(inputs: SampleInputs) -> SampledTokens:
    """A token of every row, and its log-probability; a filter takes room for one row per thread."""
    shape = inputs.logits.shape[:2]
    result = SampledTokens(room(shape, torch.int64), room(shape))
    extension.sample_tokens(inputs, result, torch.get_num_threads())
    return result
