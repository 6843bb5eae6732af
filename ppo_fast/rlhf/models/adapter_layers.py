"""Linear layers with a low-rank adapter: y = x W^T + bias + s (x A^T) B^T in three products, in the dtype of x.

The parameters A and B stay float32 on a base of 16 bits: they take the optimizer's steps and are what is saved. The
products read copies in the dtype of x, so that a GPU multiplies on its tensor cores. peft's own forward pass multiplies
in float32, casts x and y, and adds in launches of their own.

peft's forward pass still computes what ours cannot: every other tuner and variant (DoRA, ...), adapters of embeddings
and convolutions, biases of adapters, several adapters at once, mixed batches, merged layers, and torch.autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

Context = Any  # of a torch.autograd.Function
KINDS = ("Linear", "Linear4bit")  # classes of peft's layers that `use_fast_forward` takes


class RoundedCopy:
    """A parameter in the dtype of the products. It follows in-place changes by the parameter's version counter.

    A write through `parameter.data` does not count: the copy follows it at the next change that does.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.value: Tensor | None = None  # made at the first use
        self._version = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> RoundedCopy:
        return RoundedCopy(deepcopy(self.parameter, memo))  # whose versions start again

    @property
    def stale(self) -> bool:
        """Whether the copy is in use and the parameter has changed since."""
        return self.value is not None and self._version != self.parameter._version

    def get(self, dtype: torch.dtype) -> Tensor:
        """The current values in that dtype."""
        if self.value is None or self.value.dtype != dtype or self.value.device != self.parameter.device:
            with torch.inference_mode(mode=False):  # a backward pass may save it
                self.value = torch.empty_like(self.parameter, dtype=dtype, requires_grad=False)
            self._version = -1
        if self.stale:
            refresh([self])
        return self.value


@torch.no_grad()
def refresh(copies: Iterable[RoundedCopy]) -> None:
    """Renew the stale ones, in place: a captured CUDA graph reads the new values."""
    stale = [(copy, copy.value) for copy in copies if copy.value is not None and copy.stale]
    if stale:
        torch._foreach_copy_([value for _, value in stale], [copy.parameter for copy, _ in stale])
    for copy, _ in stale:
        copy._version = copy.parameter._version


@functools.cache
def _count_fused_steps() -> None:
    """Make the steps of torch's fused optimizers count as changes of their parameters, as all others do."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


def use_fast_forward(layer: Any, name: str) -> list[RoundedCopy]:
    """Give a layer of peft this module's forward pass for the adapter `name`, and return the copies that it reads.

    Nothing is done to a layer of another kind than `KINDS`, which keeps peft's.
    """
    kind: Any = type(layer)
    if not isinstance(layer, AdapterLayer):
        if kind.__name__ not in KINDS or not kind.__module__.startswith("peft.tuners.lora."):
            return []
        layer.__class__ = _fast(kind)
        layer.copies = {}
    if name not in layer.lora_A:
        return []
    _count_fused_steps()
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    layer.copies[name] = tuple(RoundedCopy(factor) for factor in factors)
    return [*layer.copies[name]]


@functools.cache
def _fast(kind: type) -> type:
    return type(kind.__name__, (AdapterLayer, kind), {})


class AdapterLayer:
    """The forward pass of a layer of peft, mixed into its class; copies live by the adapters' names."""

    copies: dict[str, tuple[RoundedCopy, ...]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The product [..., out] of x [..., in]."""
        layer: Any = self
        autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
        name = None if args or kwargs or autocast else _only_adapter(layer)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the class mixed with
        dropout, base = layer.lora_dropout[name], layer.base_layer
        dropped = dropout(x) if dropout.training and getattr(dropout, "p", 0.0) else None
        weight = _frozen_weight(base, x)
        product = None if weight is not None else base(x)
        bias = None if weight is None else base.bias
        factors = layer.lora_A[name].weight, layer.lora_B[name].weight
        rounded = [self._rounded(name, index, factor, x.dtype) for index, factor in enumerate(factors)]
        return _Adapted.apply(x, dropped, product, weight, bias, *factors, *rounded, layer.scaling[name])

    def _rounded(self, name: str, index: int, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """A or B in the dtype of the product."""
        if factor.dtype == dtype:
            return factor
        copy = self.copies[name][index] if name in self.copies else None
        if copy is not None and copy.parameter is factor:
            return copy.get(dtype)
        return factor.detach().to(dtype)  # put in the parameter's place since, as sharding does


def _only_adapter(layer: Any) -> str | None:
    """Name of the one adapter that is on, if ours can compute it."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return None
    name: str = active[0]
    return None if layer.lora_bias[name] or name in layer.lora_variant else name


def _frozen_weight(base: Any, x: Tensor) -> Tensor | None:
    """The weight [out, in] of a frozen linear layer without hooks in the dtype of x; None for any other layer."""
    if type(base) not in (nn.Linear, Conv1D) or base._forward_hooks or base._forward_pre_hooks:
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or weight.dtype != x.dtype or (bias is not None and bias.requires_grad):
        return None
    matrix: Tensor = weight if type(base) is nn.Linear else weight.T
    return matrix


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + s (x' A^T) B^T, or y = product + s (x' A^T) B^T; x' is x after dropout, else x.

    dx = dy W + s (dy B) A, dA = s (dy B)^T x', dB = dy^T s (x' A^T): three products forward, five backward, whose
    additions and scales are theirs too. Only x' and s x' A^T are kept. W and the bias are frozen.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        dropped: Tensor | None,
        product: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        low = _scaled(rows, a.T, scale)
        if weight is not None:
            whole = x.reshape(-1, x.shape[-1])
            output = nn.functional.linear(whole, weight, bias).addmm_(low, b.T)
        else:
            assert product is not None
            output = torch.addmm(product.reshape(-1, product.shape[-1]), low, b.T)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scale, ctx.dtypes, ctx.shape, ctx.dropped = scale, (A.dtype, B.dtype), x.shape, dropped is not None
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        need_x, need_dropped, need_product, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        low_grad = _scaled(dy, b, ctx.scale) if need_x or need_dropped or need_a else None
        dx = dropped = None
        if need_x and weight is not None:
            dx = dy @ weight
        if need_dropped:
            dropped = (low_grad @ a).view(ctx.shape)
        elif need_x and not ctx.dropped:
            dx = low_grad @ a if dx is None else dx.addmm_(low_grad, a)
        dA = _product(low_grad.T, rows, ctx.dtypes[0]) if need_a and low_grad is not None else None
        dB = _product(dy.T, low, ctx.dtypes[1]) if need_b else None
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, dropped, grad if need_product else None, None, None, dA, dB, None, None, None


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one launch."""
    return torch.addmm(left[:1, :1], left, right, beta=0, alpha=scale)  # with beta = 0 the first argument is not read


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; a GPU stores the float32 sums of products of 16 bits as they are."""
    if left.dtype != dtype and left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
