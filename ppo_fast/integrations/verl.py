"""verl: log-probabilities, entropy, GAE, the "vanilla" policy loss and the value loss."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ppo_fast.integrations.common import (
    binary,
    clipped_objective,
    in_dtype_of_log_softmax,
    in_unit_interval,
    per_rank,
    squared_error,
)
from ppo_fast.integrations.patching import NotTaken, Report, Target, patch
from ppo_fast.ops import PolicyLossConfig, entropy, gae, masked_mean, token_logprobs

_AGGREGATIONS = {
    "token-mean": "token-mean",
    "token-sum": "token-mean",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
}


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor | NotTaken:
    """Log-probabilities of ``labels``; float32 where flash-attn's cross entropy would have given that."""
    from verl.utils import torch_functional as theirs

    if theirs.NPU_CROSS_ENTROPY_LOSS_AVAILABLE:
        return NotTaken("the cross entropy of torch_npu")
    flash = theirs.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    if not flash:
        return in_dtype_of_log_softmax(token_logprobs(logits, labels), logits)
    if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        return NotTaken("flash-attn writes the gradient over the logits, which is leaner")
    return token_logprobs(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row."""
    return in_dtype_of_log_softmax(entropy(logits), logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy [N] of each row, float32; nothing of size V exists, so that no chunk is needed."""
    return entropy(logits).float()


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor] | NotTaken:
    """(whitened advantages, returns) [B, T]; a masked token carries the advantage of the next counted one."""
    from verl.utils.torch_functional import masked_whiten

    gamma, lam = float(gamma), float(lam)
    if not in_unit_interval(gamma, lam):
        return NotTaken("gamma or lam outside [0, 1]")
    dtype = torch.promote_types(torch.promote_types(token_level_rewards.dtype, values.dtype), response_mask.dtype)
    mask = response_mask.bool()
    advantages, _ = gae(token_level_rewards, values, mask, gamma=gamma, lam=lam)
    steps = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    following = torch.where(mask, steps, mask.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    advantages = torch.nn.functional.pad(advantages, (0, 1)).gather(-1, following).to(dtype)
    return masked_whiten(advantages, response_mask), advantages + values.detach()


def _reduction(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[str, float | Tensor | None, float] | NotTaken:
    """(aggregation, denominator, divisor of the loss) for the arguments of verl's agg_loss."""
    total = batch_num_tokens if mode == "token-mean" else global_batch_size
    if mode == "token-sum":
        total = 1
    if mode not in _AGGREGATIONS or (total is None and dp_size > 1):
        return NotTaken("an aggregation that verl refuses or ppo_fast lacks")
    divisor = (loss_scale_factor or mask.shape[-1]) if mode == "seq-mean-token-sum-norm" else 1
    return _AGGREGATIONS[mode], per_rank(total, dp_size), divisor


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]] | NotTaken:
    """PPO's clipped objective with dual clip, and its metrics as Python numbers."""
    if config is None or not hasattr(config, "global_batch_info"):
        return NotTaken("no actor config")
    reduction = _reduction(loss_agg_mode, response_mask, **config.global_batch_info)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    dual = config.get("clip_ratio_c", 3.0)
    if isinstance(reduction, NotTaken):
        return reduction
    aggregation, denominator, divisor = reduction
    out = clipped_objective(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        PolicyLossConfig(clip_low=min(low, 1.0), clip_high=high, dual_clip=dual, aggregation=aggregation),
        importance_weights=rollout_is_weights,
        denominator=denominator,
    )
    if isinstance(out, NotTaken):
        return out
    loss, metrics = out
    fell = masked_mean((old_log_prob - log_prob.detach()).clamp(-20, 20), binary(response_mask))
    return loss / divisor, {
        "actor/pg_clipfrac": metrics["clipfrac"].item(),
        "actor/ppo_kl": fell.item(),
        "actor/pg_clipfrac_lower": metrics["dual_clipfrac"].item(),
    }


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    **sizes: Any,
) -> tuple[Tensor, Tensor] | NotTaken:
    """(half the clipped squared error, share where the clipped square is larger)."""
    reduction = _reduction(loss_agg_mode, response_mask, **sizes)
    if isinstance(reduction, NotTaken):
        return reduction
    aggregation, denominator, divisor = reduction
    out = squared_error(
        vpreds,
        returns,
        values,
        response_mask,
        clip=cliprange_value,
        aggregation=aggregation,
        denominator=denominator,
    )
    return out if isinstance(out, NotTaken) else (out[0] / divisor, out[1])


_TORCH, _CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
_TARGETS = (
    Target(
        _TORCH,
        "logprobs_from_logits",
        "token_logprobs",
        {"verl 0.9.1": "c263cabac8e53503"},
        lambda _: logprobs_from_logits,
    ),
    Target(_TORCH, "entropy_from_logits", "entropy", {"verl 0.9.1": "f19fa7806949491d"}, lambda _: entropy_from_logits),
    Target(
        _TORCH,
        "entropy_from_logits_with_chunking",
        "entropy",
        {"verl 0.9.1": "ba9ad6595303a445"},
        lambda _: entropy_from_logits_with_chunking,
    ),
    Target(
        _CORE,
        "compute_gae_advantage_return",
        "gae",
        {"verl 0.9.1": "d0aa83a54328c029"},
        lambda _: compute_gae_advantage_return,
    ),
    Target(
        _CORE,
        "compute_policy_loss_vanilla",
        "policy_loss",
        {"verl 0.9.1": "73d845283f178030"},
        lambda _: compute_policy_loss_vanilla,
        helpers=("agg_loss",),
    ),
    Target(
        _CORE,
        "compute_value_loss",
        "value_loss",
        {"verl 0.9.1": "85bc6fec933857aa"},
        lambda _: compute_value_loss,
        helpers=("agg_loss",),
    ),
)
_KEPT = {"the other policy losses of the registry": "their objectives (GSPO, CISPO, ...) are not policy_loss's"}


def patch_verl() -> Report:
    """Let verl compute with the ops; also a context manager, undone at its end.

    The functions are replaced wherever they were imported and in verl's registries. An engine keeps the entropy
    function it was built with, and workers are Ray processes: call this in each of them before the engine is built,
    for instance as Ray's ``worker_process_setup_hook``.

    Results have the shapes and dtypes of the originals. They differ where a logit is -inf, where the entropy is a
    number and not NaN, and where no token counts, where a loss is 0 and not NaN.

    Returns:
        :class:`ppo_fast.integrations.Report`: what was replaced, what was not and why, calls, and ``undo()``.

    Raises:
        ValueError: verl's source is not the known one, or a patch is in effect already.
        ModuleNotFoundError: verl, or something it needs, is not installed.
    """
    return patch("patch_verl", "verl", _TARGETS, _KEPT)
