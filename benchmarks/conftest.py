"""What every benchmark shares: the machine's facts in the JSON, the correctness gate, paired ratios."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ppo_fast

Contender = Callable[[], Any]

# glibc gives large blocks back to the system at every free and pays page faults at every allocation, which inflates
# whoever allocates more by up to 3x: keep them in the heap (M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1).
if platform.system() == "Linux":
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


def device_name() -> str:
    """The GPU's model where there is one, else the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what a reader needs to judge a figure; never the host's name."""
    machine_info.clear()
    machine_info.update(
        device=device_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        ppo_fast=ppo_fast.__version__,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _seconds(run: Contender) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_ratio(contender: Contender, baseline: Contender, rounds: int = 7) -> float:
    """Median of baseline / contender over interleaved rounds: the machine's drift falls on both alike."""
    contender(), baseline()
    return statistics.median(_seconds(baseline) / _seconds(contender) for _ in range(rounds))


def check(actual: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...], tolerance: float) -> float:
    """The largest error against float64 truth, relative to its largest value; no figure of a wrong answer is kept."""
    error = max(((a.double() - t).abs().max() / t.abs().max()).item() for a, t in zip(actual, truth, strict=True))
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.2e}"
    return error
