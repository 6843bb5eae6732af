"""The command `ppo-fast`. Each subcommand imports what it needs, so that help and errors come at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

USAGE = """\
usage: ppo-fast COMMAND [options]

  train       train a language model by PPO     ppo-fast train --config run.yaml --optim.lr 1e-5
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
TRAIN_HELP = """\
Train a causal language model by PPO.

Values come from --preset NAME, then --config FILE (YAML or TOML, the same names, nested), then the flags below.
Short flags: --model, --prompts, --reward FILE.py:FUNCTION, --out."""
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
    from ppo_fast.rlhf.config import UserError

    try:
        COMMANDS[command](arguments)
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        return _fail(f"{command} needs {error.name}, which is not installed: pip install 'ppo-fast[train]'")
    except KeyboardInterrupt:
        return 130
    return 0


def train(argv: list[str]) -> None:
    """`ppo-fast train`: preset, then file, then flags, into one PPOConfig."""
    from ppo_fast.rlhf.ppo import train_ppo

    result = train_ppo(parse_train(argv))
    print(f"model: {result.model}")


def parse_train(argv: Sequence[str]) -> Any:
    """The PPOConfig that the flags of `ppo-fast train` mean."""
    from ppo_fast.rlhf.config import PPOConfig, load_config, require

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    files.add_argument("--preset")
    sources, flags = files.parse_known_args(list(argv))
    config = load_config(sources.config, preset=sources.preset)
    names = [flag.partition("=") for flag in flags]
    return require("tyro").cli(
        PPOConfig,
        default=config,
        args=[SHORT.get(name, name) + equals + value for name, equals, value in names],
        prog="ppo-fast train",
        description=TRAIN_HELP,
    )


def quickstart(argv: list[str]) -> None:
    """`ppo-fast quickstart`."""
    from ppo_fast.rlhf.quickstart import main as run

    run(argv)


def doctor(argv: list[str]) -> None:
    """`ppo-fast doctor`."""
    from ppo_fast.doctor import main as run

    run(argv)


COMMANDS = {"train": train, "quickstart": quickstart, "doctor": doctor}


def _fail(message: str) -> int:
    print(f"ppo-fast: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
