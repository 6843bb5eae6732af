"""Safetensors files written a tensor at a time, each gathered from the ranks that hold its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ppo_fast.rlhf.split import Share
from ppo_fast.rlhf.split import whole as gathered
from ppo_fast.rlhf.world import World, current

# In the order in which safetensors lays them out, the last first: by alignment.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
ORDER = {dtype: number for number, dtype in enumerate(DTYPES)}


def stream_tensors(tensors: Mapping[str, Tensor | Share], path: Path) -> None:
    """Write the file that `safetensors.torch.save_file` writes of the whole tensors; all ranks call it, rank 0 writes.

    The memory of one whole tensor is enough. OSError, on all ranks, when the file cannot be written.
    """
    world = current()
    shapes = _shapes(tensors, world)
    names = sorted(sorted(tensors), key=lambda name: -ORDER[_rows(tensors[name]).dtype])
    header = _header({name: (_rows(tensors[name]).dtype, shapes[name]) for name in names})
    whole = (_whole(tensors[name], world) for name in names)  # each is gathered as it is asked for

    def write() -> None:
        try:
            if world.is_main:
                _write(path, header, whole)
        except Exception:
            _take_part(whole)
            raise
        _take_part(whole)

    world.each(write)


def _take_part(tensors: Iterable[Tensor]) -> None:
    """Gather the tensors that are left with the other ranks, which wait for a rank that does not write or cannot."""
    for _ in tensors:
        pass


def _write(path: Path, header: bytes, tensors: Iterable[Tensor]) -> None:
    with path.open("wb") as file:
        file.write(header)
        for value in tensors:
            file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _rows(value: Tensor | Share) -> Tensor:
    return value.rows if isinstance(value, Share) else value


def _whole(value: Tensor | Share, world: World) -> Tensor:
    return world.concatenate(value.rows) if isinstance(value, Share) else gathered(value)


def _shapes(tensors: Mapping[str, Tensor | Share], world: World) -> dict[str, list[int]]:
    """Return the shapes of the whole tensors."""
    counts = {name: len(value.rows) for name, value in tensors.items() if isinstance(value, Share)}
    everyone = world.objects(counts)
    shapes = {name: [*_rows(value).shape] for name, value in tensors.items()}
    for name in counts:
        shapes[name][0] = sum(each[name] for each in everyone)
    return shapes


def _header(tensors: Mapping[str, tuple[torch.dtype, list[int]]]) -> bytes:
    """Return the length and the JSON header of a file of tensors of these dtypes and shapes, in order."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
