"""Rows of JSONL, Parquet and saved datasets; prompts, tokenised once, shuffled every epoch, in left-padded batches."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import DataConfig
from .errors import UserError, require

RESERVED = ("prompts", "completions", "completion_ids")
Row = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompts:
    """Every usable prompt of the data set; lists of the same length M."""

    prompts: list[Any]  # [M] as given: text, or a list of role/content messages
    token_ids: list[list[int]]  # [M] lists of ints, 1 to max_prompt_tokens each
    columns: dict[str, list[Any]]  # each [M]: the other keys of the rows, for the reward function
    dropped: int  # prompts left out: too long, or repeated with `deduplicate`


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one rollout, left-padded to the longest."""

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, True: a token of the prompt
    prompts: list[Any]  # [B] as given in the data
    columns: dict[str, list[Any]]  # each [B]


def load_prompts(
    source: str | Path | Iterable[Any], tokenizer: Any, config: DataConfig, setting: str = "data.prompts"
) -> Prompts:
    """Read prompts from a file (see `read_rows`) or from memory (texts, or rows with a "prompt" key); tokenise them.

    Raises UserError naming file and line for a row that is no prompt; warns about prompts that are left out.
    """
    rows = [(where, _prompt_row(row, where)) for where, row in read_rows(source, setting)]
    names = sorted({name for _, row in rows for name in row} - {"prompt"})
    tokenised = [(row, tokenise_prompt(row["prompt"], tokenizer, where)) for where, row in rows]
    kept = usable(tokenised, "prompt", "data.max_prompt_tokens", config.max_prompt_tokens, lambda item: len(item[1]))
    if config.deduplicate:
        kept = distinct(kept, "prompt", lambda item: tuple(item[1]))
    return Prompts(
        prompts=[row["prompt"] for row, _ in kept],
        token_ids=[ids for _, ids in kept],
        columns={name: [row.get(name) for row, _ in kept] for name in names},
        dropped=len(rows) - len(kept),
    )


def read_rows(source: str | Path | Iterable[Any], setting: str) -> Iterator[tuple[str, Any]]:
    """Iterate over (where, row) of a JSONL file, a Parquet file, a directory saved by `datasets`, or rows in memory.

    `where` is file:line, file[row], or for rows in memory the last part of `setting` with the number of the row. Of a
    saved dataset with splits the one named "train" is read.

    Raises:
        UserError: there is no such file, which names `setting`, or it cannot be read.
    """
    if not isinstance(source, str | Path):
        name = setting.rpartition(".")[2]
        return ((f"{name}[{number}]", row) for number, row in enumerate(source))
    path = Path(source)
    if path.is_dir() or (path.suffix == ".parquet" and path.is_file()):
        return _dataset_rows(path)
    if not path.is_file():
        raise UserError(f"{setting}: no such file {str(path)!r}")
    return _json_lines(path)


def usable(items: list[Item], noun: str, field: str, limit: int, length: Callable[[Item], int]) -> list[Item]:
    """Those of at most `limit` tokens; warns about the others, UserError when none is left."""
    kept = [item for item in items if length(item) <= limit]
    dropped = len(items) - len(kept)
    if not kept:
        raise UserError(
            f"data: expected at least one {noun} of at most {limit} tokens, got {len(items)} rows, "
            f"{dropped} of them longer"
        )
    if dropped:
        warnings.warn(f"dropped {dropped} of {len(items)} {noun}s longer than {field} = {limit}", stacklevel=2)
    return kept


def distinct(items: list[Item], noun: str, key: Callable[[Item], Any]) -> list[Item]:
    """The first of each key, in order; warns how many are dropped."""
    first: dict[Any, Item] = {}
    for item in items:
        first.setdefault(key(item), item)
    kept = list(first.values())
    if len(kept) < len(items):
        warnings.warn(f"dropped {len(items) - len(kept)} of {len(items)} {noun}s that repeat another", stacklevel=2)
    return kept


def is_messages(value: Any) -> bool:
    """Whether it is a list of role/content messages."""
    return bool(value) and isinstance(value, list) and all(_is_message(message) for message in value)


def as_text(prompt: Any) -> str:
    """A prompt as people read it: messages become one "role: content" line each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def tokenise_prompt(prompt: str | list[Any], tokenizer: Any, where: str) -> list[int]:
    """Token ids of a text, or of messages through the chat template up to where the answer begins."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = apply_template(prompt, tokenizer, where, add_generation_prompt=True)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    return list(ids)


def apply_template(messages: list[Any], tokenizer: Any, where: str, **options: Any) -> list[int]:
    """Token ids of messages; UserError when there is no chat template or it refuses them."""
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompt is a list of messages, but the tokenizer has no chat template")
    template_error = require("jinja2").TemplateError
    try:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    except template_error as error:
        raise UserError(f"{where}: the chat template refuses the messages: {error}") from error


class PromptSampler:
    """Endless batches of row numbers; every prompt once per epoch, a new order in each.

    `arrange` makes the rows of an epoch out of that order. `order` and `position` are the whole state, the generator
    aside.
    """

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        shuffle: bool = True,
        arrange: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.size, self.generator, self.shuffle, self.arrange = size, generator, shuffle, arrange
        self.order: list[int] = []
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers; a batch may straddle two epochs."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        if self.position == len(self.order):
            device = self.generator.device
            permutation = torch.randperm(self.size, generator=self.generator, dtype=torch.int64, device=device)
            self.order = self.arrange(permutation.tolist() if self.shuffle else list(range(self.size)))
            self.position = 0
        self.position += 1
        return self.order[self.position - 1]


def make_batch(prompts: Prompts, rows: list[int], pad_id: int, device: torch.device) -> PromptBatch:
    """Left-pad the prompts at `rows` to the longest of them."""
    ids = [prompts.token_ids[row] for row in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[pad_id] * (width - len(row)) + row for row in ids], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64, device=device)
    return PromptBatch(
        input_ids=padded,
        attention_mask=torch.arange(width, dtype=torch.int64, device=device) >= width - lengths[:, None],
        prompts=[prompts.prompts[row] for row in rows],
        columns={name: [column[row] for row in rows] for name, column in prompts.columns.items()},
    )


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8") from error


def _dataset_rows(path: Path) -> Iterator[tuple[str, Any]]:
    datasets = require("datasets")
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:  # streaming copies nothing into the cache of the library
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        if isinstance(rows, dict):
            if "train" not in rows:
                raise UserError(f"{path}: expected a split 'train', got {', '.join(rows)}")
            rows = rows["train"]
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _prompt_row(item: Any, where: str) -> Row:
    row = {"prompt": item} if isinstance(item, str) else item
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    if not (isinstance(prompt, str) or is_messages(prompt)):
        raise UserError(f'{where}: expected {{"prompt": text or role/content messages}}, got {row!r}')
    for name in RESERVED:
        if name in row:
            raise UserError(f"{where}: the column name {name!r} is taken by the reward function's own argument")
    return row


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()
