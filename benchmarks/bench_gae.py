"""gae and gae_packed against the Python loop that trainers ship, one CPU thread or one GPU.

    pytest benchmarks/bench_gae.py --benchmark-json=benchmarks/results/DEVICE/gae.json
"""

import pytest
import torch
from conftest import check, paired_ratio
from torch import Tensor

import ppo_fast
from ppo_fast.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"512x1024": (512, 1024), "1024x128": (1024, 128), "64x512": (64, 512)}
if DEVICE == "cuda":
    SHAPES |= {"4096x128": (4096, 128), "8192x4096": (8192, 4096)}
GAMMA, LAM = 1.0, 0.95
CONTENDERS = ["python loop", *(b for b, state in ppo_fast.backends()["gae"].items() if state == "ok" and b != "torch")]


def python_loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The recursion as PPO trainers write it: one column of torch ops a step, no mask."""
    last, reversed_advantages = torch.zeros_like(rewards[:, 0]), []
    T = rewards.shape[1]
    for t in reversed(range(T)):
        next_values = values[:, t + 1] if t < T - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        last = delta + GAMMA * LAM * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def _inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    rewards, values = (torch.randn(shape, generator=generator, device=DEVICE) for _ in range(2))
    return rewards, values


def _measure(benchmark, shape, contender, run, rewards, values) -> None:
    truth = reference.gae(rewards.double(), values.double(), None, None, None, GAMMA, LAM, "carry")
    error = check(tuple(x.view(shape) for x in run()), truth, 1e-5)
    benchmark.extra_info |= {
        "contender": contender,
        "bytes": 16 * rewards.numel(),
        "error": error,
        "ratio": paired_ratio(run, lambda: python_loop(rewards, values)),
    }
    benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=3)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gae(benchmark, shape: tuple[int, int], contender: str) -> None:
    benchmark.group = f"gae {shape[0]}x{shape[1]}"
    rewards, values = _inputs(shape)
    if contender == "python loop":
        _measure(benchmark, shape, contender, lambda: python_loop(rewards, values), rewards, values)
    else:
        run = lambda: ppo_fast.gae(rewards, values, gamma=GAMMA, lam=LAM, backend=contender)  # noqa: E731
        _measure(benchmark, shape, contender, run, rewards, values)


@pytest.mark.parametrize("contender", CONTENDERS[1:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gae_packed(benchmark, shape: tuple[int, int], contender: str) -> None:
    benchmark.group = f"gae_packed {shape[0]}x{shape[1]}"
    rewards, values = _inputs(shape)
    cu_seqlens = torch.arange(0, rewards.numel() + 1, shape[1], device=DEVICE)
    flat = rewards.flatten(), values.flatten(), cu_seqlens
    run = lambda: ppo_fast.gae_packed(*flat, gamma=GAMMA, lam=LAM, backend=contender)  # noqa: E731
    _measure(benchmark, shape, contender, run, rewards, values)
