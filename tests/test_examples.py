"""Each example runs as a user runs it, and shows what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from examples import clipped_objective

ROOT = Path(__file__).resolve().parent.parent


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tests run side by side
    run = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_bandit_prints_its_table_and_draws(tmp_path: Path) -> None:
    printed = _run("bandit.py", "--out", str(tmp_path))
    rows = dict(re.findall(r"^(clip|penalty|none) +([\d.]+)", printed, re.MULTILINE))
    assert rows.keys() == {"clip", "penalty", "none"}
    assert min(map(float, rows.values())) >= 98
    assert matplotlib.image.imread(tmp_path / "bandit.png").std() > 0.02


def test_clipped_objective_draws(tmp_path: Path) -> None:
    _run("clipped_objective.py", "--out", str(tmp_path), "--points", "21")
    assert matplotlib.image.imread(tmp_path / "clipped_objective.png").std() > 0.02


def test_ops_in_your_loop_learns() -> None:
    shares = [float(share) for share in re.findall(r"even tokens ([\d.]+)", _run("ops_in_your_loop.py"))]
    assert len(shares) == 30
    assert shares[0] < 0.6
    assert shares[-1] > 0.8


def test_cartpole_balances() -> None:
    lengths = [float(steps) for steps in re.findall(r"steps per episode +([\d.]+)", _run("cartpole.py"))]
    assert len(lengths) == 40
    assert lengths[0] < 40
    assert min(lengths[-5:]) > 150


def test_patched_trl_learns_with_the_ops() -> None:
    printed = _run("patched_trl.py")
    shares = [float(share) for share in re.findall(r"'rewards/reward/mean': '([\d.]+)'", printed)]
    assert shares[-1] > shares[0] + 0.2
    assert "replaced trl.trainer.utils.selective_log_softmax (3x), 20 calls" in printed


@pytest.mark.parametrize(
    ("advantage", "dual", "values", "slopes"),
    [
        (1.0, False, [0.5, 1.0, 1.2, 1.2], [1.0, 1.0, 0.0, 0.0]),
        (-1.0, False, [-0.8, -1.0, -1.5, -3.5], [0.0, -1.0, -1.0, -1.0]),
        (-1.0, True, [-0.8, -1.0, -1.5, -3.0], [0.0, -1.0, -1.0, 0.0]),
    ],
)
def test_drawn_objective_is_the_formula(advantage: float, dual: bool, values: list[float], slopes: list[float]) -> None:
    ratio = torch.tensor([0.5, 1.0, 1.5, 3.5])
    config = clipped_objective.DUAL if dual else clipped_objective.CLIP
    value, slope = clipped_objective.objective_and_slope(ratio, advantage, config)
    torch.testing.assert_close(value, torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor(slopes, dtype=torch.float64))
