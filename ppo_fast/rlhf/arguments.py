"""Arguments of the training commands: preset, file and flags into one config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

from ppo_fast.rlhf.config.files import (
    Config,
    config_from_dict,
    load_config,
    merge,
    preset_names,
    read_values,
)
from ppo_fast.rlhf.config.names import Values, check_names, field_defaults, hint
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.renamed import old_keys
from ppo_fast.rlhf.config.run import RunConfig
from ppo_fast.rlhf.config.supervised import DPOConfig, RewardModelConfig, SFTConfig, ValueConfig
from ppo_fast.rlhf.errors import UserError, error_prefix, require

# Short names of the flags that nearly every run sets.
SHORT = {
    "model.path": "--model",
    "data.train": "--data",
    "data.prompts": "--prompts",
    "reward.function": "--reward",
    "output_dir": "--out",
    "model.lora.merge": "--merge",
}
CONFIG, PRESET, RESUME = "config", "preset", "resume"  # flags that are no fields of a config


class Stage(NamedTuple):
    """A command that trains."""

    config: type[RunConfig]
    about: str
    short: str = "--model, --merge, --data, --out"  # flags


STAGES = {
    "sft": Stage(SFTConfig, "Fine-tune a causal language model on completions."),
    "reward": Stage(RewardModelConfig, "Train a reward model on preference pairs."),
    "value": Stage(ValueConfig, "Pre-train a value model on scored responses: of a file, of a run, or sampled."),
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
Short flags: {short}. Paths, those in FILE too, are relative to the working directory.

--resume [CHECKPOINT] continues the newest checkpoint in --out, or the one of that name, such as update-000020; config
and flags may then change only the length of the run, `max_hours`, `checkpoint.*` and `log.*`."""


def parse(command: str, argv: Sequence[str]) -> Any:
    """The config that the arguments of a training command mean."""
    return parse_run(command, argv)[0]


def parse_run(command: str, argv: Sequence[str]) -> tuple[Any, bool | str]:
    """The config, and whether it continues a run: True, or the name of the checkpoint."""
    stage = STAGES[command]
    if {"-h", "--help"} & {*argv}:
        preset = f"--preset NAME ({', '.join(preset_names())}), then " * (stage.config is PPOConfig)
        about = TRAIN_HELP.format(about=stage.about, preset=preset, short=stage.short)
        require("tyro").cli(stage.config, args=["--help"], prog=f"ppo-fast {command}", description=about)
    flags = read_flags(argv, stage.config)
    path, preset_name, resume = flags.pop(CONFIG, None), flags.pop(PRESET, None), flags.pop(RESUME, False)
    if resume is False:
        return load_config(path, preset=preset_name, flags=flags, kind=stage.config), False
    if not resume:
        raise UserError("--resume: expected no value or the name of a checkpoint, got an empty one")
    return resumed_config(read_values(path, preset=preset_name, flags=flags), stage.config, resume), resume


def resumed_config(given: Values, kind: type[Config], resume: bool | str = True) -> Config:
    """The config that the checkpoint to resume was saved with, under what the file and the flags say."""
    # Here, so that the help needs no transformers.
    from ppo_fast.rlhf.training.checkpoint import load_checkpoint
    from ppo_fast.rlhf.training.log import CHECKPOINTS

    with error_prefix("resume"):
        check_names(given, kind)  # before one of them says where the checkpoint is
    directory = given.get("output_dir") or field_defaults(kind)["output_dir"]
    name = resume if isinstance(resume, str) else None
    saved = load_checkpoint(Path(str(directory)) / CHECKPOINTS, name, tensors=False).state["config"]
    return config_from_dict(merge(saved, given), source="resume", kind=kind)


def read_flags(argv: Sequence[str], kind: type[RunConfig]) -> dict[str, Any]:
    """Dotted names with what follows them: text, a list of texts, True for a bare switch, False for its "no-" form.

    "null" is None, and an empty list where a list is due. Types and ranges are not checked here: flags join the values
    of preset and file, and the config is built once, of all of them.
    """
    fields = dict.fromkeys(old_keys(), True) | {**field_defaults(kind)} | {CONFIG: None, RESUME: False}
    fields |= {PRESET: None} if kind is PPOConfig else {}
    switched_off = {_negated(name): name for name, default in fields.items() if isinstance(default, bool)}
    texts, unknown = require("tyro").cli(
        _texts([*fields, *switched_off]), args=[*argv], add_help=False, return_unknown_args=True
    )
    if unknown:
        raise _no_option(unknown[0].partition("=")[0], kind)
    given = {}
    for name, values in texts.items():
        if name not in switched_off:
            given[name] = _value(name, values, fields[name])
        elif values:
            raise UserError(f"{_flag(name)}: expected no value, got {' '.join(values)!r}")
        else:
            given[switched_off[name]] = False
    return given


def _texts(names: Iterable[str]) -> object:
    """A type of flags with these dotted names: tyro gives any number of texts for each, and leaves absent ones out."""
    arg = require("tyro").conf.arg
    kinds = {name: Annotated[list[str], arg(aliases=[SHORT[name]] if name in SHORT else [])] for name in names}
    return TypedDict("Flags", kinds, total=False)  # type: ignore[operator]  # names known only when it runs


def _value(name: str, values: list[str], default: object) -> object:
    texts = [value for value in values if value not in ("None", "null")]
    if isinstance(default, tuple) and values:
        return texts
    if not values and not isinstance(default, bool):
        raise UserError(f"{_flag(name)}: expected a value, got none")
    if len(values) > 1:
        raise UserError(f"{_flag(name)}: expected one value, got {' '.join(values)!r}")
    return True if not values else texts[0] if texts else None


def _no_option(flag: str, kind: type[RunConfig]) -> UserError:
    if not flag.startswith("--"):
        return UserError(f"expected an option, got {flag!r}")
    long = {short: name for name, short in SHORT.items()}  # of other commands too
    return UserError(f"no option {flag!r}{hint(long.get(flag, flag[2:].replace('-', '_')), kind, _flag)}")


def _negated(name: str) -> str:
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}no_{last}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
