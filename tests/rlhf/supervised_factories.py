"""Rows, examples and tiny models for the tests of SFT, reward model and DPO."""

import random

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_fast.rlhf import DPOConfig, RewardModelConfig, SFTConfig, train_dpo, train_reward_model, train_sft
from ppo_fast.rlhf.data.examples import Example, Pair
from ppo_fast.rlhf.models import tiny

EOS = 2
WORDS = [f"w{i}" for i in range(60)]
STAGES = {
    "sft": (train_sft, SFTConfig, AutoModelForCausalLM),
    "reward": (train_reward_model, RewardModelConfig, AutoModelForSequenceClassification),
    "dpo": (train_dpo, DPOConfig, AutoModelForCausalLM),
}


def words(rng, low, high):
    return "".join(f" w{rng.randrange(low, high)}" for _ in range(rng.randint(1, 5)))


def rows(count, seed=0):
    """Rows of every format at once: good answers have words below 20, bad ones from 40."""
    rng = random.Random(seed)
    fields = [("prompt", 0, 60), ("completion", 0, 20), ("chosen", 0, 20), ("rejected", 40, 60)]
    return [{name: words(rng, *span) for name, *span in fields} for _ in range(count)]


def make_model(**options):
    return tiny.make_model(64, hidden=32, layers=1, heads=2, **options)


def make_tokenizer():
    return tiny.make_tokenizer(WORDS)


def random_example(rng, prompt, completion):
    return Example((*(rng.randrange(4, 64) for _ in range(prompt + completion - 1)), EOS), prompt)


def ragged(count=6, seed=0):
    rng = random.Random(seed)
    return [random_example(rng, rng.randint(1, 6), rng.randint(1, 6)) for _ in range(count)]


def pairs(count=6, margin=0.0):
    return [Pair(a, b, margin) for a, b in zip(ragged(count), ragged(count, 1), strict=True)]
