"""Score responses with the forward pass that the update will use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
from ppo_fast.rlhf.world import current


class Pass(NamedTuple):
    """One forward pass of scoring."""

    indices: Tensor  # [n] int64: its tokens among the N of all responses
    sequences: ForwardInputs


class Statistics(NamedTuple):
    """The statistics of the n tokens of a pass."""

    logprobs: Tensor  # [n]
    entropy: Tensor  # [n]
    values: Tensor  # [n]: 0 without a head on the same trunk


@torch.no_grad()
def score(models: Models, generation: Generation, config: RolloutConfig) -> Rollout:
    """Compute old and reference log-probabilities, entropies and values, micro-batch by micro-batch.

    Each rank computes those of its share of the responses; all ranks return the same rollout.
    """
    grid, world, packed = generation.to_token_batch(), current(), models.packed
    device, lengths = grid.ids.device, grid.lengths
    sizes = config.micro_batch_size, config.tokens_per_pass
    dealt = grid.deal(np.arange(len(grid.ids)), world, *sizes, packed=packed)
    passes = [Pass(token_indices(lengths, rows, device), grid.sequences(rows, packed=packed)) for rows in dealt.rows]
    order = token_indices(lengths, dealt.everyone, device)
    counted = to_device(grid.loss_mask[:, -generation.mask.shape[1] :].ravel().nonzero()[0], device)
    tokens = generation.responses.flatten().index_select(0, counted)

    def in_order(parts: list[Tensor]) -> Tensor:
        """Return [N] float32: the values of all passes, response by response."""
        found = world.concatenate(torch.cat([parts[0][:0], *parts[: dealt.counted]]).float())
        return torch.empty_like(found).index_copy(0, order, found)

    def stats(role: Role, head: nn.Linear | None = None) -> list[Statistics]:
        with models.running(role) as run:
            return [
                run(_stats, part, tokens, head, linear=models.linear, temperature=config.temperature) for part in passes
            ]

    head = models.value.head if models.value is not None and models.shared else None
    policy, reference = stats("policy", head), stats("reference")
    values = [part.values for part in policy]
    if models.value is not None and not models.shared:
        with models.running("value") as run:
            values = [run(response_values, part.sequences) for part in passes]
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
    model: PreTrainedModel, part: Pass, tokens: Tensor, head: nn.Linear | None, *, linear: bool, temperature: float
) -> Statistics:
    """Return the statistics of one pass, with the values of a head on the same trunk."""
    chosen = tokens.index_select(0, part.indices)
    if head is None:
        found = response_stats(model, part.sequences, chosen, linear=linear, temperature=temperature)
        return Statistics(found.logprobs, found.entropy, torch.zeros_like(found.logprobs))
    x = response_hidden(model, part.sequences)
    found = head_stats(x, chosen, temperature=temperature)
    return Statistics(found.logprobs, found.entropy, head_values(head, x.hidden))
