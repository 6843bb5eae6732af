"""A value head on the policy's own trunk: one pass for both, the numbers of two."""

import dataclasses

import pytest
import torch

from ppo_fast.rlhf.models.value import ValueModel
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from tests.rlhf.factories import all_rows, made_experience


@pytest.fixture
def setup(make_models, make_config, make_rollout):
    config = make_config(loss={"ent_coef": 0.1, "vf_coef": 0.3}, optim={"micro_batch_size": 4})
    models = make_models(config)
    head = torch.nn.Linear(models.value.head.in_features, 1)
    models = dataclasses.replace(models, value=ValueModel(models.policy.base_model, head), shared=True)
    rollout = make_rollout(models, config)
    columns = (
        torch.randn(rollout.generation.mask.shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    return models, config, rollout, made_experience(rollout, *columns)


def passes(trunk):
    count = []
    trunk.register_forward_hook(lambda *_: count.append(1))
    return count


def test_scoring_takes_one_pass_of_the_trunk_for_policy_and_values(setup):
    models, config, rollout, _ = setup
    count = passes(models.policy.base_model)
    ours = score(models, rollout.generation, config.rollout)
    assert len(count) == 1
    theirs = score(dataclasses.replace(models, shared=False), rollout.generation, config.rollout)
    assert len(count) == 3
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_one_backward_pass_has_the_gradient_of_the_sum(setup):
    models, config, _, experience = setup
    count, found = passes(models.policy.base_model), []
    for shared in (True, False):
        parameters = [*models.policy.parameters(), *models.value.head.parameters()]
        for parameter in parameters:
            parameter.grad = None
        learner = Learner(dataclasses.replace(models, shared=shared), config)
        metrics = learner.backward(*all_rows(experience), 0.0)
        found.append((metrics, [parameter.grad.clone() for parameter in parameters], len(count)))
    (metrics, gradients, ours), (other_metrics, other_gradients, both) = found
    assert (ours, both) == (2, 6)
    torch.testing.assert_close(metrics, other_metrics)
    for mine, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
