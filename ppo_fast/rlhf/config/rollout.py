"""Prompts, and how they are answered."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ppo_fast.rlhf.config.base import Settings, check_renames, check_tokens_per_pass
from ppo_fast.rlhf.errors import check, divides, not_negative, positive


@dataclass(frozen=True)
class DataConfig(Settings):
    """Prompts: rows {"prompt": text or role/content messages, ...} of JSONL, Parquet, a saved dataset, or the Hub."""

    GROUP = "data"

    prompts: str | None = None  # path or NAME[:SPLIT] of a Hub dataset; the other columns go to the reward function
    columns: tuple[str, ...] = ()  # columns to rename, prompt=question (YAML: {prompt: question})
    subset: str | None = None  # configuration of a Hub dataset
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted
    deduplicate: bool = False  # drop prompts that repeat an earlier one, token by token
    shuffle: bool = True  # a new order every epoch
    order: str | None = None  # curriculum, easy prompts first: a column of numbers, or a function, as reward.function
    balance: str | None = None  # column of topics; every topic is drawn equally often

    def __post_init__(self) -> None:
        super().__post_init__()
        check_renames(self.columns)
        positive("data.max_prompt_tokens", self.max_prompt_tokens)


Engine = Literal["slots", "generate", "vllm"]
CorrectionKind = Literal["none", "truncate", "mask"]


@dataclass(frozen=True)
class RolloutConfig(Settings):
    """Sampling from softmax(logits / temperature)."""

    GROUP = "rollout"

    batch_size: int = 64  # responses per update
    function: str | None = None  # "file.py:function" that makes the responses, by tools and turns; null: one turn
    samples_per_prompt: int = 1  # responses to the same prompt; divides batch_size
    micro_batch_size: int | None = None  # slots, and sequences per pass of scoring; null: all, as the update to score
    tokens_per_pass: int | None = None  # of scoring, in place of micro_batch_size; null: by that
    max_new_tokens: int = 64  # a response without EOS ends here
    mask_truncated: bool = False  # leave such responses out of losses, whitening and groups; their metrics count
    stop: tuple[str, ...] = ()  # strings that end a response as EOS does; they belong to it
    dynamic_sampling: int = 0  # group: tries to replace prompts whose samples all have one score; 0: they stay
    engine: Engine | None = None  # null: slots, else generate; vllm: a second copy, a resumed run may differ in bits
    temperature: float = 1.0  # divides the logits in sampling, scoring and the update alike
    top_k: int | None = None  # keep the k likeliest tokens; biases the ratio
    top_p: float | None = None  # keep the likeliest tokens of total probability p; biases the ratio
    correction: CorrectionKind | None = None  # of sampled for trained probabilities; null: truncate for vllm, else none
    correction_cap: float = 2.0  # truncate: weights of the policy loss are min(pi_train / pi_sampled, cap)
    correction_band: tuple[float, float] = (0.5, 2.0)  # mask: tokens with a weight outside are left out of the update
    correction_level: Literal["token", "sequence"] = "token"  # sequence: the product of a response's weights

    def __post_init__(self) -> None:
        super().__post_init__()
        divides("rollout.samples_per_prompt", self.samples_per_prompt, "rollout.batch_size", self.batch_size)
        positive("rollout.max_new_tokens", self.max_new_tokens)
        not_negative("rollout.dynamic_sampling", self.dynamic_sampling)
        check(all(self.stop), "rollout.stop", "strings that are not empty", self.stop)
        allowed = 1e-9 <= self.temperature <= 1e9
        check(allowed, "rollout.temperature", "1e-9 <= temperature <= 1e9", self.temperature)
        check(self.top_k is None or self.top_k >= 1, "rollout.top_k", "an int >= 1 or null", self.top_k)
        check(self.top_p is None or 0 < self.top_p <= 1, "rollout.top_p", "0 < top_p <= 1 or null", self.top_p)
        if self.micro_batch_size is not None:
            positive("rollout.micro_batch_size", self.micro_batch_size)
        check_tokens_per_pass("rollout", self.tokens_per_pass, self.micro_batch_size)
        low, high = self.correction_band
        check(1 <= self.correction_cap < math.inf, "rollout.correction_cap", "a number >= 1", self.correction_cap)
        around = 0 <= low <= 1 <= high < math.inf
        check(around, "rollout.correction_band", "two numbers, 0 <= low <= 1 <= high", self.correction_band)
        if self.engine == "vllm":
            own = "with rollout.engine 'vllm'"
            check(self.function is None, "rollout.function", f"null {own}", self.function)
            # It would sample at 0.01 in place of a lower temperature.
            check(self.temperature >= 0.01, "rollout.temperature", f"0.01 or more {own}", self.temperature)

    def resolved(self) -> RolloutConfig:
        """Return the settings with the correction that null means for `vllm`, whose log-probabilities differ."""
        chosen = "truncate" if self.engine == "vllm" and self.correction is None else self.correction
        return replace(self, correction=chosen)
