"""Shared by the replacements: dtypes of the originals, and losses of tensors without a vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ppo_fast.integrations.patching import NotTaken
from ppo_fast.ops import PolicyLossConfig, gae, value_loss
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.layout import as_bools, grid
from ppo_fast.ops._core.policy_inputs import PerToken, policy_inputs
from ppo_fast.ops._core.results import METRICS, RowStats

HALVES = (torch.bfloat16, torch.float16)


def in_dtype_of_log_softmax(result: Tensor, logits: Tensor) -> Tensor:
    """``result`` in the dtype of ``log_softmax(logits)``, which autocast may widen: the originals return that."""
    if logits.dtype not in HALVES:
        return result
    return result.to(torch.log_softmax(logits.detach().new_zeros(1), -1).dtype)


def binary(mask: Tensor | None) -> Tensor | None:
    """A mask of zeros and ones of any dtype as bool."""
    return None if mask is None else mask.bool()


def per_rank(total: float | Tensor | None, ranks: int) -> float | Tensor | None:
    """The denominator of a sum that is divided by a global ``total`` and multiplied by the number of ranks."""
    return None if total is None else total / ranks


def loop_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE without a mask, in the dtype that the loop over time gives."""
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    advantages, returns = gae(rewards, values, gamma=float(gamma), lam=float(lam))
    return advantages.to(dtype), returns.to(dtype)


def in_unit_interval(*numbers: float) -> bool:
    """Whether :func:`ppo_fast.gae` takes these as gamma and lam."""
    return all(0 <= number <= 1 for number in numbers)


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that arithmetic on the tensors gives."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))


def squared_error(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    mask: Tensor | None,
    *,
    clip: float | None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor] | NotTaken:
    """(loss, clipped fraction) of :func:`ppo_fast.value_loss`, with a mask of zeros and ones of any dtype."""
    if any(x is not None and x.requires_grad for x in (returns, old_values)):
        return NotTaken("a gradient of returns or old values")
    if clip is not None and clip <= 0:
        return NotTaken("a clip range of 0")
    out = value_loss(
        values,
        returns,
        binary(mask),
        old_values=old_values,
        clip=clip,
        aggregation=aggregation,
        denominator=denominator,
    )
    return out.loss.to(_dtype(values, returns, mask, None if clip is None else old_values)), out.metrics["clipfrac"]


class _OfLogprobs(torch.autograd.Function):
    """The policy loss of log-probabilities [B, T]; the gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, mask: Tensor | None, policy: PolicyInputs) -> tuple[Tensor, Tensor]:
        backend = registry.resolve("policy_loss", "auto", logprobs.device, logprobs.dtype)
        rows = logprobs.detach().to(checks.accumulation_dtype(logprobs.dtype)).contiguous()
        run, none = registry.implementation("policy_loss_from_stats", backend), rows.new_empty(0)
        out = run(RowStats(rows, torch.zeros_like(rows), none, none, none), mask, policy)
        ctx.dtype = logprobs.dtype
        ctx.save_for_backward(out.grad_logprobs)
        ctx.mark_non_differentiable(out.metrics)
        return out.loss, out.metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (d_logprobs,) = ctx.saved_tensors
        return (d_logprobs * grad_loss).to(ctx.dtype), None, None


def clipped_objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    config: PolicyLossConfig,
    *,
    importance_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]] | NotTaken:
    """Loss and metrics of :func:`ppo_fast.policy_loss` where the log-probabilities [B, T] are there already."""
    if torch.compiler.is_compiling():
        return NotTaken("torch.compile fuses the original")
    others = (old_logprobs, advantages, importance_weights)
    if any(x is not None and x.requires_grad for x in others):
        return NotTaken("a gradient of more than the log-probabilities")
    shape = logprobs.shape
    per_token = PerToken(old_logprobs, advantages, None, importance_weights)
    policy = policy_inputs(config, logprobs, shape, per_token, None, denominator)
    loss, metrics = _OfLogprobs.apply(logprobs.reshape(grid(shape)), as_bools(binary(mask), shape), policy)
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    return loss.to(_dtype(logprobs, mask, *others)), named
