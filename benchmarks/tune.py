"""Times the Triton row kernels over tile sizes, against the time that their bytes take at the measured bandwidth.

    python -m benchmarks.tune [--json FILE] [--smoke]

The best tiles go by hand into ``ppo_fast/ops/_backends/triton/tuning.py``. ``--smoke`` runs a few tiles on tiny
rows, to see that this works: also on a CPU with TRITON_INTERPRET=1.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import ppo_fast
from benchmarks import harness
from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.token_stats import token_stats
from ppo_fast.ops._backends.triton.token_stats_backward import token_stats_backward
from ppo_fast.ops._core.inputs import RowGrads, RowInputs


class Result(NamedTuple):
    """Milliseconds of one kernel with one tile; inf where it does not compile or launch."""

    kernel: str
    vocabulary: str
    tile: tuple[int, int, int]
    ms: float
    limit_ms: float


def tiles(kernel: str, smoke: bool) -> Iterator[tuning.Tile]:
    """Candidates: words a block (of 2-byte logits), blocks a program, warps."""
    blocks = (1,) if kernel == "backward" else (1, 2, 4, 8, 32)
    sizes: Any = ((1024,), (1, 4), (4,)) if smoke else ((2048, 4096, 8192, 16384), blocks, (4, 8, 16))
    for block, count, warps in itertools.product(*sizes):
        if kernel == "forward" or count == 1:
            yield tuning.Tile(block, count, warps)


def milliseconds(run: Callable[[], Any]) -> float:
    """The median time of ``run``; inf when the tile is refused."""
    try:
        if harness.DEVICE == "cuda":
            return float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))
        return 1e3 * harness.seconds(run)
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")


def kernels(logits: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each kernel on these logits [1, N, V], and how many times it moves their bytes."""
    _, N, V = logits.shape
    targets = torch.randint(0, V, (1, N), device=logits.device)
    rows = RowInputs(logits, targets, None, None, 1.0)
    stats, out = token_stats(rows, True), torch.empty_like(logits)
    grads = RowGrads(stats.logprobs, stats.entropy, None)
    return {
        "forward": (lambda: token_stats(rows, True), 1),
        "backward": (lambda: token_stats_backward(grads, rows, stats, out), 2),
    }


def sweep(vocabulary: str, bandwidth: float, smoke: bool) -> Iterator[Result]:
    """Both kernels over their tiles at one vocabulary."""
    N, V = (2, 5000) if smoke else (8192, harness.VOCABULARIES[vocabulary])
    dtype = torch.float32 if smoke else torch.bfloat16
    logits = torch.randn(1, N, V, device=harness.DEVICE, dtype=dtype)
    for kernel, (run, passes) in kernels(logits).items():
        table = f"_{kernel.upper()}" + ("" if V % 16 == 0 else "_UNALIGNED")
        kept = getattr(tuning, table)
        for tile in tiles(kernel, smoke):
            setattr(tuning, table, {(0, 0): tile})
            size, limit = (tile.block, tile.blocks, tile.warps), 1e3 * passes * logits.nbytes / bandwidth
            yield Result(kernel, vocabulary, size, milliseconds(run), limit)
        setattr(tuning, table, kept)


def main() -> int:
    """Sweep, print the five best tiles of each kernel and vocabulary, write all of them."""
    parser = argparse.ArgumentParser(description="Tile sizes of the Triton kernels, timed.")
    parser.add_argument("--json", type=Path, help="write every timing here")
    parser.add_argument("--smoke", action="store_true", help="a few tiles on tiny rows")
    arguments = parser.parse_args()
    state = ppo_fast.backends()["token_stats"]["triton"]
    if state != "ok":
        print(f"tune: expected a machine where the triton backend runs, got: {state}", file=sys.stderr)
        return 2
    bandwidth = 1e9 if arguments.smoke else harness.copy_bandwidth()
    vocabularies = ("gpt2",) if arguments.smoke else ("llama3", "qwen2.5", "gpt2")
    results = [r for v in vocabularies for r in sweep(v, bandwidth, arguments.smoke)]
    if arguments.json:
        arguments.json.write_text(json.dumps([r._asdict() for r in results], indent=1))
    for group, rows in itertools.groupby(results, key=lambda r: (r.kernel, r.vocabulary)):
        print(*group)
        for r in sorted(rows, key=lambda r: r.ms)[:5]:
            print(
                f"  block {r.tile[0]:>6} x {r.tile[1]:>2}, {r.tile[2]:>2} warps: {r.ms:.3f} ms, limit {r.limit_ms:.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
