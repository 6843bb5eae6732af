"""A rank that is killed or interrupted ends the other in a sentence, and the run goes on to the same bits.

One process imports the trainer; it forks the ranks of each run, which call the command and may kill themselves.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.rlhf.distributed.ranks import environment, free_port
from tests.rlhf.faults import Faults, bytes_below

KILLED, INTERRUPTED = -signal.SIGKILL, 130
REWARD = """
import os, signal, torch
calls = []

def reward(completion_ids, **_):
    calls.append(1)
    if "GATHERS" in os.environ:  # on one rank only: the other fails before
        if os.environ["RANK"] == "1":
            raise ValueError("no score")
        torch.distributed.all_reduce(torch.ones(3))
    for _ in range(2 * (os.environ.get("INTERRUPT_AT") == os.environ["RANK"] and len(calls) == 2)):
        os.kill(os.getpid(), signal.SIGINT)
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""


class Kills(Faults):
    """A call that changes the disk, or an exchange with the other rank, kills the process."""

    def __init__(self, patch):
        from ppo_fast.rlhf.training import streaming
        from ppo_fast.rlhf.world import World

        super().__init__(patch)
        patch.setattr(World, "objects", self._wrapped("exchange", World.objects))
        patch.setattr(streaming, "_whole", self._wrapped("gather", streaming._whole))

    def count(self, name):
        self.calls.append(name)
        if self.at == len(self.calls):
            os.kill(os.getpid(), self.error)


def rank(directory, number, port, arguments, kill):
    """The command on one rank; `kill`: (rank, update, number of the call in its save, signal)."""
    from ppo_fast import cli
    from ppo_fast.rlhf import world
    from ppo_fast.rlhf.ppo.train import PPORun

    os.environ.update(environment(number, 2, port))
    os.dup2(os.open(directory.with_name(f"{directory.name}.{number}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    patch, save = pytest.MonkeyPatch(), PPORun.save
    patch.setattr(world, "PATIENCE", 2.0)
    faults = Kills(patch)

    def save_with_a_kill(self, log):
        faults.arm()
        if kill and kill[:2] == (number, self.done):
            faults.arm(kill[3], kill[2])
        saved = save(self, log)
        if self.done == 2:
            directory.with_name(f"{directory.name}.calls{number}").write_text(json.dumps(faults.calls))
        return saved

    patch.setattr(PPORun, "save", save_with_a_kill)
    return cli.main(["train", *arguments])


def run(directory, *arguments, kill=None):
    """The exit status and the sentences of both ranks."""
    port, children = free_port(), []
    for number in range(2):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = rank(directory, number, port, arguments, kill)
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    outputs = [directory.with_name(f"{directory.name}.{number}").read_text() for number in range(2)]
    return statuses, [[line for line in text.splitlines() if line.startswith("ppo-fast: ")] for text in outputs]


def left_by(directory):
    clock = ("time/", "tokens_per_second", "memory/", "perf/")
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = [{n: x for n, x in record.items() if not n.startswith(clock)} for record in records]
    return metrics, {path.name: path.read_bytes() for path in (directory / "final").glob("*.safetensors")}


def main(directory):
    """Kill runs in many places; what each left."""
    from ppo_fast.rlhf.training.checkpoint import latest, load_checkpoint
    from tests.rlhf.layout_factories import save_base

    save_base(directory / "base", hidden=16)
    (directory / "reward.py").write_text(REWARD)
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(8)))
    values = {
        "updates": 3,
        "threads": 1,
        "ddp_timeout": 100,
        "model": {"path": str(directory / "base")},
        "data": {"prompts": str(directory / "prompts.jsonl")},
        "reward": {"function": f"{directory / 'reward.py'}:reward"},
        "rollout": {"batch_size": 4, "max_new_tokens": 3},
        "optim": {"minibatch_size": 4, "epochs": 1},
        "checkpoint": {"every": 1, "keep": 1},
        "log": {"tensorboard": False, "console": False},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(values))
    whole, first, found = directory / "whole", directory / "first", {}
    found["whole"] = run(whole, "--config", str(directory / "run.yaml"), "--out", str(whole))
    calls = [json.loads((directory / f"whole.calls{number}").read_text()) for number in range(2)]
    found["first"] = run(
        first, "--config", str(directory / "run.yaml"), "--out", str(first), kill=(0, 2, 1, signal.SIGKILL)
    )
    good = bytes_below(first / "checkpoints" / "update-000001")
    kinds = {name: calls[0].index(name) + 1 for name in calls[0]}
    last = {f"last {name}": len(calls[0]) - calls[0][::-1].index(name) for name in ("fsync", "rename", "exchange")}
    others = {name: calls[1].index(name) + 1 for name in calls[1]} | {"last exchange": len(calls[1])}
    cases = {
        **{(0, name): (0, 2, at, signal.SIGKILL) for name, at in (kinds | last).items()},
        **{(1, name): (1, 2, at, signal.SIGKILL) for name, at in others.items()},
    }
    for name, kill in cases.items():
        output = directory / "-".join(map(str, name)).replace(" ", "-")
        shutil.copytree(first, output)
        ended = run(output, "--resume", "--out", str(output), kill=kill)
        newest = latest(output / "checkpoints")
        kept = newest.name != "update-000001" or bytes_below(newest) == good
        done = load_checkpoint(output / "checkpoints").state["log"]["done"]
        again = run(output, "--resume", "--out", str(output))
        found[name] = (
            ended,
            newest.name,
            kept and done == int(newest.name[-1]),
            again[0],
            left_by(output) == left_by(whole),
        )
    found |= {
        "elsewhere": elsewhere(directory),
        "interrupted": interrupted(directory, first, whole),
        "again": again_and_again(directory, first, whole, kinds),
    }
    Path(directory, "found.pickle").write_bytes(pickle.dumps(found))


def interrupted(directory, first, whole):
    """The second SIGINT to rank 1 in update 3."""
    output = directory / "interrupted"
    shutil.copytree(first, output)
    os.environ["INTERRUPT_AT"] = "1"
    ended = run(output, "--resume", "--out", str(output))
    del os.environ["INTERRUPT_AT"]
    again = run(output, "--resume", "--out", str(output))
    return ended, again[0], left_by(output) == left_by(whole)


def elsewhere(directory):
    """Rank 1 fails while rank 0 waits in a collective of the user's own."""
    output = directory / "elsewhere"
    os.environ["GATHERS"] = "1"
    started = time.monotonic()
    ended = run(output, "--config", str(directory / "run.yaml"), "--out", str(output))
    del os.environ["GATHERS"]
    return ended, time.monotonic() - started


def again_and_again(directory, first, whole, kinds):
    """Each rank is killed, and interrupted, one after the other."""
    output, ends = directory / "again", []
    shutil.copytree(first, output)
    for kill in (
        (0, 2, kinds["safe_save_file"], signal.SIGKILL),
        (1, 2, 3, signal.SIGKILL),
        (0, 2, kinds["write_text"], signal.SIGTERM),  # after this update
        (0, 3, kinds["rename"], signal.SIGKILL),
        None,
    ):
        ends.append(run(output, "--resume", "--out", str(output), kill=kill)[0])
    return ends, left_by(output) == left_by(whole)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", __name__, directory]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return pickle.loads((directory / "found.pickle").read_bytes())


LOST = "lost another process of the run: .*; the latest checkpoint is whole, and --resume continues there"


@pytest.mark.slow
def test_a_rank_killed_anywhere_in_a_save_ends_the_other_and_costs_nothing(found):
    cases = {name: each for name, each in found.items() if isinstance(name, tuple)}
    assert {(0, name) for name in ("open", "write", "fsync", "mkdir", "rename", "rmtree", "gather")} <= cases.keys()
    assert {(1, name) for name in ("exchange", "gather", "last exchange")} <= cases.keys()
    for (killed, name), ((statuses, sentences), newest, whole, again, same) in cases.items():
        other = 1 - killed
        assert (statuses[killed], sentences[killed]) == (KILLED, []), name
        assert statuses[other] == 2, name
        (sentence,) = sentences[other]
        assert re.fullmatch(f"ppo-fast: {'rank 1: ' * other}{LOST}", sentence), name
        assert whole, name
        assert (again, same) == ([0, 0], True), (name, newest)
    assert {newest for _, newest, *_ in cases.values()} == {"update-000001", "update-000002"}


@pytest.mark.slow
def test_a_second_interrupt_of_one_rank_ends_both_at_once(found):
    (statuses, (main, other)), again, same = found["interrupted"]
    assert statuses == [2, INTERRUPTED]
    assert re.fullmatch(f"ppo-fast: {LOST}", main[-1])
    assert other == ["ppo-fast: stopping after this update, then saving; Ctrl-C aborts at once"]
    assert (again, same) == ([0, 0], True)


@pytest.mark.slow
def test_a_rank_that_fails_leaves_one_that_waits_elsewhere(found):
    (statuses, (main, other)), seconds = found["elsewhere"]
    assert statuses == [2, 2]
    assert seconds < 80  # of the 100 of ddp_timeout
    assert re.fullmatch(
        r"ppo-fast: rank 1: update 1: the reward function 'reward' failed with ValueError: no score .*", *other
    )
    assert re.fullmatch(r"ppo-fast: update 1: the reward function 'reward' failed with RuntimeError: .* peer.*", *main)


@pytest.mark.slow
def test_rule_16_ranks_killed_again_and_again_end_with_the_same_bits(found):
    ends, same = found["again"]
    assert ends == [[KILLED, 2], [2, KILLED], [143, 143], [KILLED, 2], [0, 0]]
    assert same


if __name__ == "__main__":
    main(Path(sys.argv[1]))
