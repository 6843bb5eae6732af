"""The trainer learns tasks with a known answer."""

import pytest

from ppo_fast.rlhf import tiny, train_ppo
from tests.rlhf.stages import WORDS

GOOD = [10, 20, 30, 40, 50]  # token ids; 5 of V = 64, so chance is 0.08


def share_of_good_tokens(completion_ids, **_):
    return [sum(token in GOOD for token in ids) / 16 for ids in completion_ids]


@pytest.fixture
def learn(make_config, tokenizer):
    """learn(**config) -> the history of a run on the good-token task: V 64, D 64, 2 layers, batch 64."""

    def run(**values):
        config = make_config(
            **{
                "model": {"value_head": "zero"},
                "reward": {"missing_eos_penalty": 0.0},
                "loss": {"value_clip": None},
                **values,
            }
        )
        policy = tiny.make_model(64, hidden=64, layers=2, heads=4)
        return train_ppo(
            config, reward_fn=share_of_good_tokens, prompts=WORDS, policy=policy, tokenizer=tokenizer
        ).history

    return run


def test_the_good_token_task_is_learned_in_20_updates(learn):
    history = learn(
        updates=20,
        rollout={"batch_size": 64, "max_new_tokens": 16},
        optim={"lr": 4e-3, "value_lr": 2e-3, "epochs": 4, "minibatch_size": 16},
        kl={"coef": 0.0},
    )
    scores = [metrics["objective/scores"] for metrics in history]
    assert scores[0] < 0.15
    assert scores[9] >= 0.5
    assert scores[19] >= 0.9
    assert max(metrics["rollout/logprob_diff_max"] for metrics in history) <= 2e-5
    assert sum(metrics["value/explained_variance"] for metrics in history[2:12]) / 10 > 0.1


@pytest.mark.parametrize("coef", [0.02, 1.0])
def test_rule_13_the_adaptive_coefficient_holds_the_kl_at_its_target(make_config, tokenizer, coef):
    config = make_config(
        updates=110,
        model={"value_head": "zero"},
        rollout={"batch_size": 64, "max_new_tokens": 4},
        reward={"missing_eos_penalty": 0.0},
        loss={"value_clip": None},
        kl={"coef": coef, "adaptive": True, "target": 3.0, "horizon": 300},
        optim={"lr": 6e-3, "value_lr": 2e-3, "epochs": 3, "minibatch_size": 32, "final_lr_frac": 0.3},
    )
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
    history = train_ppo(
        config,
        reward_fn=lambda completion_ids, **_: [sum(token in GOOD for token in ids) / 2 for ids in completion_ids],
        prompts=WORDS,
        policy=policy,
        tokenizer=tokenizer,
    ).history
    kl = sum(metrics["objective/kl"] for metrics in history[-20:]) / 20
    assert kl == pytest.approx(3.0, rel=0.2)
