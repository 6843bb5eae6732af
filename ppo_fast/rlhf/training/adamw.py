"""AdamW for 16-bit weights with float32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.integrity import copy_tensors, numbered
from ppo_fast.rlhf.training.state import State

_CHUNK = 2**28  # elements: 1 GiB


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of the weights; after each step the weights are the copies rounded to nearest.

    Float32 weights are their own masters.
    """

    def __init__(self, weights: Iterable[nn.Parameter], **options: Any) -> None:
        weights = list(weights)
        masters = [w if w.dtype == torch.float32 else w.detach().float() for w in weights]
        super().__init__(masters, fused=True, **options)
        pairs = [(w, master) for w, master in zip(weights, masters, strict=True) if master is not w]
        self.weights, self.masters = [w for w, _ in pairs], [master for _, master in pairs]
        self._own = [w for w in weights if w.dtype == torch.float32]
        self._chunks = list(_chunks(pairs))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        super().step(closure)  # of float32 weights; weights without a gradient are skipped
        for own in self._own:
            own.grad = None
        for chunk in self._chunks:
            given = [(weight, master) for weight, master in chunk if weight.grad is not None]
            if not given:
                continue
            weights, masters = map(list, zip(*given, strict=True))
            for master, gradient in zip(masters, _in_float32([weight.grad for weight in weights]), strict=True):
                master.grad = gradient
            for weight in weights:
                weight.grad = None
            super().step()
            torch._foreach_copy_(weights, masters)
            for master in masters:
                master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> State:
        return super().state_dict() | {"masters": self.masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: State) -> None:
        rest = dict(state_dict)
        copy_tensors(numbered(self.masters), numbered(rest.pop("masters")), "resume: master weights")
        super().load_state_dict(rest)


def _in_float32(tensors: list[Tensor]) -> list[Tensor]:
    """Return float32 copies, on a GPU by one kernel for many."""
    copies = [torch.empty_like(x, dtype=torch.float32) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _chunks(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Split into lists of about `_CHUNK` elements: float32 gradients of 7 billion weights would take 28 GB."""
    chunk, size = list[tuple[Tensor, Tensor]](), 0
    for pair in pairs:
        chunk.append(pair)
        size += pair[0].numel()
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk
