"""AdamW for 16-bit weights: with float32 master weights, or with 8-bit moments and stochastic rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.integrity import copy_tensors, numbered
from ppo_fast.rlhf.training.state import State

BLOCK = 256  # moments that share a scale
SMALLEST = 4096  # weights of fewer numbers, such as norms and biases, keep moments of 32 bits
CHUNK = 2**24  # numbers in a pass: its float32 copies are gone before the next one's are made


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
            for weight, master in chunk:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            super().step()
            for weight, master in chunk:
                weight.copy_(master)
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


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise moments of 8 bits, computed in float32; bfloat16 weights are rounded stochastically.

    A bfloat16 weight moves to one of its two neighbors with the probability that makes it right in the mean, so that
    steps too small for it are not lost. The noise is the optimizer's own and saved with it. Where `found_inf` is 1,
    weights, moments and their count stay as they are; the noise moves on.

    Not bitsandbytes, which rounds to nearest, nor torchao, which compiles for each shape (7 s), has no such flag and
    draws from the global generator.

    Source: Dettmers et al. 2021, arXiv:2110.02861, for the codes. The second moment is kept by its root, which has half
    the decades: where gradients of a block differ by e^6, weights end 5 % of their way off AdamW's, by the square 60 %.
    """

    found_inf: Tensor | None = None  # 0-d float32, 1: leave everything as it is

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        weights = list(weights)
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.device = weights[0].device
        self.taken = torch.zeros((), dtype=torch.float32, device=self.device)  # steps
        self.noise = torch.Generator(self.device).manual_seed(0)
        self.state.update({weight: new_moments(weight) for weight in weights})
        self.codes = {name: code_book(signed=name == "mean").to(self.device) for name in ("mean", "root")}
        # One graph for all sizes; on a CPU the compiler would take longer than the steps of a small model.
        one_pass = functools.partial(_pass, betas=betas, eps=eps, weight_decay=weight_decay)
        self.one_pass = torch.compile(one_pass, dynamic=True) if self.device.type == "cuda" else one_pass

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        group = self.param_groups[0]
        keep = torch.zeros_like(self.taken) if self.found_inf is None else self.found_inf
        self.taken += 1 - keep
        rate = torch.full_like(self.taken, group["lr"])  # a fill: the host does not wait for a copy
        for weight in group["params"]:
            if weight.grad is not None:
                self._step(weight, self.state[weight], rate, keep > 0)

    def _step(self, weight: Tensor, moments: dict[str, Tensor], rate: Tensor, keep: Tensor) -> None:
        flat = [weight.detach().view(-1), weight.grad.contiguous().view(-1)]  # type: ignore[union-attr]  # has one
        parts = [part.split(CHUNK) for part in flat]
        kept = {name: part.split(max(1, CHUNK * len(part) // weight.numel())) for name, part in moments.items()}
        for index, (values, gradient) in enumerate(zip(*parts, strict=True)):
            noise = None
            if weight.dtype == torch.bfloat16:
                noise = torch.empty_like(values, dtype=torch.int16).random_(-(2**15), 2**15, generator=self.noise)
            self.one_pass(
                values,
                gradient,
                {name: part[index] for name, part in kept.items()},
                noise,
                self.codes,
                self.taken,
                rate,
                keep,
            )

    def state_dict(self) -> State:
        moments = [self.state[weight] for weight in self.param_groups[0]["params"]]
        return {"taken": self.taken, "noise": self.noise.get_state(), "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: State) -> None:
        self.taken.copy_(state_dict["taken"])
        self.noise.set_state(state_dict["noise"].cpu())
        for weight, saved in zip(self.param_groups[0]["params"], state_dict["moments"], strict=True):
            copy_tensors(self.state[weight], saved, "resume: optimizer state")


def new_moments(weight: Tensor) -> dict[str, Tensor]:
    """Return mean and root mean square of the gradients, all 0: codes [n] with scales [n / 256], or [n]."""
    size, device = weight.numel(), weight.device
    if size < SMALLEST or size % BLOCK:
        return {name: torch.zeros(size, dtype=torch.float32, device=device) for name in ("mean", "root")}
    # What stands for 0: there are as many negative codes as positive ones below 1.
    zeros = {"mean": 127, "root": 0}
    codes = {name: torch.full((size,), zero, dtype=torch.uint8, device=device) for name, zero in zeros.items()}
    scales = {f"{name}_scale": torch.zeros(size // BLOCK, dtype=torch.float32, device=device) for name in codes}
    return codes | scales


def code_book(*, signed: bool) -> Tensor:
    """Return the 256 numbers of the codes, rising from -1 or 0 to 1 over 7 decades, the higher the finer."""
    decades = []
    for decade in range(7):
        count = 2 ** (decade + (not signed)) + 1
        edges = torch.linspace(0.1, 1, count, dtype=torch.float64, device="cpu")
        decades.append(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    return torch.cat([-positive, positive, ends] if signed else [positive, ends]).sort().values.float()


def encode(values: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [n] uint8 nearest to values [n] in the `book`, and the scales [n / 256] float32 of blocks."""
    blocks = values.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1).clamp_min(1e-30)
    codes = torch.bucketize(blocks / scale[:, None], (book[1:] + book[:-1]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1), scale


def decode(codes: Tensor, scale: Tensor, book: Tensor) -> Tensor:
    """Return the values [n] float32 of codes [n]."""
    return (book[codes.int()].view(-1, BLOCK) * scale[:, None]).view(-1)


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 `values` [n] to a neighboring bfloat16, unbiased; noise [n] int16 is uniform."""
    # A bfloat16 is the upper half of a float32: the carry of the lower halves is the rounding.
    bits = values.view(torch.int32) + (noise.int() & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


def _pass(
    weight: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    noise: Tensor | None,
    books: dict[str, Tensor],
    taken: Tensor,
    rate: Tensor,
    keep: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take step `taken` of `weight` [n] and its moments in place; if `keep`, a 0-d bool, change nothing."""
    (beta1, beta2), gradient = betas, gradient.float()
    old = {n: decode(moments[n], moments[f"{n}_scale"], books[n]) if len(moments) == 4 else moments[n] for n in books}
    mean = old["mean"].lerp(gradient, 1 - beta1)
    root = old["root"].square().lerp(gradient.square(), 1 - beta2).sqrt()
    size = root / (1 - beta2**taken).sqrt() + eps
    value = weight.float() * (1 - rate * weight_decay) - rate / (1 - beta1**taken) * mean / size
    new = {"mean": mean, "root": root}
    if len(moments) == 4:
        for name, part in (("mean", mean), ("root", root)):
            new[name], new[f"{name}_scale"] = encode(part, books[name])
    for name, part in moments.items():
        part.copy_(torch.where(keep, part, new[name]))
    weight.copy_(torch.where(keep, weight, value.to(weight.dtype) if noise is None else rounded(value, noise)))
