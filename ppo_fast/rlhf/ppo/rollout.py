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
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import RolloutConfig
from ppo_fast.rlhf.data.packing import Array, ForwardInputs, TokenBatch, offsets, ranges, to_device
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.errors import UserError
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
        """Return tokens [B] int64 from softmax(logits / temperature), logits [B, V]."""
        probs = torch.softmax(_filtered(logits / self.config.temperature, self.config), dim=-1)
        # An exponential of exactly 0 would turn a token of probability 0 into 0 / 0.
        race = torch.empty_like(probs).exponential_(generator=self.generator).clamp_min_(1e-30)
        return (probs / race).argmax(dim=-1)


class StopStrings:
    """A stopping criterion that records where each response, without its prompt, first had a stop string.

    `stopped_at` [B] int64 is the position of the token that completes it; beyond every response if there is none.
    """

    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, prompts: Tensor) -> None:
        self.width, self.never = prompts.shape[1], config.max_new_tokens
        self.stopped_at = torch.full((len(prompts),), self.never, dtype=torch.int64, device=prompts.device)
        if config.stop:
            try:
                self.found = StopStringCriteria(tokenizer, list(config.stop))
            except ValueError as error:
                kind = type(tokenizer).__name__
                raise UserError(f"rollout.stop: expected a tokenizer that can spell any text, got {kind}") from error

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
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

    indices: Tensor  # [n] int64: its tokens among the N of all responses
    sequences: ForwardInputs


@torch.no_grad()
def score(models: Models, generation: Generation, config: RolloutConfig) -> Rollout:
    """Compute old and reference log-probabilities, entropies and values, micro-batch by micro-batch."""
    grid = generation.to_token_batch()
    device, lengths = grid.ids.device, grid.lengths
    passes = [
        Pass(token_indices(lengths, rows, device), grid.sequences(rows, packed=models.packed))
        for rows in grid.split_by_length(np.arange(len(grid.ids)), config.micro_batch_size or len(grid.ids))
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


def first_eos(responses: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Return the position [B] int64 of the first of any EOS in responses [B, T]; T where there is none."""
    is_eos = torch.isin(responses, torch.tensor(eos_ids, dtype=torch.int64, device=responses.device))
    return torch.where(is_eos.any(-1), is_eos.long().argmax(-1), responses.shape[1])


def warn_about_filters(config: RolloutConfig) -> None:
    """Warn that top-k and top-p sample from another distribution than that of the ratio."""
    if config.top_k is not None or config.top_p is not None:
        warnings.warn(
            "rollout.top_k and rollout.top_p bias the ratio: its log-probabilities are those of the full "
            "softmax, not of the distribution sampled from",
            stacklevel=2,
        )


def _generate(
    models: Models, ids: Tensor, attention_mask: Tensor, config: RolloutConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return responses [b, t] int64, their log-probabilities [b, t] float32, the ends [b] int64 of their stop strings.

    Tokens after an EOS or a stop string are arbitrary. The KV cache is freed on return.
    """
    sampler, stopper = Sampler(config, generator), StopStrings(config, models.tokenizer, ids)
    settings = GenerationConfig(
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
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([stopper] if config.stop else []),
        )
    return output[:, ids.shape[1] :], torch.stack(sampler.logprobs, dim=1), stopper.stopped_at


@contextlib.contextmanager
def _plain_generation_config(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation config: `generate` would merge its penalties and bans into ours.

    PEFT's `generate` gives the wrapper's config to the model inside. transformers below 5 keeps a static cache.
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
