"""Group advantages reach the optimum of an enumerated task with 8 samples a prompt."""

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import enumerated

pytestmark = pytest.mark.slow
CASES: dict[str, dict[str, Any]] = {
    "mean, KL in the loss": {"kl": {"placement": "loss"}},
    "leave-one-out, KL in the reward": {"advantage": {"leave_one_out": True}},
    "by the deviation, no KL": {"advantage": {"divide_by_std": True}, "kl": {"coef": 0.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_group_advantages_reach_the_enumerated_optimum(case: str, seed: int, tmp_path: Path) -> None:
    result, found, best = enumerated.train(tmp_path / "run", seed, updates=120, **CASES[case])
    assert result.models.value is None
    assert best - found < 0.03
    assert found <= best + 1e-9
