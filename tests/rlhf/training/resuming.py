"""What a resumed run is compared by."""

import json
from pathlib import Path

MANY = [f"w{i} w{i + 1}" for i in range(11)]  # no batch of 8 ends with an epoch
CLOCK = ("time/", "tokens_per_second", "memory/")


def left_by(directory):
    """What must not depend on where a run was stopped: weights, samples, and metrics without the clock's."""
    directory = Path(directory)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = [{n: x for n, x in record.items() if not n.startswith(CLOCK)} for record in records]
    final = {path.name: path.read_bytes() for path in (directory / "final").iterdir()}
    return metrics, (directory / "samples.jsonl").read_text(), final
