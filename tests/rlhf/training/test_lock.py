"""One run, one process: whoever comes second is told, and writes nothing."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys

import pytest

import ppo_fast.rlhf
from ppo_fast import cli
from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.training.lock import hold_directory
from tests.helpers import raises_exactly
from tests.rlhf.supervised_factories import STAGES, rows

HOLD = """import os, sys, time, types
for name, path in zip(("ppo_fast", "ppo_fast.rlhf"), sys.argv[2:]):  # without what the packages import
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from ppo_fast.rlhf.training.lock import hold_directory
with hold_directory(sys.argv[1]):
    if not os.fork():
        print(os.getpid(), flush=True)  # after the handlers of the fork
    time.sleep(60)
"""


def used_by(directory, pid):
    holder = f"process {pid} on {platform.node()}"
    return f"output_dir: {str(directory)!r} is in use by {holder}; end that run or choose another"


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_has_one_holder_and_is_left_as_it_was(tmp_path):
    directory, link = tmp_path / "a" / "run", tmp_path / "link"
    with hold_directory(directory):
        link.symlink_to(directory)
        for path in (directory, link):
            with raises_exactly(used_by(path, os.getpid()), UserError), hold_directory(path):
                pass
    assert not directory.exists()
    directory.mkdir()
    with hold_directory(directory):
        (directory / "metrics.jsonl").touch()
    assert os.listdir(directory) == ["metrics.jsonl"]


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def removed_before(descriptor, operation):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with hold_directory(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="is in use by"), hold_directory(tmp_path):
            pass


def test_a_killed_run_leaves_no_lock_though_its_child_lives(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path, *ppo_fast.__path__, *ppo_fast.rlhf.__path__]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    assert child > 0
    try:
        with raises_exactly(used_by(tmp_path, holder.pid), UserError), hold_directory(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is there
        with hold_directory(tmp_path):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, number):
    def refused(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    message = f"^the file system of '{tmp_path}' has no locks: let no other run write there$"
    with pytest.warns(UserWarning, match=message), hold_directory(tmp_path):
        (tmp_path / "file").touch()
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_that_cannot_be_made_or_written_to_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "run"
    with raises_exactly(f"output_dir: cannot make {str(below)!r}: Not a directory", UserError), hold_directory(below):
        pass
    (tmp_path / ".lock").mkdir()
    told = f"output_dir: cannot write in {str(tmp_path)!r}: Is a directory"
    with raises_exactly(told, UserError), hold_directory(tmp_path):
        pass


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("values", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_stage_refuses_a_directory_in_use_before_it_writes(run_stage, tmp_path, stage, values):
    directory = tmp_path / stage
    with hold_directory(directory):
        (directory / "metrics.jsonl").write_text("{}\n")
        before = contents(directory)
        with raises_exactly(used_by(directory, os.getpid()), UserError):
            run_stage(stage, rows(8), **values)
        assert contents(directory) == before


def test_ppo_is_not_resumed_in_a_directory_in_use(make_config, tmp_path):
    directory = tmp_path / "run"
    with hold_directory(directory), raises_exactly(used_by(directory, os.getpid()), UserError):
        train_ppo(make_config(), resume=True)


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_a_command_refuses_a_directory_in_use_with_status_2(tmp_path, capsys, command):
    directory = tmp_path / "run"
    # A path that is none on the Hub either: nothing is asked there.
    arguments = {"train": ["--model", str(tmp_path / "none"), "--prompts", "none.jsonl"], "quickstart": []}[command]
    with hold_directory(directory):
        assert cli.main([command, *arguments, "--out", str(directory)]) == 2
        assert os.listdir(directory) == [".lock"]
    assert capsys.readouterr().err == f"ppo-fast: {used_by(directory, os.getpid())}\n"
