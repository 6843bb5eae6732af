"""Reading and drawing the metrics of runs."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest

from ppo_fast.rlhf import UserError, plots
from tests.helpers import raises_exactly


def _history(updates: int) -> list[dict[str, float]]:
    return [{panel.metric: math.sin(i + j) for j, panel in enumerate(plots.PANELS)} for i in range(updates)]


def test_metrics_are_read_back_without_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1.0}\n{"a": 2.5}\n{"a": 3')
    assert plots.read_metrics(path) == [{"a": 1.0}, {"a": 2.5}]


def test_missing_metrics_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with raises_exactly(f"read_metrics: expected a metrics file, got no file at {str(path)!r}", UserError):
        plots.read_metrics(path)
    path.write_text('{"a": 1')
    with raises_exactly(f"read_metrics: expected at least one update in {str(path)!r}, got none", UserError):
        plots.read_metrics(path)


def test_smooth_is_a_centred_mean_cut_at_the_ends() -> None:
    assert plots.smooth([1, 2, 6, 4, 5], 3) == [1.5, 3, 4, 5, 4.5]
    assert plots.smooth([7], 5) == [7]


@pytest.mark.parametrize("names", [["PPO"], ["with KL", "without"]])
@pytest.mark.parametrize("updates", [1, 12])
def test_curves_of_one_or_several_runs_are_drawn(names: list[str], updates: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "curves.png"
    plots.draw_curves({name: _history(updates) for name in names}, path, title="A finding", subtitle="a setting")
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (960, 1440)
    assert picture.std() > 0.02


def test_history_of_a_run_is_what_the_reader_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _history(3)))
    assert plots.read_metrics(path) == _history(3)
