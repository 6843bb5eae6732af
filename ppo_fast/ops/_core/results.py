"""What the ops return."""

from typing import NamedTuple

from torch import Tensor

# The metrics of the policy losses and of the value loss, in the order in which every backend writes them.
METRICS = (
    "policy_loss",
    "entropy",
    "kl",
    "approx_kl",
    "clipfrac",
    "dual_clipfrac",
    "ratio_mean",
    "ratio_max",
    "tokens",
)
VALUE_METRICS = ("value_loss", "clipfrac", "tokens")


class TokenStats(NamedTuple):
    """Per-token results in the shape of ``targets``; float32 (float64 for float64 logits), 0 where masked.

    Attributes:
        logprobs: log pi(target), nats.
        entropy: -sum_v pi(v) log pi(v), nats.
        kl: KL to the reference, nats; None without a reference.
    """

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None


class LossOutput(NamedTuple):
    """A scalar to call ``backward()`` on, and what to log about it.

    Attributes:
        loss: 0-d, float32 (float64 for float64 input).
        metrics: name -> detached 0-d tensor on the loss's device; reading one is the caller's host sync.
        per_token: detached per-token results where the loss has them, else None.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    per_token: TokenStats | None = None


class GaeResult(NamedTuple):
    """Of ``gae``: float32 (float64 if an input is), contiguous, in the shape of the rewards, 0 where masked."""

    advantages: Tensor
    returns: Tensor
