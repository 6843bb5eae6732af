"""Scores, and the KL to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ppo_fast.rlhf.config.base import Settings
from ppo_fast.rlhf.errors import check, not_negative, positive


@dataclass(frozen=True)
class RewardConfig(Settings):
    """The score of a response, before the KL term: sources, normalized, weighted, combined, clipped, less penalties."""

    GROUP = "reward"

    function: str | None = None  # "path/to/file.py:function" or "module:function", as ppo_fast.rewards:exact_answer
    timeout: float | None = 600.0  # seconds that an `async def` function may take for a batch; null: no limit
    models: tuple[str, ...] = ()  # sequence-classification models with one output; the critic starts from the first
    weights: tuple[float, ...] = ()  # one per source, the function first; none: 1 each
    combine: Literal["sum", "mean", "min", "mean-std"] = "sum"  # of the sources; mean-std: mean - std_coef * std
    std_coef: float = 1.0  # price of disagreement
    normalize: Literal["dataset", "running", "none"] = "dataset"  # by a model's reward_stats.json; by all scores so far
    clip: float | None = 10.0  # scores are clipped to +-clip; null: not clipped
    missing_eos_penalty: float = 1.0  # subtracted, after the clip, if the response has no EOS: was cut short; 0: none
    length_penalty: float = 0.0  # subtracted, after the clip, per token of the response
    overlong_penalty: float = 0.0  # subtracted, after the clip, at max_new_tokens; less, linearly, within the buffer
    overlong_buffer: int | None = None  # tokens before max_new_tokens; null: a fifth of it
    filter: str | None = None  # named as function -> True (keep), False (reject) or "mask" for each response
    rejected_score: float = -10.0  # of a response that the filter rejects, in place of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timeout is not None:
            positive("reward.timeout", self.timeout)
        if self.clip is not None:
            positive("reward.clip", self.clip)
        for name in ("missing_eos_penalty", "length_penalty", "overlong_penalty", "std_coef"):
            not_negative(f"reward.{name}", getattr(self, name))
        if self.overlong_buffer is not None:
            positive("reward.overlong_buffer", self.overlong_buffer)
        check(math.isfinite(self.rejected_score), "reward.rejected_score", "a finite number", self.rejected_score)
        for weight in self.weights:
            not_negative("reward.weights", weight)
        check(not self.weights or sum(self.weights) > 0, "reward.weights", "one above 0", self.weights)


@dataclass(frozen=True)
class KLConfig(Settings):
    """KL(policy || reference): a per-token reward, a loss term, or both. The reward takes k1: others would bias it."""

    GROUP = "kl"

    coef: float = 0.05  # start value when adaptive
    placement: Literal["reward", "loss", "both"] = "reward"  # in the loss whitening scales it by std(advantages)
    loss_estimator: str = "k2"  # k2, full (exact, by the reference logits), or k3 for parity with GRPO
    adaptive: bool = False  # steer coef towards the target
    target: float = 6.0  # nats per sequence
    horizon: int = 10_000  # sequences; larger is slower

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("kl.coef", self.coef)
        check(
            self.loss_estimator in ("k2", "k3", "full"),
            "kl.loss_estimator",
            "'k2', 'full' or 'k3' (the gradient of k1 is zero in expectation)",
            self.loss_estimator,
        )
        positive("kl.target", self.target)
        positive("kl.horizon", self.horizon)
        check(not self.adaptive or self.coef > 0, "kl.coef", "a number > 0 when kl.adaptive", self.coef)

    @property
    def in_reward(self) -> bool:
        return self.placement != "loss"

    @property
    def in_loss(self) -> bool:
        return self.placement != "reward"


@dataclass(frozen=True)
class ReferenceConfig(Settings):
    """What the KL is measured against: the model at the start, or one that follows the policy."""

    GROUP = "reference"

    update: Literal["fixed", "replace", "ema"] = "fixed"  # replace: by the policy; ema: a moving average of it
    every: int = 10  # updates between two changes
    decay: float = 0.9  # ema: reference = decay * reference + (1 - decay) * policy; bfloat16 loses small changes

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("reference.every", self.every)
        check(0 <= self.decay < 1, "reference.decay", "0 <= decay < 1", self.decay)
