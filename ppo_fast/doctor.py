"""``ppo-fast doctor``: versions, devices, and for every op and backend whether it is usable or why not."""

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ppo_fast
from ppo_fast.ops._backends.native import extension
from ppo_fast.ops._core.registry import BACKENDS

_PACKAGES = ("torch", "triton", "transformers", "flash-attn", "peft", "bitsandbytes", "numpy")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cpu = f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    cuda = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        cuda.append(f"cuda:{index}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return [cpu, *cuda]


def report() -> dict[str, Any]:
    """What :func:`main` prints, as a dict: versions, devices, extension, ops.

    Example:
        >>> sorted(report())
        ['devices', 'extension', 'ops', 'versions']
    """
    versions = {"ppo_fast": ppo_fast.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "extension": {"native": extension.load_error or "ok", "cuda": extension.cuda_error or "ok"},
        "ops": ppo_fast.backends(),
    }


def _print_report(found: dict[str, Any], console: Console) -> None:
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, version in found["versions"].items():
        facts.add_row(name, version, style="dim" if version == "not installed" else None)
    for device in found["devices"]:
        facts.add_row("device", device)
    for part, state in found["extension"].items():
        facts.add_row(f"extension ({part})", state, style="green" if state == "ok" else "yellow")
    console.print(facts)

    table = Table(title="Ops and backends", title_justify="left")
    for column in ("op", "auto", *BACKENDS):
        table.add_column(column)
    reasons: dict[str, int] = {}
    for op, states in found["ops"].items():
        cells = (_cell(states.get(backend), reasons) for backend in BACKENDS)
        table.add_row(op, f"[bold]{states['auto']}[/]", *cells)
    console.print(table)
    for reason, number in reasons.items():
        console.print(f"({number}) {reason}", markup=False, highlight=False)


def _cell(state: str | None, reasons: dict[str, int]) -> str:
    """ "ok", or "no" with the number of its reason; the reasons are printed once, below the table."""
    if state is None:
        return ""
    if state == "ok":
        return "[green]ok[/]"
    return f"[yellow]no ({reasons.setdefault(state, len(reasons) + 1)})[/]"


def main(argv: list[str] | None = None) -> int:
    """Print the report as a colored table, or as JSON with ``--json``."""
    parser = argparse.ArgumentParser(
        prog="ppo-fast doctor", description="Versions, devices, and which backend of which op runs here."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(argv)
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print_report(found, Console())
    return 0
