"""Where scores come from: Python functions and reward models."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ppo_fast.rlhf.config.ppo import ModelConfig, PPOConfig
from ppo_fast.rlhf.data.examples import continued, ended, split_tokens
from ppo_fast.rlhf.data.rows import Columns, Prompt, Row
from ppo_fast.rlhf.data.templates import encode, encode_bare, render, render_prompt
from ppo_fast.rlhf.errors import NotFiniteError, UserError
from ppo_fast.rlhf.models.adapters import Adapters
from ppo_fast.rlhf.models.kernels import kernels_of, use_kernels
from ppo_fast.rlhf.models.loading import load_tokenizer, saved_eos_ids
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.models.networks import networks_of_rank
from ppo_fast.rlhf.models.offload import Offloaded
from ppo_fast.rlhf.models.reward import RewardNetwork, make_reward_network
from ppo_fast.rlhf.models.saved import SavedModel
from ppo_fast.rlhf.models.sharding import Root, shard
from ppo_fast.rlhf.models.value import sequence_scores
from ppo_fast.rlhf.ppo.rollout import Generation, counted_ids
from ppo_fast.rlhf.user_code import as_list, call_async, load_callable, to_python
from ppo_fast.rlhf.world import by_all_ranks, current

REWARD_ROWS = 16  # in a batch of a reward model, if rollout.micro_batch_size is null
PromptRows = Iterable[str | Row]  # texts, or rows {"prompt": Prompt, column: ...}
RewardFunction = Callable[..., Sequence[float | Sequence[float]]]
Score = float | list[float]  # of a response, or of each of its tokens


@dataclass(frozen=True)
class Responses:
    """Responses to be scored; lists of the same length B."""

    prompts: list[Prompt]  # as given
    prompt_ids: list[list[int]]
    completions: list[str]  # decoded, without special tokens
    completion_ids: list[list[int]]  # the counted tokens, EOS included
    ended: list[bool]  # there is an EOS or a stop string
    columns: Columns  # the other keys of the prompts' rows
    whole_ids: list[list[int]] | None = (
        None  # with the tokens that a rollout function put between; None: there are none
    )
    first: int = 0  # number of the first one among those of all ranks

    @property
    def response_ids(self) -> list[list[int]]:
        """Return all tokens of each response, chosen by the policy or not."""
        return self.whole_ids or self.completion_ids

    @classmethod
    def from_generation(cls, generation: Generation, tokenizer: PreTrainedTokenizerBase) -> Responses:
        prompts = generation.prompts
        ids, inside = counted_ids(generation.responses, generation.mask), generation.attention_mask
        whole = counted_ids(generation.responses, inside[:, -generation.mask.shape[1] :])
        return cls(
            prompts=prompts.prompts,
            prompt_ids=counted_ids(prompts.input_ids, prompts.attention_mask),
            completions=tokenizer.batch_decode(whole, skip_special_tokens=True),
            completion_ids=ids,
            ended=generation.ended.tolist(),
            columns=prompts.columns,
            whole_ids=whole,
        )

    def part(self, rows: range) -> Responses:
        """Return these consecutive responses."""
        cut = slice(rows.start, rows.stop)
        lists = {name: value[cut] for name, value in vars(self).items() if isinstance(value, list)}
        columns = {name: values[cut] for name, values in self.columns.items()}
        return dataclasses.replace(self, **lists, columns=columns, first=self.first + rows.start)

    def arguments(self) -> dict[str, object]:
        """Return the arguments of a user's function of responses."""
        return {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            **self.columns,
        }


def shared_out(function: Callable[[Responses], list[Any]], responses: Responses, *, whole: bool) -> list[Any]:
    """Return the answers of a function to B responses, [B]; each rank asks for its share, and all get all answers.

    `whole`: the function has a state, which rank 0 keeps; it asks for all. An error is raised on all ranks.
    """
    world, count = current(), len(responses.completions)
    if world.size == 1:
        return function(responses)
    own = range(count if world.is_main else 0) if whole else world.share(count)
    # A reward model that is split needs every rank, also one without responses.
    asks = len(own) or isinstance(function, ModelSource)
    parts = world.together(lambda: function(responses.part(own)) if asks else [])
    return [answer for part in parts for answer in part]


class FunctionSource:
    """A user's reward function, its answer checked."""

    saved_stats = (0.0, 1.0)

    def __init__(self, function: RewardFunction, timeout: float | None = None) -> None:
        self.function, self.timeout = function, timeout
        name = getattr(function, "__name__", type(function).__name__)
        self.name = name if name.isidentifier() else "function"  # of its metrics; a lambda has none

    def __call__(self, responses: Responses) -> list[Score]:
        answer = call_async("reward function", self.function, "reward.timeout", self.timeout, **responses.arguments())
        scores = as_list("reward function", "scores", answer, len(responses.completions))
        pairs = zip(scores, responses.completion_ids, strict=True)
        return [_checked(score, ids, sample) for sample, (score, ids) in enumerate(pairs, start=responses.first)]


class ModelSource:
    """A sequence-classification model with one output, read at the last counted token of prompt and response.

    It gets the token ids if its tokenizer has the policy's vocabulary, else the text, encoded by its own tokenizer and
    chat template like its training data. A response that ended, even by a stop
    string, gets an EOS as its last token; a truncated one gets none, and no end of turn.
    """

    def __init__(
        self,
        path: str | SavedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: ModelConfig,
        device: torch.device,
        batch_size: int,
        eos_ids: Sequence[int] = (),
        adapters: Adapters | None = None,
    ) -> None:
        saved = SavedModel("reward.models", path, model.trust_remote_code) if isinstance(path, str) else path
        self.model, self.present, self.shared = _load_network(saved, model, device, adapters)
        self.root, self.network = Root(reward=self.model), "reward"
        self.tokenizer, self.own = tokenizer, load_tokenizer(saved)
        self.same = self.own.get_vocab() == tokenizer.get_vocab()
        own_eos_ids = saved_eos_ids(str(saved.path), self.own, self.model.backbone.config)
        self.eos_ids = {*eos_ids, tokenizer.eos_token_id} if self.same else own_eos_ids
        self.path, self.batch_size, self.device = str(saved.path), batch_size, device
        self.saved_stats = saved.stats
        parts = [part for part in Path(self.path).parts if part not in ("final", "best")]
        self.name = parts[-1] if parts else "model"  # of its metrics: RUN/final is called by the run

    def split(self, models: Models, config: ModelConfig) -> None:
        """Split the weights over the ranks, if they are a process group; those of an adapter are with the policy's."""
        mesh = current().mesh
        if self.shared:
            self.root, self.network = models.root("policy"), "policy"
        elif mesh is not None:
            shard(self.root, mesh, offload=config.offload)
            run = functools.partial(self.root.run, self.network)
            use_kernels(self.model.backbone, like_policy(models), run, self.device)

    @torch.no_grad()
    def __call__(self, responses: Responses) -> list[Score]:
        rows = current().together(lambda: self.encode(responses))[current().rank]  # no rank goes on if one cannot
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # batches of like length
        scores: list[Score] = [0.0] * len(rows)
        with self.present():
            batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
            found = [self._scores([rows[row] for row in chosen]) for chosen in batches]
            for _ in range(max(current().objects(len(batches))) - len(batches)):
                self._scores([[0]])  # the other ranks' batches need the weights of this one
        for chosen, answers in zip(batches, found, strict=True):
            for row, score in zip(chosen, answers, strict=True):
                if not math.isfinite(score):
                    sample = responses.first + row
                    where = f"{self.path}: expected a finite score for sample {sample}, got {score}"
                    raise NotFiniteError(where, [sample])
                scores[row] = score
        return scores

    def encode(self, responses: Responses) -> list[list[int]]:
        """Return the token ids of each prompt with its response, as this model reads them."""
        encode_row = self._joined if self.same else self._encoded
        rows = [encode_row(responses, row) for row in range(len(responses.prompts))]
        width = max(map(len, rows), default=0)
        limit = getattr(self.model.backbone.config, "max_position_embeddings", width)
        if width > limit:
            raise UserError(f"{self.path}: expected at most {limit} tokens of prompt and response, got {width}")
        return rows

    def _joined(self, responses: Responses, row: int) -> list[int]:
        """Return the policy's token ids of one prompt and its response."""
        ids = responses.prompt_ids[row] + responses.response_ids[row]
        missing = responses.ended[row] and ids[-1] not in self.eos_ids
        return [*ids, self.tokenizer.eos_token_id] if missing else ids

    def _encoded(self, responses: Responses, row: int) -> list[int]:
        """Return the token ids of one prompt and its response by the model's own tokenizer."""
        prompt, own = responses.prompts[row], self.own
        if isinstance(prompt, str):
            start, rest, _ = split_tokens(prompt, self._spaced(responses, row), own, encode)
            return start + self._closed(responses, row, rest)
        if own.chat_template is None:
            ids = responses.prompt_ids[row] + responses.response_ids[row]
            return self._closed(responses, row, encode(self.tokenizer.decode(ids, skip_special_tokens=True), own))
        columns = {name: values[row] for name, values in responses.columns.items()}
        if responses.ended[row]:
            answer = {"role": "assistant", "content": responses.completions[row]}
            text = render(continued(prompt, [answer]), own, self.path, columns)
        else:
            text = render_prompt(prompt, own, self.path, columns) + responses.completions[row]
        return self._closed(responses, row, encode_bare(text, own))

    def _closed(self, responses: Responses, row: int, ids: list[int]) -> list[int]:
        return ended(ids, self.own, self.eos_ids) if responses.ended[row] else ids

    def _spaced(self, responses: Responses, row: int) -> str:
        """Return the text of a response with its leading space, which decoding drops without the prompt."""
        special, prompt_ids = {*self.tokenizer.all_special_ids}, responses.prompt_ids[row]
        kept = [token for token in responses.response_ids[row] if token not in special]
        before, whole = (self.tokenizer.decode(ids) for ids in (prompt_ids, prompt_ids + kept))
        return whole[len(before) :] if whole.startswith(before) else responses.completions[row]

    def _scores(self, rows: list[list[int]]) -> list[float]:
        width, device = max(map(len, rows)), self.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.int64, device=device)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
        attention_mask = torch.arange(width, dtype=torch.int64, device=device) >= width - lengths[:, None]
        return self.root.run(self.network, lambda _: sequence_scores(self.model, ids, attention_mask)).float().tolist()


Source = FunctionSource | ModelSource


def _load_network(
    saved: SavedModel, config: ModelConfig, device: torch.device, adapters: Adapters | None
) -> RewardNetwork:
    """The reward model on the device, or in host memory until it is used."""
    made = make_reward_network(saved, networks_of_rank(config, device), adapters)
    if made.shared or current().mesh is not None:  # `split` offloads shares, and gives a split network its kernels
        return made
    if config.offload:
        made = made._replace(present=Offloaded(made.network, device).present)
    else:
        made = made._replace(network=made.network.to(device))
    with made.present():
        use_kernels(made.network.backbone, config.kernels)
    return made


@by_all_ranks
def load_sources(config: PPOConfig, models: Models, function: RewardFunction | None = None) -> list[Source]:
    """Return the function, passed or named, and then the reward models; UserError when there is neither."""
    reward, sources = config.reward, list[Source]()
    if function is not None or reward.function is not None or not reward.models:
        sources.append(FunctionSource(function or load_callable(reward.function, "reward.function"), reward.timeout))
    options: dict[str, Any] = {
        "model": dataclasses.replace(config.model, kernels=like_policy(models)),
        "device": models.device,
        "batch_size": config.rollout.micro_batch_size or REWARD_ROWS,
        "adapters": models.adapters,
        "eos_ids": models.eos_ids,
    }
    known: dict[str | None, SavedModel] = {saved.path: saved for saved in models.rewards}
    return sources + [ModelSource(known.get(path, path), models.tokenizer, **options) for path in reward.models]


def like_policy(models: Models) -> Literal["auto", "none"]:
    """Return the kernels of a reward model: the policy's, if it can have them."""
    return "auto" if kernels_of(models.policy) == "liger" else "none"


def _checked(score: object, ids: list[int], sample: int) -> Score:
    """Return a finite number, or a list of one per token."""
    if not isinstance(score, list | tuple):
        return _number(score, sample)
    values = [_number(value, sample) for value in score]
    if len(values) != len(ids):
        raise UserError(
            f"reward function: expected {len(ids)} scores for the tokens of sample {sample}, got {len(values)}"
        )
    return values


def _number(value: Any, sample: int) -> float:
    value = to_python(value)
    try:
        finite = math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        kind = NotFiniteError if isinstance(value, int | float) else UserError
        raise kind(f"reward function: expected a finite score for sample {sample}, got {value!r}")
    return float(value)
