"""What a run continues from, and what is told when a write fails."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import Checkpoint, fingerprint, latest, load_latest
from .configfile import config_from_dict, first_difference
from .errors import UserError, require
from .runlog import CHECKPOINTS


def load_start(config: Any, *free: str) -> Checkpoint:
    """The newest checkpoint of the run that `config` continues.

    UserError when `config` means another run: when it differs in other fields, or groups of fields, than the `free`.
    """
    start = load_latest(Path(config.log.dir) / CHECKPOINTS)
    saved = config_from_dict(start.state["config"], source="resume", kind=type(config))
    difference = first_difference(saved, config, free)
    if difference is not None:
        name, before, now = difference
        raise UserError(f"resume: {name}: expected {before!r} as in {str(start.directory)!r}, got {now!r}")
    return start


def inputs(model: nn.Module, data: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """What a resumed run reads anew and must find as it was when the run was begun, in short."""
    device, weights = next(model.parameters()).device.type, fingerprint(model)
    return {"kinds of device": device, "model weights": weights} | {name: _digest(rows) for name, rows in data.items()}


def _digest(rows: Iterable[Any]) -> str:
    """Equal for rows that are written alike."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def failed_writes_told(directory: Path) -> Iterator[None]:
    """UserError for a full disk and the like: what failed, and what is safe."""
    try:
        yield
    except (OSError, require("safetensors").SafetensorError) as error:
        newest = latest(directory / CHECKPOINTS)
        safe = f"{newest.name} is complete and resume continues there" if newest else "there is no checkpoint yet"
        raise UserError(f"cannot write in {str(directory)!r}: {error}; {safe}") from error
