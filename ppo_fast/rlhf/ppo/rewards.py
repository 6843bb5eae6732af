"""Rewards per token: the scores of all sources combined, clip, penalties, filter, KL to the reference."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import KLConfig, ModelConfig, RewardConfig
from ppo_fast.rlhf.data.packing import Array
from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.reward_sources import ModelSource, Responses, Score, shared_out
from ppo_fast.rlhf.ppo.rollout import Rollout, response_sums, select, token_indices
from ppo_fast.rlhf.training.state import State
from ppo_fast.rlhf.user_code import as_list, call

Verdict = bool | Literal["mask"]  # of the filter: kept, rejected, or left out of the update


@dataclass(frozen=True)
class OwnScores:
    """The scores of B responses before clip and penalties: totals over the tokens of each."""

    names: tuple[str, ...]  # of the S sources
    sources: Tensor  # [B, S] float32: as each source gave them
    combined: Tensor  # [B] float32: of these, in the units of the sources; the number itself of one with weight 1
    unpenalized: Tensor  # [B] float32: of the normalized ones; `rejected_score` where the filter rejects

    def to(self, device: torch.device) -> OwnScores:
        """Return the same on a device."""
        sources, *others = (x.to(device) for x in (self.sources, self.combined, self.unpenalized))
        return OwnScores(self.names, sources, *others)


@dataclass(frozen=True)
class ScoredBatch:
    """The scores and verdicts of B responses of N tokens; tensors on the CPU."""

    per_token_scores: Tensor  # [N] float32: on the tokens that earned them; clipped, less penalties
    totals: Tensor  # [B] float32: their sums
    verdicts: list[Verdict]  # [B]
    std: Tensor | None  # [B] float32: standard deviation of the sources' scores; None where they are summed
    own: OwnScores  # before clip and penalties


@dataclass(frozen=True)
class Rewards:
    """The rewards of a rollout of B responses of N tokens."""

    rewards: Tensor  # [N] float32: score, on the last token or where it was earned, - kl_coef * k1
    scores: Tensor  # [B] float32: clipped score, penalties included
    kl: Tensor  # [N] float32: logprob - ref_logprob
    kl_coef: Tensor  # 0-d float32: the coefficient these rewards were made with
    completion_ids: list[list[int]]  # [B] the counted tokens of each response, EOS included
    completions: list[str]  # [B] decoded responses without special tokens
    verdicts: list[Verdict]  # [B] of the filter
    std: Tensor | None  # [B] float32: standard deviation of the sources' scores; None where they are summed
    own: OwnScores  # before clip and penalties

    def select(self, rows: Array, lengths: Array) -> Rewards:
        """The rewards of these responses; `lengths` [B] are those of all."""
        chosen = token_indices(lengths, rows, self.rewards.device)
        per_response = ("scores", "completion_ids", "completions", "verdicts", "std", "own")
        kept = select({name: getattr(self, name) for name in per_response}, rows)
        return replace(self, rewards=self.rewards.index_select(0, chosen), kl=self.kl.index_select(0, chosen), **kept)


ScoreResponses = Callable[[Responses], ScoredBatch]  # a Scorer, or what remembers its answer


class KLCoefficient:
    """coef, fixed or steered: error = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + error * n / horizon.

    KL is the mean over sequences of the per-sequence sum, n the number of sequences. The steered coefficient is
    a 0-d tensor, so that steering waits for no device. Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, config: KLConfig, device: torch.device) -> None:
        self.config = config
        self.coef: float | Tensor = config.coef
        if config.adaptive:
            self.coef = torch.tensor(config.coef, dtype=torch.float32, device=device)

    def update(self, kl: Tensor) -> None:
        """Steer by the KL [B] of the responses just used."""
        if self.config.adaptive:
            error = (kl.mean() / self.config.target - 1).clamp(-0.2, 0.2)
            self.coef = self.coef * (1 + error * len(kl) / self.config.horizon)

    def state_dict(self) -> State:
        return {"coef": self.coef}

    def load_state_dict(self, state: State) -> None:
        coef = state["coef"]
        self.coef = coef.to(self.coef.device) if isinstance(self.coef, Tensor) else coef


def warn_about_whitening(kl: KLConfig, whiten: bool) -> None:
    """Warn when the loss adds the KL to advantages that whitening has divided by their deviation.

    A KL in the reward is part of the advantages and is divided with the score.
    """
    if kl.in_loss and whiten and kl.coef > 0:
        warnings.warn(
            f"kl.placement: {kl.placement} charges kl.coef times the deviation of the advantages, which "
            "advantage.whiten divides by; set advantage.whiten to false to charge kl.coef itself",
            stacklevel=3,
        )


class Scorer:
    """Combines the sources of reward: each is normalized and weighted first.

    With weights w, sources s and their sum W = sum_s w_s: sum = sum_s w_s r_s; mean = sum / W; min = the w_s r_s that
    is lowest in total; mean-std = mean - std_coef * sqrt(sum_s w_s (r_s - mean)^2 / W), of the totals.
    Source: Coste et al. 2024, arXiv:2310.02743, section 3.

    Raises UserError when the weights do not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[Callable[[Responses], list[Score]]],
        config: RewardConfig,
        filter_fn: Callable[..., Sequence[Verdict]] | None = None,
        *,
        max_new_tokens: int = 0,
    ) -> None:
        self.sources, self.config, self.filter = sources, config, filter_fn
        self.longest = max_new_tokens  # of a response, for the overlong penalty
        count = len(sources)
        weights = config.weights or (1.0,) * count
        check(len(weights) == count, "reward.weights", f"one for each of the {count} sources", config.weights)
        self.weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        self.running = [RunningStats() for _ in sources]
        self.names = source_names(sources)

    def __call__(self, responses: Responses, *, learn: bool = True) -> ScoredBatch:
        """Score responses; `learn`: take them into the running statistics."""
        lengths = torch.tensor([len(ids) for ids in responses.completion_ids], dtype=torch.int64, device="cpu")
        given = torch.stack([_given(source, responses, lengths) for source in self.sources])
        normalized = [self._normalized(n, scores, lengths, learn) for n, scores in enumerate(given)]
        scores, std = self._combined(torch.stack(normalized), lengths)
        *own, combined = (response_sums(each, lengths) for each in (*given, self._combined(given, lengths)[0]))
        plain, config, last = scores, self.config, lengths.cumsum(0) - 1
        if config.clip is not None:
            scores = scores.clamp(-config.clip, config.clip)
        penalty = config.length_penalty * lengths.float()
        if config.overlong_penalty:
            penalty = penalty + config.overlong_penalty * overlong(lengths, self.longest, config.overlong_buffer)
        ended = torch.tensor(responses.ended, dtype=torch.bool, device="cpu")
        penalty = torch.where(ended, penalty, penalty + config.missing_eos_penalty)
        scores = scores.index_add(0, last, -penalty)
        verdicts = shared_out(self._verdicts, responses, whole=hasattr(self.filter, "load_state_dict"))
        no = torch.tensor([verdict is False for verdict in verdicts], dtype=torch.bool, device="cpu")
        rejected = torch.zeros_like(scores).index_fill(0, last, config.rejected_score)
        scores, plain = (torch.where(no.repeat_interleave(lengths), rejected, each) for each in (scores, plain))
        totals, unpenalized = (response_sums(each, lengths) for each in (scores, plain))
        before = OwnScores(self.names, torch.stack(own, dim=1), combined, unpenalized)
        return ScoredBatch(scores, totals, verdicts, std, before)

    def split(self, models: Models, config: ModelConfig) -> None:
        """Split the weights of reward models over the ranks, if they are a process group."""
        for source in self.sources:
            if isinstance(source, ModelSource):
                source.split(models, config)

    def _combined(self, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scores [N] of all S sources in one, from [S, N], and the deviation [B] between them."""
        weights, weighted = self.weights, scores * self.weights[:, None]
        if self.config.combine == "sum":
            return weighted.sum(dim=0), None
        mean = weighted.sum(dim=0) / weights.sum()
        totals = torch.stack([response_sums(source, lengths) for source in scores])
        deviations = totals - response_sums(mean, lengths)
        std = ((weights[:, None] * deviations**2).sum(dim=0) / weights.sum()).sqrt()
        if self.config.combine == "min":
            lowest = torch.stack([response_sums(source, lengths) for source in weighted]).argmin(dim=0)
            return weighted.gather(0, lowest.repeat_interleave(lengths)[None])[0], std
        price = self.config.std_coef if self.config.combine == "mean-std" else 0.0
        return mean.index_add(0, lengths.cumsum(0) - 1, -price * std), std

    def _verdicts(self, responses: Responses) -> list[Verdict]:
        if self.filter is None:
            return [True] * len(responses.completions)
        answer = call("filter", self.filter, **responses.arguments())
        verdicts = as_list("filter", "verdicts", answer, len(responses.completions))
        for sample, verdict in enumerate(verdicts, start=responses.first):
            known = isinstance(verdict, bool) or verdict == "mask"
            check(known, "filter", f"True, False or 'mask' for sample {sample}", verdict)
        return verdicts

    def _normalized(self, number: int, scores: Tensor, lengths: Tensor, learn: bool) -> Tensor:
        """Return the scores [N] of one source, of mean 0 and deviation 1 in total by the statistics at hand."""
        source, running = self.sources[number], self.running[number]
        if self.config.normalize == "running" and learn:
            running.update(response_sums(scores, lengths))
        stats = {"running": running.stats(), "dataset": getattr(source, "saved_stats", (0.0, 1.0)), "none": (0.0, 1.0)}
        mean, std = stats[self.config.normalize]
        shift = torch.full_like(lengths, -mean / std, dtype=scores.dtype)
        return (scores / std).index_add(0, lengths.cumsum(0) - 1, shift)

    def state_dict(self) -> State:
        return {"running": [stats.state_dict() for stats in self.running]}

    def load_state_dict(self, state: State) -> None:
        for stats, saved in zip(self.running, state["running"], strict=True):
            stats.load_state_dict(saved)


def source_names(sources: Iterable[object]) -> tuple[str, ...]:
    """Return a name for the metrics of each source: of its function, or of the directory of its model, and a number."""
    names: list[str] = []
    for source in sources:
        stem = getattr(source, "name", "reward")
        names.append(next(x for n in itertools.count(1) if (x := stem if n == 1 else f"{stem}-{n}") not in names))
    return tuple(names)


def overlong(lengths: Tensor, longest: int, buffer: int | None = None) -> Tensor:
    """Return [B] float32: 0 up to longest - buffer tokens, then rising linearly to 1 at `longest`, and 1 beyond.

    `buffer` None is a fifth of `longest`, as in the paper.
    Source: Yu et al. 2025, arXiv:2503.14476, equation 13, with the sign changed.
    """
    buffer = buffer or max(1, longest // 5)
    return ((lengths - (longest - buffer)).float() / buffer).clamp(0.0, 1.0)


class RunningStats:
    """Mean and standard deviation of all numbers so far, batch by batch.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Add values [B]."""
        values = values.double()
        count, mean = len(values), values.mean().item()
        total = self.count + count
        self.squares += ((values - mean) ** 2).sum().item() + (mean - self.mean) ** 2 * self.count * count / total
        self.mean += (mean - self.mean) * count / total
        self.count = total

    def stats(self) -> tuple[float, float]:
        """Return mean and population standard deviation; 1 in place of a deviation of 0."""
        return self.mean, (self.squares / max(self.count, 1)) ** 0.5 or 1.0

    def state_dict(self) -> State:
        return dict(vars(self))

    def load_state_dict(self, state: State) -> None:
        vars(self).update(state)


def compute_rewards(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, scorer: ScoreResponses, kl: KLCoefficient
) -> Rewards:
    """Score the responses, then r[t] = score at the last counted token - kl_coef * (logprob - ref_logprob)."""
    responses, device = Responses.from_generation(rollout.generation, tokenizer), rollout.logprobs.device
    scores = scorer(responses)
    k1 = ops.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
    rewards = scores.per_token_scores.to(device)
    if kl.config.in_reward and (isinstance(kl.coef, Tensor) or kl.coef != 0):
        rewards = rewards - kl.coef * k1
    return Rewards(
        rewards=rewards,
        scores=scores.totals.to(device),
        kl=k1,
        kl_coef=torch.as_tensor(kl.coef, dtype=torch.float32, device=device),
        completion_ids=responses.completion_ids,
        completions=responses.completions,
        verdicts=scores.verdicts,
        std=None if scores.std is None else scores.std.to(device),
        own=scores.own.to(device),
    )


def without_masked(rollout: Rollout, rewards: Rewards) -> tuple[Rollout, Rewards]:
    """Leave out the responses that the filter masks; UserError when none is left."""
    rows = np.array([row for row, verdict in enumerate(rewards.verdicts) if verdict != "mask"], dtype=np.int64)
    if len(rows) == len(rewards.verdicts):
        return rollout, rewards
    if not len(rows):
        raise UserError(f"filter: expected one response or more to be kept, got 'mask' for all {len(rewards.verdicts)}")
    return rollout.select(rows), rewards.select(rows, rollout.grid.lengths)


def without_truncated(rollout: Rollout, rewards: Rewards) -> tuple[Rollout, Rewards] | None:
    """Leave out the responses without an EOS or a stop string; None when none is left."""
    rows = rollout.generation.ended.cpu().numpy().nonzero()[0]
    if not len(rows):
        return None
    if len(rows) == len(rewards.verdicts):
        return rollout, rewards
    return rollout.select(rows), rewards.select(rows, rollout.grid.lengths)


def _given(source: Callable[[Responses], list[Score]], responses: Responses, lengths: Tensor) -> Tensor:
    """Return the scores [N] of a source, each rank's of its share of the responses."""
    whole = hasattr(getattr(source, "function", None), "load_state_dict")
    return _per_token(shared_out(source, responses, whole=whole), lengths)


def _per_token(scores: list[Score], lengths: Tensor) -> Tensor:
    """Return [N] float32: a list goes on its tokens, a number on the last token of its response."""
    found = torch.zeros(int(lengths.sum()), dtype=torch.float32, device="cpu")
    for tokens, score in zip(found.split(lengths.tolist()), scores, strict=True):
        if isinstance(score, list):
            tokens.copy_(torch.tensor(score, dtype=torch.float32, device="cpu"))
        else:
            tokens[-1] = score
    return found
