"""Rows of JSONL files, Parquet files, saved datasets and memory, and their text as token ids."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ppo_fast.rlhf.errors import UserError

NESTED = "expected lists and objects less deeply nested"
RESERVED = ("prompts", "completions", "completion_ids")

Row = Mapping[str, Any]  # JSON
Messages = list[dict[str, Any]]  # role/content
Prompt = str | Messages
Columns = dict[str, list[object]]  # by name
Rows = Iterator[tuple[str, Any]]  # where a row is, and the row
Item = TypeVar("Item")


def read_rows(source: str | Path | Iterable[object], setting: str) -> Rows:
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


def drop_too_long(items: list[Item], noun: str, field: str, limit: int, length: Callable[[Item], int]) -> list[Item]:
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


def deduplicate(items: list[Item], noun: str, key: Callable[[Item], Hashable]) -> list[Item]:
    """The first of each key, in order; warns how many are dropped."""
    first: dict[Hashable, Item] = {}
    for item in items:
        first.setdefault(key(item), item)
    kept = list(first.values())
    if len(kept) < len(items):
        warnings.warn(f"dropped {len(items) - len(kept)} of {len(items)} {noun}s that repeat another", stacklevel=2)
    return kept


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_line(line, f"{path}:{number}")


def parse_line(line: bytes, where: str) -> Any:
    """Parse a line of a JSONL file; UserError, naming `where`, when it is not JSON."""
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


def _checked_rows(rows: Rows) -> Rows:
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


def _dataset_rows(path: Path) -> Rows:
    import datasets  # 1 s, which only Parquet files and saved datasets need

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
