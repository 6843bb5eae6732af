"""A NaN or an infinity stops the run before it reaches a weight, or is left out and counted."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo import train as ppo
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from tests.rlhf.conftest import PROMPTS


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(make_config, tokenizer):
    """run(reward_fn, **config) -> PPOResult on a new tiny model: 2 epochs of 2 minibatches of 4."""

    def go(reward_fn=reward, *, policy=None, **values):
        policy = policy or tiny.make_model(64, hidden=32, layers=1, heads=2)
        return train_ppo(
            make_config(**values), reward_fn=reward_fn, prompts=PROMPTS, policy=policy, tokenizer=tokenizer
        )

    return go


@pytest.fixture
def poison(monkeypatch):
    """poison(where, *steps): a NaN in that place of those optimizer steps, counted from 1 over the whole run."""

    def go(where, *steps):
        calls, weights = [], []
        backward = Learner.backward

        def poisoned(self, *batch):
            calls.append(1)
            weights.append([p.detach().clone() for p in self.policy.parameters + self.value.parameters])
            policy, value = backward(self, *batch)
            if len(calls) in steps:
                if where == "gradient":
                    self.value.parameters[0].grad.view(-1)[3] = float("nan")
                else:
                    policy = policy | {where: policy[where] * float("inf")}
            return policy, value

        monkeypatch.setattr(Learner, "backward", poisoned)
        return weights

    return go


CASES = [
    ("gradient", "grad_norm/value", "nan"),
    ("policy_loss", "loss/policy", r"-?inf|nan"),
    ("loss", "loss/total", r"-?inf|nan"),
    ("approx_kl", "policy/approxkl", r"-?inf|nan"),
    ("ratio_max", "policy/ratio_max", "inf"),
]


@pytest.mark.parametrize(("where", "name", "value"), CASES)
def test_a_bad_step_stops_the_run_with_the_weights_before_it(run, poison, tmp_path, where, name, value):
    weights = poison(where, 6)  # update 2: epoch 1, minibatch 2
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
    failed = tmp_path / "run" / "failed" / "update-000002"
    told = rf"update 2: epoch 1, minibatch 2: {name} is not finite: ({value}); the batch and the weights before it"
    with pytest.raises(UserError, match=f"^{told} are in '{failed}'$"):
        run(updates=3, policy=policy)
    before = weights[5]
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), before[: len(list(policy.parameters()))], strict=True)
    )
    saved = AutoModelForCausalLM.from_pretrained(failed)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), saved.parameters(), strict=True))
    value_model = load_file(failed / "value_model.safetensors")
    assert any(torch.equal(before[-1], tensor) for tensor in value_model.values())


def test_the_batch_of_a_bad_step_is_saved_with_its_texts(run, poison, tmp_path, tokenizer):
    poison("gradient", 3)
    with pytest.raises(UserError):
        run(updates=1)
    failed = tmp_path / "run" / "failed" / "update-000001"
    record, tensors = json.loads((failed / "batch.json").read_text()), load_file(failed / "batch.safetensors")
    assert record["error"].startswith("epoch 2, minibatch 1: grad_norm/value is not finite")
    assert len(record["rows"]) == len(set(record["rows"])) == 4
    assert set(record["prompts"]) <= set(PROMPTS)
    for row, (ids, text) in enumerate(zip(record["completion_ids"], record["completions"], strict=True)):
        mask = tensors["generation.mask"][row]
        assert tensors["generation.input_ids"][row, -len(mask) :][mask].tolist() == ids
        assert tokenizer.decode(ids) == text
    assert {
        "rollout.logprobs",
        "rollout.values",
        "rewards.rewards",
        "experience.advantages",
        "experience.returns",
    } <= set(tensors)
    tokens = sum(map(len, record["completion_ids"]))
    for name, tensor in tensors.items():
        by_response = name.startswith("generation.") or name == "rewards.scores"
        assert len(tensor) == (4 if by_response else tokens), name
    ids = [token for row in record["completion_ids"] for token in row]
    assert tensors["experience.tokens"].tolist() == ids


def test_skip_leaves_the_step_out_and_counts_it(run, poison):
    weights = poison("gradient", 2, 3)
    result = run(updates=2, on_nan="skip")
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(weights)]
    assert same == [False, True, True, False, False, False, False]
    assert [metrics["nan/skipped_steps"] for metrics in result.history] == [2, 0]
    record = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
    assert record["note"] == (
        "skipped epoch 1, minibatch 2: grad_norm/value is not finite: nan; "
        "skipped epoch 2, minibatch 1: grad_norm/value is not finite: nan"
    )
    assert not (result.directory / "failed").exists()


def test_a_skipped_step_leaves_the_moments_and_their_count_alone(make_config):
    module = torch.nn.Linear(2, 1)
    network = ClippedOptimizer(module.parameters(), 0.1, make_config().optim)

    def step(gradient, failed):
        for p in network.parameters:
            p.grad = torch.full_like(p, gradient)
        network.step(1.0, failed=torch.tensor(failed))
        state = network.optimizer.state_dict()["state"]
        return [p.detach().clone() for p in network.parameters] + [
            t.clone() for s in state.values() for t in s.values()
        ]

    first, second = step(1.0, False), step(float("nan"), True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(step(1.0, False)[0], first[0])


def test_skip_gives_up_a_batch_without_a_good_step(run, poison):
    weights = poison("policy_loss", 5, 6, 7, 8)
    result = run(updates=3, on_nan="skip")
    assert [metrics["nan/skipped_batches"] for metrics in result.history] == [0, 1]
    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 3]
    assert all(torch.equal(a, b) for a, b in zip(weights[4], weights[8], strict=True))


def test_a_mask_that_leaves_nothing_is_skipped_or_told_with_its_batch(run, monkeypatch, tmp_path):
    real, calls = ppo.make_correction, []

    def far_off_in_the_second_update(rollout, config):
        calls.append(1)
        far = dataclasses.replace(rollout, sampled_logprobs=rollout.logprobs + 2)
        return real(far if len(calls) == 2 else rollout, config)

    monkeypatch.setattr(ppo, "make_correction", far_off_in_the_second_update)
    settings = {"updates": 3, "rollout": {"correction": "mask"}}
    told = r"^update 2: rollout\.correction: expected a token or more .*; the batch and the weights before it are in"
    with pytest.raises(UserError, match=told):
        run(**settings)
    calls.clear()
    result = run(**settings, on_nan="skip", overwrite=True)
    assert [metrics["nan/skipped_batches"] for metrics in result.history] == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_reward_is_told_with_its_batch_or_skipped(run, tmp_path, bad):
    calls = []

    def sometimes(completion_ids, **_):
        calls.append(1)
        return [bad if len(calls) == 2 and row == 5 else 0.5 for row in range(len(completion_ids))]

    told = rf"update 2: reward function: expected a finite score for sample 5, got {bad}; the batch and the weights"
    with pytest.raises(UserError, match=f"^{told}"):
        run(sometimes, updates=3)
    record = json.loads((tmp_path / "run" / "failed" / "update-000002" / "batch.json").read_text())
    assert record["rows"] == list(range(8))
    calls.clear()
    result = run(sometimes, updates=3, on_nan="skip", overwrite=True)
    assert [metrics["nan/skipped_batches"] for metrics in result.history] == [0, 1]
    assert not (tmp_path / "run" / "failed").exists()


@pytest.mark.parametrize(
    ("stage", "tensor", "name"),
    [
        ("score", "logprobs", "logprobs"),
        ("score", "ref_logprobs", "ref_logprobs"),
        ("score", "values", "values"),
        ("compute_rewards", "rewards", "rewards"),
    ],
)
def test_what_the_update_is_made_of_is_checked_and_named(run, monkeypatch, tmp_path, stage, tensor, name):
    real = getattr(ppo, stage)

    def broken(*arguments):
        output = real(*arguments)
        getattr(output, tensor)[1] = float("-inf")
        return output

    monkeypatch.setattr(ppo, stage, broken)
    with pytest.raises(UserError, match=rf"^update 1: {name} is not finite: -inf; the batch and the weights"):
        run()
    saved = load_file(tmp_path / "run/failed/update-000001/batch.safetensors")
    assert sum(bool(values.isinf().any()) for values in saved.values()) == 1


def test_a_step_that_target_kl_would_stop_is_checked_too(run, poison):
    poison("approx_kl", 2)
    with pytest.raises(UserError, match=r"^update 1: epoch 1, minibatch 2: policy/approxkl is not finite: (inf|nan)"):
        run(updates=1, optim={"target_kl": 1e3})
