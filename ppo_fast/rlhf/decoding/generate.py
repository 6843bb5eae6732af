"""The engine `generate`: transformers' own loop with our draws. It runs any model and is the reference.

It samples in batches; the longest response of a batch holds up the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ppo_fast.rlhf.data.packing import to_device
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Responses, keys_of, left_padded
from ppo_fast.rlhf.models.forward import unwrapped


def run_generate(model: PreTrainedModel, requests: Sequence[Request], settings: DecodingSettings) -> Responses:
    """Sample a response to each request, `settings.width` at a time; keys and values are freed on return."""
    parts = [requests[start : start + settings.width] for start in range(0, len(requests), settings.width)]
    with torch.no_grad():
        found = list[Responses]()
        for part in parts:
            found.append(_run_batch(model, part, settings))
            if settings.progress is not None:
                settings.progress(sum(len(each.lengths) for each in found), len(requests))
        return Responses.joined(found)


def _run_batch(model: PreTrainedModel, requests: Sequence[Request], settings: DecodingSettings) -> Responses:
    """Sample the responses of one batch. Tokens after the end of a response are arbitrary until `Responses.cut`."""
    device = model.device
    ids, attention_mask = (to_device(x, device) for x in left_padded([r.prompt for r in requests], settings.pad_id))
    rows, limits = (
        to_device(np.array(numbers, dtype=np.int64), device)
        for numbers in ([r.row for r in requests], [r.max_new_tokens for r in requests])
    )
    sampler = Sampler(settings, rows)
    stopper = Stopper(settings, ids.shape[1], limits)
    config = GenerationConfig(
        max_new_tokens=max(request.max_new_tokens for request in requests),
        do_sample=False,
        pad_token_id=settings.pad_id,
    )
    with _plain_generation_config(model, config):
        output = model.generate(
            input_ids=ids,
            attention_mask=attention_mask.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([stopper]),
        )
    tokens, logprobs = output[:, ids.shape[1] :], torch.stack(sampler.logprobs, dim=1)
    return Responses.cut(tokens, logprobs, stopper.found, limits)


class Sampler:
    """A logits processor that draws the token itself and leaves `generate` no choice."""

    def __init__(self, settings: DecodingSettings, rows: Tensor) -> None:
        self.settings, self.rows = settings, rows
        self.logprobs: list[Tensor] = []  # [b] float32 of each step

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        keys = keys_of(self.settings.seed, self.rows, len(self.logprobs))
        tokens, logprobs = self.settings.sampling.draw(logits, keys)
        self.logprobs.append(logprobs)
        return torch.full_like(logits, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class Stopper:
    """A stopping criterion that records how many tokens each response, without its prompt, has up to its end."""

    def __init__(self, settings: DecodingSettings, prompt_width: int, limits: Tensor) -> None:
        self.settings, self.prompt_width, self.limits = settings, prompt_width, limits
        self.eos = torch.tensor(settings.eos_ids, dtype=torch.int64, device=limits.device)
        self.found = torch.zeros_like(limits)  # [b] int64: tokens up to the first EOS or stop string; 0: none yet

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        response = input_ids[:, self.prompt_width :]
        ends = (response[:, -1:] == self.eos).any(dim=1)
        if self.settings.stop is not None:
            ends = ends | self.settings.stop(response, scores)
        self.found = torch.where((self.found == 0) & ends, response.shape[1], self.found)
        return (self.found > 0) | (response.shape[1] >= self.limits)


@contextlib.contextmanager
def _plain_generation_config(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation config: `generate` would merge its penalties and bans into ours.

    PEFT's `generate` gives the wrapper's config to the model inside.
    """
    inner = unwrapped(model)
    own = model.generation_config, inner.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config, inner.generation_config = own
