"""The machine a run is on: device, threads, precision, clock, disk, and where an error happened."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .config import AdamWConfig
from .errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there completely or as it was before, even after a crash or on a full disk."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    scratch = path.with_name(f".{path.name}.new")
    try:
        with scratch.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def write_result(command: str, path: Path, content: str | bytes) -> None:
    """`write_whole` in a directory that is made if need be; UserError, naming `command`, where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{command}: cannot write {str(path)!r}: {error.strerror}") from error


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a directory or a link, if it is there; what a link names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(OSError if ignore_errors else FileNotFoundError):
        path.unlink()


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
def named(where: str) -> Iterator[None]:
    """Put `where` in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


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
    kept = config.masters or config.states == "8bit"
    if not kept and any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        warnings.warn(
            f"a bfloat16 weight w keeps no step below |w| / 512, and AdamW's are about optim.lr = {config.lr:g}; "
            "set optim.masters to true, optim.states to '8bit' or model.dtype to float32 unless the run learns",
            stacklevel=3,
        )
