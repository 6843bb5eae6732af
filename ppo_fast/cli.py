"""The command `ppo-fast`. Each subcommand imports what it needs, so that help and errors come at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

USAGE = """\
usage: ppo-fast COMMAND [options]

  train       train a language model by PPO     ppo-fast train --config run.yaml --optim.lr 1e-5
  export      a run's samples as preference pairs   ppo-fast export runs/ppo --out pairs.jsonl
  quickstart  watch a tiny model learn, on a CPU, without a download
  doctor      versions, devices, and which backend of each op is usable

  ppo-fast COMMAND --help lists the options of a command.
"""
# Short names of the flags that nearly every run sets.
SHORT = {
    "--model": "--model.path",
    "--prompts": "--data.prompts",
    "--reward": "--reward.function",
    "--out": "--log.dir",
}
RESUME = "--resume"
TRAIN_HELP = """\
Train a causal language model by PPO.

Values come from --preset NAME, then --config FILE (YAML or TOML, the same names, nested), then the flags below.
Short flags: --model, --prompts, --reward FILE.py:FUNCTION, --out.

--resume continues the newest checkpoint in --out; config and flags may then change `updates` and `log.*` alone."""
OPTIONAL = {
    "matplotlib",
    "pydantic",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "tomli",
    "transformers",
    "tyro",
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
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        return _run(command, arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    from ppo_fast.rlhf.errors import UserError
    from ppo_fast.rlhf.signals import Interrupted

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


def train(argv: list[str]) -> None:
    """`ppo-fast train`: preset, then file, then flags, into one PPOConfig."""
    from ppo_fast.rlhf.ppo import train_ppo

    result = train_ppo(parse_train(argv), resume=RESUME in argv)
    print(f"model: {result.model}")


def parse_train(argv: Sequence[str]) -> Any:
    """The PPOConfig that the arguments of `ppo-fast train` mean."""
    from ppo_fast.rlhf.checkpoint import load_latest
    from ppo_fast.rlhf.config import PPOConfig
    from ppo_fast.rlhf.configfile import config_from_dict, field_defaults, load_config, merge, read_values
    from ppo_fast.rlhf.errors import require
    from ppo_fast.rlhf.runlog import CHECKPOINTS

    if {"-h", "--help"} & set(argv):
        require("tyro").cli(PPOConfig, args=["--help"], prog="ppo-fast train", description=TRAIN_HELP)
    flags = _read_flags([argument for argument in argv if argument != RESUME])
    path, preset = (flags.pop(name, None) for name in ("config", "preset"))
    if RESUME not in argv:
        return load_config(path, preset=preset, flags=flags)
    given = read_values(path, preset=preset, flags=flags)
    log = given.get("log")
    directory = log["dir"] if isinstance(log, dict) and log.get("dir") else field_defaults()["log.dir"]
    saved = load_latest(Path(str(directory)) / CHECKPOINTS, tensors=False).state["config"]
    return config_from_dict(merge(saved, given), source="resume")


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Dotted names with what follows them: text, a list of texts, True for a bare switch, False for its "no-" form."""
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
    return dict(_read_flag(flag, values) for flag, values in given.items())


def _read_flag(flag: str, values: list[str]) -> tuple[str, Any]:
    from ppo_fast.rlhf.configfile import field_defaults, nearest_name
    from ppo_fast.rlhf.errors import UserError

    fields = field_defaults() | {"config": None, "preset": None}
    name = SHORT.get(flag, flag)[2:].replace("-", "_")
    group, dot, last = name.rpartition(".")
    switch = group + dot + last.removeprefix("no_")
    if name not in fields and isinstance(fields.get(switch), bool) and not values:
        return switch, False
    if name not in fields:
        raise UserError(f"no option {flag!r}, the nearest is '--{nearest_name(name).replace('_', '-')}'")
    if not values and not isinstance(fields[name], bool):
        raise UserError(f"{flag}: expected a value, got none")
    if len(values) > 1 and not isinstance(fields[name], tuple):
        raise UserError(f"{flag}: expected one value, got {' '.join(values)!r}")
    texts = [None if value in ("None", "null") else value for value in values]
    return name, True if not texts else texts if isinstance(fields[name], tuple) else texts[0]


def export(argv: list[str]) -> None:
    """`ppo-fast export RUN [--out FILE]`."""
    parser = argparse.ArgumentParser("ppo-fast export", description="Write a run's scored samples as preference pairs.")
    parser.add_argument("run", help="directory of a run with rollout.samples_per_prompt > 1 and log.all_samples")
    parser.add_argument("--out", help="JSONL file; RUN/pairs.jsonl when not given")
    options = parser.parse_args(argv)
    from ppo_fast.rlhf.export import export_pairs

    print(f"pairs: {export_pairs(options.run, options.out)}")


def quickstart(argv: list[str]) -> None:
    """`ppo-fast quickstart`."""
    from ppo_fast.rlhf.quickstart import main as run

    run(argv)


def doctor(argv: list[str]) -> None:
    """`ppo-fast doctor`."""
    from ppo_fast.doctor import main as run

    run(argv)


COMMANDS = {"train": train, "export": export, "quickstart": quickstart, "doctor": doctor}


def _fail(message: str) -> int:
    print(f"ppo-fast: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
