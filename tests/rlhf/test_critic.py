"""Pre-training of the value model: from rows, from a run and by sampling; what it explains; where it goes."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ppo_fast.rlhf import sample_scored, train_ppo, train_value_model
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.supervised import ValueConfig
from ppo_fast.rlhf.critic import ValueRegression
from ppo_fast.rlhf.data.examples import Scored, scored_example
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.training.signals import Interrupted
from tests.helpers import raises_exactly
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.supervised_factories import EOS, make_model

LOG = {"tensorboard": False, "console": False}


def scored_rows(count=96):
    """The score is 3 after two of four first words of the prompt, -1 after the others."""
    generator = np.random.default_rng(0)
    prompts = [[int(generator.integers(0, 4)), int(generator.integers(0, 60))] for _ in range(count)]
    return [
        {"prompt": f"w{a} w{b}", "completion": " w7" * (1 + b % 4), "score": 3.0 if a > 1 else -1.0} for a, b in prompts
    ]


def make_value_config(tmp_path, **values):
    optim = {"lr": 1e-2, "batch_size": 16, "epochs": 8}
    base = {"threads": 1, "optim": optim, "output_dir": str(tmp_path / "value"), "log": LOG}
    return config_from_dict(base | values, kind=ValueConfig)


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 8}}], ids=["whole", "adapters"])
def test_a_trained_value_model_explains_held_out_returns_and_is_what_value_path_takes(tmp_path, tokenizer, model):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = make_value_config(tmp_path, model={"path": str(base)} | model)
    result = train_value_model(config, train=scored_rows())
    stats = json.loads((result.model / "value_stats.json").read_text())
    assert stats["before"]["explained_variance"] < 0.2
    assert stats["after"]["explained_variance"] > 0.7
    assert stats["after"] == {
        name.removeprefix("eval/"): value for name, value in result.history[-1].items() if name.startswith("eval/")
    }
    layout = {"layout": "adapters"} if model else {}
    start = {"path": str(base), "value_path": str(result.model)} | model | layout
    critic = load_models(config_from_dict({"model": start}).model, torch.Generator().manual_seed(0))
    ids = torch.tensor([tokenizer("w3 w4 w7").input_ids])
    with critic.using("value") as value, torch.no_grad():
        found = value(ids, torch.ones_like(ids, dtype=torch.bool))[0, 1]
    assert found > 1


def test_the_best_value_model_is_kept_and_the_clock_ends_the_run_with_a_checkpoint(tmp_path, tokenizer):
    values = {"optim": {"lr": 1e-2, "batch_size": 32, "epochs": 1}, "log": LOG | {"eval_every": 1}}
    values |= {"evaluation": {"best": "eval/explained_variance"}}
    rows = scored_rows()
    config = make_value_config(tmp_path, **values, max_hours=1e-9)
    with pytest.raises(Interrupted, match=r"^max_hours: stopped after step 1; saved "):
        train_value_model(config, train=rows, model=make_model(), tokenizer=tokenizer)
    config = make_value_config(tmp_path, **values)
    result = train_value_model(config, train=rows, model=make_model(), tokenizer=tokenizer, resume=True)
    found = [metrics["eval/explained_variance"] for metrics in result.history]
    best = json.loads((result.directory / "best" / "value_stats.json").read_text())["after"]["explained_variance"]
    assert (len(found), best) == (3, max(found))


def test_values_are_regressed_on_the_discounted_score_of_the_states_before_each_token():
    examples = [Scored((5, 6, 7, 8, EOS), 2, score=2.0), Scored((9, 10, EOS), 1, score=-1.0)]
    objective = ValueRegression(_classifier(), 0, 1, gamma=0.5)
    assert objective.returns(examples).tolist() == [0.5, 1.0, 2.0, -0.5, -1.0]
    values = objective.values(examples)
    assert torch.allclose(
        torch.cat([objective.values(examples[:1]), objective.values(examples[1:])]), values, atol=1e-5
    )
    states = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    for found, (row, place) in zip(values, states, strict=True):
        ids = torch.tensor([examples[row].ids[: place + 1]])
        hidden = objective.model.base_model(ids).last_hidden_state[0, -1]
        assert torch.allclose(found, objective.model.score(hidden)[0], atol=1e-5)
    loss = objective.loss(examples).loss
    assert torch.allclose(loss, 0.5 * ((values - objective.returns(examples)) ** 2).mean())


def _classifier():
    from ppo_fast.rlhf.models.reward import add_score_head

    return add_score_head(make_model(), tiny.make_tokenizer(["a"]), torch.Generator().manual_seed(0))


def test_responses_come_from_a_run_or_from_sampling_with_its_config(tmp_path, tokenizer, make_config):
    policy, reward = make_model(), tmp_path / "r.py"
    for name, model in (("policy", policy), ("base", make_model())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    reward.write_text("def f(completion_ids, **_):\n    return [float(ids[0]) for ids in completion_ids]\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    values = {
        "model": {"path": str(tmp_path / "policy")},
        "data": {"prompts": str(tmp_path / "prompts.jsonl")},
        "reward": {"function": f"{reward}:f", "clip": None, "missing_eos_penalty": 0.0},
        "log": {"all_samples": True},
        "updates": 1,
    }
    ppo = make_config(**values)
    run = train_ppo(ppo)
    rows = sample_scored(ppo, 20)
    assert len(rows) == 20
    assert all(row["score"] == row["completion_ids"][0] for row in rows)
    (tmp_path / "run.yaml").write_text((run.directory / "config.yaml").read_text())
    for source in (run.directory, tmp_path / "run.yaml"):
        optim = {"batch_size": 4, "epochs": 1}
        config = make_value_config(tmp_path, samples=8, optim=optim, model={"path": str(tmp_path / "base")})
        config = dataclasses.replace(config, output_dir=str(tmp_path / f"value-{source.name}"))
        result = train_value_model(config, train=source)
        assert len(result.history) == 2  # 7 of 8 in batches of 4


def test_sampling_for_a_value_model_takes_no_rollout_function(make_config):
    message = "rollout.function: expected null to sample responses for a value model, got 'tools.py:f'"
    with raises_exactly(message, UserError):
        sample_scored(make_config(rollout={"function": "tools.py:f"}), 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "completion": " w2"}, "train[0]: expected a finite number as score, got None"),
        ({"prompt": "w1", "completion": "", "score": 1, "ended": False}, "train[0]: the completion has no tokens"),
    ],
)
def test_a_row_without_a_score_or_a_token_is_named(row, message, tokenizer):
    with raises_exactly(message, UserError):
        scored_example(row, tokenizer, "train[0]")


def test_a_response_cut_short_has_no_eos(tokenizer):
    row = {"prompt": "w1", "completion": " w2", "score": 1}
    assert scored_example(row, tokenizer, "x").ids == (5, 6, EOS)
    assert scored_example(row | {"ended": False}, tokenizer, "x").ids == (5, 6)
