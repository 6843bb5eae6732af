"""The adaptive coefficient brings the KL to the reference to its target from either side, and keeps it there."""

from pathlib import Path
from typing import Any

import pytest

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny
from tests.acceptance.good_token import GOOD, WORDS

TARGET = 3.0  # nats per sequence


def _settings(directory: Path, seed: int, coef: float) -> dict[str, Any]:
    return {
        "updates": 110,
        "seed": seed,
        "threads": 1,
        "model": {"value_head": "zero"},
        "rollout": {"batch_size": 64, "max_new_tokens": 4},
        "reward": {"missing_eos_penalty": 0.0},
        "loss": {"value_clip": None},
        "kl": {"coef": coef, "adaptive": True, "target": TARGET, "horizon": 300},
        "optim": {"lr": 6e-3, "value_lr": 2e-3, "epochs": 3, "minibatch_size": 32, "final_lr_frac": 0.3},
        "output_dir": str(directory),
        "log": {"tensorboard": False, "console": False},
    }


@pytest.mark.parametrize("coef", [pytest.param(coef, marks=pytest.mark.slow) for coef in (0.02, 1.0)])
def test_rule_13_the_kl_settles_within_20_percent_of_its_target(tmp_path: Path, coef: float, seed: int) -> None:
    history = train_ppo(
        config_from_dict(_settings(tmp_path / "run", seed, coef)),
        reward_fn=lambda completion_ids, **_: [sum(token in GOOD for token in ids) / 2 for ids in completion_ids],
        prompts=WORDS,
        policy=tiny.make_model(64, hidden=32, layers=1, heads=2, seed=seed),
        tokenizer=tiny.make_tokenizer(WORDS),
    ).history
    kl = sum(metrics["objective/kl"] for metrics in history[-20:]) / 20
    assert kl == pytest.approx(TARGET, rel=0.2)
