"""Record when each storage is allocated and freed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_DEVICE, _READ = torch.ops.prim.device.default, torch.ops.aten._local_scalar_dense.default
Breakdown = dict[str, int]  # bytes by item


@dataclass
class Block:
    """Bytes that are alive from one tick of the clock to another, both included."""

    bytes: int
    item: str | None  # None: not on the device
    born: int
    died: int | None = None  # None: still alive


class Timeline(TorchDispatchMode):
    """Keeps the life of every storage that an operation in its `with` block makes, fake tensors' too.

    A tick of the clock is one operation. Memory that an operation holds only while it runs is not seen;
    `op_workspace(operation, arguments)` adds it, in bytes. Of a tensor with a name, this GPU has `share(item, tensor)`
    bytes.
    """

    def __init__(
        self,
        op_workspace: Callable[[OpOverload, Sequence[object]], Breakdown],
        share: Callable[[str | None, Tensor], int] = lambda item, tensor: tensor.untyped_storage().nbytes(),
    ) -> None:
        super().__init__()
        self.op_workspace, self.share = op_workspace, share
        self.now, self.blocks, self.phases = 0, list[Block](), list[tuple[str, int, int]]()
        self.trace: list[tuple[object, int]] = [("start", 0)]  # the operation of each tick, and the bytes it returned
        self._block_of = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # half of all calls on fake tensors, and nothing is made
            return args[0].fake_device
        if func is _READ and args[0].dtype == torch.bool:
            # transformers 4 asks whether a mask is all True, so that none need be made: there may be padding.
            return False
        output = func(*args, **(kwargs or {}))
        self.now += 1
        returned = 0
        for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(leaf, Tensor):
                returned += self._see(leaf).bytes
        self.trace.append((func, returned))
        for item, count in self.op_workspace(func, args).items():
            self.blocks.append(Block(count, item, self.now, self.now))
        return output

    def _see(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        if storage not in self._block_of:
            block = Block(storage.nbytes(), "activations", self.now)
            self._block_of[storage] = block
            self.blocks.append(block)
            weakref.finalize(storage, self._on_free, block).atexit = False
        return self._block_of[storage]

    def _on_free(self, block: Block) -> None:
        block.died = self.now

    def name(self, item: str | None, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as `item`, from their birth on."""
        for tensor in tensors:
            block = self._see(tensor)
            block.item, block.bytes = item, self.share(item, tensor)

    def on_device(self, tensor: Tensor) -> int:
        """Bytes of a tensor on the device."""
        block = self._see(tensor)
        return 0 if block.item is None else block.bytes

    @contextlib.contextmanager
    def phase(self, name: str, **held: int) -> Iterator[None]:
        """The operations of the block are a phase; `held` are bytes by item that are alive throughout."""
        self.now += 1
        self.trace.append((name, 0))
        start = self.now
        try:
            yield
        finally:
            self.phases.append((name, start, self.now))
            self.blocks += [Block(count, item, start, self.now) for item, count in held.items() if count]

    @property
    def host(self) -> int:
        """Bytes that are not on the device, and alive."""
        return sum(block.bytes for block in self.blocks if block.item is None and block.died is None)

    def peaks(self) -> dict[str, Breakdown]:
        """The items at the moment of each phase when their sum is largest; of phases of one name, the largest."""
        alive, found = self.usage(), dict[str, Breakdown]()
        for name, start, stop in self.phases:
            at = start + int(sum(alive.values(), np.zeros(self.now + 2, dtype=np.int64))[start : stop + 1].argmax())
            breakdown = {item: int(count[at]) for item, count in alive.items() if count[at]}
            found[name] = max(breakdown, found.get(name, {}), key=lambda items: sum(items.values()))
        return found

    def usage(self) -> dict[str, npt.NDArray[np.int64]]:
        """Bytes [ticks] by item."""
        changes = {block.item: np.zeros(self.now + 2, dtype=np.int64) for block in self.blocks if block.item}
        for block in self.blocks:
            if block.item is not None:
                changes[block.item][block.born] += block.bytes
                changes[block.item][self.now + 1 if block.died is None else block.died + 1] -= block.bytes
        return {item: change.cumsum() for item, change in changes.items()}
