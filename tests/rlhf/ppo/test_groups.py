"""Group advantages: a baseline from the samples of a prompt, no critic, and prompts that teach nothing drawn again."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.ppo import AdvantageConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.plan import make_plan
from ppo_fast.rlhf.ppo.advantages import group_advantages, make_experience
from ppo_fast.rlhf.ppo.reward_sources import Responses
from ppo_fast.rlhf.ppo.rewards import Rewards
from tests.acceptance import enumerated
from tests.acceptance.enumerated import EOS
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.factories import made_rollout

GROUPS = np.array([0, 0, 0, 2, 2, 5, 7, 7, 7, 7])
WITHOUT = "without advantage.kind 'group'"
GROUP = {"advantage": {"kind": "group"}, "rollout": {"batch_size": 8, "samples_per_prompt": 4, "max_new_tokens": 6}}


def one_by_one(returns, groups, leave_one_out, divide_by_std):
    """The advantages of plain Python numbers."""
    found = []
    for row, own in enumerate(returns):
        same = [x for x, group in zip(returns, groups, strict=True) if group == groups[row]]
        others = list(same)
        others.remove(own)
        if not others or len(set(same)) == 1:
            found.append(0.0)
            continue
        mean = sum(same) / len(same)
        base = sum(others) / len(others) if leave_one_out else mean
        std = (sum((x - mean) ** 2 for x in same) / (len(same) - 1)) ** 0.5
        found.append((own - base) / (std if divide_by_std else 1.0))
    return found


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_an_advantage_is_the_return_less_the_mean_of_the_prompts_samples(leave_one_out, divide_by_std):
    returns = [0.3, -1.25, 2.0, 0.1, 0.1, 4.0, 1.0, 1.0, 1.0, 2.0]
    truth = one_by_one(returns, GROUPS, leave_one_out, divide_by_std)
    options = {"leave_one_out": leave_one_out, "divide_by_std": divide_by_std}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = group_advantages(torch.tensor(returns, dtype=dtype), GROUPS, **options)
        torch.testing.assert_close(found, torch.tensor(truth, dtype=dtype), rtol=tolerance, atol=tolerance)
        assert found[3:6].tolist() == [0.0, 0.0, 0.0]  # two that agree in a number that has no exact mean, and one


def test_every_token_of_a_response_has_its_advantage_and_what_the_filter_left_is_compared():
    lengths = [2, 1, 3, 2]
    rollout = made_rollout(lengths)
    prompts = dataclasses.replace(rollout.generation.prompts, groups=np.array([0, 0, 1, 1]))
    generation = dataclasses.replace(rollout.generation, prompts=prompts)
    rollout = dataclasses.replace(rollout, generation=generation, values=torch.zeros(8))
    earned = torch.tensor([1.0, 2.0, 5.0, 0.0, 0.0, 7.0, 2.0, 4.0])
    rewards = Rewards(
        earned, torch.zeros(4), torch.zeros(8), torch.tensor(0.0), [[]] * 4, [""] * 4, [True] * 4, None, None
    )
    config = AdvantageConfig(kind="group", gamma=0.5)
    found = make_experience(rollout, rewards, config).advantages  # returns 2, 5, 7 / 4, 4
    assert found.tolist() == [-1.5, -1.5, 1.5, -1.125, -1.125, -1.125, 1.125, 1.125]
    assert make_experience(rollout, rewards, dataclasses.replace(config, whiten=True)).advantages.mean().abs() < 1e-6
    rows = np.array([0, 2, 3])
    kept = make_experience(rollout.select(rows), rewards.select(rows, rollout.grid.lengths), config)
    assert kept.advantages.tolist() == [0.0, 0.0, -1.125, -1.125, -1.125, 1.125, 1.125]


@pytest.fixture
def run(make_config, tokenizer):
    def go(reward_fn, prompts=PROMPTS, resume=False, callbacks=(), **values):
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        settings = {"prompts": prompts, "policy": policy, "tokenizer": tokenizer, "callbacks": callbacks}
        return train_ppo(make_config(**(GROUP | values)), reward_fn=reward_fn, resume=resume, **settings)

    return go


def even(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


@pytest.mark.parametrize("model", [{}, {"layout": "adapters", "lora": {"rank": 4}}], ids=["separate", "adapters"])
def test_no_value_model_is_made_trained_or_saved_and_a_resumed_run_ends_with_the_same_bits(run, model):
    values = {"updates": 3, "model": model, "checkpoint": {"every": 1, "keep": 0}}
    whole, again = (run(even, resume=resume, **values) for resume in (False, "update-000001"))
    assert whole.models.value is None
    assert not [path for path in whole.directory.rglob("*") if "value" in path.name]
    assert not [name for name in whole.history[0] if name.startswith("value/") or name.endswith("/value")]
    assert all(0 <= metrics["group/agree"] <= 1 for metrics in whole.history)
    assert whole.history[1]["objective/kl"] != 0
    for a, b in zip(whole.models.weights("policy"), again.models.weights("policy"), strict=True):
        assert torch.equal(a, b)


def test_a_plan_has_no_value_model(tmp_path):
    policy = tiny.make_model(4096, hidden=128, layers=2, max_positions=64)
    plans = []
    for kind in ("gae", "group"):
        rollout = {"batch_size": 16, "samples_per_prompt": 4, "max_new_tokens": 32}
        config = config_from_dict({"rollout": rollout, "advantage": {"kind": kind}})
        plans.append(make_plan(config, "cpu", shapes=SavedModels(SavedModel(given=policy.config)), prompt_tokens=16))
    critic = sum(w.nbytes for w in policy.parameters()) - policy.lm_head.weight.nbytes + 4 * 129
    with_critic, without = (plan.phases["update"] for plan in plans)
    assert with_critic["weights"] - without["weights"] == pytest.approx(critic, abs=2000)  # and rotary frequencies
    assert with_critic["optimizer states"] - without["optimizer states"] == pytest.approx(2 * critic, abs=1000)


def test_prompts_whose_samples_agree_are_drawn_again(run, tokenizer):
    seen, found = [], []

    class Batch:
        def on_step(self, record):
            found.append(Responses.from_generation(record.batch.generation, tokenizer))

    def reward(prompts, completion_ids, **_):
        """Every second sample of a long prompt is better; those of a short one agree."""
        seen.append(list(prompts))
        return [float(len(prompt) > 4 and row % 2) for row, prompt in enumerate(prompts)]

    prompts = ["w1", "w5 w6 w7 w8 w9", "w2", "w3", "w4", "w7 w8 w9 w10 w11 w12"]
    values = {
        "updates": 1,
        "rollout": GROUP["rollout"] | {"dynamic_sampling": 9},
        "data": {"shuffle": False},
        "reward": {"missing_eos_penalty": 0},
    }
    (metrics,) = run(reward, prompts, callbacks=[Batch()], **values).history
    assert [each[::4] for each in seen] == [["w1", prompts[1]], ["w2"], ["w3"], ["w4"], [prompts[5]]]
    assert (metrics["group/replaced"], metrics["group/agree"], metrics["objective/scores"]) == (4, 0, 0.5)
    assert metrics["rollout/logprob_diff_max"] <= 2e-5  # of batches of other widths, joined
    assert [tokenizer.decode(ids) for ids in found[0].prompt_ids] == found[0].prompts


def test_tries_are_bounded_and_the_last_stays(run):
    calls = []

    def constant(prompts, **_):
        calls.append(len(prompts))
        return [1.0] * len(prompts)

    rollout = GROUP["rollout"] | {"dynamic_sampling": 2}
    metrics = run(constant, updates=1, rollout=rollout, reward={"missing_eos_penalty": 0}, kl={"coef": 0}).history[0]
    assert calls == [8, 8, 8]
    assert (metrics["group/replaced"], metrics["group/agree"], metrics["loss/policy"]) == (4, 1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout": {"samples_per_prompt": 1}}, "rollout.samples_per_prompt: expected 2 or more {}, got 1"),
        ({"model": {"layout": "shared"}}, "model.layout: expected 'separate' or 'adapters' {}{}, got 'shared'"),
        ({"model": {"value_path": "x"}}, "model.value_path: expected null {}{}, got 'x'"),
        ({"optim": {"critic_warmup_updates": 1}}, "optim.critic_warmup_updates: expected 0 {}{}, got 1"),
        ({"advantage": {"kind": "group", "value_lam": 1}}, "advantage.value_lam: expected null {}{}, got 1.0"),
    ],
)
def test_a_group_has_samples_and_nothing_of_a_critic(values, message):
    base = {"advantage": {"kind": "group"}, "rollout": {"samples_per_prompt": 8}}
    with pytest.raises(UserError) as error:
        config_from_dict(base | values)
    expected = message.format("with advantage.kind 'group'", ", which has no value model")
    assert str(error.value) == f"config: {expected}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout": {"dynamic_sampling": 3}}, "rollout.dynamic_sampling: expected 0 {}, got 3"),
        ({"advantage": {"leave_one_out": True}}, "advantage.leave_one_out: expected false {}, got True"),
        ({"advantage": {"divide_by_std": True}}, "advantage.divide_by_std: expected false {}, got True"),
    ],
)
def test_what_only_a_group_can_have(values, message):
    with pytest.raises(UserError) as error:
        config_from_dict(values)
    assert str(error.value) == f"config: {message.format(WITHOUT)}"


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_a_table_of_logits_reaches_the_enumerated_optimum_with_the_kl_in_the_reward(divide_by_std):
    """Dividing by the deviation moves no stationary policy: without a network in between both end at the optimum."""
    task, prompts, generator = enumerated, torch.arange(4).repeat_interleave(64), torch.Generator().manual_seed(0)
    words, tokens = task.PROMPTS, range(task.V)
    pairs = [[[a] if a == EOS else [a, b] for b in tokens] for a in tokens]
    scores = torch.tensor([[[task.score(word, pair) for pair in row] for row in pairs] for word in words])
    tables = [torch.zeros(4, task.V, requires_grad=True), torch.zeros(4, task.V, task.V, requires_grad=True)]
    start = -math.log(task.V)  # of each token under the reference
    optimizer = torch.optim.Adam(tables, lr=0.05, betas=(0.9, 0.95), eps=1e-5)
    for update in range(120):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / 120)
        first, second = (table.log_softmax(-1) for table in tables)
        a = torch.multinomial(first[prompts].exp(), 1, generator=generator)[:, 0]
        b = torch.multinomial(second[prompts, a].exp(), 1, generator=generator)[:, 0]
        long = (a != EOS).float()
        logprobs = first[prompts, a] + long * second[prompts, a, b]
        returns = scores[prompts, a, b] - task.BETA * (logprobs.detach() - start * (1 + long))
        groups = np.arange(len(prompts)) // 8
        advantages = group_advantages(returns, groups, leave_one_out=False, divide_by_std=divide_by_std)
        optimizer.zero_grad()
        (-advantages * logprobs).mean().backward()
        optimizer.step()
    first, second = (table.detach().log_softmax(-1) for table in tables)
    after = (second.exp() * (scores - task.BETA * (second - start))).sum(-1)
    after[:, EOS] = scores[:, EOS, 0]
    found = (first.exp() * (after - task.BETA * (first - start))).sum(-1).mean()
    soft = task.BETA * (start + scores / task.BETA).logsumexp(-1)
    soft[:, EOS] = scores[:, EOS, 0]
    best = task.BETA * (start + soft / task.BETA).logsumexp(-1).mean()
    assert 0 <= best - found < 1e-3
