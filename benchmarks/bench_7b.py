"""One PPO update of a model of 7 or 8 billion parameters on one GPU: seconds, tokens, memory planned and measured.

    python -m benchmarks.bench_7b --preset 7b-80g-lora --model qwen2.5-7b --cap 80 [--updates 2] [--set KEY=VALUE ...]

The weights are random, made on the device; nothing is downloaded. The loop of `train_ppo` runs as it is; the model
directory at the end, 15 GB, is not written. The first update, which compiles and tunes, is reported by its seconds; the
table has the means of the later ones, the share of the GEMM rate that each phase reaches, and the planned memory.

With `--scale tiny` the same configuration runs on small models on a CPU, to see that it works; times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ppo_fast
from ppo_fast.rlhf import Callback, PPOConfig, StepRecord, UserError, load_config
from ppo_fast.rlhf.config.files import preset_names
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.planning.plan import Plan, make_plan
from ppo_fast.rlhf.planning.shapes import read_shapes
from ppo_fast.rlhf.ppo.train import open_run
from ppo_fast.rlhf.training.callbacks import user_callbacks
from ppo_fast.rlhf.training.runtime import PhaseMemory, find_device

GIB = 2**30
PHASES = {"rollout": "rollout", "logprobs": "scoring", "score": "reward", "update": "update"}  # as the plan names them
QWEN = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
MODELS = {"qwen2.5-7b": ("qwen2", QWEN, 1_000_000.0), "llama3.1-8b": ("llama", LLAMA, 500_000.0)}
# Of the tiny models, by the names of the real ones' shape: heads stay grouped, the head of the model is not tied.
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TINY_RUN = {
    "rollout.batch_size": 16,
    "rollout.max_new_tokens": 8,
    "optim.minibatch_size": 16,
    "optim.epochs": 1,
    "data.max_prompt_tokens": 16,
}
WORDS = [f"w{index}" for index in range(500)]


def make_policy(model: str, scale: str, device: torch.device) -> Any:
    """A causal LM of the named shape with random bfloat16 weights, made on the device."""
    import transformers

    kind, shape, theta = MODELS[model]
    shape = shape | (TINY if scale == "tiny" else {})
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    config = transformers.AutoConfig.for_model(kind, **shape, **special, **rope)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_prompts(count: int, tokens: int) -> list[str]:
    """Texts of half as many to as many words as there may be tokens."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(tokens // 2, tokens))) for _ in range(count)]


def share_of_even_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def make_config(preset: str, scale: str, updates: int, changes: dict[str, str], directory: str) -> PPOConfig:
    """The preset with the changes asked for, and for a log that takes no time."""
    quiet = {"output_dir": directory, "log.console": "false", "log.tensorboard": "false", "log.samples_every": "0"}
    small = TINY_RUN if scale == "tiny" else {}
    return load_config(preset=preset, flags={"updates": updates} | small | quiet | changes)


class Latest(Callback):
    """Keeps the record of the latest update, without its batch."""

    record: StepRecord

    def on_step(self, record: StepRecord) -> None:
        self.record = dataclasses.replace(record, batch=None)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result as it is written: what was run, and by phase its seconds, share, tokens per second, peak memory."""
    device = find_device("cpu" if arguments.scale == "tiny" else "cuda")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.cap * GIB / total))
    changes = dict(arguments.set) | {"model.device": device.type}
    policy, latest = make_policy(arguments.model, arguments.scale, device), Latest()
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(arguments.preset, arguments.scale, arguments.updates, changes, directory)
        inputs: dict[str, Any] = {
            "reward_fn": share_of_even_tokens,
            "prompts": make_prompts(config.rollout.batch_size, config.data.max_prompt_tokens),
            "policy": policy,
            "tokenizer": tiny.make_tokenizer(WORDS),
        }
        with open_run(config, **inputs, callbacks=user_callbacks([latest])) as (ppo, log, stop):
            ppo.loop(log, stop)
    plan = make_plan(config, device.type, shapes=read_shapes(config, policy.config))
    return {
        "commit": commit(),
        "model": arguments.model,
        "preset": arguments.preset,
        "cap_gib": arguments.cap,
        "scale": arguments.scale,
        "changes": dict(arguments.set),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "ppo_fast": ppo_fast.__version__,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "responses": config.rollout.batch_size,
        "epochs": config.optim.epochs,
        "length_mean": log.history[-1]["length/mean"],
        "first_update_s": sum(log.history[0][f"time/{phase}"] for phase in PHASES),
        "first_phases_s": {phase: log.history[0][f"time/{phase}"] for phase in PHASES},
        "phases": phases(means(log.history), latest.record.memory, plan),
    }


def commit() -> str | None:
    """The commit that is measured; None outside of a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or None


def means(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean metrics of the updates after the first, or of the only one."""
    later = history[1:] or history
    return {name: sum(metrics[name] for metrics in later) / len(later) for name in later[0]}


def phases(
    metrics: Mapping[str, float], peaks: Mapping[str, PhaseMemory], plan: Plan
) -> dict[str, dict[str, float | None]]:
    """What one update took, by phase and "all" together; what was measured of memory is None on a CPU.

    Planned are the tensors, as those are that the allocator counts: without its fragmentation and CUDA's context.
    """
    found: dict[str, dict[str, float | None]] = {}
    for phase, planned in PHASES.items():
        account = plan.phases.get(planned, {})
        tensors = [count for item, count in account.items() if item not in ("fragmentation", "CUDA context")]
        found[phase] = {
            "seconds": metrics[f"time/{phase}"],
            "share": metrics[f"time/{phase}_share"],
            "tokens_per_second": metrics[f"tokens_per_second/{phase}"],
            "mfu": metrics.get(f"perf/mfu_{phase}"),
            "planned_gib": sum(tensors) / GIB if tensors else None,
            "peak_gib": peaks[phase].allocated / GIB if phase in peaks else None,
            "reserved_gib": peaks[phase].reserved / GIB if phase in peaks else None,
        }
    highest = {
        name: max((row[name] for row in found.values() if row[name] is not None), default=None)
        for name in ("planned_gib", "peak_gib", "reserved_gib")
    }
    seconds = sum(metrics[f"time/{phase}"] for phase in PHASES)
    whole = {"tokens_per_second": metrics["tokens_per_second"], "mfu": metrics.get("perf/mfu")}
    found["all"] = {"seconds": seconds, "share": 1.0} | whole | highest
    return found


def table(result: dict[str, Any]) -> str:
    """The phases as Markdown."""
    lines = [
        "{model}{small}, {preset}, {cap_gib} GiB, {device}: {responses} responses of {length_mean:.0f} tokens".format(
            **result, small=" scaled down" * (result["scale"] == "tiny")
        ),
        f"first update: {result['first_update_s']:.1f} s",
        "",
        "| phase | seconds | share | tokens/s | of GEMM rate | planned GiB | peak GiB | reserved GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, x in result["phases"].items():
        memory = ("-" if x[key] is None else f"{x[key]:.1f}" for key in ("planned_gib", "peak_gib", "reserved_gib"))
        mfu = "-" if x["mfu"] is None else f"{x['mfu']:.0%}"
        cells = (name, f"{x['seconds']:.1f}", f"{x['share']:.0%}", f"{x['tokens_per_second']:.0f}", mfu, *memory)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def main(argv: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.bench_7b", description=__doc__, formatter_class=as_written)
    parser.add_argument("--preset", choices=preset_names(), required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--cap", type=float, default=80.0, help="GiB that torch may take of the GPU")
    parser.add_argument("--updates", type=int, default=2, help="the first one by its seconds only")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, default=Path("build/7b"), help="directory of the JSON")
    arguments = parser.parse_args(argv)
    try:
        result = run(arguments)
    except UserError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.model}-{arguments.preset}-{arguments.cap:g}{'-tiny' * (arguments.scale == 'tiny')}"
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
