"""Where a run continues, the inputs it must find again, and the message when a write fails."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import nn

from ppo_fast.rlhf.config.files import config_from_dict, first_difference
from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import SupervisedConfig
from ppo_fast.rlhf.data.prompts import Prompts
from ppo_fast.rlhf.errors import UserError, origin_of, with_origin
from ppo_fast.rlhf.models.kernels import kernels_of
from ppo_fast.rlhf.training.checkpoint import Checkpoint, latest, load_checkpoint
from ppo_fast.rlhf.training.log import CHECKPOINTS
from ppo_fast.rlhf.training.state import State, fingerprint
from ppo_fast.rlhf.user_code import source_of, to_python
from ppo_fast.rlhf.world import current

Weights = TypeVar("Weights", bound=WeightsConfig)
KERNELS = "kernels of the model"  # in `inputs`
FREE = (
    "output_dir",
    "overwrite",
    "max_hours",
    "ddp_timeout",
    "push_to_hub",
    "checkpoint",
    "log",
)  # fields and groups that a resumed run may change


def load_start(config: PPOConfig | SupervisedConfig, resume: bool | str, *free: str) -> Checkpoint | None:
    """Load the checkpoint that a run continues: none for False, the newest for True, else the one of that name.

    UserError when `config` differs in fields or groups other than `FREE` and `free`, or when the files of the run are
    shorter than at the checkpoint.
    """
    if resume in (False, None):  # an empty name is a mistake, not a new run
        return None
    world, found = current(), list[Checkpoint]()

    def load() -> None:
        found.append(_load_start(config, resume, *free))

    world.on_main(load)  # checks the files before the others read them, each what it needs
    world.each(load if not world.is_main else lambda: None)
    return found[0]


def _load_start(config: PPOConfig | SupervisedConfig, resume: bool | str, *free: str) -> Checkpoint:
    checkpoints, name = Path(config.output_dir) / CHECKPOINTS, resume if isinstance(resume, str) else None
    start = load_checkpoint(checkpoints, name, check=current().is_main)
    with restoring(start.directory):
        saved = config_from_dict(start.state["config"], source="resume", kind=type(config))
        _check_sizes(Path(config.output_dir), start.state["log"])
    difference = first_difference(saved, config, (*FREE, *free))
    if difference is not None:
        name, before, now = difference
        raise UserError(f"resume: {name}: expected {before!r} as in {str(start.directory)!r}, got {now!r}")
    return start


def with_kernels(config: Weights, start: Checkpoint | None) -> Weights:
    """Return the config without liger-kernel if the run was begun without; `inputs` finds the opposite change."""
    begun_without = start is not None and start.state["inputs"].get(KERNELS) == "none"
    return dataclasses.replace(config, kernels="none") if begun_without else config


@contextlib.contextmanager
def restoring(directory: Path) -> Iterator[None]:
    """Raise a UserError for an undamaged checkpoint that does not fit this run."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(f"resume: cannot restore {str(directory)!r}: {reason}") from error


def _check_sizes(directory: Path, position: Mapping[str, int]) -> None:
    for name, expected in position.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else 0
        if name != "done" and size < expected:
            raise UserError(f"resume: expected {expected} bytes or more in {str(path)!r}, got {size}")


def inputs(model: nn.Module, data: Mapping[str, Iterable[object]]) -> State:
    """Return digests of the inputs that a resumed run reads again and must find unchanged.

    UserError, on all ranks, when they are not the same on each.
    """
    device, weights = next(model.parameters()).device.type, fingerprint(model)
    own = {"kinds of device": device, "model weights": weights, KERNELS: kernels_of(model)}
    found = own | {name: _digest(rows) for name, rows in data.items()}
    first, rank = current().objects(found)[0], current().rank
    current().each(lambda: _check_alike(found, first, rank))
    return found


def _check_alike(found: State, first: State, rank: int) -> None:
    """Raise a UserError for inputs that are not those of rank 0."""
    for name, value in found.items():
        if value != first[name]:
            raise UserError(f"torchrun: expected the {name} of rank 0 on all ranks, got others on rank {rank}")


def prompt_inputs(data: Prompts, kind: str = "") -> dict[str, Iterable[object]]:
    """Return the data of prompts for `inputs`: texts and tokens, and the columns that the user's functions get."""
    texts = zip(data.prompts, data.token_ids, strict=True)
    return {f"{kind}prompts": texts, f"columns of the {kind}prompts": data.columns.items()}


def _digest(rows: Iterable[object]) -> str:
    """Return a digest of the rows as `_written`."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_written(row).encode())
    return digest.hexdigest()


def _written(value: object) -> str:
    """Return `value` as text that is the same in every process: whole arrays, sets in order, no object addresses."""
    value = to_python(value)
    if isinstance(value, Mapping):
        return _written(list(value.items()))
    if isinstance(value, set | frozenset):
        return f"set({sorted(map(_written, value))})"
    if isinstance(value, list | tuple) and not all(type(item) is int for item in value):  # token ids are many
        return f"[{', '.join(map(_written, value))}]"
    return repr(value) if isinstance(value, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def file_digests(specs: Iterable[str | None]) -> dict[str, str]:
    """Return file or module -> digest of its file, of "file.py:function" and "module:function" specs, once loaded."""
    files = {path: source_of(path) for path in sorted({spec.rpartition(":")[0] for spec in specs if spec})}
    return {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files.items() if file is not None}


def warn_about_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn about each file of `file_digests` that has changed; that may be a fix."""
    for path, digest in now.items():
        if before.get(path) != digest:
            warnings.warn(f"resume: {path!r} is not as it was when the checkpoint was saved", stacklevel=3)


@contextlib.contextmanager
def report_write_errors(directory: Path) -> Iterator[None]:
    """Raise a UserError for a full disk and the like that says what failed and what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        newest = latest(directory / CHECKPOINTS)
        safe = f"{newest.name} is complete and resume continues there" if newest else "there is no checkpoint yet"
        message = f"cannot write in {str(directory)!r}: {error}; {safe}"
        raise with_origin(UserError(message), origin_of(error)) from error
