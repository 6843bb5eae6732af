"""Prompts: reading, tokenizing, shuffling, padding."""

import json
from pathlib import Path

import pytest
import torch

from ppo_fast.rlhf.config.ppo import DataConfig
from ppo_fast.rlhf.data.prompts import PromptSampler, load_prompts, make_batch
from ppo_fast.rlhf.errors import UserError


def write(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_rows_keep_their_columns(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"prompt": "w1 w2", "topic": "a"}, "", {"prompt": "w3", "level": 2})
    data = load_prompts(path, tokenizer, DataConfig())
    assert data.prompts == ["w1 w2", "w3"]
    assert data.token_ids == [tokenizer("w1 w2")["input_ids"], tokenizer("w3")["input_ids"]]
    assert data.columns == {"topic": ["a", None], "level": [None, 2]}
    assert data.dropped == 0


def test_texts_and_rows_from_memory(tokenizer):
    data = load_prompts(["w1", {"prompt": "w2", "topic": "b"}], tokenizer, DataConfig())
    assert data.prompts == ["w1", "w2"]
    assert data.columns == {"topic": [None, "b"]}


def test_messages_go_through_the_chat_template(tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w59{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    data = load_prompts([{"prompt": [{"role": "user", "content": "w1 w2"}]}], tokenizer, DataConfig())
    assert data.token_ids == [tokenizer("w1 w2 w59")["input_ids"]]


def test_a_template_that_refuses_the_messages_names_the_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"prompts\[1\]: the chat template refuses the messages: roles must alternate"):
        load_prompts(["w1", {"prompt": [{"role": "user", "content": "w1"}]}], tokenizer, DataConfig())


def test_only_utf_8_is_read(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"prompt": "w1", "topic": "über"}\n'.encode())
    assert load_prompts(path, tokenizer, DataConfig()).columns == {"topic": ["über"]}
    path.write_bytes(b'{"prompt": "w1"}\n{"prompt": "w2 \xfc"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: not UTF-8"):
        load_prompts(path, tokenizer, DataConfig())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"p\.jsonl:2: not JSON: .* at column 2"),
        ({"text": "w1"}, r"p\.jsonl:2: expected \{\"prompt\": text or role/content messages\}, got"),
        ({"prompt": 3}, r"p\.jsonl:2: expected"),
        ({"prompt": []}, r"p\.jsonl:2: expected"),
        ({"prompt": ""}, r"p\.jsonl:2: the prompt has no tokens"),
        ({"prompt": "w1", "completions": 1}, r"p\.jsonl:2: the column name 'completions' is taken"),
        ({"prompt": [{"role": "user", "content": "w1"}]}, r"p\.jsonl:2: .* the tokenizer has no chat template"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "w1"}, line)
    with pytest.raises(UserError, match=message):
        load_prompts(path, tokenizer, DataConfig())


def test_long_prompts_are_dropped_and_counted(tokenizer):
    with pytest.warns(UserWarning, match=r"dropped 1 of 2 prompts longer than data\.max_prompt_tokens = 2"):
        data = load_prompts(["w1 w2 w3", "w4 w5"], tokenizer, DataConfig(max_prompt_tokens=2))
    assert (data.prompts, data.dropped) == (["w4 w5"], 1)
    with pytest.raises(
        UserError, match=r"^data\.prompts: expected at least one prompt of at most 1 tokens \(.*\), got 1 longer$"
    ):
        load_prompts(["w1 w2"], tokenizer, DataConfig(max_prompt_tokens=1))


def test_a_missing_file_is_an_error(tokenizer):
    with pytest.raises(UserError, match=rf"^data\.prompts: no such file 'nowhere\.jsonl' in {Path.cwd()}$"):
        load_prompts("nowhere.jsonl", tokenizer, DataConfig())


def test_every_prompt_once_per_epoch_in_a_new_order():
    sampler = PromptSampler(10, torch.Generator().manual_seed(0))
    taken = sampler.take(4) + sampler.take(4) + sampler.take(12)
    first, second = taken[:10], taken[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    again = PromptSampler(10, torch.Generator().manual_seed(0))
    assert again.take(20) == taken


def test_unshuffled_prompts_keep_their_order():
    assert PromptSampler(3, torch.Generator(), shuffle=False).take(5) == [0, 1, 2, 0, 1]


def test_batches_are_padded_on_the_left(tokenizer):
    data = load_prompts([{"prompt": "w1 w2 w3", "k": 1}, {"prompt": "w4", "k": 2}], tokenizer, DataConfig())
    batch = make_batch(data, [1, 0, 1], pad_id=9, device=torch.device("cpu"))
    long, (short,) = data.token_ids
    assert batch.input_ids.tolist() == [[9, 9, short], long, [9, 9, short]]
    assert batch.attention_mask.tolist() == [[False, False, True], [True] * 3, [False, False, True]]
    assert (batch.prompts, batch.columns) == (["w4", "w1 w2 w3", "w4"], {"k": [2, 1, 2]})
