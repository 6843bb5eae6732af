"""gae and gae_packed against the Python loop that trainers ship."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from benchmarks import harness
from tests import eager

SHAPES = {"512x1024": (512, 1024), "1024x128": (1024, 128), "64x512": (64, 512)}
if harness.DEVICE == "cuda":
    SHAPES |= {"4096x128": (4096, 128), "8192x4096": (8192, 4096)}
BACKENDS = [b for b in ("native", "cuda", "triton") if ppo_fast.backends()["gae"].get(b) == "ok"]
LOOP = "Python loop"


def _inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, device=harness.DEVICE) for _ in range(2))  # type: ignore[return-value]


def _measure(benchmark: Any, contender: str, run: harness.Run, rewards: Tensor, values: Tensor) -> None:
    truth = eager.gae(rewards.double(), values.double())
    error = max(harness.relative_error(a.view(rewards.shape), t) for a, t in zip(run(), truth, strict=True))
    baselines = {} if contender == LOOP else {LOOP: lambda: eager.gae(rewards, values)}
    moved = 4 * rewards.nbytes
    harness.measure(benchmark, run, baselines, contender=contender, moved=moved, error=error, allowed_error=1e-5)


@pytest.mark.parametrize("contender", [LOOP, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gae(benchmark: Any, shape: tuple[int, int], contender: str) -> None:
    benchmark.group = f"gae {shape[0]}x{shape[1]}"
    rewards, values = _inputs(shape)

    def run() -> tuple[Tensor, Tensor]:
        if contender == LOOP:
            return eager.gae(rewards, values)
        return ppo_fast.gae(rewards, values, backend=contender)

    _measure(benchmark, contender, run, rewards, values)


@pytest.mark.parametrize("contender", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gae_packed(benchmark: Any, shape: tuple[int, int], contender: str) -> None:
    benchmark.group = f"gae_packed {shape[0]}x{shape[1]}"
    rewards, values = _inputs(shape)
    cu_seqlens = torch.arange(0, rewards.numel() + 1, shape[1], device=harness.DEVICE)
    packed = rewards.flatten(), values.flatten(), cu_seqlens
    _measure(benchmark, contender, lambda: ppo_fast.gae_packed(*packed, backend=contender), rewards, values)
