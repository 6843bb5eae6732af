"""Answers of a model, the gold score of each, and the preferences of a noisy judge between two."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppo_fast.quickstart import files, language
from ppo_fast.rlhf.config.ppo import DataConfig, ModelConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.models.models import Models, load_models
from ppo_fast.rlhf.ppo.reward_sources import ModelSource, Responses
from ppo_fast.rlhf.ppo.rollout import Generation, generate
from ppo_fast.rlhf.ppo.scoring import score

WIDTH = 256  # answers sampled at a time


@dataclass(frozen=True)
class Evaluation:
    """A model's reviews of the test prompts."""

    prompts: list[str]  # [M]
    texts: list[str]  # [M] each prompt with its completion
    reward: float  # mean score by the reward model, in its standard deviations over held-out answers
    kl: float  # KL to the fine-tuned model, nats per review
    entropy: float  # nats per word

    @property
    def gold(self) -> float:
        return sum(map(language.score, self.texts)) / len(self.texts)

    @property
    def valid(self) -> float:
        return sum(map(language.is_valid, self.texts)) / len(self.texts)


class Examiner:
    """Compares models on the same prompts, sampled from the same random numbers."""

    def __init__(self, out: Path, seed: int) -> None:
        self.seed, self.prompts = seed, files.read_prompts(out / "test.jsonl")
        self.reference = _load(out / "sft/final", seed)
        self.reward = ModelSource(
            str(out / "reward/final"),
            self.reference.tokenizer,
            model=ModelConfig(),
            device=self.reference.device,
            batch_size=WIDTH,
        )

    def evaluate(self, path: Path) -> Evaluation:
        """Sample one review to each test prompt."""
        models = dataclasses.replace(_load(path, self.seed), reference=self.reference.policy)
        generation = _answer(models, self.prompts, self.seed)
        rollout = score(models, generation, RolloutConfig(micro_batch_size=WIDTH))
        responses = Responses.from_generation(generation, models.tokenizer)
        rewards, (mean, std) = torch.tensor(self.reward(responses)), self.reward.saved_stats
        return Evaluation(
            prompts=self.prompts,
            texts=_texts(self.prompts, responses.completions),
            reward=float((rewards.mean() - mean) / std),
            kl=float(rollout.sums(rollout.logprobs - rollout.ref_logprobs).mean()),
            entropy=float(rollout.entropy.mean()),
        )


def write_preferences(out: Path, count: int, seed: int) -> None:
    """Write pairs.jsonl: two answers of the fine-tuned model to each prompt, in the order of a noisy judge."""
    models, rng = _load(out / "sft/final", seed), random.Random(seed + 1)
    prompts = language.sample_prompts(count, rng, without=files.read_prompts(out / "test.jsonl"))
    first, second = (
        Responses.from_generation(_answer(models, prompts, seed + draw), models.tokenizer).completions
        for draw in (1, 2)
    )
    pairs = []
    for prompt, *answers in zip(prompts, first, second, strict=True):
        if answers[0] != answers[1]:
            chosen, rejected = _in_order(prompt, answers, rng)
            pairs.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    files.write_lines(out / "pairs.jsonl", pairs)


def _in_order(prompt: str, answers: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """(preferred, other), drawn from P(a over b) = sigmoid(gold(a) - gold(b)).

    Source: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs".
    """
    a, b = answers
    gold_a, gold_b = map(language.score, _texts([prompt, prompt], answers))
    return (a, b) if rng.random() < 1 / (1 + math.exp(gold_b - gold_a)) else (b, a)


def _load(path: Path, seed: int) -> Models:
    return load_models(ModelConfig(path=str(path), device="cpu"), torch.Generator().manual_seed(seed))


def _answer(models: Models, prompts: list[str], seed: int) -> Generation:
    data = load_prompts(prompts, models.tokenizer, DataConfig())
    batch = make_batch(data, list(range(len(prompts))), models.pad_id, models.device)
    config = RolloutConfig(micro_batch_size=WIDTH, max_new_tokens=language.MAX_WORDS)
    return generate(models, batch, config, seed)


def _texts(prompts: Sequence[str], completions: Sequence[str]) -> list[Any]:
    return [f"{prompt} {completion}" for prompt, completion in zip(prompts, completions, strict=True)]
