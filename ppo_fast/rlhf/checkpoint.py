"""The only place that writes weights: whole model directories, each there completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import require
from .models import VALUE_CONFIG, VALUE_FILE, Models, no_progress_bars


def save_models(models: Models, directory: Path) -> Path:
    """Write policy and tokenizer as `from_pretrained` reads them, and beside them what `model.value_path` reads."""
    with atomic_directory(directory) as scratch, no_progress_bars():
        models.policy.save_pretrained(scratch)
        models.tokenizer.save_pretrained(scratch)
        state = {name: value.contiguous() for name, value in models.value.state_dict().items()}
        require("safetensors.torch").save_file(state, scratch / VALUE_FILE)
        models.value.backbone.config.to_json_file(scratch / VALUE_CONFIG)
    return directory


def save_model(model: Any, tokenizer: Any, directory: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a model and its tokenizer as `from_pretrained` reads them, and beside them `extra`: file name -> JSON."""
    with atomic_directory(directory) as scratch, no_progress_bars():
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name, content in (extra or {}).items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place, flushed to disk, when the block succeeds.

    When the block or the exchange fails nothing changes. An earlier `target` is moved aside first and removed last.
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
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
