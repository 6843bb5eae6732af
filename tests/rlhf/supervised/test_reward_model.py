"""Reward models: the head, the score at the EOS, calibration, statistics, and what is made of them."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.data.examples import collate, preference_pair
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.loading import disable_dropout
from ppo_fast.rlhf.models.pretrained import load_pretrained
from ppo_fast.rlhf.models.reward import add_score_head
from ppo_fast.rlhf.models.value import ValueModel, sequence_scores
from ppo_fast.rlhf.supervised.reward_model import RewardModel, calibration_error, reliability
from tests.rlhf.supervised_factories import EOS, make_model, make_tokenizer, pairs, ragged, rows


def test_the_reward_model_learns_a_separable_preference(run_stage):
    result = run_stage("reward", rows(200), optim={"epochs": 3})
    last = result.history[-1]
    assert last["eval/accuracy"] >= 0.95
    assert last["eval/margin"] > 2
    assert last["eval/loss"] < result.history[0]["train/loss"]
    stats = json.loads((result.model / "reward_stats.json").read_text())
    assert (stats["pairs"], stats["accuracy"], stats["ece"]) == (20, last["eval/accuracy"], last["eval/ece"])
    assert sum(row["count"] for row in stats["reliability"]) == 20
    assert list(stats["quantiles"].values()) == sorted(stats["quantiles"].values())


def test_the_statistics_are_those_of_the_saved_model_on_held_out_completions(run_stage, tmp_path):
    held_out = rows(12, seed=5)
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    result = run_stage("reward", rows(32), data={"held_out": str(path)})
    saved = AutoModelForSequenceClassification.from_pretrained(result.model)
    encoded = [preference_pair(row, make_tokenizer(), "") for row in held_out]
    completions = [example for pair in encoded for example in (pair.chosen, pair.rejected)]
    scores = torch.tensor([saved(torch.tensor([example.ids])).logits.item() for example in completions])
    stats = json.loads((result.model / "reward_stats.json").read_text())
    assert stats["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert stats["std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
    assert stats["quantiles"]["0.5"] == pytest.approx(scores.quantile(0.5).item(), abs=1e-5)
    assert (stats["mean"], stats["std"]) == tuple(result.history[-1][f"eval/score_{name}"] for name in ("mean", "std"))


def test_rule_14_a_new_reward_head_is_normal(tokenizer):
    hidden = 512
    model = tiny.make_model(64, hidden=hidden, layers=1, heads=2)
    reward_model = add_score_head(model, tokenizer, torch.Generator().manual_seed(0))
    weight = reward_model.score.weight
    assert weight.shape == (1, hidden)
    assert weight.std().item() * (hidden + 1) ** 0.5 == pytest.approx(1, abs=0.15)
    assert reward_model.score.bias is None
    assert not any(parameter.is_meta for parameter in reward_model.parameters())


def test_the_saved_reward_model_scores_the_eos_in_a_batch(run_stage, tokenizer):
    result = run_stage("reward")
    saved = AutoModelForSequenceClassification.from_pretrained(result.model)
    batch = collate(ragged(), tokenizer.pad_token_id, torch.device("cpu"))
    theirs = saved(batch.input_ids, attention_mask=batch.attention_mask.long()).logits.squeeze(-1)
    torch.testing.assert_close(
        sequence_scores(ValueModel.from_classifier(result.trained), batch.input_ids, batch.attention_mask), theirs
    )


def test_a_padding_token_that_is_eos_does_not_hide_it(run_stage):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    result = run_stage("reward", tokenizer=tokenizer)
    saved = AutoModelForSequenceClassification.from_pretrained(result.model)
    batch = collate(ragged(), EOS, torch.device("cpu"))
    scores = sequence_scores(ValueModel.from_classifier(result.trained), batch.input_ids, batch.attention_mask)
    for example, score in zip(ragged(), scores, strict=True):
        torch.testing.assert_close(saved(torch.tensor([example.ids])).logits[0, 0], score)
    with pytest.raises(ValueError, match="padding token"):
        saved(batch.input_ids, attention_mask=batch.attention_mask.long())


def test_a_reward_model_continues_from_an_earlier_one(run_stage, tmp_path):
    first = run_stage("reward")
    second = str(tmp_path / "second")
    second = run_stage("reward", rows(40, seed=1), init=str(first.model), output_dir=second, optim={"lr": 1e-9})
    for ours, theirs in zip(second.trained.parameters(), first.trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert (second.model / "reward_stats.json").is_file()
    AutoModelForSequenceClassification.from_pretrained(second.model)


@pytest.mark.parametrize("trust", [False, True])
def test_an_earlier_one_runs_its_own_code_only_when_trusted(run_stage, tmp_path, monkeypatch, trust):
    first, seen = run_stage("reward"), []
    for loader in (AutoConfig, AutoModelForSequenceClassification, AutoTokenizer):
        real = loader.from_pretrained

        def spy(path, real=real, **options):
            seen.append(options["trust_remote_code"])
            return real(path, **options)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    model = {"trust_remote_code": trust}
    run_stage("reward", init=str(first.model), output_dir=str(tmp_path / "second"), model=model)
    assert set(seen) == {trust}


@pytest.mark.parametrize("normalize", ["dataset", "none"])
@pytest.mark.parametrize("named", [False, True])
def test_rule_14_the_critic_starts_from_the_reward_model_in_the_scores_of_the_reward(
    run_stage, make_config, tokenizer, normalize, named
):
    reward_model = run_stage("reward")
    path = str(reward_model.model)
    result = train_ppo(
        make_config(
            updates=1,
            model={"value_path": path} if named else {},
            reward={"models": [path], "normalize": normalize},
            optim={"value_lr": 1e-9},
        ),
        prompts=["w1 w2", "w3"],
        policy=make_model(),
        tokenizer=tokenizer,
    )
    batch = collate(ragged(), 0, torch.device("cpu"))
    values = result.models.value(batch.input_ids, batch.attention_mask)
    last = torch.tensor([[example.length - 1] for example in ragged()])
    scores = sequence_scores(ValueModel.from_classifier(reward_model.trained), batch.input_ids, batch.attention_mask)
    if normalize == "dataset":
        stats = json.loads((reward_model.model / "reward_stats.json").read_text())
        scores = (scores - stats["mean"]) / stats["std"]
    torch.testing.assert_close(values.gather(1, last).squeeze(1), scores, rtol=0, atol=1e-5)


def test_the_critic_does_not_start_from_a_reward_model_that_reads_other_words(run_stage, make_config):
    path = str(run_stage("reward").model)
    other = tiny.make_tokenizer([f"v{i}" for i in range(60)])
    inputs = {"prompts": ["v1 v2", "v3"], "policy": make_model(), "tokenizer": other}
    result = train_ppo(make_config(updates=1, reward={"models": [path]}, optim={"value_lr": 1e-9}), **inputs)
    theirs = load_pretrained(AutoModelForSequenceClassification, path).get_input_embeddings().weight
    ours = result.models.value.backbone.get_input_embeddings().weight
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_a_margin_is_asked_of_the_scores(tokenizer):
    model = add_score_head(disable_dropout(make_model()), tokenizer, torch.Generator().manual_seed(0))
    objective = RewardModel(model, 0, 4)
    plain, wide = (objective.loss(pairs(margin=margin)) for margin in (0.0, 2.0))
    chosen, rejected = objective.scores(pairs())
    expected = torch.nn.functional.softplus(rejected - chosen + 2).mean()
    torch.testing.assert_close(wide.loss, expected)
    assert wide.loss > plain.loss
    assert objective.evaluate(pairs(margin=2.0))["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_calibration_by_hand():
    # sigmoid(log 4) = 0.8: four right of five is calibrated. sigmoid(log 99) = 0.99: one right of two is not.
    gaps = torch.tensor([4.0, 4.0, 4.0, 4.0, 1 / 4, 99.0, 1 / 99], dtype=torch.float64).log() * (1 + 1e-9)
    bins = reliability(gaps)
    assert [(row["count"], row["accuracy"]) for row in bins] == [(5, 0.8), (2, 0.5)]
    assert [row["confidence"] for row in bins] == pytest.approx([0.8, 0.99])
    assert calibration_error(bins) == pytest.approx((5 * 0.0 + 2 * 0.49) / 7)
    assert reliability(torch.zeros(3))[0] == {"confidence": 0.5, "accuracy": 0.0, "count": 3}
    assert reliability(torch.tensor([1e3]))[0]["confidence"] == 1
