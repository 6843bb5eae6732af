"""The good-token task in bfloat16: float32 masters and 8-bit moments with stochastic rounding learn it too."""

import pytest
import torch

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.models import tiny
from tests.acceptance import good_token


@pytest.mark.slow
@pytest.mark.parametrize("states", [{"master_weights": True}, {"name": "adamw_8bit"}], ids=["masters", "8bit"])
def test_bfloat16_weights_learn_the_task(states, tmp_path):
    result = train_ppo(
        good_token.config(tmp_path / "run", 0, optim=states),
        reward_fn=good_token.share_of_good_tokens,
        prompts=good_token.WORDS,
        policy=good_token.make_policy(0).bfloat16(),
        tokenizer=tiny.make_tokenizer(good_token.WORDS),
    )
    assert result.models.policy.dtype == torch.bfloat16
    scores = [metrics["objective/scores"] for metrics in result.history]
    assert scores[9] >= 0.5
    assert scores[19] >= 0.9
