"""What becomes of rows with messages, tools and special tokens, in every stage that reads them."""

import json

import datasets
import pytest
import torch

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.config.ppo import DataConfig, ModelConfig
from ppo_fast.rlhf.config.supervised import ExamplesConfig
from ppo_fast.rlhf.data.examples import completion_example, load_examples, preference_pair
from ppo_fast.rlhf.data.prompts import load_prompts
from ppo_fast.rlhf.data.rows import read_rows
from ppo_fast.rlhf.data.templates import as_text
from ppo_fast.rlhf.decoding.slots import run_slots
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.reward import RewardNetwork
from ppo_fast.rlhf.ppo import reward_sources
from ppo_fast.rlhf.ppo.judge import LocalModel
from ppo_fast.rlhf.ppo.reward_sources import ModelSource, Responses
from ppo_fast.rlhf.reports.export import export_pairs
from tests.helpers import raises_exactly
from tests.rlhf.chat import END, TOOL, assistant, make_chat_tokenizer, user

PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def read_sft(source, tokenizer):
    (example,) = load_examples(source, "train", completion_example, tokenizer, ExamplesConfig(max_tokens=10_000))
    return [example]


def read_pair(source, tokenizer):
    (pair,) = load_examples(source, "train", preference_pair, tokenizer, ExamplesConfig(max_tokens=10_000))
    return [pair.chosen, pair.rejected]


def read_prompt(source, tokenizer):
    return load_prompts(source, tokenizer, DataConfig(max_prompt_tokens=10_000)).token_ids[0]


# SFT, reward model and DPO, PPO and evaluation
READERS = {"examples": read_sft, "pairs": read_pair, "prompts": read_prompt}
each_reader = pytest.mark.parametrize("reader", READERS)


def row_of(prompt, answer, **columns):
    """A row that every reader takes."""
    return {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": answer, **columns}


def texts(reader, source, tokenizer):
    """The texts of the prompts that a reader finds, and of the completions where it reads some."""
    found = READERS[reader](source, tokenizer)
    if reader == "prompts":
        return {(tokenizer.decode(found), None)}
    return {(tokenizer.decode(e.ids[: e.start]), tokenizer.decode(e.ids[e.start :])) for e in found}


@each_reader
@pytest.mark.parametrize("adds", [(), ("bos",), ("bos", "eos"), ("eos",)], ids="-".join)
def test_one_bos_and_no_eos_but_the_last(reader, adds):
    tokenizer = make_chat_tokenizer(adds=adds)
    begin = "<s>" if "bos" in adds else ""
    for prompt, text in (("two", f"{begin}two"), ("<s>two", "<s>two"), ("a<|im_end|>", f"{begin}a<|im_end|>")):
        answer = None if reader == "prompts" else " four<|im_end|>"
        for given in (" four", " four<|im_end|>"):
            assert texts(reader, [row_of(prompt, given)], tokenizer) == {(text, answer)}
    if begin:
        assert READERS[reader]([row_of("", "four")], tokenizer)  # BOS by itself is a prompt
    answer = None if reader == "prompts" else "four<|im_end|>"
    chat = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert texts(reader, [row_of([user("two")], [assistant("four")])], tokenizer) == {(chat, answer)}


@each_reader
@pytest.mark.parametrize("begun", ["It is", [{"type": "text", "text": "It is"}]], ids=["text", "parts"])
def test_an_answer_that_the_prompt_begins_is_continued(reader, begun):
    template = "{% if messages[-1].content is string %}" + make_chat_tokenizer().chat_template + "{% else %}"
    tokenizer = make_chat_tokenizer(template=template + PARTS_TEMPLATE + "{% endif %}")
    messages = [user("two"), assistant(begun)]
    ((prompt, answer),) = texts(reader, [row_of(messages, [assistant(" four")])], tokenizer)
    rendered = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert prompt == rendered
    assert prompt.endswith("It is")
    assert answer == (None if reader == "prompts" else " four<|im_end|>")


def test_prompts_are_those_of_trl():
    trl = pytest.importorskip("trl.data_utils")
    tokenizer = make_chat_tokenizer()
    for messages in ([user("two")], [user("two"), assistant("It is")]):
        row = {"prompt": messages, "chat_template_kwargs": {}}
        expected = trl.apply_chat_template(row, tokenizer, tools=[TOOL])["prompt"]
        assert tokenizer.decode(read_prompt([row | {"tools": [TOOL]}], tokenizer)) == expected


@each_reader
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), None, []], ids=["list", "json", "none", "empty"])
def test_tools_reach_the_template(reader, tools):
    tokenizer = make_chat_tokenizer()
    row = row_of([user("two")], [assistant("four")], tools=tools)
    ((prompt, _),) = texts(reader, [row], tokenizer)
    options = {"add_generation_prompt": True, "tokenize": False}
    assert prompt == tokenizer.apply_chat_template([user("two")], tools=[TOOL] if tools else None, **options)
    assert ("<|im_start|>tools" in prompt) == bool(tools)


@each_reader
def test_further_arguments_reach_the_template(reader):
    template = "{% if think %}<|im_start|>{% endif %}" + make_chat_tokenizer().chat_template
    row = row_of([user("two")], [assistant("four")], chat_template_kwargs={"think": True, "none": None})
    ((prompt, _),) = texts(reader, [row], make_chat_tokenizer(template=template))
    assert prompt.startswith("<|im_start|><|im_start|>user")


@each_reader
def test_keys_that_arrow_filled_with_none_are_dropped(reader, tmp_path):
    tokenizer = make_chat_tokenizer()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "sub", "arguments": {"b": 2}}}
    messages = [
        user("two"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "tool_calls": [call, other]},
        {"role": "tool", "content": "5", "name": "add"},
    ]
    row = row_of(messages, [assistant("four")], tools=[TOOL])
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    (arrow,) = (row for _, row in read_rows(tmp_path / "rows.parquet", "data"))
    assert "'tool_calls': None" in str(arrow)
    ((prompt, answer),) = texts(reader, tmp_path / "rows.parquet", tokenizer)
    assert "None" not in prompt
    assert "null" not in prompt
    assert {(prompt, answer)} == texts(reader, [row], tokenizer)


DEEP = "[" * 5000 + "]" * 5000


@each_reader
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"role": "user", "content": None}, "expected "),
        ({"role": "user"}, "expected "),
        ({"role": "user", "content": []}, "expected "),
        ({"role": "user", "content": [{"type": "image"}]}, "expected "),
        ({"role": "user", "content": 3}, "expected "),
        ({"role": "user", "content": "\ud800"}, r"expected Unicode text, got the lone surrogate '\ud800'"),
        ({"role": "user", "content": "a", "name": "\udfff"}, r"expected Unicode text, got the lone surrogate '\udfff'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            "the chat template refuses the messages: it takes no list of parts as content",
        ),
        ({"role": "user", "content": "a", "deep": "DEEP"}, "expected lists and objects less deeply nested"),
        ({"role": "user", "content": "a", "big": "BIG"}, "not JSON: Exceeds the limit"),
        (
            {"role": "assistant", "tool_calls": [{"name": "add"}]},
            "expected messages that end before the answer or within it, got a call of tools",
        ),
    ],
    ids=["null", "missing", "empty", "image", "number", "surrogate", "unused", "parts", "deep", "digits", "call"],
)
def test_a_message_that_cannot_be_used_is_named(reader, line, message, tmp_path):
    path, good = tmp_path / "rows.jsonl", row_of([user("two")], [assistant("four")])
    bad = json.dumps(row_of([line], [assistant("four")])).replace('"DEEP"', DEEP).replace('"BIG"', "1" * 5000)
    path.write_text(json.dumps(good) + "\n" + bad + "\n")
    with pytest.raises(UserError) as error:
        READERS[reader](path, make_chat_tokenizer())
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


@each_reader
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "add"}, "expected tools to be a list of JSON schemas or its JSON text, got 'add'"),
        ({"tools": {"a": 1}}, "expected tools to be a list of JSON schemas or its JSON text, got {'a': 1}"),
        ({"tools": ["add"]}, "expected tools to be a list of JSON schemas or its JSON text, got ['add']"),
        ({"tools": DEEP}, "expected tools to be a list of JSON schemas or its JSON text, got '[["),
        ({"chat_template_kwargs": 3}, "expected chat_template_kwargs to be a JSON object, got 3"),
    ],
)
def test_columns_that_the_template_cannot_have_are_named(reader, columns, message):
    row = row_of([user("two")], [assistant("four")], **columns)
    with pytest.raises(UserError) as error:
        READERS[reader]([row], make_chat_tokenizer())
    assert f"[0]: {message}" in str(error.value)


@each_reader
def test_a_list_of_texts_is_content_where_the_template_takes_it(reader):
    tokenizer = make_chat_tokenizer(template=PARTS_TEMPLATE)
    parts = [{"type": "text", "text": "tw", "image": None}, {"type": "text", "text": "o"}]
    row = row_of([user(parts)], [assistant([{"type": "text", "text": "four"}])])
    answer = None if reader == "prompts" else "four<|im_end|>"
    assert texts(reader, [row], tokenizer) == {("user: two<|im_end|>assistant: ", answer)}


@each_reader
@pytest.mark.parametrize("template", ["{{ 1 + messages[0].content }}", "{{ messages[0].nothing.at_all }}"])
def test_a_template_that_fails_is_named(reader, template):
    with pytest.raises(
        UserError, match=r"\[0\]: the chat template refuses the messages: .*(unsupported|undefined|no at)"
    ):
        READERS[reader]([row_of([user("two")], [assistant("four")])], make_chat_tokenizer(template=template))


def test_a_boundary_within_a_token_of_a_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt": [user("w1")], "completion": [assistant("w2")]}
    with pytest.warns(UserWarning, match=r"^in 1 of 1 examples a token spans the end of the prompt; there prompt and"):
        (example,) = read_sft([row], tokenizer)
    assert example.ids == (5, 6, 2)  # what the policy can say after the prompt


def test_messages_as_people_read_them():
    call = {"name": "add", "arguments": {"a": 1, "b": None}}
    messages = [
        user([{"type": "text", "text": "tw"}, {"type": "text", "text": "o"}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "so", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
    ]
    calls = '[{"name": "add", "arguments": {"a": 1}}]'
    assert as_text(messages) == f"user: two\nassistant: {calls}\nassistant: so {calls}\ntool: 4"


@pytest.fixture
def make_source(monkeypatch):
    """make_source(own, policys) -> a reward model, without weights, with the tokenizer `own`."""

    def make(own, policys):
        network = torch.nn.Module()
        network.backbone = torch.nn.Module()
        network.backbone.config = None
        monkeypatch.setattr(reward_sources, "_load_network", lambda *_: RewardNetwork(network))
        monkeypatch.setattr(reward_sources, "load_tokenizer", lambda *_: own)
        return ModelSource("rm", policys, model=ModelConfig(), device=torch.device("cpu"), batch_size=4)

    return make


def respond(tokenizer, prompt, answer, *, ended, **columns):
    """The response of a policy with this tokenizer."""
    (ids,) = load_prompts([{"prompt": prompt, **columns}], tokenizer, DataConfig(max_prompt_tokens=10_000)).token_ids
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *[END] * ended]
    columns = {name: [value] for name, value in columns.items()}
    return Responses([prompt], [ids], [answer], [answer_ids], [ended], columns)


PROMPTS = {
    "messages": [user("two")],
    "begun": [user("two"), assistant("It is")],
    "text": "two",
    "special": "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("adds", [(), ("bos", "eos")], ids="-".join)
@pytest.mark.parametrize("ended", [True, False])
def test_a_reward_model_with_another_tokenizer_reads_what_it_was_trained_on(make_source, prompt, adds, ended):
    own, policys = make_chat_tokenizer(adds=adds, other=True), make_chat_tokenizer(adds=("bos",))
    source, asked, answer = make_source(own, policys), PROMPTS[prompt], " four"
    columns = {} if isinstance(asked, str) else {"tools": [TOOL]}
    (row,) = source.encode(respond(policys, asked, answer, ended=ended, **columns))
    completion = answer if isinstance(asked, str) else [assistant(answer)]
    (trained,) = read_sft([{"prompt": asked, "completion": completion, **columns}], own)
    assert own.decode(trained.ids).endswith(" four<|im_end|>")
    assert row == [*trained.ids][: None if ended else -1]


def test_text_of_a_tokenizer_that_joins_by_spaces(make_source, tokenizer):
    source = make_source(make_chat_tokenizer(), tokenizer)
    responses = Responses(["w1 <eos>\nwx"], [[5, 2, 3]], ["w2"], [[6, 1, 2]], [True], {})
    assert [source.own.decode(row) for row in source.encode(responses)] == ["w1 <eos>\nwx w2<|im_end|>"]


def test_a_template_of_a_reward_model_that_refuses_is_named(make_source):
    own, policys = make_chat_tokenizer(template="{{ raise_exception('no') }}", other=True), make_chat_tokenizer()
    source = make_source(own, policys)
    with raises_exactly("rm: the chat template refuses the messages: no", UserError):
        source.encode(respond(policys, [user("two")], "four", ended=True))


@pytest.mark.parametrize("template", [None, make_chat_tokenizer().chat_template], ids=["text", "messages"])
def test_a_judge_is_asked_without_an_eos(tmp_path, template, monkeypatch):
    tokenizer = make_chat_tokenizer(template=template, adds=("bos", "eos"))
    tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge, seen = LocalModel(str(tmp_path), 1, 2, "cpu", "float32"), []

    def engine(model, requests, settings):
        seen.extend(request.prompt for request in requests)
        return run_slots(model, requests, settings)

    monkeypatch.setattr("ppo_fast.rlhf.ppo.judge.find_engine", lambda *_: engine)
    judge(["two", "three"])
    text = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n" if template else "<s>two"
    assert tokenizer.decode(seen[0]) == text


def test_exported_pairs_keep_the_columns_of_the_template(tmp_path):
    common = {"update": 1, "prompt": [user("two")], "tools": [TOOL]}
    records = [common | {"completion": text, "score": score} for text, score in (("four", 1.0), ("five", 0.0))]
    records += [records[0] | {"tools": None, "score": 2.0}]  # another question
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (pair,) = (json.loads(line) for line in export_pairs(tmp_path).read_text().splitlines())
    assert (pair["tools"], pair["chosen"]) == ([TOOL], [assistant("four")])
