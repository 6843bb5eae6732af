"""The reference: fixed, replaced by the policy, or its moving average."""

import pytest
import torch

from ppo_fast.rlhf.config.ppo import ReferenceConfig
from ppo_fast.rlhf.ppo.reference import Reference


@pytest.fixture
def models(make_config, make_models):
    """Models whose policy has moved away from the reference."""
    made = make_models(make_config())
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.add_(1.0)
    return made


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_fixed_reference_stays(models):
    before = weights(models.reference)
    reference = Reference(models, ReferenceConfig())
    reference.update(9)
    assert same(weights(models.reference), before)
    assert reference.state_dict() == {}


def test_it_is_replaced_every_k_updates(models):
    before, reference = weights(models.reference), Reference(models, ReferenceConfig(update="replace", every=3))
    for index in (0, 1):
        reference.update(index)
        assert same(weights(models.reference), before)
    reference.update(2)
    assert same(weights(models.reference), weights(models.policy))
    assert not any(parameter.requires_grad for parameter in models.reference.parameters())
    with torch.no_grad():
        next(models.policy.parameters()).add_(1.0)
    assert not same(weights(models.reference), weights(models.policy))


def test_it_is_a_moving_average(models):
    before = weights(models.reference)
    Reference(models, ReferenceConfig(update="ema", every=1, decay=0.75)).update(0)
    for old, new, policy in zip(before, weights(models.reference), weights(models.policy), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * policy)


def test_a_moving_reference_is_restored(models, make_config, make_models):
    moved = Reference(models, ReferenceConfig(update="replace", every=1))
    moved.update(0)
    other = make_models(make_config())
    Reference(other, moved.config).load_state_dict(moved.state_dict())
    assert same(weights(other.reference), weights(models.reference))
