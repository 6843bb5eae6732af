"""The machine a run is on: device, threads, precision, clock, disk, and where an error happened."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ppo_fast.rlhf.config.ppo import AdamWConfig
from ppo_fast.rlhf.errors import UserError


class Stopwatch:
    """Wall seconds by stage name; waits for the device at the end of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = time.perf_counter() - start


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
    """The device of that name, "auto": a GPU if there is one; UserError, naming `setting`, when there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    usable = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    usable += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in usable:
        raise UserError(f"{setting}: expected 'auto' or one of {', '.join(map(repr, usable))}, got {name!r}")
    return torch.device(name)


def warn_about_precision(model: Any, config: AdamWConfig) -> None:
    """Warn once when bfloat16 weights are to take steps that they may round away."""
    kept = config.master_weights or config.name == "adamw_8bit"
    if not kept and any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        warnings.warn(
            f"a bfloat16 weight w keeps no step below |w| / 512, and AdamW's are about optim.lr = {config.lr:g}; "
            "set optim.master_weights to true, optim.name to 'adamw_8bit' or model.dtype to float32 unless the run "
            "learns",
            stacklevel=3,
        )
