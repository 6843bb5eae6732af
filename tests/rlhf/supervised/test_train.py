"""SFT, reward model and DPO: what the losses count, invariances, learning, and what a run leaves."""

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config

from ppo_fast.rlhf import DPOConfig, RewardModelConfig, SFTConfig, UserError, load_config
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.data.examples import collate, completion_example
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.loading import disable_dropout
from ppo_fast.rlhf.models.reward import add_score_head
from ppo_fast.rlhf.models.value import ValueModel, sequence_scores
from ppo_fast.rlhf.supervised.dpo import DPO
from ppo_fast.rlhf.supervised.sft import SFT
from ppo_fast.rlhf.supervised.train import completion_logprobs, load_data
from tests.rlhf.supervised_factories import EOS, STAGES, make_model, make_tokenizer, pairs, ragged, random_example, rows


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
    assert completion_logprobs(model, batch).shape == (count,)
    packed = SFT(model, 0, 3, packed=True).loss(examples)
    torch.testing.assert_close(packed.loss, ours.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_one_batch_equals_its_micro_batches(run_stage, stage, tmp_path):
    weights = []
    for size in (8, 4, 1):
        optim = {"micro_batch_size": size, "epochs": 2}
        result = run_stage(stage, rows(24), optim=optim, output_dir=str(tmp_path / f"{stage}-{size}"))
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
    logprobs = [completion_logprobs(model, batch)[:4] for batch in (alone, padded)]
    torch.testing.assert_close(*logprobs)
    left = [torch.nn.functional.pad(x, (5, 0)) for x in (alone.input_ids, alone.attention_mask)]
    scores = [
        sequence_scores(ValueModel.from_classifier(reward_model), alone.input_ids, alone.attention_mask),
        sequence_scores(ValueModel.from_classifier(reward_model), padded.input_ids, padded.attention_mask)[:1],
        sequence_scores(ValueModel.from_classifier(reward_model), *left),
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_repeats_to_the_bit(run_stage, stage, tmp_path):
    first, again, other = (
        run_stage(stage, seed=seed, output_dir=str(tmp_path / f"{stage}{i}")) for i, seed in enumerate((0, 0, 1))
    )

    def numbers(result):
        return [
            {n: v for n, v in row.items() if not n.startswith(("time/", "tokens_per_second"))} for row in result.history
        ]

    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)
    for ours, theirs in zip(first.trained.parameters(), again.trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_run_leaves(run_stage, stage):
    log = {"eval_every": 2, "tensorboard": True}
    result = run_stage(stage, checkpoint={"every": 2}, log=log, optim={"epochs": 1})
    _, kind, loader = STAGES[stage]
    names = ["checkpoints", "config.yaml", "final", "metrics.jsonl", "tensorboard"]
    assert sorted(path.name for path in result.directory.iterdir()) == names
    assert sorted(path.name for path in (result.directory / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    saved = loader.from_pretrained(result.model)
    for ours, theirs in zip(result.trained.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_config(result.directory / "config.yaml", kind=kind).log.eval_every == 2
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    # 40 rows, 4 of them held out: five batches of 8, the last one smaller.
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records if "eval/loss" in record] == [2, 4, 5]
    assert records[-1]["lr"] == pytest.approx(1e-3 * (1 - 0.9 * 3 / 4))
    with pytest.raises(
        UserError, match=r"already holds 'metrics\.jsonl'; choose another \(--out DIR\), continue it \(--resume\) or"
    ):
        run_stage(stage)


def test_sft_learns_and_tells_the_perplexity(run_stage):
    result = run_stage("sft", rows(200), optim={"epochs": 10, "lr": 3e-3})
    evaluated = [row for row in result.history if "eval/loss" in row]
    assert len(evaluated) == 10
    assert result.history[0]["train/loss"] > 4  # log 64 = 4.16
    # A completion has 1 to 5 words out of 20 and ends with EOS: no model does better than about 2.7 nats a token.
    assert evaluated[-1]["eval/loss"] < 3.1
    assert evaluated[-1]["eval/perplexity"] == pytest.approx(math.exp(evaluated[-1]["eval/loss"]))


def test_held_out_examples_may_have_their_own_file(run_stage, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(3, seed=9)))
    examples = [completion_example(row, make_tokenizer(), "") for row in rows(3, seed=9)]
    result = run_stage("sft", rows(16), data={"held_out": str(path)})
    assert len(result.history) == 2  # all 16 rows
    loss = SFT(result.trained, 0, 2).evaluate(examples)["loss"]
    assert result.history[-1]["eval/loss"] == pytest.approx(loss, rel=1e-6)
    without = run_stage("sft", rows(16), data={"held_out_frac": 0}, overwrite=True, output_dir=str(tmp_path / "sft"))
    assert "eval/loss" not in without.history[-1]


def test_held_out_examples_are_never_trained_on():
    config, generator = SFTConfig(), torch.Generator().manual_seed(0)
    data = load_data(config, completion_example, make_tokenizer(), generator, rows(40), None)
    assert (len(data.train), len(data.held_out)) == (36, 4)
    all_rows = [completion_example(row, make_tokenizer(), "") for row in rows(40)]
    assert sorted([*data.train, *data.held_out], key=str) == sorted(all_rows, key=str)
    assert data.held_out != all_rows[:4]  # drawn


def test_dpo_starts_at_log_2_and_raises_the_margin(run_stage):
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    result = run_stage("dpo", rows(200), policy=model, optim={"epochs": 3})
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
        ("sft", {"output_dir": "taken"}, r"output_dir: 'taken' already holds 'final'; choose another"),
        ("sft", {"policy": make_model(max_positions=4)}, r"data\.max_tokens: expected at most 4, the model's context"),
        ("dpo", {"policy": tiny.make_model(20, hidden=32, heads=2)}, r"tokenizer: expected ids below 20, .* got 63"),
        ("sft", {"data": {"held_out_frac": 0.99}}, r"data\.held_out_frac: expected a share that leaves examples to"),
        ("reward", {"init": "taken"}, r"AutoConfig: cannot load directory 'taken': "),
        ("reward", {"init": "causal"}, r"init: expected a reward model, got another kind of model in 'causal'"),
        ("reward", {"init": "two"}, r"init: expected a linear head 'score' with one output, got .* in 'two'"),
        ("sft", {"model": {"device": "abacus"}}, r"model\.device: expected 'auto' or one of 'cpu'"),
    ],
)
def test_what_cannot_work_is_refused_before_a_file_is_written(run_stage, tmp_path, monkeypatch, stage, values, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "final").mkdir(parents=True)
    (tmp_path / "taken" / "final" / "x").touch()
    make_model().save_pretrained("causal")
    config = make_model().config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained("two")
    with pytest.raises(UserError, match=f"^{message}"):
        run_stage(stage, **values)
    assert not (tmp_path / stage).exists()


def test_a_loss_that_is_not_finite_names_the_step(run_stage):
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(UserError, match=r"^step 1: loss is not finite: nan; the batch and the weights before it"):
        run_stage("sft", policy=model)


def test_an_evaluation_that_is_not_finite_names_the_metric(run_stage, monkeypatch):
    monkeypatch.setattr(SFT, "evaluate", lambda self, examples: {"loss": math.inf})
    with pytest.raises(UserError, match=r"^step 5: eval/loss is not finite: inf$"):
        run_stage("sft")


def test_bfloat16_weights_train_under_a_warning(run_stage):
    with pytest.warns(UserWarning, match=r"a bfloat16 weight w keeps no step below"):
        result = run_stage("reward", policy=make_model().bfloat16())
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
        (
            RewardModelConfig,
            {"model": {"fused_head": False}},  # it has none
            "unknown key 'model.fused_head'",
        ),
        (SFTConfig, {"seed": -1}, "seed: expected a number >= 0, got -1"),
        (
            SFTConfig,
            {"model": {"dtype": "int8"}},
            "model.dtype: expected 'float32', 'bfloat16' or 'float16', got 'int8'",
        ),
    ],
)
def test_configs_are_checked(kind, values, message):
    with pytest.raises(UserError) as error:
        config_from_dict(values, kind=kind)
    assert str(error.value) == f"config: {message}"


def test_defaults_by_stage():
    assert [kind().optim.lr for kind in (SFTConfig, RewardModelConfig, DPOConfig)] == [1e-5, 1e-5, 1e-6]
    assert [kind().output_dir for kind in (SFTConfig, RewardModelConfig, DPOConfig)] == [
        "runs/sft",
        "runs/reward",
        "runs/dpo",
    ]
    assert config_from_dict({"optim": {"epochs": 2}}, kind=DPOConfig).optim.lr == 1e-6
