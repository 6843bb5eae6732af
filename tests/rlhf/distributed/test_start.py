"""Whole runs on two ranks whose models are read from disk, by rank 0: those of one process."""

import json
import shutil
from pathlib import Path

import pytest

from ppo_fast.rlhf import ValueConfig, train_ppo, train_value_model
from ppo_fast.rlhf.config.files import config_from_dict
from tests.rlhf.distributed.ranks import run_on_ranks
from tests.rlhf.distributed.starts import save_bases
from tests.rlhf.distributed.test_runs import BASE, PROMPTS, worst
from tests.rlhf.layout_factories import LAYOUTS, LORA
from tests.rlhf.supervised_factories import STAGES, rows

pytestmark = pytest.mark.slow

RUNS = {
    "reward model": (
        {"path": "tied", "packing": True},
        {"reward": {"models": ["reward/final"]}, "reference": {"update": "ema", "every": 1}},
    ),
    "adapters": ({"path": "base", **LAYOUTS["adapters"]}, {"reward": {"models": ["adapted/final"]}}),
}
STAGE_RUNS = {
    "reward": {"init": "reward/final"},
    "dpo": {"model": {"path": "sft/final", **LORA}},
    "value": {"model": {"path": "base"}, "data": {"train": "sampled.yaml", "held_out_frac": 0.25}, "samples": 8},
}


def within(value, bases):
    """The settings with the directory of the models in front of the paths."""
    if isinstance(value, dict):
        return {name: within(each, bases) for name, each in value.items()}
    if isinstance(value, list):
        return [within(each, bases) for each in value]
    return str(bases / value) if isinstance(value, str) and (bases / value).exists() else value


def run(output, name, bases, **options):
    model, values = RUNS[name]
    config = config_from_dict(BASE | within({"model": model, **values}, bases) | {"output_dir": str(output)})
    return train_ppo(config, prompts=PROMPTS, **options)


def stage(output, name, bases):
    """The history, and the statistics of a value model."""
    train, kind, *_ = (STAGES | {"value": (train_value_model, ValueConfig)})[name]
    values = {"optim": {"lr": 1e-3, "batch_size": 4}, "log": {"tensorboard": False, "console": False}, "threads": 1}
    config = config_from_dict(values | within(STAGE_RUNS[name], bases) | {"output_dir": str(output)}, kind=kind)
    result = train(config, train=None if name == "value" else rows(9))
    stats = Path(result.model, "value_stats.json")
    return result.history, json.loads(stats.read_text())["before"] if stats.exists() else {}


def from_disk(directory):
    bases = directory.parent / "bases"
    histories = {name: run(directory / name, name, bases).history for name in RUNS}
    return histories | {name: stage(directory / name, name, bases) for name in STAGE_RUNS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("ranks")
    save_bases(made / "bases")
    return made


@pytest.fixture(scope="module")
def ranks(directory):
    return [rank["from_disk"] for rank in run_on_ranks(directory, from_disk)]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_disk_has_the_samples_and_metrics_of_one_process(ranks, directory, name, tmp_path):
    expected = run(tmp_path, name, directory / "bases")
    found = directory / "from_disk" / name
    assert (found / "samples.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text()
    for rank in ranks:
        assert worst(rank[name], expected.history)[0] < 1e-5


def test_one_process_resumes_a_run_from_disk(ranks, directory, tmp_path):
    shutil.copytree(directory / "from_disk" / "reward model", tmp_path / "run")
    history = run(tmp_path / "run", "reward model", directory / "bases", resume="update-000002").history
    assert worst(history, ranks[0]["reward model"])[0] < 1e-5


@pytest.mark.parametrize("name", STAGE_RUNS)
def test_a_stage_from_disk_has_the_metrics_of_one_process(ranks, directory, name, tmp_path):
    expected, before = stage(tmp_path, name, directory / "bases")
    for rank in ranks:
        found, own = rank[name]
        assert worst(found, expected)[0] < 1e-5
        assert own == pytest.approx(before, abs=1e-5)
