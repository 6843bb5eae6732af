"""Prompts: JSONL in, tokenised once, shuffled every epoch, left-padded batches out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import DataConfig
from .errors import UserError, require

RESERVED = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Prompts:
    """Every usable prompt of the data set; lists of the same length M."""

    prompts: list[Any]  # [M] as given: text, or a list of role/content messages
    token_ids: list[list[int]]  # [M] lists of ints, 1 to max_prompt_tokens each
    columns: dict[str, list[Any]]  # each [M]: the other keys of the rows, for the reward function
    dropped: int  # prompts left out because they were too long


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one rollout, left-padded to the longest."""

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, True: a token of the prompt
    prompts: list[Any]  # [B] as given in the data
    columns: dict[str, list[Any]]  # each [B]


def load_prompts(source: str | Path | Iterable[Any], tokenizer: Any, config: DataConfig) -> Prompts:
    """Read prompts from a JSONL file or from memory (texts, or rows with a "prompt" key) and tokenise them.

    Raises UserError naming file and line for a line that is no prompt; warns about prompts that are too long.
    """
    rows = list(_file_rows(Path(source)) if isinstance(source, str | Path) else _memory_rows(source))
    names = sorted({name for _, row in rows for name in row} - {"prompt"})
    kept: list[tuple[Mapping[str, Any], list[int]]] = []
    for where, row in rows:
        ids = _tokenise(row, tokenizer, where)
        if len(ids) <= config.max_prompt_tokens:
            kept.append((row, ids))
    dropped = len(rows) - len(kept)
    if not kept:
        raise UserError(
            f"data: expected a prompt of at most {config.max_prompt_tokens} tokens, got {len(rows)} rows, "
            f"{dropped} of them longer"
        )
    if dropped:
        limit = f"data.max_prompt_tokens = {config.max_prompt_tokens}"
        warnings.warn(f"dropped {dropped} of {len(rows)} prompts longer than {limit}", stacklevel=2)
    return Prompts(
        prompts=[row["prompt"] for row, _ in kept],
        token_ids=[ids for _, ids in kept],
        columns={name: [row.get(name) for row, _ in kept] for name in names},
        dropped=dropped,
    )


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
            permutation = torch.randperm(self.size, generator=self.generator, device=device)
            self.order = self.arrange(permutation.tolist() if self.shuffle else list(range(self.size)))
            self.position = 0
        self.position += 1
        return self.order[self.position - 1]


def make_batch(prompts: Prompts, rows: list[int], pad_id: int, device: torch.device) -> PromptBatch:
    """Left-pad the prompts at `rows` to the longest of them."""
    ids = [prompts.token_ids[row] for row in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[pad_id] * (width - len(row)) + row for row in ids], device=device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return PromptBatch(
        input_ids=padded,
        attention_mask=torch.arange(width, device=device) >= width - lengths[:, None],
        prompts=[prompts.prompts[row] for row in rows],
        columns={name: [column[row] for row in rows] for name, column in prompts.columns.items()},
    )


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise UserError(f"data.prompts: no such file {str(path)!r}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield where, _row(json.loads(line), where)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8") from error


def _memory_rows(source: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, item in enumerate(source):
        where = f"prompts[{number}]"
        yield where, _row({"prompt": item} if isinstance(item, str) else item, where)


def _row(row: Any, where: str) -> Mapping[str, Any]:
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    messages = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in prompt)
    )
    if not (isinstance(prompt, str) or messages):
        raise UserError(f'{where}: expected {{"prompt": text or role/content messages}}, got {row!r}')
    for name in RESERVED:
        if name in row:
            raise UserError(f"{where}: the column name {name!r} is taken by the reward function's own argument")
    return row


def _tokenise(row: Mapping[str, Any], tokenizer: Any, where: str) -> list[int]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompt is a list of messages, but the tokenizer has no chat template")
    else:
        ids = _apply_template(prompt, tokenizer, where)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    return list(ids)


def _apply_template(messages: Any, tokenizer: Any, where: str) -> Any:
    template_error = require("jinja2").TemplateError
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except template_error as error:
        raise UserError(f"{where}: the chat template refuses the messages: {error}") from error
