"""Write the tables of README.md from the committed benchmark results.

    python benchmarks/tables.py            # rewrite README.md
    python benchmarks/tables.py --check    # exit 1 if README.md is not what the results say

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
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _row(bench: dict[str, Any]) -> str:
    info, median = bench["extra_info"], bench["stats"]["median"]
    iqr = bench["stats"]["iqr"]
    rate = info["bytes"] / median / 1e9
    return (
        f"| {bench['group']} | {info['contender']} | {_milliseconds(median)} | {_milliseconds(iqr)} "
        f"| {info['ratio']:.3g}x | {rate:.3g} | {info['error']:.1e} |"
    )


def table(path: Path) -> str:
    """One result file as a Markdown table with its machine, commit and command."""
    data = json.loads(path.read_text())
    machine, commit = data["machine_info"], data["commit_info"]["id"][:10]
    head = "| shape | implementation | median | IQR | speed-up (paired) | GB/s | relative error |\n" + "|---" * 7 + "|"
    note = (
        f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, commit {commit}; "
        f"`pytest benchmarks/bench_{path.stem}.py`"
    )
    return "\n".join([head, *(_row(bench) for bench in data["benchmarks"]), "", note, ""])


def render(readme: str) -> str:
    """``readme`` with every table block made anew."""

    def block(match: re.Match[str]) -> str:
        found = sorted(RESULTS.glob(f"*/{match[2]}.json"))
        return match[1] + "\n" + "\n".join(table(path) for path in found) + "\n" + match[3]

    return _BLOCK.sub(block, readme)


def main() -> int:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if parser.parse_args().check:
        return 0 if new == old else 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
