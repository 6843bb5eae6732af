"""The command `ppo-fast`. Each subcommand imports what it needs, so that help and errors come at once."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

USAGE = """\
usage: ppo-fast COMMAND [options]

  sft         fine-tune a language model        ppo-fast sft --model base --data examples.jsonl
  reward      train a reward model              ppo-fast reward --model runs/sft/final --data pairs.jsonl
  train       train a language model by PPO     ppo-fast train --config run.yaml --optim.lr 1e-5
  dpo         the same without a reward model   ppo-fast dpo --model runs/sft/final --data pairs.jsonl
  plan        memory of such a run, beforehand  ppo-fast plan --config run.yaml --gpu 24GB
  export      samples as preference pairs       ppo-fast export runs/ppo --out pairs.jsonl
  quickstart  watch a tiny model learn, on a CPU, without a download
  plot        draw runs over each other         ppo-fast plot runs/a runs/b --out curves.svg
  report      one page of a run: curves, samples, warnings, a blind comparison to rate
  doctor      versions, devices, and which backend of each op is usable

  ppo-fast COMMAND --help lists the options of a command.
"""
# Short names of the flags that nearly every run sets.
SHORT = {
    "--model": "--model.path",
    "--data": "--data.train",
    "--prompts": "--data.prompts",
    "--reward": "--reward.function",
    "--out": "--log.dir",
    "--merge": "--model.lora.merge",
}


class Stage(NamedTuple):
    """A command that trains: names in `ppo_fast.rlhf`, and its help."""

    run: str  # function of a config; its result names the model
    config: str
    about: str
    short: str = "--model, --merge, --data, --out"  # flags


STAGES = {
    "sft": Stage("train_sft", "SFTConfig", "Fine-tune a causal language model on completions."),
    "reward": Stage("train_reward_model", "RewardModelConfig", "Train a reward model on preference pairs."),
    "train": Stage(
        "train_ppo",
        "PPOConfig",
        "Train a causal language model by PPO.",
        "--model, --merge, --prompts, --reward FILE.py:FUNCTION, --out",
    ),
    "dpo": Stage("train_dpo", "DPOConfig", "Train a causal language model on preference pairs by DPO."),
}
TOOLS = {
    "plan": "ppo_fast.rlhf.planning.command",
    "export": "ppo_fast.rlhf.reports.export",
    "quickstart": "ppo_fast.quickstart",
    "plot": "ppo_fast.rlhf.reports.plots",
    "report": "ppo_fast.rlhf.reports.report",
    "doctor": "ppo_fast.doctor",
}
TRAIN_HELP = """\
{about}

Values come from {preset}--config FILE (YAML or TOML, the same names, nested), then the flags below.
Short flags: {short}.

--resume [CHECKPOINT] continues the newest checkpoint in --out, or the one of that name, such as update-000020; config
and flags may then change only the length of the run and `log.*`."""
OPTIONAL = {
    "datasets",
    "matplotlib",
    "pydantic",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "tomli",
    "transformers",
    "tyro",
    "xxhash",
    "yaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status, 2 for an error of the user's, told in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from ppo_fast import __version__

        print(f"ppo-fast {__version__}")
        return 0
    if command not in COMMANDS:
        return _fail(f"no command {command!r}; the commands are {', '.join(COMMANDS)}")
    # It warns at import, in runs without 4 bits too, of a package whose kernel our runs have no use for.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(command, arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    from ppo_fast.rlhf.errors import UserError
    from ppo_fast.rlhf.training.signals import Interrupted

    try:
        COMMANDS[command](arguments)
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        return _fail(f"{command} needs {error.name}, which is not installed: pip install 'ppo-fast[train]'")
    except Interrupted as stopped:
        print(f"ppo-fast: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130
    return 0


def train(command: str, argv: Sequence[str]) -> None:
    """`ppo-fast sft | reward | train | dpo`: preset, then file, then flags, into one config; then the run."""
    from ppo_fast import rlhf

    config, resume = parse_run(command, argv)
    result = getattr(rlhf, STAGES[command].run)(config, **({"resume": resume} if resume else {}))
    print(f"model: {result.model}")


def parse(command: str, argv: Sequence[str]) -> Any:
    """The config that the arguments of a training command mean."""
    return parse_run(command, argv)[0]


def parse_run(command: str, argv: Sequence[str]) -> tuple[Any, bool | str]:
    """The config and `resume` that the arguments of a training command mean."""
    from ppo_fast import rlhf
    from ppo_fast.rlhf.config.files import preset_names, read_values
    from ppo_fast.rlhf.errors import UserError, require

    stage = STAGES[command]
    kind = getattr(rlhf, stage.config)
    if {"-h", "--help"} & set(argv):
        preset = f"--preset NAME ({', '.join(preset_names())}), then " * (kind is rlhf.PPOConfig)
        about = TRAIN_HELP.format(about=stage.about, preset=preset, short=stage.short)
        require("tyro").cli(kind, args=["--help"], prog=f"ppo-fast {command}", description=about)
    flags = _read_flags(argv, kind)
    path, preset_name = (flags.pop(name, None) for name in ("config", "preset"))
    resume = flags.pop("resume", False)
    if resume is False:
        return rlhf.load_config(path, preset=preset_name, flags=flags, kind=kind), False
    if not resume:
        raise UserError("--resume: expected no value or the name of a checkpoint, got an empty one")
    return resumed_config(read_values(path, preset=preset_name, flags=flags), kind, resume), resume


def resumed_config(given: Mapping[str, Any], kind: type[Any], resume: bool | str) -> Any:
    """The config that the checkpoint to resume was saved with, under what the file and the flags say."""
    from ppo_fast.rlhf.config.files import config_from_dict, field_defaults, merge
    from ppo_fast.rlhf.training.checkpoint import load_checkpoint
    from ppo_fast.rlhf.training.log import CHECKPOINTS

    log = given.get("log")
    directory = log["dir"] if isinstance(log, dict) and log.get("dir") else field_defaults(kind)["log.dir"]
    name = resume if isinstance(resume, str) else None
    saved = load_checkpoint(Path(str(directory)) / CHECKPOINTS, name, tensors=False).state["config"]
    return config_from_dict(merge(saved, given), source="resume", kind=kind)


def _read_flags(argv: Sequence[str], kind: type[Any]) -> dict[str, Any]:
    """Dotted names with what follows them: text, a list of texts, True for a bare switch, False for its "no-" form.

    "null" is None, and an empty list where a list is due.
    """
    from ppo_fast.rlhf.errors import UserError

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
    from ppo_fast.rlhf.config.files import field_defaults, nearest_name
    from ppo_fast.rlhf.config.ppo import PPOConfig
    from ppo_fast.rlhf.errors import UserError

    fields = field_defaults(kind) | {"config": None, "resume": False} | ({"preset": None} if kind is PPOConfig else {})
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


def tool(module: str, argv: list[str]) -> None:
    """A command that trains nothing: the `main` of a module."""
    importlib.import_module(module).main(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{name: functools.partial(train, name) for name in STAGES},
    **{name: functools.partial(tool, module) for name, module in TOOLS.items()},
}


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from ppo_fast.rlhf.errors import printable

    print(f"warning: {printable(str(message))}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"ppo-fast: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
