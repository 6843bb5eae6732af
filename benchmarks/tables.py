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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


_COLUMNS = ("shape", "implementation", "median", "IQR", "speed-up", "GB/s", "% of copy", "peak memory", "error")


def _row(bench: dict[str, Any], copy_bandwidth: float) -> str:
    info, median, iqr = bench["extra_info"], bench["stats"]["median"], bench["stats"]["iqr"]
    rate = info["bytes"] / median
    cells = (
        bench["group"],
        info["contender"],
        f"{median * 1e3:.3g} ms",
        f"{iqr * 1e3:.2g} ms",
        ", ".join(f"{ratio:.3g}x {name}" for name, ratio in info["ratios"].items()),
        f"{rate / 1e9:.3g}",
        f"{100 * rate / copy_bandwidth:.0f}",
        f"{info['peak_bytes'] / 2**20:.3g} MiB",
        f"{info['error']:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def table(path: Path) -> str:
    """One result file as a Markdown table with its machine, commit and command."""
    data = json.loads(path.read_text())
    machine = data["machine_info"]
    benches = sorted(data["benchmarks"], key=lambda bench: bench["group"])
    note = (
        f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, measured copy bandwidth "
        f"{machine['copy_bandwidth'] / 1e9:.3g} GB/s, commit {data['commit_info']['id'][:10]}; "
        f"`python -m benchmarks.run {path.stem}`. Speed-ups are medians over interleaved pairs; errors are relative to "
        "float64."
    )
    head = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([*head, *(_row(bench, machine["copy_bandwidth"]) for bench in benches), "", note, ""])


def render(document: str) -> str:
    """``document`` with every table block made anew."""

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
