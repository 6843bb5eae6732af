"""Sequences as a backbone takes them, padded or packed, and which of its states the counted tokens come from.

Shapes follow from masks, so the masks stay on the host: micro-batches are made without waiting for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppo_fast.rlhf.world import World

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ForwardInputs:
    """Arguments of one forward pass, and the indices of the hidden states that predict each counted token."""

    inputs: dict[str, Tensor | None]  # ids and positions, padded [b, L] with a mask, or [1, S] without one
    gather_index: Tensor  # [N] int64: places in the flattened batch
    logits_to_keep: int  # the last columns, that hold all of them
    cu_seqlens: Tensor | None = None  # [b + 1] int32: where the sequences of a packed row begin and end; None: padded
    max_seqlen: int = 0  # sequence of a packed row


class Passes(NamedTuple):
    """The forward passes of a rank, as many as on any other: a split weight is gathered by all ranks together."""

    rows: list[Array]  # of each pass
    counted: int  # passes; those after them repeat one, and count 0
    everyone: Array  # [B] int64: the rows of all counted passes, rank by rank


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of many sequences on the device with their masks on the host."""

    ids: Tensor  # [B, L] int64
    attention: Array  # [B, L] bool, True: a token of the sequence; without gaps
    loss_mask: Array  # [B, L] bool, True: a token the loss counts; not the first of its sequence

    @classmethod
    def from_masks(cls, ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> TokenBatch:
        """From masks [B, L] on the device, in one transfer; `counted` may be [B, T], of the last T columns."""
        before = torch.zeros_like(attention_mask[:, loss_mask.shape[1] :])
        masks = torch.stack([attention_mask, torch.cat([before, loss_mask], dim=1)]).cpu().numpy()
        return cls(ids, masks[0], masks[1])

    @property
    def lengths(self) -> Array:
        """[B] int64: counted tokens of each sequence."""
        return self.loss_mask.sum(axis=1)

    def flat_indices(self, rows: Array) -> Tensor:
        """[N] int64: the counted tokens of these rows in the flattened grid, row by row."""
        row, column = self.loss_mask[rows].nonzero()
        return to_device(rows[row] * self.loss_mask.shape[1] + column, self.ids.device)

    def split(self, rows: Array, size: int | None, tokens: int | None, *, packed: bool) -> list[Array]:
        """Micro-batches of these rows: of `size` rows, of at most `tokens` tokens, or one; see `split_by_tokens`."""
        if tokens is not None:
            attention = self.attention[rows]
            start = attention.argmax(axis=1)
            return [rows[part] for part in split_by_tokens(start, start + attention.sum(axis=1), tokens, packed=packed)]
        return self.split_by_length(rows, size or len(rows))

    def deal(self, rows: Array, world: World, size: int | None, tokens: int | None, *, packed: bool) -> Passes:
        """This rank's micro-batches of these rows, the longest rows dealt first; see `split`.

        All ranks know all lengths, so they deal alike.
        """
        order = rows if world.size == 1 else rows[(-self.attention[rows].sum(axis=1)).argsort(kind="stable")]
        turn = np.arange(len(order)) % (2 * world.size)  # back and forth
        shares = [order[(turn == rank) | (turn == 2 * world.size - 1 - rank)] for rank in range(world.size)]
        split = [self.split(share, size, tokens, packed=packed) if len(share) else [] for share in shares]
        own, count = split[world.rank], max(map(len, split))
        repeated = (own or [rows[:1]])[-1]
        everyone = np.concatenate([part for share in split for part in share])
        return Passes([*own, *[repeated] * (count - len(own))], len(own), everyone)

    def split_by_length(self, rows: Array, size: int) -> list[Array]:
        """Micro-batches of `size` of these rows, those of like length together; in order where one holds them all."""
        if size < len(rows):
            rows = rows[self.attention[rows].sum(axis=1).argsort(kind="stable")]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def sequences(self, rows: Array, *, packed: bool) -> ForwardInputs:
        """The forward pass over these rows, packed one after the other or padded to the longest."""
        return self._packed(rows) if packed else self._padded(rows)

    def _padded(self, rows: Array) -> ForwardInputs:
        """Columns that are padding in all rows, and the last token of all, take no part."""
        used = self.attention[rows].any(axis=0).nonzero()[0]
        first, last = int(used[0]), int(used[-1])
        attention, device = self.attention[rows, first:last], self.ids.device
        positions = (attention.cumsum(axis=1) - 1).clip(min=0)
        inputs: dict[str, Tensor | None] = {
            "input_ids": self.ids[to_device(rows, device), first:last],
            "attention_mask": None if attention.all() else to_device(attention.astype(np.int64), device),
            "position_ids": to_device(positions, device),
        }
        loss_mask = self.loss_mask[rows, first + 1 : last + 1]
        logits_to_keep = loss_mask.shape[1] - int(loss_mask.any(axis=0).argmax())
        return ForwardInputs(inputs, to_device(loss_mask.ravel().nonzero()[0], device), logits_to_keep)

    def _packed(self, rows: Array) -> ForwardInputs:
        """The last token of each sequence predicts nothing and is left out."""
        attention, device = self.attention[rows], self.ids.device
        kept = attention[:, :-1] & attention[:, 1:]
        row, column = kept.nonzero()
        lengths = kept.sum(axis=1)
        starts = lengths.cumsum() - lengths
        inputs: dict[str, Tensor | None] = {
            "input_ids": self.ids.flatten()[to_device(rows[row] * attention.shape[1] + column, device)][None],
            "attention_mask": None,
            "position_ids": to_device(np.arange(len(row)) - starts.repeat(lengths), device)[None],
        }
        rank = kept.ravel().cumsum() - 1
        gather_index = to_device(rank[self.loss_mask[rows, 1:].ravel()], device)
        cu_seqlens = offsets(lengths[lengths > 0]).astype(np.int32)
        return ForwardInputs(inputs, gather_index, len(row), to_device(cu_seqlens, device), int(lengths.max()))


def split_by_tokens(start: Array, stop: Array, tokens: int, *, packed: bool) -> list[Array]:
    """Split sequences into passes of at most `tokens` tokens, the longest first; a longer one goes by itself.

    Packed, each goes into the first pass with room for its tokens but the last. Padded, it goes into the latest pass,
    if the columns used, times the rows, stay within `tokens`. Where one pass holds them all they stay in order.

    Args:
        start, stop: [B]; sequence b is in columns [start[b], stop[b]) of a batch.

    Returns:
        The indices of the sequences of each pass.
    """
    passes = list[list[int]]()
    used = list[int]()  # tokens of each pass, packed
    first, last = 0, 0  # columns of the latest pass, padded
    for index in (start - stop).argsort(kind="stable").tolist():
        begin, end = int(start[index]), int(stop[index])
        if packed:
            size = end - begin - 1
            at = next((at for at, count in enumerate(used) if count + size <= tokens), len(passes))
            if at == len(used):
                used.append(0)
            used[at] += size
        else:
            joined = min(first, begin), max(last, end)
            fits = passes and (joined[1] - joined[0] - 1) * (len(passes[-1]) + 1) <= tokens
            first, last = joined if fits else (begin, end)
            at = len(passes) - 1 if fits else len(passes)
        if at == len(passes):
            passes.append([])
        passes[at].append(index)
    return [np.array(part) for part in passes] if len(passes) > 1 else [np.arange(len(start))]


def to_device(array: Array, device: torch.device) -> Tensor:
    """A host array on the device; the copy to a GPU is queued, not waited for."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def offsets(lengths: Array) -> Array:
    """[B + 1] int64 from 0 to N: where each of B sequences of these lengths begins, one after the other."""
    return np.concatenate([[0], lengths.cumsum()])


def ranges(starts: Array, lengths: Array) -> Array:
    """[start, start + length) of each, one after the other."""
    ends = offsets(lengths)
    return np.arange(ends[-1]) + (starts - ends[:-1]).repeat(lengths)
