"""The only place that writes weights: whole model directories, each there completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .config import require
from .models import Models

VALUE_FILE = "value_model.safetensors"


def save_models(models: Models, directory: Path) -> Path:
    """Write policy and tokenizer as `from_pretrained` reads them, and the value model's state dict beside them."""
    with atomic_directory(directory) as scratch, _no_progress_bars():
        models.policy.save_pretrained(scratch)
        models.tokenizer.save_pretrained(scratch)
        state = {name: value.contiguous() for name, value in models.value.state_dict().items()}
        require("safetensors.torch").save_file(state, scratch / VALUE_FILE)
    return directory


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place, flushed to disk, when the block succeeds.

    When the block fails nothing changes. An earlier `target` is moved aside first and removed last.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch, aside = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for path in sorted(scratch.rglob("*")):
            _fsync(path)
        _fsync(scratch)
        if target.exists():
            target.rename(aside)
        scratch.rename(target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the bar that transformers draws while it writes out of the console of the run."""
    bars = require("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
