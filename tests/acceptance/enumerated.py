"""A task whose optimum is a sum: two tokens of 16, a table of scores, and a price of the KL to the model at the start.

The best value of E[score] - beta * KL(policy || reference) is beta * log sum_y reference(y) exp(score(y) / beta), and
the policy that has it is reference(y) exp(score(y) / beta) up to its sum.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_fast.rlhf import PPOResult, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny

WORDS = [f"w{i}" for i in range(12)]
V, EOS, BETA = 16, 2, 0.5
PROMPTS = WORDS[:4]
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "rollout": {"batch_size": 256, "samples_per_prompt": 8, "max_new_tokens": 2},
    "reward": {"missing_eos_penalty": 0.0},
    "kl": {"coef": BETA},
    "loss": {"aggregation": "seq-mean-token-sum"},
    "advantage": {"kind": "group"},
    "optim": {
        "lr": 5e-3,
        "value_lr": 5e-3,
        "epochs": 2,
        "minibatch_size": 128,
        "warmup_frac": 0.0,
        "final_lr_frac": 0.0,
    },
}


def score(prompt: str, ids: list[int]) -> float:
    """A number in [0, 1] for one of 1 + 15 * 16 responses."""
    mixed = 7 * int(prompt[1:]) + sum(weight * token for weight, token in zip((5, 3), ids, strict=False))
    return (mixed * mixed % 101) / 100


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [score(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def responses() -> list[list[int]]:
    """All of them: EOS, or two tokens of which the first is none."""
    return [[EOS]] + [[a, b] for a in range(V) if a != EOS for b in range(V)]


@torch.no_grad()
def log_probabilities(policy: Any, tokenizer: Any, prompt: str) -> Tensor:
    """[241] float64, in the order of `responses`."""
    ids = tokenizer(prompt).input_ids
    first = policy(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    second = policy(torch.tensor([[*ids, a] for a in range(V)])).logits[:, -1].double().log_softmax(-1)
    return torch.stack([first[y[0]] + (second[y[0], y[1]] if len(y) > 1 else 0.0) for y in responses()])


def values(policy: Any, reference: Any, tokenizer: Any, beta: float) -> tuple[float, float]:
    """Mean over the prompts of E[score] - beta * KL: of the policy, and the best there is."""
    found, best = [], []
    for prompt in PROMPTS:
        scores = torch.tensor([score(prompt, y) for y in responses()], dtype=torch.float64)
        p, q = (log_probabilities(model, tokenizer, prompt) for model in (policy, reference))
        found.append((p.exp() * (scores - beta * (p - q))).sum())
        best.append(beta * (q + scores / beta).logsumexp(0) if beta else scores.max())
    return float(torch.stack(found).mean()), float(torch.stack(best).mean())


def train(directory: Path, seed: int, updates: int, **changes: Any) -> tuple[PPOResult, float, float]:
    """The result with the value of its policy and the best one."""
    log = {"tensorboard": False, "console": False}
    merged = {
        name: group | changes.get(name, {}) if isinstance(group, dict) else group for name, group in SETTINGS.items()
    }
    config = config_from_dict(merged | {"updates": updates, "seed": seed, "output_dir": str(directory), "log": log})
    policy, start = (tiny.make_model(V, hidden=32, layers=1, heads=2, seed=seed) for _ in range(2))
    tokenizer = tiny.make_tokenizer(WORDS)
    result = train_ppo(config, reward_fn=reward, prompts=PROMPTS, policy=policy, tokenizer=tokenizer)
    return result, *values(policy, start, tokenizer, config.kl.coef)
