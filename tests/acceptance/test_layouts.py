"""The good-token task in the layouts other than the default."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.acceptance import good_token

LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"model": {"layout": "shared"}},
    "offloaded": {"model": {"offload": True}},
    "adapters": {
        "model": {"layout": "adapters", "lora": {"rank": 16, "alpha": 32}},
        "optim": {"lr": 1e-2, "value_lr": 1e-2},
    },
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) for name in ("adapters", "shared", "offloaded")]
)
def test_the_task_is_learned_in_every_layout(tmp_path: Path, seed: int, layout: str) -> None:
    policy = good_token.make_policy(seed)
    if layout == "adapters":
        with torch.no_grad():
            # Frozen rows of norm 0.16 under states of norm 8 would make no token more than e^1.3 times as likely.
            policy.lm_head.weight.mul_(8)
    settings = good_token.config(tmp_path / "run", seed, updates=12, **LAYOUTS[layout])
    history = good_token.train(settings, policy=policy).history
    scores = [metrics["objective/scores"] for metrics in history]
    assert scores[0] < 0.15
    assert scores[-1] >= 0.5
    assert max(metrics["rollout/logprob_diff_max"] for metrics in history) <= 1e-4
