"""The order of the prompts within an epoch: easy ones first, topics in equal shares."""

from __future__ import annotations

import math
from collections.abc import Callable

from ppo_fast.rlhf.config.ppo import DataConfig
from ppo_fast.rlhf.data.prompts import Prompts
from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.user_code import as_list, call, load_callable

Arrange = Callable[[list[int]], list[int]]


def make_arrangement(data: Prompts, config: DataConfig) -> Arrange:
    """Return a function that orders the rows of an epoch by the curriculum.

    `data.order` sorts by rising difficulty, prompts of the same difficulty as they came in; `data.balance` then deals
    the topics out in turn, the prompts of smaller topics again until the largest is through.

    Raises UserError for a column that is not there or a difficulty that is no number.
    """
    difficulty = None if config.order is None else _difficulty(data, config.order)
    topics = None if config.balance is None else _column(data, config.balance, "data.balance")

    def arrange(rows: list[int]) -> list[int]:
        if difficulty is not None:
            rows = sorted(rows, key=difficulty.__getitem__)
        return rows if topics is None else round_robin(rows, topics)

    return arrange


def round_robin(rows: list[int], topics: list[object]) -> list[int]:
    """One row of each topic in turn, each topic in the order of `rows`; small topics start over."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(str(topics[row]), []).append(row)
    longest = max(map(len, groups.values()))
    return [group[turn % len(group)] for turn in range(longest) for group in groups.values()]


def _difficulty(data: Prompts, order: str) -> list[float]:
    """[M] numbers, of a column or of a function, called with prompts and columns."""
    if ":" in order:
        answer = call("data.order function", load_callable(order, "data.order"), prompts=data.prompts, **data.columns)
        values = as_list("data.order function", "numbers", answer, len(data.prompts))
    else:
        values = _column(data, order, "data.order")
    for row, value in enumerate(values):
        known = isinstance(value, int | float) and math.isfinite(value)
        check(known, "data.order", f"a finite number for prompt {row}", value)
    return values


def _column(data: Prompts, name: str, setting: str) -> list[object]:
    if name not in data.columns:
        raise UserError(
            f"{setting}: expected a column of the prompts ({', '.join(data.columns) or 'none'}), got {name!r}"
        )
    return data.columns[name]
