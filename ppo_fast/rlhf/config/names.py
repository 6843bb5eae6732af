"""Dotted names of settings: which a config has, and which one was meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ppo_fast.rlhf.config.renamed import what_became_of
from ppo_fast.rlhf.config.synonyms import what_others_call
from ppo_fast.rlhf.errors import UserError

Values = Mapping[str, Any]  # of a config, nested
ALIKE = 0.6  # ratio of difflib above which a name is offered as the nearest


def check_names(values: Values, kind: type[Any]) -> None:
    """UserError for a key that a config of that class does not have, or has under another name."""
    known = field_defaults(kind) if values else {}
    for name, value in leaves(values, f"{kind.GROUP}." if kind.GROUP else "", known):
        if (change := what_became_of(name, value)) is not None:
            raise UserError(change)
        if name not in known and not any(k.startswith(name + ".") for k in known):
            raise UserError(f"unknown key {name!r}{hint(name, kind)}")


def field_defaults(kind: type[Any]) -> Mapping[str, object]:
    """Dotted names of the fields of a config with their defaults."""
    return dict(leaves(dataclasses.asdict(kind()), f"{kind.GROUP}." if kind.GROUP else ""))


def leaves(tree: Values, prefix: str = "", known: Collection[str] = ()) -> Iterator[tuple[str, object]]:
    """Dotted names of what nested mappings hold; a mapping at a name in `known` is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in known:
            yield from leaves(value, f"{prefix}{key}.", known)
        else:
            yield f"{prefix}{key}", value


def hint(name: str, kind: type[Any], shown: Callable[[str], str] = str) -> str:
    """The end of a sentence about an unknown key: what it is called here, or the key most like it; "" if neither is."""
    known, last = field_defaults(kind), name.rpartition(".")[2]
    here = [] if any(each.rpartition(".")[2] == last for each in known) else what_others_call(name, known)
    if here:
        return f"; here it is {' or '.join(repr(shown(each)) for each in here)}"
    nearest = nearest_name(name, kind)
    return "" if nearest is None else f", the nearest is {shown(nearest)!r}"


def nearest_name(name: str, kind: type[Any]) -> str | None:
    """The dotted field of a config most like `name` in its last part; None if none is like it.

    A name without dots is compared as a whole too, optim_lr with optim.lr; groups that two names share say nothing.
    """

    def likeness(candidate: str) -> float:
        pairs = [(name.rpartition(".")[2], candidate.rpartition(".")[2])]
        if "." not in name:
            pairs.append((name, candidate))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(field_defaults(kind), key=likeness)
    return nearest if likeness(nearest) > ALIKE else None
