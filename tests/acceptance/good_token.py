"""The good-token task: a new Llama, V 64, D 64, 2 layers, learns to write five tokens and nothing else.

16 tokens a response, 64 responses an update; the score is the number of good tokens / 16: 0.08 by chance, 1 at best.
"""

from pathlib import Path
from typing import Any

from ppo_fast.rlhf import PPOConfig, PPOResult, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny

WORDS = [f"w{i}" for i in range(60)]  # each is a prompt of one token
GOOD = (10, 20, 30, 40, 50)  # token ids
LENGTH = 16
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "model": {"value_head": "zero"},
    "rollout": {"batch_size": 64, "max_new_tokens": LENGTH},
    "reward": {"missing_eos_penalty": 0.0},
    "kl": {"coef": 0.0},
    "optim": {
        "lr": 4e-3,
        "value_lr": 4e-3,
        "epochs": 4,
        "minibatch_size": 16,
        "warmup_frac": 0.0,
        "final_lr_frac": 0.0,
    },
}


def share_of_good_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token in GOOD for token in ids) / LENGTH for ids in completion_ids]


def make_policy(seed: int) -> Any:
    return tiny.make_model(64, hidden=64, layers=2, heads=4, seed=seed)


def config(directory: Path, seed: int, updates: int = 20, **changes: Any) -> PPOConfig:
    """The task's run, quiet, with other values for the fields of the groups in `changes`."""
    log = {"tensorboard": False, "console": False}
    merged = {
        name: values | changes.get(name, {}) if isinstance(values, dict) else values
        for name, values in SETTINGS.items()
    }
    return config_from_dict({**merged, "updates": updates, "seed": seed, "output_dir": str(directory), "log": log})


def train(settings: PPOConfig, reward: Any = share_of_good_tokens, policy: Any = None) -> PPOResult:
    policy, tokenizer = policy or make_policy(settings.seed), tiny.make_tokenizer(WORDS)
    return train_ppo(settings, reward_fn=reward, prompts=WORDS, policy=policy, tokenizer=tokenizer)
