"""Errors that the user can correct, and the checks of fields that raise them."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

# Control characters except tab and newline, line separators, marks that reorder text, halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text that steers no terminal: `\x1b` and the like are written out."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """An input the user can correct: one printable sentence; the command line prints it without a traceback."""

    origin: int | None = None  # the rank that raised it first; None: no other rank has it

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class BatchError(UserError):
    """A batch that takes no step; `on_nan` says what then. `rows` are the responses concerned, None: all."""

    def __init__(self, message: str, rows: list[int] | None = None) -> None:
        super().__init__(message)
        self.rows = rows


class NotFiniteError(BatchError):
    """A NaN or an infinity in a named tensor."""


Failed = TypeVar("Failed", bound=Exception)


def origin_of(error: Exception) -> int | None:
    """Return the rank that raised first what all ranks raise; None: no other rank has the error."""
    return getattr(error, "origin", None)


def with_origin(error: Failed, rank: int | None) -> Failed:
    """Return the error, marked as one that all ranks raise because `rank` did first."""
    error.origin = rank  # type: ignore[attr-defined]  # of any exception
    return error


def require(module: str, package: str | None = None, *, extra: str = "train") -> ModuleType:
    """Import an optional dependency on use; UserError with the command that installs `package` when it is missing.

    None: it comes with `extra`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(error.name or module, package, extra) from error


def missing_package(module: str, package: str | None = None, extra: str = "train") -> UserError:
    """The error of :func:`require`."""
    command = f"pip install {package}" if package else install_command(extra)
    return UserError(f"this command needs {module}, which is not installed: {command}")


def install_command(extra: str = "train") -> str:
    """The command that installs an extra: in a checkout from there, since no index has the package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install 'ppo-fast[{extra}]'"  # of a package that is installed pip adds the extra
    return f"pip install '{'.' if checkout == Path.cwd() else checkout}[{extra}]'"


def check(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise UserError(f"{name}: expected {expected}, got {got!r}")


def positive(name: str, value: float) -> None:
    check(value > 0 and math.isfinite(value), name, "a number > 0", value)


def not_negative(name: str, value: float) -> None:
    check(value >= 0 and math.isfinite(value), name, "a number >= 0", value)


def divides(name: str, part: int, whole_name: str, whole: int) -> None:
    positive(name, part)
    positive(whole_name, whole)
    check(whole % part == 0, name, f"a divisor of {whole_name} = {whole}", part)


@contextlib.contextmanager
def error_prefix(where: str) -> Iterator[None]:
    """Put `where` in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise with_origin(UserError(f"{where}: {error}"), error.origin) from error
