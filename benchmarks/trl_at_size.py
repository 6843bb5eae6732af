"""PPO of TRL and ours on a Qwen2 of 0.5 billion random weights: seconds by phase and peak memory.

    pip install trl==1.12.0 && python -m benchmarks.trl_at_size [--scale tiny] [--out DIRECTORY]

Each trainer is a process of its own, on the same prompts, lengths, batches and hyper-parameters, bfloat16 weights with
AdamW in their dtype. The first update, which compiles and tunes, is left out; of the others the medians are taken. With
`--scale tiny`, the default on a CPU, the models are small and times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_7b import WORDS, commit, share_of_even_tokens
from ppo_fast.rlhf.models import tiny

UPDATES, EPOCHS, LR = 4, 2, 1e-6
OURS, TRL = "ppo_fast", "trl"
PHASES = ("rollout", "scoring", "update")
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class Sizes(NamedTuple):
    """What one update is."""

    model: dict[str, int]
    responses: int
    micro_batch: int
    prompt: int  # tokens
    response: int


SIZES = {"0.5b": Sizes(QWEN, 32, 8, 128, 128), "tiny": Sizes(TINY, 8, 4, 8, 8)}


def make_policy(sizes: Sizes) -> Any:
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = transformers.Qwen2Config(**sizes.model, **special)
    torch.manual_seed(0)
    with torch.device(harness.DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_prompts(sizes: Sizes) -> list[str]:
    """As many texts as responses, each of that many words."""
    return [
        " ".join(WORDS[(7 * row + place) % len(WORDS)] for place in range(sizes.prompt))
        for row in range(sizes.responses)
    ]


def train_ours(sizes: Sizes) -> list[dict[str, float]]:
    """Seconds by phase of every update."""
    from ppo_fast.rlhf import train_ppo
    from ppo_fast.rlhf.config.files import config_from_dict

    with tempfile.TemporaryDirectory() as directory:
        config = config_from_dict(
            {
                "updates": UPDATES,
                "output_dir": directory,
                "model": {"packing": True},
                "rollout": {"batch_size": sizes.responses, "max_new_tokens": sizes.response},
                "reward": {"missing_eos_penalty": 0.0},
                "optim": {
                    "lr": LR,
                    "value_lr": LR,
                    "epochs": EPOCHS,
                    "minibatch_size": sizes.responses,
                    "micro_batch_size": sizes.micro_batch,
                    "max_grad_norm": 1e9,  # TRL does not clip
                },
                "log": {"console": False, "tensorboard": False, "samples_every": 0},
            }
        )
        history = train_ppo(
            config,
            reward_fn=share_of_even_tokens,
            prompts=make_prompts(sizes),
            policy=make_policy(sizes),
            tokenizer=tiny.make_tokenizer(WORDS),
        ).history
    names = {"rollout": ("rollout",), "scoring": ("logprobs", "score"), "update": ("update",)}
    return [{phase: sum(x[f"time/{name}"] for name in names[phase]) for phase in PHASES} for x in history]


class EvenTokens(nn.Module):
    """The reward as the model that TRL wants: at each position the share of even tokens so far."""

    base_model_prefix = "count"

    def count(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Shares [B, L, 1] of token ids [B, L]."""
        even = (input_ids % 2 == 0) & attention_mask.bool()
        return SimpleNamespace(
            hidden_states=[(even.float().cumsum(1) / attention_mask.cumsum(1).clamp_min(1))[:, :, None]]
        )

    def score(self, shares: Tensor) -> Tensor:
        return shares


class Marks:
    """Moments of TRL's loop: an update begins with `batch_generation` and learns after `masked_whiten`."""

    def __init__(self) -> None:
        self.sampled, self.scored, self.began = list[float](), list[float](), list[float]()

    def now(self) -> float:
        if harness.DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def patch(self, module: Any) -> None:
        generate, whiten = module.batch_generation, module.masked_whiten

        def batch_generation(*arguments: Any) -> Any:
            self.began.append(self.now())
            found = generate(*arguments)
            self.sampled.append(self.now())
            return found

        def masked_whiten(*arguments: Any, **options: Any) -> Any:
            self.scored.append(self.now())
            return whiten(*arguments, **options)

        module.batch_generation, module.masked_whiten = batch_generation, masked_whiten

    def seconds(self) -> list[dict[str, float]]:
        """Seconds by phase of every update but the last, at whose end models are saved."""
        marks = zip(self.began, self.sampled, self.scored, self.began[1:], strict=False)
        return [dict(zip(PHASES, (b - a, c - b, d - c), strict=True)) for a, b, c, d in marks]


def train_trl(sizes: Sizes) -> list[dict[str, float]]:
    """Seconds by phase of every update."""
    import datasets
    from transformers import Qwen2ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, tokenizer, marks = make_policy(sizes), tiny.make_tokenizer(WORDS), Marks()
    shape = copy.deepcopy(policy.config)
    shape.num_labels = 1
    with torch.device(harness.DEVICE):
        value = Qwen2ForSequenceClassification._from_config(shape, dtype=torch.bfloat16)
    value.model.load_state_dict(policy.model.state_dict())
    marks.patch(ppo_trainer)
    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(
            output_dir=directory,
            use_cpu=harness.DEVICE == "cpu",
            bf16=False,  # the weights are
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            num_sample_generations=0,
            total_episodes=(UPDATES + 1) * sizes.responses,
            per_device_train_batch_size=sizes.micro_batch,
            gradient_accumulation_steps=sizes.responses // sizes.micro_batch,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=sizes.responses,
            response_length=sizes.response,
            temperature=1.0,
            stop_token="eos",
            missing_eos_penalty=None,
            learning_rate=LR,
        )
        PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=copy.deepcopy(policy),
            reward_model=EvenTokens().to(harness.DEVICE),
            train_dataset=datasets.Dataset.from_dict({"input_ids": tokenizer(make_prompts(sizes))["input_ids"]}),
            value_model=value,
        ).train()
    return marks.seconds()


TRAINERS = {OURS: train_ours, TRL: train_trl}


def peak_gib() -> float:
    """Of the allocator on a GPU, of the process on a CPU."""
    if harness.DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_in_a_process(name: str, scale: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trl_at_size", "--scale", scale, "--only", name]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def table(results: dict[str, Any]) -> str:
    """Seconds by phase, their sum and the peak as Markdown, ours against TRL's."""
    lines = ["| trainer | " + " | ".join(PHASES) + " | iteration s | peak GiB |", "|---|---:|---:|---:|---:|---:|"]
    for name in TRAINERS:
        x = results[name]
        cells = [f"{x['seconds'][phase]:.3f}" for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(x['seconds'].values()):.3f} | {x['peak_gib']:.2f} |")
    ours, trl = (results[name] for name in (OURS, TRL))
    faster = sum(trl["seconds"].values()) / sum(ours["seconds"].values())
    return "\n".join(
        [*lines, f"{faster:.1f} times TRL's pace in {ours['peak_gib'] / trl['peak_gib']:.2f} of its memory"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.trl_at_size", description=__doc__, formatter_class=as_written
    )
    default = "0.5b" if harness.DEVICE == "cuda" else "tiny"
    parser.add_argument("--scale", choices=SIZES, default=default)
    parser.add_argument("--only", choices=TRAINERS, help="this trainer, in this process; prints JSON")
    parser.add_argument("--out", type=Path, default=Path("build/trl"), help="directory of the JSON")
    arguments = parser.parse_args(argv)
    if arguments.only:
        later = TRAINERS[arguments.only](SIZES[arguments.scale])[1:]
        seconds = {phase: statistics.median(x[phase] for x in later) for phase in PHASES}
        print(json.dumps({"seconds": seconds, "peak_gib": peak_gib()}))
        return 0
    results: dict[str, Any] = {name: run_in_a_process(name, arguments.scale) for name in TRAINERS}
    device = torch.cuda.get_device_name() if harness.DEVICE == "cuda" else "CPU"
    results |= {"device": device, "torch": torch.__version__, "scale": arguments.scale, "commit": commit()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"trl-{arguments.scale}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
