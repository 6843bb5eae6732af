"""Advantages: GAE ends at the last counted token, and whitening sees only counted ones."""

import dataclasses

import pytest
import torch

from ppo_fast.rlhf.config.ppo import AdvantageConfig
from ppo_fast.rlhf.ppo.advantages import make_experience
from ppo_fast.rlhf.ppo.rewards import Rewards
from tests.rlhf.factories import made_rollout

LENGTHS = [2, 5, 1, 4]


def rewards_for(rollout, seed=7, fill=0.0):
    made = made_rollout(LENGTHS, seed=seed, width=rollout.generation.mask.shape[1], fill=fill)
    zeros = torch.zeros(len(LENGTHS))
    return Rewards(made.values, zeros, torch.zeros_like(made.values), torch.tensor(0.0), [], [], [True] * 4, None, None)


def split(*columns):
    """The rows of these columns [N], response by response."""
    return zip(*(column.split(LENGTHS) for column in columns), strict=True)


def double_sum(rewards, values, gamma, lam):
    """A[t] = sum_k (gamma lam)^k delta[t+k] over one response, with value 0 after its end."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_rule_08_the_value_after_the_last_counted_token_is_0(gamma, lam):
    # Width 7: garbage values beyond every response must not be bootstrapped from.
    rollout = made_rollout(LENGTHS, width=7, fill=100.0)
    rewards = rewards_for(rollout)
    experience = make_experience(rollout, rewards, AdvantageConfig(gamma=gamma, lam=lam, whiten=False))
    for earned, values, found in split(rewards.rewards, rollout.values, experience.advantages):
        truth = double_sum(earned.tolist(), values.tolist(), gamma, lam)
        torch.testing.assert_close(found, torch.tensor(truth))


def test_rule_08_returns_are_advantages_before_whitening_plus_old_values():
    rollout = made_rollout(LENGTHS)
    rewards = rewards_for(rollout)
    to_python = make_experience(rollout, rewards, AdvantageConfig(whiten=False))
    whitened = make_experience(rollout, rewards, AdvantageConfig(whiten=True))
    torch.testing.assert_close(to_python.returns, to_python.advantages + rollout.values)
    assert torch.equal(whitened.returns, to_python.returns)
    assert not torch.equal(whitened.advantages, to_python.advantages)


@pytest.mark.parametrize("kind", ["gae", "sequence"])
def test_the_value_model_regresses_on_returns_of_its_own_lam(kind):
    rollout = made_rollout(LENGTHS)
    rewards = rewards_for(rollout)
    config = AdvantageConfig(kind=kind, gamma=0.9, lam=0.6, value_lam=0.3, whiten=False)
    experience = make_experience(rollout, rewards, config)
    alone = make_experience(rollout, rewards, dataclasses.replace(config, value_lam=None))
    assert torch.equal(experience.advantages, alone.advantages)
    for earned, values, found in split(rewards.rewards, rollout.values, experience.returns):
        truth = double_sum(earned.tolist(), values.tolist(), 0.9, 0.3)
        torch.testing.assert_close(found, torch.tensor(truth) + values)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.05, 1.0), (0.5, 0.9), (2.0, 1.0), (1.0, 0.0)])
def test_an_adaptive_lam_is_that_of_each_response(alpha, gamma):
    lengths = [1, 2, 5, 64, 19, 20, 21, 130]  # at 0.05 lam is 0 up to a length of 20
    rollout = made_rollout(lengths)
    earned = made_rollout(lengths, seed=7).values.double()
    rewards = Rewards(
        earned, torch.zeros(8), torch.zeros_like(earned), torch.tensor(0.0), [], [], [True] * 8, None, None
    )
    rollout = dataclasses.replace(rollout, values=rollout.values.double())
    config = AdvantageConfig(gamma=gamma, lam="adaptive", lam_alpha=alpha, whiten=False)
    experience = make_experience(rollout, rewards, config)
    columns = (rewards.rewards, rollout.values, experience.advantages, experience.returns)
    for each, values, found, returns in zip(*(column.split(lengths) for column in columns), strict=True):
        lam = max(0.0, 1 - 1 / (alpha * len(each)))
        truth = torch.tensor(double_sum(each.tolist(), values.tolist(), gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns, truth + values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_per_sequence_every_token_has_the_return_less_the_value_of_the_prompt(gamma):
    rollout = made_rollout(LENGTHS, width=7, fill=100.0)
    rewards = rewards_for(rollout)
    config = AdvantageConfig(kind="sequence", gamma=gamma, lam=0.3, whiten=False)
    experience = make_experience(rollout, rewards, config)
    for earned, values, advantages, found in split(
        rewards.rewards, rollout.values, experience.advantages, experience.returns
    ):
        earned, values, n = earned.tolist(), values.tolist(), len(earned)
        returns = [sum(gamma ** (k - t) * earned[k] for k in range(t, n)) for t in range(n)]
        torch.testing.assert_close(advantages, torch.full((n,), returns[0] - values[0]))
        torch.testing.assert_close(found, torch.tensor(returns))


def test_rule_09_whitening_is_over_the_counted_tokens_of_the_whole_batch():
    rollout = made_rollout(LENGTHS)
    advantages = make_experience(rollout, rewards_for(rollout), AdvantageConfig()).advantages
    assert advantages.shape == (sum(LENGTHS),)
    assert advantages.mean().abs() < 1e-6
    assert advantages.var() == pytest.approx(1, abs=1e-5)


def test_rule_09_padding_columns_change_nothing():
    narrow, wide = made_rollout(LENGTHS, width=5), made_rollout(LENGTHS, width=9, fill=float("nan"))
    one = make_experience(narrow, rewards_for(narrow), AdvantageConfig())
    two = make_experience(wide, rewards_for(wide, fill=float("nan")), AdvantageConfig())
    for name in ("tokens", "logprobs", "ref_logprobs", "values", "advantages", "returns"):
        assert torch.equal(getattr(two, name), getattr(one, name)), name
