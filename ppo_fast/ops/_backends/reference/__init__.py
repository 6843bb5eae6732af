"""The meaning of every op in plain torch: the ``torch`` backend, and what every kernel is held against.

Tensors come in as [B, T] (logits as [B, T, V]), checked and detached. Everything is float32, or float64 for float64
input. Notation: z = logits / temperature, u = log softmax(z), p = exp(u); w the same as u for the reference.
"""

from ppo_fast.ops._backends.reference.gae import gae
from ppo_fast.ops._backends.reference.policy_loss import (
    kl_values,
    policy_gradients,
    policy_loss,
    policy_loss_from_stats,
)
from ppo_fast.ops._backends.reference.sample_tokens import sample_tokens
from ppo_fast.ops._backends.reference.sequences import counted_mean, sequence_sum, to_tokens, token_weights
from ppo_fast.ops._backends.reference.token_stats import token_stats, token_stats_backward
from ppo_fast.ops._backends.reference.value_loss import value_loss, value_loss_backward

__all__ = [
    "counted_mean",
    "gae",
    "kl_values",
    "policy_gradients",
    "policy_loss",
    "policy_loss_from_stats",
    "sample_tokens",
    "sequence_sum",
    "to_tokens",
    "token_stats",
    "token_stats_backward",
    "token_weights",
    "value_loss",
    "value_loss_backward",
]
