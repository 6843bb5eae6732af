"""ppo_fast: kernel-accelerated PPO for RLHF of language models."""

from ppo_fast._version import __version__
from ppo_fast.ops import (
    LossOutput,
    PolicyLossConfig,
    TokenStats,
    backends,
    entropy,
    gae,
    gae_packed,
    kl_estimate,
    linear_policy_loss,
    linear_token_stats,
    masked_mean,
    policy_loss,
    token_logprobs,
    token_stats,
    value_loss,
    whiten,
)

__all__ = [
    "token_logprobs",
    "token_stats",
    "entropy",
    "policy_loss",
    "linear_token_stats",
    "linear_policy_loss",
    "value_loss",
    "gae",
    "gae_packed",
    "kl_estimate",
    "masked_mean",
    "whiten",
    "backends",
    "PolicyLossConfig",
    "LossOutput",
    "TokenStats",
    "__version__",
]
