"""Hidden states to logits, statistics and gradients a chunk of rows at a time: the work of both linear ops.

The logits of all rows never exist. Those of a tile of rows are computed into a buffer, reduced by the row kernels of a
backend and overwritten with their gradient; a chunk of gradients then gives its part of the gradients of hidden states,
weight and bias. Rows that do not count are left out before any product.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ppo_fast.ops._core import registry
from ppo_fast.ops._core.checks import accumulation_dtype
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.linear_inputs import LinearCall
from ppo_fast.ops._core.results import RowStats

# Rows per chunk on a CPU: the products are at full speed from 256 on. Of _CPU_MANY rows or more, 1/8 at most.
_CPU_CHUNK = 512
_CPU_MANY = 2048
# On a GPU each chunk reads and writes the float32 gradient of the weight, so chunks are as large as 1 GiB allows.
_GPU_CHUNK = (2048, 4096)
_GPU_CHUNK_BYTES = 2**30
_GPU_CHUNK_FROZEN = 1024
# Rows whose logits exist at one time, by device, where their gradient has a buffer of its own; elsewhere a chunk's.
_TILE = {"cuda": 512}
# Words per partial product on a CPU, where a half-precision product cannot add to a float32 sum: it is rounded first.
_WORDS = 1024
# Elements of a temporary: a block that fits a CPU's cache; few launches, 64 MiB on a GPU.
_CPU_BLOCK, _GPU_BLOCK = 2**17, 2**24


class NeedsGrad(NamedTuple):
    """Say which gradients are asked for."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Gradients(NamedTuple):
    """Gradients of hidden, weight and bias, the last two in the accumulation dtype; empty where not needed."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]

    @staticmethod
    def zeros(call: LinearCall, needs: NeedsGrad) -> "Gradients":
        """Return gradients of 0."""
        hidden, weight, dtype = call.hidden, call.weight, accumulation_dtype(call.hidden.dtype)
        return Gradients(
            hidden.new_zeros(hidden.shape if needs.need_hidden else (0,)),
            weight.new_zeros(weight.shape if needs.need_weight else (0,), dtype=dtype),
            weight.new_zeros(weight.shape[0] if needs.need_bias else (0,), dtype=dtype),
        )

    def add(self, call: LinearCall, rows: Tensor, dlogits: Tensor) -> None:
        """Add what the logits' gradient [n, V] of some rows gives."""
        if self.hidden.numel():
            self.hidden.index_copy_(0, rows, dlogits @ call.weight)
        if self.weight.numel():
            _add_product(self.weight, dlogits.T, call.hidden[rows])
        if self.bias.numel():
            self.bias.add_(dlogits.sum(0, dtype=self.bias.dtype))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a per-token tensor, as [1, n]; empty stays empty."""
    return x.reshape(-1)[rows][None] if x.numel() else x


Rows = TypeVar("Rows", RowStats, RowGrads)


def gather(group: Rows, rows: Tensor) -> Rows:
    """Statistics or gradients of some rows, as [1, n]."""
    return type(group)(*[None if x is None else gather_rows(x, rows) for x in group])


def zero_stats(call: LinearCall, want_kl: bool) -> RowStats:
    """Room for the statistics of all rows, as the targets [B, T]; those of rows that do not count stay 0."""
    shape, dtype, wide = call.targets.shape, accumulation_dtype(call.hidden.dtype), torch.float64

    def zeros(wanted: bool, dtype: torch.dtype) -> Tensor:
        return call.hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    return RowStats(
        zeros(True, dtype), zeros(True, dtype), zeros(want_kl, dtype), zeros(True, wide), zeros(want_kl, wide)
    )


def put(stats: RowStats, rows: Tensor, tile: RowStats) -> None:
    """Write the statistics [1, n] of some rows to those of all."""
    for mine, theirs in zip(stats, tile, strict=True):
        if mine.numel():
            mine.view(-1).index_copy_(0, rows, theirs.view(-1))


def _product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = x @ weight.T + bias; float32 from half operands is not rounded to half on a GPU."""
    if out.dtype != x.dtype and out.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
    elif out.dtype != x.dtype:
        out.copy_(torch.nn.functional.linear(x, weight, bias))
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of ``total``."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # A partial product in float16 could overflow.
        wide = torch.float32 if a.dtype == torch.float16 else a.dtype
        for part, rows in zip(total.split(_WORDS), a.split(_WORDS), strict=True):
            part.add_(rows.to(wide) @ b.to(wide))


def chunk_rows(call: LinearCall, count: int, trained: bool, device: str) -> int:
    """Rows whose logits or gradient are held at one time, of ``count`` that count; at least 1."""
    V, itemsize = call.weight.shape[0], call.hidden.element_size()
    if call.chunk_size is not None:
        rows = call.chunk_size
    elif device == "cuda":
        low, high = _GPU_CHUNK
        by_bytes = _GPU_CHUNK_BYTES // (V * itemsize) // 128 * 128
        rows = min(high, max(low, by_bytes)) if trained else _GPU_CHUNK_FROZEN
    else:
        buffers = 1 + (call.ref_hidden is not None) + (call.softcap is not None)
        rows = min(_CPU_CHUNK, count // 8 if count >= _CPU_MANY else _CPU_CHUNK) // buffers
    return max(1, min(rows, count))


class Buffers(NamedTuple):
    """The logits that exist at one time: [tile, V], as many of a reference, and [chunk, V] of separate gradient."""

    chunk: int
    tile: int
    dtype: torch.dtype  # of logits
    ref_dtype: torch.dtype | None  # None: no reference
    separate: bool  # the gradient has a buffer of its own, in the dtype of hidden; else it replaces the logits

    @staticmethod
    def of(call: LinearCall, count: int, needs: NeedsGrad, device: str) -> "Buffers":
        """For ``count`` rows that count, on a device of that type."""
        chunk = chunk_rows(call, count, needs.need_weight, device)
        dtype, ref = _logits_dtype(call.hidden, call.softcap, device), call.ref_hidden
        separate = any(needs) and (dtype != call.hidden.dtype or call.softcap is not None)
        tile = min(chunk, _TILE.get(device, chunk)) if separate else chunk
        return Buffers(chunk, tile, dtype, None if ref is None else _logits_dtype(ref, call.softcap, device), separate)

    def bytes(self, call: LinearCall) -> int:
        """Return the size of all of them."""
        logits = self.tile * (self.dtype.itemsize + (self.ref_dtype.itemsize if self.ref_dtype else 0))
        return (logits + self.separate * self.chunk * call.hidden.element_size()) * call.weight.shape[0]


def _logits_dtype(hidden: Tensor, softcap: float | None, device: str) -> torch.dtype:
    """float32 from half operands costs a GPU nothing; a CPU has no such product, but 1 - t^2 needs the digits."""
    wide = device == "cuda" or softcap is not None
    return accumulation_dtype(hidden.dtype) if wide else hidden.dtype


class ChunkedHead:
    """The rows that count, the buffers of a chunk, and the row kernels on them.

    With softcap the buffers hold t = tanh(x / softcap), whose temperature is temperature / softcap.
    """

    def __init__(self, call: LinearCall, needs: NeedsGrad) -> None:
        self.call, self.needs = call, needs
        hidden = call.hidden
        if call.mask is None:
            self.rows = torch.arange(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        else:
            self.rows = call.mask.flatten().nonzero()[:, 0]
        self.temperature = call.temperature / (call.softcap or 1.0)
        buffers = Buffers.of(call, len(self.rows), needs, hidden.device.type)
        self.chunk, self.tile, V = buffers.chunk, buffers.tile, call.weight.shape[0]
        self.logits = hidden.new_empty(self.tile, V, dtype=buffers.dtype)
        self.gradient = hidden.new_empty(self.chunk, V) if buffers.separate else self.logits
        self.ref_logits = None if buffers.ref_dtype is None else hidden.new_empty(self.tile, V, dtype=buffers.ref_dtype)
        self._loaded: tuple[int, int] | None = None

    def stats(self) -> RowStats:
        """The statistics of all rows, a tile at a time."""
        stats = zero_stats(self.call, self.call.ref_hidden is not None)
        for first, last in spans(0, len(self.rows), self.tile):
            put(stats, self.rows[first:last], self.tile_stats(first, last))
        return stats

    def gradients(self, grads: RowGrads, stats: RowStats) -> Gradients:
        """The gradients of a loss whose gradients in the statistics of all rows are known."""
        total = Gradients.zeros(self.call, self.needs)
        for start, stop in spans(0, len(self.rows), self.chunk):
            for first, last in spans(start, stop, self.tile):
                rows = self.rows[first:last]
                self.write_gradient(first, last, first - start, gather(grads, rows), gather(stats, rows))
            self.add_chunk(total, start, stop)
        return total

    def tile_inputs(self, first: int, last: int) -> RowInputs:
        """The rows [1, n, V] of a tile, whose logits are computed unless they are there."""
        if self._loaded != (first, last):
            self._compute(first, last)
            self._loaded = (first, last)
        count, ref_logits = last - first, self.ref_logits
        return RowInputs(
            self.logits[None, :count],
            gather_rows(self.call.targets, self.rows[first:last]),
            None if ref_logits is None else ref_logits[None, :count],
            None,
            self.temperature,
        )

    def tile_stats(self, first: int, last: int) -> RowStats:
        """The statistics [1, n] of a tile."""
        return registry.implementation("token_stats", self.call.backend)(self.tile_inputs(first, last), True)

    def write_gradient(self, first: int, last: int, offset: int, grads: RowGrads, stats: RowStats) -> None:
        """The gradient of x, the logits of a tile before softcap, in the chunk's buffer from row ``offset`` on."""
        run = registry.implementation("token_stats_backward", self.call.backend)
        tile = self.tile_inputs(first, last)
        self._loaded = None  # the gradient may take the place of the logits
        out, softcap = self.gradient[offset : offset + last - first], self.call.softcap
        if softcap is None:
            run(grads, tile, stats, out=out[None])
            return
        # The slope d t / d x, before the gradient in t takes the place of t.
        t = self.logits[: last - first]
        by_rows(out, lambda t: (1.0 - t * t) / softcap, t)
        run(grads, tile, stats, out=tile.logits)
        by_rows(out, torch.mul, out, t)

    def add_chunk(self, total: Gradients, start: int, stop: int) -> None:
        """Add what the gradient of a chunk's logits gives."""
        total.add(self.call, self.rows[start:stop], self.gradient[: stop - start])

    def _compute(self, first: int, last: int) -> None:
        call, rows = self.call, self.rows[first:last]
        logits, ref_logits = self.logits[: last - first], self.ref_logits
        _product(logits, call.hidden[rows], call.weight, call.bias)
        _squash(logits, call.softcap)
        if call.ref_hidden is not None and ref_logits is not None:
            ref_weight = call.weight if call.ref_weight is None else call.ref_weight
            _product(ref_logits[: last - first], call.ref_hidden[rows], ref_weight, call.ref_bias)
            _squash(ref_logits[: last - first], call.softcap)


def _squash(logits: Tensor, softcap: float | None) -> None:
    if softcap is not None:
        logits.div_(softcap).tanh_()


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive pieces of at most ``size``."""
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


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
