"""The plan of a run's memory as a table, and the command `ppo-fast plan`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ppo_fast.rlhf.arguments import parse
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.data.rows import check_there
from ppo_fast.rlhf.errors import UserError, printable
from ppo_fast.rlhf.planning.plan import ADAPTER_RANK, ITEMS, Change, Plan, advise, make_plan
from ppo_fast.rlhf.planning.shapes import count_weights, read_shapes
from ppo_fast.rlhf.preflight import check_models
from ppo_fast.rlhf.world import under_torchrun

GPU, GPUS = "--gpu", "--gpus"
HELP = """\
usage: ppo-fast plan [--gpu SIZE] [--gpus N] [options of ppo-fast train]

  Bytes by item and phase of the run that `ppo-fast train` would begin with the same options, the peak, whether it fits,
  and what to change if not. It needs only the config.json of every model: no weights, and no GPU.

  --gpu SIZE  memory of the GPU, such as 24GB or 22.5GiB; without it, the GPU of this machine if model.device means one
  --gpus N    the plan of each of N GPUs, over which torchrun splits the run

  ppo-fast train --help lists the other options."""
TINY = 2**26  # bytes of weights: that fits anywhere, and its plan takes half a second
_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def main(argv: Sequence[str]) -> None:
    """Print the plan of the run that these arguments of `ppo-fast train` begin."""
    if {"-h", "--help"} & {*argv}:
        print(HELP)
        return
    size, others = _take(GPU, [*argv], parse_size)
    gpus, others = _take(GPUS, others, parse_count)
    config = parse("train", others)
    device, limit = ("cuda", size) if size else find_limit(config)
    given: dict[str, Any] = {"device": device, "shapes": read_shapes(config), "gpus": gpus or 1}
    plan = make_plan(config, limit=limit, **given)
    print_plan(plan, advise(config, plan, **given), Console(), gpus or 1)


def announce(config: PPOConfig, console: Console | None = None) -> None:
    """Print the plan of a run that is about to begin, unless its model is tiny; never a reason not to begin."""
    console = console or Console(quiet=not config.log.console)
    if console.quiet or config.model.path is None:
        return
    try:
        check_models({"model.path": config.model.path, "model.value_path": config.model.value_path})
        if config.data.prompts is not None:
            check_there(config.data.prompts, "data.prompts")
        shapes = read_shapes(config)  # asks the Hub for a name
        if count_weights(shapes.policy, config.model) < TINY:
            return
        device, limit = find_limit(config)
        gpus = int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1
        print_plan(make_plan(config, device, limit=limit, shapes=shapes, gpus=gpus), (), console, gpus)
    except UserError:
        return  # the run itself stops at it
    except Exception as error:  # of a kind of model that cannot be made without data
        reason = printable(" ".join(str(error).split())[:200])
        console.print(f"no plan of the memory: {type(error).__name__}: {reason}", highlight=False, markup=False)


def find_limit(config: PPOConfig) -> tuple[str, int | None]:
    """Type of the device that the run would be on, and its bytes if it is a GPU that is there."""
    there, name = torch.cuda.is_available(), config.model.device
    device = name.partition(":")[0] if name != "auto" else "cuda" if there else "cpu"
    if device != "cuda" or not there:
        return device, None
    return device, torch.cuda.get_device_properties(name if name != "auto" else "cuda").total_memory


def parse_size(text: str) -> int:
    """Bytes of a text such as "24GB" (24 * 10^9) or "22.5 GiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)\s*", text, flags=re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"{GPU}: expected a size such as 24GB or 22.5GiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_count(text: str) -> int:
    """The number of GPUs, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{GPUS}: expected a number of GPUs, got {text!r}")
    return int(text)


def print_plan(plan: Plan, changes: Iterable[Change], console: Console, gpus: int = 1) -> None:
    """Print the table and the verdict, then each change as soon as `changes` has it."""
    unit = "GiB" if plan.peak >= 2**30 else "MiB"
    each = f" on each of {gpus} GPUs" if gpus > 1 else ""
    table = Table(title=f"memory by phase{each}, {unit}", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right")
    for item in ITEMS:
        if any(item in breakdown for breakdown in plan.phases.values()):
            table.add_row(item, *(_number(breakdown.get(item), unit) for breakdown in plan.phases.values()))
    table.add_section()
    table.add_row("all", *(_number(sum(breakdown.values()), unit) for breakdown in plan.phases.values()))
    console.print(table)
    latest = plan
    with console.status("looking for settings that fit") if not plan.fits else contextlib.nullcontext():
        for line in describe(plan):
            console.print(line, highlight=False, soft_wrap=True)
        for change in changes:
            latest = change.plan
            line = f"  set {_setting(change)}: peak {readable(latest.peak)}"
            console.print(line, highlight=False, soft_wrap=True)
    if latest is not plan and not latest.fits:
        console.print("that is not enough: take shorter responses or a smaller model", highlight=False, soft_wrap=True)


def describe(plan: Plan) -> list[str]:
    """Peak with the verdict, and host memory, a line each."""
    lines = [f"peak {readable(plan.peak)} in {plan.fullest}" + _verdict(plan)]
    return lines + [f"{readable(plan.host)} of models wait in host memory"] * bool(plan.host)


def readable(count: int) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _verdict(plan: Plan) -> str:
    if plan.limit is None:
        return ""
    free = plan.limit - plan.peak
    verdict = f"{readable(free)} to spare" if free >= 0 else f"does not fit by {readable(-free)}"
    return f", of {readable(plan.limit)}: {verdict}"


def _number(count: int | None, unit: str) -> str:
    return "" if count is None else f"{count / (2**30 if unit == 'GiB' else 2**20):.2f}"


def _setting(change: Change) -> str:
    value = str(change.value).lower() if isinstance(change.value, bool) else change.value
    return f"{change.name} to {value}" + f" and model.lora.rank to {ADAPTER_RANK}" * (value == "adapters")


def _take(flag: str, argv: list[str], parse: Callable[[str], int]) -> tuple[int | None, list[str]]:
    """The number after a flag, and the other arguments."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == flag:
            rest = argv[index + 1 :]
            if not equals:
                value, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("--") else ("", rest)
            return parse(value), argv[:index] + rest
    return None, argv
