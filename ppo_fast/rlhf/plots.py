"""Curves of a run, drawn from its metrics file. matplotlib is imported on use and draws to files only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, require

History = Sequence[Mapping[str, float]]  # one mapping of metric names to numbers per update

INK, GRID = "#33393f", "#e6e8ea"
COLOURS = ("#1f6f8b", "#d98324", "#7b5ea7", "#5b8c5a", "#a3514b", "#6b7580")


@dataclass(frozen=True)
class Panel:
    """One curve against the update number."""

    metric: str
    title: str
    unit: str
    scale: float = 1.0  # multiplies the metric
    floor: float | None = None  # lowest value the quantity can take, if the axis begins there


PANELS = (
    Panel("objective/scores", "Reward", "mean score of a response"),
    Panel("objective/kl", "KL to the reference", "nats per response", floor=0.0),
    Panel("objective/entropy", "Entropy of the policy", "nats per token", floor=0.0),
    Panel("policy/clipfrac", "Clip fraction", "% of tokens", scale=100.0, floor=0.0),
)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read a run's ``metrics.jsonl``: one JSON object per update.

    Raises:
        UserError: there is no such file, or it has no complete line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"read_metrics: expected a metrics file, got no file at {str(path)!r}")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may cut its last line
    if not rows:
        raise UserError(f"read_metrics: expected at least one update in {str(path)!r}, got none")
    return rows


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Centred mean over ``span`` values (an odd number), over fewer towards both ends."""
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curves(runs: Mapping[str, History], path: str | Path, *, title: str, subtitle: str = "") -> None:
    """Draw reward, KL, entropy and clip fraction of one or more runs into one PNG.

    The thin line is each update, the thick one a running mean; the last value is written at the end of it.

    Args:
        runs: name -> history, as :func:`read_metrics` returns it. Names make the legend when there are several.
        title: the finding, in one sentence.
        subtitle: what was run.
    """
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot")
    with plt.rc_context(_style()):
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.4), sharex=True)
        figure.subplots_adjust(left=0.08, right=0.93, bottom=0.09, top=0.81, hspace=0.34, wspace=0.30)
        figure.text(0.08, 0.945, title, fontsize=14, fontweight="bold", color=INK)
        figure.text(0.08, 0.900, subtitle, fontsize=10, color="#6b7580")
        for axis, panel in zip(axes.flat, PANELS, strict=True):
            for (name, history), colour in zip(runs.items(), COLOURS, strict=False):
                _draw_run(axis, panel, history, colour, name)
            _finish(axis, panel)
        for axis in axes[1]:
            axis.set_xlabel("update")
        if len(runs) > 1:
            axes[0, 0].legend(frameon=False, fontsize=9)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _style() -> dict[str, Any]:
    return {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#b9bec3",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
    }


def _draw_run(axis: Any, panel: Panel, history: History, colour: str, name: str) -> None:
    updates = range(1, len(history) + 1)
    values = [panel.scale * row[panel.metric] for row in history]
    means = smooth(values, 5)
    axis.plot(updates, values, color=colour, linewidth=0.8, alpha=0.35)
    axis.plot(updates, means, color=colour, linewidth=2.0, label=name)
    axis.annotate(
        f"{means[-1]:.2g}",
        (len(history), means[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontweight="bold",
        annotation_clip=False,
    )


def _finish(axis: Any, panel: Panel) -> None:
    axis.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=8)
    axis.set_ylabel(panel.unit)
    axis.margins(x=0.01)
    if panel.floor is not None:
        axis.set_ylim(bottom=panel.floor)
