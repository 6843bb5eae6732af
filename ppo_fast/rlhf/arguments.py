"""Arguments of the training commands: preset, file and flags into one config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_fast.rlhf.config.files import (
    config_from_dict,
    field_defaults,
    load_config,
    merge,
    nearest_name,
    preset_names,
    read_values,
)
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import DPOConfig, RewardModelConfig, SFTConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.training.checkpoint import load_latest
from ppo_fast.rlhf.training.log import CHECKPOINTS

# Short names of the flags that nearly every run sets.
SHORT = {
    "--model": "--model.path",
    "--data": "--data.train",
    "--prompts": "--data.prompts",
    "--reward": "--reward.function",
    "--out": "--log.dir",
    "--merge": "--model.lora.merge",
}
RESUME = "--resume"


class Stage(NamedTuple):
    """A command that trains."""

    config: type[Any]
    about: str
    short: str = "--model, --merge, --data, --out"  # flags


STAGES = {
    "sft": Stage(SFTConfig, "Fine-tune a causal language model on completions."),
    "reward": Stage(RewardModelConfig, "Train a reward model on preference pairs."),
    "train": Stage(
        PPOConfig,
        "Train a causal language model by PPO.",
        "--model, --merge, --prompts, --reward FILE.py:FUNCTION, --out",
    ),
    "dpo": Stage(DPOConfig, "Train a causal language model on preference pairs by DPO."),
}
TRAIN_HELP = """\
{about}

Values come from {preset}--config FILE (YAML or TOML, the same names, nested), then the flags below.
Short flags: {short}.

--resume continues the newest checkpoint in --out; config and flags may then change the length of the run and `log.*`
alone."""


def parse(command: str, argv: Sequence[str]) -> Any:
    """The config that the arguments of a training command mean."""
    return parse_run(command, argv)[0]


def parse_run(command: str, argv: Sequence[str]) -> tuple[Any, bool]:
    """The config, and whether it continues a run."""
    stage = STAGES[command]
    if {"-h", "--help"} & set(argv):
        preset = f"--preset NAME ({', '.join(preset_names())}), then " * (stage.config is PPOConfig)
        about = TRAIN_HELP.format(about=stage.about, preset=preset, short=stage.short)
        require("tyro").cli(stage.config, args=["--help"], prog=f"ppo-fast {command}", description=about)
    flags = _read_flags([argument for argument in argv if argument != RESUME], stage.config)
    path, preset_name = (flags.pop(name, None) for name in ("config", "preset"))
    if RESUME not in argv:
        return load_config(path, preset=preset_name, flags=flags, kind=stage.config), False
    return resumed_config(read_values(path, preset=preset_name, flags=flags), stage.config), True


def resumed_config(given: Mapping[str, Any], kind: type[Any]) -> Any:
    """The config that the newest checkpoint was saved with, under what the file and the flags say."""
    log = given.get("log")
    directory = log["dir"] if isinstance(log, dict) and log.get("dir") else field_defaults(kind)["log.dir"]
    saved = load_latest(Path(str(directory)) / CHECKPOINTS, tensors=False).state["config"]
    return config_from_dict(merge(saved, given), source="resume", kind=kind)


def _read_flags(argv: Sequence[str], kind: type[Any]) -> dict[str, Any]:
    """Dotted names with what follows them: text, a list of texts, True for a bare switch, False for its "no-" form.

    "null" is None, and an empty list where a list is due.
    """
    given: dict[str, list[str]] = {}
    for argument in argv:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            given[flag] = [value] if equals else []
        elif given:
            given[flag].append(argument)
        else:
            raise UserError(f"expected an option, got {argument!r}")
    return dict(_read_flag(flag, values, kind) for flag, values in given.items())


def _read_flag(flag: str, values: list[str], kind: type[Any]) -> tuple[str, Any]:
    fields = field_defaults(kind) | {"config": None} | ({"preset": None} if kind is PPOConfig else {})
    name = SHORT.get(flag, flag)[2:].replace("-", "_")
    group, dot, last = name.rpartition(".")
    switch = group + dot + last.removeprefix("no_")
    if name not in fields and isinstance(fields.get(switch), bool) and not values:
        return switch, False
    if name not in fields:
        raise UserError(f"no option {flag!r}, the nearest is '--{nearest_name(name, kind).replace('_', '-')}'")
    if not values and not isinstance(fields[name], bool):
        raise UserError(f"{flag}: expected a value, got none")
    if len(values) > 1 and not isinstance(fields[name], tuple):
        raise UserError(f"{flag}: expected one value, got {' '.join(values)!r}")
    texts = [value for value in values if value not in ("None", "null")]
    if isinstance(fields[name], tuple):
        return name, texts
    return name, True if not values else texts[0] if texts else None
