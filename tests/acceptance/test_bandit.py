"""The textbook exercise: PPO on a contextual bandit whose optimum is known."""

import pytest
import torch

from examples import bandit


@pytest.mark.parametrize("mode", bandit.MODES)
def test_reaches_98_percent_of_the_best_reward_in_25_updates(mode: str, seed: int) -> None:
    mu = bandit.make_bandit(seed)
    history = bandit.train(mu, bandit.Settings(mode), seed)
    assert len(history.reward) == 25
    assert history.reward[-1] >= 0.98 * bandit.best_reward(mu)


def test_without_clip_or_penalty_a_stressed_policy_jumps() -> None:
    mu = bandit.make_bandit()
    kl = {mode: max(bandit.train(mu, bandit.stressed(mode)).kl) for mode in bandit.MODES}
    assert kl["none"] > 3 * kl["clip"]
    assert kl["none"] > 3 * kl["penalty"]


def test_kl_to_the_reference_leads_to_the_closed_form() -> None:
    mu = bandit.make_bandit()
    target = bandit.closed_form(mu, bandit.LEASHED.beta)
    reached = bandit.train(mu, bandit.LEASHED)
    assert abs(reached.reward[-1] - bandit.expected_reward(target, mu)) < 0.01
    assert (reached.policy - target).abs().max() < 0.1


def test_closed_form_is_the_best_trade_of_reward_for_kl() -> None:
    mu, beta = bandit.make_bandit().double(), 0.1

    def objective(policy: torch.Tensor) -> float:
        kl = (policy * (policy * policy.shape[-1]).log()).sum(-1).mean()
        return bandit.expected_reward(policy, mu) - beta * float(kl)

    best = bandit.closed_form(mu, beta)
    for _ in range(20):
        other = (best.log() + 0.3 * torch.randn_like(best)).softmax(-1)
        assert objective(other) < objective(best)
