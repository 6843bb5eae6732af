"""Per-token log-probability, entropy and exact KL from hidden states: the logits are made a chunk at a time."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._core import checks, linear_inputs, registry
from ppo_fast.ops._core.chunked_head import (
    Gradients,
    RowStats,
    Sweep,
    Upstream,
    Wanted,
    saved_rows,
    scaled,
    unit_scale,
)
from ppo_fast.ops._core.linear_inputs import LinearCall, is_eager
from ppo_fast.ops._core.results import TokenStats

_OP = "linear_token_stats"

registry.register_public(_OP, kernels="token_stats")


def _forward(call: LinearCall) -> RowStats:
    stats = RowStats.zeros(call, call.ref_hidden is not None)
    Sweep(call, Wanted(False, False, False)).stats(stats)
    return stats


def _gradients(call: LinearCall, wanted: Wanted, upstream: Upstream, stats: RowStats) -> tuple[Tensor, ...]:
    """The gradients in the dtypes of the inputs; the logits are computed anew."""
    scale = unit_scale(call.hidden, *upstream)
    rows = saved_rows(stats, Upstream(*(None if x is None else x / scale for x in upstream)))
    total: Gradients = Sweep(call, wanted).gradients(rows)
    return tuple(scaled(x, scale, call.hidden.dtype) for x in total)


def _checked_forward(*inputs: Any) -> tuple[Tensor, ...]:
    call = LinearCall(*inputs)
    checks.target_values(_OP, call.targets, call.mask, call.weight.shape[0])
    with torch.autocast(call.hidden.device.type, enabled=False):
        return tuple(_forward(call))


_linear_token_stats = torch.library.custom_op(
    "ppo_fast::linear_token_stats",
    mutates_args=(),
    schema=f"({linear_inputs.SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(_checked_forward)


@_linear_token_stats.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    call = LinearCall(*inputs)
    return tuple(RowStats.zeros(call, call.ref_hidden is not None))


@torch.library.custom_op(
    "ppo_fast::linear_token_stats_backward",
    mutates_args=(),
    schema=f"({linear_inputs.SCHEMA}, bool want_hidden, bool want_weight, bool want_bias, Tensor? g, "
    "Tensor? g_entropy, Tensor? g_kl, Tensor logprobs, Tensor entropy, Tensor kl, Tensor lse, Tensor ref_lse) -> "
    "(Tensor, Tensor, Tensor)",
)
def _linear_token_stats_backward(*inputs: Any) -> tuple[Tensor, ...]:
    call, wanted, upstream, stats = _unpacked(inputs)
    with torch.autocast(call.hidden.device.type, enabled=False):
        return _gradients(call, wanted, upstream, stats)


@_linear_token_stats_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    call, wanted, *_ = _unpacked(inputs)
    return tuple(x.to(call.hidden.dtype) for x in Gradients.zeros(call, wanted))


def _unpacked(inputs: tuple[Any, ...]) -> tuple[LinearCall, Wanted, Upstream, RowStats]:
    """The groups of arguments of the backward op."""
    n = len(LinearCall._fields)
    return LinearCall(*inputs[:n]), Wanted(*inputs[n:-8]), Upstream(*inputs[-8:-5]), RowStats(*inputs[-5:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stats = RowStats(*output)
    ctx.save_for_backward(*inputs[: linear_inputs.TENSORS], *stats)
    ctx.options = inputs[linear_inputs.TENSORS :]
    ctx.mark_non_differentiable(stats.lse, stats.ref_lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    tensors, stats = ctx.saved_tensors[: linear_inputs.TENSORS], ctx.saved_tensors[linear_inputs.TENSORS :]
    wanted = ctx.needs_input_grad[:3]
    upstream = [x.contiguous() if x is not None and x.numel() else None for x in grads[:3]]
    if all(x is None for x in upstream):
        found = [torch.zeros_like(x) if want else x for x, want in zip(tensors[:3], wanted, strict=True)]
    else:
        found = _linear_token_stats_backward(*tensors, *ctx.options, *wanted, *upstream, *stats)
    kept = (x if want else None for x, want in zip(found, wanted, strict=True))
    return *kept, *((None,) * (len(LinearCall._fields) - 3))


_linear_token_stats.register_autograd(_backward, setup_context=_setup_context)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """:func:`ppo_fast.token_stats` of ``hidden @ weight.T + bias``, whose logits never exist all at once.

    With x = hidden @ weight.T + bias and logits = x, or softcap*tanh(x / softcap), it equals
    ``token_stats(logits, targets, ...)``. The results carry gradients to hidden, weight and bias; the backward pass
    computes each chunk's logits again (8*N*D*V operations in all). Under ``torch.no_grad`` it costs 2*N*D*V and keeps
    nothing: the pass for old and reference log-probabilities.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64: what the model's head takes.
        weight: [V, D], the head's weight, in the dtype of ``hidden``. Under autocast both are cast as
            ``torch.nn.functional.linear`` would. Not a DTensor, not quantized.
        targets: [...], int32 or int64.
        bias: [V], or None.
        softcap: in [1e-9, 1e9], the final-logit softcapping of Gemma 2; None: none.
        ref_hidden: [..., D of the reference], without gradient; None: ``kl`` is None.
        ref_weight: [V, D of the reference]; None: ``weight`` and ``bias`` serve the reference too.
        ref_bias: [V], or None.
        mask: [...], bool, True = counts. Other rows are left out of every product, return 0 and get zero gradient.
            Their number is read from the GPU: the op's one host sync.
        temperature: in [1e-9, 1e9], divides both kinds of logits.
        chunk_size: rows per chunk; None chooses by shape and device. Memory beside inputs and gradients: chunk_size*V
            elements, as many again for a reference and (in backward) for softcap, and weight's gradient in float32.
        backend: "auto" | "torch" | "triton" | "native": the row kernels; the products are torch's.

    Returns:
        TokenStats(logprobs, entropy, kl), each [...], nats, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes, dtypes, devices, kinds of weight or values that do not fit; forward-mode differentiation.
        RuntimeError: a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> stats = linear_token_stats(torch.zeros(2, 3, 8), torch.randn(5, 8), torch.zeros(2, 3, dtype=torch.long))
        >>> stats.logprobs.shape, round(stats.logprobs[0, 0].exp().item(), 4)
        (torch.Size([2, 3]), 0.2)

    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"; softcap: Gemma Team 2024,
    "Gemma 2", section 2.
    """
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
        temperature=temperature,
        chunk_size=chunk_size,
        backend=backend,
    )
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call[:3])
    run = _checked_forward if is_eager(call) and not differentiable else _linear_token_stats
    logprobs, entropy, kl, _, _ = run(*call)
    shape = targets.shape
    return TokenStats(logprobs.view(shape), entropy.view(shape), None if ref_hidden is None else kl.view(shape))
