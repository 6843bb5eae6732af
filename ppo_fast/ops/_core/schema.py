"""Derive the schema of a registered op, which takes and returns flat lists, from NamedTuples."""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Tensor | float | None: "Tensor?",  # a launcher takes the number too
    float: "float",
    float | None: "float?",
    int | None: "int?",
    bool: "bool",
    str: "str",
}


def schema(*inputs: type[NamedTuple] | str, results: type[NamedTuple] | None = None) -> str:
    """Return the schema of an op that takes the fields of ``inputs`` in order; a string is used as it is.

    ``results``: the NamedTuple of tensors that the op returns; None: one tensor.
    """
    parts = [part for group in inputs for part in ([group] if isinstance(group, str) else _arguments(group))]
    returned = "Tensor" if results is None else f"({', '.join('Tensor' for _ in results._fields)})"
    return f"({', '.join(parts)}) -> {returned}"


def _arguments(group: type[NamedTuple]) -> list[str]:
    return [f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(group).items()]


def tensor_fields(group: type[NamedTuple]) -> tuple[str, ...]:
    """The names of the fields that are tensors or None."""
    return tuple(name for name, kind in get_type_hints(group).items() if _TYPES[kind].startswith("Tensor"))


def grouped(arguments: Sequence[Any], *groups: type[NamedTuple]) -> Any:
    """Split the arguments of a registered op into the NamedTuples of its schema."""
    found, start = [], 0
    for group in groups:
        stop = start + len(group._fields)
        found.append(group(*arguments[start:stop]))
        start = stop
    return found


def to_first(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return ``gradient`` for the first argument of an op, and None for the others."""
    return gradient, *((None,) * (len(ctx.needs_input_grad) - 1))
