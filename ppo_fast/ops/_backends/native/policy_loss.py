"""Launcher of policy_loss in C++."""

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import is_large, readable, token_weights
from ppo_fast.ops._backends.native.token_stats import token_stats, token_stats_backward
from ppo_fast.ops._core import checks
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import METRICS, PolicyLossResult, RowStats

_OP = "policy_loss"


def policy_loss(rows: RowInputs, policy: PolicyInputs, out: Tensor | None = None) -> PolicyLossResult:
    """The reference's policy_loss, with the gradient of the loss in ``out``, which may be the logits."""
    run = _one_pass if policy.ratio == "token" else _two_passes
    return run(readable(rows), policy, out)


def _two_passes(rows: RowInputs, policy: PolicyInputs, out: Tensor | None) -> PolicyLossResult:
    """A sequence ratio couples the tokens of a sequence: the statistics of all, their loss, then the gradients."""
    checks.target_values(_OP, rows.targets, rows.mask, rows.logits.shape[-1])
    stats = token_stats(rows, True)
    result = reference.policy_loss_from_stats(stats, rows.mask, policy)
    if out is not None:
        token_stats_backward(result.grads, rows, stats, out)
    return result


def _one_pass(rows: RowInputs, policy: PolicyInputs, out: Tensor | None) -> PolicyLossResult:
    """Statistics, loss and gradient of a row while it is in the cache."""
    advantages, full = policy.advantages, rows.ref_logits is not None
    weights = token_weights(advantages.shape, rows.mask, policy.cu_seqlens, policy.denominator, policy.aggregation)
    result = PolicyLossResult(
        advantages.new_empty(()),
        advantages.new_empty(len(METRICS)),
        torch.empty_like(advantages),
        torch.empty_like(advantages),
        torch.empty_like(advantages) if full or policy.ref_logprobs is not None else None,
        torch.empty_like(advantages, dtype=torch.float64),
        torch.empty_like(advantages, dtype=torch.float64) if full else None,
        torch.empty_like(advantages),
        None if policy.ent_coef is None else torch.empty_like(advantages),
        torch.empty_like(advantages) if full and policy.kl_coef is not None else None,
    )
    if not extension.policy_loss(rows, policy, weights, result, out, is_large(out), torch.get_num_threads()):
        # A counted target is outside the vocabulary, and nothing has been written.
        checks.target_values(_OP, rows.targets, rows.mask, rows.logits.shape[-1])
    return result


def policy_gradients(rows: RowInputs, policy: PolicyInputs, weights: Tensor | None) -> tuple[RowStats, RowGrads]:
    """As the reference's."""
    stats = token_stats(rows, True)
    return stats, reference.policy_loss_from_stats(stats, rows.mask, policy, weights).grads
