"""AdamW for 16-bit weights without float32 copies: moments of 8 bits and stochastic rounding."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ppo_fast.ops._backends.reference import adamw_8bit as reference
from ppo_fast.ops._backends.reference.adamw_8bit import BLOCK, MEANS, ROOTS, AdamWStep, Moments
from ppo_fast.rlhf.integrity import copy_tensors
from ppo_fast.rlhf.split import Rows
from ppo_fast.rlhf.training.state import State

SMALLEST = 4096  # weights of fewer numbers, such as norms and biases, keep moments of 32 bits
CHUNK = 2**24  # numbers in a pass of the reference: its float32 copies are gone before the next one's are made


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise moments of 8 bits, computed in float32; bfloat16 weights are rounded stochastically.

    A bfloat16 weight moves to one of its two neighbors with the probability that makes it right in the mean, so that
    steps too small for it are not lost. The noise is a hash of the number of the step, the weight and the element.
    Gradients are divided by `grad_scale`. Where `found_inf` is 1, weights, moments and their count stay as they are.
    On a GPU a weight's step is one kernel, and the weights below 4,096 numbers take theirs together.

    Not bitsandbytes, which rounds to nearest, nor torchao, which compiles for each shape (7 s), has no such flag and
    draws from the global generator.
    """

    found_inf: Tensor | None = None  # 0-d float32, 1: leave everything as it is
    grad_scale: Tensor | None = None  # 0-d float32

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rows: Sequence[Rows | None] | None = None,
    ) -> None:
        """Make the moments; `rows`: those of a weight that is split over ranks, by weight."""
        weights = list(weights)
        self.rows = list(rows or [None] * len(weights))
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.taken = torch.zeros((), dtype=torch.float32, device=weights[0].device)  # steps that changed the weights
        self.draws = 0  # steps
        self.state.update({w: new_moments(w, part) for w, part in zip(weights, self.rows, strict=True)})
        self.first = max((part.start for part in self.rows if part is not None), default=0)  # differs between ranks
        self.index = {weight: index for index, weight in enumerate(weights)}
        self.kernel = find_kernel(weights[0].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        self.begin()
        self.take(self.param_groups[0]["params"])

    @torch.no_grad()
    def take(self, weights: Sequence[nn.Parameter]) -> None:
        """Take the step of these weights, those without a gradient excepted."""
        step, small = self.current, dict[torch.dtype, list[nn.Parameter]]()
        if self.found_inf is not None:
            step.scalars[4].copy_(self.found_inf)
        for weight in weights:
            if weight.grad is None or not weight.numel():
                continue
            moments = Moments(**self.state[weight])
            if moments.mean_scale is None:
                small.setdefault(weight.dtype, []).append(weight)
            else:
                flat = weight.detach().view(-1), weight.grad.contiguous().view(-1)
                self.kernel(*flat, moments, step, self._seed(self.index[weight]))
                torch.autograd.graph.increment_version(weight)  # a kernel of Triton does not
        for dtype, weights in small.items():
            self._step_together(weights, step, self._seed(dtype))

    @torch.no_grad()
    def begin(self) -> None:
        """Begin a step: count it and make its numbers on the device; the host waits for nothing."""
        group, count = self.param_groups[0], self.taken
        keep = torch.zeros_like(count) if self.found_inf is None else self.found_inf
        factor = torch.ones_like(count) if self.grad_scale is None else self.grad_scale.reciprocal()
        self.draws += 1
        count += 1 - keep
        (beta1, beta2), lr = group["betas"], torch.full_like(count, group["lr"])
        scalars = factor, 1 - lr * group["weight_decay"], lr / (1 - beta1**count), (1 - beta2**count).rsqrt(), keep
        self.current = AdamWStep(torch.stack(scalars), beta1, beta2, group["eps"])

    def _step_together(self, weights: list[nn.Parameter], step: AdamWStep, seed: int) -> None:
        """Take the step of weights of one dtype as that of one vector."""
        parts = [
            [weight.detach().view(-1) for weight in weights],
            [weight.grad.reshape(-1) for weight in weights if weight.grad is not None],
            *([self.state[weight][name] for weight in weights] for name in ("mean", "root")),
        ]
        flat, gradient, mean, root = (torch.cat(part) for part in parts)
        reference.adamw_8bit(flat, gradient, Moments(mean, root), step, seed)
        sizes = [len(part) for part in parts[0]]
        for part, changed in ((parts[0], flat), (parts[2], mean), (parts[3], root)):
            torch._foreach_copy_(part, changed.split(sizes))

    def _seed(self, name: object) -> int:
        """Return the seed of the noise of a weight, or of the small ones of a dtype, in this step."""
        rank = f" {self.first}" if self.first else ""
        digest = hashlib.blake2b(f"{self.draws} {name}{rank}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") >> 1

    def state_dict(self) -> State:
        moments = [self.state[weight] for weight in self.param_groups[0]["params"]]
        return {"taken": self.taken, "draws": self.draws, "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: State) -> None:
        self.taken.copy_(state_dict["taken"])
        self.draws = state_dict["draws"]
        for weight, saved in zip(self.param_groups[0]["params"], state_dict["moments"], strict=True):
            own = self.state[weight]
            copy_tensors(own, as_kept(saved, coded="mean_scale" in own), "resume: optimizer state")


def find_kernel(device: torch.device) -> Callable[..., None]:
    """Return the function that takes the step of a large weight on that device."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from ppo_fast.ops._backends.triton.adamw_8bit import adamw_8bit

        return adamw_8bit
    return in_chunks


def in_chunks(weight: Tensor, gradient: Tensor, moments: Moments, step: AdamWStep, seed: int) -> None:
    """Take the step of the reference, `CHUNK` numbers at a time."""
    for first in range(0, len(weight), CHUNK):
        numbers, blocks = slice(first, first + CHUNK), slice(first // BLOCK, (first + CHUNK) // BLOCK)
        scales = (scale[blocks] for scale in moments[2:] if scale is not None)
        part = Moments(moments.mean[numbers], moments.root[numbers], *scales)
        reference.adamw_8bit(weight[numbers], gradient[numbers], part, step, seed, first)


def as_kept(moments: dict[str, Tensor], *, coded: bool) -> dict[str, Tensor]:
    """Return saved moments in 8 bits or in float32: another number of ranks may keep them otherwise."""
    if coded == ("mean_scale" in moments):
        return moments
    highest = {"mean": MEANS, "root": ROOTS}
    if not coded:
        return {name: reference.decode(moments[name], moments[f"{name}_scale"], high) for name, high in highest.items()}
    (mean, mean_scale), (root, root_scale) = (reference.encode(moments[name], high) for name, high in highest.items())
    scales = {"mean_scale": mean_scale, "root_scale": root_scale}
    return {"mean": mean.to(torch.int8), "root": root.to(torch.uint8)} | scales


def new_moments(weight: Tensor, rows: Rows | None = None) -> dict[str, Tensor]:
    """Return mean and root mean square of the gradients, all 0: codes [n] with scales [n / 256], or float32 [n].

    `rows` are those of the whole weight. All ranks decide alike, and no block crosses from one rank to another.
    """
    size, device = weight.numel(), weight.device
    row = weight[:1].numel() if rows is None or not size else size // len(weight)
    whole, each = (size, 0) if rows is None else (rows.total * row, rows.each * row)
    if whole < SMALLEST or whole % BLOCK or each % BLOCK:
        return {name: torch.zeros(size, dtype=torch.float32, device=device) for name in ("mean", "root")}
    codes = {"mean": torch.int8, "root": torch.uint8}
    scales = {f"{name}_scale": torch.zeros(size // BLOCK, dtype=torch.float32, device=device) for name in codes}
    return {name: torch.zeros(size, dtype=dtype, device=device) for name, dtype in codes.items()} | scales
