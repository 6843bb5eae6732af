"""Networks and activations that wait in host memory while they are not used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

FEWEST_BYTES = 2**16  # of an activation that is worth a copy


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


def offload_activations(backbone: nn.Module, to_host: Callable[[Tensor], Tensor]) -> None:
    """Let the forward passes of a backbone with gradients keep in host memory what their backward passes need.

    Weights and tensors below 64 KiB stay. With gradient checkpointing that is the input of each layer, else all that
    its operations save. `torch.autograd.graph.save_on_cpu` would copy the weights as well.
    """
    blocks = list[contextlib.AbstractContextManager[object]]()

    def begin(*_: object) -> None:
        recorded = torch.is_grad_enabled()
        weights = {weight.untyped_storage()._cdata for weight in backbone.parameters()} if recorded else set()

        def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if x.nbytes < FEWEST_BYTES or x.untyped_storage()._cdata in weights:
                return x
            return x.device, to_host(x)

        block = saved_tensors_hooks(pack, _unpack) if recorded else contextlib.nullcontext()
        block.__enter__()
        blocks.append(block)

    backbone.register_forward_pre_hook(begin)
    backbone.register_forward_hook(lambda *_: blocks.pop().__exit__(None, None, None), always_call=True)


def to_pinned(x: Tensor) -> Tensor:
    """Copy to host memory, pinned if from a GPU; the copy is queued, not waited for."""
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=x.is_cuda)


def _unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, copy=True, non_blocking=True)
