"""Rows of JSONL, Parquet and saved datasets; prompts, tokenised once, shuffled every epoch, in left-padded batches."""

from __future__ import annotations

import contextlib
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

NESTED = "expected lists and objects less deeply nested"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row, given to the chat template as TRL does
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
    tokenised = [(row, tokenise_prompt(row["prompt"], tokenizer, where, row)) for where, row in rows]
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
        return _checked_rows((f"{name}[{number}]", row) for number, row in enumerate(source))
    path = Path(source)
    if path.is_dir() or (path.suffix == ".parquet" and path.is_file()):
        return _checked_rows(_dataset_rows(path))
    if not path.is_file():
        raise UserError(f"{setting}: no such file {str(path)!r}")
    return _checked_rows(_json_lines(path))


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
    """A prompt as people read it: messages become one "role: content" line each, with the calls of tools as JSON."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_message_text(message)}" for message in prompt)


def tokenise_prompt(prompt: str | list[Any], tokenizer: Any, where: str, columns: Row | None = None) -> list[int]:
    """Token ids of a text, or of messages through the chat template up to where the answer begins or goes on."""
    if isinstance(prompt, str):
        ids = encode(prompt, tokenizer)
    else:
        ids = encode_bare(render_prompt(prompt, tokenizer, where, columns), tokenizer)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    return ids


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of the beginning of a sequence: with the tokenizer's BOS once, without the EOS that it appends."""
    bare, ids = encode_bare(text, tokenizer), list(tokenizer(text)["input_ids"])
    appended = len(ids) > len(bare) and ids[-1 - len(bare) :] == [*bare, tokenizer.eos_token_id]
    ids = ids[:-1] if appended else ids
    doubled = len(ids) > len(bare) and bare[:1] == ids[:1] == [tokenizer.bos_token_id]
    return ids[1:] if doubled else ids


def encode_bare(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text, and nothing that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_prompt(messages: list[Any], tokenizer: Any, where: str, columns: Row | None = None) -> str:
    """`render` up to where the answer begins; an answer that the assistant has begun is left open."""
    last = messages[-1]
    if last["role"] != "assistant":
        return render(messages, tokenizer, where, columns, add_generation_prompt=True)
    if last.get("tool_calls"):
        raise UserError(f"{where}: expected messages that end before the answer or within it, got a call of tools")
    return render(messages, tokenizer, where, columns, continue_final_message=True)


def render(messages: list[Any], tokenizer: Any, where: str, columns: Row | None = None, **options: Any) -> str:
    """The text that the chat template makes of messages.

    It is given the row's columns "tools" (JSON schemas, or their JSON text) and "chat_template_kwargs", as TRL does,
    and no key whose value is None, since Arrow adds such keys.

    Raises:
        UserError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompt is a list of messages, but the tokenizer has no chat template")
    tools, further = _template_columns(columns or {}, where)
    try:
        # A call of tools without content has an empty one: many templates add it to other text.
        given = [{"content": ""} | message for message in _without_none(messages)]
        options = _without_none(further) | options | {"tools": _without_none(tools) or None, "tokenize": False}
        text: str = tokenizer.apply_chat_template(given, **options)
    except Exception as error:  # a template is a program
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{where}: the chat template refuses the messages: {reason}") from error
    for content in (message["content"] for message in given):
        if isinstance(content, list) and str(content) in text:
            raise UserError(f"{where}: the chat template refuses the messages: it takes no list of parts as content")
    return text


def _template_columns(columns: Row, where: str) -> tuple[list[Any], Row]:
    """The tools and the further arguments of the chat template."""
    tools, further = ([] if columns.get(name) is None else columns[name] for name in TEMPLATE_COLUMNS)
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: expected tools to be a list of JSON schemas or its JSON text, got {tools!r}")
    if not isinstance(further or {}, Mapping):
        raise UserError(f"{where}: expected chat_template_kwargs to be a JSON object, got {further!r}")
    return tools, further or {}


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
                yield f"{path}:{number}", parse_line(line, f"{path}:{number}")


def parse_line(line: bytes, where: str) -> Any:
    """What a line of a JSONL file says; UserError, naming `where`, when it is not JSON."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{where}: {NESTED}") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def _checked_rows(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows, each of which can be written as JSON in UTF-8, as tokenizers and the files of a run need it."""
    for where, row in rows:
        try:
            json.dumps(
                row, ensure_ascii=False, skipkeys=True, check_circular=False, default=lambda other: None
            ).encode()
        except UnicodeEncodeError as error:
            found = ascii(error.object[error.start])
            raise UserError(f"{where}: expected Unicode text, got the lone surrogate {found}") from error
        except RecursionError as error:
            raise UserError(f"{where}: {NESTED}") from error
        yield where, row


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
    """Whether it has a role, and a text, a list of texts or calls of tools as its content."""
    if not (isinstance(value, Mapping) and isinstance(value.get("role"), str)):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return bool(content) and all(_is_text_part(part) for part in content)
    return bool(value.get("tool_calls")) if content is None else isinstance(content, str)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _message_text(message: Row) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    return f"{text} {json.dumps(_without_none(calls))}".lstrip() if calls else text


def _without_none(value: Any) -> Any:
    """`value` without the keys of nested mappings whose value is None."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
