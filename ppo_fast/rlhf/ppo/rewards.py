"""From responses to a reward per token: the sources' scores combined, clip, penalties, filter, KL to the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import KLConfig, RewardConfig
from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.ppo.reward_sources import Responses, Score
from ppo_fast.rlhf.ppo.rollout import Rollout, select
from ppo_fast.rlhf.user_code import as_list, call


@dataclass(frozen=True)
class ScoredBatch:
    """What the sources and the filter make of responses."""

    rows: Tensor  # [B, T] float32: on the tokens that earned them; clipped, less penalties; 0 where masked
    verdicts: list[Any]  # [B] True, False or "mask"
    spread: Tensor | None  # [B] float32

    @property
    def totals(self) -> Tensor:
        """[B] float32."""
        return self.rows.sum(dim=1)


@dataclass(frozen=True)
class Rewards:
    """What a rollout earned."""

    rewards: Tensor  # [B, T] float32: score on the last counted token (or spread) - kl_coef * k1; 0 where masked
    scores: Tensor  # [B] float32: clipped score, penalties included
    kl: Tensor  # [B, T] float32: logprob - ref_logprob; 0 where masked
    kl_coef: Tensor  # 0-d float32: the coefficient these rewards were made with
    completion_ids: list[list[int]]  # [B] the counted tokens of each response, EOS included
    completions: list[str]  # [B] decoded responses without special tokens
    verdicts: list[Any]  # [B] of the filter: True, False (rejected) or "mask"
    spread: Tensor | None  # [B] float32: standard deviation of the sources' scores; None where they are summed


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
        """Steer by the KL [B, T] of the rollout just used."""
        if self.config.adaptive:
            error = (kl.sum(dim=1).mean() / self.config.target - 1).clamp(-0.2, 0.2)
            self.coef = self.coef * (1 + error * len(kl) / self.config.horizon)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        coef = state["coef"]
        self.coef = coef.to(self.coef.device) if isinstance(self.coef, Tensor) else coef


def warn_about_whitening(kl: KLConfig, whiten: bool) -> None:
    """Warn when the loss weighs the KL against advantages that whitening has divided by their deviation.

    In the reward the KL is a part of the advantages, and is divided with the score.
    """
    if kl.in_loss and whiten and kl.coef > 0:
        warnings.warn(
            f"kl.placement: {kl.placement} charges kl.coef times the deviation of the advantages, which "
            "advantage.whiten divides by; set advantage.whiten to false to charge kl.coef itself",
            stacklevel=3,
        )


class Scorer:
    """Every source of reward in one: each normalized, weighted, then combined.

    With weights w, sources s and their sum W = sum_s w_s: sum = sum_s w_s r_s; mean = sum / W; min = the w_s r_s that
    is lowest in total; mean-std = mean - std_coef * sqrt(sum_s w_s (r_s - mean)^2 / W), of the totals.
    Source: Coste et al. 2024, arXiv:2310.02743, section 3.

    Raises UserError when the weights do not fit the sources.
    """

    def __init__(
        self, sources: Sequence[Callable[[Responses], list[Score]]], config: RewardConfig, filter_fn: Any = None
    ) -> None:
        self.sources, self.config, self.filter = sources, config, filter_fn
        count = len(sources)
        weights = config.weights or (1.0,) * count
        check(len(weights) == count, "reward.weights", f"one for each of the {count} sources", config.weights)
        self.weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        self.running = [RunningStats() for _ in sources]

    def __call__(self, responses: Responses, mask: Tensor, *, learn: bool = True) -> ScoredBatch:
        """Score responses whose counted tokens are the True of mask [B, T]; `learn`: take them into the statistics."""
        last, config = _is_last(mask), self.config
        rows, spread = self._combined([self._rows(n, responses, mask, learn) for n in range(len(self.sources))], last)
        if config.clip is not None:
            rows = rows.clamp(-config.clip, config.clip)
        penalty = config.length_penalty * mask.sum(dim=1, dtype=rows.dtype)
        ended = torch.tensor(responses.ended, dtype=torch.bool, device=mask.device)
        penalty = torch.where(ended, penalty, penalty + config.missing_eos_penalty)
        rows = rows - torch.where(last, penalty[:, None], 0.0)
        verdicts = self._verdicts(responses)
        no = [verdict is False for verdict in verdicts]
        rejected = torch.tensor(no, dtype=torch.bool, device=mask.device)[:, None]
        return ScoredBatch(torch.where(rejected, last.to(rows.dtype) * config.rejected_score, rows), verdicts, spread)

    def _combined(self, sources: list[Tensor], last: Tensor) -> tuple[Tensor, Tensor | None]:
        """ScoredBatch [B, T] of all sources in one, and the deviation [B] between them."""
        rows, weights = torch.stack(sources), self.weights.to(last.device)
        weighted = rows * weights[:, None, None]
        if self.config.combine == "sum":
            return weighted.sum(dim=0), None
        mean = weighted.sum(dim=0) / weights.sum()
        deviations = rows.sum(dim=-1) - mean.sum(dim=-1)
        std = ((weights[:, None] * deviations**2).sum(dim=0) / weights.sum()).sqrt()
        if self.config.combine == "min":
            lowest = weighted.sum(dim=-1).argmin(dim=0)
            position = torch.arange(len(last), dtype=torch.int64, device=last.device)
            return weighted[lowest, position], std
        price = self.config.std_coef if self.config.combine == "mean-std" else 0.0
        return mean - torch.where(last, price * std[:, None], 0.0), std

    def _verdicts(self, responses: Responses) -> list[Any]:
        if self.filter is None:
            return [True] * len(responses.completions)
        answer = call("filter", self.filter, **responses.arguments())
        verdicts = as_list("filter", "verdicts", answer, len(responses.completions))
        for sample, verdict in enumerate(verdicts):
            known = isinstance(verdict, bool) or verdict == "mask"
            check(known, "filter", f"True, False or 'mask' for sample {sample}", verdict)
        return verdicts

    def _rows(self, number: int, responses: Responses, mask: Tensor, learn: bool) -> Tensor:
        """ScoredBatch [B, T] of one source, of mean 0 and deviation 1 in total by the statistics at hand."""
        source, running = self.sources[number], self.running[number]
        rows = _spread(source(responses), mask)
        if self.config.normalize == "running" and learn:
            running.update(rows.sum(dim=-1))
        stats = {"running": running.stats(), "dataset": getattr(source, "saved_stats", (0.0, 1.0)), "none": (0.0, 1.0)}
        mean, std = stats[self.config.normalize]
        return torch.where(mask, rows / std, 0.0) - _is_last(mask).to(rows.dtype) * (mean / std)

    def state_dict(self) -> dict[str, Any]:
        return {"running": [stats.state_dict() for stats in self.running]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stats, saved in zip(self.running, state["running"], strict=True):
            stats.load_state_dict(saved)


class RunningStats:
    """Mean and standard deviation of all numbers seen, batch by batch.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Take in values [B]."""
        values = values.double()
        count, mean = len(values), values.mean().item()
        total = self.count + count
        self.squares += ((values - mean) ** 2).sum().item() + (mean - self.mean) ** 2 * self.count * count / total
        self.mean += (mean - self.mean) * count / total
        self.count = total

    def stats(self) -> tuple[float, float]:
        """Mean and population standard deviation; 1 in place of a deviation of 0."""
        return self.mean, (self.squares / max(self.count, 1)) ** 0.5 or 1.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def compute_rewards(rollout: Rollout, tokenizer: Any, scorer: Scorer, kl: KLCoefficient) -> Rewards:
    """Score the responses, then r[t] = score at the last counted token - kl_coef * (logprob - ref_logprob)."""
    mask, responses = rollout.mask, Responses.from_generation(rollout.generation, tokenizer)
    scores = scorer(responses, mask)
    k1 = torch.where(mask, ops.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"), 0.0)
    rewards = scores.rows
    if kl.config.in_reward and (isinstance(kl.coef, Tensor) or kl.coef != 0):
        rewards = rewards - kl.coef * k1
    return Rewards(
        rewards=rewards,
        scores=scores.totals,
        kl=k1,
        kl_coef=torch.as_tensor(kl.coef, dtype=torch.float32, device=mask.device),
        completion_ids=responses.completion_ids,
        completions=responses.completions,
        verdicts=scores.verdicts,
        spread=scores.spread,
    )


def without_masked(rollout: Rollout, rewards: Rewards) -> tuple[Rollout, Rewards]:
    """Leave out the responses that the filter masks; UserError when none is left."""
    rows = [row for row, verdict in enumerate(rewards.verdicts) if verdict != "mask"]
    if len(rows) == len(rewards.verdicts):
        return rollout, rewards
    if not rows:
        raise UserError(f"filter: expected one response or more to be kept, got 'mask' for all {len(rewards.verdicts)}")
    return select(rollout, rows), select(rewards, rows)


def _spread(scores: list[Score], mask: Tensor) -> Tensor:
    """[B, T] float32: a list goes on its tokens, a number on the last counted token."""
    rows = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
    for row, score, length in zip(rows, scores, mask.sum(dim=1).tolist(), strict=True):
        if isinstance(score, list):
            row[:length] = torch.tensor(score, dtype=torch.float32, device="cpu")
        else:
            row[length - 1] = score
    return rows.to(mask.device)


def _is_last(mask: Tensor) -> Tensor:
    """[B, T] bool: the last counted token of each row."""
    return mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
