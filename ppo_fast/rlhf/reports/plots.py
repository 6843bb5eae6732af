"""Curves of runs, drawn from their metrics files. matplotlib draws to files only."""

from __future__ import annotations

import argparse
import io
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ppo_fast.rlhf.errors import UserError, printable
from ppo_fast.rlhf.files import write_result
from ppo_fast.rlhf.training.log import METRICS, metric_records

COUNTERS = ("update", "step")  # a line of a metrics file has one of them
History = Sequence[Mapping[str, float]]  # one mapping of metric names to numbers per update

INK, GRID = "#33393f", "#e6e8ea"
LINE = 11.0  # points from one label to the next
PICTURES = (".png", ".svg", ".pdf")
COLORS = ("#1f6f8b", "#d98324", "#7b5ea7", "#5b8c5a", "#a3514b", "#6b7580")


@dataclass(frozen=True)
class Panel:
    """One curve against the update number."""

    metric: str
    title: str
    unit: str = ""
    scale: float = 1.0  # multiplies the metric
    floor: float | None = None  # lowest value the quantity can take, if the axis begins there


class Last(NamedTuple):
    """The end of a curve."""

    update: float
    value: float  # not smoothed
    color: str


PANELS = (
    Panel("objective/scores", "Score", "mean, after clip and penalties"),
    Panel("objective/kl", "KL to the reference", "nats per response", floor=0.0),
    Panel("objective/entropy", "Entropy of the policy", "nats per token", floor=0.0),
    Panel("policy/clipfrac", "Clip fraction", "% of tokens", scale=100.0, floor=0.0),
)


def main(argv: Sequence[str] | None = None) -> None:
    """``ppo-fast plot RUN [RUN ...]``: the curves of runs over each other."""
    parser = argparse.ArgumentParser(prog="ppo-fast plot", description="Draw the curves of runs over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directory, or its metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG, SVG or PDF (%(default)s)")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="as in metrics.jsonl (a selection)")
    parser.add_argument("--title", default="", help="one sentence above the curves")
    options = parser.parse_args(argv)
    runs = dict(zip(_names(options.runs), map(read_metrics, options.runs), strict=True))
    panels = choose_panels(list(runs.values()), options.metrics)
    for name, history in runs.items():
        if not _has_any(history, panels):
            drawn = ", ".join(panel.metric for panel in panels)
            warnings.warn(f"plot: {name} has no curve, for it has no {drawn}; --metrics names others", stacklevel=2)
    draw_curves(runs, options.out, title=options.title, panels=panels)
    print(f"curves: {options.out}")


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [(path.parent if path.suffix == ".jsonl" else path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UserError(f"plot: expected different runs, got {' '.join(map(str, paths))}")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def choose_panels(histories: Sequence[History], metrics: Sequence[str] | None = None) -> list[Panel]:
    """Panels of the metrics named; by default those of ``PANELS`` that a run has, else its first four metrics.

    Raises:
        UserError: a metric that no run has.
    """
    logged = dict.fromkeys(name for history in histories for row in (history[-1], *history) for name in row)
    curves = [name for name in logged if name not in (*COUNTERS, "note")]
    known = {panel.metric: panel for panel in PANELS}
    for name in metrics or ():
        if name not in curves:
            raise UserError(f"plot: expected metrics that a run has ({', '.join(sorted(curves))}), got {name!r}")
    chosen = metrics or [name for name in known if name in curves] or curves[: len(PANELS)]
    return [known.get(name, Panel(name, name)) for name in chosen]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read ``metrics.jsonl``, or that of a run directory: one JSON object per update.

    Raises:
        UserError: there is no such file, a line of it is broken, or it has no complete line.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"read_metrics: expected a metrics file, got no file at {str(path)!r}")
    rows = metric_records(path)
    if not rows:
        raise UserError(f"read_metrics: expected at least one update in {str(path)!r}, got none")
    return rows


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Centered mean over ``span`` values (an odd number), over fewer towards both ends."""
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _has_any(history: History, panels: Iterable[Panel]) -> bool:
    return any(panel.metric in row for panel in panels for row in history)


def draw_curves(
    runs: Mapping[str, History],
    path: str | Path,
    *,
    title: str = "",
    subtitle: str = "",
    panels: Sequence[Panel] = PANELS,
) -> None:
    """Draw metrics of one or more runs into one picture, PNG, SVG or PDF by its name.

    The thin line is each update, the thick one a running mean; the last value itself is written at the end. What not
    every update has is drawn as points. A panel has the curves of the runs that logged its metric.

    Args:
        runs: name -> history, as :func:`read_metrics` returns it. Names make the legend when there are several.
        title: the finding, in one sentence.
        subtitle: what was run; without both, the panels begin at the top.
        panels: one set of axes each; by default reward, KL, entropy and clip fraction.

    Raises:
        UserError: a name that is no picture's, or `path` cannot be written.
    """
    if Path(path).suffix not in PICTURES:
        raise UserError(f"draw_curves: expected a file name ending in {', '.join(PICTURES)}, got {str(path)!r}")
    with matplotlib.rc_context(_style()):
        figure, axes = _make_axes(len(panels), counter_of(runs.values()), 1.2 if title or subtitle else 0.45)
        colors = [color for _, color in zip(runs, itertools.cycle(COLORS), strict=False)]
        height = figure.get_figheight()
        figure.text(0.08, 1 - 0.35 / height, printable(title), fontsize=14, fontweight="bold", color=INK)
        figure.text(0.08, 1 - 0.64 / height, printable(subtitle), fontsize=10, color="#6b7580")
        for axis, panel in zip(axes, panels, strict=False):
            drawn = [
                _draw_run(axis, panel, history, color) for history, color in zip(runs.values(), colors, strict=True)
            ]
            _finish(axis, panel)
            _label(axis, [last for last in drawn if last is not None])
        if len(runs) > 1:
            lines = [
                Line2D([], [], color=color, label=printable(name))
                for (name, history), color in zip(runs.items(), colors, strict=True)
                if _has_any(history, panels)
            ]
            axes[0].legend(handles=lines, frameon=False, fontsize=9)
        suffix, picture = Path(path).suffix, io.BytesIO()
        figure.savefig(picture, format=suffix[1:], dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    write_result("plot", Path(path), picture.getvalue())


def counter_of(histories: Iterable[History]) -> str:
    """What the rows are counted by: "update" of PPO, "step" of the other stages."""
    return next((name for history in histories for name in COUNTERS if name in history[0]), COUNTERS[0])


def _make_axes(count: int, counter: str, room: float) -> tuple[Figure, list[Axes]]:
    """Make `count` axes in up to two columns, with `room` inches above them."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    height = room + 2.6 * rows
    figure = Figure(figsize=(9.6, height))  # of no pyplot: the backend of the process stays
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.08, right=0.93, bottom=0.58 / height, top=1 - room / height, hspace=0.34, wspace=0.40)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in grid[-1]:
        axis.set_xlabel(counter)
    return figure, axes


def _style() -> dict[str, object]:
    return {
        "font.size": 10,
        "svg.fonttype": "none",
        "text.parse_math": False,  # "$x$" in the name of a run or a metric is text
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


def _draw_run(axis: Axes, panel: Panel, history: History, color: str) -> Last | None:
    """Draw every value thin and a running mean thick; metrics not logged at every update as points on a line.

    Return the last value; None, with nothing drawn, for a run without the metric.
    """
    rows = [(next((row[c] for c in COUNTERS if c in row), i), row) for i, row in enumerate(history, start=1)]
    drawn = [(update, panel.scale * row[panel.metric]) for update, row in rows if panel.metric in row]
    if not drawn:
        return None
    updates, values = zip(*drawn, strict=True)
    last = Last(updates[-1], values[-1], color)
    if len(values) == len(history):
        axis.plot(updates, values, color=color, linewidth=0.8, alpha=0.35)
        values, marker = tuple(smooth(values, 5)), None
    else:
        marker = "o"
    axis.plot(updates, values, color=color, linewidth=2.0, marker=marker, markersize=4)
    return last


def _label(axis: Axes, ends: Sequence[Last]) -> None:
    """Write the last values to the right of their curves, one above the other where they would overlap."""
    points = 72 / axis.figure.dpi
    heights = [points * float(axis.transData.transform((last.update, last.value))[1]) for last in ends]
    ordered = sorted(zip(heights, ends, strict=True), key=lambda pair: pair[0])
    top = points * axis.bbox.y1  # above it is the title
    for (height, last), placed in zip(ordered, _spread([height for height, _ in ordered], top), strict=True):
        axis.annotate(
            f"{last.value:.3g}",
            (last.update, last.value),
            xytext=(5, placed - height),
            textcoords="offset points",
            va="center",
            color=last.color,
            fontweight="bold",
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], top: float) -> list[float]:
    """Return ascending heights a line or more apart: moved up, and down again where the highest would pass `top`."""
    placed = list(itertools.accumulate(heights, lambda below, height: max(height, below + LINE)))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top - LINE * (len(placed) - 1 - i))
    return placed


def _finish(axis: Axes, panel: Panel) -> None:
    axis.set_title(printable(panel.title), loc="left", fontsize=11, fontweight="bold", pad=8)
    axis.set_ylabel(panel.unit)
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.floor is not None:
        top = axis.get_ylim()[1]
        axis.set_ylim(panel.floor, top + 0.05 * (top - panel.floor))  # a curve that is flat stays below the edge
