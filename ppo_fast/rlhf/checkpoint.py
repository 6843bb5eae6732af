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

import base64
import contextlib
import ctypes
import json
import os
import random
import re
import stat
from collections import OrderedDict
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
from .runtime import remove

HEAD_FILE = "value_head.safetensors"  # of a value model that shares the policy's trunk
STATE, STATE_TENSORS = "state.json", "state.safetensors"
NUMBERED = re.compile(r"\w+-(\d+)")  # names that are resumed from and pruned; any other, such as "best", is left alone
LEFT = re.compile(r"\.(.+)\.(new|old|removed)")  # hidden names of what is being written, replaced or removed
TENSOR, ITEMS, BYTES, ARRAY = "<tensor>", "<items>", "<bytes>", "<array>"
SEQUENCES: dict[type[Any], str] = {tuple: "<tuple>", set: "<set>", frozenset: "<frozenset>"}
TAGS = {TENSOR, ITEMS, BYTES, ARRAY, *SEQUENCES.values()}  # each the only key of what JSON cannot say
PACKED = "tensors, NumPy arrays, numbers, text, bytes, lists, tuples, sets and dicts"
SUPERSEDED = ".superseded"  # ending of checkpoints that a run continued from an older one will replace


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
        state: what `_pack` takes.
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


def check_state(state: Any, name: str) -> None:
    """UserError for a state that a checkpoint could not hold exactly."""
    _pack(state, name, {})


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
        return Checkpoint(directory, _unpack(record, None))
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
        remove(aside, ignore_errors=True)
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
    """A scratch directory that takes the place of `target`, flushed to disk, when the block succeeds.

    When the block or the exchange fails nothing changes. A link is followed: the directory that it names is replaced.
    An earlier `target` is exchanged in one step; a file system that cannot has it moved to the side first and removed
    last, and `settle` puts right what a killed process left of that.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    settle(target)
    scratch.mkdir()
    try:
        yield scratch
        _follow_umask(scratch)
        for path in sorted(scratch.rglob("*")):
            _fsync(path)
        _fsync(scratch)
        if not (target.exists() and _exchanged(scratch, target)):
            if target.exists():
                target.rename(old)
            scratch.rename(target)
        for parent in (target.parent.parent, target.parent):
            _fsync(parent)
    finally:
        settle(target)


def settle_all(directory: Path) -> None:
    """`settle` all that a killed process left in a directory where nobody else makes hidden files."""
    for path in directory.glob(".*"):
        if left := LEFT.fullmatch(path.name):
            settle(directory / left[1])


def settle(target: Path) -> None:
    """`target` as it was when it is not there, and nothing next to it of a save, an exchange or a removal cut short."""
    target = target.resolve()
    new, old, removed = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old", "removed"))
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (new, old, removed):
        remove(path, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two paths in one step, where system and file system can (Linux: renameat2 with RENAME_EXCHANGE)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _follow_umask(directory: Path) -> None:
    """Give all that is in a directory just made the mode that the umask gave it: safetensors makes files of 0600."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    for path in directory.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


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
    settle_all(checkpoints)
    for path in checkpoints.glob(f"*{SUPERSEDED}"):
        remove(path, ignore_errors=True)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON that `_unpack` reads back exactly; its tensors go into `tensors` and leave their names behind.

    Raises UserError for a kind of value that would come back as another.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if kind in (dict, OrderedDict):
        packed = [(_pack(key, name, tensors), _pack(item, f"{name}.{key}", tensors)) for key, item in value.items()]
        plain = all(type(key) is str and key not in TAGS for key in value)
        return dict(packed) if plain else {ITEMS: packed}
    if isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_complex() or value.is_quantized):
        while name in tensors:  # "a.b" within "c" and "b" within "c.a"
            name += "'"
        tensors[name] = value.detach()
        return {TENSOR: name}
    if kind in SEQUENCES:
        return {SEQUENCES[kind]: _pack(list(value), name, tensors)}
    if kind is bytes:
        return {BYTES: base64.b64encode(value).decode()}
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufcSUmM":
        data = base64.b64encode(value.tobytes()).decode()
        return {ARRAY: [value.dtype.str, list(value.shape), kind is np.ndarray, data]}
    raise UserError(f"{name}: expected {PACKED}, got {kind.__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    """What `_pack` made `value` of; without `tensors` their names stay."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), None)
    if tag == TENSOR:
        return value if tensors is None else tensors[value[TENSOR]]
    if tag == BYTES:
        return base64.b64decode(value[BYTES])
    if tag == ARRAY:
        dtype, shape, whole, data = value[ARRAY]
        array = np.frombuffer(base64.b64decode(data), dtype=dtype).reshape(shape)
        return array.copy() if whole else array[()]
    for kind, name in SEQUENCES.items():
        if tag == name:
            return kind(_unpack(value[name], tensors))
    if tag == ITEMS:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value[ITEMS]}
    return {key: _unpack(item, tensors) for key, item in value.items()}
