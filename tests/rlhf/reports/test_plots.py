"""Reading and drawing the metrics of runs."""

import json
import math
import re
from pathlib import Path

import matplotlib.image
import pytest

from ppo_fast import cli
from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.reports import plots
from tests.helpers import raises_exactly


def _history(updates: int) -> list[dict[str, float]]:
    return [{panel.metric: math.sin(i + j) for j, panel in enumerate(plots.PANELS)} for i in range(updates)]


def test_metrics_are_read_back_without_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1.0}\n{"a": 2.5}\n{"a": 3')
    with pytest.warns(UserWarning, match=f"^{path}:3: the last line is cut short and left out$"):
        assert plots.read_metrics(path) == [{"a": 1.0}, {"a": 2.5}]


def test_missing_metrics_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with raises_exactly(f"read_metrics: expected a metrics file, got no file at {str(path)!r}", UserError):
        plots.read_metrics(path)
    path.write_text("")
    with raises_exactly(f"read_metrics: expected at least one update in {str(path)!r}, got none", UserError):
        plots.read_metrics(path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"\x00\x00\x00", "not JSON: Expecting value at column 1"),
        (b'{"a": 3', "not JSON: Expecting ',' delimiter at column 8"),
        (b"", "not JSON: Expecting value at column 1"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "expected numbers by name, got [1]"),
        (b'{"a": "x"}', "expected numbers by name, got {'a': 'x'}"),
    ],
)
@pytest.mark.parametrize("command", ["plot", "report", "export"])
def test_a_broken_line_is_named_by_file_and_line(
    command: str, line: bytes, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, good = tmp_path / "run", b'{"update": 1, "prompt": "p", "completion": "c", "score": 1}'
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"lr": 1}\n')
    path = run / ("metrics.jsonl" if command == "plot" else "samples.jsonl")
    if command != "plot":
        fault = fault.replace("numbers by name", "the fields update, prompt, completion, score")
    path.write_bytes((b'{"update": 1}' if command == "plot" else good) + b"\n" + line + b"\n")
    assert cli.main([command, str(run), "--out", str(tmp_path / "out.svg")]) == 2
    assert capsys.readouterr().err == f"ppo-fast: {path}:2: {fault}\n"
    assert not (tmp_path / "out.svg").exists()


@pytest.mark.parametrize("command", ["plot", "report", "export"])
@pytest.mark.parametrize(
    ("out", "fault"),
    [("file/x.svg", "File exists"), ("directory.svg", "Is a directory"), ("y" * 300 + ".svg", "File name too long")],
)
def test_a_place_where_nothing_can_be_written_is_one_sentence(
    command: str, out: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "run")
    samples = [{"update": 1, "prompt": "p", "completion": text, "score": len(text)} for text in ("a", "bc")]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "file").touch()
    (tmp_path / "directory.svg").mkdir()
    held = sorted(tmp_path.rglob("*"))
    assert cli.main([command, str(run), "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err == f"ppo-fast: {command}: cannot write {str(tmp_path / out)!r}: {fault}\n"
    assert sorted(tmp_path.rglob("*")) == held


def test_names_and_titles_are_plain_text(tmp_path: Path) -> None:
    out, names = tmp_path / "curves.svg", ("$x^$", "a\x1b[31m")
    history = [{"$m_$": 1.0}]
    panel = plots.Panel("$m_$", "$m_$", "$u^$")
    plots.draw_curves(dict.fromkeys(names, history), out, title="$t^$", subtitle="$s^$", panels=[panel])
    text = out.read_text()
    assert all(f">{name}<" in text for name in ("$x^$", "a\\x1b[31m", "$m_$", "$u^$", "$t^$", "$s^$"))


def test_smooth_is_a_centered_mean_cut_at_the_ends() -> None:
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


def _run(directory: Path, *, shift: float = 0.0, names: tuple[str, ...] = ("objective/scores", "lr")) -> Path:
    directory.mkdir(parents=True)
    rows = [{"update": i, **dict.fromkeys(names, i + shift)} for i in range(1, 9)]
    rows[3]["eval/scores"] = 2.0
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_runs_over_each_other(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"curves.{suffix}"
    runs = [str(_run(tmp_path / name / "ppo", shift=shift)) for name, shift in (("with", 0.0), ("without", 3.0))]
    assert cli.main(["plot", *runs, "--out", str(out), "--title", "Two runs"]) == 0
    assert capsys.readouterr().out == f"curves: {out}\n"
    if suffix == "svg":
        text = out.read_text()
        assert [name in text for name in ("with/ppo", "without/ppo", "Two runs", ">Score<", ">Entropy")] == [
            *[True] * 4,
            False,
        ]
    else:
        assert matplotlib.image.imread(out).shape[1] == 1440


def test_panels_are_what_a_run_has_or_what_is_asked_for(tmp_path: Path) -> None:
    losses = plots.read_metrics(_run(tmp_path / "a", names=("train/loss", "lr", "x", "y", "z")))
    assert [panel.metric for panel in plots.choose_panels([losses])] == ["train/loss", "lr", "x", "y"]
    rewards = plots.read_metrics(_run(tmp_path / "b"))
    assert [panel.title for panel in plots.choose_panels([rewards])] == ["Score"]
    assert [panel.title for panel in plots.choose_panels([losses, rewards])] == ["Score"]
    assert [panel.metric for panel in plots.choose_panels([losses, rewards], ["x"])] == ["x"]
    assert [panel.metric for panel in plots.choose_panels([losses], ["eval/scores"])] == ["eval/scores"]
    message = "plot: expected metrics that a run has (eval/scores, lr, objective/scores), got 'x'"
    with raises_exactly(message, UserError):
        plots.choose_panels([rewards], ["x"])


def test_a_run_without_the_metrics_drawn_is_named_and_not_in_the_legend(tmp_path: Path) -> None:
    runs = [str(_run(tmp_path / name, names=(metric,))) for name, metric in (("ppo", "objective/kl"), ("sft", "loss"))]
    out = tmp_path / "curves.svg"
    with pytest.warns(
        UserWarning, match="^plot: sft has no curve, for it has no objective/kl; --metrics names others$"
    ):
        plots.main([*runs, "--out", str(out)])
    assert [f">{name}<" in out.read_text() for name in ("ppo", "sft")] == [True, False]


def test_last_values_are_below_the_title_and_a_line_apart() -> None:
    line = plots.LINE
    assert plots._spread([5, 5, 90], 100) == [5, 5 + line, 90]
    assert plots._spread([98, 99, 99], 100) == [100 - 2 * line, 100 - line, 100]
    assert plots._spread([50, 99, 99], 100) == [50, 100 - line, 100]
    assert plots._spread([], 100) == []


def test_a_panel_has_the_runs_that_logged_it_and_the_last_value_itself(tmp_path: Path) -> None:
    """Two runs that end at one value, far above their running means; the third run has another metric."""
    ends = [[{"step": i, "a": 0.0} for i in range(1, 10)] + [{"step": 10, "a": 7.25 + shift}] for shift in (0.0, 0.001)]
    runs = {"one": ends[0], "two": ends[1], "three": [{"step": 1, "b": 5.123}]}
    panels = plots.choose_panels([*runs.values()])
    assert [panel.metric for panel in panels] == ["a", "b"]
    path = tmp_path / "curves.svg"
    plots.draw_curves(runs, path, title="t", panels=panels)
    text = path.read_text()
    assert [text.count(f">{label}<") for label in ("7.25", "5.12", "one", "two", "three", "step", "update")] == [
        2,
        1,
        1,
        1,
        1,
        2,
        0,
    ]
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>7.25<', text)]
    assert len(heights) == 2
    assert abs(heights[0] - heights[1]) > plots.LINE - 0.5


def test_a_run_is_drawn_once_and_only_into_a_picture(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    with raises_exactly(f"plot: expected different runs, got {run} {run}", UserError):
        plots.main([str(run), str(run)])
    out = tmp_path / "curves.txt"
    message = f"draw_curves: expected a file name ending in .png, .svg, .pdf, got {str(out)!r}"
    with raises_exactly(message, UserError):
        plots.main([str(run), "--out", str(out)])


def test_drawing_leaves_the_backend_of_the_process(tmp_path: Path) -> None:
    """A notebook shows its own figures after a run has drawn its curves."""
    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        plots.draw_curves({"run": _history(3)}, tmp_path / "curves.png", title="")
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
