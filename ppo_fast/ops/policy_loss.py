"""The clipped policy-gradient loss of PPO with entropy bonus and KL terms, from logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import policy_loss as native_policy_loss
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.config import PolicyLossConfig
from ppo_fast.ops._core.layout import as_bools, as_logits, as_rows
from ppo_fast.ops._core.policy_inputs import COEFFICIENTS, check_config, check_terms, flat_terms, named_output
from ppo_fast.ops._core.results import METRICS, LossOutput
from ppo_fast.ops.token_stats import token_stats_backward

_OP = "policy_loss"
_DEFAULT = PolicyLossConfig()

registry.register_public(_OP)
registry.register(_OP, "torch", registry.Implementation(reference.policy_loss))
registry.register(_OP, "triton", triton.implementation(_OP, "policy_loss"))
registry.register(_OP, "native", native_rows.implementation(native_policy_loss.policy_loss, fuses_backward=True))


def _launch(*inputs: Any, **out: Tensor) -> Any:
    """Checks what depends on values, then runs the backend, the last of the inputs of the registered op."""
    *arguments, backend = inputs
    logits, targets, mask, cu_seqlens, denominator = *arguments[:3], *arguments[9:11]
    checks.target_values(_OP, targets, mask, logits.shape[-1])
    checks.cu_seqlens_values(_OP, cu_seqlens, targets.numel())
    checks.denominator_value(_OP, denominator, mask, targets.numel())
    checks.coefficient_values(_OP, **dict(zip(COEFFICIENTS, arguments[11:14], strict=True)))
    return registry.implementation(_OP, backend)(*arguments, **out)


@torch.library.custom_op("ppo_fast::policy_loss", mutates_args=())
def _policy_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    penalty_coef: Tensor | None,
    ent_coef: Tensor | None,
    kl_coef: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    ratio: str,
    kl_estimator: str,
    aggregation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _launch(
        logits,
        targets,
        mask,
        ref_logits,
        temperature,
        old_logprobs,
        advantages,
        ref_logprobs,
        importance_weights,
        cu_seqlens,
        denominator,
        penalty_coef,
        ent_coef,
        kl_coef,
        clip_low,
        clip_high,
        dual_clip,
        ratio,
        kl_estimator,
        aggregation,
        backend,
    )


@_policy_loss.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    penalty_coef: Tensor | None,
    ent_coef: Tensor | None,
    kl_coef: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    ratio: str,
    kl_estimator: str,
    aggregation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def rows(wanted: bool = True, dtype: torch.dtype = advantages.dtype) -> Tensor:
        return advantages.new_empty(targets.shape if wanted else (0,), dtype=dtype)

    full = ref_logits is not None
    return (
        advantages.new_empty(()),
        advantages.new_empty(len(METRICS)),
        rows(),
        rows(),
        rows(full or ref_logprobs is not None),
        rows(dtype=torch.float64),
        rows(full, torch.float64),
        rows(),
        rows(ent_coef is not None),
        rows(full and kl_coef is not None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, mask, ref_logits, ctx.temperature = inputs[:5]
    ctx.backend, ctx.inputs = inputs[-1], len(inputs)
    _, _, _, entropy, kl, lse, ref_lse, d_logprobs, d_entropy, d_kl = output
    full_kl = kl if ref_logits is not None else ref_lse
    ctx.save_for_backward(
        logits, targets, ref_logits, mask, lse, ref_lse, entropy, full_kl, d_logprobs, d_entropy, d_kl
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _upstream(
    grad_loss: Tensor, d_logprobs: Tensor, d_entropy: Tensor, d_kl: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Upstream gradients of logprob, entropy and KL; None where the loss does not use one."""
    return (
        d_logprobs * grad_loss,
        d_entropy * grad_loss if d_entropy.numel() else None,
        d_kl * grad_loss if d_kl.numel() else None,
    )


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    if grad_loss is None:
        return (None,) * ctx.inputs
    upstream = _upstream(grad_loss, *ctx.saved_tensors[-3:])
    dlogits = token_stats_backward(*upstream, *ctx.saved_tensors[:-3], ctx.temperature, ctx.backend)
    return dlogits, *((None,) * (ctx.inputs - 1))


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


class _Fused(torch.autograd.Function):
    """The same loss where the backend writes its gradient in the forward pass; eager only.

    The gradient is kept until the backward pass and handed out once. For a loss that arrives there scaled, or a second
    time, the registered backward computes it from the logits: it is rounded once, and nobody else holds its storage.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        logits = inputs[0].detach()
        ctx.dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        output = _launch(logits, *inputs[1:], out=ctx.dlogits)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        checks.first_derivative(_OP)
        if grad_loss is None:
            return (None,) * ctx.inputs
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is None or grad_loss != 1:
            del dlogits
            return _backward(ctx, grad_loss)
        return dlogits, *((None,) * (ctx.inputs - 1))


class _InPlace(torch.autograd.Function):
    """The same loss, with the gradient written over the logits; eager only.

    A backend that writes the gradient in the forward pass does it there. Its logits are then gone, so that a gradient
    of the loss other than 1 is multiplied in afterwards: a second rounding in bfloat16.

    The version counter is bumped in the forward pass and at the write, so that autograd refuses every later use of the
    old contents.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        logits = inputs[0].detach()
        ctx.written = registry.fuses_backward(_OP, inputs[-1])
        output = _launch(logits, *inputs[1:], **({"out": logits} if ctx.written else {}))
        torch.autograd.graph.increment_version(logits)
        # Saved without its history: autograd refuses to rebuild that of a view whose base was written.
        _setup_context(ctx, (logits, *inputs[1:]), output)
        ctx.spent = False
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        checks.first_derivative(_OP)
        if grad_loss is None:
            return (None,) * ctx.inputs
        if ctx.spent:
            raise RuntimeError(f"{_OP}: expected one backward with inplace=True, got a second one")
        ctx.spent = True
        saved = ctx.saved_tensors
        logits = saved[0].detach()
        if not ctx.written:
            run = registry.implementation("token_stats_backward", ctx.backend)
            run(*_upstream(grad_loss, *saved[-3:]), logits, *saved[1:-3], ctx.temperature, out=logits)
        elif grad_loss != 1:
            logits.mul_(grad_loss)
        torch.autograd.graph.increment_version(logits)
        return logits, *((None,) * (ctx.inputs - 1))


def _entry(logits: Tensor, inplace: bool, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """The registered op, or an eager form of it. Tensor subclasses, such as those that trace, take the op."""
    if inplace:
        return _InPlace.apply
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if wants_gradient and registry.fuses_backward(_OP, backend) and registry.runs_directly(logits):
        return _Fused.apply
    return _policy_loss


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
) -> LossOutput:
    """The PPO policy loss straight from logits: clipped ratio, entropy bonus, PPO-penalty and KL to the reference.

    With r = exp(clamp(logprob - old_logprob, -20, 20)) and A the advantage::

        objective = min(r*A, clip(r, 1 - clip_low, 1 + clip_high)*A)       (A < 0: at least dual_clip*A)
        loss = aggregate(-weight*objective + penalty_coef*(r - 1 - log r) + kl_coef*kl - ent_coef*H)

    Args:
        logits: [..., T, V] or packed [N, V]; float32, bfloat16, float16 or float64. The only input with a gradient.
        targets: [..., T], int32 or int64: the tokens that were sampled.
        old_logprobs: [..., T] under the policy that sampled them; None means ``logprobs.detach()`` (r = 1).
        advantages: [..., T] or [..., 1].
        mask: [..., T], bool, True = counts; None counts every position. Other rows are not read.
        config: clip, coefficients, ratio, KL estimator, temperature, aggregation.
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

    Returns:
        LossOutput. ``metrics``: policy_loss, entropy, kl, approx_kl, clipfrac, dual_clipfrac, ratio_mean, ratio_max,
        tokens; all but policy_loss and ratio_max are plain means over this call's counted tokens.
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
    KL estimators: Schulman 2020, "Approximating KL Divergence"; sequence ratio: Zheng et al. 2025 (GSPO), eq. 7.
    """
    per_token = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    check_config(_OP, config)
    _check(logits, targets, mask, ref_logits)
    check_terms(_OP, config, targets, per_token, ref_logits, "ref_logits", cu_seqlens, denominator)
    backend = registry.resolve(_OP, backend, logits.device, logits.dtype)
    inplace = inplace and torch.is_grad_enabled() and logits.requires_grad
    if inplace:
        _check_inplace(logits)
    inplace = inplace and type(logits) is Tensor  # a tensor without data has no place
    shape = targets.shape
    flat_logits = as_logits(logits)
    if inplace and flat_logits.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"{_OP}: expected logits that need no copy (unit stride over V) with inplace=True, "
            f"got shape {list(logits.shape)} with strides {list(logits.stride())}"
        )
    run = _entry(flat_logits, inplace, backend)
    results = run(
        flat_logits,
        as_rows(targets, shape),
        as_bools(mask, shape),
        None if ref_logits is None else as_logits(ref_logits.detach()),
        float(config.temperature),
        *flat_terms(config, logits, shape, per_token, cu_seqlens, denominator),
        backend,
    )
    return named_output(results, shape)
