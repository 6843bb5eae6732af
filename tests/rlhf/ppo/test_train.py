"""The loop as a whole: repeatable, readable from files, and honest when something fails."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_fast.rlhf import PPOConfig, UserError, load_config, train_ppo
from ppo_fast.rlhf.decoding.requests import Sampling
from ppo_fast.rlhf.models import forward, tiny
from ppo_fast.rlhf.ppo.log import RunLog
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.training.runtime import find_device
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.factories import EOS


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(make_config, tokenizer):
    """run(reward_fn, **config) -> PPOResult on a new tiny model."""

    def go(reward_fn=reward, *, prompts=PROMPTS, policy=None, **values):
        policy = policy or tiny.make_model(64, hidden=32, layers=1, heads=2)
        return train_ppo(
            make_config(**values), reward_fn=reward_fn, prompts=prompts, policy=policy, tokenizer=tokenizer
        )

    return go


def without_clock(history):
    clock = ("time/", "tokens_per_second", "memory/")
    return [{n: v for n, v in metrics.items() if not n.startswith(clock)} for metrics in history]


def test_a_run_repeats_to_the_bit(run, tmp_path):
    first, again, other = (
        run(updates=3, seed=seed, output_dir=str(tmp_path / str(i))) for i, seed in enumerate((0, 0, 1))
    )
    assert without_clock(first.history) == without_clock(again.history)
    assert without_clock(first.history) != without_clock(other.history)
    for ours, theirs in zip(first.models.policy.parameters(), again.models.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_kl_is_to_the_reference_of_the_latest_replacement(run):
    history = run(updates=5, reference={"update": "replace", "every": 2}).history
    assert [metrics["objective/kl"] == 0 for metrics in history] == [True, False, True, False, True]


def test_a_run_begins_without_the_variables_of_another(run, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("calls = []\ndef f(prompts, **_):\n    calls.append(1)\n    return [len(calls)] * len(prompts)\n")
    settings = {"reward": {"function": f"{path}:f", "missing_eos_penalty": 0.0}, "overwrite": True}
    for _ in range(2):
        assert [metrics["objective/scores"] for metrics in run(None, **settings).history] == [1, 2]


def test_what_a_run_leaves(run, make_config):
    result = run(updates=2, checkpoint={"every": 1}, log={"samples_every": 1, "tensorboard": True})
    assert sorted(path.name for path in result.directory.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "evaluations.jsonl",
        "final",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
    ]
    assert load_config(result.directory / "config.yaml") == make_config(
        updates=2, checkpoint={"every": 1}, log={"samples_every": 1, "tensorboard": True}
    )
    saved = [
        AutoModelForCausalLM.from_pretrained(path) for path in sorted((result.directory / "checkpoints").iterdir())
    ]
    final = AutoModelForCausalLM.from_pretrained(result.model)
    weights = [model.get_output_embeddings().weight for model in (*saved, final, result.models.policy)]
    assert len(weights) == 4
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == [1, 2]
    assert records[1]["objective/scores"] == result.history[1]["objective/scores"]


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_a_run_says_what_it_is_and_how_far_it_is(run, monkeypatch, capsys, engine):
    seen = []
    monkeypatch.setattr(RunLog, "show", lambda self, *phase: seen.append(phase))
    rollout = {"engine": engine, "micro_batch_size": 4}
    result = run(updates=1, rollout=rollout, log={"console": True, "samples_every": 0}, evaluation={"every": 0})
    lines = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in result.models.policy.parameters())
    trained = count + sum(parameter.numel() for parameter in result.models.value.parameters())
    assert lines[:2] == [
        f"LlamaForCausalLM: {count / 1e3:.3g} k parameters, {trained / 1e3:.3g} k trained; cpu, float32, "
        "layout separate, with a critic",
        f"4 prompts; 1 updates of 8 responses; output in {result.directory}",
    ]
    assert len(lines) == 3
    sampled = [phase[1:] for phase in seen if phase[0] == "rollout" and len(phase) > 1]
    assert sampled == sorted(sampled)
    assert sampled[-1] == (8, 8)
    assert len(sampled) > 1
    assert [phase[1:] for phase in seen if phase[0] == "update"] == [(), (1, 4), (2, 4), (3, 4), (4, 4)]
    order = [phase[0] for phase in seen if phase[0] and len(phase) == 1]
    assert order == ["rollout", "logprobs", "score", "update", "saving"]


def test_rule_04_without_epochs_to_drift_the_first_step_has_ratio_1(run):
    result = run(optim={"epochs": 1, "minibatch_size": 8})
    for metrics in result.history:
        assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert metrics["rollout/logprob_diff_max"] <= 2e-5
    assert result.history[0]["objective/kl"] == 0
    assert result.history[1]["objective/kl"] != 0


@pytest.mark.parametrize(
    ("values", "width"), [({"optim": {"minibatch_size": 4}}, 4), ({"optim": {"micro_batch_size": 2}}, 2)]
)
@pytest.mark.parametrize(("path", "name"), [("linear", "response_hidden"), ("materialized", "response_logits")])
def test_scoring_and_update_take_a_micro_batch_at_a_time(run, monkeypatch, values, width, path, name):
    policy, seen, made = tiny.make_model(64, hidden=32, layers=1, heads=2), [], getattr(forward, name)

    def spy(model, sequences):
        seen.append(len(sequences.inputs["input_ids"]))
        return made(model, sequences)

    monkeypatch.setattr("ppo_fast.rlhf.models.loading.check_linear", lambda model: None)
    monkeypatch.setattr(forward, name, spy)
    run(policy=policy, updates=1, model={"fused_head": path == "linear"}, **values)
    assert set(seen) == {width}


def test_a_response_longer_than_a_pass_is_warned_of_once(run):
    message = (
        r"^optim\.tokens_per_pass: a prompt and its response may have \d+ tokens, more than 8; such a response goes by "
        r"itself$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        run(optim={"tokens_per_pass": 8})
    assert len(caught) == 1


def test_samples_per_prompt_share_a_prompt(run):
    seen = []

    def record(prompts, **_):
        seen.append(prompts)
        return [0.0] * len(prompts)

    run(record, updates=1, rollout={"samples_per_prompt": 4})
    assert seen[0][:4] == [seen[0][0]] * 4
    assert seen[0][4:] == [seen[0][4]] * 4
    assert seen[0][0] != seen[0][4]


def test_the_adaptive_coefficient_is_steered_after_use(run):
    result = run(kl={"adaptive": True, "coef": 0.1, "target": 5.0, "horizon": 100})
    coefficients = [metrics["objective/kl_coef"] for metrics in result.history]
    assert coefficients[0] == pytest.approx(0.1)
    # KL is 0 in the first update: error -0.2, n = 8.
    assert coefficients[1] == pytest.approx(0.1 * (1 - 0.2 * 8 / 100))


def test_the_update_is_given_the_coefficient_and_its_own_number(run, monkeypatch):
    seen, update = [], Learner.update

    def spy(self, experience, kl_coef, index, generator):
        seen.append((kl_coef, index))
        return update(self, experience, kl_coef, index, generator)

    monkeypatch.setattr(Learner, "update", spy)
    kl, unwhitened = {"coef": 0.25, "placement": "loss"}, {"whiten": False}
    run(updates=3, kl=kl, advantage=unwhitened)
    assert seen == [(0.25, 0), (0.25, 1), (0.25, 2)]
    del seen[:]
    # KL is 0 in the first update; it steers the coefficient of the second.
    run(kl=kl | {"adaptive": True, "horizon": 100}, advantage=unwhitened, overwrite=True)
    assert [float(coef) for coef, _ in seen] == pytest.approx([0.25, 0.25 * (1 - 0.2 * 8 / 100)])


# Every placement with every estimator, and each of either with a fixed and an adaptive coefficient.
@pytest.mark.parametrize(
    ("placement", "estimator", "adaptive"),
    [
        (p, e, (i + j) % 2 == 1)
        for i, p in enumerate(("reward", "loss", "both"))
        for j, e in enumerate(("k2", "k3", "full"))
    ],
)
def test_kl_may_be_placed_in_reward_and_loss(run, placement, estimator, adaptive):
    kl = {"placement": placement, "loss_estimator": estimator, "adaptive": adaptive, "coef": 0.5}
    last = run(kl=kl, reward={"missing_eos_penalty": 0.0}, advantage={"whiten": placement == "reward"}).history[1]
    assert (abs(last["objective/non_score_reward"]) > 1e-6) is (placement != "loss")
    assert (last["objective/kl_coef"] != 0.5) is adaptive


def test_masked_responses_are_counted_and_not_trained_on(run, tmp_path, monkeypatch):
    path, seen, update = tmp_path / "own.py", [], Learner.update
    path.write_text("def some(completion_ids, **_):\n    return ['mask', False, *[True] * (len(completion_ids) - 2)]\n")

    def spy(self, experience, *others):
        seen.append(experience)
        return update(self, experience, *others)

    monkeypatch.setattr(Learner, "update", spy)
    result = run(updates=1, reward={"filter": f"{path}:some", "rejected_score": -7.0, "missing_eos_penalty": 0.0})
    assert (result.history[0]["filter/masked"], result.history[0]["filter/rejected"]) == (1, 1)
    (experience,) = seen
    assert len(experience.lengths) == 7
    assert experience.advantages.mean().abs() < 1e-6  # whitened over what is left
    assert run(updates=1, overwrite=True).history[0]["filter/masked"] == 0


@pytest.mark.parametrize("kind", ["gae", "group"])
def test_truncated_responses_are_left_out_of_loss_and_normalizers_and_counted(run, monkeypatch, kind):
    seen, notes, update, draw = [], [], Learner.update, Sampling.draw

    def spy(self, experience, *others):
        seen.append((experience, update(self, experience, *others)))
        return seen[-1][1]

    def none_ends(self, logits, keys):
        tokens, logprobs = draw(self, logits, keys)
        return tokens % 32 + 4, logprobs

    def half_end(self, logits, keys):
        """Half of the responses to each prompt end at their second token, the others never."""
        tokens, logprobs = none_ends(self, logits, keys)
        _, row, step = keys.unbind(-1)
        return torch.where((row % 4 < 2) & (step == 1), EOS, tokens), logprobs

    def reward(completion_ids, **_):
        return [float(ids[0]) if ids[-1] == EOS else 1000.0 for ids in completion_ids]

    monkeypatch.setattr(Learner, "update", spy)
    monkeypatch.setattr(Sampling, "draw", half_end)
    monkeypatch.setattr(RunLog, "note", lambda self, number, note: notes.append(note))
    values = {
        "updates": 1,
        "rollout": {"mask_truncated": True, "samples_per_prompt": 4},
        "reward": {"clip": None, "missing_eos_penalty": 0.0},
        "advantage": {"kind": kind},
        "kl": {"coef": 0.0},
    }
    (metrics,) = run(reward, **values).history
    ((experience, stats),) = seen
    assert experience.lengths.tolist() == [2] * 4
    assert stats.policy["tokens"] == 2 * 4 * 2  # in two epochs
    assert experience.advantages.abs().max() < 40  # no mean has a part of the thousands
    assert experience.advantages.mean().abs() < 1e-5
    assert (metrics["length/truncated_frac"], metrics["length/mean"]) == (0.5, 4)
    assert metrics["objective/scores"] > 500
    monkeypatch.setattr(Sampling, "draw", none_ends)
    assert run(reward, overwrite=True, **values).history == []
    assert notes == [None, "batch skipped: rollout.mask_truncated leaves out all 8 responses"]


def test_a_skipped_batch_has_no_answers_or_times_of_the_update_before(make_config, tokenizer, monkeypatch):
    records, draw = [], Sampling.draw

    class Records:
        def on_step(self, record):
            records.append(record)

    def ends_at_first(self, logits, keys):
        """All responses end at their second token until an update is done, later ones never."""
        tokens, logprobs = draw(self, logits, keys)
        ends = (keys[:, 2] == 1) & (not records)
        return torch.where(ends, EOS, tokens % 32 + 4), logprobs

    monkeypatch.setattr(Sampling, "draw", ends_at_first)
    config = make_config(rollout={"mask_truncated": True}, evaluation={"every": 1})
    policy, given = (
        tiny.make_model(64, hidden=32, layers=1, heads=2),
        {"tokenizer": tokenizer, "callbacks": [Records()]},
    )
    train_ppo(config, reward_fn=reward, prompts=PROMPTS, eval_prompts=PROMPTS[:2], policy=policy, **given)
    assert [len(record.answers) for record in records] == [2, 0]
    assert ["update" in record.seconds for record in records] == [True, False]


def test_the_prompts_come_in_the_order_of_the_curriculum(run):
    seen = []

    def record(prompts, level, **_):
        seen.extend(level)
        return [0.0] * len(prompts)

    prompts = [{"prompt": f"w{n}", "level": -n} for n in range(16)]
    run(record, prompts=prompts, data={"order": "level"})
    assert seen == sorted(seen) == list(range(-15, 1))


def test_a_sign_of_hacking_is_on_record_once(run):
    words = [f"w{n}" for n in range(60)]
    calls = []

    def widens(completion_ids, **_):
        calls.append(1)
        sign = 1 if len(calls) > 5 else -1
        return [sign * float(len(ids)) for ids in completion_ids]

    result = run(
        widens,
        prompts=words,
        updates=12,
        optim={"lr": 1e-5, "epochs": 1},
        reward={"missing_eos_penalty": 0.0},
        rollout={"batch_size": 32, "max_new_tokens": 24},
    )
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    told = [record["update"] for record in records if "follows the length" in record.get("note", "")]
    assert told == [10]


def test_a_reference_that_follows_keeps_the_kl_low(run):
    fixed = run(updates=4, kl={"coef": 0.0})
    follows = run(updates=4, kl={"coef": 0.0}, reference={"update": "replace", "every": 1}, overwrite=True)
    assert fixed.history[3]["objective/kl"] != 0
    assert [metrics["objective/kl"] for metrics in follows.history] == [0.0] * 4


def test_advantages_per_sequence_train(run):
    result = run(advantage={"kind": "sequence"})
    assert result.history[1]["objective/kl"] != 0


def test_a_failing_reward_function_leaves_what_was_saved(run, make_config):
    calls = []

    def fails_later(completions, **_):
        calls.append(1)
        return [0.0] * len(completions) if len(calls) < 3 else [float("nan")] * len(completions)

    with pytest.raises(UserError) as error:
        run(fails_later, updates=5, checkpoint={"every": 1})
    told = "update 3: reward function: expected a finite score for sample 0, got nan; the batch and the weights"
    assert str(error.value).startswith(told)
    directory = make_config().output_dir
    for update in (1, 2):
        AutoModelForCausalLM.from_pretrained(f"{directory}/checkpoints/update-{update:06d}")
    with open(f"{directory}/metrics.jsonl") as file:
        assert [json.loads(line)["update"] for line in file] == [1, 2]


def test_a_broken_model_is_named_before_it_is_trained(run):
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
    with torch.no_grad():
        policy.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(UserError, match=r"^update 1: logprobs is not finite: nan; "):
        run(policy=policy)


def test_a_loss_that_is_not_finite_stops_the_run(run):
    with pytest.raises(UserError, match=r"^update 1: epoch 1, minibatch 1: loss/\w+ is not finite: inf; "):
        run(lambda completions, **_: [1e25] * len(completions), reward={"clip": None}, advantage={"whiten": False})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout": {"max_new_tokens": 124}}, r"rollout\.max_new_tokens: expected at most 123 .* got 124"),
        ({"model": {"device": "abacus"}}, r"model\.device: expected 'auto' or one of 'cpu'.*, got 'abacus'"),
        ({"prompts": None}, r"data\.prompts: expected a file of prompts, got null"),
        ({"reward_fn": None}, r"reward\.function: expected 'path/to/file\.py:function' or 'module:function', got None"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_is_written(run, make_config, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        run(**values)
    assert not (tmp_path / "run").exists()


def test_threads_are_set_for_the_run_alone(run):
    seen = []

    def record(completions, **_):
        seen.append(torch.get_num_threads())
        return [0.0] * len(completions)

    torch.set_num_threads(2)
    try:
        run(record, updates=1, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1]


def test_the_device_is_chosen(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"expected 'auto' or one of 'cpu', 'cuda', 'cuda:0', 'cuda:1', got 'cuda:2'"):
        find_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device("auto") == torch.device("cpu")


def test_bfloat16_weights_train_under_a_warning(run):
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2).bfloat16()
    with pytest.warns(UserWarning, match=r"a bfloat16 weight w keeps no step below .* optim\.lr = 0\.001"):
        result = run(policy=policy)
    assert result.models.value.backbone.dtype == torch.bfloat16
    assert result.history[1]["objective/kl"] != 0


def test_a_tokenizer_of_another_model_is_refused(run):
    policy = tiny.make_model(10, hidden=32, layers=1, heads=2)
    with pytest.raises(UserError, match=r"^tokenizer: expected ids below 10, the tokens that the model knows, got 15$"):
        run(policy=policy)


def test_filters_warn_once_at_the_start(run):
    with pytest.warns(UserWarning, match=r"bias the ratio"):
        run(updates=1, rollout={"top_k": 5})


@pytest.mark.parametrize("placement", ["loss", "both"])
def test_kl_in_the_loss_against_whitened_advantages_warns_at_the_start(run, placement):
    message = (
        f"kl.placement: {placement} charges kl.coef times the deviation of the advantages, which advantage.whiten "
        "divides by; set advantage.whiten to false to charge kl.coef itself"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        run(updates=1, kl={"placement": placement})


def test_the_default_config_names_no_model():
    with pytest.raises(UserError, match=r"model\.path: expected a model directory or hub id, got null"):
        train_ppo(PPOConfig(), reward_fn=reward, prompts=["w1"])
