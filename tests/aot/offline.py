"""Compiles what the launchers launch, for any architecture, without a GPU."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ppo_fast.ops._backends.triton import tuning

SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
# Bytes of shared memory a thread block can ask for (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_devices = itertools.count(1000)


class _Driver:
    """Stands for a machine with one device of a given target. Triton keeps one cache of kernels by device number."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, next(_devices)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, a launch on CPU tensors compiles its kernel for ``target`` and runs nothing. Yields the kernels."""
    launched: list[Any] = []
    run, previous = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert len(grid) == 1
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    capability = divmod(target.arch, 10) if target.backend == "cuda" else (9, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(tuning, "capability", lambda device: capability)
        driver.set_active(_Driver(target))
        try:
            yield launched
        finally:
            driver._active = previous


def resources(kernel: Any) -> dict[str, int]:
    """REG (registers per thread), STACK (bytes spilled per thread) and SHARED of a compiled CUDA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", report)}
