"""Networks that wait in host memory while they are not used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn


class Offloaded:
    """A frozen network whose weights are on the device only within `present()`.

    The copy in host memory is the master: changes made outside of the block last, changes made inside are lost. Host
    memory is pinned if the device is a GPU, so that copies run at full speed.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device, self._depth = network, device, 0
        self._tensors = [*chain(network.parameters(), network.buffers())]
        self._host = [self._in_host_memory(tensor) for tensor in self._tensors]
        self._point_at(self._host)

    @contextlib.contextmanager
    def present(self) -> Iterator[nn.Module]:
        """The network on the device; the outermost of nested blocks brings it there and takes it away."""
        self._depth += 1
        try:
            if self._depth == 1:
                self._point_at(host.to(self.device, non_blocking=True, copy=True) for host in self._host)
            yield self.network
        finally:
            self._depth -= 1
            if not self._depth:
                self._point_at(self._host)

    def _in_host_memory(self, tensor: Tensor) -> Tensor:
        host = tensor.detach().cpu()
        return host.pin_memory() if self.device.type == "cuda" else host

    def _point_at(self, values: Iterable[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data = value
