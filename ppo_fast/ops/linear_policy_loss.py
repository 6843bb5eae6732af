"""The policy loss from hidden states and the head's weight. At most one chunk of logits exists at any time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppo_fast.ops._backends import reference
from ppo_fast.ops._core import checks, linear_inputs, registry
from ppo_fast.ops._core.chunked_head import ChunkedHead, zero_stats
from ppo_fast.ops._core.config import PolicyInputs, PolicyLossConfig
from ppo_fast.ops._core.head_buffers import NeedsGrad, Tile
from ppo_fast.ops._core.head_gradients import Gradients, unit_scale
from ppo_fast.ops._core.inputs import RowGrads
from ppo_fast.ops._core.linear_inputs import LinearCall, is_eager
from ppo_fast.ops._core.policy_inputs import (
    PER_TOKEN,
    PerToken,
    check_config,
    check_policy_inputs,
    check_values,
    named_output,
    policy_inputs,
    with_tensors,
)
from ppo_fast.ops._core.results import METRICS, LossOutput, PolicyLossResult, RowStats
from ppo_fast.ops._core.schema import grouped, schema
from ppo_fast.ops._core.vocab_shard import VocabShard

_OP = "linear_policy_loss"
_DEFAULT = PolicyLossConfig()

registry.register_public(_OP, kernels="token_stats")


class _Result(NamedTuple):
    """Results of the registered op. The gradients are those of loss / scale: the backward multiplies them by scale."""

    loss: Tensor  # []
    metrics: Tensor  # [len(METRICS)]
    logprobs: Tensor  # [B, T]
    entropy: Tensor
    kl: Tensor
    grad_hidden: Tensor  # [N, D]
    grad_weight: Tensor  # [V, D]
    grad_bias: Tensor  # [V]
    scale: Tensor  # []


_Outcome = tuple[PolicyLossResult, RowStats, Gradients, Tensor]


def _from_stats(backend: str, stats: RowStats, mask: Tensor | None, policy: PolicyInputs) -> PolicyLossResult:
    return registry.implementation("policy_loss_from_stats", backend)(stats, mask, policy)


def _counted(head: ChunkedHead, policy: PolicyInputs) -> PolicyInputs:
    """The inputs of the rows that count, [1, n]."""
    chosen: dict[str, Any] = {name: head.rows.of(x) for name in PER_TOKEN if (x := getattr(policy, name)) is not None}
    return policy._replace(cu_seqlens=None, **chosen)


def _some(policy: PolicyInputs, first: int, last: int) -> PolicyInputs:
    """The inputs of some rows, [1, n]."""
    chosen: dict[str, Any] = {name: x[:, first:last] for name in PER_TOKEN if (x := getattr(policy, name)) is not None}
    return policy._replace(**chosen)


def _one_pass(head: ChunkedHead, policy: PolicyInputs) -> _Outcome:
    """Each tile once: a token's share of the loss depends on its own row only, and its weight on the mask."""
    call, found = head.call, []
    counted, weights, scale = _weighted(head, policy)
    total = head.unset_gradients()
    for start, stop in head.chunks():
        for tile in head.tiles(start, stop):
            first, last = tile.first, tile.last
            some = None if weights is None else weights[:, first:last]
            stats, grads = _tile_gradients(head, tile, _some(counted, first, last), some)
            head.write_gradient(tile, grads, stats)
            found.append((tile, stats))
        head.add_chunk(total, start, stop)
    stats = head.joined(found)
    return _from_stats(call.backend, stats, call.mask, policy), stats, total, scale


def _tile_gradients(
    head: ChunkedHead, tile: Tile, policy: PolicyInputs, weights: Tensor | None
) -> tuple[RowStats, RowGrads]:
    """The statistics of a tile, and the gradients of its loss in these."""
    if head.shard is None:
        return registry.implementation("policy_gradients", head.call.backend)(head.inputs(tile), policy, weights)
    stats = head.tile_stats(tile)
    run = registry.implementation("policy_loss_from_stats", head.call.backend)
    return stats, run(stats, None, policy, weights).grads


def _weighted(head: ChunkedHead, policy: PolicyInputs) -> tuple[PolicyInputs, Tensor | None, Tensor]:
    """The inputs of the rows that count, the weight of each around 1 (None: 1), and the factor left out of the weights.

    Kept out of a half-precision gradient of the logits, 1 / denominator cannot make it underflow.
    """
    call, counted = head.call, _counted(head, policy)
    dtype = checks.accumulation_dtype(call.hidden.dtype)
    if policy.aggregation == "token-mean":
        number = head.count if policy.denominator is None else policy.denominator
        counted = counted._replace(denominator=1.0)
        if head.count == 0:
            return counted, None, call.hidden.new_ones((), dtype=dtype)
        if isinstance(number, Tensor):
            return counted, None, number.reciprocal()
        return counted, None, call.hidden.new_full((), 1.0 / number, dtype=dtype)
    mask = call.mask
    if mask is None:
        mask = torch.ones(call.targets.shape, dtype=torch.bool, device=call.hidden.device)
    weights = reference.token_weights(mask, policy.cu_seqlens, policy.denominator, policy.aggregation, dtype)
    scale = unit_scale(call.hidden, weights)
    return counted, head.rows.of(weights / scale), scale


def _two_pass(head: ChunkedHead, policy: PolicyInputs) -> _Outcome:
    """A sequence's ratio needs all its tokens: every tile is computed twice, a single one once."""
    call, stats = head.call, head.stats()
    result = _from_stats(call.backend, stats, call.mask, policy)
    grads = result.grads
    scale = unit_scale(call.hidden, *grads)
    return result, stats, head.gradients(grads.divided(scale), stats), scale


def _fused_one_tile(head: ChunkedHead, policy: PolicyInputs) -> _Outcome:
    """All rows fit one tile: a row kernel makes statistics, loss and gradient in one go."""
    call, total = head.call, head.unset_gradients()
    run = registry.implementation("policy_loss", call.backend)
    (tile,) = head.tiles(0, head.count)
    inputs = head.inputs(tile)
    result = run(inputs, _counted(head, policy), out=inputs.logits if any(head.needs) else None).as_tensors()
    stats = head.joined([(tile, result.stats)])
    if policy.ref_logprobs is not None:
        result = result._replace(kl=head.rows.spread(result.kl, stats.logprobs.shape))
    head.add_chunk(total, 0, head.count)
    return result, stats, total, torch.ones_like(result.loss)


def _forward_only(head: ChunkedHead, policy: PolicyInputs) -> _Outcome:
    """No gradient is asked for."""
    call, stats = head.call, head.stats()
    result = _from_stats(call.backend, stats, call.mask, policy)
    return result, stats, Gradients.zeros(call, head.needs), torch.ones_like(result.loss)


def _choose(head: ChunkedHead, policy: PolicyInputs) -> Callable[[ChunkedHead, PolicyInputs], _Outcome]:
    """The strategy of least work: the logits are computed once, unless a sequence's ratio needs several tiles."""
    call, one_tile = head.call, head.one_tile
    by_row = policy.ratio == "token" and policy.aggregation == "token-mean" and call.softcap is None
    if head.shard is None and one_tile and by_row and registry.entry("policy_loss", call.backend).fuses_backward:
        return _fused_one_tile
    if not any(head.needs):
        return _forward_only
    return _two_pass if one_tile or policy.ratio == "sequence" else _one_pass


def _launch(*arguments: Any, shard: VocabShard | None = None) -> _Result:
    """Checks what depends on values; then the loss, the statistics of every row and the gradients that are needed."""
    call, needs, policy = grouped(arguments, LinearCall, NeedsGrad, PolicyInputs)
    if shard is None:
        checks.target_values(_OP, call.targets, call.mask, call.weight.shape[0])
    check_values(_OP, policy, call.mask)
    with torch.autocast(call.hidden.device.type, enabled=False):
        head = ChunkedHead(call, needs, shard)
        result, stats, gradients, scale = _choose(head, policy)(head, policy)
        if shard is not None and needs.need_hidden:
            shard.sum_(gradients.hidden)
    kl = stats.kl if policy.ref_logprobs is None or result.kl is None else result.kl
    return _Result(result.loss, result.metrics, stats.logprobs, stats.entropy, kl, *gradients, scale)


POLICY_SCHEMA = schema(LinearCall, NeedsGrad, PolicyInputs, results=_Result)
_linear_policy_loss = torch.library.custom_op("ppo_fast::linear_policy_loss", mutates_args=(), schema=POLICY_SCHEMA)(
    _launch
)


@_linear_policy_loss.register_fake
def _(*arguments: Any) -> _Result:
    call, needs, policy = grouped(arguments, LinearCall, NeedsGrad, PolicyInputs)
    stats = zero_stats(call, call.ref_hidden is not None or policy.ref_logprobs is not None)
    new, gradients = policy.advantages.new_empty, Gradients.zeros(call, needs)
    return _Result(new(()), new(len(METRICS)), stats.logprobs, stats.entropy, stats.kl, *gradients, new(()))


def _scaled(gradient: Tensor, scale: Tensor, grad_loss: Tensor, like: Tensor, backend: str) -> Tensor:
    """``gradient * scale * grad_loss`` in the dtype of ``like``."""
    return registry.implementation("scaled", backend)(gradient, scale * grad_loss, like.dtype)


_scaled_gradient = torch.library.custom_op("ppo_fast::linear_policy_loss_backward", mutates_args=())(_scaled)


@_scaled_gradient.register_fake
def _(gradient: Tensor, scale: Tensor, grad_loss: Tensor, like: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient, dtype=like.dtype)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    call, ctx.needs, _ = grouped(inputs, LinearCall, NeedsGrad, PolicyInputs)
    result, (_, *others) = _Result(*output), output
    ctx.like, ctx.backend = call.hidden.new_empty(0), call.backend
    ctx.save_for_backward(result.grad_hidden, result.grad_weight, result.grad_bias, result.scale)
    ctx.mark_non_differentiable(*others)
    # Else the backward pass would be given zeros in the shape of every output, the weight's gradient included.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_loss: Tensor | None, *_: Any, run: Callable[..., Tensor] = _scaled_gradient
) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    *gradients, scale = ctx.saved_tensors
    found: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        pairs = zip(gradients, ctx.needs, strict=True)
        found = [run(x, scale, grad_loss, ctx.like, ctx.backend) if need else None for x, need in pairs]
    return *found, *((None,) * (len(ctx.needs_input_grad) - len(found)))


_linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """Run the registered op without the dispatcher, which takes longer than the work of a small batch.

    The last input is the slice of the vocabulary that the weight is, or None.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> _Result:
        *inputs, shard = arguments
        output = _launch(*inputs, shard=shard)
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
    half_logits: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
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
        config: objective, clip, coefficients, ratio, KL estimator, temperature, aggregation.
        bias: [V], or None.
        softcap: in [1e-9, 1e9], the final-logit softcapping of Gemma 2; None: none.
        ref_logprobs: [..., T] under the reference, for kl_estimator "k1", "k2", "k3".
        ref_hidden: [..., T, D of the reference], for kl_estimator "full"; softcap and temperature apply to it too.
        ref_weight: [V, D of the reference]; None: ``weight`` and ``bias`` serve the reference too.
        ref_bias: [V], or None.
        importance_weights: [..., T] or [..., 1]; multiply each token's objective after clip and dual clip.
        cu_seqlens: int32 or int64 [S + 1], the sequence offsets of packed [N] inputs.
        denominator: replaces the outer count of the aggregation, as in :func:`ppo_fast.policy_loss`.
        chunk_size: rows per chunk; None chooses by shape and device. Memory in addition to inputs and gradients:
            chunk_size*V elements, as many again for ``ref_hidden`` and for softcap, and weight's gradient in float32.
        half_logits: on a GPU, round half-precision logits to the dtype of ``hidden``, as a head that returns them does;
            False keeps them in float32. At V = 128,256 and logits of standard deviation 3, rounding to bfloat16 changes
            a log-probability by up to 0.03 (0.01 on average) and the gradient of ``hidden`` by 0.2 %. A CPU always
            rounds them, softcap never does.
        backend: "auto" | "torch" | "triton" | "native": the row kernels; the products are torch's.
        group: the process group over whose ranks the vocabulary is split, as in :func:`ppo_fast.linear_token_stats`.
            The backward pass communicates nothing: the gradient of ``hidden`` is summed in the forward pass.

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
        half_logits=half_logits,
        backend=backend,
    )
    per_token = PerToken(old_logprobs, advantages, ref_logprobs, importance_weights)
    check_policy_inputs(_OP, config, targets, per_token, ref_hidden, "ref_hidden", cu_seqlens, denominator)
    head = (call.hidden, call.weight, call.bias)
    needs = NeedsGrad(*[torch.is_grad_enabled() and x is not None and x.requires_grad for x in head])
    policy = policy_inputs(config, call.hidden, targets.shape, per_token, cu_seqlens, denominator)
    shard = None if group is None else VocabShard(_OP, group, call.weight.shape[0], call.hidden)
    if shard is not None:
        call = call._replace(targets=shard.local(call.targets, call.mask))
    if is_eager(call):
        result = _Eager.apply(*call, *needs, *policy, shard)
    else:
        result = _linear_policy_loss(*call, *needs, *with_tensors(policy, call.hidden))
    loss, metrics, logprobs, entropy, kl, *_ = result
    return named_output(loss, metrics, logprobs, entropy, kl, targets.shape)
