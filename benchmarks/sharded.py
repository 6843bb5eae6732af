"""A world of one by the path of several GPUs against the plain one: bits of weights and metrics, and seconds an update.

    python -m benchmarks.sharded [--rounds 2] [--json FILE]

The runs alternate. A run by that path is in a process group of one process, as `torchrun --nproc-per-node 1` makes it,
with its weights split by `fully_shard`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.bench_7b import commit
from benchmarks.conftest import device_name
from ppo_fast.rlhf import Callback, StepRecord, load_config, train_ppo
from ppo_fast.rlhf.models import tiny

CLOCK = ("time/", "tokens_per_second", "memory/", "perf/")
LAYOUTS = {"separate": {}, "adapters": {"model.layout": "adapters", "model.lora.rank": 16, "model.lora.alpha": 32}}
UPDATES = 4  # the first one warms up


class Seconds(Callback):
    """Keeps the seconds of each update."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        self.found.append(sum(record.seconds.values()))


@contextlib.contextmanager
def torchrun() -> Iterator[None]:
    """The variables that `torchrun --nproc-per-node 1` sets, within the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def run(layout: str, directory: Path, shape: dict[str, int]) -> tuple[list[dict[str, float]], list[float]]:
    """Metrics without the clock's, and seconds, of the updates of a run; its model is in the directory."""
    cuda, seconds = torch.cuda.is_available(), Seconds()
    words = [f"w{index}" for index in range(500)]
    policy = tiny.make_model(32768, **shape, max_positions=512)
    flags = {
        "updates": UPDATES,
        "threads": 1,
        "rollout.batch_size": 32,
        "rollout.max_new_tokens": 64,
        "optim.lr": 1e-3,
        "optim.value_lr": 1e-3,
        "optim.epochs": 1,
        "optim.minibatch_size": 8,
        "output_dir": str(directory),
        "log.console": False,
        "log.tensorboard": False,
    }
    result = train_ppo(
        load_config(flags=flags | LAYOUTS[layout]),
        reward_fn=lambda completion_ids, **_: [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids],
        prompts=[" ".join([word] * 32) for word in words[:32]],
        policy=policy.bfloat16() if cuda else policy,
        tokenizer=tiny.make_tokenizer(words),
        callbacks=[seconds],
    )
    history = [{k: v for k, v in step.items() if not k.startswith(CLOCK)} for step in result.history]
    return history, seconds.found


def same_files(a: Path, b: Path) -> bool:
    """Whether all tensors of two final models have the same bits."""
    names = sorted(path.relative_to(a) for path in a.rglob("*.safetensors"))
    pairs = ((load_file(a / name), load_file(b / name)) for name in names)
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


def compare(layout: str, rounds: int, shape: dict[str, int]) -> dict[str, object]:
    """Whether bits are equal, and the median seconds of an update after the first, plain and sharded."""
    times: dict[str, list[float]] = {"plain": [], "sharded": []}
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for number in range(rounds):
            for name, block in (("plain", contextlib.nullcontext()), ("sharded", torchrun())):
                directory = Path(scratch, f"{name}{number}")
                with block:
                    found[name], seconds = run(layout, directory, shape)
                times[name] += seconds[1:]
        weights = same_files(Path(scratch, "plain0", "final"), Path(scratch, "sharded0", "final"))
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "layout": layout,
        "weights_equal": weights,
        "metrics_equal": found["plain"] == found["sharded"],
        "seconds": medians,
        "ratio": medians["sharded"] / medians["plain"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.sharded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path, help="the results, with machine and commit")
    arguments = parser.parse_args(argv)
    shape = {"hidden": arguments.hidden, "layers": arguments.layers, "heads": 8}
    results = [compare(layout, arguments.rounds, shape) for layout in LAYOUTS]
    if arguments.json is not None:
        facts = {"device": device_name(), "torch": torch.__version__, "commit": commit(), "shape": shape}
        arguments.json.write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")
    for result in results:
        print(json.dumps(result))
    return 0 if all(result["weights_equal"] and result["metrics_equal"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
