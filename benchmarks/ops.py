"""The ops on a GPU against their peers and against the card's own limits, within three minutes.

    python -m benchmarks.ops [--smoke]

Writes ``benchmarks/results/DEVICE/ops.json``. Times are the device's, by events, in rounds in which the contenders of a
group alternate, on copies of the inputs that exceed its cache together; the host's time of a call, which overlaps with
them, is reported too. One that fails is printed with the reason and left out.
``--smoke`` runs tiny shapes on a CPU, to see that this works.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import ppo_fast
from benchmarks import bench_linear, bench_policy_loss, bench_token_stats, harness
from benchmarks.conftest import device_name
from benchmarks.run import directory
from tests import eager

LIMIT = 150.0


class Row(NamedTuple):
    """One contender: what it moves or computes, and how far its answer is from float64 (None: not comparable)."""

    group: str
    contender: str
    runs: Sequence[harness.Run]  # the same call on each copy of the inputs
    bytes: int = 0
    flops: int = 0
    error: Callable[[], float] | None = None


def _shape(logits: Tensor) -> str:
    return f"{logits.shape[0]}x{logits.shape[1]} {str(logits.dtype).removeprefix('torch.')}"


def _shapes(*given: str) -> Iterator[list[str]]:
    """Vocabulary, dtype and variant; those of a large vocabulary are left out of a run that takes no figures."""
    return (words.split(", ") for words in given if not harness.SMOKE or words.startswith("V="))


def _copies(make: Callable[[], Any]) -> list[Any]:
    """As many equal cases as exceed the cache together, by the logits of the first."""
    first = make()
    return [first, *(make() for _ in range(harness.beyond_cache(first.logits.nbytes) - 1))]


def _here(backends: list[str]) -> list[str]:
    """Those that take tensors of this device."""
    return [name for name in backends if name != ("native" if torch.cuda.is_available() else "cuda")]


def token_stats() -> Iterator[Row]:
    """Forward passes."""
    for shape, dtype, what in _shapes(
        "llama3, bfloat16, forward",
        "qwen2.5, bfloat16, forward",
        "gpt2, bfloat16, forward",
        "V=256, bfloat16, forward",
        "V=32, float32, forward",
        "llama3, bfloat16, exact KL",
        "V=256, bfloat16, exact KL",
    ):
        cases = _copies(partial(bench_token_stats.Case, shape, dtype, what))
        case = cases[0]
        group = f"token_stats, {what}, {_shape(case.logits)}"
        compiles = what == "forward" and shape in ("llama3", "V=256")
        for name in (*_here(bench_token_stats.BACKENDS), "eager", *(["torch.compile"] if compiles else [])):
            yield Row(group, name, [partial(x.run, name) for x in cases], case.moved, error=partial(case.error, name))


def policy_loss() -> Iterator[Row]:
    """Forward and backward with an entropy bonus; liger-kernel's loss has none."""
    for shape, dtype, variant in _shapes(
        "llama3, bfloat16, k3 KL",
        "qwen2.5, bfloat16, k3 KL",
        "gpt2, bfloat16, k3 KL",
        "V=256, bfloat16, k3 KL",
        "V=32, float32, k3 KL",
        "llama3, bfloat16, exact KL",
        "V=256, bfloat16, exact KL",
    ):
        cases = _copies(partial(bench_policy_loss.Case, shape, dtype, variant))
        case = cases[0]
        group = f"policy_loss, {variant}, {_shape(case.logits)}"
        compiles = variant == "k3 KL" and shape.startswith("V=")
        for name in (*_here(bench_policy_loss.BACKENDS), "eager", *(["torch.compile"] if compiles else [])):
            yield Row(group, name, [partial(x.run, name) for x in cases], case.moved, error=partial(case.error, name))
        if variant == "k3 KL" and not shape.startswith("V="):
            yield from _liger_policy_loss(group, case)


def _liger_policy_loss(group: str, case: Any) -> Iterator[Row]:
    loss = bench_linear.imported(liger="liger_kernel.transformers.grpo_loss").get("liger")
    if loss is None:
        return
    old, advantages, mask = case.rows
    targets, reference = case.targets[None, :-1], case.reference["ref_logprobs"][None, :-1]

    def run() -> None:
        logits = case.logits.detach().requires_grad_()[None]
        options = {"temperature": 1.0, "beta": 0.05, "eps_low": 0.2, "eps_high": 0.2, "inplace": False}
        out = loss.triton_grpo_loss(
            logits, old[None, :-1], reference, targets, advantages[:1], mask[None, :-1].int(), **options
        )
        out[0].mean().backward()

    yield Row(group, "liger-kernel (no entropy)", [run], case.moved)


def value_loss() -> Iterator[Row]:
    """Four million values, clipped."""
    shape = (8, 16) if harness.SMOKE else (4096, 1024)
    counted = torch.rand(shape, device=harness.DEVICE) > 0.2
    copies = harness.beyond_cache(12 * counted.numel())
    inputs = [torch.randn(3, *shape, device=harness.DEVICE).unbind() for _ in range(copies)]

    def run(function: Callable[..., Any], values: Tensor, returns: Tensor, old: Tensor) -> None:
        out = function(values.detach().requires_grad_(), returns, counted, old_values=old, clip=0.2)
        (out if isinstance(out, Tensor) else out.loss).backward()

    for name, function in (("auto", ppo_fast.value_loss), ("eager", eager.value_loss)):
        runs = [partial(run, function, *x) for x in inputs]
        yield Row(f"value_loss, {shape[0]}x{shape[1]}", name, runs, 17 * counted.numel())


def _eager_sample(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Filters as transformers has them, then the race of softmax(logits) and exponential noise."""
    x = logits.float()
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, words = x.sort(descending=True)
        p = ordered.softmax(-1)
        x = x.masked_fill((p.cumsum(-1) - p >= top_p).gather(-1, words.argsort(-1)), -torch.inf)
    p = x.softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def sample_tokens() -> Iterator[Row]:
    """One decoding step, whose logits are in the cache."""
    for n, V, *filters in ((64, 152_064, None, None), (64, 152_064, 50, 0.95), (1, 152_064, 50, 0.95)):
        logits = torch.randn(n, 64 if harness.SMOKE else V, device=harness.DEVICE).mul(4).bfloat16()
        keys = torch.stack([torch.tensor([3, row, 0]) for row in range(n)]).to(harness.DEVICE)
        options = dict(zip(("top_k", "top_p"), filters, strict=True))
        group = f"sample_tokens, {'top-k and top-p' if any(filters) else 'no filter'}, {_shape(logits)}"
        yield Row(group, "auto", [partial(ppo_fast.sample_tokens, logits, keys, **options)], logits.nbytes)
        yield Row(group, "eager", [partial(_eager_sample, logits, *filters)], logits.nbytes)


def gae() -> Iterator[Row]:
    """Padded batches without and with a mask."""
    backends = _here([b for b in ("cuda", "triton", "native") if ppo_fast.backends()["gae"].get(b) == "ok"])
    for B, T in ((4, 16),) if harness.SMOKE else ((4096, 128), (512, 1024), (8192, 4096), (8, 32768)):
        mask = torch.rand(B, T, device=harness.DEVICE) > 0.2
        copies = harness.beyond_cache(8 * mask.numel())
        inputs = [torch.randn(2, B, T, device=harness.DEVICE).unbind() for _ in range(copies)]
        moved = 16 * mask.numel()
        for name in backends:
            runs = [partial(ppo_fast.gae, *x, backend=name) for x in inputs]
            yield Row(f"gae, {B}x{T}", name, runs, moved)
        if T == 128 or harness.SMOKE:
            yield Row(f"gae, {B}x{T}", "Python loop", [partial(eager.gae, *x) for x in inputs], moved)
        for name in backends:
            runs = [partial(ppo_fast.gae, *x, mask, backend=name) for x in inputs]
            yield Row(f"gae with a mask, {B}x{T}", name, runs, moved + mask.nbytes)


def linear() -> Iterator[Row]:
    """The head in its three forms against only its products, and the peers."""
    first, *others = bench_linear.SHAPES
    dtype = "float32" if harness.SMOKE else "bfloat16"
    forms = [(first, form) for form in ("scoring", "frozen", "entropy")] + [(shape, "entropy") for shape in others]
    for shape, form in forms:
        case = bench_linear.Case(shape, dtype, form)
        names = [bench_linear.PRODUCTS, *_here(bench_linear.BACKENDS)]
        if shape == first and form == "entropy":
            names += ["eager", *(bench_linear.PEERS[peer] for peer in bench_linear.MODULES if peer != "trl")]
        for name in names:
            compared = name in bench_linear.BACKENDS
            error = partial(case.error, name) if compared else None
            yield Row(f"linear, {form}, {shape}", name, [partial(case.run, name)], flops=case.flops, error=error)


SUITES = (gae, value_loss, sample_tokens, token_stats, policy_loss, linear)


def measured(rows: Sequence[Row], failed: list[str]) -> list[dict[str, Any]]:
    """Results of the rows of a group as pytest-benchmark writes them; those that fail are left out."""
    infos: dict[str, dict[str, Any]] = {}
    for row in rows:
        try:
            infos[row.contender] = _prepared(row)
        except Exception as error:  # a peer's or a compiler's: the others are still measured
            failed.append(f"{row.group} {row.contender}: {type(error).__name__}: {str(error)[:200]}")
    rows = [row for row in rows if row.contender in infos]
    host = {name: info["host"] for name, info in infos.items()}
    times = harness.alternating_seconds({row.contender: row.runs for row in rows}, host)
    return [_result(row, times[row.contender], infos[row.contender]) for row in rows]


def _prepared(row: Row) -> dict[str, Any]:
    """What is found out about a row before it is timed; every copy of its inputs is used once."""
    info: dict[str, Any] = {"contender": row.contender, "ratios": {}}
    if row.error:
        info["error"] = row.error()
    for run in row.runs[1:]:
        run()
    info |= {"peak_bytes": harness.peak_bytes(row.runs[0]), "host": harness.host_seconds(row.runs[0])}
    return info | {name: value for name in ("bytes", "flops") if (value := getattr(row, name))}


def _result(row: Row, times: list[float], info: dict[str, Any]) -> dict[str, Any]:
    quarter = statistics.quantiles(times, n=4)
    stats = {"median": statistics.median(times), "iqr": quarter[2] - quarter[0], "rounds": len(times)}
    return {"group": row.group, "stats": stats, "extra_info": info}


def _line(result: dict[str, Any], rates: dict[str, float]) -> str:
    info, median = result["extra_info"], result["stats"]["median"]
    share = ""
    if "bytes" in info:
        share = f"{100 * info['bytes'] / median / rates['copy_bandwidth']:5.0f} % of copy"
    elif "flops" in info and "product_rate" in rates:
        share = f"{100 * info['flops'] / median / rates['product_rate']:5.0f} % of GEMM"
    host = f"host {1e3 * info['host']:8.3f} ms" if "host" in info else ""
    peak = f"peak {info['peak_bytes'] / 2**30:6.3f} GiB"
    return f"{result['group']:48.48} {info['contender']:26.26} {1e3 * median:9.4f} ms {share:16} {host} {peak}"


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Each of ours against the others of its group."""
    ours = ("triton", "cuda", "native", "auto")
    for result in results:
        if result["extra_info"]["contender"] in ours:
            result["extra_info"]["ratios"] = {
                other["extra_info"]["contender"]: other["stats"]["median"] / result["stats"]["median"]
                for other in results
                if other["group"] == result["group"] and other["extra_info"]["contender"] not in ours
            }


def _rows(suite: Callable[[], Iterator[Row]], failed: list[str]) -> Iterator[Row]:
    """The rows of a suite up to one whose inputs cannot be made."""
    try:
        yield from suite()
    except Exception as error:  # the other suites are still measured
        failed.append(f"{suite.__name__}: {type(error).__name__}: {str(error)[:200]}")


def main() -> int:
    """Measure every row and write the results."""
    parser = argparse.ArgumentParser(description="Time the ops on a GPU.")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes (with PPO_FAST_BENCH_SMOKE=1), nothing written"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which no other row is begun")
    arguments = parser.parse_args()
    start = time.perf_counter()
    rates = {"copy_bandwidth": harness.copy_bandwidth()}
    if harness.DEVICE == "cuda":
        rates["product_rate"] = harness.product_rate()
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for suite in SUITES:
        for group, rows in groupby(_rows(suite, failed), key=lambda row: row.group):
            if time.perf_counter() - start > arguments.limit:
                failed.append(f"{group}: no time left")
                continue
            found = measured([*rows], failed)
            if harness.DEVICE == "cuda":
                torch.cuda.empty_cache()
            print("\n".join(_line(result, rates) for result in found), flush=True)
            results += found
    add_ratios(results)
    print("\n".join(failed))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"device": device_name(), "threads": 1, "torch": torch.__version__, "triton": triton.__version__}
    written = {"machine_info": machine | rates, "commit_info": {"id": commit}, "benchmarks": results}
    if not arguments.smoke:
        (directory() / "ops.json").write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
