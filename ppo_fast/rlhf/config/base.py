"""The base of all groups of settings: values are converted and checked at construction, wherever they come from."""

from __future__ import annotations

import dataclasses
import functools
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ppo_fast.rlhf.config.names import check_names
from ppo_fast.rlhf.errors import UserError, check, positive, require

if TYPE_CHECKING:
    from typing_extensions import Self

# Settings that name what can be passed as an object too, and the argument of the training functions that takes it.
OBJECTS = {
    "model.path": "policy of train_ppo, model of the others",
    "data.prompts": "prompts",
    "data.train": "train",
    "data.held_out": "held_out",
    "evaluation.prompts": "eval_prompts",
    "reward.function": "reward_fn",
    "rollout.function": "rollout_fn",
}
_WORDS = {int: "an int", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLAIN = (int, float, str, bytes, list, tuple, Mapping, type(None))


@dataclass(frozen=True)
class Settings:
    """A group of fields. Files, flags and Python give the same values and the same errors.

    "1e-5" is the number 1e-5 and a list is a tuple; a mapping for a group changes those of its defaults that it names.
    Raises UserError, which names the field, for a name that is not known, a value of another type or out of range.
    """

    GROUP: ClassVar[str] = ""  # in front of the names of the fields

    def __new__(cls, *_: Any, **given: Any) -> Self:
        check_names(given, cls)  # before a dataclass raises a TypeError
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _hints(kind)
        for field in dataclasses.fields(self):
            name, value = f"{self.GROUP}.{field.name}".lstrip("."), getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            group = isinstance(default, Settings)
            made = _group(name, default, value) if group else _leaf(name, hints[field.name], value)
            object.__setattr__(self, field.name, made)  # the dataclass is frozen


def check_tokens_per_pass(group: str, tokens: int | None, micro_batch_size: int | None) -> None:
    if tokens is not None:
        positive(f"{group}.tokens_per_pass", tokens)
        check(micro_batch_size is None, f"{group}.tokens_per_pass", f"null with {group}.micro_batch_size", tokens)


def check_renames(columns: tuple[str, ...]) -> None:
    halves = [each.partition("=") for each in columns]
    named = all(ours and theirs for ours, _, theirs in halves) and len({ours for ours, _, _ in halves}) == len(halves)
    check(named, "data.columns", "NAME=COLUMN, each name once", columns)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@functools.cache
def _adapter(hint: Any) -> Any:
    return require("pydantic").TypeAdapter(hint)


def _group(name: str, default: Any, value: object) -> Any:
    if isinstance(value, type(default)):
        return value
    if isinstance(value, Mapping):
        return dataclasses.replace(default, **value)
    example = f"{{{dataclasses.fields(default)[0].name!r}: ...}}"
    group = _article(type(default).__name__)
    raise UserError(f"{name}: expected {group} or a mapping such as {example}, got {shown(value)}")


def _leaf(name: str, hint: Any, value: object) -> Any:
    if isinstance(value, bool) and _WORDS[bool] not in _options(hint):  # pydantic would take true for 1
        raise UserError(f"{name}: expected {_describe(hint)}, got {value}")
    try:
        return _adapter(hint).validate_python(_plain(value))
    except require("pydantic").ValidationError:
        is_object = name in OBJECTS and not isinstance(value, _PLAIN)
        pass_it = f"; pass an object as the argument {OBJECTS[name]}" if is_object else ""
        raise UserError(f"{name}: expected {_describe(hint)}, got {shown(value)}{pass_it}") from None


def _plain(value: object) -> object:
    """Paths as text, and a mapping for a list of texts as "name=value"."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return [f"{key}={item}" for key, item in value.items()] if isinstance(value, Mapping) else value


def _describe(hint: Any) -> str:
    """A type in words."""
    options = _options(hint)
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _options(hint: Any) -> list[str]:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return [repr(choice) for choice in arguments]
    if get_origin(hint) in (Union, types.UnionType):
        return [option for each in arguments for option in _options(each)]
    if get_origin(hint) is tuple:
        if Ellipsis not in arguments:
            return [f"a list of {len(arguments)} numbers"]
        return ["a list of texts" if arguments[0] is str else "a list of numbers"]
    return [_WORDS.get(hint, str(hint))]


def shown(value: object) -> str:
    """A value in one line; an object by its class."""
    return repr(value) if isinstance(value, _PLAIN) else _article(type(value).__name__)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"
