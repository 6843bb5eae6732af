"""Sampling by the engines `slots` and `generate`, interleaved in one run: the same weights, noise and tokens.

    python -m benchmarks.bench_rollout [--scale 7b] [--rounds 3] [--out DIR]

On small models, a CPU's: the phase at equal lengths, and at lengths spread 1:8 through a quarter of the slots. With
`--scale 7b`, on a GPU: random weights of a Qwen2.5-7B made on the device, 64 responses of 256 tokens to prompts of 512,
with and without adapters, and what the phase consists of. `generate` takes so long there that it samples 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

import ppo_fast
from benchmarks.bench_7b import commit, make_policy
from ppo_fast.rlhf.decoding.attention import attending_to_slots
from ppo_fast.rlhf.decoding.generate import run_generate
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Responses, Sampling
from ppo_fast.rlhf.decoding.slots import Loop, run_slots
from ppo_fast.rlhf.decoding.step import Network
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.adapters import Adapters
from ppo_fast.rlhf.models.kernels import kernels_of, use_kernels

ENGINES = {"slots": run_slots, "generate": run_generate}
RANK = 64


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of one call, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def make_requests(prompt_tokens: int, limits: Sequence[int], vocabulary: int) -> list[Request]:
    """A response of each length to a prompt of its own."""
    rng = random.Random(0)
    return [Request(rng.choices(range(4, vocabulary), k=prompt_tokens), row, n) for row, n in enumerate(limits)]


def settings(width: int) -> DecodingSettings:
    """No token ends a response, so every length is the one asked for."""
    return DecodingSettings(eos_ids=(), pad_id=0, sampling=Sampling(), seed=0, width=width)


def compared(model: Any, requests: list[Request], width: int, rounds: int) -> dict[str, Any]:
    """Median seconds and tokens per second of both engines in interleaved rounds, and their ratio.

    The engines must sample the same tokens, or there is no figure.
    """
    taken: dict[str, list[float]] = {name: [] for name in ENGINES}
    for turn in range(rounds + 1):
        found: dict[str, Responses] = {}
        for name, engine in ENGINES.items():
            took, found[name] = seconds(lambda engine=engine: engine(model, requests, settings(width)), model.device)
            if turn:  # the first round warms up
                taken[name].append(took)
        if not torch.equal(found["slots"].tokens, found["generate"].tokens):
            raise SystemExit("bench_rollout: the engines sampled different tokens")
    tokens, median = sum(request.max_new_tokens for request in requests), {}
    for name, values in taken.items():
        median[f"{name}_s"] = statistics.median(values)
        median[f"{name}_tokens_per_s"] = tokens / median[f"{name}_s"]
    pairs = zip(taken["generate"], taken["slots"], strict=True)
    return median | {"ratio": statistics.median(theirs / ours for theirs, ours in pairs)}


def parts(model: Any, requests: list[Request], width: int) -> dict[str, float]:
    """Seconds of prefill, of the first step, which runs without a graph, and of the capture; milliseconds of a step.

    Steps are taken at the last tokens of the responses, where the cache is longest.
    """
    network, device = Network(model), model.device
    with torch.no_grad(), attending_to_slots(network.backbone):
        loop = Loop(network, requests, settings(width), device)
        refill = loop.schedule.refill(0)
        assert refill is not None
        prefill, _ = seconds(lambda: loop.fill(refill), device)
        length, end = loop.buffers.length, len(requests[0].prompt) + requests[0].max_new_tokens - 1

        def steps(count: int) -> None:
            loop.state.positions.fill_(end - count)
            for _ in range(count):
                loop.decode(len(loop.schedule.slots), length)

        first, _ = seconds(lambda: steps(1), device)
        capture, _ = seconds(lambda: steps(1), device)
        many = [seconds(lambda: steps(16), device)[0] for _ in range(3)]
    step = statistics.median(many) / 16 * 1e3
    return {"prefill_s": prefill, "first_step_s": first, "capture_s": capture, "step_ms": step}


def measure_7b(model: Any, rounds: int) -> dict[str, Any]:
    """The phase of 64 x 256, its parts and its peak memory; a step of `generate`."""
    requests, device = make_requests(512, [256] * 64, 152064), model.device
    first, _ = seconds(lambda: run_slots(model, [r._replace(max_new_tokens=1) for r in requests], settings(64)), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = [seconds(lambda: run_slots(model, requests, settings(64)), device)[0] for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    few = [r._replace(max_new_tokens=16) for r in requests]
    theirs, _ = seconds(lambda: run_generate(model, few, settings(64)), device)
    phase = statistics.median(taken)
    row = {"slots_s": phase, "slots_tokens_per_s": 64 * 256 / phase, "first_token_s": first, "peak_gib": peak}
    row |= parts(model, requests, 64) | {"generate_16_tokens_s": theirs}
    return row | {"liger": float(kernels_of(model) == "liger")}


def measure(scale: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures by case."""
    if scale == "7b":
        model = make_policy("qwen2.5-7b", "full", torch.device("cuda"))
        use_kernels(model, "auto")
        plain = measure_7b(model, rounds)
        model.requires_grad_(False)
        Adapters(model, peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear"))
        return {"7b": plain, f"7b, adapters of rank {RANK}": measure_7b(model.to("cuda"), rounds)}
    model = tiny.make_model(512, hidden=64, layers=2, heads=4, max_positions=256)
    spread = [round(8 * 8 ** (row * 37 % 64 / 63)) for row in range(64)]  # 8 to 64, even on a logarithmic scale
    return {
        "equal lengths": compared(model, make_requests(12, [64] * 64, 512), 64, rounds),
        "lengths spread 1:8": compared(model, make_requests(12, spread, 512), 16, rounds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("tiny", "7b"), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = measure(asked.scale, asked.rounds)
    device = torch.cuda.get_device_name() if asked.scale == "7b" else "CPU"
    result = {"commit": commit(), "scale": asked.scale, "device": device, "torch": torch.__version__}
    result |= {"ppo_fast": ppo_fast.__version__, "cases": cases}
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / f"rollout-{asked.scale}.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, row in cases.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
