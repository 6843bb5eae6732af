"""The machine a run is on: device, threads, precision, clock and peak memory."""

from __future__ import annotations

import contextlib
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import record_function

from ppo_fast.rlhf.config.optim import AdamWConfig
from ppo_fast.rlhf.errors import UserError


class PhaseMemory(NamedTuple):
    """Peak bytes of the GPU's allocator within a phase."""

    allocated: int
    reserved: int


class Stopwatch:
    """Wall seconds by phase of a step; waits for the device at the end of a phase, and marks it for torch.profiler.

    With `peaks` it also keeps the peak memory of each phase on a GPU. That resets the statistics of torch's allocator.
    """

    def __init__(self, device: torch.device, *, peaks: bool = False) -> None:
        self.device, self.peaks = device, peaks and device.type == "cuda"
        self.highest = 0  # bytes, before the latest reset
        self.show: Callable[..., None] = lambda phase, done=0, total=0: None  # is called as phases begin and go on
        self.phase = ""
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, PhaseMemory] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase = phase
        self.show(phase)
        if self.peaks:
            self.highest = max(self.highest, torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        with record_function(f"phase {phase}"):
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = time.perf_counter() - start
        if self.peaks:
            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            self.memory[phase] = PhaseMemory(allocated(self.device), reserved(self.device))

    def progress(self, done: int, total: int) -> None:
        """Show how much of the phase is done."""
        self.show(self.phase, done, total)

    def peak(self) -> float:
        """Peak GiB so far: of the allocator on a GPU, of the process on a CPU."""
        if self.device.type == "cuda":
            return max(self.highest, torch.cuda.max_memory_allocated(self.device)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set the CPU threads of torch for the block; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(name: str, setting: str = "model.device") -> torch.device:
    """Return the device of that name, "auto": a GPU if there is one; UserError, naming `setting`, if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    usable = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    usable += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in usable:
        raise UserError(f"{setting}: expected 'auto' or one of {', '.join(map(repr, usable))}, got {name!r}")
    return torch.device(name)


def warn_about_precision(model: nn.Module, config: AdamWConfig) -> None:
    """Warn when 16-bit weights may round their steps away."""
    kept = {"adamw": (), "adamw_8bit": (torch.bfloat16,)}[config.name]
    lost = {torch.bfloat16: 512, torch.float16: 4096}  # by rounding to nearest, of a weight
    found = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in lost and p.dtype not in kept}
    for dtype in () if config.master_weights else sorted(found, key=str):
        name = str(dtype).removeprefix("torch.")
        others = "optim.name to 'adamw_8bit' or " if dtype == torch.bfloat16 else "or "
        warnings.warn(
            f"a {name} weight w keeps no step below |w| / {lost[dtype]}, and AdamW's are about optim.lr = "
            f"{config.lr:g}; set optim.master_weights to true, {others}model.dtype to float32 unless the run learns",
            stacklevel=3,
        )
