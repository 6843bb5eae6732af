"""Examples: every format in every container, the boundary of prompt and completion, batches."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from ppo_fast.rlhf.config.ppo import DataConfig
from ppo_fast.rlhf.config.supervised import ExamplesConfig
from ppo_fast.rlhf.data.examples import Batches, Example, collate, completion_example, load_examples, preference_pair
from ppo_fast.rlhf.data.prompts import load_prompts
from ppo_fast.rlhf.errors import UserError

EOS = 2
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w50 {{ m.content }} {% else %}w51 {{ m.content }} <eos>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}w51 {% endif %}"
)


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    """The tokenizer with a chat template that ends an answer with EOS and a line break."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def ids(tokenizer, text):
    return tuple(tokenizer(text)["input_ids"])


def save(rows, path):
    """The rows as JSONL, as Parquet or as a saved dataset, by the name of the path."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_list(rows)
        if path.suffix == ".parquet":
            table.to_parquet(path)
        elif path.name == "splits":
            datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(path)
        else:
            table.save_to_disk(path)
    return path


@pytest.mark.parametrize("container", ["memory", "rows.jsonl", "rows.parquet", "saved", "splits"])
def test_every_format_in_every_container(tmp_path, chatty, container):
    formats = {
        completion_example: [
            {"prompt": "w1 w2", "completion": " w3"},
            {"prompt": "w4", "completion": " w5 w6"},
        ],
        preference_pair: [
            {"prompt": [user("w1")], "chosen": [assistant("w2")], "rejected": [assistant("w3 w4")], "margin": 0.5},
            {"prompt": [user("w5")], "chosen": [assistant("w6")], "rejected": [assistant("w7")], "margin": None},
        ],
    }
    for number, (make, rows) in enumerate(formats.items()):
        source = rows if container == "memory" else save(rows, tmp_path / str(number) / container)
        loaded = load_examples(source, "train", make, chatty, ExamplesConfig())
        assert loaded == [make(row, chatty, "") for row in rows]
        assert len(loaded) == 2
    prompts = [{"prompt": "w1", "topic": "a"}, {"prompt": "w2 w3", "topic": "b"}]
    source = prompts if container == "memory" else save(prompts, tmp_path / "prompts" / container)
    data = load_prompts(source, chatty, DataConfig())
    assert (data.prompts, data.columns) == (["w1", "w2 w3"], {"topic": ["a", "b"]})


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("0", "1", "prompts"):
        (tmp_path / name).mkdir()


def test_a_completion_ends_with_one_eos(tokenizer):
    example = completion_example({"prompt": "w1 w2", "completion": " w3"}, tokenizer, "")
    assert example == Example((*ids(tokenizer, "w1 w2 w3"), EOS), 2)
    assert (example.length, example.weight) == (4, 2)
    assert completion_example({"prompt": "w1 w2", "completion": " w3 <eos>"}, tokenizer, "") == example
    example = completion_example({"prompt": "w1", "completion": " w2 <eos> w3"}, tokenizer, "")
    assert example.ids == ids(tokenizer, "w1 w2 <eos> w3 <eos>")
    assert completion_example({"prompt": "w1 w2", "completion": ""}, tokenizer, "").ids[2:] == (EOS,)


def test_the_chat_template_says_where_the_answer_begins(chatty):
    row = {"prompt": [user("w1"), assistant("w2"), user("w3")], "completion": [assistant("w4 w5")]}
    example = completion_example(row, chatty, "")
    assert example.ids == ids(chatty, "w50 w1 w51 w2 <eos> w50 w3 w51 w4 w5 <eos>")
    assert example.ids[example.start :] == ids(chatty, "w4 w5 <eos>")
    assert completion_example({"messages": [*row["prompt"], *row["completion"]]}, chatty, "") == example


def test_a_template_without_eos_gets_one(chatty, monkeypatch):
    monkeypatch.setattr(chatty, "chat_template", TEMPLATE.replace("<eos>", "w52"))
    example = completion_example({"prompt": [user("w1")], "completion": [assistant("w2")]}, chatty, "")
    assert example.ids[example.start :] == ids(chatty, "w2 w52 <eos>")


def test_a_template_whose_prompt_is_no_beginning_is_refused(chatty, monkeypatch):
    monkeypatch.setattr(chatty, "chat_template", TEMPLATE.replace("w51 {% endif %}", "w51 w53 {% endif %}"))
    row = {"prompt": [user("w1")], "completion": [assistant("w2")]}
    message = r"^train\[0\]: expected the chat template of the prompt to begin that of prompt and completion$"
    with pytest.raises(UserError, match=message):
        load_examples([row], "train", completion_example, chatty, ExamplesConfig())


def test_a_boundary_inside_a_token_is_told(tokenizer):
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": " w2"}]
    with pytest.warns(UserWarning, match=r"^in 1 of 2 examples a token spans the end of the prompt; there prompt and"):
        glued, spaced = load_examples(rows, "train", completion_example, tokenizer, ExamplesConfig())
    assert glued.ids == spaced.ids  # "w1w2" is one unknown word, but "w2" alone is what the policy can say


def test_pairs_without_a_prompt_share_a_beginning(chatty):
    texts = {"chosen": "w1 w2 w3", "rejected": "w1 w2 w31 w5"}
    explicit = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w31 w5"}
    assert preference_pair(texts, chatty, "") == preference_pair(explicit, chatty, "")
    shorter = {"chosen": "w1 w2", "rejected": "w1 w2 w3"}
    assert preference_pair(shorter, chatty, "").chosen.start == 1
    begun = {"chosen": [user("w1"), assistant("w2")], "rejected": [user("w1"), assistant("w2"), user("w3")]}
    assert preference_pair(begun, chatty, "").chosen.ids == ids(chatty, "w50 w1 w51 w2 <eos>")
    talks = {"chosen": [user("w1"), assistant("w2")], "rejected": [user("w1"), assistant("w3")]}
    explicit = {"prompt": [user("w1")], "chosen": [assistant("w2")], "rejected": [assistant("w3")]}
    assert preference_pair(talks, chatty, "") == preference_pair(explicit, chatty, "")


def test_margins(tokenizer):
    row = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    pairs = [preference_pair(row | extra, tokenizer, "") for extra in ({}, {"margin": 2}, {"margin": None})]
    assert [pair.margin for pair in pairs] == [0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("make", "row", "message"),
    [
        (completion_example, {"prompt": "w1"}, 'expected "prompt", "completion", all of them text or all role/content'),
        (completion_example, {"prompt": "w1", "completion": [assistant("w2")]}, 'expected "prompt", "completion", all'),
        (completion_example, {"messages": [user("w1")]}, 'expected "prompt", "completion", all of them text'),
        (completion_example, "w1 w2", 'expected "prompt", "completion", all of them text'),
        (completion_example, {"prompt": "", "completion": "w1"}, "the prompt has no tokens"),
        (preference_pair, {"prompt": "w1", "chosen": " w2"}, 'expected "prompt", "chosen", "rejected", all of them'),
        (preference_pair, {"chosen": " w2"}, 'expected "chosen", "rejected", all of them text'),
        (preference_pair, {"chosen": "w1 w2", "rejected": "w3 w2"}, "the prompt has no tokens"),
        (preference_pair, {"prompt": "w1", "chosen": "w2", "rejected": "w3", "margin": "1"}, "expected a number as"),
        (preference_pair, {"prompt": "w1", "chosen": "w2", "rejected": "w3", "margin": True}, "expected a number as"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, make, row, message):
    good = {"prompt": "w1", "completion": " w2", "chosen": " w2", "rejected": " w3"}
    path = save([good, row], tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as error:
        load_examples(path, "train", make, tokenizer, ExamplesConfig())
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    def load(source):
        return load_examples(source, "train", completion_example, tokenizer, ExamplesConfig())

    with pytest.raises(UserError, match=rf"^data\.train: no such file 'none\.parquet' in {Path.cwd()}$"):
        load("none.parquet")
    with pytest.raises(UserError, match=r"^data\.train: expected a file of examples, got null$"):
        load(None)
    (tmp_path / "cut.parquet").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cut\.parquet: cannot be read: "):
        load(tmp_path / "cut.parquet")
    with pytest.raises(UserError, match=r"0: cannot be read: Directory .* is neither"):
        load(tmp_path / "0")
    row = {"prompt": "w1", "completion": " w2"}
    path = save([row], tmp_path / "splits")
    (path / "train").rename(path / "dev")
    (path / "dataset_dict.json").write_text('{"splits": ["dev", "test"]}')
    with pytest.raises(UserError, match=r"splits: expected a split 'train', got dev, test$"):
        load(path)
    saved = save([row, {"prompt": "w1", "completion": None}], tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved\[1\]: expected \"prompt\", \"completion\""):
        load(saved)


def test_long_and_repeated_examples_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "w1", "completion": f" {text}"} for text in ("w2", "w3", "w2", "w4 w5 w6", "w2")]

    def load(**config):
        return load_examples(rows, "train", completion_example, tokenizer, ExamplesConfig(**config))

    with (
        pytest.warns(UserWarning, match=r"^dropped 1 of 5 examples longer than data\.max_tokens = 4$"),
        pytest.warns(UserWarning, match=r"^dropped 2 of 4 examples that repeat another$"),
    ):
        kept = load(max_tokens=4, deduplicate=True)
    assert kept == [completion_example(row, tokenizer, "") for row in rows[:2]]
    assert len(load()) == 5
    with pytest.raises(
        UserError, match=r"^data\.train: expected at least one example of at most 2 tokens \(.*\), got 5 longer$"
    ):
        load(max_tokens=2)


def test_repeated_prompts_are_dropped(tokenizer):
    rows = [{"prompt": prompt, "row": row} for row, prompt in enumerate(("w1", "w2", "w1"))]
    with pytest.warns(UserWarning, match=r"^dropped 1 of 3 prompts that repeat another$"):
        data = load_prompts(rows, tokenizer, DataConfig(deduplicate=True))
    assert (data.prompts, data.columns, data.dropped) == (["w1", "w2"], {"row": [0, 1]}, 1)
    assert load_prompts(["w1", "w2", "w1"], tokenizer, DataConfig()).prompts == ["w1", "w2", "w1"]


def test_batches_are_padded_on_the_right():
    batch = collate([Example((5, 6, 2), 1), Example((7, 2, 8, 9, 2), 3)], 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 2, 0, 0], [7, 2, 8, 9, 2]]
    assert batch.attention_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.mask.tolist() == [[False, True, True, False, False], [False, False, False, True, True]]


@pytest.mark.parametrize("bucket", [False, True])
def test_every_example_once_per_epoch_in_a_new_order(bucket):
    lengths = list(range(22))
    batches, again = (Batches(lengths, 4, torch.Generator().manual_seed(0), bucket=bucket) for _ in range(2))
    epochs = [[batches.take() for _ in range(len(batches))] for _ in range(2)]
    assert len(batches) == 6
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == lengths
        assert sorted(map(len, epoch)) == [2, 4, 4, 4, 4, 4]
    assert epochs[0] != epochs[1]
    assert [again.take() for _ in range(6)] == epochs[0]


def test_buckets_hold_similar_lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (64,), generator=generator).tolist()

    def padding(bucket):
        batches = Batches(lengths, 8, generator, bucket=bucket)
        taken = [[lengths[row] for row in batches.take()] for _ in range(len(batches))]
        return sum(max(batch) * len(batch) - sum(batch) for batch in taken)

    assert padding(bucket=True) < padding(bucket=False) / 3
