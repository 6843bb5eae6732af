"""Memory of the linear ops: how many rows have logits or a gradient at one time, and where in one buffer these lie."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._core.checks import accumulation_dtype
from ppo_fast.ops._core.linear_inputs import LinearCall

# Rows per chunk on a CPU: the products are at full speed from 256 on. Of _CPU_MANY rows or more, 1/8 at most.
_CPU_CHUNK = 512
_CPU_MANY = 2048
# On a GPU each chunk reads and writes the float32 gradient of the weight, so chunks are as large as 1 GiB allows.
_GPU_CHUNK = (2048, 4096)
_GPU_CHUNK_BYTES = 2**30
_GPU_CHUNK_FROZEN = 1024
# Rows of the smallest tile, by device, where the gradient has memory of its own; elsewhere a tile is a chunk.
_TILE = {"cuda": 512}
# Rows that the blocks of a GPU's product come in.
_PRODUCT_ROWS = 128
# Bytes to which the parts of the buffer are aligned.
_ALIGNMENT = 256


class NeedsGrad(NamedTuple):
    """Say which gradients are asked for."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive pieces of at most ``size``."""
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def chunk_rows(call: LinearCall, count: int, needs: NeedsGrad, device: str, words: int | None = None) -> int:
    """Rows whose logits or gradient are held at one time, of ``count`` that count; at least 1.

    ``words`` per row are those of the weight unless given.
    """
    V, itemsize = words or call.weight.shape[0], call.hidden.element_size()
    if call.chunk_size is not None:
        rows = call.chunk_size
    elif device == "cuda":
        low, high = _GPU_CHUNK
        by_bytes = _GPU_CHUNK_BYTES // (V * itemsize) // _PRODUCT_ROWS * _PRODUCT_ROWS
        rows = min(high, max(low, by_bytes)) if needs.need_weight else _GPU_CHUNK_FROZEN
    else:
        buffers = 1 + (call.ref_hidden is not None) + (call.softcap is not None)
        rows = min(_CPU_CHUNK, count // 8 if count >= _CPU_MANY else _CPU_CHUNK) // buffers
    return max(1, min(rows, count))


def _logits_dtype(call: LinearCall, hidden: Tensor, device: str) -> torch.dtype:
    """float32 from half operands costs a GPU little; a CPU has no such product, but 1 - t^2 needs the digits."""
    wide = call.softcap is not None or (device == "cuda" and not call.half_logits)
    return accumulation_dtype(hidden.dtype) if wide else hidden.dtype


class Buffers(NamedTuple):
    """The rows whose logits, and those of a reference, or whose gradient exist at one time."""

    chunk: int  # rows of gradient, in the dtype of hidden
    tile: int  # rows of logits; more of them where the chunk has no gradient yet
    dtype: torch.dtype  # of logits
    ref_dtype: torch.dtype | None  # None: no reference
    separate: bool  # the gradient has memory of its own; else it replaces the logits

    @staticmethod
    def of(call: LinearCall, count: int, needs: NeedsGrad, device: str, words: int | None = None) -> "Buffers":
        """For ``count`` rows that count, on a device of that type; ``words`` as :func:`chunk_rows` takes it."""
        chunk = chunk_rows(call, count, needs, device, words)
        dtype, ref = _logits_dtype(call, call.hidden, device), call.ref_hidden
        separate = any(needs) and (dtype != call.hidden.dtype or call.softcap is not None)
        tile = min(chunk, _TILE.get(device, chunk)) if separate else chunk
        return Buffers(chunk, tile, dtype, None if ref is None else _logits_dtype(call, ref, device), separate)

    @property
    def row_bytes(self) -> int:
        """The logits of a row, by word."""
        return self.dtype.itemsize + (self.ref_dtype.itemsize if self.ref_dtype else 0)

    def bytes(self, call: LinearCall) -> int:
        """Return the size of all of them."""
        gradient = self.separate * self.chunk * call.hidden.element_size()
        return (self.tile * self.row_bytes + gradient) * call.weight.shape[0]


class Tile(NamedTuple):
    """Rows ``first`` to ``last``, of those that count, whose logits exist at the same time."""

    first: int
    last: int
    logits: Tensor  # [n, V]
    ref_logits: Tensor | None
    gradient: Tensor  # [n, V] in the dtype of hidden; the logits where it replaces them


class Layout:
    """One buffer: logits at its start, the gradient of a chunk at its end.

    The gradient grows from the chunk's last row to its first. So the first tiles, which find most of the buffer empty,
    are larger than the last ones: a product of more rows is quicker.
    """

    def __init__(self, call: LinearCall, buffers: Buffers) -> None:
        self.buffers, self.V, self.dtype = buffers, call.weight.shape[0], call.hidden.dtype
        self._storage = call.hidden.new_empty(buffers.bytes(call) + 2 * _ALIGNMENT, dtype=torch.uint8)

    def _view(self, start: int, rows: int, dtype: torch.dtype) -> Tensor:
        stop = start + rows * self.V * dtype.itemsize
        return self._storage[start:stop].view(dtype).view(rows, self.V)

    def _logits(self, rows: int) -> tuple[Tensor, Tensor | None]:
        logits, ref_dtype = self._view(0, rows, self.buffers.dtype), self.buffers.ref_dtype
        after = -(-logits.nbytes // _ALIGNMENT) * _ALIGNMENT
        return logits, None if ref_dtype is None else self._view(after, rows, ref_dtype)

    def gradient(self, rows: int) -> Tensor:
        """The gradient [rows, V] of the logits of a chunk."""
        if not self.buffers.separate:
            return self._logits(rows)[0]
        start = (len(self._storage) - rows * self.V * self.dtype.itemsize) // _ALIGNMENT * _ALIGNMENT
        return self._view(start, rows, self.dtype)

    def rows(self, done: int) -> int:
        """Rows of the next tile of a chunk, ``done`` of whose rows have their gradient."""
        buffers = self.buffers
        if not buffers.separate:
            return buffers.tile
        itemsize = self.dtype.itemsize
        free = (buffers.chunk - done) * itemsize + buffers.tile * buffers.row_bytes
        rows = free // (itemsize + buffers.row_bytes)
        return max(buffers.tile, rows // _PRODUCT_ROWS * _PRODUCT_ROWS)

    def tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """The tiles of a chunk, from its last rows to its first."""
        last = stop
        while last > start:
            first = max(start, last - self.rows(stop - last))
            gradient = self.gradient(stop - start)[first - start : last - start]
            yield Tile(first, last, *self._logits(last - first), gradient)
            last = first
