"""The command `ppo-fast`. Each subcommand imports what it needs, so that help and errors come at once."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

USAGE = """\
usage: ppo-fast COMMAND [options]

  sft         fine-tune a language model        ppo-fast sft --model base --data examples.jsonl
  reward      train a reward model              ppo-fast reward --model runs/sft/final --data pairs.jsonl
  value       pre-train the critic of PPO       ppo-fast value --model runs/sft/final --data run.yaml
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
# Functions of `ppo_fast.rlhf` that take a config; their results name the model.
STAGES = {
    "sft": "train_sft",
    "reward": "train_reward_model",
    "value": "train_value_model",
    "train": "train_ppo",
    "dpo": "train_dpo",
}
TOOLS = {
    "plan": "ppo_fast.rlhf.planning.command",
    "export": "ppo_fast.rlhf.reports.export",
    "quickstart": "ppo_fast.quickstart",
    "plot": "ppo_fast.rlhf.reports.plots",
    "report": "ppo_fast.rlhf.reports.report",
    "doctor": "ppo_fast.doctor",
}
FAILED = 2  # the exit status
OPTIONAL = {
    "datasets",
    "matplotlib",
    "peft",
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
    """Run one subcommand; returns the exit status, 2 for an error of the user's, printed as one line on stderr."""
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
    with _ctrl_c_kills():
        from ppo_fast.rlhf.errors import UserError, install_command
        from ppo_fast.rlhf.training.signals import Interrupted

    try:
        COMMANDS[command](arguments)
    except UserError as error:
        return _fail(_by_rank(str(error))) if error.origin in (None, _rank()) else FAILED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        return _fail(f"{command} needs {error.name}, which is not installed: {install_command()}")
    except Interrupted as stopped:
        if _is_main():
            print(f"ppo-fast: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130
    return 0


def train(command: str, argv: list[str]) -> None:
    """`ppo-fast sft | reward | value | train | dpo`: preset, then file, then flags, into one config; then the run."""
    with _ctrl_c_kills():
        from ppo_fast import rlhf
        from ppo_fast.rlhf.arguments import parse_run

        config, resume = parse_run(command, argv)
        if command == "train" and _is_main():
            from ppo_fast.rlhf.planning.command import announce  # not above: the help needs no transformers

            announce(config)
        run = getattr(rlhf, STAGES[command])
    result = run(config, resume=resume)
    if _is_main():
        print(f"model: {result.model}")


def tool(module: str, argv: list[str]) -> None:
    """A command that trains nothing: the `main` of a module."""
    with _ctrl_c_kills():
        run = importlib.import_module(module).main
    run(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{name: functools.partial(train, name) for name in STAGES},
    **{name: functools.partial(tool, module) for name, module in TOOLS.items()},
}


@contextlib.contextmanager
def _ctrl_c_kills() -> Iterator[None]:
    """Let Ctrl-C end the process within the block, which writes no file: an interrupted import may raise anything."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from ppo_fast.rlhf.errors import printable

    if _is_main():
        print(f"warning: {printable(str(message))}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"ppo-fast: {message}", file=sys.stderr)
    return FAILED


def _is_main() -> bool:
    """Whether this is the process of a torchrun that writes the console; without torchrun it is."""
    return _rank() == 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def _by_rank(message: str) -> str:
    return message if _is_main() else f"rank {_rank()}: {message}"


if __name__ == "__main__":
    sys.exit(main())
