"""The (clipped) squared error of the value function."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._backends.native import value_loss as native_value_loss
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.config import AGGREGATIONS
from ppo_fast.ops._core.layout import as_bools, as_denominator, as_floats, grid
from ppo_fast.ops._core.results import VALUE_METRICS, LossOutput

_OP = "value_loss"

registry.register_public(_OP)
registry.register(_OP, "torch", registry.Implementation(reference.value_loss))
registry.register(_OP, "triton", triton.implementation(_OP, "value_loss"))
registry.register(_OP, "native", native_rows.implementation(native_value_loss.value_loss))


@torch.library.custom_op("ppo_fast::value_loss", mutates_args=())
def _value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    old_values: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    clip: float | None,
    aggregation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.cu_seqlens_values(_OP, cu_seqlens, values.numel())
    checks.denominator_value(_OP, denominator, mask, values.numel())
    run = registry.implementation(_OP, backend)
    return run(values, returns, mask, old_values, cu_seqlens, denominator, clip, aggregation)


@_value_loss.register_fake
def _(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    old_values: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    clip: float | None,
    aggregation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    metrics = returns.new_empty(len(VALUE_METRICS))
    return returns.new_empty(()), metrics, returns.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, d_values = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(d_values)
    ctx.mark_non_differentiable(metrics, d_values)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    checks.first_derivative(_OP)
    (d_values,) = ctx.saved_tensors
    return (d_values * grad_loss).to(ctx.dtype), *((None,) * 8)


_value_loss.register_autograd(_backward, setup_context=_setup_context)


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
        raise ValueError(
            f"{_OP}: expected cu_seqlens beside packed [N] values with aggregation={aggregation!r}, got None"
        )
    backend = registry.resolve(_OP, backend, values.device, values.dtype)
    dtype = checks.accumulation_dtype(values.dtype)
    loss, metrics, _ = _value_loss(
        values.reshape(grid(shape)),
        as_floats(returns, shape, dtype),
        as_bools(mask, shape),
        None if clip is None else as_floats(old_values, shape, dtype),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        as_denominator(denominator, values),
        None if clip is None else float(clip),
        aggregation,
        backend,
    )
    return LossOutput(loss, dict(zip(VALUE_METRICS, metrics.unbind(), strict=True)))
