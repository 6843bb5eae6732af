"""Write model directories and checkpoints, each completely or not at all; no other module writes weights.

A checkpoint is a model directory, as `from_pretrained` reads it, plus the state of its loop:

    RUN/checkpoints/update-000020/
        config.json  model.safetensors  tokenizer.json  ...   written by the loop's own `write`
        state.safetensors                                     every tensor of the state
        state.json                                            the rest of it, and a digest of every file; nothing is
                                                              ever unpickled

`TrainingLoop` saves and restores the parts of a stage by their `state_dict()` and `load_state_dict()`.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.files import _fsync, atomic_directory, remove, settle_all
from ppo_fast.rlhf.integrity import (
    DamagedError,
    check_files,
    check_tensors,
    copy_tensors,
    read_sealed,
    read_tensors,
    write_sealed,
)
from ppo_fast.rlhf.models.adapter_files import ADAPTER_FILE, HEAD
from ppo_fast.rlhf.models.adapters import TRAINED, VALUE, Adapters
from ppo_fast.rlhf.models.distribution import receive
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.models.pretrained import load_network, no_progress_bars
from ppo_fast.rlhf.models.saved import VALUE_CONFIG, VALUE_DIRECTORY, VALUE_FILE
from ppo_fast.rlhf.split import Share
from ppo_fast.rlhf.training.state import State, _pack, _unpack
from ppo_fast.rlhf.training.streaming import stream_tensors
from ppo_fast.rlhf.world import current

HEAD_FILE = "value_head.safetensors"  # of a value model that shares the policy's trunk
STATE, STATE_TENSORS = "state.json", "state.safetensors"
NUMBERED = re.compile(r"\w+-(\d+)")  # names that are resumed from and pruned; others, such as "best", are not
GATHERED = ".gathered.safetensors"  # while the weights of a model that is split over ranks are written
_LARGEST_CLONE = 2**20  # bytes
SUPERSEDED = ".superseded"  # suffix of checkpoints that a run resumed from an older one will replace


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    state: State  # as it was saved; tensors on the CPU


@contextlib.contextmanager
def directory_of_run(target: Path) -> Iterator[Path]:
    """`atomic_directory` of rank 0, which writes; the others take part in gathering, and wait for the end.

    An error of rank 0, also of the end, is raised on all; within the block all ranks fail together.
    """
    world = current()
    with contextlib.ExitStack() as held:
        yield world.each(lambda: held.enter_context(atomic_directory(target)) if world.is_main else target)
        world.each(held.pop_all().close)


def save_checkpoint(target: Path, write: Callable[[Path], None], state: State, *, keep_last: int = 0) -> Path:
    """Save weights and state as `target`, whose name ends in a number; then remove all but the `keep_last` highest.

    All ranks call it; what is split over them is gathered, a tensor at a time, and written by rank 0.

    Args:
        write: writes the weights and their files into the directory it is given.
        state: values that `_pack` takes.
        keep_last: 0 keeps all.

    Raises:
        OSError, SafetensorError: the disk is full or the like. Earlier checkpoints stay as they are.
    """
    world, tensors = current(), dict[str, Tensor | Share]()
    record = world.each(lambda: _pack(state, "state", tensors))
    with directory_of_run(target) as scratch:
        write(scratch)
        save_tensors(tensors, scratch / STATE_TENSORS)
        world.on_main(lambda: write_sealed(record, scratch / STATE))
    world.on_main(lambda: _prune(target.parent, keep_last))
    return target


def latest(checkpoints: Path) -> Path | None:
    """Return the complete checkpoint of the highest number, if there is one."""
    return next((path for path in reversed(_numbered(checkpoints)) if is_complete(path)), None)


def is_complete(directory: Path) -> bool:
    """Return whether the state is there and undamaged; `load_checkpoint` checks the other files."""
    try:
        read_sealed(directory / STATE)
    except (OSError, DamagedError):
        return False
    return True


def load_checkpoint(
    checkpoints: Path, name: str | None = None, *, tensors: bool = True, check: bool = True
) -> Checkpoint:
    """Load the checkpoint of that name, by default the newest, and check every file; `tensors` False: only state.json.

    `check` False reads the files as they are: another rank has checked them.

    Raises UserError when there is none or it is damaged; the message names the newest undamaged one before it.
    """
    numbered = _numbered(checkpoints)
    if not numbered:
        raise UserError(f"resume: expected a complete checkpoint in {str(checkpoints)!r}, got none")
    names = [path.name for path in numbered]
    if name is not None and name not in names:
        raise UserError(f"resume: expected one of {', '.join(names)} in {str(checkpoints)!r}, got {name!r}")
    index = -1 if name is None else names.index(name)
    try:
        return _load(numbered[index], tensors, check=check)
    except (OSError, ValueError, LookupError, TypeError) as error:
        good = next((path.name for path in reversed(numbered[:index]) if _is_good(path)), None)
        advice = f"--resume {good} continues from the one before" if good else "there is no good one before it"
        raise UserError(f"resume: {str(numbered[index])!r} is damaged: {error}; {advice}") from error


def _load(directory: Path, tensors: bool = True, *, check: bool = True) -> Checkpoint:
    record, digests = read_sealed(directory / STATE)
    if not tensors:
        return Checkpoint(directory, _unpack(record, None))
    if check:
        check_files(directory, digests)
    # Cloned: safetensors returns views of the file, which pruning removes and whose alignment varies. Of a large tensor
    # that is split each rank copies its rows, so a node does not hold it once for each.
    largest = sys.maxsize if current().mesh is None else _LARGEST_CLONE
    loaded = {
        name: value.clone() if value.nbytes <= largest else value
        for name, value in read_tensors(directory / STATE_TENSORS).items()
    }
    return Checkpoint(directory, _unpack(record, loaded))


def _is_good(directory: Path) -> bool:
    try:
        check_files(directory, read_sealed(directory / STATE)[1])
    except (OSError, DamagedError):
        return False
    return True


def supersede_newer(start: Path) -> None:
    """Rename the checkpoints newer than `start`: no resume finds them, and the next complete save removes them."""
    numbered = _numbered(start.parent)
    for path in numbered[numbered.index(start) + 1 :]:
        superseded = path.with_name(path.name + SUPERSEDED)
        remove(superseded, ignore_errors=True)
        path.rename(superseded)
    _fsync(start.parent)


def save_models(models: Models, directory: Path) -> Path:
    """Write policy and tokenizer for `from_pretrained`, and the value model for `model.value_path`."""
    with directory_of_run(directory) as scratch:
        write_models(models, scratch, merge=models.merge)
    return directory


def write_models(models: Models, directory: Path, *, merge: bool = False) -> None:
    """Write the files of `save_models` into an existing directory; `merge` adds the adapter to the policy's weights."""
    write_model(models.policy, models.tokenizer, directory, models.adapters, merge=merge)
    value = models.value
    if value is None:
        return
    if models.adapters is not None:
        _write_adapter(models.adapters, VALUE, directory / VALUE_DIRECTORY, value.head)
        return
    save_tensors((value.head if models.shared else value).state_dict(), directory / _value_file(models))
    if not models.shared:
        current().on_main(lambda: value.backbone.config.to_json_file(directory / VALUE_CONFIG))


def load_weights(models: Models, directory: Path) -> None:
    """Copy the files of `write_models`, not merged, into the policy and the value model."""
    load_saved(models.policy, directory, models.adapters)
    if models.value is None:
        return
    if models.adapters is not None:
        _read_into(models.adapters, VALUE, directory / VALUE_DIRECTORY, models.value.head)
        return
    value, path = models.value.head if models.shared else models.value, directory / _value_file(models)
    copy_tensors(value.state_dict(), read_tensors(path), str(path))


def _value_file(models: Models) -> str:
    return HEAD_FILE if models.shared else VALUE_FILE


def save_tensors(tensors: Mapping[str, Tensor | Share], path: Path) -> None:
    """Write tensors as safetensors; a tensor that shares storage, such as a tied weight, is copied.

    In a process group all ranks call it, and rank 0 writes the same file, gathering a tensor at a time.
    """
    if current().mesh is not None:
        stream_tensors(tensors, path)
        return
    separate, seen = {}, set()
    for name, value in tensors.items():
        assert isinstance(value, Tensor)  # no rank has a share
        storage = value.untyped_storage().data_ptr()
        separate[name] = (value.clone() if storage in seen else value).contiguous()
        seen.add(storage)
    safetensors.torch.save_file(separate, path)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    extra: Mapping[str, object] | None = None,
    adapters: Adapters | None = None,
    *,
    merge: bool = False,
) -> Path:
    """Write the files of `write_model` and `extra`, file name -> JSON, all or none."""
    with directory_of_run(directory) as scratch:
        write_model(model, tokenizer, scratch, adapters, merge=merge)
        current().on_main(lambda: _write_extra(extra or {}, scratch))
    return directory


def _write_extra(files: Mapping[str, object], directory: Path) -> None:
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    adapters: Adapters | None = None,
    *,
    merge: bool = False,
) -> None:
    """Write a model and its tokenizer for `from_pretrained` into an existing directory.

    A model with adapters gives a PEFT directory, with the head of a reward model; `merge` writes the base with the
    adapter added to its weights.
    """
    with no_progress_bars():
        if adapters is not None and not merge:
            _write_adapter(adapters, TRAINED, directory, getattr(model, "score", None))
        else:
            state = None if adapters is None else adapters.merged_state(model)
            with _gathered_state(model, state, directory) as whole_state:
                current().on_main(lambda: model.save_pretrained(directory, state_dict=whole_state))
        current().on_main(lambda: tokenizer.save_pretrained(directory))


@contextlib.contextmanager
def _gathered_state(
    model: PreTrainedModel, state: dict[str, Tensor] | None, directory: Path
) -> Iterator[dict[str, Tensor] | None]:
    """The state of a model with its split weights gathered, on rank 0; None: the model's own will do.

    They are gathered into a file in `directory`, which is gone after the block: no memory holds them all.
    """
    world = current()
    if world.mesh is None:
        yield state
        return
    state, first = model.state_dict() if state is None else state, _first_names(model)
    path = directory / GATHERED
    save_tensors({name: value for name, value in state.items() if first.get(name, name) == name}, path)
    found = world.each(lambda: read_tensors(path) if world.is_main else {})
    yield {name: found[first.get(name, name)] for name in state} if world.is_main else None
    world.on_main(lambda: path.unlink(missing_ok=True))


def load_saved(model: PreTrainedModel, directory: Path, adapters: Adapters | None = None) -> None:
    """Copy the weights that `write_model` wrote, not merged, into `model`, bit by bit.

    Raises UserError for a tensor that is missing, unexpected, or of another shape or dtype.
    """
    if adapters is not None:
        _read_into(adapters, TRAINED, directory, getattr(model, "score", None))
        return
    own = model.state_dict()
    if current().mesh is None:
        copy_tensors(own, _load_renamed(model, own, directory), str(directory))
    elif not _load_rows(own, _first_names(model), directory):
        receive(own, current().each(lambda: _load_renamed(model, own, directory) if current().is_main else {}))


def _load_renamed(model: PreTrainedModel, own: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Return the saved state of a model, whose tensors transformers may have renamed, merged or cut in the files."""
    for path in sorted(directory.glob("model*.safetensors")):
        tensors = read_tensors(path)  # views of the file: no data is read
        for name in own.keys() & tensors.keys():  # the others are checked below: transformers may rename
            check_tensors({name: own[name]}, {name: tensors[name]}, str(path))
    saved: dict[str, Tensor] = load_network(type(model), str(directory), exact=True, dtype=model.dtype).state_dict()
    check_tensors(own, saved, str(directory))
    return saved


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each weight, by name: a tied one has two."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(weight), name) for name, weight in named}


def _load_rows(own: Mapping[str, Tensor], first: Mapping[str, str], directory: Path) -> bool:
    """Copy each rank's rows from the files, if they have the model's own names; else return False."""
    saved: dict[str, Tensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        saved |= read_tensors(path)  # views of the file
    needed = {first.get(name, name) for name in own}
    if {first.get(name, name) for name in saved} != needed:
        return False
    copy_tensors({name: own[name] for name in saved}, saved, str(directory))
    return True


def _write_adapter(adapters: Adapters, name: str, directory: Path, head: nn.Linear | None) -> None:
    config, tensors = adapters.saved_as(name, head)

    def write_config() -> None:
        directory.mkdir(exist_ok=True)
        config.save_pretrained(directory)

    current().on_main(write_config)
    save_tensors(tensors, directory / ADAPTER_FILE)


def _read_into(adapters: Adapters, name: str, directory: Path, head: nn.Linear | None) -> None:
    path, own = directory / ADAPTER_FILE, dict[str, Tensor](adapters.named(name))
    if head is not None:
        own |= {f"{HEAD}{key}": value for key, value in head.state_dict().items()}
    copy_tensors(own, read_tensors(path), str(path))


def _numbered(checkpoints: Path) -> list[Path]:
    """Return the directories with a number and a state, the file that a save writes last, by rising number."""
    found = [(NUMBERED.fullmatch(path.name), path) for path in checkpoints.glob("*") if (path / STATE).is_file()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _prune(checkpoints: Path, keep_last: int) -> None:
    """Remove old checkpoints, each renamed first, and the half-written or half-removed ones of killed processes."""
    for path in [*filter(is_complete, _numbered(checkpoints))][:-keep_last] if keep_last else []:
        path.rename(path.with_name(f".{path.name}.removed"))
    settle_all(checkpoints)
    for path in checkpoints.glob(f"*{SUPERSEDED}"):
        remove(path, ignore_errors=True)
