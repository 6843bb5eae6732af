"""Runs of the command on two ranks that are killed, started twice or started wrongly."""

import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from ppo_fast import __version__
from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.training.checkpoint import load_checkpoint
from ppo_fast.rlhf.training.lock import hold_directory
from ppo_fast.rlhf.world import VARIABLES, World, current, join
from tests.helpers import raises_exactly
from tests.rlhf.distributed.ranks import start_ranks
from tests.rlhf.layout_factories import save_base

REWARD = "def reward(completion_ids, **_):\n    return [len(ids) / 10 for ids in completion_ids]\n"


@pytest.fixture
def command(tmp_path):
    """The arguments of a long run of the command, with a checkpoint after every update."""
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(8)))
    values = {
        "updates": 1000,
        "threads": 1,
        "ddp_timeout": 60,
        "model": {"path": save_base(tmp_path / "base")},
        "data": {"prompts": str(tmp_path / "prompts.jsonl")},
        "reward": {"function": f"{tmp_path / 'reward.py'}:reward"},
        "rollout": {"batch_size": 4, "max_new_tokens": 3},
        "optim": {"minibatch_size": 4, "epochs": 1},
        "checkpoint": {"every": 1},
        "log": {"tensorboard": False, "console": False},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return "-m", "ppo_fast", "train", "--config", tmp_path / "run.yaml"


def ends(ranks):
    """The exit status and the sentences of each rank."""
    outputs = [rank.communicate(timeout=180)[1] for rank in ranks]
    found = [[line for line in output.splitlines() if line.startswith("ppo-fast: ")] for output in outputs]
    return [rank.returncode for rank in ranks], found


def test_a_rank_that_is_killed_ends_the_run_in_a_sentence_with_the_latest_checkpoint_whole(command, tmp_path):
    ranks, checkpoints = start_ranks(*command), tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 180
    while not (checkpoints / "update-000002").is_dir():
        assert all(rank.poll() is None for rank in ranks), ends(ranks)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[1].kill()
    (status, _), ([sentence], _) = ends(ranks)
    assert status == 2
    assert sentence.startswith("ppo-fast: ")
    assert "lost another process of the run: " in sentence
    assert sentence.endswith("; the latest checkpoint is whole, and --resume continues there")
    assert load_checkpoint(checkpoints).state["log"]["done"] >= 2


FULL = """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
calls = []

def reward(completion_ids, **_):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "0":  # its disk is full from the third update on
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return [len(ids) / 10 for ids in completion_ids]
"""


@pytest.mark.slow
def test_a_save_that_fails_ends_both_ranks_in_a_sentence_with_the_latest_checkpoint_whole(command, tmp_path):
    (tmp_path / "reward.py").write_text(FULL)
    statuses, ([sentence], other) = ends(start_ranks(*command))
    assert statuses == [2, 2]
    assert "File too large" in sentence
    assert sentence.endswith("; update-000002 is complete and resume continues there")
    assert other == []
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["update-000001", "update-000002"]
    assert load_checkpoint(checkpoints).state["log"]["done"] == 2


@pytest.mark.slow
def test_a_run_that_is_started_twice_is_refused_once(command, tmp_path):
    with hold_directory(tmp_path / "run"):
        statuses, (main, other) = ends(start_ranks(*command))
    directory = str(tmp_path / "run")
    assert statuses == [2, 2]
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert main == [f"ppo-fast: output_dir: {directory!r} is in use by {holder}; end that run or choose another"]
    assert other == []


def test_world_size_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in {*VARIABLES} - {"WORLD_SIZE"}:
        monkeypatch.delenv(name, raising=False)
    message = (
        "WORLD_SIZE: expected the variables of torchrun with it, got no RANK; start the run by 'torchrun "
        "--nproc-per-node N -m ppo_fast ...', or unset WORLD_SIZE for one process"
    )
    with raises_exactly(message, UserError), join():
        pass


def test_without_torchrun_the_world_is_one(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with join() as world:
        assert world == World() == current()
        assert world.concatenate(x := torch.ones(2)) is x
        assert world.sum(x) is x
        assert world.share(5) == range(5)
        assert world.objects(3) == [3]


@pytest.fixture
def variables(monkeypatch):
    """The variables of torchrun for the third process of a node."""
    for name, value in zip(VARIABLES, ("2", "2", "4", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)


def test_a_numbered_device_is_refused(variables):
    message = "model.device: expected 'auto', 'cuda' or 'cpu' under torchrun, got 'cuda:1'"
    with raises_exactly(message, UserError), join("cuda:1"):
        pass


def test_more_processes_than_gpus_are_refused(variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "torchrun: expected at most 2 processes on this node, one for each GPU, got more"
    with raises_exactly(message, UserError), join():
        pass


def test_the_package_is_the_command():
    found = subprocess.run([sys.executable, "-m", "ppo_fast", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"ppo-fast {__version__}\n"
