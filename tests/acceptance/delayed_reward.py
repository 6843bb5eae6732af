"""The delayed-reward task: the first of 64 tokens decides, 63 neutral ones follow, and the score comes with the last.

With lam 0.95 the first token sees 0.95^63 = 4 % of the score; the rest must come through the value model.

    python -m tests.acceptance.delayed_reward [UPDATES]     # the table of all kinds of advantages, three seeds
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny

WORDS = [f"w{i}" for i in range(12)]
V, EOS, GOOD, LENGTH, UPDATES = 16, 2, (5, 9), 64, 50
WARMUP = 3
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "model": {"value_head": "zero"},
    "rollout": {"batch_size": 64, "samples_per_prompt": 8, "max_new_tokens": LENGTH},
    "reward": {"missing_eos_penalty": 0.0},
    "kl": {"coef": 0.0},
    "loss": {"value_clip": None},
    "optim": {
        "lr": 5e-3,
        "value_lr": 5e-3,
        "epochs": 4,
        "minibatch_size": 32,
        "warmup_frac": 0.0,
        "final_lr_frac": 0.0,
    },
}
PLAIN, READY = "gae, lam 0.95", "gae, lam 0.95, value_lam 1, warm-up"
KINDS: dict[str, dict[str, Any]] = {
    READY: {"advantage": {"value_lam": 1.0}, "optim": {"critic_warmup_updates": WARMUP}},
    "gae, lam 0.95, value_lam 1": {"advantage": {"value_lam": 1.0}},
    PLAIN: {},
    "gae, lam adaptive": {"advantage": {"lam": "adaptive"}},
    "gae, lam adaptive, value_lam 1": {"advantage": {"lam": "adaptive", "value_lam": 1.0}},
    "gae, lam 1": {"advantage": {"lam": 1.0}},
    "gae, lam 1, cispo": {"advantage": {"lam": 1.0}, "loss": {"objective": "cispo"}},
    "sequence": {"advantage": {"kind": "sequence"}},
    "group": {"advantage": {"kind": "group"}},
    "group, leave_one_out": {"advantage": {"kind": "group", "leave_one_out": True}},
    "group, divide_by_std": {"advantage": {"kind": "group", "divide_by_std": True}},
    "group, cispo": {"advantage": {"kind": "group"}, "loss": {"objective": "cispo"}},
}


def first_is_good(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] in GOOD) for ids in completion_ids]


def make_policy(seed: int) -> Any:
    """A Llama that never writes EOS, so that every response has 64 tokens."""
    model = tiny.make_model(V, hidden=32, layers=1, heads=2, seed=seed)
    head = nn.Linear(32, V)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[EOS] = -1e4
    head.bias.requires_grad_(False)
    model.lm_head = head
    return model


def train(directory: Path, seed: int, kind: str, updates: int = UPDATES) -> list[float]:
    """The mean score of each update."""
    changes = KINDS[kind]
    merged = {
        name: group | changes.get(name, {}) if isinstance(group, dict) else group for name, group in SETTINGS.items()
    } | {name: group for name, group in changes.items() if name not in SETTINGS}
    log = {"tensorboard": False, "console": False}
    config = config_from_dict(merged | {"updates": updates, "seed": seed, "output_dir": str(directory), "log": log})
    tokenizer, policy = tiny.make_tokenizer(WORDS), make_policy(seed)
    result = train_ppo(config, reward_fn=first_is_good, prompts=WORDS, policy=policy, tokenizer=tokenizer)
    return [metrics["objective/scores"] for metrics in result.history]


def train_all(directory: Path, kind: str, updates: int = UPDATES) -> list[list[float]]:
    """The scores of three seeds."""
    return [train(directory / f"{kind} {seed}", seed, kind, updates) for seed in range(3)]


def smooth(scores: list[float], width: int = 3) -> list[float]:
    """The mean of each update and the two before it."""
    return [sum(scores[max(0, end - width) : end]) / min(end, width) for end in range(1, len(scores) + 1)]


def reached(scores: list[float], level: float) -> int | None:
    """The update, from 1, whose smoothed score is `level`."""
    return next((number for number, score in enumerate(smooth(scores), start=1) if score >= level), None)


def mean(curves: list[list[float]]) -> list[float]:
    return [sum(scores) / len(scores) for scores in zip(*curves, strict=True)]


def main() -> None:
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else UPDATES
    print("| advantages | updates to 0.3 | updates to 0.5 | score of the last three updates | mean |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            print(row(kind, train_all(Path(scratch), kind, updates)), flush=True)


def row(kind: str, curves: list[list[float]]) -> str:
    """A line of the table, seed by seed."""
    columns = [", ".join(str(reached(curve, level) or "-") for curve in curves) for level in (0.3, 0.5)]
    final = [smooth(curve)[-1] for curve in (*curves, mean(curves))]
    return f"| {kind} | {columns[0]} | {columns[1]} | {', '.join(f'{x:.2f}' for x in final[:-1])} | {final[-1]:.2f} |"


if __name__ == "__main__":
    main()
