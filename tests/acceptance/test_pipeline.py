"""Fine-tuning, reward model from noisy preferences, PPO against it, judged by a gold score that no training sees.

The quickstart at its defaults, on three seeds: minutes each.
"""

import json
from pathlib import Path

import pytest

from ppo_fast.quickstart import Options, run

pytestmark = pytest.mark.slow


def notes(run_directory: Path) -> str:
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    return " ".join(json.loads(line).get("note", "") for line in lines)


def test_the_penalty_keeps_what_the_reward_model_cannot_see(seed: int, tmp_path: Path) -> None:
    result = run(Options(out=tmp_path, seed=seed))
    assert json.loads((tmp_path / "reward/final/reward_stats.json").read_text())["accuracy"] > 0.6
    assert result.with_kl.gold - result.sft.gold >= 0.5
    assert result.without_kl.reward > result.with_kl.reward
    assert result.without_kl.gold < result.sft.gold
    assert "sign of reward hacking" in notes(tmp_path / "no-kl")
    assert "sign of reward hacking" not in notes(tmp_path / "ppo")
