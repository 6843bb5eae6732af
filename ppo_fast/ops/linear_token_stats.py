"""Per-token log-probability, entropy and exact KL from hidden states, computing the logits a chunk at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppo_fast.ops._backends import triton
from ppo_fast.ops._core import checks, linear_inputs, registry
from ppo_fast.ops._core.chunked_head import ChunkedHead, zero_stats
from ppo_fast.ops._core.head_buffers import NeedsGrad
from ppo_fast.ops._core.head_gradients import Gradients, scaled, unit_scale
from ppo_fast.ops._core.inputs import RowGrads, given_grads
from ppo_fast.ops._core.linear_inputs import LinearCall, is_eager
from ppo_fast.ops._core.results import RowStats, TokenStats
from ppo_fast.ops._core.schema import grouped, schema, tensor_fields
from ppo_fast.ops._core.vocab_shard import VocabShard

_OP = "linear_token_stats"

registry.register_public(_OP, kernels="token_stats")
registry.register("scaled", "torch", registry.Implementation(scaled))
registry.register("scaled", "native", registry.Implementation(scaled))
registry.register("scaled", "triton", triton.implementation("scaled", "scaled"))


def _launch(*arguments: Any, shard: VocabShard | None = None) -> RowStats:
    call = LinearCall(*arguments)
    if shard is None:
        checks.target_values(_OP, call.targets, call.mask, call.weight.shape[0])
    with torch.autocast(call.hidden.device.type, enabled=False):
        return ChunkedHead(call, NeedsGrad(False, False, False), shard).stats()


_linear_token_stats = torch.library.custom_op(
    "ppo_fast::linear_token_stats", mutates_args=(), schema=schema(LinearCall, results=RowStats)
)(_launch)


@_linear_token_stats.register_fake
def _(*arguments: Any) -> RowStats:
    call = LinearCall(*arguments)
    return zero_stats(call, call.ref_hidden is not None)


@torch.library.custom_op(
    "ppo_fast::linear_token_stats_backward",
    mutates_args=(),
    schema=schema(LinearCall, NeedsGrad, RowGrads, RowStats, results=Gradients),
)
def _linear_token_stats_backward(*arguments: Any) -> Gradients:
    return _gradients(*grouped(arguments, LinearCall, NeedsGrad, RowGrads, RowStats))


def _gradients(
    call: LinearCall, needs: NeedsGrad, grads: RowGrads, stats: RowStats, shard: VocabShard | None = None
) -> Gradients:
    """The gradients in the dtypes of the inputs; the logits are computed again."""
    with torch.autocast(call.hidden.device.type, enabled=False):
        scale = unit_scale(call.hidden, *grads)
        total = ChunkedHead(call, needs, shard).gradients(grads.divided(scale), stats)
        if shard is not None and needs.need_hidden:
            shard.sum_(total.hidden)
        run = registry.implementation("scaled", call.backend)
        return Gradients(*[run(x, scale, call.hidden.dtype) for x in total])


@_linear_token_stats_backward.register_fake
def _(*arguments: Any) -> Gradients:
    call, needs, _, _ = grouped(arguments, LinearCall, NeedsGrad, RowGrads, RowStats)
    return Gradients(*[x.to(call.hidden.dtype) for x in Gradients.zeros(call, needs)])


_TENSORS = tensor_fields(LinearCall)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    call, stats = LinearCall(*inputs), RowStats(*output)
    ctx.save_for_backward(*[getattr(call, name) for name in _TENSORS], *stats)
    without: dict[str, Any] = dict.fromkeys(_TENSORS)
    ctx.call = call._replace(**without)
    ctx.mark_non_differentiable(stats.lse, stats.ref_lse)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, logprobs: Tensor, entropy: Tensor, kl: Tensor, *_: Any, shard: VocabShard | None = None
) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    saved = iter(ctx.saved_tensors)
    call, stats = ctx.call._replace(**dict(zip(_TENSORS, saved, strict=False))), RowStats(*saved)
    asked = LinearCall(*ctx.needs_input_grad[: len(call)])
    needs = NeedsGrad(asked.hidden, asked.weight, asked.bias)  # type: ignore[arg-type]
    grads = given_grads(logprobs, entropy, kl)
    if grads.nothing:
        found: Sequence[Tensor | None] = [
            x if x is None else torch.zeros_like(x) for x in (call.hidden, call.weight, call.bias)
        ]
    elif shard is not None:
        found = _gradients(call, needs, grads, stats, shard)
    else:
        found = _linear_token_stats_backward(*call, *needs, *grads, *stats)
    kept = [x if need else None for x, need in zip(found, needs, strict=True)]
    return *kept, *((None,) * (len(ctx.needs_input_grad) - len(kept)))


_linear_token_stats.register_autograd(_backward, setup_context=_setup_context)


class _Sharded(torch.autograd.Function):
    """The op on a slice of the vocabulary, the last input; eager only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> RowStats:
        *inputs, ctx.shard = arguments
        stats = _launch(*inputs, shard=ctx.shard)
        _setup_context(ctx, inputs, stats)
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads, shard=ctx.shard)


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
    half_logits: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
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
        chunk_size: rows per chunk; None chooses by shape and device. Memory in addition to inputs and gradients:
            chunk_size*V elements, as many again for a reference and (in backward) for softcap, and weight's gradient
            in float32.
        half_logits: on a GPU, round half-precision logits to the dtype of ``hidden``, as a head that returns them does;
            False keeps them in float32. At V = 128,256 and logits of standard deviation 3, rounding to bfloat16 changes
            a log-probability by up to 0.03 (0.01 on average) and the gradient of ``hidden`` by 0.2 %. A CPU always
            rounds them, softcap never does.
        backend: "auto" | "torch" | "triton" | "native": the row kernels; the products are torch's.
        group: the process group over whose ranks the vocabulary is split, each of which makes the call, and its
            backward pass. Rank r passes the r-th slice of weight, bias, ref_weight and ref_bias, of any size; hidden
            states, targets (ids of the whole vocabulary) and mask are the same on every rank. The results are those of
            the whole vocabulary on every rank. The op sums the gradient of ``hidden`` over the ranks, in its dtype; the
            gradients of weight and bias are those of the slice. The sizes of the slices are read from the GPU, a host
            sync. Not under ``torch.compile``. None: the head is whole.

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
        half_logits=half_logits,
        backend=backend,
    )
    head = (call.hidden, call.weight, call.bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    shard = None if group is None else VocabShard(_OP, group, call.weight.shape[0], call.hidden)
    if shard is not None:
        call = call._replace(targets=shard.local(call.targets, call.mask))
        logprobs, entropy, kl, _, _ = _Sharded.apply(*call, shard)
    else:
        run = _launch if is_eager(call) and not differentiable else _linear_token_stats
        logprobs, entropy, kl, _, _ = run(*call)
    shape = targets.shape
    return TokenStats(logprobs.view(shape), entropy.view(shape), None if ref_hidden is None else kl.view(shape))
