"""OpenRLHF: log-probabilities, entropy, KL estimates, policy and value loss, GAE of its experience maker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.integrations.common import (
    binary,
    clipped_objective,
    in_dtype_of_log_softmax,
    in_unit_interval,
    loop_gae,
    per_rank,
    squared_error,
)
from ppo_fast.integrations.patching import NotTaken, Report, Target, patch
from ppo_fast.ops import PolicyLossConfig, entropy, kl_estimate, masked_mean, token_logprobs


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of ``labels``. The logits are divided by the temperature in place, as the original does."""
    if temperature != 1.0:
        logits.div_(temperature)
    return in_dtype_of_log_softmax(token_logprobs(logits, labels), logits)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row."""
    return in_dtype_of_log_softmax(entropy(logits), logits)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor | NotTaken:
    """Schulman's estimates in float32, clamped to +-10."""
    if unbiased_gradient or kl_estimator not in ("k1", "k2", "k3") or log_probs.shape != log_probs_base.shape:
        return NotTaken("an estimate with the gradient of another, or shapes that differ")
    return kl_estimate(log_probs.float(), log_probs_base.float(), kl_estimator).clamp(min=-10, max=10)


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, None, None] | NotTaken:
    """(loss, clipped fraction, mean of old - new log-probability, None, None) of OpenRLHF's PolicyLoss."""
    if self.is_correction_level != "off":
        return NotTaken("a correction for the rollout engine's log-probabilities")
    config = PolicyLossConfig(
        clip_low=min(self.clip_eps_low, 1.0),  # a ratio is above 0
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        ratio="sequence" if self.policy_loss_type == "gspo" else "token",
        aggregation="token-mean" if self.token_level_loss else "seq-mean-token-mean",
    )
    total = batch_num_tokens if self.token_level_loss else global_batch_size
    out = clipped_objective(
        log_probs, old_log_probs, advantages, action_mask, config, denominator=per_rank(total, dp_size)
    )
    if isinstance(out, NotTaken):
        return out
    loss, metrics = out
    fell = masked_mean(old_log_probs - log_probs.detach(), binary(action_mask))
    return loss, metrics["clipfrac"], fell, None, None


def value_loss_forward(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor | NotTaken:
    """Half the (clipped) squared error."""
    out = squared_error(
        values,
        returns,
        old_values,
        action_mask,
        clip=self.clip_eps,
        aggregation="token-mean" if self.token_level_loss else "seq-mean-token-mean",
        denominator=per_rank(batch_num_tokens if self.token_level_loss else global_batch_size, dp_size),
    )
    return out if isinstance(out, NotTaken) else out[0]


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor] | NotTaken:
    """GAE [B, T] of rewards and values that are 0 where masked."""
    if not in_unit_interval(gamma, lambd):
        return NotTaken("gamma or lambd outside [0, 1]")
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    return loop_gae(rewards, values, gamma, lambd)


_UTILS, _LOSS, _MAKER = "openrlhf.models.utils", "openrlhf.models.loss", "openrlhf.trainer.ppo_utils.experience_maker"
_TARGETS = (
    Target(
        _UTILS,
        "log_probs_from_logits",
        "token_logprobs",
        {"openrlhf 0.11.2": "25bc663769cbda66"},
        lambda _: log_probs_from_logits,
    ),
    Target(_UTILS, "compute_entropy", "entropy", {"openrlhf 0.11.2": "b487adf2769b525f"}, lambda _: compute_entropy),
    Target(
        _UTILS, "compute_approx_kl", "kl_estimate", {"openrlhf 0.11.2": "9ceed3b7ed1f500d"}, lambda _: compute_approx_kl
    ),
    Target(
        _LOSS,
        "PolicyLoss.forward",
        "policy_loss",
        {"openrlhf 0.11.2": "31c6bfe5cc69c174"},
        lambda _: policy_loss_forward,
        helpers=("aggregate_loss", "masked_mean"),
    ),
    Target(
        _LOSS,
        "ValueLoss.forward",
        "value_loss",
        {"openrlhf 0.11.2": "2957f6b529a863ef"},
        lambda _: value_loss_forward,
        helpers=("aggregate_loss", "masked_mean"),
    ),
    Target(
        _MAKER,
        "RemoteExperienceMaker.get_advantages_and_returns",
        "gae",
        {"openrlhf 0.11.2": "df55c3229effb53f"},
        lambda _: get_advantages_and_returns,
    ),
)


def patch_openrlhf() -> Report:
    """Let OpenRLHF compute with the ops; also a context manager, undone at its end.

    Its functions run in Ray's workers, each a process of its own: call this there, for instance as Ray's
    ``worker_process_setup_hook``, before the models are built.

    Results have the shapes and dtypes of the originals. They differ where a logit is -inf, where the entropy is a
    number and not NaN, and where no token counts, where a loss is 0 and not NaN.

    Returns:
        :class:`ppo_fast.integrations.Report`: what was replaced, what was not and why, calls, and ``undo()``.

    Raises:
        ValueError: OpenRLHF's source is not the known one, or a patch is in effect already.
        ModuleNotFoundError: OpenRLHF, or something it needs, is not installed.
    """
    return patch("patch_openrlhf", "openrlhf", _TARGETS, {})
