r"""Rewards that need no model, to import or to name: `reward.function: ppo_fast.rewards:exact_answer`.

Each takes what any reward function takes, the prompts' columns by keyword, and returns 1 or 0 for each completion.
Combine them in a function of your own::

    from ppo_fast.rewards import matches_format, numeric_answer

    def reward(**batch):
        return [right + 0.1 * form for right, form in zip(numeric_answer(**batch), matches_format(**batch))]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ppo_fast.rlhf.errors import UserError, require

THINK = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?")
FRACTION = re.compile(r"\\d?frac\{(-?\d+)\}\{(\d+)\}")
RELATIVE = 1e-9  # difference of numbers that are the same answer


def exact_answer(completions: Sequence[str], answer: Sequence[object], **_: Any) -> list[float]:
    r"""1 where the completion's last ``\boxed{...}``, or else its whole text, is the column ``answer``.

    Runs of white space count as one space.

    >>> exact_answer(["so it is \\boxed{x^{2} + 1}.", " Paris\n", "Paris, France"], ["x^{2} + 1", "Paris", "Paris"])
    [1.0, 1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_words(boxed(text) or text) == _words(str(truth))) for text, truth in pairs]


def numeric_answer(completions: Sequence[str], answer: Sequence[object], **_: Any) -> list[float]:
    r"""1 where the last number in the completion's last ``\boxed{...}``, or else in its text, is that of ``answer``.

    The column holds numbers, or texts whose last number is the answer, as GSM8K has them. Thousands may be set off by
    commas; ``3/4`` and ``\frac{3}{4}`` are numbers.

    >>> texts = ["12 + 30 makes 1,042.", "\\boxed{\\frac{3}{4}}, not 1", "none", "41"]
    >>> numeric_answer(texts, [1042, 0.75, 1, "#### 42"])
    [1.0, 1.0, 0.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_same(last_number(boxed(text) or text), last_number(str(truth)))) for text, truth in pairs]


def json_schema(
    completions: Sequence[str], schema: Sequence[dict[str, Any] | str | None] | None = None, **_: Any
) -> list[float]:
    """1 where the completion, or the last fenced block in it, is JSON that its column ``schema`` accepts.

    A schema is an object or its JSON text; without one any JSON will do. Needs the package jsonschema.

    Raises UserError for a schema that is none.

    >>> number = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    >>> json_schema(['{"n": 1}', '{"n": "1"}', "Here it is: {", 'Here:\\n```json\\n{"n": 2}\\n```'], [number] * 4)
    [1.0, 0.0, 0.0, 1.0]
    """
    schemas = [None] * len(completions) if schema is None else schema
    return [float(_accepts(each, text)) for each, text in zip(schemas, completions, strict=True)]


def within_length(completion_ids: Sequence[Sequence[int]], max_tokens: Sequence[int], **_: Any) -> list[float]:
    """1 where the completion has at most as many tokens, its EOS included, as its column ``max_tokens`` says.

    >>> within_length([[5, 6, 2], [5, 6, 7, 2]], max_tokens=[3, 3])
    [1.0, 0.0]
    """
    return [float(len(ids) <= most) for ids, most in zip(completion_ids, max_tokens, strict=True)]


def matches_format(completions: Sequence[str], pattern: Sequence[str | None] | None = None, **_: Any) -> list[float]:
    """1 where the whole completion matches its column ``pattern``, a regular expression whose ``.`` takes line ends.

    Without one the format is ``<think>...</think><answer>...</answer>`` (DeepSeek-AI 2025, arXiv:2501.12948, table 1).

    >>> matches_format(["<think>2 and 2</think>\\n<answer>4</answer>", "<answer>4</answer>"])
    [1.0, 0.0]
    >>> matches_format(["yes", "yes, sir"], pattern=["yes|no"] * 2)
    [1.0, 0.0]
    """
    patterns = [None] * len(completions) if pattern is None else pattern
    pairs = zip(patterns, completions, strict=True)
    return [float(re.fullmatch(each or THINK, text, re.DOTALL) is not None) for each, text in pairs]


def boxed(text: str) -> str | None:
    r"""The contents of the last ``\boxed{...}`` whose braces close; None where there is none.

    >>> boxed(r"\boxed{1} or rather \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start:place]
    return None


def last_number(text: str) -> float | None:
    """The last number of a text; None where there is none, or none that is finite.

    >>> last_number("from 1,000 to -2.5 in 2024"), last_number("v2 of H2O"), last_number("1/0")
    (2024.0, None, None)
    """
    found = NUMBER.findall(FRACTION.sub(r" \1/\2", text))
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    divisor = float(below or 1)
    value = float(above) / divisor if divisor else math.inf
    return value if math.isfinite(value) else None


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=RELATIVE)


def _words(text: str) -> str:
    return " ".join(text.split())


def _accepts(schema: dict[str, Any] | str | None, text: str) -> bool:
    blocks = FENCED.findall(text)
    try:
        value = json.loads(blocks[-1] if blocks else text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return False
    return schema is None or bool(_validator(schema).is_valid(value))


def _validator(schema: dict[str, Any] | str) -> Any:
    jsonschema = require("jsonschema", "jsonschema")
    try:
        rules = json.loads(schema) if isinstance(schema, str) else schema
        kind = jsonschema.validators.validator_for(rules)
        kind.check_schema(rules)
    except (ValueError, jsonschema.SchemaError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"json_schema: expected a JSON schema in the column 'schema', got {schema!r}: {reason}"
        ) from error
    return kind(rules)


def _no_number(name: str) -> float:
    """NaN and Infinity, which Python reads, are no JSON."""
    raise ValueError(name)
