"""SFT, reward model and DPO: what the losses count, invariances, learning, and what a run leaves."""

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config

from ppo_fast.rlhf import (
    DPOConfig,
    RewardModelConfig,
    SFTConfig,
    UserError,
    load_config,
    tiny,
    train_dpo,
    train_ppo,
    train_reward_model,
    train_sft,
)
from ppo_fast.rlhf.configfile import config_from_dict
from ppo_fast.rlhf.dpo import DPO
from ppo_fast.rlhf.examples import Example, Pair, collate, completion_example, preference_pair
from ppo_fast.rlhf.models import disable_dropout
from ppo_fast.rlhf.reward_model import RewardModel, add_score_head, calibration_error, reliability, sequence_scores
from ppo_fast.rlhf.sft import SFT
from ppo_fast.rlhf.supervised import completion_logprobs, load_data
from tests.rlhf.conftest import WORDS

EOS = 2
STAGES = {
    "sft": (train_sft, SFTConfig, AutoModelForCausalLM),
    "reward": (train_reward_model, RewardModelConfig, AutoModelForSequenceClassification),
    "dpo": (train_dpo, DPOConfig, AutoModelForCausalLM),
}


def words(rng, low, high):
    return "".join(f" w{rng.randrange(low, high)}" for _ in range(rng.randint(1, 5)))


def rows(count, seed=0):
    """Rows of every format at once: good answers have words below 20, bad ones from 40."""
    rng = random.Random(seed)
    fields = [("prompt", 0, 60), ("completion", 0, 20), ("chosen", 0, 20), ("rejected", 40, 60)]
    return [{name: words(rng, *span) for name, *span in fields} for _ in range(count)]


def make_model(**options):
    return tiny.make_model(64, hidden=32, layers=1, heads=2, **options)


def make_tokenizer():
    return tiny.make_tokenizer(WORDS)


@pytest.fixture
def run(tmp_path, tokenizer):
    """run(stage, examples, policy=None, **config) -> the result of a quiet run on a new tiny model."""

    def go(stage, examples=None, *, policy=None, tokenizer=tokenizer, **values):
        train, kind, _ = STAGES[stage]
        base = {
            "threads": 1,
            "optim": {"lr": 1e-3, "batch_size": 8},
            "log": {"dir": str(tmp_path / stage), "tensorboard": False, "console": False},
        }
        merged = base | {
            name: base.get(name, {}) | value if isinstance(value, dict) else value for name, value in values.items()
        }
        given = {} if values.get("init") else {"model": policy or make_model(), "tokenizer": tokenizer}
        return train(config_from_dict(merged, kind=kind), train=examples or rows(40), **given)

    return go


def random_example(rng, prompt, completion):
    return Example((*(rng.randrange(4, 64) for _ in range(prompt + completion - 1)), EOS), prompt)


def ragged(count=6, seed=0):
    rng = random.Random(seed)
    return [random_example(rng, rng.randint(1, 6), rng.randint(1, 6)) for _ in range(count)]


def pairs(count=6, margin=0.0):
    return [Pair(a, b, margin) for a, b in zip(ragged(count), ragged(count, 1), strict=True)]


def gemma2():
    """A head with softcapping."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


MODELS = {arch: lambda arch=arch: make_model(arch=arch) for arch in ("llama", "gpt2", "qwen2")} | {"gemma2": gemma2}


@pytest.mark.parametrize("name", MODELS)
def test_sft_counts_the_tokens_of_the_completions_alone(name):
    model, examples = disable_dropout(MODELS[name]()), ragged()
    loss, count = 0.0, 0
    for example in examples:  # one at a time: no padding at all
        logprobs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for position in range(example.start, example.length):
            loss -= logprobs[position - 1, example.ids[position]].item()
            count += 1
    ours = SFT(model, 0, 3).loss(examples)
    assert ours.loss.item() == pytest.approx(loss / count, rel=1e-5)
    assert count == sum(example.weight for example in examples)
    batch = collate(examples, 0, torch.device("cpu"))
    assert torch.equal(completion_logprobs(model, batch) != 0, batch.mask[:, 1:])


@pytest.mark.parametrize("stage", STAGES)
def test_one_batch_equals_its_micro_batches(run, stage, tmp_path):
    weights = []
    for size in (8, 4, 1):
        optim = {"micro_batch_size": size, "epochs": 2}
        result = run(stage, rows(24), optim=optim, log={"dir": str(tmp_path / f"{stage}-{size}")})
        weights.append((torch.nn.utils.parameters_to_vector(result.trained.parameters()), result.history))
    whole, history = weights[0]
    for parts, other in weights[1:]:
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=2e-5)
        for name in (n for n in history[-1] if n.startswith(("train/", "eval/"))):
            assert other[-1][name] == pytest.approx(history[-1][name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_padding_on_either_side_is_invisible(arch):
    rng, model = random.Random(0), disable_dropout(make_model(arch=arch))
    reward_model = add_score_head(make_model(arch=arch), tiny.make_tokenizer(["w"]), torch.Generator().manual_seed(0))
    example, longer = random_example(rng, 3, 4), random_example(rng, 6, 9)
    alone, padded = (collate(batch, 0, torch.device("cpu")) for batch in ([example], [example, longer]))
    logprobs = [completion_logprobs(model, batch)[0, 2:6] for batch in (alone, padded)]
    torch.testing.assert_close(*logprobs)
    left = [torch.nn.functional.pad(x, (5, 0)) for x in (alone.input_ids, alone.attention_mask)]
    scores = [
        sequence_scores(reward_model, alone.input_ids, alone.attention_mask),
        sequence_scores(reward_model, padded.input_ids, padded.attention_mask)[:1],
        sequence_scores(reward_model, *left),
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_repeats_to_the_bit(run, stage, tmp_path):
    first, again, other = (
        run(stage, seed=seed, log={"dir": str(tmp_path / f"{stage}{i}")}) for i, seed in enumerate((0, 0, 1))
    )

    def numbers(result):
        return [{n: v for n, v in row.items() if not n.startswith("time/")} for row in result.history]

    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)
    for ours, theirs in zip(first.trained.parameters(), again.trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_run_leaves(run, stage):
    log = {"save_every": 2, "eval_every": 2, "tensorboard": True}
    result = run(stage, log=log, optim={"epochs": 1})
    _, kind, loader = STAGES[stage]
    names = ["checkpoints", "config.yaml", "final", "metrics.jsonl", "tensorboard"]
    assert sorted(path.name for path in result.directory.iterdir()) == names
    assert sorted(path.name for path in (result.directory / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    saved = loader.from_pretrained(result.model)
    for ours, theirs in zip(result.trained.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_config(result.directory / "config.yaml", kind=kind).log.eval_every == 2
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    # 40 rows, 4 of them held out: five batches of 8, the last one smaller.
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records if "eval/loss" in record] == [2, 4, 5]
    assert records[-1]["lr"] == pytest.approx(1e-3 * (1 - 0.9 * 3 / 4))
    with pytest.raises(UserError, match=r"already holds 'metrics\.jsonl'; choose another or set log\.overwrite"):
        run(stage)


def test_sft_learns_and_tells_the_perplexity(run):
    result = run("sft", rows(200), optim={"epochs": 10, "lr": 3e-3})
    evaluated = [row for row in result.history if "eval/loss" in row]
    assert len(evaluated) == 10
    assert result.history[0]["train/loss"] > 4  # log 64 = 4.16
    # A completion has 1 to 5 words out of 20 and ends with EOS: no model does better than about 2.7 nats a token.
    assert evaluated[-1]["eval/loss"] < 3.1
    assert evaluated[-1]["eval/perplexity"] == pytest.approx(math.exp(evaluated[-1]["eval/loss"]))


def test_held_out_examples_may_have_their_own_file(run, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(3, seed=9)))
    examples = [completion_example(row, make_tokenizer(), "") for row in rows(3, seed=9)]
    result = run("sft", rows(16), data={"held_out": str(path)})
    assert len(result.history) == 2  # all 16 rows
    loss = SFT(result.trained, 0, 2).evaluate(examples)["loss"]
    assert result.history[-1]["eval/loss"] == pytest.approx(loss, rel=1e-6)
    without = run("sft", rows(16), data={"held_out_frac": 0}, log={"overwrite": True, "dir": str(tmp_path / "sft")})
    assert "eval/loss" not in without.history[-1]


def test_held_out_examples_are_never_trained_on():
    config, generator = SFTConfig(), torch.Generator().manual_seed(0)
    data = load_data(config, completion_example, make_tokenizer(), generator, rows(40), None)
    assert (len(data.train), len(data.held_out)) == (36, 4)
    everything = [completion_example(row, make_tokenizer(), "") for row in rows(40)]
    assert sorted([*data.train, *data.held_out], key=str) == sorted(everything, key=str)
    assert data.held_out != everything[:4]  # drawn


def test_the_reward_model_learns_a_separable_preference(run):
    result = run("reward", rows(200), optim={"epochs": 3})
    last = result.history[-1]
    assert last["eval/accuracy"] >= 0.95
    assert last["eval/margin"] > 2
    assert last["eval/loss"] < result.history[0]["train/loss"]
    stats = json.loads((result.model / "reward_stats.json").read_text())
    assert (stats["pairs"], stats["accuracy"], stats["ece"]) == (20, last["eval/accuracy"], last["eval/ece"])
    assert sum(row["count"] for row in stats["reliability"]) == 20
    assert list(stats["quantiles"].values()) == sorted(stats["quantiles"].values())


def test_the_statistics_are_those_of_the_saved_model_on_held_out_completions(run, tmp_path):
    held_out = rows(12, seed=5)
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    result = run("reward", rows(32), data={"held_out": str(path)})
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


def test_the_saved_reward_model_scores_the_eos_in_a_batch(run, tokenizer):
    result = run("reward")
    saved = AutoModelForSequenceClassification.from_pretrained(result.model)
    batch = collate(ragged(), tokenizer.pad_token_id, torch.device("cpu"))
    theirs = saved(batch.input_ids, attention_mask=batch.attention_mask.long()).logits.squeeze(-1)
    torch.testing.assert_close(sequence_scores(result.trained, batch.input_ids, batch.attention_mask), theirs)


def test_a_padding_token_that_is_eos_does_not_hide_it(run):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    result = run("reward", tokenizer=tokenizer)
    saved = AutoModelForSequenceClassification.from_pretrained(result.model)
    batch = collate(ragged(), EOS, torch.device("cpu"))
    scores = sequence_scores(result.trained, batch.input_ids, batch.attention_mask)
    for example, score in zip(ragged(), scores, strict=True):
        torch.testing.assert_close(saved(torch.tensor([example.ids])).logits[0, 0], score)
    with pytest.raises(ValueError, match="padding token"):
        saved(batch.input_ids, attention_mask=batch.attention_mask.long())


def test_a_reward_model_continues_from_an_earlier_one(run, tmp_path):
    first = run("reward")
    log = {"dir": str(tmp_path / "second")}
    second = run("reward", rows(40, seed=1), init=str(first.model), log=log, optim={"lr": 1e-9})
    for ours, theirs in zip(second.trained.parameters(), first.trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert (second.model / "reward_stats.json").is_file()
    AutoModelForSequenceClassification.from_pretrained(second.model)


def test_the_critic_of_ppo_starts_from_the_reward_model(run, make_config, tokenizer):
    reward_model = run("reward")
    result = train_ppo(
        make_config(updates=1, model={"value_path": str(reward_model.model)}, optim={"value_lr": 1e-9}),
        reward_fn=lambda completions, **_: [0.0] * len(completions),
        prompts=["w1 w2", "w3"],
        policy=make_model(),
        tokenizer=tokenizer,
    )
    batch = collate(ragged(), 0, torch.device("cpu"))
    values = result.models.value(batch.input_ids, batch.attention_mask)
    last = torch.tensor([[example.length - 1] for example in ragged()])
    scores = sequence_scores(reward_model.trained, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(values.gather(1, last).squeeze(1), scores, rtol=0, atol=1e-5)


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


def test_dpo_starts_at_log_2_and_raises_the_margin(run):
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    result = run("dpo", rows(200), policy=model, optim={"epochs": 3})
    first, last = result.history[0], result.history[-1]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["train/margin"], first["train/accuracy"]) == (0, 0)
    assert last["eval/accuracy"] >= 0.9
    assert last["eval/margin"] > 0.2
    assert last["eval/reward_chosen"] > 0 > last["eval/reward_rejected"]
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), before, strict=True))


def test_dpo_compares_with_the_frozen_reference():
    model, reference = (make_model(seed=seed) for seed in (1, 0))
    reference.requires_grad_(False)
    objective = DPO(model, 0, 4, reference, 0.5)
    gaps = []
    for pair in pairs():
        rewards = []
        for example in (pair.chosen, pair.rejected):
            sums = []
            for network in (model, reference):
                logprobs = network(torch.tensor([example.ids])).logits[0].log_softmax(-1)
                steps = range(example.start, example.length)
                sums.append(sum(logprobs[t - 1, example.ids[t]].item() for t in steps))
            rewards.append(0.5 * (sums[0] - sums[1]))
        gaps.append(rewards[0] - rewards[1])
    expected = torch.nn.functional.softplus(-torch.tensor(gaps)).mean()
    output = objective.loss(pairs())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("sft", {"log": {"dir": "taken"}}, r"log\.dir: 'taken' already holds 'final'; choose another"),
        ("sft", {"policy": make_model(max_positions=4)}, r"data\.max_tokens: expected at most 4, the model's context"),
        ("dpo", {"policy": tiny.make_model(20, hidden=32, heads=2)}, r"tokenizer: expected ids below 20, .* got 63"),
        ("sft", {"data": {"held_out_frac": 0.99}}, r"data\.held_out_frac: expected a share that leaves examples to"),
        ("reward", {"init": "taken"}, r"AutoConfig: cannot load directory 'taken': "),
        ("reward", {"init": "causal"}, r"init: expected a reward model, got LlamaForCausalLM in 'causal'"),
        ("reward", {"init": "two"}, r"init: expected a linear head 'score' with one output, got .* in 'two'"),
        ("sft", {"model": {"device": "abacus"}}, r"model\.device: expected 'auto' or one of 'cpu'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(run, tmp_path, monkeypatch, stage, values, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "final").mkdir(parents=True)
    make_model().save_pretrained("causal")
    config = make_model().config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained("two")
    with pytest.raises(UserError, match=f"^{message}"):
        run(stage, **values)
    assert not (tmp_path / stage).exists()


def test_a_loss_that_is_not_finite_names_the_step(run):
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(UserError, match=r"^step 1: loss is not finite: nan$"):
        run("sft", policy=model)


def test_bfloat16_weights_train_under_a_warning(run):
    with pytest.warns(UserWarning, match=r"a bfloat16 weight w keeps no step below"):
        result = run("reward", policy=make_model().bfloat16())
    assert result.trained.dtype == result.trained.score.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stage", STAGES)
def test_the_default_config_names_no_model(stage):
    train, kind, _ = STAGES[stage]
    with pytest.raises(UserError, match=r"^model\.path: expected a model directory or hub id, got null$"):
        train(kind(), train=rows(4))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SFTConfig, {"optim": {"epoch": 2}}, "unknown key 'optim.epoch', the nearest is 'optim.epochs'"),
        (SFTConfig, {"beta": 1}, "unknown key 'beta', the nearest is 'optim.betas'"),
        (SFTConfig, {"optim": {"batch_size": 0}}, "optim.batch_size: expected a number > 0, got 0"),
        (SFTConfig, {"optim": {"epochs": 0}}, "optim.epochs: expected a number > 0, got 0"),
        (
            DPOConfig,
            {"optim": {"micro_batch_size": 3}},
            "optim.micro_batch_size: expected a divisor of optim.batch_size = 16, got 3",
        ),
        (DPOConfig, {"beta": 0}, "beta: expected a number > 0, got 0.0"),
        (SFTConfig, {"data": {"held_out_frac": 1}}, "data.held_out_frac: expected 0 <= held_out_frac < 1, got 1.0"),
        (SFTConfig, {"data": {"max_tokens": 0}}, "data.max_tokens: expected a number > 0, got 0"),
        (RewardModelConfig, {"log": {"eval_every": -1}}, "log.eval_every: expected a number >= 0, got -1"),
        (RewardModelConfig, {"threads": 0}, "threads: expected a number > 0, got 0"),
        (SFTConfig, {"model": {"dtype": "int8"}}, "model.dtype: Input should be 'float32' or 'bfloat16', got 'int8'"),
    ],
)
def test_configs_are_checked(kind, values, message):
    with pytest.raises(UserError) as error:
        config_from_dict(values, kind=kind)
    assert str(error.value) == f"config: {message}"


def test_defaults_by_stage():
    assert [kind().optim.lr for kind in (SFTConfig, RewardModelConfig, DPOConfig)] == [1e-5, 1e-5, 1e-6]
    assert [kind().log.dir for kind in (SFTConfig, RewardModelConfig, DPOConfig)] == [
        "runs/sft",
        "runs/reward",
        "runs/dpo",
    ]
    assert config_from_dict({"optim": {"epochs": 2}}, kind=DPOConfig).optim.lr == 1e-6
