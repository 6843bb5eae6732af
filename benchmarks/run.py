"""Run every suite and write benchmarks/results/DEVICE/SUITE.json; then `python benchmarks/tables.py`.

python -m benchmarks.run [SUITE ...]

Suites of whole trainers of other projects run only when they are named; `benchmarks.bench_7b` and `bench_rollout` run
by themselves.
"""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.conftest import device_name

HERE = Path(__file__).resolve().parent
PEERS, PROGRAMS = {"trl"}, {"7b", "rollout"}


def directory() -> Path:
    """Make and return the directory of this device's results."""
    path = HERE / "results" / re.sub(r"[^A-Za-z0-9.]+", "-", device_name()).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def main(suites: list[str]) -> int:
    """Run the named suites, or all of our own; stops at the first that fails."""
    results = directory()
    own = {path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")} - PEERS - PROGRAMS
    for suite in suites or sorted(own):
        target = results / f"{suite}.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "default",
            f"benchmarks/bench_{suite}.py",
            f"--benchmark-json={target}",
        ]
        code = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
