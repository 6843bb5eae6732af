"""Configs from YAML or TOML files, presets and flags, and back to a file."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from ppo_fast.rlhf.config.names import Values, check_names, leaves
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.run import RunConfig
from ppo_fast.rlhf.errors import UserError, error_prefix, require
from ppo_fast.rlhf.files import write_whole

PRESETS = Path(__file__).parent / "presets"
Config = TypeVar("Config", bound=RunConfig)


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    flags: Values | None = None,
    kind: type[Config] = PPOConfig,  # type: ignore[assignment]  # a default of a type variable
) -> Config:
    """A config of `kind`: flags {"optim.lr": "1e-5"} over a YAML or TOML file over a preset over the defaults.

    The preset is `preset`, or that of the file's own key ``preset``.

    Raises UserError for a missing file, an unknown key (naming the nearest one) or a value of the wrong type.
    """
    values = read_values(path, preset=preset, flags=flags)
    sources = [str(path or preset)] if path or preset else []
    return config_from_dict(values, source=" and ".join(sources + ["flags"] * bool(flags)) or "config", kind=kind)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_values(path: str | Path | None, *, preset: str | None = None, flags: Values | None = None) -> Values:
    """What flags, file and preset say, nested; neither checked nor complete.

    A file may name the preset that it extends: ``preset: 7b-80g-lora``.
    """
    file = {} if path is None else dict(_read(Path(path)))
    extended = file.pop("preset", None)
    if preset is not None and extended is not None:
        raise UserError(f"preset: expected none with {str(path)!r}, which extends {extended!r}, got {preset!r}")
    values = merge(_read_preset(preset or extended), file)
    for name, value in (flags or {}).items():
        nested = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def _read_preset(name: str | None) -> Values:
    if name is None:
        return {}
    known = preset_names()
    if name not in known:
        raise UserError(f"preset: expected one of {', '.join(known)}, got {name!r}")
    return _read(PRESETS / f"{name}.yaml")


def config_from_dict(
    values: Values,
    *,
    source: str = "config",
    kind: type[Config] = PPOConfig,  # type: ignore[assignment]
) -> Config:
    """Build a config from nested mappings; strings such as "1e-5" become numbers where a number is due."""
    with error_prefix(source):
        check_names(values, kind)
        return kind(**values)


def save_config(config: RunConfig, path: Path) -> None:
    """Write every field, defaults included, as YAML that `load_config` reads back to an equal config."""
    write_whole(path, require("yaml").safe_dump(dataclasses.asdict(config), sort_keys=False))


def _read(path: Path) -> Values:
    if not path.is_file():
        raise UserError(f"config: no such file {str(path)!r} in {Path.cwd()}")
    if path.suffix == ".toml":
        toml = _toml()
        parse, failure = toml.loads, toml.TOMLDecodeError
    else:
        yaml = require("yaml")
        parse, failure = yaml.safe_load, yaml.YAMLError
    try:
        values = parse(path.read_text(encoding="utf-8")) or {}
    except (failure, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def _toml() -> ModuleType:
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError:
        return require("tomli")


def merge(base: Values, over: Values) -> Values:
    """Nested `base` with the values of `over`."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def first_difference(a: RunConfig, b: RunConfig, free: Sequence[str] = ()) -> tuple[str, object, object] | None:
    """The dotted name of the first field that differs between two configs of one kind, with both values.

    Fields that `free` names, by themselves or by their group, may differ.
    """
    pairs = zip(leaves(dataclasses.asdict(a)), leaves(dataclasses.asdict(b)), strict=True)
    differing = ((name, x, y) for (name, x), (_, y) in pairs if x != y)
    return next(
        (found for found in differing if not f"{found[0]}.".startswith(tuple(f"{name}." for name in free))), None
    )
