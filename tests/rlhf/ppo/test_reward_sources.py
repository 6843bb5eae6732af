"""Reward models as a source of scores: what they read, where they are read, and the statistics beside them."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.errors import NotFiniteError
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.saved import STATS
from ppo_fast.rlhf.ppo.reward_sources import ModelSource, Responses
from tests.rlhf.conftest import EOS, PROMPTS, WORDS

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def make_reward_model(tmp_path, tokenizer):
    """make_reward_model(name, words=..., stats=..., template=...) -> path of a random reward model with a tokenizer."""

    def make(name="rm", *, words=None, stats=None, template=None, seed=0, arch="llama"):
        own = tokenizer if words is None else tiny.make_tokenizer(words)
        causal = tiny.make_model(len(own), arch=arch, hidden=16, layers=1, heads=2, seed=seed)
        torch.manual_seed(seed)
        causal.config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(causal.config)
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
        if template is not None:
            (tmp_path / name / "chat_template.jinja").write_text(template)
        if stats is not None:
            (tmp_path / name / STATS).write_text(stats if isinstance(stats, str) else json.dumps(stats))
        return str(tmp_path / name)

    return make


def made(completion_ids, *, prompt_ids=((5,), (6, 7, 8), (9, 10)), prompts=("w1", "w2 w3 w4", "w5 w6")):
    """Responses of words w0 = id 4 and so on, EOS where the last id is one."""
    texts = [" ".join(f"w{i - 4}" for i in ids if i != EOS) for ids in completion_ids]
    ended = [ids[-1] == EOS for ids in completion_ids]
    return Responses(list(prompts), list(map(list, prompt_ids)), texts, completion_ids, ended, {})


def source(path, tokenizer, batch_size=16):
    return ModelSource(path, tokenizer, model=ModelConfig(), device=CPU, batch_size=batch_size)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_rule_14_the_score_is_read_at_the_last_counted_token(make_reward_model, tokenizer, arch):
    path = make_reward_model(arch=arch)
    responses = made([[20, EOS], [21, 22, 23, EOS], [24, 25]])
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = source(path, tokenizer, batch_size=2)(responses)
    for prompt, completion, score in zip(responses.prompt_ids, responses.completion_ids, scores, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state
            assert score == pytest.approx(model.score(hidden[0, -1]).item(), abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 3


def test_a_model_with_the_same_vocabulary_gets_the_ids_themselves(make_reward_model, tokenizer):
    responses = made([[20, 3, EOS], [21, EOS], [22]])  # 3 is the unknown word, which text does not bring back
    assert source(make_reward_model(), tokenizer).encode(responses) == [
        [5, 20, 3, EOS],
        [6, 7, 8, 21, EOS],
        [9, 10, 22],
    ]


def test_a_model_with_another_tokenizer_gets_the_text_and_its_own_eos(make_reward_model, tokenizer):
    other = source(make_reward_model(words=list(reversed(WORDS))), tokenizer)
    rows = other.encode(made([[20, EOS], [1, 21, EOS], [22]]))  # 1 is <bos>, which is no text
    assert [other.own.decode(row) for row in rows] == ["w1 w16 <eos>", "w2 w3 w4 w17 <eos>", "w5 w6 w18"]
    assert rows[0][:2] == [4 + 59 - 1, 4 + 59 - 16]


def test_a_response_that_a_stop_string_ended_is_read_at_an_eos(make_reward_model, tokenizer):
    responses = dataclasses.replace(made([[20, EOS], [21, 22], [22]]), ended=[True, True, False])
    assert source(make_reward_model(), tokenizer).encode(responses) == [
        [5, 20, EOS],
        [6, 7, 8, 21, 22, EOS],
        [9, 10, 22],
    ]


def test_messages_go_through_the_models_own_chat_template(make_reward_model, tokenizer):
    words = ["user", "assistant", *reversed(WORDS)]
    prompts = [[{"role": "user", "content": "w1"}]]
    with_template = source(make_reward_model("a", words=words, template=TEMPLATE), tokenizer)
    responses = made([[20, EOS]], prompt_ids=((5,),), prompts=prompts)
    assert [with_template.own.decode(row) for row in with_template.encode(responses)] == ["user w1 assistant w16 <eos>"]
    without = source(make_reward_model("b", words=words), tokenizer)
    assert [without.own.decode(row) for row in without.encode(responses)] == ["w1 w16 <eos>"]


def test_saved_statistics_are_read(make_reward_model, tokenizer):
    assert source(make_reward_model("a"), tokenizer).saved_stats == (0.0, 1.0)
    stats = {"mean": -1.5, "std": 0.5, "accuracy": 0.9}
    assert source(make_reward_model("b", stats=stats), tokenizer).saved_stats == (-1.5, 0.5)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ("{", r"reward_stats\.json: expected \{\"mean\": number, \"std\": number\}, got JSONDecodeError"),
        ({"mean": 1.0}, r"reward_stats\.json: expected .*, got KeyError\('std'\)"),
        ({"mean": 1.0, "std": 0.0}, r"reward_stats\.json: expected a finite mean and a std > 0, got 1\.0 and 0\.0"),
    ],
)
def test_bad_statistics_are_named(make_reward_model, tokenizer, stats, message):
    with pytest.raises(UserError, match=message):
        source(make_reward_model(stats=stats), tokenizer)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_what_is_no_reward_model_is_named(make_reward_model, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"reward\.models: no such directory '.*none'"):
        source(str(tmp_path / "none"), tokenizer)
    path = make_reward_model()
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "rm" / "model.safetensors").unlink()
    AutoModelForSequenceClassification.from_config(
        type(tiny.make_model(64, hidden=16, layers=1, heads=2).config).from_dict(config)
    ).save_pretrained(path)
    with pytest.raises(UserError, match=r"^reward\.models: expected a linear head 'score' with one output, got Linear"):
        source(path, tokenizer)


def test_a_score_that_is_not_finite_names_model_and_sample(make_reward_model, tokenizer):
    path = make_reward_model()
    broken = source(path, tokenizer)
    with torch.no_grad():
        broken.model.backbone.get_input_embeddings().weight[21] = float("nan")
    with pytest.raises(NotFiniteError, match=rf"^{path}: expected a finite score for sample 1, got nan$") as error:
        broken(made([[20, EOS], [21, 22, EOS], [22]]))
    assert error.value.rows == [1]


def test_what_is_too_long_for_the_model_is_named(make_reward_model, tokenizer):
    path = make_reward_model()
    with pytest.raises(UserError, match=rf"^{path}: expected at most 128 tokens of prompt and response, got 130$"):
        source(path, tokenizer)(made([[20] * 129, [21], [22]]))


def test_a_run_with_an_ensemble_and_a_function(make_reward_model, make_config, tokenizer):
    models = [make_reward_model("a", seed=1), make_reward_model("b", seed=2)]

    def train(function=None, **reward):
        values = {"updates": 1, "kl": {"coef": 0.0}, "overwrite": True}
        config = make_config(reward={"missing_eos_penalty": 0.0, **reward}, **values)
        policy = tiny.make_model(64, hidden=16, layers=1, heads=2)
        return train_ppo(config, reward_fn=function, prompts=PROMPTS, policy=policy, tokenizer=tokenizer).history[0]

    metrics = train(models=models, combine="mean")
    assert metrics["hacking/ensemble_std"] > 0
    assert metrics["objective/scores"] != 0
    both = train(lambda completions, **_: [1.0] * len(completions), models=models[:1], weights=[1.0, 0.0])
    assert both["objective/scores"] == 1
    assert "hacking/ensemble_std" not in both
