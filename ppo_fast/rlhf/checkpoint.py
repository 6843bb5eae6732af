"""The only place that writes weights: model directories and checkpoints, each there completely or not at all.

A checkpoint is a model directory, as `from_pretrained` reads it, with the state of its loop beside the weights:

    RUN/checkpoints/update-000020/
        config.json  model.safetensors  tokenizer.json  ...   written by the loop's own `write`
        state.safetensors                                     every tensor of the state
        state.json                                            the rest of it, and a digest of every file; nothing is
                                                              ever unpickled

`loop.Loop` saves and restores what a stage keeps in parts with `state_dict()` and `load_state_dict()`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import ADAPTER_FILE, HEAD, TRAINED, VALUE, Adapters
from .errors import UserError, require
from .integrity import DamagedError, check_files, check_tensors, copy_tensors, read_sealed, read_tensors, write_sealed
from .loading import load_network, no_progress_bars
from .models import VALUE_CONFIG, VALUE_DIRECTORY, VALUE_FILE, Models

HEAD_FILE = "value_head.safetensors"  # of a value model that shares the policy's trunk
STATE, STATE_TENSORS = "state.json", "state.safetensors"
NUMBERED = re.compile(r"\w+-(\d+)")  # names that are resumed from and pruned; any other, such as "best", is left alone
SUPERSEDED = ".superseded"  # ending of checkpoints that a run continued from an older one will replace
TENSOR, ITEMS = "<tensor>", "<items>"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    state: dict[str, Any]  # as it was saved; tensors on the CPU


def save_checkpoint(
    target: Path, write: Callable[[Path], None], state: Mapping[str, Any], *, keep_last: int = 0
) -> Path:
    """Save weights and state as `target`, whose name ends in a number; then remove all but the `keep_last` highest.

    Args:
        write: puts the weights, and what belongs to them, into the directory it is given.
        state: nested dicts and lists of tensors, numbers, text, bools and None.
        keep_last: 0 keeps all.

    Raises:
        OSError, SafetensorError: the disk is full or the like. What was saved before is as it was.
    """
    tensors: dict[str, Tensor] = {}
    record = _pack(state, "state", tensors)
    with atomic_directory(target) as scratch:
        write(scratch)
        save_tensors(tensors, scratch / STATE_TENSORS)
        write_sealed(record, scratch / STATE)
    _prune(target.parent, keep_last)
    return target


def latest(checkpoints: Path) -> Path | None:
    """The complete checkpoint of the highest number, if there is one."""
    return next((path for path in reversed(_numbered(checkpoints)) if is_complete(path)), None)


def is_complete(directory: Path) -> bool:
    """Whether the state is there and as it was written; `load_checkpoint` looks at the other files."""
    try:
        read_sealed(directory / STATE)
    except (OSError, DamagedError):
        return False
    return True


def load_checkpoint(checkpoints: Path, name: str | None = None, *, tensors: bool = True) -> Checkpoint:
    """The checkpoint of that name, by default the newest, with every file checked; `tensors` False: only state.json.

    Raises UserError when there is none or it is damaged, naming the newest one before it that is not.
    """
    numbered = _numbered(checkpoints)
    if not numbered:
        raise UserError(f"resume: expected a complete checkpoint in {str(checkpoints)!r}, got none")
    names = [path.name for path in numbered]
    if name is not None and name not in names:
        raise UserError(f"resume: expected one of {', '.join(names)} in {str(checkpoints)!r}, got {name!r}")
    index = -1 if name is None else names.index(name)
    try:
        return _load(numbered[index], tensors)
    except (OSError, ValueError, LookupError, TypeError) as error:
        good = next((path.name for path in reversed(numbered[:index]) if _is_good(path)), None)
        advice = f"--resume {good} continues from the one before" if good else "there is no good one before it"
        raise UserError(f"resume: {str(numbered[index])!r} is damaged: {error}; {advice}") from error


def _load(directory: Path, tensors: bool = True) -> Checkpoint:
    record, digests = read_sealed(directory / STATE)
    if not tensors:
        return Checkpoint(directory, record)
    check_files(directory, digests)
    # Cloned: safetensors returns views of the file, which pruning removes and whose alignment varies.
    loaded = {name: value.clone() for name, value in read_tensors(directory / STATE_TENSORS).items()}
    return Checkpoint(directory, _unpack(record, loaded))


def _is_good(directory: Path) -> bool:
    try:
        check_files(directory, read_sealed(directory / STATE)[1])
    except (OSError, DamagedError):
        return False
    return True


def set_newer_aside(start: Path) -> None:
    """Rename the checkpoints newer than `start`: no resume finds them, and the next complete save removes them."""
    numbered = _numbered(start.parent)
    for path in numbered[numbered.index(start) + 1 :]:
        aside = path.with_name(path.name + SUPERSEDED)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    _fsync(start.parent)


def save_models(models: Models, directory: Path) -> Path:
    """Write policy and tokenizer as `from_pretrained` reads them, and beside them what `model.value_path` reads."""
    with atomic_directory(directory) as scratch:
        write_models(models, scratch, merge=models.merge)
    return directory


def write_models(models: Models, directory: Path, *, merge: bool = False) -> None:
    """The files of `save_models`, into an existing directory; with `merge` the adapter is in the policy's weights."""
    write_model(models.policy, models.tokenizer, directory, models.adapters, merge=merge)
    value = models.value
    if models.adapters is not None:
        _write_adapter(models.adapters, VALUE, directory / VALUE_DIRECTORY, value.head)
        return
    save_tensors((value.head if models.shared else value).state_dict(), directory / _value_file(models))
    if not models.shared:
        value.backbone.config.to_json_file(directory / VALUE_CONFIG)


def load_weights(models: Models, directory: Path) -> None:
    """Copy what `write_models` wrote, not merged, into the policy and the value model."""
    load_saved(models.policy, directory, models.adapters)
    if models.adapters is not None:
        _read_into(models.adapters, VALUE, directory / VALUE_DIRECTORY, models.value.head)
        return
    value, path = models.value.head if models.shared else models.value, directory / _value_file(models)
    copy_tensors(value.state_dict(), read_tensors(path), str(path))


def _value_file(models: Models) -> str:
    return HEAD_FILE if models.shared else VALUE_FILE


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; what shares storage with another, such as tied weights, is copied."""
    plain, seen = {}, set()
    for name, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        plain[name] = (value.clone() if storage in seen else value).contiguous()
        seen.add(storage)
    require("safetensors.torch").save_file(plain, path)


def rng_state(generator: torch.Generator) -> dict[str, Any]:
    """State of the run's generator and of the global ones of Python, NumPy and torch, which user functions may use."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "run": generator.get_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any], generator: torch.Generator) -> None:
    """Put every generator of `rng_state` back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    generator.set_state(state["run"])


def fingerprint(module: nn.Module) -> list[int]:
    """The sum of the bits of each parameter, read as integers: equal for equal weights."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = (p.detach().reshape(-1).view(integers[p.element_size()]) for p in module.parameters())
    return torch.stack([part.sum(dtype=torch.int64) for part in bits]).tolist()


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    extra: Mapping[str, Any] | None = None,
    adapters: Adapters | None = None,
    *,
    merge: bool = False,
) -> Path:
    """`write_model` as a whole or not at all, and beside it `extra`: file name -> JSON."""
    with atomic_directory(directory) as scratch:
        write_model(model, tokenizer, scratch, adapters, merge=merge)
        for name, content in (extra or {}).items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory


def write_model(
    model: Any, tokenizer: Any, directory: Path, adapters: Adapters | None = None, *, merge: bool = False
) -> None:
    """A model and its tokenizer as `from_pretrained` reads them, into an existing directory.

    Of a model with adapters a PEFT directory, with the head of a reward model; with `merge` the base with the adapter
    added to its weights.
    """
    with no_progress_bars():
        if adapters is None:
            model.save_pretrained(directory)
        elif merge:
            model.save_pretrained(directory, state_dict=adapters.merged_state(model))
        else:
            _write_adapter(adapters, TRAINED, directory, getattr(model, "score", None))
        tokenizer.save_pretrained(directory)


def load_saved(model: Any, directory: Path, adapters: Adapters | None = None) -> None:
    """Copy the weights that `write_model` wrote, not merged, into `model`, bit by bit.

    Raises UserError for a tensor that is missing, unexpected, or of another shape or dtype.
    """
    if adapters is not None:
        _read_into(adapters, TRAINED, directory, getattr(model, "score", None))
        return
    own = model.state_dict()
    for path in sorted(directory.glob("model*.safetensors")):
        tensors = read_tensors(path)  # views of the file, of which nothing is read
        for name in own.keys() & tensors.keys():  # the others are judged below: transformers may rename
            check_tensors({name: own[name]}, {name: tensors[name]}, str(path))
    saved = load_network(type(model), str(directory), exact=True, dtype=model.dtype)
    copy_tensors(own, saved.state_dict(), str(directory))


def _write_adapter(adapters: Adapters, name: str, directory: Path, head: nn.Linear | None) -> None:
    config, tensors = adapters.saved_as(name, head)
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    save_tensors(tensors, directory / ADAPTER_FILE)


def _read_into(adapters: Adapters, name: str, directory: Path, head: nn.Linear | None) -> None:
    path, own = directory / ADAPTER_FILE, dict[str, Tensor](adapters.named(name))
    if head is not None:
        own |= {f"{HEAD}{key}": value for key, value in head.state_dict().items()}
    copy_tensors(own, read_tensors(path), str(path))


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place, flushed to disk, when the block succeeds.

    When the block or the exchange fails nothing changes. An earlier `target` is moved aside first and removed last;
    what a killed process left of such an exchange is put right.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch, aside = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    _settle(target, scratch, aside)
    scratch.mkdir()
    try:
        yield scratch
        for path in sorted(scratch.rglob("*")):
            _fsync(path)
        _fsync(scratch)
        if target.exists():
            target.rename(aside)
        scratch.rename(target)
        for parent in (target.parent.parent, target.parent):
            _fsync(parent)
    finally:
        _settle(target, scratch, aside)


def _settle(target: Path, scratch: Path, aside: Path) -> None:
    """`target` as it was when it is not there, and nothing beside it."""
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


def _numbered(checkpoints: Path) -> list[Path]:
    """The directories with a number and a state, which a save puts there last, by rising number."""
    found = [(NUMBERED.fullmatch(path.name), path) for path in checkpoints.glob("*") if (path / STATE).is_file()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _prune(checkpoints: Path, keep_last: int) -> None:
    """Remove old checkpoints, each out of sight first, and what a killed process left half written or removed."""
    for path in [*filter(is_complete, _numbered(checkpoints))][:-keep_last] if keep_last else []:
        path.rename(path.with_name(f".{path.name}.removed"))
    for path in [*checkpoints.glob(".*"), *checkpoints.glob(f"*{SUPERSEDED}")]:
        shutil.rmtree(path, ignore_errors=True)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors` and leave their names behind."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {TENSOR: name}
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        packed = [(key, _pack(item, f"{name}.{key}", tensors)) for key, item in value.items()]
        return dict(packed) if all(isinstance(key, str) for key in value) else {ITEMS: packed}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{name}: expected tensors, numbers, text, lists and dicts, got {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    return {key: _unpack(item, tensors) for key, item in value.get(ITEMS, value.items())}
