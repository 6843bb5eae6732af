"""Write the tables of README.md and of the pages in docs/ from the committed benchmark results.

    python benchmarks/tables.py            # rewrite them
    python benchmarks/tables.py --check    # exit 1 if one is not what the results say
    python benchmarks/tables.py --print RESULT.json ...

A table stands between ``<!-- table: NAME -->`` and ``<!-- end table -->`` and is made from every
``benchmarks/results/DEVICE/NAME.json`` that is there; ``summary`` is a selection of rows.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


_COLUMNS = (
    *("shape", "implementation", "median", "IQR", "host", "speed-up", "GB/s", "% of copy", "TFLOP/s", "% of GEMM"),
    *("peak memory", "error"),
)


def _number(x: float, digits: int = 3) -> str:
    """``x`` rounded to so many digits, without an exponent."""
    return f"{float(f'{x:.{digits}g}'):,.10g}"


def _cells(bench: dict[str, Any], machine: dict[str, Any]) -> dict[str, str]:
    """The row of a result by column: _COLUMNS, of which it may lack some, then its outcome."""
    info, median, iqr = bench["extra_info"], bench["stats"]["median"], bench["stats"]["iqr"]
    cells = {
        "shape": bench["group"],
        "implementation": info["contender"],
        "median": f"{_number(median * 1e3)} ms",
        "IQR": f"{_number(iqr * 1e3, 2)} ms",
        "speed-up": ", ".join(f"{_number(ratio)}x {name}" for name, ratio in info["ratios"].items()),
        "peak memory": f"{_number(info['peak_bytes'] / 2**20)} MiB",
    }
    if "bytes" in info:
        rate = info["bytes"] / median
        cells |= {"GB/s": _number(rate / 1e9), "% of copy": f"{100 * rate / machine['copy_bandwidth']:.0f}"}
    if "flops" in info and "product_rate" in machine:
        rate = info["flops"] / median
        cells |= {"TFLOP/s": _number(rate / 1e12), "% of GEMM": f"{100 * rate / machine['product_rate']:.0f}"}
    if "host" in info:
        cells["host"] = f"{_number(info['host'] * 1e3)} ms"
    if "error" in info:
        cells["error"] = f"{info['error']:.1e}"
    return cells | {name: _number(value) for name, value in info.get("outcome", {}).items()}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(path: Path) -> str:
    """One result file as a Markdown table with its machine, commit and command."""
    data = json.loads(path.read_text())
    machine = data["machine_info"]
    benches = sorted(data["benchmarks"], key=lambda bench: bench["group"])
    rows = [_cells(bench, machine) for bench in benches]
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    columns += dict.fromkeys(name for row in rows for name in row if name not in _COLUMNS)
    device = "host" in columns
    program = "benchmarks.ops" if device else f"benchmarks.run {path.stem}"
    product = f", GEMM rate {_number(machine['product_rate'] / 1e12)} TFLOP/s" if "product_rate" in machine else ""
    how = (
        "Times are the device's; host: until a call returns"
        if device
        else "Speed-ups are medians over interleaved pairs"
    )
    note = (
        f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, measured copy bandwidth "
        f"{_number(machine['copy_bandwidth'] / 1e9)} GB/s{product}, commit {data['commit_info']['id'][:10]}; "
        f"`python -m {program}`. {how}{'; errors are relative to float64' if 'error' in columns else ''}."
    )
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    head, *body = map(_line, lines)
    return "\n".join([head, "|---" * len(columns) + "|", *body, "", note, ""])


# Of the table "summary": (result, group, the next best contender that it is compared with).
_SUMMARY = (
    ("NVIDIA-H200/ops", "token_stats, forward, 8192x128256 bfloat16", "torch.compile"),
    ("NVIDIA-H200/ops", "policy_loss, k3 KL, 8192x128256 bfloat16", "liger-kernel (no entropy)"),
    ("NVIDIA-H200/ops", "linear, entropy, 8192x4096x128256", "cut-cross-entropy"),
    ("AMD-EPYC-AVX512/token_stats", "forward+backward, llama3, 130x128256 float32", "torch.compile"),
    ("AMD-EPYC-AVX512/policy_loss", "k2 KL, llama3, 130x128256 float32", "torch.compile"),
    ("AMD-EPYC-AVX512/linear", "entropy, 2048x256x32000 float32", "torch.compile"),
)


def summary() -> str:
    """One row an op, on a GPU and on a CPU: time and peak memory of ours, of eager torch and of the next best."""
    lines = [["op, shape", "ppo_fast", "eager torch", "next best", "machine, commit"], ["---"] * 5]
    for result, group, peer in _SUMMARY:
        data = json.loads((RESULTS / f"{result}.json").read_text())
        machine, commit = data["machine_info"], data["commit_info"]["id"][:10]
        found = {b["extra_info"]["contender"]: b for b in data["benchmarks"] if b["group"] == group}
        ours = next(b for b in found.values() if "eager" in b["extra_info"]["ratios"])
        took = [_time_and_memory(b) for b in (ours, found["eager"], found[peer])]
        name = group if result.endswith("ops") else f"{Path(result).name}, {group}"
        lines.append([name, *took[:2], f"{took[2]}: {peer}", f"{machine['device']}, {commit}"])
    note = "Median time and peak memory beyond the inputs; one thread on the CPU."
    return "\n".join([*map(_line, lines), "", note, ""])


def _time_and_memory(bench: dict[str, Any]) -> str:
    milliseconds, size = bench["stats"]["median"] * 1e3, bench["extra_info"]["peak_bytes"] / 2**20
    memory = f"{_number(size)} MiB" if size < 1000 else f"{_number(size / 1024)} GiB"
    return f"{_number(milliseconds)} ms, {memory}"


def render(document: str) -> str:
    """``document`` with every table block regenerated."""

    def block(match: re.Match[str]) -> str:
        found = sorted(RESULTS.glob(f"*/{match[2]}.json"))
        tables = [summary()] if match[2] == "summary" else [table(path) for path in found]
        return match[1] + "\n" + "\n".join(tables) + "\n" + match[3]

    return _BLOCK.sub(block, document)


def main() -> int:
    """Rewrite or check the documents, or print the tables of some results."""
    parser = argparse.ArgumentParser(description="Write the tables of the documents from the benchmark results.")
    parser.add_argument("--check", action="store_true", help="exit 1 if a document is not what the results say")
    parser.add_argument("--print", nargs="+", type=Path, metavar="RESULT", help="print these results as tables")
    arguments = parser.parse_args()
    if arguments.print:
        print("\n".join(table(path) for path in arguments.print))
        return 0
    made = {path: render(path.read_text()) for path in DOCUMENTS}
    if arguments.check:
        return 0 if all(path.read_text() == text for path, text in made.items()) else 1
    for path, text in made.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
