"""``ppo-fast report RUN``: one self-contained HTML page of a run, for people who were not there."""

from __future__ import annotations

import argparse
import base64
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from ppo_fast.rlhf.data.templates import as_text
from ppo_fast.rlhf.files import write_result
from ppo_fast.rlhf.reports import plots
from ppo_fast.rlhf.training.log import EVALUATIONS, SAMPLES, Record, sample_records

TEMPLATE = Path(__file__).with_name("report.html")
PAIRS = 12  # of the blind comparison, at most


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of one run."""
    parser = argparse.ArgumentParser(
        prog="ppo-fast report",
        description="One self-contained HTML page of a run: curves, samples, warnings, a blind comparison to rate.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="HTML file (RUN/report.html)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in the blind comparison (%(default)s)")
    options = parser.parse_args(argv)
    print(f"report: {write_report(options.run, options.out or options.run / 'report.html', seed=options.seed)}")


def write_report(run: Path, out: Path, *, seed: int = 0) -> Path:
    """Write the page of the run in directory ``run`` to ``out``; nothing in it refers to another file.

    Raises:
        UserError: the directory holds no metrics, a line of its files is broken, or `out` cannot be written.
    """
    history = plots.read_metrics(run)
    samples = sample_records(run / SAMPLES, "update", "prompt", "completion", "score")
    answers = sample_records(run / EVALUATIONS, "update", "prompt", "completion", "baseline_completion")
    config = run / "config.yaml"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = as_text
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.resolve().name,
        summary=_summary(history),
        history=history,
        warnings=_warnings(history),
        unit=plots.counter_of([history]),
        curves=_curves(history, plots.choose_panels([history])),
        evaluations=_curves(history, _evaluation_panels(history)),
        metrics=_first_and_last(history),
        samples=_samples(samples),
        pairs=_blind_pairs(answers, random.Random(seed)),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    write_result("report", out, page)
    return out


def _summary(history: plots.History) -> str:
    shown = (("objective/scores", "score"), ("objective/kl", "KL to the reference"))
    found = [(title, history[0][metric], history[-1][metric]) for metric, title in shown if metric in history[0]]
    return "; ".join(f"{title} {first:.3g} → {last:.3g}" for title, first, last in found)


def _warnings(history: plots.History) -> list[str]:
    return [f"update {row.get('update', i + 1)}: {row['note']}" for i, row in enumerate(history) if row.get("note")]


def _evaluation_panels(history: plots.History) -> list[plots.Panel]:
    names = dict.fromkeys(name for row in history for name in row if name.startswith("eval/"))
    return [plots.Panel(name, name.removeprefix("eval/")) for name in names]


def _curves(history: plots.History, panels: Sequence[plots.Panel]) -> str:
    """The panels as SVG, in base64; empty without one."""
    if not panels:
        return ""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "curves.svg"
        plots.draw_curves({"": history}, path, panels=panels)
        return base64.b64encode(path.read_bytes()).decode()


def _first_and_last(history: plots.History) -> list[tuple[str, str, str]]:
    """Return every number of the last update, paired with that of the first update that has it."""
    rows = []
    for name, last in history[-1].items():
        if isinstance(last, (int, float)) and name not in plots.COUNTERS:
            first = next(row[name] for row in history if name in row)
            rows.append((name, f"{first:.4g}", f"{last:.4g}"))
    return rows


def _samples(records: list[Record]) -> list[tuple[str, list[Record]]]:
    """What was sampled first and last."""
    updates = sorted({record["update"] for record in records})
    chosen = dict.fromkeys(updates[:1] + updates[-1:])
    return [(f"Update {update}", [r for r in records if r["update"] == update]) for update in chosen]


def _blind_pairs(records: list[Record], rng: random.Random) -> list[Record]:
    """Pair the last evaluation's answers with those of the model before training, in random order."""
    latest = max((record["update"] for record in records), default=0)
    different = [r for r in records if r["update"] == latest and r["completion"] != r["baseline_completion"]]
    pairs = []
    for index, record in enumerate(rng.sample(different, min(PAIRS, len(different))), start=1):
        after = rng.choice("AB")
        texts = (record["completion"], record["baseline_completion"])
        a, b = texts if after == "A" else texts[::-1]
        pairs.append({"index": index, "prompt": record["prompt"], "a": a, "b": b, "after": after})
    return pairs
