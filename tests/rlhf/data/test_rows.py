"""Rows from files, saved datasets and the Hub; columns renamed; a path that is not there asks nobody."""

import inspect
import json

import datasets
import pytest

from ppo_fast.rlhf.config.rollout import DataConfig
from ppo_fast.rlhf.config.supervised import ExamplesConfig
from ppo_fast.rlhf.data.examples import completion_example, load_examples
from ppo_fast.rlhf.data.prompts import load_prompts
from ppo_fast.rlhf.data.rows import read_rows
from ppo_fast.rlhf.errors import UserError
from tests.helpers import raises_exactly

ROWS = [{"question": "w1", "answer": "w2", "level": 3}, {"question": "w4", "answer": "w5", "level": 6}]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one data set; `hub` lists the arguments of each call, bound by the true signature."""
    monkeypatch.chdir(tmp_path)
    signature, calls = inspect.signature(datasets.load_dataset), []

    def load_dataset(*args, **options):
        bound = signature.bind(*args, **options)
        calls.append(bound.arguments)
        if bound.arguments["path"] != "org/questions":
            raise datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist\non the Hub")
        rows = {"train": ROWS, "test": ROWS[:1]}
        return datasets.Dataset.from_list(rows[bound.arguments["split"]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_prompts_of_the_hub(hub, tokenizer):
    data = load_prompts("org/questions", tokenizer, DataConfig(columns={"prompt": "question"}))
    assert data.prompts == ["w1", "w4"]
    assert data.columns == {"answer": ["w2", "w5"], "level": [3, 6]}
    assert hub == [{"path": "org/questions", "name": None, "split": "train"}]


def test_a_split_and_a_subset_of_the_hub(hub):
    rows = [*read_rows("org/questions:test", "data.train", ["prompt=question", "completion=answer"], "main")]
    assert rows == [("org/questions:test[0]", {"prompt": "w1", "completion": "w2", "level": 3})]
    assert hub == [{"path": "org/questions", "name": "main", "split": "test"}]


def test_a_name_that_nobody_has(hub, tmp_path):
    message = (
        f"data.train: no such file 'org/answers' in {tmp_path}, and no dataset of the Hub can be read by that name: "
        "Dataset doesn't exist on the Hub"
    )
    with raises_exactly(message, UserError):
        [*read_rows("org/answers", "data.train")]


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "here/rows", "./rows", "~/rows", "/rows", "a/b/c", "rows.parquet", "x.json"]
)
def test_a_path_that_is_not_there_asks_nobody(hub, tmp_path, path):
    (tmp_path / "here").mkdir()
    with raises_exactly(f"data.train: no such file {path!r} in {tmp_path}", UserError):
        [*read_rows(path, "data.train")]
    assert hub == []


def test_a_split_of_a_saved_dataset(tmp_path):
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, dev=table.select([1])).save_to_disk(tmp_path / "saved")
    assert [row["level"] for _, row in read_rows(f"{tmp_path / 'saved'}:dev", "data.train")] == [6]
    assert [row["level"] for _, row in read_rows(tmp_path / "saved", "data.train")] == [3, 6]
    with pytest.raises(UserError, match=r"saved:tset: expected a split 'tset', got train, dev$"):
        [*read_rows(f"{tmp_path / 'saved'}:tset", "data.train")]


def test_columns_are_renamed_in_every_source(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for source in (ROWS, tmp_path / "rows.jsonl"):
        rows = [row for _, row in read_rows(source, "data.prompts", ["question=answer", "answer=question"])]
        assert rows == [{"level": 3, "question": "w2", "answer": "w1"}, {"level": 6, "question": "w5", "answer": "w4"}]
    message = "prompts[0]: data.columns: expected a column 'title', got the columns 'question', 'answer', 'level'"
    with raises_exactly(message, UserError):
        [*read_rows(ROWS, "data.prompts", ["prompt=title"])]
    with raises_exactly("data.columns: expected NAME=COLUMN, each name once, got ('prompt',)", UserError):
        DataConfig(columns=["prompt"])
    with raises_exactly("data.columns: expected NAME=COLUMN, each name once, got ('a=b', 'a=c')", UserError):
        ExamplesConfig(columns=["a=b", "a=c"])


def test_empty_data_names_the_file(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text("\n")
    for load in (
        lambda: load_prompts(tmp_path / "rows.jsonl", tokenizer, DataConfig()),
        lambda: load_examples(tmp_path / "rows.jsonl", "train", completion_example, tokenizer, ExamplesConfig()),
    ):
        with pytest.raises(UserError, match=r"/rows\.jsonl: expected at least one \w+, got none$"):
            load()


def test_a_text_is_a_completion_of_its_first_token(tokenizer):
    (example,) = load_examples([{"text": "w1 w2 w3"}], "train", completion_example, tokenizer, ExamplesConfig())
    assert (example.ids, example.start) == ((*tokenizer("w1 w2 w3")["input_ids"], tokenizer.eos_token_id), 1)
    kept = completion_example({"prompt": "w1", "completion": " w2", "text": "w9"}, tokenizer, "")
    assert kept == completion_example({"prompt": "w1", "completion": " w2"}, tokenizer, "")
    with raises_exactly("here: the text has no tokens", UserError):
        completion_example({"text": ""}, tokenizer, "here")
