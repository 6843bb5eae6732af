"""Configs of small runs, and the shape of a 7B, for plans of their memory."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks import bench_7b
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.plan import make_plan

GIB, PROMPT = 2**30, 16
DOCS = Path(__file__).parents[3] / "docs"
QWEN = bench_7b.QWEN | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def tiny_policy(**overrides):
    return tiny.make_model(4096, **({"hidden": 128, "layers": 2, "max_positions": 64} | overrides))


def make_config(directory, **values):
    """Batches of 16 responses of 32 tokens to prompts of 16, with those values changed."""
    base = {
        "threads": 1,
        "updates": 2,
        "rollout": {"batch_size": 16, "max_new_tokens": 32},
        "optim": {"minibatch_size": 16, "epochs": 1},
        "reward": {"missing_eos_penalty": 0},
        "output_dir": str(directory),
        "log": {"tensorboard": False, "console": False},
    }
    for name, value in values.items():
        base[name] = base.get(name, {}) | value if isinstance(value, Mapping) else value
    return config_from_dict(base)


def tiny_plan(directory, policy=None, **values):
    config = make_config(directory, **values)
    shapes = SavedModels(SavedModel(given=(policy or tiny_policy()).config))
    return make_plan(config, "cpu", shapes=shapes, prompt_tokens=PROMPT)


LORA = {"layout": "adapters", "lora": {"rank": 8}}
MICRO = {"optim": {"micro_batch_size": 4}, "rollout": {"micro_batch_size": 8}}
MEASURED = {
    "separate": ({}, {}),
    "materialized": ({}, {"model": {"fused_head": False}}),
    "micro-batches": ({}, MICRO),
    "checkpointing": ({}, {"model": {"gradient_checkpointing": True}}),
    "packed": ({}, {"model": {"packing": True}}),
    "tokens": ({}, {"model": {"packing": True}, "optim": {"tokens_per_pass": 190}}),
    "grouped heads, in the backward pass": (
        {"arch": "qwen2", "num_key_value_heads": 1},
        {"optim": {"in_backward": True}},
    ),
    "gpt2": ({"arch": "gpt2"}, {}),
    "generate, exact KL": (
        {},
        {
            "rollout": {"engine": "generate"},
            "kl": {"placement": "loss", "loss_estimator": "full"},
            "advantage": {"whiten": False},
        },
    ),
    "shared": ({}, {"model": {"layout": "shared"}}),
    "adapters": ({}, {"model": LORA} | MICRO),
    "group, moving reference": (
        {},
        {
            "model": LORA,
            "advantage": {"kind": "group"},
            "rollout": {"samples_per_prompt": 4},
            "reference": {"update": "ema", "every": 1},
        },
    ),
    "offloaded": ({}, {"model": {"offload": True}} | MICRO),
}
