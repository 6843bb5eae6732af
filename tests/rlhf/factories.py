"""Rollouts written by hand, for the stages that need no model."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ppo_fast.rlhf.data.packing import ForwardInputs, TokenBatch
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.ppo.advantages import Experience
from ppo_fast.rlhf.ppo.rollout import Generation, Rollout

EOS = 2


def made_rollout(
    lengths: list[int],
    *,
    ended: list[bool] | None = None,
    columns: dict[str, list] | None = None,
    width: int | None = None,
    seed: int = 0,
    fill: float = 0.0,
) -> Rollout:
    """A rollout of responses of these lengths with random contents; `fill` goes where the mask is False."""
    B, T = len(lengths), width or max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        # Drawn row by row up to its length, so that padding columns change nothing.
        rows = [torch.randn(n, generator=generator) for n in lengths]
        return torch.stack([torch.nn.functional.pad(row, (0, T - len(row)), value=fill) for row in rows])

    ids = torch.where(mask, 10 + torch.arange(T).expand(B, T), 0)
    finished = torch.tensor(ended or [True] * B)
    ids[finished, torch.tensor(lengths)[finished] - 1] = EOS
    prompts = PromptBatch(torch.full((B, 1), 5), torch.ones(B, 1, dtype=torch.bool), ["w1"] * B, columns or {})
    generation = Generation(
        prompts=prompts,
        input_ids=torch.cat([prompts.input_ids, ids], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, mask], dim=1),
        mask=mask,
        ended=finished,
        logprobs=random(),
    )
    packed = [random()[mask] for _ in range(4)]
    return Rollout(
        generation,
        generation.to_token_batch(),
        torch.tensor([0, *itertools.accumulate(lengths)]),
        ids[mask],
        generation.logprobs[mask],
        *packed,
    )


def made_experience(rollout: Rollout, advantages: Tensor, returns: Tensor) -> Experience:
    """The experience of a rollout with these advantages and returns [N], or [B, T] with masked ones to leave out."""
    old, mask = (rollout.logprobs, rollout.ref_logprobs, rollout.values), rollout.generation.mask
    return Experience(
        rollout.grid, rollout.tokens, *old, *(x[mask] if x.ndim == 2 else x for x in (advantages, returns))
    )


def padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """x [N] as [B, T], 0 beyond each of these lengths."""
    return torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True)


def all_rows(experience: Experience) -> tuple[Experience, np.ndarray]:
    """An experience with all its rows, as `Learner.backward` takes them."""
    return experience, np.arange(len(experience.lengths))


def forward_pass(ids: Tensor, attention_mask: Tensor, counted: Tensor | int, *, packed: bool = False) -> ForwardInputs:
    """One pass over all rows; `counted` is a mask [B, T], or T for a mask that is True there."""
    if isinstance(counted, int):
        counted = attention_mask[:, -counted:]
    return TokenBatch.from_masks(ids, attention_mask, counted).sequences(np.arange(len(ids)), packed=packed)


def forward_of(rollout: Rollout, *, packed: bool = False) -> ForwardInputs:
    """One pass over a whole rollout; its N counted tokens are in the order of x[rollout.generation.mask]."""
    generation = rollout.generation
    return forward_pass(generation.input_ids, generation.attention_mask, generation.mask, packed=packed)
