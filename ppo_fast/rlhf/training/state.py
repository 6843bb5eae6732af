"""Pack the state of a run into JSON and tensors and back to equal values; states of random generators."""

from __future__ import annotations

import base64
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.split import Share, local, sum_over_ranks

State = dict[str, Any]  # of a part of a run: `PACKED` within each other

TENSOR, ITEMS, BYTES, ARRAY = "<tensor>", "<items>", "<bytes>", "<array>"


SEQUENCES: dict[type, str] = {tuple: "<tuple>", set: "<set>", frozenset: "<frozenset>"}


TAGS = {
    TENSOR,
    ITEMS,
    BYTES,
    ARRAY,
    *SEQUENCES.values(),
}  # each the only key of an object that stands for a non-JSON value


PACKED = "tensors, NumPy arrays, numbers, text, bytes, lists, tuples, sets and dicts"


class Stateful(Protocol):
    """A part of a run whose state changes."""

    def state_dict(self) -> object: ...

    def load_state_dict(self, state: Any, /) -> object: ...


def check_state(state: object, name: str) -> None:
    """Raise a UserError for a state that a checkpoint cannot hold exactly."""
    _pack(state, name, {})


def rng_state(generator: torch.Generator) -> State:
    """Return the states of the run's generator and of the global ones, which user functions may use."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "run": generator.get_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: State, generator: torch.Generator) -> None:
    """Restore every generator of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # fewer than when it was saved
    generator.set_state(state["run"])


def fingerprint(module: nn.Module) -> list[int]:
    """Return the sum of the bits of each parameter, read as integers: equal for equal weights."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [*module.parameters()]
    bits = (local(p.detach()).reshape(-1).view(integers[p.element_size()]) for p in weights)
    sums = torch.stack([part.sum(dtype=torch.int64) for part in bits])
    split = torch.tensor([isinstance(p, DTensor) for p in weights], dtype=torch.bool, device=sums.device)
    return torch.where(split, sum_over_ranks(sums, weights), sums).tolist()


def _pack(value: Any, name: str, tensors: dict[str, Tensor | Share]) -> object:
    """Return `value` as JSON that `_unpack` reads back exactly; its tensors move into `tensors`, by name.

    Raises UserError for a type that would be read back as another.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if kind in (dict, OrderedDict):
        packed = [(_pack(key, name, tensors), _pack(item, f"{name}.{key}", tensors)) for key, item in value.items()]
        is_json = all(type(key) is str and key not in TAGS for key in value)
        return dict(packed) if is_json else {ITEMS: packed}
    if isinstance(value, Share) or _is_plain(value):
        while name in tensors:  # "a.b" within "c" and "b" within "c.a"
            name += "'"
        tensors[name] = value if isinstance(value, Share) else value.detach()
        return {TENSOR: name}
    if kind in SEQUENCES:
        return {SEQUENCES[kind]: _pack(list(value), name, tensors)}
    if kind is bytes:
        return {BYTES: base64.b64encode(value).decode()}
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufcSUmM":
        data = base64.b64encode(value.tobytes()).decode()
        return {ARRAY: [value.dtype.str, list(value.shape), kind is np.ndarray, data]}
    raise UserError(f"{name}: expected {PACKED}, got {kind.__name__}")


def _is_plain(value: object) -> bool:
    """Return whether it is a tensor that safetensors can hold."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return not (value.is_complex() or value.is_quantized)


def _unpack(value: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    """Return the value that `_pack` packed; without `tensors` their names stay."""
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
