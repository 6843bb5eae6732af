"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ppo_fast.rlhf.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there completely or as it was before, even after a crash or on a full disk."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    scratch = path.with_name(f".{path.name}.new")
    try:
        with scratch.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def write_result(command: str, path: Path, content: str | bytes) -> None:
    """`write_whole` in a directory that is made if need be; UserError, naming `command`, where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{command}: cannot write {str(path)!r}: {error.strerror}") from error


def check_local(name: str, path: str, noun: str = "directory", suffixes: tuple[str, ...] = ()) -> None:
    """UserError, naming the working directory, for a path that is not there and cannot be a name on the Hub.

    Such a name has at most one slash and no leading dot, slash or tilde. If its first part is a directory here, it is
    taken for a path: without a network it takes minutes to ask the Hub for a name.
    """
    first, slash, _ = path.partition("/")
    is_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(suffixes)
    if (is_path or (slash and Path(first).is_dir())) and not Path(path).exists():
        raise UserError(f"{name}: no such {noun} {path!r} in {Path.cwd()}")


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a directory or a link, if it is there; what a link names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(OSError if ignore_errors else FileNotFoundError):
        path.unlink()


LEFT = re.compile(r"\.(.+)\.(new|old|removed)")  # hidden names of what is being written, replaced or removed


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A scratch directory that takes the place of `target`, flushed to disk, when the block succeeds.

    When the block or the exchange fails nothing changes. A link is followed: the directory that it names is replaced.
    An earlier `target` is exchanged in one step; a file system that cannot has it moved to the side first and removed
    last, and `settle` puts right what a killed process left of that.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    settle(target)
    scratch.mkdir()
    try:
        yield scratch
        _follow_umask(scratch)
        for path in sorted(scratch.rglob("*")):
            _fsync(path)
        _fsync(scratch)
        if not (target.exists() and _exchanged(scratch, target)):
            if target.exists():
                target.rename(old)
            scratch.rename(target)
        for parent in (target.parent.parent, target.parent):
            _fsync(parent)
    finally:
        settle(target)


def settle_all(directory: Path) -> None:
    """`settle` all that a killed process left in a directory where nobody else makes hidden files."""
    for path in directory.glob(".*"):
        if left := LEFT.fullmatch(path.name):
            settle(directory / left[1])


def settle(target: Path) -> None:
    """`target` as it was when it is not there, and nothing next to it of a save, an exchange or a removal cut short."""
    target = target.resolve()
    new, old, removed = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old", "removed"))
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (new, old, removed):
        remove(path, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two paths in one step, where system and file system can (Linux: renameat2 with RENAME_EXCHANGE)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _follow_umask(directory: Path) -> None:
    """Give all that is in a directory just made the mode that the umask gave it: safetensors makes files of 0600."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    for path in directory.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
