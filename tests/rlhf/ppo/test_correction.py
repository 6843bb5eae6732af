"""rollout.correction: the gradient of samples from another distribution, and what masked tokens are left out of."""

import dataclasses

import numpy as np
import pytest
import torch

from ppo_fast.rlhf.config.ppo import AdvantageConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import PromptBatch
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.forward import response_logits
from ppo_fast.rlhf.ppo.advantages import make_experience
from ppo_fast.rlhf.ppo.correction import make_correction, mismatch_metrics
from ppo_fast.rlhf.ppo.rollout import Generation
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.training.optim import schedule
from tests.helpers import raises_exactly
from tests.rlhf.factories import all_rows, forward_of, made_experience, made_rollout
from tests.rlhf.ppo.test_update import gradients, made_rewards, random_rewards

V = 64
BAND = (0.7, 1.5)


def every_word(models, config, sampler):
    """The rollout of all V responses of one token to one prompt, sampled with these probabilities [V]."""
    words, ones = torch.arange(V)[:, None], torch.ones(V, 1, dtype=torch.bool)
    prompts = PromptBatch(torch.full((V, 1), 5), ones, ["w1"] * V, {})
    ids, attention = torch.cat([prompts.input_ids, words], 1), torch.ones(V, 2, dtype=torch.bool)
    logprobs = sampler.log()[:, None]
    return score(models, Generation(prompts, ids, attention, ones, ones[:, 0], logprobs), config.rollout)


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({}, lambda q, p: q),
        ({"correction": "none"}, lambda q, p: q),
        ({"correction": "truncate", "correction_cap": 1e6}, lambda q, p: p),
        ({"correction": "truncate", "correction_cap": 1.5}, lambda q, p: torch.minimum(p, 1.5 * q)),
        (
            {"correction": "mask", "correction_band": BAND},
            lambda q, p: torch.where(((p / q) >= 0.7) & ((p / q) <= 1.5), p, 0.0),
        ),
    ],
    ids=["null", "none", "exact", "truncate", "mask"],
)
def test_the_expected_gradient_is_that_of_the_enumeration(make_config, make_models, rollout, expected):
    """Samples of q, each word with its share: with the weights p / q the gradient is that of sampling from p."""
    config = make_config(rollout=rollout)
    models = make_models(config)
    generator = torch.Generator().manual_seed(1)
    q = torch.softmax(0.7 * torch.randn(V, generator=generator), -1)
    advantages = torch.randn(V, generator=generator)
    sampled = every_word(models, config, q)
    policy = torch.log_softmax(response_logits(models.policy, forward_of(sampled))[0], -1)
    p, correction = policy.detach().exp(), make_correction(sampled, config.rollout)
    # Each word occurs once among V samples: its advantage times V q(word) makes it as frequent as q has it.
    experience = made_experience(sampled, V * q * advantages, torch.zeros(V))
    if correction is not None:
        experience = dataclasses.replace(experience, weights=correction.weights)
        experience = experience if correction.kept is None else experience.keep(correction.kept)
    share = len(experience.tokens) / V
    assert (share < 0.9) == (rollout.get("correction") == "mask")
    learner = Learner(models, config)
    learner.backward(*all_rows(experience), 0.0)
    found = gradients(models.policy)
    models.policy.zero_grad()
    (-(expected(q, p) * advantages * policy).sum() / share).backward()
    for name, gradient in gradients(models.policy).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def shifted(rollout, config, *, rows=()):
    """The rollout as if a sampler with other log-probabilities had made it; of `rows` all tokens are far off."""
    noise = torch.randn(len(rollout.tokens), generator=torch.Generator().manual_seed(2))
    far = torch.isin(
        torch.arange(len(rollout.grid.lengths)).repeat_interleave(rollout.cu_seqlens.diff()), torch.tensor(rows)
    )
    changed = dataclasses.replace(rollout, sampled_logprobs=rollout.logprobs + torch.where(far, 3.0, 0.4 * noise))
    return changed, make_correction(changed, config.rollout)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_masked_tokens_leave_every_normalizer(make_config, make_models, make_rollout, aggregation):
    results = []
    for micro in (None, 1):
        config = make_config(
            rollout={"correction": "mask", "correction_band": BAND},
            loss={"aggregation": aggregation, "value_clip": None},
            optim={"micro_batch_size": micro},
        )
        models = make_models(config)
        rollout, correction = shifted(make_rollout(models, config), config, rows=[2, 5])
        experience = make_experience(rollout, random_rewards(rollout), AdvantageConfig(), correction)
        plain = make_experience(rollout, random_rewards(rollout), AdvantageConfig(whiten=False))
        kept = correction.kept
        assert (experience.lengths[[2, 5]] == 0).all()
        assert 0.2 < kept.float().mean() < 0.8
        for name in ("tokens", "logprobs", "values", "returns"):
            assert torch.equal(getattr(experience, name), getattr(plain, name)[kept])
        # GAE ran over all tokens, whitening over those that are kept.
        left = plain.advantages[kept]
        torch.testing.assert_close(experience.advantages, (left - left.mean()) / left.std(), rtol=1e-4, atol=1e-5)
        learner = Learner(models, config)
        policy, value = learner.backward(*all_rows(experience), 0.0)
        assert policy["tokens"] == value["tokens"] == kept.sum()
        error = 0.5 * (rollout.values - plain.returns)[kept].square().mean()
        torch.testing.assert_close(value["value_loss"], error)
        terms = (-correction.weights[kept] * experience.advantages).split(experience.lengths.tolist())
        means = [x.mean() for x in terms if len(x)] if aggregation != "token-mean" else torch.cat(terms)
        torch.testing.assert_close(policy["policy_loss"], torch.as_tensor(list(means)).mean(), rtol=1e-4, atol=1e-6)
        results.append(gradients(models.policy) | gradients(models.value))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_minibatch_without_a_token_left_changes_nothing(make_config, make_models, make_rollout):
    config = make_config(rollout={"correction": "mask", "correction_band": BAND}, loss={"ent_coef": 0.1})
    models = make_models(config)
    rollout, correction = shifted(make_rollout(models, config), config, rows=[2, 5])
    experience = make_experience(rollout, made_rewards(rollout), AdvantageConfig(), correction)
    policy, value = Learner(models, config).backward(experience, np.array([2, 5]), 0.0)
    assert policy["tokens"] == policy["loss"] == value["value_loss"] == 0
    assert all((gradient == 0).all() for gradient in gradients(models.policy).values())


def test_a_minibatch_without_a_token_left_takes_no_step_and_is_counted(make_config, make_models, make_rollout):
    optim = {"minibatch_size": 1, "weight_decay": 0.1, "epochs": 2}
    config = make_config(rollout={"correction": "mask", "correction_band": BAND}, optim=optim, updates=1)
    models = make_models(config)
    rollout, correction = shifted(make_rollout(models, config), config, rows=[2, 5])
    experience = make_experience(rollout, made_rewards(rollout), AdvantageConfig(), correction)
    learner = Learner(models, config)
    stats = learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    empty = np.flatnonzero(experience.lengths == 0)
    assert 2 <= len(empty) < 8
    assert (stats.empty, stats.skipped) == (2 * len(empty), 0)
    orders = learner._minibatches(8, torch.Generator().manual_seed(0))
    last = max(place for place, (_, _, rows) in enumerate(orders) if rows[0] not in empty)
    assert stats.lr == pytest.approx(config.optim.lr * schedule(last, 16, config.optim))
    for optimizer in learner.optimizers:
        steps = {state["step"].item() for state in optimizer.optimizer.state_dict()["state"].values()}
        assert steps == {2 * (8 - len(empty))}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_weights_and_metrics(level, kind):
    config = RolloutConfig(correction=kind, correction_level=level, correction_cap=1.2, correction_band=(0.5, 1.2))
    rollout = made_rollout([2, 3, 1])
    rollout = dataclasses.replace(
        rollout, sampled_logprobs=rollout.logprobs - torch.tensor([0.3, -0.5, 0.2, 0, 0, -30])
    )
    w = {"token": np.exp([0.3, -0.5, 0.2, 0, 0, -20]), "sequence": np.exp([-0.2, -0.2, 0.2, 0.2, 0.2, -20])}[level]
    correction, metrics = make_correction(rollout, config), mismatch_metrics(rollout, config)
    outside = (w > 1.2) | (w < 0.5) if kind == "mask" else w > 1.2
    np.testing.assert_allclose(correction.weights, w if kind == "mask" else np.minimum(w, 1.2), rtol=1e-5)
    assert (correction.kept is None) == (kind == "truncate")
    assert kind == "truncate" or (correction.kept.numpy() == ~outside).all()
    d = np.array([0.3, -0.5, 0.2, 0, 0, -20])
    assert metrics["mismatch/kl"].item() == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-4)
    assert metrics["mismatch/max"].item() == pytest.approx(w.max(), rel=1e-5)
    assert metrics["mismatch/clipped_frac"].item() == pytest.approx(outside.mean())


def test_a_rollout_of_which_no_token_is_left_is_refused():
    rollout = made_rollout([2, 1])
    rollout = dataclasses.replace(rollout, sampled_logprobs=rollout.logprobs + 2)
    message = "rollout.correction: expected a token or more with a weight in the band [0.5, 2.0], got none of 3"
    with raises_exactly(message, UserError):
        make_correction(rollout, RolloutConfig(correction="mask"))
