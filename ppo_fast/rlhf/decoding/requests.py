"""The interface of all sampling engines: requests and settings in, responses out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from ppo_fast import ops
from ppo_fast.rlhf.errors import UserError

Progress = Callable[[int, int], None]  # is called with what is done, and of how much


class Request(NamedTuple):
    """One response to sample."""

    prompt: Sequence[int]  # token ids without padding, 1 or more; requests with equal prompts share its prefill
    row: int  # of the response among all of its phase: with the seed, it decides the noise
    max_new_tokens: int  # 1 or more; a response without EOS ends here


class Responses(NamedTuple):
    """Sampled responses, in the order of the requests. Where a response has ended, tokens and log-probabilities are 0.

    T is the length of the longest response.
    """

    tokens: Tensor  # [B, T] int64
    logprobs: Tensor  # [B, T] float32, each taken at the step that sampled the token
    lengths: Tensor  # [B] int64: tokens, the EOS or the last of a stop string included
    ended: Tensor  # [B] bool, True: the response has an EOS or a stop string

    @classmethod
    def none(cls, device: torch.device) -> Responses:
        """Return the responses to no requests."""
        empty = torch.empty((0, 0), dtype=torch.int64, device=device)
        return cls(empty, empty.float(), empty.flatten(), empty.flatten().bool())

    @classmethod
    def cut(cls, tokens: Tensor, logprobs: Tensor, found: Tensor, limits: Tensor) -> Responses:
        """Drop what was sampled past the ends.

        Args:
            tokens, logprobs: [B, T]; arbitrary past the end of a response.
            found: [B] int64, number of tokens up to the first EOS or stop string; 0: none was found.
            limits: [B] int64, `max_new_tokens` of each.
        """
        ended = (found > 0) & (found <= limits)
        lengths = torch.where(ended, found, limits)
        width = int(lengths.max())
        inside = torch.arange(width, dtype=torch.int64, device=tokens.device) < lengths[:, None]
        tokens = torch.where(inside, tokens[:, :width], 0)
        return cls(tokens, torch.where(inside, logprobs[:, :width], 0.0), lengths, ended)

    @classmethod
    def joined(cls, parts: Sequence[Responses]) -> Responses:
        """Return the responses of several batches as those of one."""
        width = max(part.tokens.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        tokens, logprobs = (
            torch.cat([pad(x, (0, width - x.shape[1])) for x in group])
            for group in ([part.tokens for part in parts], [part.logprobs for part in parts])
        )
        return cls(tokens, logprobs, torch.cat([x.lengths for x in parts]), torch.cat([x.ended for x in parts]))


@dataclass(frozen=True)
class Sampling:
    """Draw from softmax(logits / temperature), cut to the likeliest tokens.

    `keys` [N, 3] int64 are (seed, row, step). They decide the noise, so a token depends on neither the other rows of a
    batch nor the engine.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def draw(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [N] int64 and their log-probabilities [N] float32, of the whole softmax at the temperature."""
        return ops.sample_tokens(logits, keys, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Greedy(Sampling):
    """Take the likeliest token, the first of several; log-probabilities are 0."""

    def draw(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=-1), torch.zeros(len(logits), dtype=torch.float32, device=logits.device)


@dataclass(frozen=True)
class DecodingSettings:
    """What ends a response, how its tokens are drawn, and how many responses are sampled at a time."""

    eos_ids: tuple[int, ...]  # each ends a response; may be empty
    pad_id: int  # fills rows of unequal length; never attended to
    sampling: Sampling
    seed: int  # of the noise; see `noise_seed`
    width: int  # responses sampled at a time
    stop: StopStringCriteria | None = None
    progress: Progress | None = None  # of the responses


def noise_seed(seed: int, phase: str) -> int:
    """Return the seed, 0 to 2^63 - 1, of a phase of a run, so that no two phases share their noise."""
    digest = hashlib.sha256(f"{seed} {phase}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stop_criteria(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> StopStringCriteria | None:
    """Return transformers' search for stop strings in token ids; None without strings."""
    if not strings:
        return None
    try:
        return StopStringCriteria(tokenizer, list(strings))
    except ValueError as error:
        kind = type(tokenizer).__name__
        raise UserError(f"rollout.stop: expected a tokenizer that can spell any text, got {kind}") from error


def keys_of(seed: int, rows: Tensor, step: int = 0) -> Tensor:
    """Return [B, 3] int64: the keys of the noise of these rows' token number `step`."""
    return torch.stack([torch.full_like(rows, seed), rows, torch.full_like(rows, step)], dim=1)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [B, P] int64 and mask [B, P] bool, True: a token of the prompt."""
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
    return ids, mask
