"""The user's own Python: "file.py:function" or "module:function", called by keyword, named when it fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ppo_fast.rlhf.errors import UserError


def load_callable(spec: str | None, setting: str) -> Callable[..., Any]:
    """Load "path/to/file.py:function" or "module:function"; UserError, naming `setting`, when it cannot be had."""
    path, separator, name = (spec or "").rpartition(":")
    if not separator:
        raise UserError(f"{setting}: expected 'path/to/file.py:function' or 'module:function', got {spec!r}")
    module = _imported(path, setting) if names_module(path) else _from_file(path, setting)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{setting}: no function {name!r} in {path!r}")
    return function


def names_module(path: str) -> bool:
    """Whether the part of a spec before the colon is a module's dotted name; a file of that name wins."""
    is_name = all(part.isidentifier() for part in path.split(".")) and not path.endswith(".py")
    return is_name and not Path(path).is_file()


def source_of(path: str) -> Path | None:
    """The file of a spec, `path` the part before the colon; None where there is none."""
    if not names_module(path):
        return Path(path) if Path(path).is_file() else None
    origin = getattr(sys.modules.get(path), "__file__", None)
    return Path(origin) if origin else None


def _imported(name: str, setting: str) -> ModuleType:
    """Import a module; like any import it is made once in a process."""
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{setting}: no such module {name!r}, and no file of that name in {Path.cwd()}") from error
        raise UserError(f"{setting}: {name!r} does not import: {_told(error)}") from error


def _from_file(path: str, setting: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"{setting}: no such file {path!r} in {Path.cwd()}")
    if Path(path).suffix != ".py":
        raise UserError(f"{setting}: expected a Python file, got {path!r}")
    try:
        return _module(str(Path(path).resolve()), Path(path).stat().st_mtime_ns)
    except (Exception, SystemExit) as error:
        raise UserError(f"{setting}: {path!r} does not import: {_told(error)}") from error


def clear_module_cache() -> None:
    """Load every file again from here on, so that a run does not begin with the variables another run left."""
    _module.cache_clear()


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the file itself: compiled code of an earlier import passes for that of a file written in its second."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


@functools.lru_cache
def _module(path: str, changed: int) -> ModuleType:
    """The file as a module, the same one for every function in it; `changed` is when it was last written."""
    name = f"user_file_{Path(path).stem}"
    module_spec: Any = importlib.util.spec_from_file_location(name, path, loader=_Source(name, path))
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    module_spec.loader.exec_module(module)
    return module


def call(role: str, function: Callable[..., object], /, *records: object, **arguments: object) -> object:
    """The function's answer; UserError, "the <role> <name> failed with ...", when it raises or exits.

    The function gets `records` as they are, and copies of the lists and dicts in `arguments`, so that emptying them
    changes nothing of ours. A generator runs here.
    """
    try:
        answer = function(*records, **{name: _copied(value) for name, value in arguments.items()})
        return list(answer) if isinstance(answer, Iterator) else answer
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _failure(role, function, error) from error


def call_async(
    role: str, function: Callable[..., object], setting: str, seconds: float | None, /, **arguments: object
) -> object:
    """:func:`call`, except that the answer may be awaitable, or a list of awaitables, which are awaited together.

    They run in an event loop of their own thread, the same for all calls of the process, so that the clients a user
    keeps stay usable and a loop that already runs, such as a notebook's, does not matter. UserError, which names
    `setting`, when they take longer than `seconds`; None: no limit.
    """
    answer = call(role, function, **arguments)
    parts = answer if isinstance(answer, list | tuple) else [answer]
    if not any(map(inspect.isawaitable, parts)):
        return answer
    future = asyncio.run_coroutine_threadsafe(_outcome(answer), _event_loop())
    try:
        value, error = future.result(seconds)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise UserError(f"{setting}: the {role} {_name(function)!r} gave no answer within {seconds:g} s") from None
    if error is not None:
        raise error if isinstance(error, UserError) else _failure(role, function, error) from error
    return value


async def _outcome(answer: Any) -> tuple[Any, BaseException | None]:
    """The value of the answer and of the awaitables in it, or the first error."""
    value, error = await _caught(answer)
    if error is None and isinstance(value, list | tuple):
        parts = await asyncio.gather(*map(_caught, value))
        value, error = [part for part, _ in parts], next((error for _, error in parts if error is not None), None)
    return value, error


async def _caught(answer: Any) -> tuple[Any, BaseException | None]:
    """The value and None, or None and the error: a SystemExit that leaves a task ends the event loop."""
    try:
        return (await answer if inspect.isawaitable(answer) else answer), None
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        return None, error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all asynchronous user code; its thread ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="ppo_fast user code", daemon=True).start()
    return loop


def _failure(role: str, function: Callable[..., object], error: BaseException) -> UserError:
    return UserError(f"the {role} {_name(function)!r} failed with {_told(error)}")


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", type(function).__name__)


class UserState:
    """The state of a user's callable as a part of a run; its failures are named like those of the callable."""

    def __init__(self, role: str, owner: Any) -> None:
        self.role, self.owner = role, owner

    def state_dict(self) -> object:
        def state_dict() -> object:
            return self.owner.state_dict()

        return call(f"{self.role}'s", state_dict)

    def load_state_dict(self, state: object) -> None:
        def load_state_dict() -> None:
            self.owner.load_state_dict(state)

        call(f"{self.role}'s", load_state_dict)


def _copied(value: object) -> object:
    """Lists and dicts within each other as new ones; everything else as it is."""
    if type(value) is list:
        return [_copied(item) if type(item) in (list, dict) else item for item in value]
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def as_list(role: str, noun: str, answer: object, count: int) -> list[Any]:
    """The answer as a list of `count` plain Python values; UserError when it is none."""
    try:
        answer = list(to_python(answer))
    except TypeError as error:
        raise UserError(f"{role}: expected a list of {count} {noun}, got {answer!r}") from error
    if len(answer) != count:
        raise UserError(f"{role}: expected {count} {noun}, got {len(answer)}")
    return [to_python(value) for value in answer]


def to_python(value: object) -> Any:
    """Numbers and lists of tensors and of NumPy arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _told(error: BaseException) -> str:
    """Type and message of an error in the user's code, and the innermost line of the user's file, in one line."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, importlib.__file__)
    theirs = [frame for frame in frames if frame.filename not in ours and not frame.filename.startswith("<frozen")]
    lines = [frame.lineno for frame in theirs if frame.filename == theirs[0].filename]
    return f"{message} ({Path(theirs[0].filename).name}:{lines[-1]})" if theirs else message
