"""Files that are as they were written, and tensors that are the ones expected; anything else is one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.split import local, rows_of

BLOCK = 2**20  # bytes read at once


class DamagedError(ValueError):
    """A file is not as it was written."""


def digest(path: Path) -> str:
    """XXH3 of 128 bits, which finds damage, not forgery.

    Written files are read back from the page cache: safetensors and transformers hand out no bytes while they write.
    One core hashes a GiB in 0.13 s; CRC-32 takes 0.6 s, BLAKE2b 2.7 s, SHA-256 4.6 s.
    """
    sum_, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            sum_.update(block[:size])
    return str(sum_.hexdigest())


def write_sealed(state: object, path: Path) -> None:
    """Write `state` as JSON with the digests of all other files in its directory, and with one of the JSON itself."""
    files = sorted(found for found in path.parent.rglob("*") if found.is_file() and found != path)
    content = {"files": {str(found.relative_to(path.parent)): digest(found) for found in files}, "state": state}
    path.write_text(json.dumps({"digest": _digest_of(content), **content}))


def read_sealed(path: Path) -> tuple[Any, dict[str, str]]:
    """The state that `write_sealed` wrote, and the digests of the other files.

    Raises OSError, or DamagedError when it is not as it was written.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"{path.name} is no JSON") from error
    if not isinstance(content, dict) or content.keys() != {"digest", "files", "state"}:
        raise DamagedError(f"{path.name} has no digests: it is damaged, or another version of ppo_fast wrote it")
    if content.pop("digest") != _digest_of(content):
        raise DamagedError(f"{path.name} is not as it was written")
    return content["state"], content["files"]


def check_files(directory: Path, digests: Mapping[str, str]) -> None:
    """DamagedError at the first of the files that is missing or not as it was written."""
    for name, expected in digests.items():
        if not (directory / name).is_file():
            raise DamagedError(f"{name} is missing")
        if digest(directory / name) != expected:
            raise DamagedError(f"{name} is not as it was written")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError when it cannot be read."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from error


def check_tensors(own: Mapping[str, Tensor], saved: Mapping[str, object], source: str, *, dtypes: bool = True) -> None:
    """UserError naming the `source` unless `saved` has the names, shapes and, with `dtypes`, the dtypes of `own`."""
    for name in [*own, *saved]:
        if name not in saved:
            raise UserError(f"{source}: expected a tensor {name!r}, got none")
        if name not in own:
            raise UserError(f"{source}: expected no tensor {name!r}, got one")
        expected, got = (_kind(value, dtypes) for value in (own[name], saved[name]))
        if expected != got:
            raise UserError(f"{source}: expected {name!r} to be {expected}, got {got}")


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str, *, dtypes: bool = True) -> None:
    """Copy `saved` into `own`, name by name; UserError of `check_tensors` before anything is changed.

    Of a tensor that is split over ranks each gets its rows of the saved one.
    """
    check_tensors(own, saved, source, dtypes=dtypes)
    for name, value in own.items():
        rows = rows_of(value)
        local(value).copy_(saved[name] if rows is None else rows.of(saved[name]))


def numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tensors by their place."""
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def _digest_of(content: object) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content).encode()))


def _kind(value: object, dtypes: bool) -> str:
    """Shape and dtype in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{[*value.shape]}" + f" {value.dtype}".replace("torch.", "") * dtypes
