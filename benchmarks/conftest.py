"""The machine's facts in the JSON, a heap without page faults, one CPU thread."""

import ctypes
import platform
from typing import Any

import pytest
import torch

import ppo_fast
from benchmarks import harness

# glibc gives large blocks back to the system at every free and pays page faults at every allocation, which inflates
# whoever allocates more by up to 3x: keep them in the heap (M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1).
if platform.system() == "Linux":
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


def device_name() -> str:
    """The GPU's model where there is one, else the CPU's."""
    if harness.DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what a reader needs to judge a figure; never the host's name."""
    machine_info.clear()
    machine_info.update(
        device=device_name(),
        threads=1,
        python=platform.python_version(),
        torch=torch.__version__,
        ppo_fast=ppo_fast.__version__,
        copy_bandwidth=harness.copy_bandwidth(),
        read_bandwidth=harness.read_bandwidth(),
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
