"""How a contender is measured: answer checked first, rounds interleaved with the baseline, memory and time."""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One run that takes no figures, to see that the benchmarks work: few rows, and no inductor.
SMOKE = os.environ.get("PPO_FAST_BENCH_SMOKE") == "1"
VOCABULARIES = {"gpt2": 50257, "llama3": 128256, "qwen2.5": 152064, "V=256": 256, "V=32": 32}

Run = Callable[[], Any]


def rows(vocabulary: int) -> int:
    """Rows of a shape: 8192 on a GPU; on a CPU as many as make 64 MiB of float32 logits, beyond its caches."""
    if SMOKE:
        return 8
    elements = 2**33 if DEVICE == "cuda" else 2**24
    return max(1, min(8192 if DEVICE == "cuda" and vocabulary > 1024 else 2**20, elements // vocabulary))


def mask(draw: Tensor) -> Tensor:
    """Which rows count, from normal numbers: five of six; on a GPU all, so that the bytes of all rows are moved."""
    return draw > (-torch.inf if DEVICE == "cuda" else -1.0)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run) -> float:
    """Wall time of one call, launched work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def paired_ratio(contender: Run, baseline: Run, rounds: int = 7) -> float:
    """Median of baseline / contender over interleaved rounds: the machine's drift falls on both alike."""
    contender(), baseline()
    return statistics.median(seconds(baseline) / seconds(contender) for _ in range(rounds))


def beyond_cache(nbytes: int) -> int:
    """Copies of inputs of so many bytes that, taken in turns, are never found in the cache: together four times it."""
    if DEVICE == "cuda":
        return max(1, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / nbytes))
    return 2 if SMOKE else 1


def _device_second(run: Run, host: float) -> float:
    """Seconds of the GPU for one call: it sleeps while the host, in ``host`` seconds, launches the call's kernels."""
    if DEVICE != "cuda":
        return seconds(run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * 1.5 * host))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end)


def alternating_seconds(
    contenders: dict[str, Sequence[Run]], host: dict[str, float], rounds: int = 9, most: float = 2.0
) -> dict[str, list[float]]:
    """Seconds of the GPU for calls of each contender, the host's time hidden.

    Each round calls every contender once: what the clocks and the temperature do falls on all alike. The runs of a
    contender, on copies of its inputs, take turns. At least three rounds, then none after ``most`` seconds for each.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    turns = {name: itertools.cycle(runs) for name, runs in contenders.items()}
    stop = time.perf_counter() + most * len(contenders)
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > stop:
            break
        for name, seconds_of in times.items():
            seconds_of.append(_device_second(next(turns[name]), max(host[name], 2e-5)))
    return times


def device_seconds(run: Run, rounds: int = 9) -> list[float]:
    """:func:`alternating_seconds` of one contender, whose inputs exceed the cache."""
    return alternating_seconds({"": [run]}, {"": host_seconds(run)}, rounds)[""]


def host_seconds(run: Run, calls: int = 5) -> float:
    """Median time until a call returns, with nothing queued on the GPU before it."""
    run()
    times = []
    for _ in range(calls):
        synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    synchronize()
    return statistics.median(times)


def product_rate() -> float:
    """Operations per second of a product of bfloat16 matrices, 8192^3."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    return 2 * 8192**3 / statistics.median(device_seconds(lambda: a @ a))


def peak_bytes(run: Run) -> int:
    """The most tensor bytes alive at once during ``run``, beyond those alive before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a copy far larger than the caches."""
    source = torch.ones(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_times(lambda: target.copy_(source)))


def read_bandwidth() -> float:
    """Bytes per second that the quickest of torch's own reductions reads."""
    source = torch.ones(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    readers = (source.sum, source.amax, lambda: torch.dot(source, source))
    return max(source.nbytes / min(_times(run)) for run in readers)


def _times(run: Run) -> list[float]:
    return device_seconds(run, rounds=10) if DEVICE == "cuda" else [seconds(run) for _ in range(10)]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """max|actual - truth| / max|truth|, in float64."""
    return ((actual.detach().double() - truth).abs().max() / truth.abs().max()).item()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of one shape, with the cache of earlier shapes dropped: its limit would make it eager."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="eager" if SMOKE else "inductor")


def measure(
    benchmark: Any,
    run: Run,
    baselines: dict[str, Run],
    *,
    contender: str,
    moved: int,
    error: float,
    allowed_error: float,
    rounds: int = 7,
) -> None:
    """Check, then time ``run``; keep ratios to each baseline, bytes moved, peak memory and error in the result."""
    assert error <= allowed_error, f"{contender}: relative error {error:.2e} > {allowed_error:.2e}"
    ratios = {name: paired_ratio(run, other, rounds) for name, other in baselines.items()} if benchmark.enabled else {}
    benchmark.extra_info |= {
        "contender": contender,
        "bytes": moved,
        "error": error,
        "peak_bytes": peak_bytes(run),
        "ratios": ratios,
    }

    def timed() -> None:
        run()
        synchronize()

    benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)
