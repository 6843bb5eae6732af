"""The clipped policy-gradient loss of PPO with entropy bonus and KL terms, from logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import policy_loss as native_policy_loss
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.config import PolicyInputs, PolicyLossConfig
from ppo_fast.ops._core.inputs import RowGrads, RowInputs, given_grads
from ppo_fast.ops._core.layout import as_bools, as_logits, as_rows, as_shape
from ppo_fast.ops._core.policy_inputs import (
    PerToken,
    check_config,
    check_policy_inputs,
    check_values,
    named_output,
    policy_inputs,
    with_tensors,
)
from ppo_fast.ops._core.results import METRICS, LossOutput, PolicyLossResult, RowStats
from ppo_fast.ops._core.schema import grouped, schema, to_first
from ppo_fast.ops._core.vocab_shard import VocabShard
from ppo_fast.ops.token_stats import empty_stats, save_rows, saved_rows, token_stats_backward

_OP = "policy_loss"
_DEFAULT = PolicyLossConfig()

registry.register_public(_OP)
registry.register(_OP, "torch", registry.Implementation(reference.policy_loss))
registry.register(_OP, "triton", triton.implementation(_OP, "policy_loss"))
registry.register(_OP, "native", native_rows.implementation(native_policy_loss.policy_loss, fuses_backward=True))
_FROM_STATS = "policy_loss_from_stats"
registry.register(_FROM_STATS, "torch", registry.Implementation(reference.policy_loss_from_stats))
registry.register(_FROM_STATS, "native", registry.Implementation(reference.policy_loss_from_stats))
registry.register(_FROM_STATS, "triton", triton.implementation(_FROM_STATS, "policy_loss"))
_GRADIENTS = "policy_gradients"
registry.register(_GRADIENTS, "torch", registry.Implementation(reference.policy_gradients))
registry.register(_GRADIENTS, "native", registry.Implementation(native_policy_loss.policy_gradients))
registry.register(_GRADIENTS, "triton", triton.implementation(_GRADIENTS, "policy_loss"))


def _launch(
    rows: RowInputs, policy: PolicyInputs, backend: str, shard: VocabShard | None = None, **out: Tensor
) -> PolicyLossResult:
    """Checks what depends on values, then runs the backend."""
    check_values(_OP, policy, rows.mask)
    if shard is not None:
        stats = shard.stats(rows, True, backend)
        return registry.implementation(_FROM_STATS, backend)(stats, rows.mask, policy)
    entry = registry.entry(_OP, backend)
    if not entry.fuses_backward:
        checks.target_values(_OP, rows.targets, rows.mask, rows.logits.shape[-1])
    return entry.run(rows, policy, **out)


@torch.library.custom_op(
    "ppo_fast::policy_loss",
    mutates_args=(),
    schema=schema(RowInputs, PolicyInputs, "str backend", results=PolicyLossResult),
)
def _policy_loss(*arguments: Any) -> PolicyLossResult:
    *given, backend = arguments
    rows, policy = grouped(given, RowInputs, PolicyInputs)
    return _launch(rows, policy, backend).as_tensors()


@_policy_loss.register_fake
def _(*arguments: Any) -> PolicyLossResult:
    *given, _ = arguments
    rows, policy = grouped(given, RowInputs, PolicyInputs)
    new, shape = policy.advantages.new_empty, rows.logits.shape[:-1]
    full = rows.ref_logits is not None
    stats = empty_stats(rows.logits, True, True, full)
    return PolicyLossResult(
        new(()),
        new(len(METRICS)),
        *stats._replace(kl=new(shape if full or policy.ref_logprobs is not None else (0,))),
        grad_logprobs=new(shape),
        grad_entropy=new(shape if policy.ent_coef is not None else (0,)),
        grad_kl=new(shape if full and policy.kl_coef is not None else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.backend = inputs
    rows, _ = grouped(given, RowInputs, PolicyInputs)
    result, (_, *others) = PolicyLossResult(*output), output
    save_rows(ctx, rows, *result.stats, result.grad_logprobs, result.grad_entropy, result.grad_kl)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    if grad_loss is None:
        return to_first(ctx, None)
    rows, others = saved_rows(ctx)
    stats, grads = grouped(others, RowStats, RowGrads)
    return to_first(ctx, token_stats_backward(given_grads(*grads), rows, stats, ctx.backend, grad_loss))


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


@dataclass(slots=True)
class _Call:
    """A call past the dispatcher: what the backend takes, and what it returned."""

    rows: RowInputs
    policy: PolicyInputs
    backend: str
    shard: VocabShard | None
    result: PolicyLossResult | None = None

    @property
    def fuses_backward(self) -> bool:
        """Whether the backend writes the gradient in the forward pass."""
        return self.shard is None and registry.entry(_OP, self.backend).fuses_backward

    def run(self, ctx: Any, **out: Tensor) -> Tensor:
        """Run the backend, keep what a backward pass needs, return the loss: all that autograd handles."""
        self.result = result = _launch(self.rows, self.policy, self.backend, self.shard, **out)
        save_rows(ctx, self.rows, *result.stats)
        ctx.grads, ctx.backend = result.grads, self.backend
        ctx.set_materialize_grads(False)  # an undefined gradient stays one
        return result.loss


class _EagerPolicyLoss(torch.autograd.Function):
    """The registered op past the dispatcher.

    A backend that can writes the gradient in the forward pass: it is kept until the backward pass and handed out once.
    For a loss that arrives there scaled, or a second time, it is computed from the logits: it is rounded once, and
    nobody else holds its storage.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        ctx.shape, ctx.dlogits = logits.shape, None
        if not call.fuses_backward:
            return call.run(ctx)
        ctx.dlogits = torch.empty_like(call.rows.logits, memory_format=torch.contiguous_format)
        return call.run(ctx, out=ctx.dlogits)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None]:
        checks.first_derivative(_OP)
        if grad_loss is None:
            return None, None
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is None or grad_loss.item() != 1:
            rows, stats = saved_rows(ctx)
            dlogits = token_stats_backward(ctx.grads, rows, RowStats(*stats), ctx.backend, grad_loss)
        return as_shape(dlogits, ctx.shape), None


class _InPlace(torch.autograd.Function):
    """The same loss, with the gradient written over the logits; eager only.

    A backend that writes the gradient in the forward pass does it there. Its logits are then gone, so that a gradient
    of the loss other than 1 is multiplied in afterwards: a second rounding in bfloat16.

    The version counter is bumped in the forward pass and at the write, so that autograd refuses every later use of the
    old contents.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        ctx.shape, ctx.spent, ctx.written = logits.shape, False, call.fuses_backward
        loss = call.run(ctx, out=call.rows.logits) if ctx.written else call.run(ctx)
        torch.autograd.graph.increment_version(logits)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None]:
        checks.first_derivative(_OP)
        if grad_loss is None:
            return None, None
        if ctx.spent:
            raise RuntimeError(f"{_OP}: expected one backward with inplace=True, got a second one")
        ctx.spent = True
        rows, stats = saved_rows(ctx)
        logits = rows.logits
        if not ctx.written:
            run = registry.implementation("token_stats_backward", ctx.backend)
            run(ctx.grads, rows, RowStats(*stats), out=logits, scale=grad_loss)
        elif grad_loss.item() != 1:
            logits.mul_(grad_loss)
        torch.autograd.graph.increment_version(logits)
        return as_shape(logits, ctx.shape), None


def _run(logits: Tensor, call: _Call, inplace: bool) -> tuple[Tensor, PolicyLossResult]:
    """The op past the dispatcher, of ``logits`` whose values are in the call without their history."""
    if not torch.is_grad_enabled() or not logits.requires_grad:
        result = _launch(call.rows, call.policy, call.backend, call.shard)
        return result.loss, result
    loss = (_InPlace if inplace else _EagerPolicyLoss).apply(logits, call)
    assert call.result is not None
    return loss, call.result


def _check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(f"{_OP}: expected inplace=False under torch.compile, got inplace=True")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(f"{_OP}: expected logits that are no leaf with inplace=True, got a leaf that requires grad")
    # Distinct elements need strides that, sorted, each step over all smaller dimensions.
    reach = 1
    for stride, size in sorted((st, sz) for st, sz in zip(logits.stride(), logits.shape, strict=True) if sz > 1):
        if stride < reach:
            raise ValueError(
                f"{_OP}: expected logits without overlapping memory with inplace=True, "
                f"got shape {list(logits.shape)} with strides {list(logits.stride())}"
            )
        reach = stride * size


def _check(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
) -> None:
    checks.logits(_OP, "logits", logits)
    checks.reverse_mode(_OP, "logits", logits)
    checks.targets(_OP, targets, logits)
    checks.ref_logits(_OP, ref_logits, logits)
    checks.boolean(_OP, "mask", mask, "targets", targets, targets.shape)


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    config: PolicyLossConfig = _DEFAULT,
    ref_logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> LossOutput:
    """The PPO policy loss straight from logits: clipped ratio, entropy bonus, PPO-penalty and KL to the reference.

    With r = exp(clamp(logprob - old_logprob, -20, 20)) and A the advantage::

        objective = min(r*A, clip(r, 1 - clip_low, 1 + clip_high)*A)       (A < 0: at least dual_clip*A)
        or, "cispo": stopgrad(clip(r, 1 - clip_low, 1 + clip_high))*A*logprob
        loss = aggregate(-weight*objective + penalty_coef*(r - 1 - log r) + kl_coef*kl - ent_coef*H)

    Args:
        logits: [..., T, V] or packed [N, V]; float32, bfloat16, float16 or float64. The only input with a gradient.
        targets: [..., T], int32 or int64: the tokens that were sampled.
        old_logprobs: [..., T] under the policy that sampled them; None means ``logprobs.detach()`` (r = 1).
        advantages: [..., T] or [..., 1].
        mask: [..., T], bool, True = counts; None counts every position. Other rows are not read.
        config: objective, clip, coefficients, ratio, KL estimator, temperature, aggregation.
        ref_logprobs: [..., T] under the reference, for kl_estimator "k1", "k2", "k3".
        ref_logits: [..., T, V] of the reference, for kl_estimator "full"; divided by the same temperature.
        importance_weights: [..., T] or [..., 1]; multiply each token's objective after clip and dual clip.
        cu_seqlens: int32 or int64 [S + 1], the sequence offsets of packed [N] inputs.
        denominator: replaces the outer count of the aggregation (counted tokens, or sequences with one), so that
            micro-batches and ranks add up to the large batch. Above 0, or 0 where nothing counts. The value of a tensor
            on a GPU is not checked, which would wait for the device: NaN makes the loss NaN.
        inplace: let the gradient take the storage of ``logits``, whose contents are unspecified afterwards. On the
            "native" backend a bfloat16 gradient is rounded twice when the loss is scaled before its backward.
        backend: "auto" | "torch" | "triton" | "native".
        group: the process group over whose ranks the vocabulary is split, as in :func:`ppo_fast.token_logprobs`:
            ``logits`` and ``ref_logits`` are this rank's slices, everything else is the same on every rank. Loss and
            metrics are those of whole rows on every rank, the gradient is that of this rank's logits.

    Returns:
        LossOutput. ``metrics``: policy_loss, entropy, kl, approx_kl, clipfrac, dual_clipfrac, ratio_mean, ratio_max,
        tokens; all but policy_loss and ratio_max are plain means over this call's counted tokens. clipfrac: tokens
        whose clip lowers the objective; with "cispo" those whose ratio is outside the clip.
        ``per_token``: TokenStats(logprobs, entropy, kl).

    Raises:
        ValueError: shapes, dtypes, devices, references or values that do not fit; forward-mode differentiation.
        RuntimeError: a backward with ``create_graph=True``; a second one with ``inplace=True``.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
        >>> out = policy_loss(logits, torch.tensor([[1, 2]]), None, torch.ones(1, 2), None)
        >>> out.loss.item(), out.metrics["tokens"].item()
        (-1.0, 2.0)

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; dual clip: Ye et al. 2020, eq. 3;
    KL estimators: Schulman 2020, "Approximating KL Divergence"; sequence ratio: Zheng et al. 2025 (GSPO), eq. 7; CISPO:
    MiniMax 2025, arXiv:2506.13585, eq. 4.
    """
    per_token = PerToken(old_logprobs, advantages, ref_logprobs, importance_weights)
    check_config(_OP, config)
    _check(logits, targets, mask, ref_logits)
    check_policy_inputs(_OP, config, targets, per_token, ref_logits, "ref_logits", cu_seqlens, denominator)
    backend = registry.resolve(_OP, backend, logits.device, logits.dtype)
    inplace = inplace and torch.is_grad_enabled() and logits.requires_grad
    if inplace:
        _check_inplace(logits)
    inplace = inplace and type(logits) is Tensor  # a tensor without data has no place
    shape, direct = targets.shape, inplace or registry.runs_directly(logits)
    flat_logits = as_logits(logits.detach() if direct else logits)
    by_address = direct and backend != "torch" and group is None
    if inplace and flat_logits.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"{_OP}: expected logits that need no copy (unit stride over V) with inplace=True, "
            f"got shape {list(logits.shape)} with strides {list(logits.stride())}"
        )
    rows = RowInputs(
        flat_logits,
        as_rows(targets, shape, by_address),
        None if ref_logits is None else as_logits(ref_logits.detach()),
        as_bools(mask, shape, by_address),
        float(config.temperature),
    )
    policy = policy_inputs(config, logits, shape, per_token, cu_seqlens, denominator, by_address)
    shard = None if group is None else VocabShard(_OP, group, logits.shape[-1], logits)
    if shard is not None and rows.targets is not None:
        rows = rows._replace(targets=shard.local(rows.targets, rows.mask))
    if direct:
        loss, result = _run(logits, _Call(rows, policy, backend, shard), inplace)
    else:
        result = PolicyLossResult(*_policy_loss(*rows, *with_tensors(policy, logits), backend))
        loss = result.loss
    return named_output(loss, result.metrics, result.logprobs, result.entropy, result.kl, shape)
