"""The (clipped) squared error of the value function."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._backends.native import value_loss as native_value_loss
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.config import AGGREGATIONS
from ppo_fast.ops._core.inputs import ValueInputs
from ppo_fast.ops._core.layout import as_bools, as_floats, as_grid, as_scalar, as_tensor
from ppo_fast.ops._core.results import VALUE_METRICS, LossOutput, ValueLossResult
from ppo_fast.ops._core.schema import schema, to_first

_OP = "value_loss"

registry.register_public(_OP)
registry.register(_OP, "torch", registry.Implementation(reference.value_loss))
registry.register(_OP, "triton", triton.implementation(_OP, "value_loss"))
registry.register(_OP, "native", native_rows.implementation(native_value_loss.value_loss))
_BACKWARD = "value_loss_backward"
registry.register(_BACKWARD, "torch", registry.Implementation(reference.value_loss_backward))
registry.register(_BACKWARD, "native", registry.Implementation(reference.value_loss_backward))
registry.register(_BACKWARD, "triton", triton.implementation(_BACKWARD, "value_loss"))


def _launch(inputs: ValueInputs, backend: str) -> ValueLossResult:
    """Checks what depends on values, then runs the backend."""
    checks.cu_seqlens_values(_OP, inputs.cu_seqlens, inputs.values.numel())
    checks.denominator_value(_OP, inputs.denominator, inputs.mask, inputs.values.numel())
    return registry.implementation(_OP, backend)(inputs)


@torch.library.custom_op(
    "ppo_fast::value_loss", mutates_args=(), schema=schema(ValueInputs, "str backend", results=ValueLossResult)
)
def _value_loss(*arguments: Any) -> ValueLossResult:
    *given, backend = arguments
    return _launch(ValueInputs(*given), backend)


@_value_loss.register_fake
def _(*arguments: Any) -> ValueLossResult:
    *given, _ = arguments
    returns = ValueInputs(*given).returns
    return ValueLossResult(
        returns.new_empty(()), returns.new_empty(len(VALUE_METRICS)), returns.new_empty(returns.shape)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, *_ = inputs
    _, metrics, d_values = output
    ctx.dtype = values.dtype
    ctx.save_for_backward(d_values)
    ctx.mark_non_differentiable(metrics, d_values)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    (d_values,) = ctx.saved_tensors
    return to_first(ctx, reference.value_loss_backward(d_values, grad_loss, ctx.dtype))


_value_loss.register_autograd(_backward, setup_context=_setup_context)


class _EagerValueLoss(torch.autograd.Function):
    """The registered op past the dispatcher; ``found`` takes the whole result."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, inputs: ValueInputs, backend: str, found: list[ValueLossResult]) -> Tensor:
        result = _launch(inputs, backend)
        ctx.shape, ctx.dtype, ctx.backend = values.shape, values.dtype, backend
        ctx.save_for_backward(result.grad_values)
        found.append(result)
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative(_OP)
        (d_values,) = ctx.saved_tensors
        run = registry.implementation(_BACKWARD, ctx.backend)
        return to_first(ctx, run(d_values, grad_loss, ctx.dtype).view(ctx.shape))


def _run(values: Tensor, inputs: ValueInputs, backend: str) -> ValueLossResult:
    """The op past the dispatcher, of ``values`` that are in ``inputs`` without their history."""
    if not torch.is_grad_enabled() or not values.requires_grad:
        return _launch(inputs, backend)
    found: list[ValueLossResult] = []
    loss = _EagerValueLoss.apply(values, inputs, backend, found)
    return found[0]._replace(loss=loss)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Squared error of the values, clipped around the old ones as PPO implementations do.

    ``aggregate(0.5 * max((v - R)^2, (old_v + clip(v - old_v, -c, c) - R)^2))``; with ``clip=None``
    ``aggregate(0.5 * (v - R)^2)`` and ``old_values`` is ignored.

    Args:
        values: [..., T] or packed [N]; float32, bfloat16, float16 or float64. The only input with a gradient.
        returns: the shape of ``values``.
        mask: bool, True = counts; None counts every position.
        old_values: the shape of ``values``; the values at rollout time.
        clip: c > 0, or None.
        aggregation: "token-mean" | "seq-mean-token-mean" | "seq-mean-token-sum".
        cu_seqlens: int32 or int64 [S + 1], for packed [N] values with a sequence aggregation.
        denominator: replaces the outer count of the aggregation, as in :func:`ppo_fast.policy_loss`.
        backend: "auto" | "torch" | "triton" | "native".

    Returns:
        LossOutput with metrics value_loss, clipfrac (share where the clipped square is the larger), tokens;
        ``per_token`` is None. float32 (float64 for float64 values).

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; forward-mode differentiation.
        RuntimeError: a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> value_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[True, False]])).loss.item()
        0.5

    Source: Engstrom et al. 2020, "Implementation Matters in Deep RL", section 3 (value clipping).
    """
    checks.floating(_OP, "values", values)
    checks.reverse_mode(_OP, "values", values)
    shape = values.shape
    checks.tensor(_OP, "returns", returns)
    for name, value in (("returns", returns), ("old_values", old_values)):
        checks.per_token(_OP, name, value, "values", values, shape)
    checks.boolean(_OP, "mask", mask, "values", values, shape)
    checks.one_of(_OP, "aggregation", aggregation, AGGREGATIONS)
    checks.cu_seqlens(_OP, cu_seqlens, "values", values, shape)
    checks.denominator(_OP, denominator)
    if clip is not None:
        checks.positive(_OP, "clip", clip)
        if old_values is None:
            raise ValueError(f"{_OP}: expected old_values with clip={clip}, got None")
    if aggregation != "token-mean" and cu_seqlens is None and values.dim() < 2:
        raise ValueError(f"{_OP}: expected cu_seqlens for packed [N] values with aggregation={aggregation!r}, got None")
    backend = registry.resolve(_OP, backend, values.device, values.dtype)
    dtype, direct = checks.accumulation_dtype(values.dtype), registry.runs_directly(values)
    by_address = direct and backend != "torch"
    inputs = ValueInputs(
        as_grid(values.detach() if direct else values, by_address),
        as_floats(returns, shape, dtype, by_address),  # type: ignore[arg-type]  # returns is not None
        as_bools(mask, shape, by_address),
        None if clip is None else as_floats(old_values, shape, dtype, by_address),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        as_scalar(denominator, values),
        None if clip is None else float(clip),
        aggregation,
    )
    if direct:
        result = _run(values, inputs, backend)
    else:
        numbers = inputs._replace(denominator=as_tensor(inputs.denominator, values))
        result = ValueLossResult(*_value_loss(*numbers, backend))
    loss, metrics, _ = result
    return LossOutput(loss, dict(zip(VALUE_METRICS, metrics.unbind(), strict=True)))
