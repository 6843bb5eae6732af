"""The stationary policy of each placement of the KL, on a task of two tokens whose every response is in the batch.

The policy is uniform, so that each response is as frequent as it is likely, and the gradient of the batch is the
expected one. The reference for which this policy is stationary is computed by enumeration, in float64.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_fast.rlhf import PPOConfig
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import Models, load_models
from ppo_fast.rlhf.ppo.advantages import make_experience
from ppo_fast.rlhf.ppo.rewards import KLCoefficient, OwnScores, ScoredBatch, compute_rewards
from ppo_fast.rlhf.ppo.rollout import Generation, Rollout
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from tests.rlhf.factories import all_rows

V, EOS, COEF = 8, 2, 0.4
B = V * V
# [V, V] by first and second token; after EOS there is none.
SCORES = torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SCORES[EOS] = 0.8
LENGTHS = torch.full((V, V), 2).index_fill_(0, torch.tensor(EOS), 1).flatten()
# How a setting scales the coefficient in the loss: not, by the deviation over tokens, or by that over responses.
CASES = {
    "reward": ({}, "none"),
    "reward, whitened": ({"whiten": True}, "none"),
    "loss": ({}, "none"),
    "loss, whitened": ({"whiten": True}, "tokens"),
    "loss, divided": ({"divide_by_std": True}, "responses"),
    "both": ({}, "none"),
    "both, whitened": ({"whiten": True}, "tokens"),
}
CLAIMS = sorted({(name.split(",")[0], scale) for name, (_, scale) in CASES.items()})


class Reference(NamedTuple):
    """log p - log q of the first token [V] and of the second [V, V], for uniform p."""

    first: Tensor
    second: Tensor


def log_ratios(values: Tensor, coef: float) -> Tensor:
    """log p/q over the last dimension, for q proportional to p exp(-values / coef)."""
    return math.log(1 / V) - (-values / coef).log_softmax(-1)


def stationary(placement: str, scale: str) -> Reference:
    """The reference for which the uniform policy is stationary.

    A token gains its return, less the coefficient in the loss times log p/q: p is stationary where all gain alike.
    """
    s = 1.0
    for _ in range(200):
        in_reward, in_loss = COEF * (placement != "loss"), COEF * s * (placement != "reward")
        second = log_ratios(SCORES, in_reward + in_loss)
        second[EOS] = 0.0
        first = log_ratios((SCORES - in_reward * second).mean(1), in_reward + in_loss)
        returns = (SCORES - in_reward * (second + first[:, None])).flatten()
        if scale != "none":
            s = returns.repeat_interleave(LENGTHS if scale == "tokens" else torch.ones_like(LENGTHS)).std().item()
    return Reference(first, second)


def made_rollout(config: PPOConfig) -> tuple[Models, Rollout]:
    """The uniform policy, and each of its responses once for every second token that it could have."""
    policy, tokenizer = tiny.make_model(V, hidden=16, layers=1, heads=2), tiny.make_tokenizer(["w0", "w1", "w2", "w3"])
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    models = load_models(config.model, torch.Generator(), policy=policy, tokenizer=tokenizer, critic=False)
    prompts = make_batch(load_prompts(["w0"], tokenizer, config.data), [0] * B, models.pad_id, models.device)
    mask = torch.arange(2) < LENGTHS[:, None]
    responses = torch.where(mask, torch.cartesian_prod(torch.arange(V), torch.arange(V)), models.pad_id)
    generation = Generation(
        dataclasses.replace(prompts, groups=np.zeros(B, np.int64)),
        torch.cat([prompts.input_ids, responses], 1),
        torch.cat([prompts.attention_mask, mask], 1),
        mask,
        ended=torch.ones(B, dtype=torch.bool),
        logprobs=torch.zeros(B, 2),
    )
    return models, score(models, generation, config.rollout)


def scored(_: Any) -> ScoredBatch:
    """The score on the last token of each response."""
    totals = SCORES.flatten().float()
    last = torch.zeros(B, 2).scatter_(1, LENGTHS[:, None] - 1, totals[:, None])
    own = OwnScores(("score",), totals[:, None], totals, totals)
    return ScoredBatch(last[torch.arange(2) < LENGTHS[:, None]], totals, [True] * B, None, own)


def gradient(learner: Learner, rollout: Rollout, reference: Reference) -> float:
    """The norm of the gradient of the trainer's loss in the head of the policy."""
    config, tokenizer = learner.config, learner.models.tokenizer
    ratios = torch.stack([reference.first[:, None].expand(V, V), reference.second], -1).flatten(0, 1)
    rollout = dataclasses.replace(rollout, ref_logprobs=rollout.logprobs - ratios[rollout.generation.mask].float())
    rewards = compute_rewards(rollout, tokenizer, scored, KLCoefficient(config.kl, rollout.logprobs.device))
    learner.models.policy.zero_grad()
    learner.backward(*all_rows(make_experience(rollout, rewards, config.advantage)), COEF)
    return learner.models.policy.lm_head.weight.grad.norm().item()


@pytest.mark.parametrize("case", CASES)
def test_the_stationary_policy_is_the_one_that_the_help_states(case: str, make_config: Any) -> None:
    options, scale = CASES[case]
    placement = case.split(",")[0]
    config = make_config(
        rollout={"batch_size": B, "samples_per_prompt": B, "max_new_tokens": 2},
        kl={"coef": COEF, "placement": placement},
        advantage={"kind": "group", "whiten": False, **options},
        optim={"minibatch_size": B},
    )
    models, rollout = made_rollout(config)
    learner = Learner(models, config)
    start = gradient(learner, rollout, Reference(torch.zeros(V), torch.zeros(V, V)))
    for claim in CLAIMS:
        left = gradient(learner, rollout, stationary(*claim)) / start
        assert left < 1e-3 if claim == (placement, scale) else left > 0.01, (claim, left)
