"""Results of the public and of the registered ops."""

from typing import NamedTuple

from torch import Tensor

from ppo_fast.ops._core.inputs import RowGrads

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


class SampledTokens(NamedTuple):
    """A token drawn from each row of logits; without gradient.

    Attributes:
        tokens: int64.
        logprobs: log softmax(logits / temperature)[token], nats; float32 (float64 for float64 logits).
    """

    tokens: Tensor
    logprobs: Tensor


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


class RowStats(NamedTuple):
    """Statistics of each row [B, T] in the accumulation dtype, 0 where masked, empty where not asked for."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor  # KL(pi || ref) over the vocabulary
    lse: Tensor  # float64: with a logit offset of 3e4 a float32 lse is off by 1e-3, and so is every probability
    ref_lse: Tensor  # the same for the reference


class PolicyLossResult(NamedTuple):
    """The policy loss, the statistics [B, T], and the gradients of the loss in these; None where not used."""

    loss: Tensor  # []
    metrics: Tensor  # [len(METRICS)]
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None  # of the estimator
    lse: Tensor
    ref_lse: Tensor | None
    grad_logprobs: Tensor
    grad_entropy: Tensor | None
    grad_kl: Tensor | None

    @property
    def stats(self) -> RowStats:
        """The statistics, None where not used; their kl is over the vocabulary where there are reference logits."""
        return RowStats(self.logprobs, self.entropy, self.kl, self.lse, self.ref_lse)  # type: ignore[arg-type]

    @property
    def grads(self) -> RowGrads:
        """The gradients in the statistics, as the backward of ``token_stats`` takes them."""
        return RowGrads(self.grad_logprobs, self.grad_entropy, self.grad_kl)

    def as_tensors(self) -> "PolicyLossResult":
        """With empty tensors for None: a registered op returns tensors only."""
        likes = self._replace(ref_lse=self.lse)
        return PolicyLossResult(
            *[
                (like if like is not None else self.loss).new_empty(0) if x is None else x
                for x, like in zip(self, likes, strict=True)
            ]
        )


class ValueLossResult(NamedTuple):
    """The value loss and its gradient."""

    loss: Tensor  # []
    metrics: Tensor  # [len(VALUE_METRICS)]
    grad_values: Tensor  # [B, T], of the loss


class GaeResult(NamedTuple):
    """Contiguous, in the shape of the rewards, 0 where masked; float32 (float64 if an input is)."""

    advantages: Tensor
    returns: Tensor
