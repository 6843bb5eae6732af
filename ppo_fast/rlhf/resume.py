"""What a PPO run continues from, and what is told when a write fails."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, fingerprint, latest, load_latest
from .config import PPOConfig
from .configfile import config_from_dict, first_difference
from .data import Prompts
from .errors import UserError, require
from .models import Models
from .runlog import CHECKPOINTS


def load_start(config: PPOConfig) -> Checkpoint:
    """The newest checkpoint of the run that `config` continues; UserError when `config` means another run."""
    start = load_latest(Path(config.log.dir) / CHECKPOINTS)
    saved: PPOConfig = config_from_dict(start.state["config"])
    done = start.state["log"]["done"]
    free = dataclasses.replace(saved, updates=config.updates, log=config.log)
    difference = first_difference(free, config)
    if difference is not None:
        name, before, now = difference
        raise UserError(f"resume: {name}: expected {before!r} as in {str(start.directory)!r}, got {now!r}")
    if config.updates < done:
        raise UserError(f"resume: updates: expected at least the {done} that are done, got {config.updates}")
    return start


def inputs(models: Models, data: Prompts) -> dict[str, Any]:
    """What a resumed run reads anew and must find as it was when the run was begun, in short."""
    prompts = hashlib.sha256(json.dumps(data.token_ids).encode()).hexdigest()
    return {"model weights": fingerprint(models.reference), "prompts": prompts}


@contextlib.contextmanager
def failed_writes_told(directory: Path) -> Iterator[None]:
    """UserError for a full disk and the like: what failed, and what is safe."""
    try:
        yield
    except (OSError, require("safetensors").SafetensorError) as error:
        newest = latest(directory / CHECKPOINTS)
        safe = f"{newest.name} is complete and resume continues there" if newest else "there is no checkpoint yet"
        raise UserError(f"cannot write in {str(directory)!r}: {error}; {safe}") from error
