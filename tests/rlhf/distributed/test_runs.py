"""Whole runs on two ranks: the samples, metrics, files and checkpoints of one process."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo_fast.rlhf import UserError, ValueConfig, train_ppo, train_value_model
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.training.signals import Interrupted
from ppo_fast.rlhf.world import current
from tests.rlhf.distributed.ranks import run_on_ranks
from tests.rlhf.layout_factories import LAYOUTS
from tests.rlhf.supervised_factories import STAGES, make_model, make_tokenizer, rows

PROMPTS = [f"w{i} w{i + 1}" for i in range(11)]
CLOCK = ("time/", "tokens_per_second", "memory/", "perf/")
NOISE = ("rollout/logprob_diff",)  # the difference of two roundings
BASE = {
    "updates": 3,
    "threads": 1,
    "rollout": {"batch_size": 8, "max_new_tokens": 6},
    "optim": {"lr": 1e-3, "value_lr": 1e-3, "minibatch_size": 4, "epochs": 2},
    "checkpoint": {"every": 2},
    "log": {"tensorboard": False, "console": False, "all_samples": True},
}
RUNS = {
    "separate": {"model": LAYOUTS["separate"], "reference": {"update": "replace", "every": 1}},
    "shared": {
        "model": LAYOUTS["shared"],
        "kl": {"adaptive": True, "placement": "both", "loss_estimator": "full"},
        "advantage": {"whiten": False},
    },
    "adapters": {"model": LAYOUTS["adapters"], "reference": {"update": "ema", "every": 1}},
    "group": {
        "model": {"packing": False, "offload": True},
        "advantage": {"kind": "group"},
        "rollout": {"samples_per_prompt": 2, "dynamic_sampling": 1, "engine": "generate"},
        "kl": {"placement": "loss", "loss_estimator": "full"},
    },
    "evaluated": {"evaluation": {"every": 1}, "reward": {"normalize": "running"}, "updates": 2},
}
STAGE_RUNS = {
    "sft": {},
    "reward": {},
    "dpo": {},
    "dpo-adapters": {"model": {"lora": {"rank": 4, "alpha": 8}}},
    "value": {},
}


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def run(output, name, *, resume=False, callbacks=(), reward_fn=reward, **values):
    """A run of RUNS on a fresh tiny model."""
    values = RUNS[name] | values
    merged = BASE | {k: {**BASE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in values.items()}
    config = config_from_dict(merged | {"output_dir": str(output)})
    held_out = {"eval_prompts": ["w1", "w3 w4", "w9"]} if name == "evaluated" else {}
    policy = make_model(tie_word_embeddings=name == "shared")
    given = {"policy": policy, "tokenizer": make_tokenizer(), "prompts": PROMPTS, **held_out}
    return train_ppo(config, reward_fn=reward_fn, **given, resume=resume, callbacks=callbacks)


def stage(output, name, *, resume=False, **values):
    """A run of STAGE_RUNS on a fresh tiny model."""
    train, kind, *_ = (STAGES | {"value": (train_value_model, ValueConfig)})[name.partition("-")[0]]
    own = {"optim": {"lr": 1e-3, "batch_size": 4}, "log": {"tensorboard": False, "console": False, "eval_every": 2}}
    values = {"threads": 1, "output_dir": str(output), "checkpoint": {"every": 2}} | own | STAGE_RUNS[name] | values
    train_rows, held_out = ([{**row, "score": len(row["completion"])} for row in rows(*of)] for of in ((15,), (5, 1)))
    given = {"train": train_rows, "held_out": held_out, "model": make_model(), "tokenizer": make_tokenizer()}
    return train(config_from_dict(values, kind=kind), **given, resume=resume)


def files_of(directory):
    """Paths within a directory, but for TensorBoard's, whose names tell the time."""
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))


def ppo(directory):
    """The history of each run, and of one that resumes on two ranks."""
    found = {name: run(directory / name, name).history for name in RUNS}
    if current().is_main:
        shutil.copytree(directory / "separate", directory / "again")
        shutil.copytree(directory / "adapters", directory / "merged")
    current().objects(None)
    found["again"] = run(directory / "again", "separate", resume="update-000002").history
    lora = {**LAYOUTS["adapters"], "lora": {"rank": 4, "alpha": 8, "merge": True}}
    run(directory / "whole", "adapters", model=lora, updates=1)
    return found


def stopped(directory):
    """What a SIGTERM to rank 1 in update 1 says on each rank."""

    class Kill:
        def on_step(self, record):
            if current().rank == 1 and record.step == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(directory / "run", "separate", callbacks=[Kill()])
    except Interrupted as message:
        return str(message)


def refused(directory):
    """Messages of what several ranks cannot have, and of an error on one of them."""
    found = {}

    def note(name, **values):
        try:
            run(directory / name, "separate", **values)
        except UserError as message:
            found[name] = str(message)

    note("in_backward", optim={"in_backward": True})
    note("offload_activations", model={"offload_activations": True})
    note("reward", reward_fn=fails_on_rank_1)
    note("nan", reward_fn=nan_on_rank_1)
    found["skipped"] = [len(run(directory / "skip", "separate", reward_fn=nan_on_rank_1, on_nan="skip").history)]
    return found


def fails_on_rank_1(completions, **_):
    if current().rank == 1:
        raise ValueError("no score")
    return [0.0 for _ in completions]


def nan_on_rank_1(prompts, **_):
    """No number for the second half of the second update's responses."""
    nan_on_rank_1.calls = getattr(nan_on_rank_1, "calls", 0) + 1
    return [float("nan") if current().rank == 1 and nan_on_rank_1.calls % 3 == 2 else 0.5 for _ in prompts]


def supervised(directory):
    found = {name: stage(directory / name, name).history for name in STAGE_RUNS}
    if current().is_main:
        shutil.copytree(directory / "sft", directory / "again")
    current().objects(None)
    found["again"] = stage(directory / "again", "sft", resume="step-000002").history
    return found


def resumed(directory):
    """The histories of runs of one process that two ranks continue."""
    return {path.name: run(path, path.name, resume="update-000002").history for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, one):
    directory = tmp_path_factory.mktemp("ranks")
    for name in ("separate", "adapters"):
        shutil.copytree(one(name)[0], directory / "resumed" / name)
    return directory, run_on_ranks(directory, ppo, resumed, stopped, refused, supervised)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """one(name): (directory, result) of the run in this process."""
    directory, done = tmp_path_factory.mktemp("one"), {}

    def get(name):
        if name not in done:
            go = run if name in RUNS else stage
            done[name] = directory / name, go(directory / name, name)
        return done[name]

    return get


def worst(found, expected):
    """The metric that differs the most, relative to 1 or its size, over all steps."""
    assert [step.keys() for step in found] == [step.keys() for step in expected]
    differences = {
        name: abs(b[name] - a[name]) / max(1, abs(b[name]))
        for a, b in zip(found, expected, strict=True)
        for name in a
        if not name.startswith(CLOCK)
    }
    return max((difference, name) for name, difference in differences.items())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_ranks_has_the_samples_and_metrics_of_one_process(ranks, one, name):
    directory, found = ranks
    expected, result = one(name)
    assert (directory / "ppo" / name / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    for rank in found:
        assert worst(rank["ppo"][name], result.history)[0] < 1e-5
    assert files_of(directory / "ppo" / name) == files_of(expected)


def test_checkpoints_are_the_files_of_one_process(ranks, one):
    """The same names, shapes and dtypes in each, and values to rounding."""
    directory, _ = ranks
    for name in ("separate", "shared", "adapters"):
        expected = one(name)[0]
        for path in sorted(expected.rglob("*.safetensors")):
            found, own = load_file(directory / "ppo" / name / path.relative_to(expected)), load_file(path)
            kinds = [
                {k: (x.shape, x.dtype) for k, x in each.items() if "rng_of_ranks" not in k} for each in (found, own)
            ]
            assert kinds[0] == kinds[1]
            for key in own if "state" not in path.name else ():
                torch.testing.assert_close(found[key], own[key], rtol=1e-4, atol=1e-4)


def test_a_resumed_run_on_two_ranks_ends_with_the_same_bits(ranks):
    directory = ranks[0] / "ppo"
    for name in ("model.safetensors", "value_model.safetensors"):
        first, second = (load_file(directory / run / "final" / name) for run in ("separate", "again"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    lines = [(directory / run / "metrics.jsonl").read_text().splitlines() for run in ("separate", "again")]
    for a, b in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(CLOCK)} == {
            k: v for k, v in b.items() if not k.startswith(CLOCK)
        }


def test_one_process_resumes_a_run_of_two_ranks(ranks, one, tmp_path):
    for name in ("separate", "adapters"):
        shutil.copytree(ranks[0] / "ppo" / name, tmp_path / name)
        history = run(tmp_path / name, name, resume="update-000002").history
        assert worst(history, one(name)[1].history)[0] < 1e-5


def test_two_ranks_resume_a_run_of_one_process(ranks, one):
    for rank in ranks[1]:
        for name, history in rank["resumed"].items():
            # Rank 1 keeps the metrics from there on.
            assert worst(history, one(name)[1].history[-len(history) :])[0] < 1e-5


def test_a_merged_model_is_whole(ranks):
    saved = load_file(ranks[0] / "ppo" / "whole" / "final" / "model.safetensors")
    expected = make_model().state_dict()
    assert {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in expected.items()}


def test_a_signal_to_one_rank_stops_all_after_the_same_update(ranks):
    directory, found = ranks
    saved = directory / "stopped" / "run" / "checkpoints" / "update-000001"
    message = f"SIGTERM: stopped after update 1; saved {str(saved)!r}, --resume continues there"
    assert [rank["stopped"] for rank in found] == [message] * 2
    assert (saved / "state.json").is_file()


def test_what_several_ranks_cannot_have_is_refused_by_name_and_an_error_of_one_is_that_of_all(ranks):
    for rank in ranks[1]:
        one, found = "expected false under torchrun", rank["refused"]["reward"]
        assert found.startswith("update 1: the reward function 'fails_on_rank_1' failed with ValueError: no score")
        assert rank["refused"] == {
            "in_backward": f"optim.in_backward: {one}, where no rank has a whole gradient, got True",
            "offload_activations": f"model.offload_activations: {one}, which gathers weights in the backward pass, got "
            "True",
            "reward": found,
            "nan": "update 2: reward function: expected a finite score for sample 4, got nan; the batch and the "
            f"weights before it are in {str(ranks[0] / 'refused' / 'nan' / 'failed' / 'update-000002')!r}",
            "skipped": [2],
        }


@pytest.mark.parametrize("name", STAGE_RUNS)
def test_a_supervised_stage_on_two_ranks_has_the_metrics_of_one_process(ranks, one, name):
    directory, found = ranks
    expected, result = one(name)
    for rank in found:
        assert worst(rank["supervised"][name], result.history)[0] < 1e-5
    assert files_of(directory / "supervised" / name) == files_of(expected)


def test_a_resumed_stage_on_two_ranks_ends_with_the_same_bits(ranks):
    first, second = (
        load_file(ranks[0] / "supervised" / run / "final" / "model.safetensors") for run in ("sft", "again")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
