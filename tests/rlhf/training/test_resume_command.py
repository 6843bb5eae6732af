"""The command resumes what a signal, a kill or a flag has ended."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_fast import cli
from ppo_fast.rlhf import arguments
from ppo_fast.rlhf.models import tiny
from tests.rlhf.training.resuming import MANY, left_by


@pytest.fixture
def files(tmp_path, tokenizer, monkeypatch):
    """A model, prompts and a config in the working directory; `hook.py` in a reward file of noise and scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(cli.__file__).parents[1])]))
    tiny.make_model(64, hidden=32, layers=1, heads=2).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in MANY))
    Path("run.yaml").write_text(
        "updates: 8\nthreads: 1\nmodel: {path: model}\ndata: {prompts: p.jsonl}\nreward: {function: r.py:f}\n"
        "rollout: {batch_size: 8, max_new_tokens: 4}\noptim: {minibatch_size: 4, lr: 1e-3}\n"
        "output_dir: run\ncheckpoint: {every: 1}\nlog: {console: false, tensorboard: false, samples_every: 1}\n"
    )
    Path("r.py").write_text(REWARD)
    return tmp_path


REWARD = """import os, random, signal
random.seed(0)
calls, flushed, fsync = 0, 0, os.fsync
def f(completion_ids, **_):
    global calls
    calls += 1
    if os.environ.get("TERM_AT") == str(calls):
        os.kill(os.getpid(), signal.SIGTERM)
    return [sum(t % 2 for t in ids) / len(ids) + random.random() for ids in completion_ids]
def flush(descriptor):
    global flushed
    flushed += calls >= 3  # in the save after the third update of this process
    if os.environ.get("KILL_AT") == str(flushed):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = flush
"""


# One process imports the trainer; its children train, and are killed.
KILLED_TWICE = """import os, random, signal, sys, time
from pathlib import Path
import ppo_fast.rlhf.ppo.train
from ppo_fast import cli

def start(*arguments):
    child = os.fork()
    if child == 0:
        os._exit(cli.main(["train", *arguments]))
    return child

def ended(child, options=0):
    pid, status = os.waitpid(child, options)
    return pid and os.waitstatus_to_exitcode(status)

os.environ["KILL_AT"] = "6"  # the third save: two logs, then the files of the checkpoint
print(ended(start("--config", "run.yaml")), *sorted(os.listdir("run/checkpoints")))
del os.environ["KILL_AT"]
again = start("--resume", "--out", "run")
while not Path("run/checkpoints/update-000003").exists():
    if code := ended(again, os.WNOHANG):
        sys.exit(code)
    time.sleep(0.001)
time.sleep(random.Random(0).random() * 0.3)
os.kill(again, signal.SIGKILL)
print(ended(again))
"""


@pytest.mark.slow
def test_rule_16_a_run_killed_again_and_again_ends_with_the_same_bits(files):
    assert cli.main(["train", "--config", "run.yaml", "--out", "whole"]) == 0
    killed = subprocess.run([sys.executable, "-c", KILLED_TWICE], capture_output=True, text=True, check=True)
    first, second = killed.stdout.splitlines()
    # The first kill came in the middle of a save.
    assert first.split() == ["-9", ".update-000003.new", "update-000001", "update-000002"]
    assert second == "-9"
    assert cli.main(["train", "--resume", "--out", "run"]) == 0
    assert left_by("run") == left_by("whole")
    assert sorted(os.listdir("run/checkpoints")) == ["update-000007", "update-000008"]


def test_sigterm_is_answered_by_a_checkpoint_and_status_143(files, monkeypatch, capsys):
    assert cli.main(["train", "--config", "run.yaml", "--out", "whole"]) == 0
    monkeypatch.setenv("TERM_AT", "2")
    monkeypatch.setattr(os, "fsync", os.fsync)  # r.py replaces it
    assert cli.main(["train", "--config", "run.yaml", "--checkpoint.every", "0"]) == 143
    monkeypatch.delenv("TERM_AT")
    told = capsys.readouterr().err.splitlines()
    checkpoint = "run/checkpoints/update-000002"
    assert told[-1] == f"ppo-fast: SIGTERM: stopped after update 2; saved {checkpoint!r}, --resume continues there"
    assert "Traceback" not in "".join(told)
    assert cli.main(["train", "--resume", "--output-dir", "run"]) == 0
    assert left_by("run") == left_by("whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "none"], "resume: expected a complete checkpoint in 'none/checkpoints', got none"),
        (["--config", "null.yaml"], "resume: expected a complete checkpoint in 'runs/ppo/checkpoints', got none"),
        (["--config", "run.yaml", "--optim.lr", "1"], "resume: optim.lr: expected 0.001 as in {}, got 1.0"),
        (["--out", "run", "update-9"], "--output-dir: expected one value, got 'run update-9'"),
        (["update-9", "--out", "run"], "resume: expected one of update-000001 in 'run/checkpoints', got 'update-9'"),
        (["", "--out", "run"], "--resume: expected no value or the name of a checkpoint, got an empty one"),
        (["--out", "run", "--seed", "7"], "resume: seed: expected 0 as in {}, got 7"),
        (
            ["--out", "run", "--updates", "fast"],
            "resume: updates: expected an int, got 'fast'",
        ),
    ],
)
def test_what_resume_refuses_is_one_line_and_status_2(files, capsys, arguments, message):
    assert cli.main(["train", "--config", "run.yaml", "--updates", "1"]) == 0
    Path("null.yaml").write_text("log:\n")
    capsys.readouterr()
    assert cli.main(["train", "--resume", *arguments]) == 2
    assert capsys.readouterr().err == f"ppo-fast: {message.format(repr('run/checkpoints/update-000001'))}\n"


def test_the_command_resumes_the_checkpoint_that_is_named(files):
    assert cli.main(["train", "--config", "run.yaml", "--updates", "2", "--seed", "5"]) == 0
    metrics = Path("run/metrics.jsonl").read_text().splitlines()[:1]
    named = ["--resume", "update-000001", "--out", "run", "--updates", "1"]
    assert cli.main(["train", *named]) == 0
    assert Path("run/metrics.jsonl").read_text().splitlines() == metrics
    assert sorted(os.listdir("run/checkpoints")) == ["update-000001", "update-000002.superseded"]
    assert arguments.parse_run("train", ["--resume=update-000001", "--out", "run"])[1] == "update-000001"


def test_flags_and_file_of_a_resumed_run_may_change_its_length_and_log(files):
    assert cli.main(["train", "--config", "run.yaml", "--updates", "1", "--seed", "5"]) == 0
    shutil.rmtree("run/final")
    assert cli.main(["train", "--resume", "--out", "run", "--updates", "3", "--checkpoint.keep=1"]) == 0
    assert os.listdir("run/checkpoints") == ["update-000003"]
    assert "seed: 5" in Path("run/config.yaml").read_text()
