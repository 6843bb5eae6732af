"""Rows of JSONL files, Parquet files, saved datasets, datasets of the Hub, and memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.files import check_local

# Suffixes of files: no name of a dataset ends in one.
FILES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".yaml", ".yml", ".toml")
NESTED = "expected lists and objects less deeply nested"
RESERVED = ("prompts", "completions", "completion_ids")

Row = Mapping[str, Any]  # JSON
Messages = list[dict[str, Any]]  # role/content
Prompt = str | Messages
Columns = dict[str, list[object]]  # by name
Rows = Iterator[tuple[str, Any]]  # where a row is, and the row
Item = TypeVar("Item")


def read_rows(
    source: str | Path | Iterable[object], setting: str, columns: Sequence[str] = (), subset: str | None = None
) -> Rows:
    """Iterate over (where, row) of a file, a directory saved by `datasets`, a dataset of the Hub, or rows in memory.

    `where` is file:line, file[row], or for rows in memory the last part of `setting` with the number of the row.

    Args:
        source: rows; a JSONL or Parquet file; a saved dataset; or the name of one on the Hub. A name or a saved
            dataset may end in ":SPLIT", as the datasets library writes it; without it the split is "train".
        setting: the setting that names the source, for errors.
        columns: "NAME=COLUMN", the columns of the source to rename.
        subset: configuration of a dataset on the Hub.

    Raises:
        UserError: there is no such source, which names `setting`, or it cannot be read.
    """
    if not isinstance(source, str | Path):
        name = setting.rpartition(".")[2]
        rows: Rows = ((f"{name}[{number}]", row) for number, row in enumerate(source))
    elif Path(source).is_file() and Path(source).suffix != ".parquet":
        rows = _json_lines(Path(source))
    else:
        rows = _dataset_rows(source, setting, subset)
    return _checked_rows(_renamed(rows, columns) if columns else rows)


def _renamed(rows: Rows, columns: Sequence[str]) -> Rows:
    """The rows with those columns under their new names; texts stay as they are."""
    pairs = [(ours, theirs) for ours, _, theirs in (each.partition("=") for each in columns)]
    for where, row in rows:
        if not isinstance(row, Mapping):
            yield where, row
            continue
        for _, theirs in pairs:
            if theirs not in row:
                names = ", ".join(map(repr, row))
                raise UserError(f"{where}: data.columns: expected a column {theirs!r}, got the columns {names}")
        moved = {theirs for _, theirs in pairs}
        yield where, {k: v for k, v in row.items() if k not in moved} | {ours: row[theirs] for ours, theirs in pairs}


def drop_too_long(
    items: list[Item], noun: str, field: str, limit: int, length: Callable[[Item], int], source: str
) -> list[Item]:
    """Those of at most `limit` tokens; warns about the others, UserError, naming the source, when none is left."""
    kept = [item for item in items if length(item) <= limit]
    dropped = len(items) - len(kept)
    if not items:
        raise UserError(f"{source}: expected at least one {noun}, got none")
    if not kept:
        few = f"at least one {noun} of at most {limit} tokens ({field})"
        raise UserError(f"{source}: expected {few}, got {dropped} longer")
    if dropped:
        warnings.warn(f"dropped {dropped} of {len(items)} {noun}s longer than {field} = {limit}", stacklevel=2)
    return kept


def source_name(source: object, setting: str) -> str:
    """What to call a source of rows in errors about all of it: its path, or the setting for rows in memory."""
    return str(source) if isinstance(source, str | Path) else setting


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


def check_there(source: str | Path, setting: str) -> None:
    """UserError, naming `setting`, for a path of rows that is not there and cannot be a name on the Hub."""
    if not Path(source).exists():
        check_local(setting, str(source).partition(":")[0], "file", suffixes=FILES)


def _dataset_rows(source: str | Path, setting: str, subset: str | None) -> Rows:
    """Rows by the datasets library: of a Parquet file, a saved dataset, or one on the Hub."""
    path, split = Path(source), "train"
    if not path.exists():
        check_there(source, setting)
        name, _, split = str(source).partition(":")
        path, split = Path(name), split or "train"
    import datasets  # 1 s, which JSONL files and rows in memory do not need

    where = str(source)
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        elif path.exists():  # streaming copies nothing into the cache of the library
            rows = datasets.load_dataset("parquet", data_files=where, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(str(path), subset, split=split)
        if isinstance(rows, dict):
            if split not in rows:
                raise UserError(f"{where}: expected a split {split!r}, got {', '.join(rows)}")
            rows = rows[split]
        yield from ((f"{where}[{number}]", row) for number, row in enumerate(rows))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if path.exists():
            raise UserError(f"{where}: cannot be read: {reason}") from error
        here = f"no such file {where!r} in {Path.cwd()}"
        raise UserError(f"{setting}: {here}, and no dataset of the Hub can be read by that name: {reason}") from error
