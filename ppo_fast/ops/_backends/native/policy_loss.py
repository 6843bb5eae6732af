"""Launcher of policy_loss in C++."""

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import (
    gradient_view,
    per_row,
    readable,
    room,
    rows_view,
    set_addresses,
    set_fields,
    stats_room,
    token_weights,
)
from ppo_fast.ops._backends.native.token_stats import token_stats, token_stats_backward
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.policy_inputs import with_tensors
from ppo_fast.ops._core.results import METRICS, PolicyLossResult, RowStats
from ppo_fast.ops._core.schema import tensor_fields

# The tensors that the kernel takes under the same names; it takes the weights of the tokens in place of cu_seqlens.
_TENSORS = [name for name in tensor_fields(PolicyInputs) if name != "cu_seqlens"]


def policy_loss(rows: RowInputs, policy: PolicyInputs, out: Tensor | None = None) -> PolicyLossResult:
    """The reference's policy_loss, with the gradient of the loss in ``out``, which may be the logits."""
    run = _one_pass if policy.ratio == "token" else _two_passes
    return run(readable(rows), policy, out)


def _two_passes(rows: RowInputs, policy: PolicyInputs, out: Tensor | None) -> PolicyLossResult:
    """A sequence ratio couples the tokens of a sequence: the statistics of all, their loss, then the gradients."""
    stats = token_stats(rows, True)
    result = reference.policy_loss_from_stats(stats, rows.mask, policy)
    if out is not None:
        token_stats_backward(result.grads, rows, stats, out)
    return result


def _one_pass(rows: RowInputs, policy: PolicyInputs, out: Tensor | None) -> PolicyLossResult:
    """Statistics, loss and gradient of a row while it is in the cache."""
    logits, full = rows.logits, rows.ref_logits is not None
    policy = with_tensors(policy, policy.advantages)  # the kernel takes addresses
    stats = stats_room(rows, want_kl=policy.ref_logprobs is not None)
    weights = token_weights(logits.shape[:2], rows.mask, policy.cu_seqlens, policy.denominator, policy.aggregation)
    result = PolicyLossResult(
        room(()),
        room((len(METRICS),)),
        *stats,
        grad_logprobs=per_row(logits),
        grad_entropy=per_row(logits, policy.ent_coef is not None),
        grad_kl=per_row(logits, full and policy.kl_coef is not None),
    )
    statistics, arguments = extension.TokenStatsArguments(), extension.PolicyLossArguments()
    statistics.rows = rows_view(rows)
    set_fields(statistics, stats)
    arguments.stats = statistics
    arguments.low, arguments.high, arguments.dual_clip = 1.0 - policy.clip_low, 1.0 + policy.clip_high, policy.dual_clip
    arguments.objective = getattr(extension.PolicyObjective, policy.objective)
    arguments.kl_estimator = getattr(extension.KlEstimator, policy.kl_estimator)
    arguments.gradient = gradient_view(out, logits)
    set_addresses(arguments, token_weights=weights, **{name: getattr(policy, name) for name in _TENSORS})
    set_addresses(arguments, loss=result.loss, metrics=result.metrics, grad_logprobs=result.grad_logprobs)
    set_addresses(arguments, grad_entropy=result.grad_entropy, grad_kl=result.grad_kl)
    extension.policy_loss(arguments, threads=torch.get_num_threads())
    return result


def policy_gradients(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, RowGrads]:
    """As the reference's."""
    stats = token_stats(rows, True)
    return stats, reference.policy_loss_from_stats(stats, rows.mask, policy, weights).grads
