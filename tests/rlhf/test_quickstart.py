"""The quickstart, shortened through its own options: it learns, leaves what it promises, and repeats itself."""

import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast import cli
from ppo_fast.rlhf import UserError, load_config, plots
from ppo_fast.rlhf.quickstart import Evaluation, Options, Result, closing, run, sample_table
from tests.helpers import raises_exactly

WALL_CLOCK = ("time/", "memory/", "tokens_per_second")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One short run: its directory and its result."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("quickstart")
    return out, run(Options(out=out, updates=12, sft_steps=200))


def test_it_learns(short: tuple[Path, Result]) -> None:
    _, result = short
    assert result.after.score > result.before.score + 1.0
    assert result.before.kl == 0
    assert 0 < result.after.kl < 20


def test_the_base_model_writes_sentences(short: tuple[Path, Result]) -> None:
    _, result = short
    assert result.before.valid > 0.75


def test_model_directories_load(short: tuple[Path, Result]) -> None:
    out, result = short
    for name in ("base", "ppo/final"):
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        ids = tokenizer(result.before.texts[0], return_tensors="pt").input_ids
        assert tokenizer.unk_token_id not in ids
        assert model(ids).logits.shape == (*ids.shape, len(tokenizer))


def test_picture_metrics_and_config_are_written(short: tuple[Path, Result]) -> None:
    import matplotlib.image

    out, result = short
    picture = matplotlib.image.imread(out / "curves.png")
    assert picture.shape[0] > 500
    assert picture.std() > 0.02
    rows = plots.read_metrics(out / "ppo" / "metrics.jsonl")
    assert [row["update"] for row in rows] == list(range(1, 13))
    assert [row["objective/scores"] for row in rows] == [row["objective/scores"] for row in result.history]
    assert load_config(out / "config.yaml").updates == 12


def test_written_reward_function_scores_like_the_language(short: tuple[Path, Result]) -> None:
    out, result = short
    space: dict = {}
    exec((out / "reward.py").read_text(), space)
    rewards = space["reward"](["the soup was"], ["fresh ."], completion_ids=[[]])
    assert rewards == [1.0]
    assert [space["score"](text) for text in result.after.texts].count(-3.0) < len(result.after.texts)


def test_same_seed_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    metrics = []
    for out in (tmp_path / "first", tmp_path / "again"):
        assert cli.main(["quickstart", "--out", str(out), "--seed", "3", "--updates", "2", "--sft-steps", "20"]) == 0
        rows = plots.read_metrics(out / "ppo" / "metrics.jsonl")
        metrics.append([{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in rows])
        printed = capsys.readouterr().out
        assert "score of a review" in printed
        assert f"ppo-fast train --config {out / 'config.yaml'} --kl.coef 0" in printed
    assert metrics[0] == metrics[1]


def test_sample_table_shows_both_texts_of_a_prompt_with_their_scores() -> None:
    sides = (Evaluation(["the soup"], [f"the soup was {word} ."], kl=0.0, entropy=1.0) for word in ("stale", "fresh"))
    cells = [[str(cell) for cell in column.cells] for column in sample_table(*sides).columns]
    assert cells == [["the soup was stale."], ["-1"], ["the soup was fresh."], ["+1"]]


@pytest.mark.parametrize("name", ["updates", "sft_steps"])
def test_nothing_to_do_is_an_error(name: str) -> None:
    with raises_exactly(f"quickstart: expected {name} to be at least 1, got 0", UserError):
        Options(**{name: 0})


def test_next_command_survives_a_directory_with_spaces() -> None:
    command = next(line for line in closing(Path("my [runs]"), 60).splitlines() if "ppo-fast" in line)
    assert shlex.split(command)[3] == "my [runs]/config.yaml"
