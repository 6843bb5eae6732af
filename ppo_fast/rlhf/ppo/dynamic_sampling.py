"""Replace prompts whose samples all have one score: group advantages learn nothing from them.

Source: Yu et al. 2025, arXiv:2503.14476, section 3.2 (DAPO).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_fast.rlhf.data.packing import Array, to_device
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.errors import NotFiniteError
from ppo_fast.rlhf.ppo.advantages import agreeing
from ppo_fast.rlhf.ppo.rewards import OwnScores, ScoredBatch
from ppo_fast.rlhf.ppo.rollout import Generation, select, token_indices


class Resampled(NamedTuple):
    """Responses that were scored when they were chosen."""

    generation: Generation
    scores: ScoredBatch  # of its responses
    replaced: int  # prompts, over all tries


def resample(
    generation: Generation,
    draw: Callable[[int], Generation],
    score: Callable[[Generation], ScoredBatch],
    *,
    tries: int,
    pad_id: int,
) -> Resampled:
    """Replace the samples of each prompt on whose score they agree by those of another prompt, at most `tries` times.

    Args:
        generation: B responses, `groups` of equal size.
        draw: samples responses to that many other prompts.
        score: is called once for each response.

    What the last try drew stays, whether its samples agree or not.
    """
    scores, groups, replaced = score(generation), generation.prompts.groups, 0
    assert groups is not None
    size = len(groups) // len(np.unique(groups))
    for _ in range(tries):
        alike = agreeing(scores.totals, groups).cpu().numpy()
        if not alike.any():
            break
        new = draw(int(alike.sum()))
        try:
            new_scores = score(new)
        except NotFiniteError as error:
            raise NotFiniteError(str(error)) from error  # its rows are not those of the batch
        order = np.arange(len(groups))
        order[alike.repeat(size)] = len(groups) + np.arange(int(alike.sum()) * size)
        scores = _joined_scores(scores, new_scores, _lengths(generation), _lengths(new), order)
        generation = _joined(generation, new, order, pad_id)
        replaced += int(alike.sum())
    return Resampled(generation, scores, replaced)


def _joined(a: Generation, b: Generation, order: Array, pad_id: int) -> Generation:
    """Return the rows `order` of both, padded to the longer prompt and the longer response."""
    prompt = max(x.prompts.input_ids.shape[1] for x in (a, b))
    response = max(x.mask.shape[1] for x in (a, b))
    parts = [_widened(x, prompt, response, pad_id) for x in (a, b)]
    rows = to_device(order, a.mask.device)
    first, second = (x.prompts for x in parts)
    prompts = PromptBatch(
        input_ids=torch.cat([first.input_ids, second.input_ids])[rows],
        attention_mask=torch.cat([first.attention_mask, second.attention_mask])[rows],
        prompts=select(first.prompts + second.prompts, order),
        columns={name: select(values + second.columns[name], order) for name, values in first.columns.items()},
        groups=first.groups,
    )
    names = [field.name for field in dataclasses.fields(Generation) if field.name != "prompts"]
    tensors = {name: torch.cat([getattr(x, name) for x in parts])[rows] for name in names}
    return Generation(prompts=prompts, **tensors)


def _widened(x: Generation, prompt: int, response: int, pad_id: int) -> Generation:
    """Return a generation with more padding on the left of prompts and on the right of responses."""
    left, right = prompt - x.prompts.input_ids.shape[1], response - x.mask.shape[1]
    prompts = dataclasses.replace(
        x.prompts,
        input_ids=_padded(x.prompts.input_ids, (left, 0), pad_id),
        attention_mask=_padded(x.prompts.attention_mask, (left, 0), False),
    )
    return dataclasses.replace(
        x,
        prompts=prompts,
        input_ids=_padded(x.input_ids, (left, right), pad_id),
        attention_mask=_padded(x.attention_mask, (left, right), False),
        mask=_padded(x.mask, (0, right), False),
        logprobs=_padded(x.logprobs, (0, right), 0.0),
    )


def _padded(x: Tensor, sides: tuple[int, int], value: float) -> Tensor:
    return torch.nn.functional.pad(x, sides, value=value)


def _lengths(generation: Generation) -> Array:
    """Return [B] int64: the counted tokens of each response."""
    found: Array = generation.mask.sum(dim=1).cpu().numpy()
    return found


def _joined_scores(a: ScoredBatch, b: ScoredBatch, before: Array, after: Array, order: Array) -> ScoredBatch:
    """Return the scores of the rows `order` of both, whose responses have `before` and `after` tokens."""
    rows, lengths = to_device(order, a.totals.device), np.concatenate([before, after])
    tokens = torch.cat([a.per_token_scores, b.per_token_scores])

    def joined(name: str) -> Tensor:
        both: Tensor = torch.cat([getattr(x.own, name) for x in (a, b)])[rows]
        return both

    own = OwnScores(a.own.names, *map(joined, ("sources", "combined", "unpenalized")))
    std = None if a.std is None or b.std is None else torch.cat([a.std, b.std])[rows]
    return ScoredBatch(
        per_token_scores=tokens[token_indices(lengths, order, tokens.device)],
        totals=torch.cat([a.totals, b.totals])[rows],
        verdicts=select(a.verdicts + b.verdicts, order),
        std=std,
        own=own,
    )
