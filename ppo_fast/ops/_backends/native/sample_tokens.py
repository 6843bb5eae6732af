"""Launcher of sample_tokens in C++."""

import torch

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import per_row, rows_view, set_addresses
from ppo_fast.ops._core.inputs import RowInputs, SampleInputs
from ppo_fast.ops._core.results import SampledTokens


def sample_tokens(inputs: SampleInputs) -> SampledTokens:
    """A token of every row, and its log-probability; a filter takes room for one row per thread."""
    result = SampledTokens(per_row(inputs.logits, dtype=torch.int64), per_row(inputs.logits))
    arguments = extension.SampleArguments()
    arguments.rows = rows_view(RowInputs(inputs.logits, None, None, None, inputs.temperature))
    arguments.top_k, arguments.top_p = inputs.top_k or 0, inputs.top_p or 0.0
    set_addresses(arguments, keys=inputs.keys, tokens=result.tokens, logprobs=result.logprobs)
    extension.sample_tokens(arguments, threads=torch.get_num_threads())
    return result
