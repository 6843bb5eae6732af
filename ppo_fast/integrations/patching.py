"""Replaces functions of another project wherever they were imported, says what it did, and takes it back.

Every function is looked up and compared with the known sources before anything is replaced. A source that is not known
is an error: the replacement was written for the known source and tested only against it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch

_ACTIVE: dict[str, Report] = {}


class NotTaken(NamedTuple):
    """Returned by a replacement for inputs that it does not take: the original runs, and is counted."""

    reason: str


@dataclass(frozen=True)
class Target:
    """One function of the other project.

    Attributes:
        module: where it is defined.
        name: in that module; ``Class.method`` for a method.
        op: what runs instead.
        digests: release -> :func:`digest` of its source there, followed by those of ``helpers``.
        helpers: functions of its module that it calls and the op stands for as well.
        build: original -> replacement, of the same arguments; the replacement may return :class:`NotTaken`.
        optional: some known release has no such function.
    """

    module: str
    name: str
    op: str
    digests: dict[str, str]
    build: Callable[[Callable[..., Any]], Callable[..., Any]]
    helpers: tuple[str, ...] = ()
    optional: bool = False


class _Found(NamedTuple):
    target: Target
    owner: Any  # the module, or the class of a method
    attribute: str
    original: Callable[..., Any]


@dataclass
class Report:
    """The functions that a patch has replaced; as a context manager it undoes the patch at the end.

    Attributes:
        package: the other project and its version.
        replaced: "module.function" -> the places where it was found and replaced.
        kept: "module.function" -> why it was not replaced.
        calls: how often each replacement ran its op. Calls traced by ``torch.compile`` are not counted.
        fallbacks: (function, reason) -> how often the original ran instead.
    """

    package: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    _swaps: list[tuple[_Found, Callable[..., Any]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put every original back, also where it was imported after the patch. A second call does nothing."""
        while self._swaps:
            found, replacement = self._swaps.pop()
            _put(found, replacement, found.original)
        if _ACTIVE.get(self._project) is self:
            del _ACTIVE[self._project]

    @property
    def _project(self) -> str:
        return self.package.split()[0]

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"ppo_fast in {self.package}{'' if self._swaps else ' (undone)'}"]
        for name, places in self.replaced.items():
            lines.append(f"  replaced {name} ({len(places)}x), {self.calls[name]} calls")
        lines += [f"  kept     {name}: {reason}" for name, reason in self.kept.items()]
        lines += [f"  original {name}, {count} calls: {why}" for (name, why), count in self.fallbacks.items()]
        return "\n".join(lines)


def digest(*functions: Callable[..., Any]) -> str:
    """The first 16 hex digits of the SHA-256 of the functions' sources, without indentation and trailing blanks."""
    sources = (textwrap.dedent(inspect.getsource(function)).splitlines() for function in functions)
    text = "\n".join(line.rstrip() for lines in sources for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rewritten(function: Callable[..., Any], spans: dict[tuple[str, str], str], **names: Any) -> Callable[..., Any]:
    """``function`` with spans of its source exchanged, in its own module's namespace; ``names`` are for the new lines.

    Args:
        spans: (first line, the line after the last) -> new lines. Lines are given without indentation.

    Raises:
        ValueError: a line is not in the source, or the first one is there twice.
    """
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    for (first, after), new in spans.items():
        bare = [line.strip() for line in lines]
        if bare.count(first) != 1 or after not in bare[bare.index(first) :]:
            raise ValueError(f"{function.__qualname__}: expected {first!r} once and {after!r} after it")
        start = bare.index(first)
        indent = lines[start][: -len(first)]
        lines[start : bare.index(after, start)] = textwrap.indent(textwrap.dedent(new).strip("\n"), indent).splitlines()
    source = textwrap.indent("\n".join(lines), "    ")
    outer = f"def build({', '.join(names)}):\n{source}\n    return {function.__name__}\n"
    local: dict[str, Any] = {}
    exec(compile(outer, f"<ppo_fast: {function.__qualname__}>", "exec"), function.__globals__, local)
    return local["build"](**names)


def patch(caller: str, package: str, targets: Sequence[Target], kept: dict[str, str]) -> Report:
    """Replace all ``targets`` or, with an exception, none; ``kept`` says what else a user may look for, and why not.

    Raises:
        ValueError: a patch is in effect already, or the source of a target is not known.
        ModuleNotFoundError: the project, or something it needs, is not installed.
    """
    if package in _ACTIVE:
        raise ValueError(f"{caller}: expected {package} without a patch in effect, got a second one; undo the first")
    importlib.import_module(package)
    report = Report(f"{package} {_version(package)}")
    found = [item for target in targets if (item := _find(caller, report, target))]
    report.kept |= kept
    try:
        for item in found:
            name = f"{item.target.module}.{item.target.name}"
            replacement = _counting(name, item, report)
            report._swaps.append((item, replacement))
            report.replaced[name] = _put(item, item.original, replacement)
    except BaseException:
        report.undo()
        raise
    _ACTIVE[package] = report
    return report


def _version(package: str) -> str:
    """The installed version; a checkout that is only on the path has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout"


def _find(caller: str, report: Report, target: Target) -> _Found | None:
    """The target's original, of known source; None where this release has none, with a line in the report."""
    name = f"{target.module}.{target.name}"
    try:
        owner: Any = importlib.import_module(target.module)
        *classes, attribute = target.name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        original = vars(owner)[attribute]
    except ModuleNotFoundError as error:
        if not target.optional:
            raise
        report.kept[name] = str(error)
        return None
    except (AttributeError, KeyError):
        if not target.optional:
            raise ValueError(f"{caller}: expected {name}, got none in {report.package}") from None
        report.kept[name] = f"{report.package} has none"
        return None
    helpers = [getattr(sys.modules[target.module], helper) for helper in target.helpers]
    if digest(original, *helpers) not in target.digests.values():
        known = ", ".join(target.digests)
        raise ValueError(f"{caller}: expected {name} as in {known}, got another source in {report.package}")
    return _Found(target, owner, attribute, original)


def _counting(name: str, found: _Found, report: Report) -> Callable[..., Any]:
    """The replacement, with the original's name and signature, counted; the original where it is not taken."""
    original, ours = found.original, found.target.build(found.original)

    # The attributes of the original stay behind: those of torch.compile would make a compiled function of this one.
    @functools.wraps(original, updated=())
    def replacement(*args: Any, **kwargs: Any) -> Any:
        counts = not torch.compiler.is_compiling()  # a counter would be a guard, and every call a recompilation
        if counts:
            report.calls[name] += 1
        result = ours(*args, **kwargs)
        if not isinstance(result, NotTaken):
            return result
        if counts:
            report.calls[name] -= 1
            report.fallbacks[name, result.reason] += 1
        return original(*args, **kwargs)

    return replacement


def _put(found: _Found, old: Callable[..., Any], new: Callable[..., Any]) -> list[str]:
    """Put ``new`` wherever a loaded module holds ``old``; a method in its class. Returns the places."""
    if isinstance(found.owner, type):
        setattr(found.owner, found.attribute, new)
        return [f"{found.owner.__module__}.{found.owner.__qualname__}.{found.attribute}"]
    places = []
    for name, namespace in _namespaces(found.target.module.split(".")[0]):
        for key in [key for key, value in list(namespace.items()) if value is old]:
            namespace[key] = new
            places.append(f"{name}.{key}")
    return places


def _namespaces(package: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The names of every loaded module, and in the package also the dicts among them: its registries."""
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if type(namespace) is not dict:
            continue
        yield name, namespace
        if name.split(".")[0] == package:
            registries = [(key, value) for key, value in namespace.items() if type(value) is dict and key[:2] != "__"]
            yield from ((f"{name}.{key}", value) for key, value in registries)
