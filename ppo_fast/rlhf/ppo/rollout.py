"""Sample responses, then score them with the forward pass that the update will use."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import RolloutConfig
from ppo_fast.rlhf.data.packing import ForwardInputs, TokenBatch
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.models.forward import (
    head_stats,
    head_values,
    response_hidden,
    response_stats,
    response_values,
    unwrapped,
)
from ppo_fast.rlhf.models.models import Models, Role


@dataclass(frozen=True)
class Generation:
    """Prompts with their sampled responses."""

    prompts: PromptBatch
    input_ids: Tensor  # [B, L] int64: prompt left-padded, then the response right-padded
    attention_mask: Tensor  # [B, L] bool, True: a prompt token or a counted response token
    mask: Tensor  # [B, T] bool, True: a token the policy chose, the first EOS or stop string included
    ended: Tensor  # [B] bool, True: the response has an EOS or a stop string
    logprobs: Tensor  # [B, T] float32: of the tokens, taken at the step that sampled them; 0 where masked

    @property
    def grid(self) -> TokenBatch:
        """Ids and masks as forward passes are made from; waits for the device once."""
        return TokenBatch.from_masks(self.input_ids, self.attention_mask, self.mask)

    @property
    def responses(self) -> Tensor:
        """[B, T] int64; pad where masked."""
        return self.input_ids[:, -self.mask.shape[1] :]


@dataclass(frozen=True)
class Rollout:
    """A generation with what the models think of it; all [B, T] float32, 0 where masked."""

    generation: Generation
    logprobs: Tensor  # of the responses under the policy that sampled them, by the training forward
    ref_logprobs: Tensor  # under the reference
    entropy: Tensor  # of the policy's full distribution, nats
    values: Tensor  # of the state before each token

    @property
    def mask(self) -> Tensor:
        return self.generation.mask


class Sampler:
    """A logits processor that draws the token itself and leaves `generate` no choice.

    Drawing is the exponential race argmax(p / e), e ~ Exp(1), which is exact, takes any generator and does not
    wait for the device. One [B] log-probability is kept per step; nothing of size [B, T, V] exists.
    """

    def __init__(self, config: RolloutConfig, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        tokens = self.draw(logits)
        self.logprobs.append(ops.token_logprobs(logits, tokens, temperature=self.config.temperature))
        return torch.full_like(logits, -torch.inf).scatter_(-1, tokens[:, None], 0.0)

    def draw(self, logits: Tensor) -> Tensor:
        """Tokens [B] int64 from softmax(logits / temperature), logits [B, V]."""
        probs = torch.softmax(_filtered(logits / self.config.temperature, self.config), dim=-1)
        # An exponential drawn as exactly 0 would turn a token of probability 0 into 0 / 0.
        race = torch.empty_like(probs).exponential_(generator=self.generator).clamp_min_(1e-30)
        return (probs / race).argmax(dim=-1)


class StopStrings:
    """A stopping criterion that keeps where each response first had a stop string; the prompt is not looked at.

    `stopped_at` [B] int64 is the position of the token that completes it, beyond every response where there is none.
    """

    def __init__(self, config: RolloutConfig, tokenizer: Any, prompts: Tensor) -> None:
        self.width, self.never = prompts.shape[1], config.max_new_tokens
        self.stopped_at = torch.full((len(prompts),), self.never, dtype=torch.int64, device=prompts.device)
        if config.stop:
            try:
                self.found = require("transformers").StopStringCriteria(tokenizer, list(config.stop))
            except ValueError as error:
                kind = type(tokenizer).__name__
                raise UserError(f"rollout.stop: expected a tokenizer that can spell any text, got {kind}") from error

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        response = input_ids[:, self.width :]
        found: Tensor = self.found(response, scores)
        self.stopped_at = torch.where(found, self.stopped_at.clamp_max(response.shape[1] - 1), self.stopped_at)
        return self.stopped_at < self.never


@torch.no_grad()
def generate(models: Models, prompts: PromptBatch, config: RolloutConfig, generator: torch.Generator) -> Generation:
    """Sample one response of at most `max_new_tokens` tokens to each prompt."""
    width = config.micro_batch_size or len(prompts.prompts)
    chunks = zip(prompts.input_ids.split(width), prompts.attention_mask.split(width), strict=True)
    parts = [_generate(models, ids, attention, config, generator) for ids, attention in chunks]
    length = max(tokens.shape[1] for tokens, _, _ in parts)
    responses = torch.cat([_pad_right(tokens, length, models.pad_id) for tokens, _, _ in parts])
    stopped_at = torch.cat([stops for _, _, stops in parts])
    ended_at = torch.minimum(first_eos(responses, models.eos_ids), stopped_at)
    mask = torch.arange(length, dtype=torch.int64, device=responses.device) < (ended_at + 1)[:, None]
    logprobs = torch.cat([_pad_right(values, length, 0.0) for _, values, _ in parts])
    return Generation(
        prompts=prompts,
        input_ids=torch.cat([prompts.input_ids, torch.where(mask, responses, models.pad_id)], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, mask], dim=1),
        mask=mask,
        ended=ended_at < length,
        logprobs=torch.where(mask, logprobs, 0.0),
    )


class Pass(NamedTuple):
    """One forward pass of scoring."""

    flat_indices: Tensor  # [n] int64: its counted tokens in the flattened grid
    sequences: ForwardInputs


@torch.no_grad()
def score(models: Models, generation: Generation, config: RolloutConfig) -> Rollout:
    """Old log-probabilities, entropies, reference log-probabilities and values, micro-batch by micro-batch."""
    grid, targets = generation.grid, generation.input_ids.flatten()
    passes = [
        Pass(grid.flat_indices(rows), grid.sequences(rows, packed=models.packed))
        for rows in grid.split_by_length(np.arange(len(grid.ids)), config.micro_batch_size or len(grid.ids))
    ]

    def spread(parts: list[Tensor]) -> Tensor:
        """[B, T]: values of the counted tokens of all passes, each in its place."""
        empty = torch.zeros(grid.ids.numel(), dtype=torch.float32, device=grid.ids.device)
        filled = empty.index_copy(0, torch.cat([part.flat_indices for part in passes]), torch.cat(parts).float())
        return filled.view(grid.ids.shape)[:, -generation.mask.shape[1] :]

    def stats(role: Role, values: list[Tensor] | None = None) -> list[ops.TokenStats]:
        with models.using(role) as model:
            return [_stats(models, model, part, targets, config.temperature, values) for part in passes]

    values: list[Tensor] = []
    policy, reference = stats("policy", values if models.shared else None), stats("reference")
    if not models.shared:
        with models.using("value") as value:
            values = [response_values(value, part.sequences) for part in passes]
    return Rollout(
        generation,
        logprobs=spread([part.logprobs for part in policy]),
        ref_logprobs=spread([part.logprobs for part in reference]),
        entropy=spread([part.entropy for part in policy]),
        values=spread(values),
    )


def _stats(
    models: Models, model: Any, part: Pass, targets: Tensor, temperature: float, values: list[Tensor] | None
) -> ops.TokenStats:
    """Statistics of one pass; the values of a head on the same trunk are appended to `values`."""
    chosen = targets.index_select(0, part.flat_indices)
    if values is None:
        return response_stats(model, part.sequences, chosen, linear=models.linear, temperature=temperature)
    x = response_hidden(model, part.sequences)
    values.append(head_values(models.value.head, x.hidden))
    return head_stats(x, chosen, temperature=temperature)


def select(value: Any, rows: list[int]) -> Any:
    """The rows of every tensor [B, ...] and list [B] in nested dataclasses and dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: select(getattr(value, field.name), rows) for field in fields(value)})
    if isinstance(value, dict):
        return {name: select(item, rows) for name, item in value.items()}
    if isinstance(value, list):
        return [value[row] for row in rows]
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


def first_eos(responses: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Position [B] int64 of the first of any EOS in responses [B, T]; T where there is none."""
    is_eos = torch.isin(responses, torch.tensor(eos_ids, dtype=torch.int64, device=responses.device))
    return torch.where(is_eos.any(-1), is_eos.long().argmax(-1), responses.shape[1])


def warn_about_filters(config: RolloutConfig) -> None:
    """Top-k and top-p sample from another distribution than the one the ratio is computed with."""
    if config.top_k is not None or config.top_p is not None:
        warnings.warn(
            "rollout.top_k and rollout.top_p bias the ratio: its log-probabilities are those of the full "
            "softmax, not of the distribution sampled from",
            stacklevel=2,
        )


def _generate(
    models: Models, ids: Tensor, attention_mask: Tensor, config: RolloutConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Responses [b, t] int64, their log-probabilities [b, t] float32, the ends [b] int64 of their stop strings.

    What follows an EOS or a stop string is arbitrary. The keys and values are gone when this returns.
    """
    transformers = require("transformers")
    sampler, stopper = Sampler(config, generator), StopStrings(config, models.tokenizer, ids)
    settings = transformers.GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=[*models.eos_ids],
        pad_token_id=models.pad_id,
        cache_implementation="static" if config.static_cache else None,
    )
    with models.using("policy") as policy, _plain_generation_config(policy, settings):
        output = policy.generate(
            input_ids=ids,
            attention_mask=attention_mask.long(),
            generation_config=settings,
            logits_processor=transformers.LogitsProcessorList([sampler]),
            stopping_criteria=transformers.StoppingCriteriaList([stopper] if config.stop else []),
        )
    return output[:, ids.shape[1] :], torch.stack(sampler.logprobs, dim=1), stopper.stopped_at


@contextlib.contextmanager
def _plain_generation_config(model: Any, settings: Any) -> Iterator[None]:
    """Hide the model's own generation config: `generate` would fill ours up with its penalties and bans.

    PEFT's `generate` leaves the config of the wrapper with the model inside. transformers below 5 keeps a static cache.
    """
    inner = unwrapped(model)
    own = model.generation_config, inner.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config, inner.generation_config = own
        vars(inner).pop("_cache", None)


def _filtered(logits: Tensor, config: RolloutConfig) -> Tensor:
    """Set all but the top-k, or the smallest set of probability >= top-p, to -inf."""
    if config.top_k is not None:
        kth = logits.topk(min(config.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = torch.where(logits < kth, -torch.inf, logits)
    if config.top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def _pad_right(x: Tensor, length: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value)
