"""value_loss, clipped, forward and backward, against eager torch and torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from benchmarks import harness
from tests import eager

BACKENDS = [b for b in ("torch", "native", "triton") if ppo_fast.backends()["value_loss"].get(b) == "ok"]
SHAPES = {"64x512": (64, 512), "512x1024": (512, 1024)}


class Case:
    """One shape: inputs and contenders."""

    def __init__(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator(harness.DEVICE).manual_seed(0)
        self.values, self.returns, self.old, noise = (
            torch.randn(shape, generator=generator, device=harness.DEVICE) for _ in range(4)
        )
        self.mask = noise > -1.0
        self.compiled = harness.compiled(eager.value_loss)

    def run(self, contender: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The gradient of the values."""
        values = self.values.to(dtype).detach().requires_grad_()
        inputs = values, self.returns.to(dtype), self.mask
        options: dict[str, Any] = {"old_values": self.old.to(dtype), "clip": 0.2}
        if contender in BACKENDS:
            loss = ppo_fast.value_loss(*inputs, backend=contender, **options).loss
        else:
            loss = (self.compiled if contender == "torch.compile" else eager.value_loss)(*inputs, **options)
        (gradient,) = torch.autograd.grad(loss, values)
        return gradient


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("contender", ["eager", "torch.compile", *BACKENDS])
def test_value_loss(benchmark: Any, shape: tuple[int, int], contender: str) -> None:
    benchmark.group = f"forward+backward, {shape[0]}x{shape[1]} float32"
    case = Case(shape)
    error = harness.relative_error(case.run(contender), case.run("eager", torch.float64))
    others = {name: lambda name=name: case.run(name) for name in ("eager", "torch.compile")}
    harness.measure(
        benchmark,
        lambda: case.run(contender),
        others if contender in BACKENDS else {},
        contender=contender,
        moved=17 * case.values.numel(),
        error=error,
        allowed_error=1e-5,
    )
