"""Tokenized examples: a prompt with a completion, or with a chosen and a rejected one; right-padded batches of them.

The formats are TRL's: texts, or role/content messages through the tokenizer's chat template.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ppo_fast.rlhf.config.supervised import ExamplesConfig
from ppo_fast.rlhf.data.packing import TokenBatch, to_device
from ppo_fast.rlhf.data.rows import Item, Messages, Prompt, Row, deduplicate, drop_too_long, read_rows, source_name
from ppo_fast.rlhf.data.templates import encode, encode_bare, is_messages, render, render_prompt
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.world import by_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A prompt and its completion."""

    ids: tuple[int, ...]  # of both, EOS included
    start: int  # of the completion, >= 1
    joined: bool = True  # False: the text of both, tokenized at once, has no boundary there

    @property
    def parts(self) -> tuple[Example, ...]:
        """The sequences it is made of."""
        return (self,)

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def highest(self) -> int:
        return max(self.ids)

    @property
    def weight(self) -> int:
        """Its share in a mean: the tokens of the completion."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Scored(Example):
    """A prompt and a response with its score."""

    score: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example
    margin: float = 0.0  # how far apart their scores should be

    @property
    def parts(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)

    @property
    def highest(self) -> int:
        return max(self.chosen.highest, self.rejected.highest)

    @property
    def weight(self) -> int:
        """Its share in a mean."""
        return 1

    @property
    def joined(self) -> bool:
        return self.chosen.joined and self.rejected.joined


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] bool, True: a token of the prompt or the completion
    mask: Tensor  # [B, L] bool, True: a token of the completion
    grid: TokenBatch  # the same with masks on the host


TASK = frozenset({"prompt", "completion", "messages"})  # keys of an example that "text" is no part of
Kind = TypeVar("Kind", Example, Pair, Scored)
Make = Callable[[Row, "PreTrainedTokenizerBase", str], Kind]  # (row, tokenizer, where it came from)


@by_all_ranks
def load_examples(
    source: str | Path | Iterable[object] | None,
    name: str,
    make: Make[Kind],
    tokenizer: PreTrainedTokenizerBase,
    config: ExamplesConfig,
) -> list[Kind]:
    """Read `data.<name>` (see `read_rows`) and tokenize it by `make`.

    Raises UserError naming file and line for a row of another format; warns about examples that are left out.
    """
    if source is None:
        raise UserError(f"data.{name}: expected a file of examples, got null")
    setting, limit = f"data.{name}", config.max_tokens
    rows = read_rows(source, setting, config.columns, config.subset)
    examples = [make(row, tokenizer, where) for where, row in rows]
    called = source_name(source, setting)
    kept = drop_too_long(examples, "example", "data.max_tokens", limit, lambda example: example.length, called)
    if config.deduplicate:
        kept = deduplicate(kept, "example", lambda example: example)
    apart = sum(not example.joined for example in kept)
    if apart:
        warnings.warn(
            f"in {apart} of {len(kept)} examples a token spans the end of the prompt; there prompt and completion "
            "were tokenized apart (completions usually begin with a space)",
            stacklevel=2,
        )
    return kept


def completion_example(
    row: Row, tokenizer: PreTrainedTokenizerBase, where: str, eos_ids: Collection[int] = ()
) -> Example:
    """{"prompt", "completion"}; {"messages"} whose last one, the assistant's, is the completion; or {"text"}.

    All tokens of a text except the first, which nothing predicts, are the completion. `eos_ids` end a completion as the
    tokenizer's EOS does, which is appended where there is none.
    """
    text: object = row.get("text") if isinstance(row, Mapping) and not row.keys() & TASK else None
    if isinstance(text, str):
        return _whole_text(text, tokenizer, where, eos_ids)
    messages: object = row.get("messages") if isinstance(row, Mapping) else None
    if is_messages(messages) and len(messages) > 1 and messages[-1]["role"] == "assistant":
        row = {**row, "prompt": messages[:-1], "completion": messages[-1:]}
    prompt, completion = _fields(row, where, "prompt", "completion")
    return _tokenize(prompt, completion, tokenizer, where, row, eos_ids)


def _whole_text(text: str, tokenizer: PreTrainedTokenizerBase, where: str, eos_ids: Collection[int]) -> Example:
    ids = ended(encode(text, tokenizer), tokenizer, eos_ids)
    if len(ids) < 2:
        raise UserError(f"{where}: the text has no tokens")
    return Example(tuple(ids), 1)


def scored_example(row: Row, tokenizer: PreTrainedTokenizerBase, where: str, eos_ids: Collection[int] = ()) -> Scored:
    """{"prompt", "completion", "score"[, "ended"]}, or {"prompt_ids", "completion_ids", "score"} as they were sampled.

    A completion that has not "ended" was cut short and gets no EOS. One that was "sampled" after the prompt's tokens
    has a boundary there. `eos_ids` are those of `completion_example`.
    """
    score = row.get("score") if isinstance(row, Mapping) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise UserError(f"{where}: expected a finite number as score, got {score!r}")
    if "completion_ids" in row:
        start, rest = row["prompt_ids"], row["completion_ids"]
        return Scored((*start, *rest), len(start), score=float(score))
    example = completion_example(row, tokenizer, where, eos_ids)
    ids = example.ids if row.get("ended", True) else example.ids[:-1]
    if len(ids) == example.start:
        raise UserError(f"{where}: the completion has no tokens")
    return Scored(ids, example.start, example.joined or "sampled" in row, float(score))


def preference_pair(row: Row, tokenizer: PreTrainedTokenizerBase, where: str, eos_ids: Collection[int] = ()) -> Pair:
    """{"prompt", "chosen", "rejected"[, "margin"]}; without "prompt" it is what the two have in common.

    `eos_ids` are those of `completion_example`.
    """
    if isinstance(row, Mapping) and row.get("prompt") is None:
        row = dict(row) | _split_prompt(*_fields(row, where, "chosen", "rejected"))
    prompt, chosen, rejected = _fields(row, where, "prompt", "chosen", "rejected")
    margin = row.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float | None):
        raise UserError(f"{where}: expected a number as margin, got {margin!r}")
    return Pair(
        _tokenize(prompt, chosen, tokenizer, where, row, eos_ids),
        _tokenize(prompt, rejected, tokenizer, where, row, eos_ids),
        float(margin or 0.0),
    )


def sequences(examples: Sequence[Kind]) -> list[Example]:
    """The examples themselves; of pairs all that were chosen, then all that were rejected."""
    return [part for column in zip(*(example.parts for example in examples), strict=True) for part in column]


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad the examples to the longest of them."""
    width = max(example.length for example in examples)
    rows = [[*e.ids, *[pad_id] * (width - e.length)] for e in examples]
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    start, end = np.array([[e.start, e.length] for e in examples]).T[..., None]
    position = np.arange(width)
    grid = TokenBatch(ids, position < end, (position >= start) & (position < end))
    return Batch(ids, to_device(grid.attention, device), to_device(grid.loss_mask, device), grid)


class Batches:
    """Endless batches of row numbers; every row once per epoch, a new order in each.

    With `bucket` the rows of every `WINDOW` batches are sorted by length before they are cut. An epoch's last batch
    may be smaller. `order` and `position` are the whole state
    except the generator.
    """

    WINDOW = 50

    def __init__(self, lengths: Sequence[int], size: int, generator: torch.Generator, *, bucket: bool) -> None:
        self.lengths, self.size, self.generator, self.bucket = lengths, size, generator, bucket
        self.order: list[list[int]] = []
        self.position = 0

    def state_dict(self) -> dict[str, object]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.lengths) // self.size)

    def take(self) -> list[int]:
        """The next batch."""
        if self.position == len(self.order):
            self.order, self.position = self._epoch(), 0
        self.position += 1
        return self.order[self.position - 1]

    def _epoch(self) -> list[list[int]]:
        rows = self._shuffled(range(len(self.lengths)))
        if self.bucket:
            windows = chunks(rows, self.WINDOW * self.size)
            rows = [row for window in windows for row in sorted(window, key=self.lengths.__getitem__)]
        return self._shuffled([list(batch) for batch in chunks(rows, self.size)])

    def _shuffled(self, items: Sequence[Item]) -> list[Item]:
        device = self.generator.device
        order = torch.randperm(len(items), generator=self.generator, dtype=torch.int64, device=device)
        return [items[index] for index in order.tolist()]


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of `size` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _tokenize(
    prompt: Prompt,
    completion: Any,  # text, or messages, as the prompt
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    columns: Row,
    eos_ids: Collection[int],
) -> Example:
    if isinstance(prompt, str):
        start, rest, joined = split_tokens(prompt, completion, tokenizer, encode)
    else:
        before = render_prompt(prompt, tokenizer, where, columns)
        whole = render(continued(prompt, completion), tokenizer, where, columns)
        if not whole.startswith(before):
            raise UserError(f"{where}: expected the chat template of the prompt to begin that of prompt and completion")
        start, rest, joined = split_tokens(before, whole[len(before) :], tokenizer, encode_bare)
    if not start:
        raise UserError(f"{where}: the prompt has no tokens")
    return Example((*start, *ended(rest, tokenizer, eos_ids)), len(start), joined)


def split_tokens(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Callable[[str, PreTrainedTokenizerBase], list[int]],
) -> tuple[list[int], list[int], bool]:
    """Token ids of two texts, and whether those of the whole text, `encoded` at once, have a boundary there.

    Where they have none the completion is tokenized by itself.
    """
    start, both = encoded(prompt, tokenizer), encoded(prompt + completion, tokenizer)
    joined = both[: len(start)] == start
    return start, both[len(start) :] if joined else encode_bare(completion, tokenizer), joined


def continued(prompt: Messages, completion: Messages) -> Messages:
    """The messages of both; an answer that the prompt begins goes on in the completion, as one message."""
    last, first = prompt[-1], completion[0]
    if not last["role"] == first["role"] == "assistant":
        return [*prompt, *completion]
    begun, rest = last["content"], first.get("content") or ""
    if isinstance(begun, list) or isinstance(rest, list):
        begun, rest = ([{"type": "text", "text": x}] if isinstance(x, str) else x for x in (begun, rest))
    return [*prompt[:-1], {**last, **first, "content": begun + rest}, *completion[1:]]


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> list[int]:
    """The completion with an EOS as its last token; white space that a template writes after it is dropped."""
    eos = tokenizer.eos_token_id
    end = max((place for place, token in enumerate(ids, start=1) if token == eos or token in eos_ids), default=0)
    return ids[:end] if end and not tokenizer.decode(ids[end:]).strip() else [*ids, eos]


def _fields(row: object, where: str, *names: str) -> list[Any]:
    """The columns of those names: all texts, or all messages."""
    values = [row.get(name) for name in names] if isinstance(row, Mapping) else []
    if values and (all(isinstance(value, str) for value in values) or all(map(is_messages, values))):
        return values
    columns = ", ".join(f'"{name}"' for name in names)
    raise UserError(f"{where}: expected {columns}, all of them text or all role/content messages, got {row!r}")


def _split_prompt(chosen: Prompt, rejected: Prompt) -> dict[str, object]:
    """Their common beginning as the prompt: whole words of texts, whole messages of conversations."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    end = min(sum(1 for _ in same), len(chosen) - 1, len(rejected) - 1)
    if isinstance(chosen, str):
        end = max(chosen.rfind(" ", 0, end), 0)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
