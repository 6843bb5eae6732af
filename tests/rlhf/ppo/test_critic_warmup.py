"""The critic's warm-up: the value model learns, the policy and what is steered by its steps do not."""

import numpy as np
import pytest
import torch

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.update import Learner
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.factories import made_experience

LAYOUTS = {
    "separate": {},
    "shared": {"layout": "shared"},
    "adapters": {"layout": "adapters", "lora": {"rank": 4}},
    "plain logits": {"fused_head": False},
}


@pytest.fixture
def run(make_config, tokenizer):
    def go(resume=False, **values):
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        settings = {"prompts": PROMPTS, "policy": policy, "tokenizer": tokenizer}
        reward_fn = lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids]  # noqa: E731
        return train_ppo(make_config(**values), reward_fn=reward_fn, resume=resume, **settings)

    return go


def weights(models):
    roles = {role: [w.detach().clone() for w in models.weights(role)] for role in ("policy", "value")}
    return roles["policy"], roles["value"]


def same(before, after):
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_value_model_learns_in_the_first_updates(layout, make_models, make_config, make_rollout):
    optim = {"critic_warmup_updates": 2, "warmup_frac": 0.0}
    loss = {"ent_coef": 0.1, "penalty_coef": 1.0, "penalty_target": 0.1}
    config = make_config(updates=3, model=LAYOUTS[layout], optim=optim, loss=loss)
    models = make_models(config)
    rollout = make_rollout(models, config)
    learner, generator = Learner(models, config), torch.Generator().manual_seed(0)
    earned = np.linspace(-1, 1, len(rollout.tokens), dtype=np.float32)
    returns = torch.from_numpy(earned)
    experience = made_experience(rollout, returns.flip(0), returns)
    for update in (0, 1):
        before = weights(models)
        stats = learner.update(experience, 0.1, update, generator)
        policy, value = map(same, before, weights(models))
        assert all(policy)
        assert not any(value[:1])
        assert (stats.lr, stats.grad_norms[0].item()) == (0.0, 0.0)
        assert stats.grad_norms[1] > 0
        assert learner.penalty.coef == 1.0
        assert all(weight.grad is None for weight in models.weights("policy"))  # for the first step to add to
        assert stats.policy["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert stats.policy["entropy"] == pytest.approx(rollout.entropy.mean().item(), rel=1e-4)
    before = weights(models)
    stats = learner.update(experience, 0.1, 2, generator)
    policy, value = map(same, before, weights(models))
    assert not any(policy[:1] + value[:1])
    assert stats.lr > 0
    assert stats.grad_norms[0] > 0


def test_the_schedule_of_the_policy_begins_after_the_warm_up(run, tmp_path):
    optim = {"warmup_frac": 0.5, "final_lr_frac": 0.2}
    plain = run(updates=4, optim=optim)
    warmed = run(updates=6, optim=optim | {"critic_warmup_updates": 2}, output_dir=str(tmp_path / "warmed"))
    rates = [[metrics["lr"] for metrics in result.history] for result in (plain, warmed)]
    assert rates[1] == [0.0, 0.0, *rates[0]]


def test_the_adaptive_kl_coefficient_waits_for_the_policy(run):
    values = {
        "updates": 4,
        "optim": {"critic_warmup_updates": 2},
        "kl": {"adaptive": True, "coef": 0.5, "horizon": 10},
    }
    result = run(**values)
    coefs = [metrics["objective/kl_coef"] for metrics in result.history]
    assert coefs[0] == coefs[1] == coefs[2] == 0.5 != coefs[3]
    assert result.history[0]["objective/kl"] == result.history[1]["objective/kl"] == 0.0


def test_a_run_resumed_within_the_warm_up_ends_with_the_same_bits(run, tmp_path):
    values = {"updates": 3, "optim": {"critic_warmup_updates": 2}, "checkpoint": {"every": 1, "keep": 0}}
    whole = run(**values)
    again = run(**values, resume="update-000001")
    pairs = zip(weights(whole.models), weights(again.models), strict=True)
    assert all(all(same(*pair)) for pair in pairs)
