"""AdamW on the weights, or on float32 master weights of 16-bit ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.integrity import copy_tensors, numbered
from ppo_fast.rlhf.training.state import State

_CHUNK = 2**28  # elements: 1 GiB


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, of all weights or of some."""

    found_inf: Tensor | None = None  # 0-d float32, 1: leave everything as it is; read by torch's step
    grad_scale: Tensor | None = None  # 0-d float32, divides the gradients; the same

    def __init__(self, weights: Iterable[Tensor], **options: Any) -> None:
        super().__init__(weights, fused=True, **options)

    def begin(self) -> None:
        """Begin a step."""

    def take(self, weights: Sequence[nn.Parameter]) -> None:
        """Take the step of these weights, those without a gradient excepted."""
        self._take(weights)

    def _take(self, own: Sequence[Tensor]) -> None:
        """Take the step of some of the optimizer's own tensors."""
        group = self.param_groups[0]
        everything, group["params"] = group["params"], own
        try:
            super().step()
        finally:
            group["params"] = everything
        # The fused kernel leaves version counters as they are, by which the products of adapters follow their weights.
        torch.autograd.graph.increment_version(own)


class MasterAdamW(AdamW):
    """AdamW on float32 copies of the weights; after each step the weights are the copies rounded to nearest.

    Float32 weights are their own masters.
    """

    def __init__(self, weights: Iterable[nn.Parameter], **options: Any) -> None:
        self.all = list(weights)
        masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.all]
        super().__init__(masters, **options)
        pairs = [(w, master) for w, master in zip(self.all, masters, strict=True) if master is not w]
        self.weights, self.masters = [w for w, _ in pairs], [master for _, master in pairs]
        self._master_of = dict(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        self.take(self.all)

    @torch.no_grad()
    def take(self, weights: Sequence[nn.Parameter]) -> None:
        given = [weight for weight in weights if weight.grad is not None]
        own = [weight for weight in given if weight not in self._master_of]
        self._take(own)
        for weight in own:
            weight.grad = None
        for chunk in _chunks(weight for weight in given if weight in self._master_of):
            masters = [self._master_of[weight] for weight in chunk]
            for master, gradient in zip(
                masters, _in_float32([weight.grad for weight in chunk if weight.grad is not None]), strict=True
            ):
                master.grad = gradient
            for weight in chunk:
                weight.grad = None
            self._take(masters)
            torch._foreach_copy_([*chunk], masters)
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


def _chunks(weights: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Split into lists of about `_CHUNK` elements: float32 gradients of 7 billion weights would take 28 GB."""
    chunk, size = list[nn.Parameter](), 0
    for weight in weights:
        chunk.append(weight)
        size += weight.numel()
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
