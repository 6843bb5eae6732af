"""Rollouts by a user's function: tools and several turns, sampled by the engine of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import StopStringCriteria

from ppo_fast.rlhf.config.ppo import RolloutConfig
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.decoding.engines import find_engine
from ppo_fast.rlhf.decoding.requests import (
    DecodingSettings,
    Progress,
    Request,
    Sampling,
    noise_seed,
    stop_criteria,
)
from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.rollout import Generation, counted_ids, generate
from ppo_fast.rlhf.user_code import as_list, call, to_python
from ppo_fast.rlhf.world import current

RolloutFunction = Callable[..., Sequence[tuple[Sequence[int], Sequence[bool], Sequence[float]]]]
ROLE = "rollout function"


class Turns(NamedTuple):
    """What a rollout function returns of one response: lists of the same length, 1 or more."""

    ids: list[int]  # the policy's tokens and those of the environment, in order
    mask: list[bool]  # True: the policy chose the token; once or more
    logprobs: list[float]  # as `sample` returned them; anything where mask is False


class TurnSampler:
    """The argument `sample` of a rollout function: continues token ids, all at once, by the engine of the run.

    The noise depends on the phase, the number of the call and the place in its list, so a run repeats to the bit.
    """

    def __init__(self, models: Models, config: RolloutConfig, seed: int, first_row: int) -> None:
        self.models, self.config, self.seed, self.first_row = models, config, seed, first_row
        self.calls = 0

    def __call__(
        self,
        ids: Sequence[Sequence[int]],
        *,
        stop: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[tuple[list[int], list[float]]]:
        """Sample a continuation of each list of token ids.

        Args:
            ids: one or more each, without padding.
            stop: strings that end a continuation as EOS does; they belong to it. None: `rollout.stop`.
            max_new_tokens: of each continuation. None: `rollout.max_new_tokens`.

        Returns:
            The new token ids of each, EOS or stop string included, and their log-probabilities.
        """
        new = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        check(isinstance(new, int) and new >= 1, f"{ROLE}: sample", "max_new_tokens >= 1", new)
        prompts = [[int(token) for token in to_python(row)] for row in ids]
        self.calls += 1
        if not prompts:
            return []
        for row in prompts:
            _check_ids(f"{ROLE}: sample", self.models, row, new)
        settings = self._settings(len(prompts), self.config.stop if stop is None else tuple(stop))
        requests = [Request(row, number, new) for number, row in enumerate(prompts)]
        with self.models.whole("policy") as policy:
            found = find_engine(self.config.engine, policy)(policy, requests, settings)
        lengths = found.lengths.tolist()
        rows = zip(found.tokens.tolist(), found.logprobs.tolist(), lengths, strict=True)
        return [(tokens[:n], logprobs[:n]) for tokens, logprobs, n in rows]

    def _settings(self, count: int, stop: tuple[str, ...]) -> DecodingSettings:
        config, models = self.config, self.models
        return DecodingSettings(
            eos_ids=models.eos_ids,
            pad_id=models.pad_id,
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            seed=noise_seed(self.seed, f"rows from {self.first_row}, call {self.calls}"),
            width=config.micro_batch_size or count,
            stop=stop_criteria(stop, models.tokenizer),
        )


def respond(
    models: Models,
    prompts: PromptBatch,
    config: RolloutConfig,
    seed: int,
    first_row: int = 0,
    function: RolloutFunction | None = None,
    progress: Progress | None = None,
) -> Generation:
    """Return the responses of `function` to the prompts; None: one sampled response each, by `generate`,
    which calls `progress`.

    The function is called as f(prompts=, prompt_ids=, sample=, tokenizer=, **columns) and returns token ids, a mask
    and log-probabilities of each response, as in :class:`Turns`. A response has ended unless its last token is the
    policy's, no EOS, and not the end of a string of `rollout.stop`.

    Raises UserError, one sentence, when the function fails or its answer does not fit.
    """
    if function is None:
        return generate(models, prompts, config, seed, first_row, progress)
    world, count = current(), len(prompts.prompts)
    whole = hasattr(function, "load_state_dict")  # rank 0 keeps its state, and answers all prompts
    own = range(count if world.is_main else 0) if whole else world.share(count)
    with models.whole("policy"):  # however often each rank samples
        parts = world.together(lambda: _turns(models, prompts, config, seed, first_row, function, own) if own else [])
    turns = [turn for part in parts for turn in part]
    stop = stop_criteria(config.stop, models.tokenizer)
    ended = [_ended(models, turn, stop) for turn in turns]
    return _generation(models, prompts, turns, ended)


def _turns(
    models: Models,
    prompts: PromptBatch,
    config: RolloutConfig,
    seed: int,
    first_row: int,
    function: RolloutFunction,
    own: range,
) -> list[Turns]:
    """Return the responses of the function to the prompts number `own`."""
    prompt_ids = counted_ids(prompts.input_ids, prompts.attention_mask)[own.start : own.stop]
    arguments: dict[str, Any] = {
        "prompts": prompts.prompts[own.start : own.stop],
        "prompt_ids": prompt_ids,
        "sample": TurnSampler(models, config, seed, first_row + own.start),
        "tokenizer": models.tokenizer,
    }
    columns = {name: values[own.start : own.stop] for name, values in prompts.columns.items()}
    for name in columns.keys() & arguments.keys():
        raise UserError(f"{ROLE}: the column name {name!r} is taken by an argument of its own")
    answer = as_list(ROLE, "responses", call(ROLE, function, **arguments, **columns), len(prompt_ids))
    pairs = enumerate(zip(answer, prompt_ids, strict=True), start=own.start)
    return [_checked(models, item, prompt, sample) for sample, (item, prompt) in pairs]


def _ended(models: Models, turn: Turns, stop: StopStringCriteria | None) -> bool:
    if turn.ids[-1] in models.eos_ids or not turn.mask[-1]:
        return True
    return stop is not None and bool(stop(torch.tensor([turn.ids], dtype=torch.int64, device=models.device), None))


def _generation(models: Models, prompts: PromptBatch, turns: list[Turns], ended: list[bool]) -> Generation:
    """Pad the responses on the right."""
    width, device, pad = max(len(turn.ids) for turn in turns), models.device, models.pad_id

    def grid(rows: list[list[Any]], fill: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device=device)

    ids = grid([turn.ids for turn in turns], pad, torch.int64)
    mask = grid([turn.mask for turn in turns], False, torch.bool)
    inside = grid([[True] * len(turn.ids) for turn in turns], False, torch.bool)
    logprobs = grid([turn.logprobs for turn in turns], 0.0, torch.float32)
    return Generation(
        prompts=prompts,
        input_ids=torch.cat([prompts.input_ids, ids], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, inside], dim=1),
        mask=mask,
        ended=torch.tensor(ended, dtype=torch.bool, device=device),
        logprobs=torch.where(mask, logprobs, 0.0),
    )


def _checked(models: Models, item: Any, prompt: list[int], sample: int) -> Turns:
    """Return the response of one sample, or say what is wrong with it."""
    where = f"{ROLE}: sample {sample}"
    parts = list(item) if isinstance(item, list | tuple) else []
    check(len(parts) == 3, where, "token ids, a mask and log-probabilities", item)
    ids, mask, logprobs = (list(to_python(part)) for part in parts)
    lengths = (len(ids), len(mask), len(logprobs))
    check(len({*lengths}) == 1 and bool(ids), where, "three lists of the same length, 1 or more", lengths)
    check(all(isinstance(flag, bool) for flag in mask) and any(mask), where, "a mask with True once or more", mask)
    numbers = [x for x, chosen in zip(logprobs, mask, strict=True) if chosen]
    check(all(isinstance(x, float) and math.isfinite(x) for x in numbers), where, "finite log-probabilities", numbers)
    _check_ids(where, models, [*prompt, *ids], 0)
    return Turns(ids, mask, logprobs)


def _check_ids(where: str, models: Models, ids: list[int], new: int) -> None:
    """Refuse token ids that the policy does not know, and more than it reads."""
    known = len(models.policy.get_input_embeddings().weight)
    limit = getattr(models.policy.config, "max_position_embeddings", None) or math.inf
    wrong = [token for token in ids if not isinstance(token, int) or not 0 <= token < known]
    check(bool(ids) and not wrong, where, f"one or more token ids in [0, {known})", wrong[:1])
    check(len(ids) + new <= limit, where, f"at most {limit} tokens of prompt and response", len(ids) + new)
