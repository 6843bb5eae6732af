"""One run, one process: the lock on a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.world import current

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems that have no flock
_held: set[int] = set()  # descriptors


@contextlib.contextmanager
def hold_directory(path: str | Path) -> Iterator[None]:
    """Lock a run directory, made if needed, against other runs within the block; of several processes rank 0 does.

    The kernel releases the lock with the process, so a killed run leaves none. A directory that is still empty after
    the block is removed. A file system without locks is a warning.

    Raises:
        UserError: another run, of this process or another one, holds the directory; or it cannot be written to.
    """
    with contextlib.ExitStack() as held:
        current().on_main(lambda: held.enter_context(_hold(path)))
        yield


@contextlib.contextmanager
def _hold(path: str | Path) -> Iterator[None]:
    directory = Path(path)
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot make {str(directory)!r}: {error.strerror}") from error
    lock = directory / LOCK
    try:
        descriptor = _locked(lock)
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {str(directory)!r}: {error.strerror}") from error
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a child that was forked within the block
            with contextlib.suppress(OSError):
                lock.unlink()
                if made:
                    directory.rmdir()
            _held.remove(descriptor)
            os.close(descriptor)


def _locked(lock: Path) -> int:
    """Return the descriptor of the locked file, which names this process."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            directory = str(lock.parent)
            if error.errno in WITHOUT_LOCKS:
                warnings.warn(
                    f"the file system of {directory!r} has no locks: let no other run write there", stacklevel=8
                )
                return descriptor
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"output_dir: {directory!r} is in use by {holder}; end that run or choose another"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
                return descriptor
        os.close(descriptor)  # its holder removed the file after it was opened here


def _let_go() -> None:
    """Close the locks in a forked child: one that outlives a killed run must not hold them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
