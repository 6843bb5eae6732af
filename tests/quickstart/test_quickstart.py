"""The quickstart, shortened through its own options: its stages learn, leave what they promise, repeat themselves."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast import cli
from ppo_fast.quickstart import Options, Result, files, language, run, show
from ppo_fast.quickstart.judging import Evaluation
from ppo_fast.rlhf import UserError, load_config
from ppo_fast.rlhf.reports import plots
from tests.helpers import raises_exactly

WALL_CLOCK = ("time/", "memory/", "tokens_per_second")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One short run: its directory and its result."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("quickstart")
    return out, run(Options(out=out, answers=4_000, pairs=300, updates=5))


def test_every_stage_learns(short: tuple[Path, Result]) -> None:
    out, result = short
    assert result.sft.valid > 0.4
    assert result.sft.kl == 0
    history = plots.read_metrics(out / "reward")
    assert history[-1]["eval/accuracy"] > 0.5
    assert result.with_kl.reward > result.sft.reward
    assert result.without_kl.reward > result.sft.reward
    assert result.without_kl.kl > 0


def test_the_preferences_lean_to_the_gold_score_and_are_noisy(short: tuple[Path, Result]) -> None:
    out, _ = short
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    gold = [[language.score(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
    unequal = [(a, b) for a, b in gold if a != b]
    right = sum(a > b for a, b in unequal) / len(unequal)
    assert 0.7 < right < 0.98


def test_the_test_prompts_are_in_no_training_file(short: tuple[Path, Result]) -> None:
    out, result = short
    test = files.read_prompts(out / "test.jsonl")
    assert test == result.sft.prompts
    assert len({*test}) == files.TEST_PROMPTS
    for name in ("answers", "pairs", "prompts"):
        assert not {*test} & {*files.read_prompts(out / f"{name}.jsonl")}, name


def test_model_directories_load(short: tuple[Path, Result]) -> None:
    out, result = short
    for name in ("base", "sft/final", "ppo/final", "ppo/best", "no-kl/final"):
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        ids = tokenizer(result.sft.texts[0], return_tensors="pt").input_ids
        assert tokenizer.unk_token_id not in ids
        assert model(ids).logits.shape == (*ids.shape, len(tokenizer))
    reward = AutoModelForSequenceClassification.from_pretrained(out / "reward/final")
    assert reward(ids).logits.shape == (1, 1)


def test_picture_metrics_and_configs_are_written(short: tuple[Path, Result]) -> None:
    import matplotlib.image

    out, result = short
    picture = matplotlib.image.imread(out / "curves.png")
    assert picture.shape[0] > 500
    assert picture.std() > 0.02
    rows = plots.read_metrics(out / "ppo")
    assert [row["update"] for row in rows] == list(range(1, 6))
    assert rows == result.histories["with KL"]
    assert {"eval/gold", "eval/valid"} <= rows[-1].keys()
    assert (load_config(out / "ppo/config.yaml").kl.coef, load_config(out / "no-kl/config.yaml").kl.coef) == (0.2, 0.0)


def test_the_report_of_a_run_has_its_answers_to_compare(short: tuple[Path, Result]) -> None:
    out, _ = short
    rows = [json.loads(line) for line in (out / "no-kl/evaluations.jsonl").read_text().splitlines()]
    assert len(rows) == files.TEST_PROMPTS
    assert cli.main(["report", str(out / "no-kl")]) == 0
    page = (out / "no-kl/report.html").read_text()
    shown = [row for row in rows if row["completion"] in page and row["baseline_completion"] in page]
    assert len(shown) >= 12
    assert page.count('class="pair"') == 12
    wins = sum((row["score"] > row["baseline_score"]) + (row["score"] == row["baseline_score"]) / 2 for row in rows)
    assert plots.read_metrics(out / "no-kl")[-1]["eval/win_rate"] == pytest.approx(wins / len(rows))


def test_the_evaluator_of_the_run_is_the_gold_score() -> None:
    texts = {"gold": -3.0, "valid": 0.0}
    assert language.gold(generate=lambda prompts: ["and" for _ in prompts], model=None, tokenizer=None) == texts


@pytest.mark.slow
def test_same_seed_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(files, "TEST_PROMPTS", 16)
    metrics, out = [], tmp_path / "run"
    for again in ([], ["--overwrite"]):
        short = ["--answers", "200", "--pairs", "60", "--updates", "1", *again]
        assert cli.main(["quickstart", "--out", str(out), "--seed", "3", *short]) == 0
        rows = [row for name in ("sft", "reward", "ppo", "no-kl") for row in plots.read_metrics(out / name)]
        metrics.append([{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in rows])
        printed = capsys.readouterr().out
        assert "gold score (never seen in training)" in printed
        assert f"ppo-fast report {out / 'no-kl'}" in printed
    assert metrics[0] == metrics[1]


def _side(text: str) -> Evaluation:
    return Evaluation(["the soup"], [text], reward=0.5, kl=0.0, entropy=1.0)


def test_sample_table_writes_out_what_steers_a_terminal() -> None:
    table = show.sample_table({"model": _side("the soup was \x1b[2J")})
    assert r"\x1b[2J" in str(next(iter(table.columns[0].cells)))
    assert "\x1b" not in str(next(iter(table.columns[0].cells)))


def test_sample_table_shows_the_texts_of_a_prompt_with_their_gold_scores() -> None:
    table = show.sample_table({word: _side(f"the soup was {word} .") for word in ("stale", "fresh")})
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells == [["the soup was stale."], ["-1"], ["the soup was fresh."], ["+1"]]


def test_the_summary_is_of_each_side() -> None:
    table = show.summary_table({"SFT": _side("the soup was stale ."), "PPO": _side("the soup was was .")})
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    assert rows[1:3] == [
        ("gold score (never seen in training)", "-1.00", "-3.00"),
        ("well-formed reviews", "100%", "0%"),
    ]


def test_a_second_time_nothing_is_deleted_unasked(
    short: tuple[Path, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = short
    held = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock" and path.is_file()}
    assert cli.main(["quickstart", "--out", str(out)]) == 2
    message = (
        f"quickstart: {str(out)!r} already holds the run 'sft'; choose another (--out DIR) or replace it (--overwrite)"
    )
    assert capsys.readouterr().err == f"ppo-fast: {message}\n"
    assert held == {path: path.stat().st_mtime_ns for path in held}


@pytest.mark.parametrize("name", ["answers", "pairs", "updates"])
def test_nothing_to_do_is_an_error(name: str) -> None:
    with raises_exactly(f"quickstart: expected {name} to be at least 1, got 0", UserError):
        Options(**{name: 0})


def test_the_last_lines_fit_a_terminal_and_their_runs_do_not_share_a_directory() -> None:
    lines = show.closing(Path("runs/quickstart"), 180).splitlines()
    assert max(len(line) for line in lines if not line.startswith("  ppo-fast")) <= 80
    outs = [shlex.split(line)[-1] for line in lines if line.startswith("  ppo-fast train")]
    assert outs == ["runs/quickstart/stronger", "runs/quickstart/by-gold"]


def test_commands_survive_a_directory_with_spaces(tmp_path: Path) -> None:
    commands = [line for line in show.closing(Path("my [runs]"), 60).splitlines() if line.startswith("  ppo-fast")]
    assert [shlex.split(command)[2] for command in commands[:2]] == ["my [runs]/no-kl", "my [runs]/ppo"]
    out = tmp_path / "my: {runs}"
    files.write_inputs(out, seed=0, answers=1, updates=1)
    assert load_config(out / "ppo.yaml").data.prompts == str(out / "prompts.jsonl")
