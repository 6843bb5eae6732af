"""The report of a run: all_rows on one page that needs no other file, and a comparison that is blind."""

import base64
import json
import re
from pathlib import Path

import pytest

from ppo_fast import cli
from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.reports import report
from tests.helpers import raises_exactly


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of three updates leaves behind."""
    directory = tmp_path / "polite"
    directory.mkdir()
    rows = [{"update": i, "objective/scores": i / 2, "objective/kl": 1.0 * i} for i in (1, 2, 3)]
    rows[1] |= {"note": "KL grows: <raise> kl.coef", "eval/score": 7.0}
    samples = [
        {"update": i, "prompt": [{"role": "user", "content": "salt?"}], "completion": f"<b>{i}</b>", "score": 1.0}
        for i in (1, 2, 3)
    ]
    pairs = [
        {"update": u, "prompt": f"p{i}", "completion": f"after {u}.{i}", "baseline_completion": f"before {i}"}
        for u in (1, 3)
        for i in range(20)
    ]
    pairs.append({"update": 3, "prompt": "same", "completion": "same", "baseline_completion": "same"})
    for name, records in (("metrics", rows), ("samples", samples), ("evaluations", pairs)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.yaml").write_text("updates: 3\n")
    return directory


def test_the_page_holds_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "3 updates. score 0.5 → 1.5; KL to the reference 1 → 3" in page
    assert "update 2: KL grows: &lt;raise&gt; kl.coef" in page
    assert "user: salt?" in page
    assert [f"&lt;b&gt;{i}&lt;/b&gt;" in page for i in (1, 2, 3)] == [True, False, True]
    assert "updates: 3" in page
    pictures = [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert [">Score<" in picture for picture in pictures] == [True, False]
    assert [">score<" in picture and ">7<" in picture for picture in pictures] == [False, True]  # of the evaluation
    assert '<th class="number">last update</tr>' in page


def test_the_page_needs_no_other_file(run: Path) -> None:
    page = report.write_report(run, run / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.replace("http-equiv", "")


def test_the_comparison_is_blind_and_its_key_is_right(run: Path) -> None:
    records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    page = report.write_report(run, run / "report.html").read_text()
    shown = re.findall(r'data-after="([AB])">.*?<b>A</b> (\S+ \S+)</label>.*?<b>B</b> (\S+ \S+)</label>', page, re.S)
    assert len(shown) == report.PAIRS
    assert {after for after, _, _ in shown} == {"A", "B"}
    for after, a, b in shown:
        trained, untrained = (a, b) if after == "A" else (b, a)
        record = next(r for r in records if r["completion"] == trained)
        assert (record["update"], record["baseline_completion"]) == (3, untrained)


def test_a_run_without_samples_says_so(run: Path) -> None:
    for name in ("samples", "evaluations"):
        (run / f"{name}.jsonl").unlink()
    page = report.write_report(run, run / "report.html").read_text()
    assert "The run recorded none" in page
    assert "no answers to held-out prompts" in page


def test_what_cannot_be_reported_is_an_error(run: Path, tmp_path: Path) -> None:
    with raises_exactly(
        f"read_metrics: expected a metrics file, got no file at '{tmp_path / 'metrics.jsonl'}'", UserError
    ):
        report.main([str(tmp_path)])
    answers = run / "evaluations.jsonl"
    answers.write_text('{"update": 1, "prompt": "p", "completion": "c"}\n')
    told = f"{answers}:1: expected the fields update, prompt, completion, baseline_completion, got "
    with pytest.raises(UserError, match=f"^{re.escape(told)}"):
        report.write_report(run, run / "report.html")
