"""Models with several EOS tokens: each ends a response, in every stage."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_fast import ops
from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.decoding.requests import Sampling
from ppo_fast.rlhf.decoding.slots import run_slots
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.loading import GENERATION
from ppo_fast.rlhf.ppo.judge import Judge
from ppo_fast.rlhf.ppo.reward_sources import ModelSource, Responses
from ppo_fast.rlhf.supervised import train as supervised
from tests.rlhf.chat import END, STOP, assistant, make_chat_tokenizer, user
from tests.rlhf.conftest import EOS, PROMPTS
from tests.rlhf.supervised_factories import STAGES, make_model

BOS, UNK = 1, 3  # further EOS of the model; EOS = 2 is the tokenizer's


@pytest.fixture
def several():
    """A model that `generate` ends at 1 and 3, as its generation config says."""
    model = make_model()
    model.generation_config.eos_token_id = [BOS, UNK]
    return model


def test_a_run_ends_responses_at_every_eos(several, tokenizer, make_config, monkeypatch, tmp_path):
    ends = torch.tensor([BOS, EOS, UNK, 9])
    seen = []

    def draw(_, logits, keys):
        tokens = torch.where(keys[:, 2] == 2, ends[keys[:, 1] % 4], 8)
        return tokens, ops.token_logprobs(logits, tokens)

    def reward(completions, completion_ids, **_):
        seen.extend(completion_ids)
        return [0.0] * len(completions)

    monkeypatch.setattr(Sampling, "draw", draw)
    values = {"updates": 1, "kl": {"coef": 0.0}, "evaluation": {"every": 1}, "reward": {"missing_eos_penalty": 1.0}}
    given = {"prompts": PROMPTS, "eval_prompts": PROMPTS, "policy": several, "tokenizer": tokenizer}
    result = train_ppo(make_config(data={"shuffle": False}, **values), reward_fn=reward, **given)
    (metrics,) = result.history
    assert seen[:4] == [[8, 8, BOS], [8, 8, EOS], [8, 8, UNK], [8, 8, 9, 8, 8, 8]]
    for name, value in {"length/truncated_frac": 0.25, "objective/scores": -0.25, "length/mean": 3.75}.items():
        assert metrics[name] == pytest.approx(value)
    assert metrics["eval/truncated_frac"] == pytest.approx(0.25)
    assert metrics["eval/scores"] == pytest.approx(-0.25)
    # The final model ends where the run did; so does a run that begins with it.
    saved = AutoModelForCausalLM.from_pretrained(result.model).generation_config
    assert saved.eos_token_id == [EOS, BOS, UNK]


@pytest.fixture
def examples_of(monkeypatch, run_stage):
    """examples_of(stage, rows, ...) -> (the examples that it trains on, the result)."""

    def go(stage, rows, **options):
        examples, load = [], supervised.load_examples

        def loaded(*arguments):
            examples.extend(load(*arguments))
            return examples

        with monkeypatch.context() as patch:
            patch.setattr(supervised, "load_examples", loaded)
            result = run_stage(stage, rows, data={"held_out_frac": 0.0}, **options)
        return examples, result

    return go


ROWS = [{"prompt": "w1", "completion": " w2 <unk>", "chosen": " w2 <unk>", "rejected": " w3 <eos>"}]


@pytest.mark.parametrize("stage", STAGES)
def test_a_completion_may_end_with_any_eos(stage, examples_of, several):
    (example,), result = examples_of(stage, ROWS, policy=several)
    assert example.parts[0].ids == (5, 6, UNK)
    assert example.parts[-1].ids in ((5, 6, UNK), (5, 7, EOS))
    assert json.loads((result.model / GENERATION).read_text())["eos_token_id"] == [EOS, BOS, UNK]


def test_a_reward_model_keeps_its_eos_when_it_is_trained_further(examples_of, several):
    _, result = examples_of("reward", ROWS, policy=several)
    values = {"init": str(result.model), "overwrite": True, "output_dir": f"{result.directory}-more"}
    (example,), more = examples_of("reward", ROWS, **values)
    assert example.chosen.ids == (5, 6, UNK)
    assert json.loads((more.model / GENERATION).read_text())["eos_token_id"] == [EOS, BOS, UNK]


@pytest.fixture
def reward_model(tmp_path):
    """Path of a reward model with a ChatML tokenizer whose EOS is another token than that of its template."""

    def make(tokenizer):
        config = tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2, max_positions=512).config
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": [STOP, END]}))
        return str(tmp_path)

    return make


@pytest.mark.parametrize("other", [False, True])
def test_a_reward_model_reads_any_eos_as_the_end(reward_model, other):
    own, policys = make_chat_tokenizer(eos="</s>"), make_chat_tokenizer(eos="</s>", other=other)
    source = ModelSource(
        reward_model(own),
        policys,
        model=ModelConfig(),
        device=torch.device("cpu"),
        batch_size=2,
        eos_ids=(STOP, END),
    )
    prompt = policys.apply_chat_template([user("two")], add_generation_prompt=True, return_dict=False)
    answer = [*policys("four")["input_ids"], END]
    responses = Responses([[user("two")]], [prompt], ["four"], [answer], [True], {})
    text = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    assert [own.decode(row) for row in source.encode(responses)] == [text]


def test_a_judge_ends_its_answer_at_every_eos(tmp_path, tokenizer, several, monkeypatch):
    several.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge, seen = Judge(str(tmp_path), rubric="r", max_new_tokens=1), []

    def engine(model, requests, settings):
        seen.append(settings.eos_ids)
        return run_slots(model, requests, settings)

    monkeypatch.setattr("ppo_fast.rlhf.ppo.judge.find_engine", lambda *_: engine)
    judge.answer(["w1"])
    assert seen == [(EOS, BOS, UNK)]


def test_an_assistants_answer_that_the_template_ends_gets_no_other_eos(examples_of):
    tokenizer = make_chat_tokenizer(eos="</s>")
    model = tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2)
    model.generation_config.eos_token_id = [STOP, END]
    rows = [{"messages": [user("two"), assistant("four")]}]
    (example,), _ = examples_of("sft", rows, policy=model, tokenizer=tokenizer)
    assert tokenizer.decode(example.ids[example.start :]) == "four<|im_end|>"
