"""Whole runs in every layout: resumed to the same bits, from adapters of other stages, on policy."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.models.adapter_files import ADAPTER_FILE
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import (
    LAYOUTS,
    LORA,
    every_bit,
    outputs,
    run_stage,
    save_base,
)

ROLES = ("policy", "reference", "value")


def reward(completion_ids, **_):
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    return [sum(token % 2 for token in ids) / len(ids) + 0.1 * noise for ids in completion_ids]


@pytest.fixture
def run(make_config, base):
    """run(layout, directory, updates=..., **config) from one state of the global generators."""

    def go(layout, directory, *, resume=False, seed=0, path=base, **values):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        log = {"samples_every": 1} | values.pop("log", {})
        model = {"path": path, **LAYOUTS[layout], **values.pop("model", {})}
        constant = {"warmup_frac": 0.0, "final_lr_frac": 1.0}
        saved = {"output_dir": str(directory), "checkpoint": {"every": 2}, "log": log}
        config = make_config(model=model, optim=constant, **saved, **values)
        return train_ppo(config, reward_fn=reward, prompts=[f"w{i} w{i + 1}" for i in range(11)], resume=resume)

    return go


def left_by(directory):
    clock = ("time/", "tokens_per_second", "memory/")
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    metrics = [{n: x for n, x in json.loads(line).items() if not n.startswith(clock)} for line in lines]
    final = Path(directory) / "final"
    return metrics, {str(p.relative_to(final)): p.read_bytes() for p in final.rglob("*") if p.is_file()}


CASES = {
    **{layout: (layout, {}) for layout in LAYOUTS if layout != "adapters"},
    "moving, recomputing": (
        "adapters",
        {"reference": {"update": "ema", "every": 1, "decay": 0.5}, "model": {"gradient_checkpointing": True}},
    ),
    "moving, offloaded": ("offloaded", {"reference": {"update": "replace", "every": 1}}),
    "merged": ("adapters", {"model": {"lora": LORA["lora"] | {"merge": True}}}),
    "packed, exact KL": (
        "adapters",
        {
            "model": {"packing": True},
            "kl": {"placement": "loss", "loss_estimator": "full"},
            "advantage": {"whiten": False},
        },
    ),
    "best": ("adapters", {"evaluation": {"every": 1}}),
}


@pytest.mark.parametrize(("layout", "values"), CASES.values(), ids=CASES)
def test_rule_16_a_resumed_run_ends_with_the_same_bits(run, tmp_path, layout, values):
    if "evaluation" in values:
        (tmp_path / "held.jsonl").write_text('{"prompt": "w20"}\n')
        values = {"evaluation": values["evaluation"] | {"prompts": str(tmp_path / "held.jsonl")}}
    whole = run(layout, tmp_path / "whole", updates=3, **values)
    run(layout, tmp_path / "run", updates=2, **values)
    resumed = run(layout, tmp_path / "run", updates=3, resume=True, seed=9, **values)
    assert left_by(resumed.directory) == left_by(whole.directory)
    for role in ROLES:
        assert torch.equal(outputs(resumed.models, role), outputs(whole.models, role))
    saved = resumed.directory / "checkpoints/update-000003"
    assert (saved / ADAPTER_FILE).exists() == (layout == "adapters")
    assert (saved / "model.safetensors").exists() == (layout != "adapters")
    if "evaluation" in values:
        assert (resumed.directory / "best" / ADAPTER_FILE).exists()


def test_resume_from_another_base_is_refused(run, tmp_path):
    run("adapters", tmp_path / "run", updates=2)
    save_base(tmp_path / "base", seed=8)
    with raises_exactly("resume: expected the model weights that the run was begun with, got others", UserError):
        run("adapters", tmp_path / "run", updates=4, resume=True)


def test_a_run_on_a_reward_adapter_and_an_sft_adapter(run, tmp_path, base, reward_model):
    """The whole pipeline on one base: nothing of it is in memory twice."""
    sft = str(run_stage("sft", tmp_path / "sft", base).model)
    start = every_bit(AutoModelForCausalLM.from_pretrained(base))
    options = {"path": sft, "reward": {"models": (reward_model,)}, "updates": 2}
    result = run("adapters", tmp_path / "run", **options)
    adapters = result.models.adapters
    assert {*adapters.trained} == {"default", "value", "reference", "reward-0"}
    kept = {name.replace(".base_layer", ""): p for name, p in result.models.policy.named_parameters()}
    assert all(torch.equal(kept[name], value) for name, value in start.items())
    assert result.history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    saved = load_file(result.model / ADAPTER_FILE)
    assert {key.split(".")[-1] for key in saved} == {"weight"}
    assert not any("value" in key or "reward" in key or "reference" in key for key in saved)
    again = run("adapters", tmp_path / "run2", **(options | {"path": str(result.model)}))
    assert torch.isfinite(torch.tensor(again.history[-1]["loss/total"]))


@pytest.mark.parametrize("layout", ["separate", "shared", "adapters"])
def test_old_and_new_logprobs_agree_in_the_first_minibatch(run, tmp_path, layout):
    (first, *_) = run(layout, tmp_path / layout, updates=1).history
    assert first["rollout/logprob_diff_max"] < 2e-5
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
