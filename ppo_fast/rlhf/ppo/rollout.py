"""Sample responses to a batch of prompts; the responses with their statistics."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.rlhf.config.ppo import RolloutConfig
from ppo_fast.rlhf.data.packing import Array, TokenBatch, offsets, ranges, to_device
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.decoding.engines import find_engine
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Progress, Request, Responses, Sampling, stop_criteria
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.world import World, current


@dataclass(frozen=True)
class Generation:
    """Prompts with their sampled responses."""

    prompts: PromptBatch
    input_ids: Tensor  # [B, L] int64: prompt left-padded, then the response right-padded
    attention_mask: Tensor  # [B, L] bool, True: a token of prompt or response, chosen by the policy or not
    mask: Tensor  # [B, T] bool, True: a token the policy chose, the first EOS or stop string included
    ended: Tensor  # [B] bool, True: the response has an EOS or a stop string
    logprobs: Tensor  # [B, T] float32: of the tokens, taken at the step that sampled them; 0 where masked

    def to_token_batch(self) -> TokenBatch:
        """Return ids and masks for forward passes; copies the masks to the host, which waits for the device."""
        return TokenBatch.from_masks(self.input_ids, self.attention_mask, self.mask)

    @property
    def responses(self) -> Tensor:
        """Return [B, T] int64; pad where masked."""
        return self.input_ids[:, -self.mask.shape[1] :]


@dataclass(frozen=True)
class Rollout:
    """A generation and the statistics of its N counted tokens, packed response by response: no padding, no mask."""

    generation: Generation
    grid: TokenBatch  # prompts and responses
    cu_seqlens: Tensor  # [B + 1] int64: where each response begins among the N tokens
    tokens: Tensor  # [N] int64
    sampled_logprobs: Tensor  # [N] float32: taken at the step that sampled them
    logprobs: Tensor  # [N] float32: under the policy that sampled them, by the training forward
    ref_logprobs: Tensor  # [N] float32: under the reference
    entropy: Tensor  # [N] float32: of the policy's full distribution, nats
    values: Tensor  # [N] float32: of the state before each token; 0 without a value model

    def sums(self, x: Tensor) -> Tensor:
        """Return [B]: the sum of x [N] over the tokens of each response."""
        return response_sums(x, self.cu_seqlens.diff())

    def select(self, rows: Array) -> Rollout:
        """Return the rollout of these responses."""
        chosen = token_indices(self.grid.lengths, rows, self.tokens.device)
        packed = {name: x.index_select(0, chosen) for name, x in self.packed().items()}
        cu_seqlens = to_device(offsets(self.grid.lengths[rows]), self.tokens.device)
        return Rollout(select(self.generation, rows), select(self.grid, rows), cu_seqlens, **packed)

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors [N] by name."""
        names = ("tokens", "sampled_logprobs", "logprobs", "ref_logprobs", "entropy", "values")
        return {name: getattr(self, name) for name in names}


def generate(
    models: Models,
    prompts: PromptBatch,
    config: RolloutConfig,
    seed: int,
    first_row: int = 0,
    progress: Progress | None = None,
) -> Generation:
    """Sample one response of at most `max_new_tokens` tokens to each prompt.

    Args:
        seed, first_row: of the noise. A response depends on them, its place in the batch, its prompt and the weights;
            not on the engine or `micro_batch_size`.
        progress: is called as responses end.
    """
    settings = DecodingSettings(
        eos_ids=models.eos_ids,
        pad_id=models.pad_id,
        sampling=Sampling(config.temperature, config.top_k, config.top_p),
        seed=seed,
        width=config.micro_batch_size or len(prompts.prompts),
        stop=stop_criteria(config.stop, models.tokenizer),
        progress=progress,
    )
    requests = [
        Request(ids, first_row + row, config.max_new_tokens)
        for row, ids in enumerate(counted_ids(prompts.input_ids, prompts.attention_mask))
    ]
    own = current().share(len(requests))
    responses = Responses.none(models.device)
    with models.whole("policy") as policy:
        if own:
            responses = find_engine(config.engine, policy)(policy, requests[own.start : own.stop], settings)
    responses = gathered(responses, current())
    length = responses.tokens.shape[1]
    mask = torch.arange(length, dtype=torch.int64, device=models.device) < responses.lengths[:, None]
    return Generation(
        prompts=prompts,
        input_ids=torch.cat([prompts.input_ids, torch.where(mask, responses.tokens, models.pad_id)], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, mask], dim=1),
        mask=mask,
        ended=responses.ended,
        logprobs=responses.logprobs,
    )


def gathered(responses: Responses, world: World) -> Responses:
    """Return the responses of all ranks, by rank."""
    if world.size == 1:
        return responses
    width = max(world.objects(responses.tokens.shape[1]))
    pad = width - responses.tokens.shape[1]
    padded = (torch.nn.functional.pad(x, (0, pad)) for x in responses[:2])
    return Responses(*map(world.concatenate, (*padded, *responses[2:])))


def counted_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the ids [B, L] of each row where mask is True."""
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, counts in zip(*row, strict=True) if counts] for row in rows]


def token_indices(lengths: Array, rows: Array, device: torch.device) -> Tensor:
    """Return [n] int64: the indices of these responses' tokens; all responses have `lengths` [B] tokens."""
    return to_device(ranges(offsets(lengths)[rows], lengths[rows]), device)


def response_sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Return [B]: the sum of x [N] over each response of `lengths` [B] tokens, 1 or more."""
    return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)


def select(value: Any, rows: Array) -> Any:
    """Return the rows of every array [B, ...] and list [B] in nested dataclasses and dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: select(getattr(value, field.name), rows) for field in fields(value)})
    if isinstance(value, dict):
        return {name: select(item, rows) for name, item in value.items()}
    if isinstance(value, list):
        return [value[row] for row in rows]
    return value[rows] if isinstance(value, Tensor | np.ndarray) and value.ndim else value


def warn_about_filters(config: RolloutConfig) -> None:
    """Warn that top-k and top-p sample from another distribution than that of the ratio."""
    if config.top_k is not None or config.top_p is not None:
        warnings.warn(
            "rollout.top_k and rollout.top_p bias the ratio: its log-probabilities are those of the full "
            "softmax, not of the distribution sampled from",
            stacklevel=2,
        )
