"""A save that fails or is cut short, at any write, flush or rename, costs nothing that was saved before."""

import os
import resource
import shutil

import pytest

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.files import write_whole
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.train import PPORun
from ppo_fast.rlhf.training.checkpoint import latest, load_checkpoint
from tests.helpers import raises_exactly
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.faults import FULL, Crash, Faults, bytes_below


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(make_config, tokenizer):
    """run(reward_fn, resume=False): four updates of a fresh tiny model, saved at the second and the fourth."""

    def go(reward_fn=reward, **options):
        config = make_config(updates=4, checkpoint={"every": 2, "keep": 1}, log={"samples_every": 1})
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        return train_ppo(config, reward_fn=reward_fn, prompts=PROMPTS, policy=policy, tokenizer=tokenizer, **options)

    return go


def test_rule_16_the_last_good_checkpoint_outlives_a_fault_at_every_call(run, tmp_path, monkeypatch):
    save, checkpoints, good = PPORun.save, tmp_path / "run" / "checkpoints", tmp_path / "good"
    faults, tried = Faults(monkeypatch), []

    def save_with_faults(self, log):
        if self.done == 2:
            return save(self, log)
        shutil.copytree(checkpoints, good)
        before = bytes_below(good / "update-000002")
        faults.arm()
        after = bytes_below(save(self, log))
        calls = list(faults.calls)
        for error in (FULL, KeyboardInterrupt(), Crash()):
            for at, name in enumerate(calls, start=1):
                if name == "rmtree" and error is FULL:
                    continue  # removing asks for no space
                faults.arm()
                shutil.rmtree(checkpoints)
                shutil.copytree(good, checkpoints)
                faults.arm(error, at)
                with pytest.raises(type(error)):
                    save(self, log)
                faults.arm()
                newest = latest(checkpoints)
                assert bytes_below(newest) == {"update-000002": before, "update-000004": after}[newest.name], (at, name)
                assert load_checkpoint(checkpoints).state["log"]["done"] == int(newest.name[-6:])
                save(self, log)  # what was left behind is in nobody's way
                tried.append((newest.name, name))
        assert after == bytes_below(checkpoints / "update-000004")
        return None

    monkeypatch.setattr(PPORun, "save", save_with_faults)
    run()
    for name in ("open", "write", "fsync", "mkdir", "rename", "write_text", "save_file", "safe_save_file"):
        assert ("update-000002", name) in tried
    assert {name for newest, name in tried if newest == "update-000004"} >= {"fsync", "rename", "rmtree"}


@pytest.mark.parametrize(
    ("error", "at", "told"),
    [
        (FULL, "save_file", UserError),
        (FULL, "open", UserError),
        (KeyboardInterrupt(), "rename", KeyboardInterrupt),
        (Crash(), "fsync", Crash),
    ],
)
def test_rule_16_after_a_fault_the_run_resumes_to_the_same_bits(run, tmp_path, monkeypatch, error, at, told):
    expected = left_by(run())
    shutil.rmtree(tmp_path / "run")
    save = PPORun.save

    def save_with_fault(self, log):
        if self.done == 4:
            Faults(monkeypatch).arm(error, at)
        return save(self, log)

    with monkeypatch.context() as patch:
        patch.setattr(PPORun, "save", save_with_fault)
        with pytest.raises(told):
            run()
    monkeypatch.undo()
    assert latest(tmp_path / "run" / "checkpoints").name == "update-000002"
    assert left_by(run(resume=True)) == expected


def left_by(result):
    samples = (result.directory / "samples.jsonl").read_text()
    metrics = [{n: x for n, x in m.items() if not n.startswith(("time", "tok", "mem"))} for m in result.history]
    return bytes_below(result.model), samples, metrics


def test_a_full_disk_is_one_sentence_and_costs_nothing(run, tmp_path):
    """A real failing write: the kernel refuses files above a limit."""
    calls, limit = [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(**arguments):
        calls.append(1)
        if len(calls) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))
        return reward(**arguments)

    fill.__name__ = reward.__name__  # which names its metrics

    expected = left_by(run())
    shutil.rmtree(tmp_path / "run")
    try:
        with pytest.raises(UserError) as failed:
            run(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    message = str(failed.value)
    assert message.startswith(f"cannot write in {str(tmp_path / 'run')!r}: ")
    assert "File too large" in message
    assert message.endswith("; update-000002 is complete and resume continues there")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["update-000002"]
    assert left_by(run(resume=True)) == expected


def test_a_metric_that_cannot_be_written_is_told(run, tmp_path, monkeypatch):
    def full(file, record):
        raise FULL

    monkeypatch.setattr("ppo_fast.rlhf.training.log._line", full)
    told = f"cannot write in {str(tmp_path / 'run')!r}: {FULL}; there is no checkpoint yet"
    with raises_exactly(told, UserError):
        run()


def test_a_text_file_is_there_completely_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "one\n")

    def full(descriptor):
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two\n")
    assert path.read_text() == "one\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
