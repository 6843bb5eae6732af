"""The policy loss from hidden states and the head's weight: no more than a chunk of logits exists at any time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._core import checks, linear_inputs, registry
from ppo_fast.ops._core.chunked_head import (
    Gradients,
    RowStats,
    Sweep,
    Upstream,
    Wanted,
    gather_rows,
    saved_rows,
    scaled,
    unit_scale,
)
from ppo_fast.ops._core.config import PolicyLossConfig
from ppo_fast.ops._core.linear_inputs import LinearCall, is_eager
from ppo_fast.ops._core.policy_inputs import COEFFICIENTS, Terms, check_config, check_terms, flat_terms, named_output
from ppo_fast.ops._core.results import METRICS, LossOutput

_OP = "linear_policy_loss"
_DEFAULT = PolicyLossConfig()
_TERMS = (
    "Tensor? old_logprobs, Tensor advantages, Tensor? ref_logprobs, Tensor? importance_weights, Tensor? cu_seqlens, "
    "Tensor? denominator, Tensor? penalty_coef, Tensor? ent_coef, Tensor? kl_coef, float clip_low, float clip_high, "
    "float dual_clip, str ratio, str kl_estimator, str aggregation"
)


class _Results(NamedTuple):
    """What the registered op returns; the gradients are those of loss / scale, still to be multiplied by scale."""

    loss: Tensor
    metrics: Tensor
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor
    scale: Tensor


def _terms(
    backend: str, stats: RowStats, mask: Tensor | None, terms: Terms, **weights: Tensor
) -> reference.PolicyTerms:
    run = registry.implementation("policy_terms", backend)
    return run(stats.logprobs, stats.entropy, stats.kl, mask, *terms, **weights)


def _by_tile(sweep: Sweep, terms: Terms, stats: RowStats) -> tuple[reference.PolicyTerms, Gradients, Tensor]:
    """One pass: a token's share of the loss depends on its own row alone, and its weight on the mask."""
    call = sweep.call
    counted = torch.ones_like(stats.logprobs, dtype=torch.bool) if call.mask is None else call.mask
    weights = reference.token_weights(
        counted, terms.cu_seqlens, terms.denominator, terms.aggregation, stats.logprobs.dtype
    )
    scale = unit_scale(call.hidden, weights)
    weights = weights / scale

    def upstream(rows: Tensor) -> tuple[Upstream, RowStats]:
        values = sweep.row_stats(rows)
        stats.put(rows, values)
        chosen = terms._replace(cu_seqlens=None, **_at(terms, rows))
        return _upstream(_terms(call.backend, values, None, chosen, weights=gather_rows(weights, rows))), values

    gradients = sweep.gradients(upstream)
    return _terms(call.backend, stats, call.mask, terms), gradients, scale


def _whole(sweep: Sweep, terms: Terms, stats: RowStats) -> tuple[reference.PolicyTerms, Gradients, Tensor]:
    """Two passes, as a sequence's ratio needs all its tokens; of a single tile the logits are still there."""
    call = sweep.call
    sweep.stats(stats)
    out = _terms(call.backend, stats, call.mask, terms)
    upstream = _upstream(out)
    scale = unit_scale(call.hidden, *upstream)
    unit = Upstream(*(None if x is None else x / scale for x in upstream))
    return out, sweep.gradients(saved_rows(stats, unit)), scale


def _fused(sweep: Sweep, terms: Terms, stats: RowStats) -> tuple[reference.PolicyTerms, Gradients, Tensor]:
    """Of a single tile: a row kernel makes statistics, loss and gradient in one go."""
    call, rows = sweep.call, sweep.rows
    logits, ref_logits = sweep.load(0, len(rows))
    run = registry.implementation("policy_loss", call.backend)
    given = logits, gather_rows(call.targets, rows), None, ref_logits, call.temperature
    chosen = terms._replace(cu_seqlens=None, **_at(terms, rows))
    out = run(*given, *chosen, out=logits if any(sweep.wanted) else None)
    loss, metrics, *of_rows = out[:7]
    stats.put(rows, RowStats(*of_rows))
    kl = stats.kl
    if terms.ref_logprobs is not None:
        kl = torch.zeros_like(stats.logprobs)
        kl.view(-1).index_copy_(0, rows, of_rows[2].view(-1))
    gradients = Gradients.zeros(call, sweep.wanted)
    gradients.add(call, rows, logits[0])
    return reference.PolicyTerms(loss, metrics, kl, *out[7:]), gradients, torch.ones_like(loss)


def _values(sweep: Sweep, terms: Terms, stats: RowStats) -> tuple[reference.PolicyTerms, Gradients, Tensor]:
    """Without gradients."""
    sweep.stats(stats)
    out = _terms(sweep.call.backend, stats, sweep.call.mask, terms)
    return out, Gradients.zeros(sweep.call, sweep.wanted), torch.ones_like(out.loss)


def _method(sweep: Sweep, terms: Terms) -> Callable[..., tuple[reference.PolicyTerms, Gradients, Tensor]]:
    """The one of least work: the logits are computed once, unless a sequence's ratio needs several tiles."""
    call, one_tile = sweep.call, len(sweep.rows) <= sweep.tile
    by_row = terms.ratio == "token" and terms.aggregation == "token-mean" and call.softcap is None
    if one_tile and by_row and registry.fuses_backward("policy_loss", call.backend):
        return _fused
    if not any(sweep.wanted):
        return _values
    return _whole if one_tile or terms.ratio == "sequence" else _by_tile


def _at(terms: Terms, rows: Tensor) -> dict[str, Any]:
    """The per-token terms of some rows, by name."""
    per_token = zip(Terms._fields[:4], terms[:4], strict=True)
    return {name: gather_rows(x, rows) for name, x in per_token if x is not None}


def _upstream(terms: reference.PolicyTerms) -> Upstream:
    return Upstream(*(x.contiguous() if x.numel() else None for x in (terms.d_logprobs, terms.d_entropy, terms.d_kl)))


def _launch(call: LinearCall, wanted: Wanted, terms: Terms) -> _Results:
    """Statistics of every row, the loss of them, and the gradients that are wanted."""
    stats, sweep = RowStats.zeros(call, call.ref_hidden is not None), Sweep(call, wanted)
    out, gradients, scale = _method(sweep, terms)(sweep, terms, stats)
    kl = out.kl if terms.ref_logprobs is not None else stats.kl
    return _Results(out.loss, out.metrics, stats.logprobs, stats.entropy, kl, *gradients, scale)


registry.register_public(_OP, kernels="token_stats")
registry.register("policy_terms", "torch", registry.Implementation(reference.policy_terms))
registry.register("policy_terms", "native", registry.Implementation(reference.policy_terms))
registry.register("policy_terms", "triton", triton.implementation("policy_terms", "policy_loss"))


def _checked_launch(*inputs: Any) -> tuple[Tensor, ...]:
    call, wanted, terms = _unpacked(inputs)
    checks.target_values(_OP, call.targets, call.mask, call.weight.shape[0])
    checks.cu_seqlens_values(_OP, terms.cu_seqlens, call.targets.numel())
    checks.denominator_value(_OP, terms.denominator, call.mask, call.targets.numel())
    checks.coefficient_values(_OP, **{name: getattr(terms, name) for name in COEFFICIENTS})
    with torch.autocast(call.hidden.device.type, enabled=False):
        return _launch(call, wanted, terms)


_linear_policy_loss = torch.library.custom_op(
    "ppo_fast::linear_policy_loss",
    mutates_args=(),
    schema=f"({linear_inputs.SCHEMA}, bool want_hidden, bool want_weight, bool want_bias, {_TERMS}) -> "
    f"({', '.join(['Tensor'] * len(_Results._fields))})",
)(_checked_launch)


@_linear_policy_loss.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    call, wanted, terms = _unpacked(inputs)
    stats = RowStats.zeros(call, call.ref_hidden is not None or terms.ref_logprobs is not None)
    scalar = terms.advantages.new_empty
    gradients = Gradients.zeros(call, wanted)
    return scalar(()), scalar(len(METRICS)), stats.logprobs, stats.entropy, stats.kl, *gradients, scalar(())


def _unpacked(inputs: tuple[Any, ...]) -> tuple[LinearCall, Wanted, Terms]:
    """The groups of arguments of the registered op."""
    n = len(LinearCall._fields)
    return LinearCall(*inputs[:n]), Wanted(*inputs[n : n + 3]), Terms(*inputs[n + 3 :])


def _scaled(gradient: Tensor, scale: Tensor, grad_loss: Tensor, like: Tensor) -> Tensor:
    """``gradient * scale * grad_loss`` in the dtype of ``like``."""
    return scaled(gradient, scale * grad_loss, like.dtype)


_scaled_gradient = torch.library.custom_op("ppo_fast::linear_policy_loss_backward", mutates_args=())(_scaled)


@_scaled_gradient.register_fake
def _(gradient: Tensor, scale: Tensor, grad_loss: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=like.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    results = _Results(*output)
    ctx.inputs, ctx.like = len(inputs), inputs[0].new_empty(0)
    ctx.wanted = _unpacked(inputs)[1]
    ctx.save_for_backward(results.d_hidden, results.d_weight, results.d_bias, results.scale)
    ctx.mark_non_differentiable(*output[1:])
    # Else the backward pass would be given zeros in the shape of every output, the weight's gradient included.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_loss: Tensor | None, *_: Any, run: Callable[..., Tensor] = _scaled_gradient
) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    if grad_loss is None:
        return (None,) * ctx.inputs
    *gradients, scale = ctx.saved_tensors
    found = (
        run(x, scale, grad_loss, ctx.like) if wanted else None for x, wanted in zip(gradients, ctx.wanted, strict=True)
    )
    return *found, *((None,) * (ctx.inputs - 3))


_linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The registered op without the dispatcher, which takes longer than a small batch's work."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _checked_launch(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_loss, run=_scaled)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    config: PolicyLossConfig = _DEFAULT,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """:func:`ppo_fast.policy_loss` of ``hidden @ weight.T + bias``, whose logits never exist all at once.

    With x = hidden @ weight.T + bias and logits = x, or softcap*tanh(x / softcap), it equals
    ``policy_loss(logits, targets, ...)``, for 6*N*D*V operations in forward and backward together: the gradients are
    made in the forward pass, while a chunk's logits are there, and multiplied by the loss's own gradient in backward.
    ``ratio="sequence"`` computes the logits twice, 8*N*D*V, unless one chunk holds all rows.

    Args:
        hidden: [..., T, D] or packed [N, D]; float32, bfloat16, float16 or float64: what the model's head takes.
        weight: [V, D], the head's weight, in the dtype of ``hidden``. Under autocast both are cast as
            ``torch.nn.functional.linear`` would. Not a DTensor, not quantized. A frozen weight costs no product.
        targets: [..., T], int32 or int64: the tokens that were sampled.
        old_logprobs: [..., T] under the policy that sampled them; None means ``logprobs.detach()`` (r = 1).
        advantages: [..., T] or [..., 1].
        mask: [..., T], bool, True = counts; None counts every position. Other rows are left out of every product.
            Their number is read from the GPU: the op's one host sync.
        config: clip, coefficients, ratio, KL estimator, temperature, aggregation.
        bias: [V], or None.
        softcap: in [1e-9, 1e9], the final-logit softcapping of Gemma 2; None: none.
        ref_logprobs: [..., T] under the reference, for kl_estimator "k1", "k2", "k3".
        ref_hidden: [..., T, D of the reference], for kl_estimator "full"; softcap and temperature apply to it too.
        ref_weight: [V, D of the reference]; None: ``weight`` and ``bias`` serve the reference too.
        ref_bias: [V], or None.
        importance_weights: [..., T] or [..., 1]; multiply each token's objective after clip and dual clip.
        cu_seqlens: int32 or int64 [S + 1], the sequence offsets of packed [N] inputs.
        denominator: replaces the outer count of the aggregation, as in :func:`ppo_fast.policy_loss`.
        chunk_size: rows per chunk; None chooses by shape and device. Memory beside inputs and gradients: chunk_size*V
            elements, as many again for ``ref_hidden`` and for softcap, and weight's gradient in float32.
        backend: "auto" | "torch" | "triton" | "native": the row kernels; the products are torch's.

    Returns:
        LossOutput, as :func:`ppo_fast.policy_loss` returns it. Gradients come back in the dtype of their inputs.

    Raises:
        ValueError: shapes, dtypes, devices, kinds of weight, references or values that do not fit; forward-mode
            differentiation.
        RuntimeError: a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
        >>> out = linear_policy_loss(hidden, weight, torch.tensor([[1, 2]]), None, torch.ones(1, 2), None)
        >>> out.loss.backward()
        >>> out.loss.item(), weight.grad.shape
        (-1.0, torch.Size([5, 8]))

    Source: the loss as in :func:`ppo_fast.policy_loss`; gradients by chunk in the forward pass: Hsu et al. 2024, "Liger
    Kernel: Efficient Triton Kernels for LLM Training", section 3.2.
    """
    check_config(_OP, config)
    call = linear_inputs.prepare(
        _OP,
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        mask=mask,
        temperature=config.temperature,
        chunk_size=chunk_size,
        backend=backend,
    )
    per_token = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    check_terms(_OP, config, targets, per_token, ref_hidden, "ref_hidden", cu_seqlens, denominator)
    heads = (call.hidden, call.weight, call.bias)
    wanted = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads)
    terms = flat_terms(config, call.hidden, targets.shape, per_token, cu_seqlens, denominator)
    run = _Eager.apply if is_eager(call) else _linear_policy_loss
    return named_output(run(*call, *wanted, *terms), targets.shape)
