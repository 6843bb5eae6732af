"""Launcher of policy_loss in C++."""

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import (
    as_number,
    gradient_view,
    readable,
    rows_view,
    stats_room,
    token_weights,
)
from ppo_fast.ops._backends.native.token_stats import token_stats, token_stats_backward
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import METRICS, PolicyLossResult, RowStats


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
    logits, advantages, full = rows.logits, policy.advantages, rows.ref_logits is not None
    stats = stats_room(rows, want_kl=policy.ref_logprobs is not None, shape=advantages.shape)
    weights = token_weights(advantages.shape, rows.mask, policy.cu_seqlens, policy.denominator, policy.aggregation)

    def grad(wanted: bool) -> Tensor:
        return torch.empty_like(advantages) if wanted else advantages.new_empty(0)

    result = PolicyLossResult(
        advantages.new_empty(()),
        advantages.new_empty(len(METRICS)),
        *stats,
        grad_logprobs=grad(True),
        grad_entropy=grad(policy.ent_coef is not None),
        grad_kl=grad(full and policy.kl_coef is not None),
    )
    extension.policy_loss(
        rows_view(rows),
        gradient_view(out, logits),
        1.0 - policy.clip_low,
        1.0 + policy.clip_high,
        policy.dual_clip,
        getattr(extension.PolicyObjective, policy.objective),
        getattr(extension.KlEstimator, policy.kl_estimator),
        as_number(policy.denominator),
        as_number(policy.penalty_coef),
        as_number(policy.ent_coef),
        as_number(policy.kl_coef),
        threads=torch.get_num_threads(),
        old_logprobs=policy.old_logprobs,
        advantages=advantages,
        ref_logprobs=policy.ref_logprobs,
        importance_weights=policy.importance_weights,
        token_weights=weights,
        **result._asdict(),
    )
    return result


def policy_gradients(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, RowGrads]:
    """As the reference's."""
    stats = token_stats(rows, True)
    return stats, reference.policy_loss_from_stats(stats, rows.mask, policy, weights).grads
