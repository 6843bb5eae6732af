"""Where the time of an update goes: torch.profiler over the phase "update" of a step, by group of operators.

    python -m benchmarks.profile_update [--size tiny|mid] [--set KEY=VALUE ...]

On a GPU it is the time of the kernels, on a CPU that of the operators themselves. tiny: the good-token task; mid: 30
million parameters and a vocabulary of 32768.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_7b import commit
from benchmarks.conftest import device_name
from ppo_fast.rlhf import Callback, PPOConfig, StepRecord, load_config, train_ppo
from ppo_fast.rlhf.models import tiny

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 64, "hidden": 64, "layers": 2, "heads": 4, "batch": 64, "prompt": 1, "response": 16},
    "mid": {"vocab_size": 32768, "hidden": 384, "layers": 6, "heads": 6, "batch": 16, "prompt": 32, "response": 32},
}
# The first group that an operator, or one that it was called by, belongs to; by parts of their names.
GROUPS = {
    "optimizer and clipping": ("Optimizer.step", "Optimizer.zero_grad", "aten::_foreach", "aten::linalg_vector_norm"),
    "value loss": ("_EagerValueLoss", "ppo_fast::value_loss", "ppo_fast_value_loss"),
    "policy loss and head": ("_Eager", "linear_policy_loss", "ppo_fast_policy_loss", "ppo_fast::policy_loss"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "varlen_attn"),
    "backbone GEMMs": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
}
REST = "rest of the backbones"


def group_of(event: Any) -> str:
    """The group of a profiler event."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((group for group, parts in GROUPS.items() if any(p in n for p in parts for n in names)), REST)


def shares(record: profile, *, cuda: bool) -> dict[str, float]:
    """Milliseconds by group of what ran within the phase, on any thread: backward passes may have their own."""
    found = dict.fromkeys([*GROUPS, REST], 0.0)
    events = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CPU]
    (phase,) = (event.time_range for event in events if event.name == "phase update")
    for event in events:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        inside = phase.start < event.time_range.start and event.time_range.end <= phase.end
        if inside and own:
            found[group_of(event)] += own / 1000
    return found


class Profiler(Callback):
    """Profiles the last step of a run."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self.record = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda])

    def on_step(self, record: StepRecord) -> None:
        if record.step == record.total - 2:
            self.record.start()
        elif record.step == record.total - 1:
            self.record.stop()


def make_config(size: str, changes: dict[str, str], directory: str) -> PPOConfig:
    """Three updates of four minibatches in one epoch; the log takes no time."""
    shape = SIZES[size]
    return load_config(
        flags={
            "updates": 3,
            "threads": 1,
            "rollout.batch_size": shape["batch"],
            "rollout.max_new_tokens": shape["response"],
            "optim.lr": 1e-3,
            "optim.value_lr": 1e-3,
            "optim.epochs": 1,
            "optim.minibatch_size": shape["batch"] // 4,
            "output_dir": directory,
            "log.console": False,
            "log.tensorboard": False,
        }
        | changes
    )


def run(size: str, changes: dict[str, str]) -> dict[str, float]:
    """Milliseconds by group of the last of three updates."""
    shape, cuda, profiler = SIZES[size], torch.cuda.is_available(), Profiler()
    words = [f"w{index}" for index in range(min(shape["vocab_size"], 512) - len(tiny.SPECIALS))]
    model = {name: shape[name] for name in ("hidden", "layers", "heads")}

    policy = tiny.make_model(shape["vocab_size"], **model, max_positions=512)
    with tempfile.TemporaryDirectory() as directory:
        train_ppo(
            make_config(size, changes, directory),
            reward_fn=lambda completion_ids, **_: [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids],
            prompts=[" ".join([word] * shape["prompt"]) for word in words[: shape["batch"]]],
            policy=policy.bfloat16() if cuda else policy,
            tokenizer=tiny.make_tokenizer(words),
            callbacks=[profiler],
        )
    return shares(profiler.record, cuda=cuda)


def table(size: str, times: dict[str, float]) -> str:
    """The groups as Markdown, the largest first."""
    whole = sum(times.values())
    lines = [f"| update, {size} | share | ms |", "|---|---:|---:|"]
    for name, ms in sorted(times.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {ms / whole:.0%} | {ms:.1f} |")
    return "\n".join([*lines, f"| all | 100% | {whole:.1f} |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.profile_update", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the config")
    parser.add_argument("--json", type=Path, help="where the times go, with machine and commit")
    arguments = parser.parse_args(argv)
    if not all("=" in change for change in arguments.set):
        parser.error("--set: expected KEY=VALUE")
    times = run(arguments.size, dict(change.split("=", 1) for change in arguments.set))
    if arguments.json is not None:
        facts = {"device": device_name(), "torch": torch.__version__, "commit": commit(), "size": arguments.size}
        arguments.json.write_text(json.dumps(facts | {"milliseconds": times}, indent=2) + "\n")
    print(table(arguments.size, times))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
