"""Tensors whose rows are split over the ranks of a run: torch's DTensors, and parts of the state of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Share(NamedTuple):
    """A rank's part of a tensor; those of all ranks, one after the other, are the whole."""

    rows: Tensor  # [n, ...], n may differ


def local(x: Tensor) -> Tensor:
    """Return this rank's rows of a weight that is split, in the same memory; else x itself."""
    return cast(DTensor, x.detach()).to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return all rows of a weight that is split; else x itself. All ranks call it."""
    return cast(DTensor, x.detach()).full_tensor() if isinstance(x, DTensor) else x


class Rows(NamedTuple):
    """The rows of a split weight that are on this rank: [start, stop) of `total`, at most `each` on any rank."""

    start: int
    stop: int
    total: int
    each: int

    def of(self, x: Tensor) -> Tensor:
        """Return this rank's part of a tensor whose first dimension follows the rows of the weight."""
        return x[len(x) * self.start // self.total : len(x) * self.stop // self.total]


def rows_of(x: Tensor) -> Rows | None:
    """Return the rows on this rank; None: the tensor is not split."""
    if not isinstance(x, DTensor):
        return None
    size, rank, count = x.device_mesh.size(), x.device_mesh.get_local_rank(), len(x)
    each = -(-count // size)
    return Rows(min(rank * each, count), min((rank + 1) * each, count), count, each)


def sum_over_ranks(x: Tensor, like: Iterable[Tensor]) -> Tensor:
    """Return the sum of x over the ranks that hold the rows of these weights; x itself where none is split."""
    meshes = [weight.device_mesh for weight in like if isinstance(weight, DTensor)]
    if not meshes or meshes[0].size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total, group=meshes[0].get_group())
    return total
