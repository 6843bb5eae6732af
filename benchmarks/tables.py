"""Write the tables of README.md and docs/benchmarks.md from the committed benchmark results.

    python benchmarks/tables.py            # rewrite them
    python benchmarks/tables.py --check    # exit 1 if one is not what the results say
    python benchmarks/tables.py --print RESULT.json ...

A table stands between ``<!-- table: NAME -->`` and ``<!-- end table -->`` and is made from every
``benchmarks/results/DEVICE/NAME.json`` that is there.
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
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


_COLUMNS = (
    *("shape", "implementation", "median", "IQR", "host", "speed-up", "GB/s", "% of copy", "TFLOP/s", "% of GEMM"),
    *("peak memory", "error"),
)


def _cells(bench: dict[str, Any], machine: dict[str, Any]) -> dict[str, str]:
    """The row of a result by column: _COLUMNS, of which it may lack some, then its outcome."""
    info, median, iqr = bench["extra_info"], bench["stats"]["median"], bench["stats"]["iqr"]
    cells = {
        "shape": bench["group"],
        "implementation": info["contender"],
        "median": f"{median * 1e3:.3g} ms",
        "IQR": f"{iqr * 1e3:.2g} ms",
        "speed-up": ", ".join(f"{ratio:.3g}x {name}" for name, ratio in info["ratios"].items()),
        "peak memory": f"{info['peak_bytes'] / 2**20:.3g} MiB",
    }
    if "bytes" in info:
        rate = info["bytes"] / median
        cells |= {"GB/s": f"{rate / 1e9:.3g}", "% of copy": f"{100 * rate / machine['copy_bandwidth']:.0f}"}
    if "flops" in info and "product_rate" in machine:
        rate = info["flops"] / median
        cells |= {"TFLOP/s": f"{rate / 1e12:.3g}", "% of GEMM": f"{100 * rate / machine['product_rate']:.0f}"}
    if "host" in info:
        cells["host"] = f"{info['host'] * 1e3:.3g} ms"
    if "error" in info:
        cells["error"] = f"{info['error']:.1e}"
    return cells | {name: f"{value:.3g}" for name, value in info.get("outcome", {}).items()}


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
    product = f", GEMM rate {machine['product_rate'] / 1e12:.3g} TFLOP/s" if "product_rate" in machine else ""
    how = (
        "Times are the device's; host: until a call returns"
        if device
        else "Speed-ups are medians over interleaved pairs"
    )
    note = (
        f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, measured copy bandwidth "
        f"{machine['copy_bandwidth'] / 1e9:.3g} GB/s{product}, commit {data['commit_info']['id'][:10]}; "
        f"`python -m {program}`. {how}{'; errors are relative to float64' if 'error' in columns else ''}."
    )
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    head, *body = map(_line, lines)
    return "\n".join([head, "|---" * len(columns) + "|", *body, "", note, ""])


def render(document: str) -> str:
    """``document`` with every table block regenerated."""

    def block(match: re.Match[str]) -> str:
        found = sorted(RESULTS.glob(f"*/{match[2]}.json"))
        return match[1] + "\n" + "\n".join(table(path) for path in found) + "\n" + match[3]

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
