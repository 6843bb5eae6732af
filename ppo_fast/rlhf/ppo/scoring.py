"""Score responses with the forward pass that the update will use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import RolloutConfig
from ppo_fast.rlhf.data.packing import ForwardInputs, offsets, to_device
from ppo_fast.rlhf.models.forward import (
    head_stats,
    head_values,
    response_hidden,
    response_stats,
    response_values,
)
from ppo_fast.rlhf.models.models import Models, Role
from ppo_fast.rlhf.ppo.rollout import Generation, Rollout, token_indices


class Pass(NamedTuple):
    """One forward pass of scoring."""

    indices: Tensor  # [n] int64: its tokens among the N of all responses
    sequences: ForwardInputs


@torch.no_grad()
def score(models: Models, generation: Generation, config: RolloutConfig) -> Rollout:
    """Compute old and reference log-probabilities, entropies and values, micro-batch by micro-batch."""
    grid = generation.to_token_batch()
    device, lengths = grid.ids.device, grid.lengths
    passes = [
        Pass(token_indices(lengths, rows, device), grid.sequences(rows, packed=models.packed))
        for rows in grid.split(
            np.arange(len(grid.ids)), config.micro_batch_size, config.tokens_per_pass, packed=models.packed
        )
    ]
    order = torch.cat([part.indices for part in passes])
    counted = to_device(grid.loss_mask[:, -generation.mask.shape[1] :].ravel().nonzero()[0], device)
    tokens = generation.responses.flatten().index_select(0, counted)

    def in_order(parts: list[Tensor]) -> Tensor:
        """Return [N] float32: the values of all passes, response by response."""
        found = torch.cat(parts).float()
        return torch.empty_like(found).index_copy(0, order, found)

    def stats(role: Role, values: list[Tensor] | None = None) -> list[ops.TokenStats]:
        with models.using(role) as model:
            return [_stats(models, model, part, tokens, config.temperature, values) for part in passes]

    values: list[Tensor] = []
    policy, reference = stats("policy", values if models.shared else None), stats("reference")
    if models.value is None:
        values = [torch.zeros_like(part.logprobs) for part in policy]
    elif not models.shared:
        with models.using("value") as value:
            values = [response_values(value, part.sequences) for part in passes]
    return Rollout(
        generation,
        grid,
        cu_seqlens=to_device(offsets(lengths), device),
        tokens=tokens,
        sampled_logprobs=generation.logprobs.flatten().index_select(0, counted),
        logprobs=in_order([part.logprobs for part in policy]),
        ref_logprobs=in_order([part.logprobs for part in reference]),
        entropy=in_order([part.entropy for part in policy]),
        values=in_order(values),
    )


def _stats(
    models: Models, model: PreTrainedModel, part: Pass, tokens: Tensor, temperature: float, values: list[Tensor] | None
) -> ops.TokenStats:
    """Return the statistics of one pass; append the values of a head on the same trunk to `values`."""
    chosen = tokens.index_select(0, part.indices)
    if values is None:
        return response_stats(model, part.sequences, chosen, linear=models.linear, temperature=temperature)
    x = response_hidden(model, part.sequences)
    assert models.value is not None  # on this trunk
    values.append(head_values(models.value.head, x.hidden))
    return head_stats(x, chosen, temperature=temperature)
