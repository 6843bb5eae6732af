"""Gradients of hidden states, weight and bias as sums over chunks of the logits' gradient."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._core.checks import accumulation_dtype
from ppo_fast.ops._core.head_buffers import NeedsGrad
from ppo_fast.ops._core.linear_inputs import LinearCall

# Words per partial product on a CPU, where a half-precision product cannot add to a float32 sum: it is rounded first.
_WORDS = 1024
# Elements of a temporary: a block that fits a CPU's cache; few launches, 64 MiB on a GPU.
_CPU_BLOCK, _GPU_BLOCK = 2**17, 2**24


class Gradients(NamedTuple):
    """Gradients of hidden, weight and bias, the last two in the accumulation dtype; empty where not needed."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]

    @staticmethod
    def unset(call: LinearCall, needs: NeedsGrad, every_row: bool) -> "Gradients":
        """Return room for gradients: 0 where :meth:`add` adds, and in rows that no chunk has unless each has one."""
        hidden, weight, dtype = call.hidden, call.weight, accumulation_dtype(call.hidden.dtype)
        new_hidden = hidden.new_empty if every_row else hidden.new_zeros
        return Gradients(
            new_hidden(hidden.shape if needs.need_hidden else (0,)),
            weight.new_empty(weight.shape if needs.need_weight else (0,), dtype=dtype),
            weight.new_zeros(weight.shape[0] if needs.need_bias else (0,), dtype=dtype),
        )

    @staticmethod
    def zeros(call: LinearCall, needs: NeedsGrad) -> "Gradients":
        """Return gradients of 0."""
        room = Gradients.unset(call, needs, every_row=False)
        return room._replace(weight=torch.zeros_like(room.weight))

    def add(self, call: LinearCall, rows: Tensor | slice, hidden: Tensor, dlogits: Tensor, first: bool) -> None:
        """Add what the logits' gradient [n, V] of the hidden states [n, D] gives; the ``first`` chunk sets the sums.

        ``rows`` are those of the hidden states, in order where they are a slice.
        """
        if self.hidden.numel():
            if isinstance(rows, slice):
                torch.mm(dlogits, call.weight, out=self.hidden[rows])
            else:
                self.hidden.index_copy_(0, rows, dlogits @ call.weight)
        if self.weight.numel():
            _add_product(self.weight, dlogits.T, hidden, first)
        if self.bias.numel():
            self.bias.add_(dlogits.sum(0, dtype=self.bias.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b for the ``first``, summed in the dtype of ``total``."""
    if total.dtype == a.dtype and first:
        torch.mm(a, b, out=total)
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda and first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # A partial product in float16 could overflow.
        dtype = torch.float32 if a.dtype == torch.float16 else a.dtype
        for part, rows in zip(total.split(_WORDS), a.split(_WORDS), strict=True):
            product = rows.to(dtype) @ b.to(dtype)
            part.copy_(product) if first else part.add_(product)


def unit_scale(like: Tensor, *weights: Tensor | None) -> Tensor:
    """The power of two above the largest magnitude, 1 where all are 0: dividing by it is exact.

    A loss's 1/denominator, kept out of a half-precision gradient of the logits, cannot make it underflow.
    """
    given = [w.abs().amax() for w in weights if w is not None and w.numel()]
    if not given:
        return like.new_ones((), dtype=accumulation_dtype(like.dtype))
    largest = torch.stack(given).amax()
    mantissa, _ = torch.frexp(largest)
    return torch.where(mantissa == 0, 1.0, largest / mantissa)


def by_rows(out: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """``out = function(*inputs)``, rounded once to its dtype, by blocks of rows: no temporary of their size exists."""
    block = _GPU_BLOCK if out.is_cuda else _CPU_BLOCK
    rows = max(1, block // out.shape[1:].numel())
    for target, *parts in zip(*(x.split(rows) for x in (out, *inputs)), strict=True):
        target.copy_(function(*parts))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor``, rounded once to ``dtype``."""
    if gradient.dtype == factor.dtype == dtype:
        return gradient * factor
    out = torch.empty_like(gradient, dtype=dtype)
    by_rows(out, lambda x: x.to(factor.dtype) * factor, gradient)
    return out
