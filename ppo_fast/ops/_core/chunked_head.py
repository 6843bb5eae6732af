"""Hidden states to logits, statistics and gradients a chunk of rows at a time: the work of both linear ops.

The logits of all rows never exist. Those of a tile of rows are computed into a buffer, reduced by the row kernels of a
backend and overwritten with their gradient; a chunk of gradients then gives its part of the gradients of hidden states,
weight and bias. Rows that do not count are left out before any product.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ppo_fast.ops._core import registry
from ppo_fast.ops._core.checks import accumulation_dtype
from ppo_fast.ops._core.head_buffers import Buffers, Layout, NeedsGrad, Tile, spans
from ppo_fast.ops._core.head_gradients import Gradients, by_rows
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.linear_inputs import LinearCall
from ppo_fast.ops._core.results import RowStats
from ppo_fast.ops._core.vocab_shard import VocabShard

Group = TypeVar("Group", RowStats, RowGrads)


class CountedRows:
    """The rows that count, of B*T: per-token tensors go to them, [1, n], and back."""

    def __init__(self, mask: Tensor | None, rows: int) -> None:
        self.index = None if mask is None else mask.flatten().nonzero()[:, 0]
        self.count = rows if self.index is None else len(self.index)
        if self.count == rows:
            self.index = None

    def __getitem__(self, rows: slice) -> Tensor | slice:
        """Positions of some of the rows that count, among all rows."""
        return rows if self.index is None else self.index[rows]

    def of(self, x: Tensor) -> Tensor:
        """Their part [1, n] of a per-token tensor; empty stays empty."""
        if not x.numel():
            return x
        return (x.reshape(-1) if self.index is None else x.reshape(-1)[self.index])[None]

    def of_group(self, group: Group) -> Group:
        """Their part of every per-token tensor of a group."""
        return type(group)(*[None if x is None else self.of(x) for x in group])

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        """A tensor [1, n] of theirs among all rows, 0 elsewhere; empty stays empty."""
        if not x.numel() or self.index is None:
            return x.view(shape) if x.numel() else x
        return x.new_zeros(shape.numel()).index_copy_(0, self.index, x.view(-1)).view(shape)


def part(group: Group, first: int, last: int) -> Group:
    """Some rows of every per-token tensor [1, n] of a group."""
    return type(group)(*[x if x is None or not x.numel() else x[:, first:last] for x in group])


def zero_stats(call: LinearCall, want_kl: bool) -> RowStats:
    """Statistics of 0 of all rows, as the targets [B, T]."""
    shape, dtype, wide = call.targets.shape, accumulation_dtype(call.hidden.dtype), torch.float64

    def zeros(wanted: bool, dtype: torch.dtype) -> Tensor:
        return call.hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    return RowStats(
        zeros(True, dtype), zeros(True, dtype), zeros(want_kl, dtype), zeros(True, wide), zeros(want_kl, wide)
    )


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


class ChunkedHead:
    """The rows that count, the buffers of a chunk, and the row kernels on them.

    With softcap the buffers hold t = tanh(x / softcap), whose temperature is temperature / softcap. With ``shard`` the
    weight is a slice of the vocabulary and the targets are local ones.
    """

    def __init__(self, call: LinearCall, needs: NeedsGrad, shard: VocabShard | None = None) -> None:
        self.call, self.needs, self.shard = call, needs, shard
        hidden = call.hidden
        self.rows = CountedRows(call.mask, hidden.shape[0])
        self.count = self.rows.count
        self.targets = self.rows.of(call.targets)
        self.temperature = call.temperature / (call.softcap or 1.0)
        # The ranks of a group communicate for each tile: they must have the same tiles.
        words = None if shard is None else shard.largest
        buffers = Buffers.of(call, self.count, needs, hidden.device.type, words)
        self.chunk, self._layout = buffers.chunk, Layout(call, buffers)
        self.one_tile = 0 < self.count <= self._layout.rows(0)
        self._loaded: tuple[int, int] | None = None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the chunks."""
        return spans(0, self.count, self.chunk)

    def tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """The tiles of a chunk, each with its logits, which are computed unless they are there."""
        rows = None
        for tile in self._layout.tiles(start, stop):
            if self._loaded != (tile.first, tile.last):
                if rows is None:
                    rows = self.rows[start:stop]
                    hidden = self.call.hidden[rows]
                    ref_hidden = None if self.call.ref_hidden is None else self.call.ref_hidden[rows]
                some = slice(tile.first - start, tile.last - start)
                self._compute(tile, hidden[some], None if ref_hidden is None else ref_hidden[some])
                self._loaded = tile.first, tile.last
            yield tile

    def stats(self) -> RowStats:
        """The statistics of all rows, as the targets [B, T]; 0 for rows that do not count."""
        found = []
        for start, stop in self.chunks():
            for tile in self.tiles(start, stop):
                found.append((tile, self.tile_stats(tile)))
        return self.joined(found)

    def joined(self, found: list[tuple[Tile, RowStats]]) -> RowStats:
        """The statistics of all rows from those of every tile."""
        if not found:
            return zero_stats(self.call, self.call.ref_hidden is not None)
        parts = [stats for _, stats in sorted(found, key=lambda pair: pair[0].first)]
        shape = self.call.targets.shape
        whole = parts[0] if len(parts) == 1 else [torch.cat(some, -1) for some in zip(*parts, strict=True)]
        return RowStats(*[self.rows.spread(x, shape) for x in whole])

    def gradients(self, grads: RowGrads, stats: RowStats) -> Gradients:
        """The gradients of a loss whose gradients in the statistics of all rows are known."""
        grads, stats = self.rows.of_group(grads), self.rows.of_group(stats)
        total = self.unset_gradients()
        for start, stop in self.chunks():
            for tile in self.tiles(start, stop):
                rows = tile.first, tile.last
                self.write_gradient(tile, part(grads, *rows), part(stats, *rows))
            self.add_chunk(total, start, stop)
        return total

    def inputs(self, tile: Tile) -> RowInputs:
        """The rows [1, n, V] of a tile."""
        ref_logits = None if tile.ref_logits is None else tile.ref_logits[None]
        return RowInputs(tile.logits[None], self.targets[:, tile.first : tile.last], ref_logits, None, self.temperature)

    def tile_stats(self, tile: Tile) -> RowStats:
        """The statistics [1, n] of a tile."""
        if self.shard is not None:
            return self.shard.stats(self.inputs(tile), True, self.call.backend)
        return registry.implementation("token_stats", self.call.backend)(self.inputs(tile), True)

    def write_gradient(self, tile: Tile, grads: RowGrads, stats: RowStats) -> None:
        """The gradient of x, the logits of a tile before softcap, in its place of the chunk's gradient."""
        run = registry.implementation("token_stats_backward", self.call.backend)
        self._loaded = None  # the gradient may take the place of the logits
        softcap, inputs = self.call.softcap, self.inputs(tile)
        if softcap is None:
            run(grads, inputs, stats, out=tile.gradient[None])
            return
        # The slope d t / d x, before the gradient in t takes the place of t.
        t = tile.logits
        by_rows(tile.gradient, lambda t: (1.0 - t * t) / softcap, t)
        run(grads, inputs, stats, out=inputs.logits)
        by_rows(tile.gradient, torch.mul, tile.gradient, t)

    def unset_gradients(self) -> Gradients:
        """Room for the gradients, to which every chunk is added from the first on."""
        if self.count == 0:
            return Gradients.zeros(self.call, self.needs)
        return Gradients.unset(self.call, self.needs, every_row=self.rows.index is None)

    def add_chunk(self, total: Gradients, start: int, stop: int) -> None:
        """Add what the gradient of a chunk's logits gives."""
        rows = self.rows[start:stop]
        total.add(self.call, rows, self.call.hidden[rows], self._layout.gradient(stop - start), start == 0)

    def _compute(self, tile: Tile, hidden: Tensor, ref_hidden: Tensor | None) -> None:
        call = self.call
        _product(tile.logits, hidden, call.weight, call.bias)
        _squash(tile.logits, call.softcap)
        if ref_hidden is not None and tile.ref_logits is not None:
            ref_weight = call.weight if call.ref_weight is None else call.ref_weight
            _product(tile.ref_logits, ref_hidden, ref_weight, call.ref_bias)
            _squash(tile.ref_logits, call.softcap)


def _squash(logits: Tensor, softcap: float | None) -> None:
    if softcap is not None:
        logits.div_(softcap).tanh_()
