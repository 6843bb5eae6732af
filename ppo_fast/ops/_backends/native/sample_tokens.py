"""Launcher of sample_tokens in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import room, rows_view
from ppo_fast.ops._core.inputs import RowInputs, SampleInputs
from ppo_fast.ops._core.results import SampledTokens


def sample_tokens(inputs: SampleInputs) -> SampledTokens:
    """A token of every row, and its log-probability; a filter takes room for one row per thread."""
    shape = inputs.logits.shape[:2]
    result = SampledTokens(room(shape, torch.int64), room(shape))
    extension.sample_tokens(
        rows_view(RowInputs(inputs.logits, None, None, None, inputs.temperature)),
        inputs.top_k or 0,
        inputs.top_p or 0.0,
        threads=torch.get_num_threads(),
        keys=inputs.keys,
        **result._asdict(),
    )
    return result
