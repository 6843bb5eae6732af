"""The ops: pure functions on tensors for any trainer."""

from ppo_fast.ops._core.config import PolicyLossConfig
from ppo_fast.ops._core.registry import backends
from ppo_fast.ops._core.results import LossOutput, SampledTokens, TokenStats
from ppo_fast.ops.gae import gae, gae_packed
from ppo_fast.ops.linear_policy_loss import linear_policy_loss
from ppo_fast.ops.linear_token_stats import linear_token_stats
from ppo_fast.ops.masked import kl_estimate, masked_mean, whiten
from ppo_fast.ops.policy_loss import policy_loss
from ppo_fast.ops.preference import dpo_loss, preference_loss
from ppo_fast.ops.sample_tokens import sample_tokens
from ppo_fast.ops.token_stats import entropy, token_logprobs, token_stats
from ppo_fast.ops.value_loss import value_loss

__all__ = [
    "token_logprobs",
    "token_stats",
    "entropy",
    "sample_tokens",
    "policy_loss",
    "linear_token_stats",
    "linear_policy_loss",
    "value_loss",
    "preference_loss",
    "dpo_loss",
    "gae",
    "gae_packed",
    "kl_estimate",
    "masked_mean",
    "whiten",
    "backends",
    "PolicyLossConfig",
    "LossOutput",
    "SampledTokens",
    "TokenStats",
]
