"""The start of several ranks: rank 0 loads, and each rank receives its rows of every weight from rank 0.

Until then rank 0 holds whole networks in host memory, and the other ranks hold networks without data, on the meta
device. A GPU never holds more than its rows and one weight, which is whole on rank 0's for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.split import local, rows_of
from ppo_fast.rlhf.world import current


class Slot(NamedTuple):
    """A place in a module that holds a tensor: a parameter, a buffer or a plain attribute."""

    name: str
    holder: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, self.holder[self.key])

    @property
    def is_split(self) -> bool:
        """Whether it is a parameter that `fully_shard` splits; it does not split the codes of a base in 4 bits."""
        return isinstance(self.tensor, nn.Parameter) and self.tensor.is_floating_point()

    @property
    def is_copied(self) -> bool:
        """Whether it is no parameter: a buffer, such as the frequencies of a rotary embedding."""
        return not isinstance(self.tensor, nn.Parameter)


class Weight(NamedTuple):
    """A weight of rank 0, without its data."""

    first: str  # name of the first slot that holds it: a tied weight has two
    shape: tuple[int, ...]
    dtype: torch.dtype


def drop_data(network: nn.Module) -> None:
    """Put tensors without data in the place of the weights and buffers of a network; what is tied stays tied."""
    empty: dict[int, Tensor] = {}
    for slot in _slots(network):
        x = slot.tensor
        if slot.is_split:
            slot.holder[slot.key] = empty.setdefault(id(x), _without_data(x.shape, x.dtype, x.requires_grad))
        elif slot.is_copied:
            slot.holder[slot.key] = x.to("meta")


def take_weights(root: nn.Module) -> dict[str, Tensor]:
    """Put weights without data in the place of those that are split; return what they were on rank 0, by name.

    Every rank gets the shapes, dtypes and ties of rank 0, which has read the files.

    Raises:
        UserError: the weights of another rank have other names or shapes; on all ranks.
    """
    world, own = current(), {slot.name: slot for slot in _slots(root) if slot.is_split}
    found = world.on_main(lambda: _describe(own))
    world.each(lambda: _check_same(own, found))
    taken = {name: slot.tensor.detach() for name, slot in own.items()} if world.is_main else {}
    empty: dict[str, Tensor] = {}
    for name, (first, shape, dtype) in found.items():
        made = empty.setdefault(first, _without_data(shape, dtype, own[name].tensor.requires_grad))
        own[name].holder[own[name].key] = made
    return taken


def give_weights(root: nn.Module, taken: dict[str, Tensor], device: torch.device) -> None:
    """Give each rank its rows of the split weights, to be kept on `device`, and copies of the buffers of rank 0.

    `taken` is what `take_weights` returned. It is emptied, which frees rank 0's memory on the way.
    """
    filled: dict[int, Tensor] = {}
    for slot in _slots(root):
        weight, source = slot.tensor, taken.pop(slot.name, None)
        if isinstance(weight, DTensor):
            if id(weight) not in filled:
                filled[id(weight)] = _with_rows(weight, _scatter(source, weight).to(device))
            slot.holder[slot.key] = filled[id(weight)]
    _copy_buffers(root)


@torch.no_grad()
def receive(own: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> None:
    """Copy the tensors that rank 0 sends into those of the same names: of one that is split, each rank its rows."""
    for name, x in sorted(own.items()):
        local(x).copy_(_scatter(sent.get(name), x) if isinstance(x, DTensor) else _broadcast(sent.get(name), x))


def _slots(root: nn.Module) -> list[Slot]:
    """Return every place of a tensor in a module, in the order of their names, which is the same on all ranks."""
    return sorted(_walk(root), key=lambda slot: slot.name)


def _walk(root: nn.Module) -> Iterator[Slot]:
    for prefix, module in root.named_modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for key, value in holder.items():
                if isinstance(value, Tensor):
                    yield Slot(f"{prefix}.{key}", holder, key)


def _describe(own: Mapping[str, Slot]) -> dict[str, Weight]:
    first: dict[int, str] = {}
    found = ((name, slot.tensor) for name, slot in own.items())
    return {name: Weight(first.setdefault(id(x), name), tuple(x.shape), x.dtype) for name, x in found}


def _check_same(own: Mapping[str, Slot], found: Mapping[str, Weight]) -> None:
    for name in sorted(own.keys() | found.keys()):
        expected, got = (
            list(x.shape) if x is not None else "none"
            for x in (found.get(name), own[name].tensor if name in own else None)
        )
        if expected != got:
            where = f"{name!r} of a network to be {expected}, as on rank 0"
            raise UserError(f"torchrun: expected the weight {where}, got {got} on rank {current().rank}")


def _without_data(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def _with_rows(weight: DTensor, rows: Tensor) -> nn.Parameter:
    """Return a split weight that has these rows on this rank."""
    # As fully_shard makes it; `DTensor.from_local` would move rows in host memory to the GPU.
    made = DTensor(rows, weight._spec, requires_grad=False)
    return nn.Parameter(made, requires_grad=weight.requires_grad)


def _scatter(x: Tensor | None, weight: DTensor) -> Tensor:
    """Return this rank's rows [n, ...] of rank 0's x, which has the shape and the dtype of the split weight."""
    world, rows = current(), rows_of(weight)
    assert rows is not None
    own = torch.empty((rows.each, *weight.shape[1:]), dtype=weight.dtype, device=world.device)
    if not own.numel():
        return own
    sent = None
    if x is not None:
        sent = [_bytes(part) for part in _parts(x.to(own.device), rows.each, world.size)]
    dist.scatter(_bytes(own), sent, src=0)
    return own[: rows.stop - rows.start]


def _parts(x: Tensor, each: int, count: int) -> Iterator[Tensor]:
    """Yield `count` parts of x of `each` rows; zeros fill up those that have fewer."""
    for rank in range(count):
        part = x[rank * each : (rank + 1) * each]
        yield part if len(part) == each else torch.cat([part, part.new_zeros((each - len(part), *x.shape[1:]))])


def _broadcast(x: Tensor | None, like: Tensor) -> Tensor:
    """Return rank 0's x, which has the shape and the dtype of `like`."""
    found = torch.empty(like.shape, dtype=like.dtype, device=current().device)
    if x is not None:
        found.copy_(x)
    if found.numel():
        dist.broadcast(_bytes(found), src=0)
    return found


def _copy_buffers(root: nn.Module) -> None:
    """Copy what is no parameter from rank 0; UserError on all ranks where one has a tensor that rank 0 lacks."""
    world, own = current(), {slot.name: slot for slot in _slots(root) if slot.is_copied}
    kinds = world.on_main(lambda: {name: (slot.tensor.shape, slot.tensor.dtype) for name, slot in own.items()})
    for name, (shape, dtype) in kinds.items():
        like = torch.empty(shape, dtype=dtype, device="meta")
        x = _broadcast(own[name].tensor if world.is_main else None, like)
        if name in own:
            own[name].holder[own[name].key] = x
    world.each(lambda: _check_complete(root))


def _check_complete(root: nn.Module) -> None:
    for slot in _slots(root):
        if slot.tensor.is_meta:
            rank = current().rank
            raise UserError(f"torchrun: expected a tensor {slot.name!r} on rank 0, as on rank {rank}, got none")


def _bytes(x: Tensor) -> Tensor:
    """Return the memory of x as bytes: gloo does not know every dtype."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)
