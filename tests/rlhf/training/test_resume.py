"""A run that is stopped and resumed ends with the bits of the run that never stopped."""

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.data.prompts import Prompts
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.reward_hacking import Rule
from ppo_fast.rlhf.training.resume import file_digests, inputs, prompt_inputs
from ppo_fast.rlhf.training.signals import Interrupted, StopSignals
from ppo_fast.rlhf.user_code import load_callable
from tests.helpers import raises_exactly
from tests.rlhf.training.resuming import MANY, left_by

EVERYTHING = {  # every part of a run that has a state of its own
    "kl": {"adaptive": True, "coef": 0.1, "target": 1.0, "horizon": 50, "placement": "both"},
    "advantage": {"whiten": False},
    "loss": {"penalty_coef": 0.1, "penalty_target": 0.01},
    "checkpoint": {"every": 2, "keep": 2},
    "log": {"samples_every": 1},
}


def reward(completion_ids, **_):
    """A score with noise from each of the global generators."""
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    return [sum(token % 2 for token in ids) / len(ids) + 0.1 * noise for ids in completion_ids]


def seed_globals():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run(make_config, tokenizer):
    """run(reward_fn, **config) -> PPOResult of a fresh tiny model; resume=True continues."""

    def go(reward_fn=reward, *, resume=False, prompts=MANY, policy=None, eval_prompts=None, **values):
        values = {name: {**EVERYTHING.get(name, {}), **values.get(name, {})} for name in EVERYTHING} | {
            name: value for name, value in values.items() if name not in EVERYTHING
        }
        policy = policy or tiny.make_model(64, hidden=32, layers=1, heads=2)
        config = make_config(**values)
        return train_ppo(
            config,
            reward_fn=reward_fn,
            prompts=prompts,
            policy=policy,
            tokenizer=tokenizer,
            eval_prompts=eval_prompts,
            resume=resume,
        )

    return go


class Stop(BaseException):
    """Ends a run where it stands."""


def stops_in(update, then=Stop):
    calls = []

    @functools.wraps(reward)  # the name of its metrics
    def stopping(**arguments):
        calls.append(1)
        if len(calls) == update:
            raise then
        return reward(**arguments)

    return stopping


@pytest.mark.parametrize("resumed_at", [2, 4])
def test_rule_16_a_resumed_run_ends_with_the_same_bits(run, tmp_path, resumed_at):
    seed_globals()
    whole = run(updates=6, output_dir=str(tmp_path / "whole"))
    seed_globals()
    with pytest.raises(Stop):
        run(stops_in(resumed_at + 2), updates=6)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints"))[-1] == f"update-{resumed_at:06d}"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == resumed_at + 1
    random.seed(9), np.random.seed(9), torch.manual_seed(9)  # another process
    resumed = run(updates=6, resume=True)
    assert left_by(resumed.directory) == left_by(whole.directory)
    assert [set(m) for m in resumed.history] == [set(m) for m in whole.history]
    for name in ("policy", "value"):
        pairs = zip(getattr(resumed.models, name).parameters(), getattr(whole.models, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rule_16_holds_for_everything_that_may_change_beside_the_weights(run, tmp_path):
    (tmp_path / "own.py").write_text(
        "def some(completion_ids, **_):\n    return [ids[0] % 5 > 0 or 'mask' for ids in completion_ids]\n"
    )
    options = {
        "updates": 6,
        "prompts": [{"prompt": prompt, "level": number % 2} for number, prompt in enumerate(MANY)],
        "eval_prompts": ["w20", "w21 w22"],
        "data": {"order": "level", "balance": "level"},
        "reward": {"normalize": "running", "filter": f"{tmp_path / 'own.py'}:some"},
        "advantage": {"kind": "sequence"},
        "reference": {"update": "ema", "every": 1, "decay": 0.5},
        "evaluation": {"every": 3},
    }
    seed_globals()
    whole = run(output_dir=str(tmp_path / "whole"), **options)
    seed_globals()
    with pytest.raises(Stop):  # scored once a training update, twice an evaluation
        run(stops_in(8), **options)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints"))[-1] == "update-000004"
    resumed = run(resume=True, **options)
    assert left_by(resumed.directory) == left_by(whole.directory)
    masked = [metrics["filter/masked"] for metrics in whole.history]
    assert any(masked)
    assert all("eval/win_rate" in whole.history[update - 1] for update in (3, 6))


def test_a_longer_run_is_a_resumed_shorter_one(run, tmp_path):
    constant = {"optim": {"warmup_frac": 0.0, "final_lr_frac": 1.0}}  # so that the number of updates sets no rate
    seed_globals()
    whole = run(updates=6, output_dir=str(tmp_path / "whole"), **constant)
    seed_globals()
    run(updates=3, **constant)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["update-000002", "update-000003"]
    resumed = run(updates=6, resume=True, checkpoint={"every": 1, "keep": 0}, **constant)
    assert left_by(resumed.directory) == left_by(whole.directory)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"update-{n:06d}" for n in (2, 3, 4, 5, 6)]
    again = run(updates=6, resume=True, **constant)  # nothing left to do
    assert left_by(again.directory) == left_by(whole.directory)


def test_an_older_checkpoint_is_resumed_to_the_same_bits_when_the_newest_is_damaged(run, tmp_path):
    checkpoints, options = tmp_path / "run" / "checkpoints", {"updates": 3, "checkpoint": {"every": 1}}
    seed_globals()
    whole = run(updates=3, checkpoint={"every": 1}, output_dir=str(tmp_path / "whole"))
    seed_globals()
    with pytest.raises(Stop):
        run(stops_in(3), **options)
    os.truncate(checkpoints / "update-000002" / "model.safetensors", 10)
    with pytest.raises(
        UserError, match=r"update-000002' is damaged: .*; --resume update-000001 continues from the one"
    ):
        run(resume=True, **options)
    assert sorted(os.listdir(checkpoints)) == ["update-000001", "update-000002"]
    with pytest.raises(Stop):  # before its first checkpoint
        run(stops_in(1), resume="update-000001", **options)
    assert sorted(os.listdir(checkpoints)) == ["update-000001", "update-000002.superseded"]
    resumed = run(resume=True, **options)
    assert left_by(resumed.directory) == left_by(whole.directory)
    assert sorted(os.listdir(checkpoints)) == ["update-000002", "update-000003"]


def test_tensorboard_shows_each_update_once(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = {"tensorboard": True}
    with pytest.raises(Stop):
        run(stops_in(4), updates=5, log=log)  # update 3 is written, update 2 saved
    run(updates=5, resume=True, log=log)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_is_a_model_directory_and_holds_no_pickle(run, tmp_path):
    from transformers import AutoModelForCausalLM

    result = run(updates=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "update-000002"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    pairs = zip(loaded.parameters(), result.models.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {path.suffix for path in checkpoint.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_the_state_of_a_reward_function_is_saved(run, tmp_path):
    class Counting:
        calls = 0

        def __call__(self, completions, **_):
            self.calls += 1
            return [self.calls] * len(completions)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    to_python = {"missing_eos_penalty": 0.0}
    run(Counting(), updates=2, reward=to_python)
    resumed = run(Counting(), updates=4, reward=to_python, resume=True)
    assert [m["objective/scores"] for m in resumed.history] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"^resume: expected a run of \[.*'reward', 'sampler'.*\], got \["):
        run(updates=4, reward=to_python, resume=True)


class Kept:
    """A reward function whose state is what it is given."""

    def __init__(self, state=None, load=None):
        self.state, self.load = state, load

    def __call__(self, completions, **_):
        return [0.0] * len(completions)

    def state_dict(self):
        return self.state() if callable(self.state) else self.state

    def load_state_dict(self, state):
        self.loaded = self.load() if self.load else state


def test_a_state_of_a_reward_function_that_cannot_be_saved_is_refused_before_the_run(run, tmp_path):
    expected = "expected tensors, NumPy arrays, numbers, text, bytes, lists, tuples, sets and dicts, got deque"
    with raises_exactly(f"reward function's state_dict.seen: {expected}", UserError):
        run(Kept({"seen": deque()}))
    with pytest.raises(UserError, match=r"^the reward function's 'state_dict' failed with SystemExit: 3 \(test_resume"):
        run(Kept(lambda: sys.exit(3)))
    assert not (tmp_path / "run").exists()


def test_a_state_of_a_reward_function_comes_back_exactly(run):
    state = {"seen": {"w1"}, "mean": np.float32(0.5), "rows": np.arange(3), "pairs": [(1, b"x")]}
    run(Kept(state), updates=1)
    resumed = Kept()
    run(resumed, updates=1, resume=True)
    assert repr(resumed.loaded) == repr(state)
    with pytest.raises(UserError, match=r"^the reward function's 'load_state_dict' failed with ZeroDivisionError: "):
        run(Kept(load=lambda: 1 / 0), updates=1, resume=True)


def test_the_count_of_skipped_batches_goes_on(run):
    def fails_once(completions, **_):
        return [float("nan") if not calls.append(1) and len(calls) == 1 else 0.5] * len(completions)

    calls = []
    run(fails_once, updates=2, on_nan="skip")
    resumed = run(fails_once, updates=3, on_nan="skip", resume=True)
    assert [metrics["nan/skipped_batches"] for metrics in resumed.history] == [1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lr": 0.5}}, r"resume: optim\.lr: expected 0\.001 as in '.*update-000002', got 0\.5"),
        ({"on_nan": "skip"}, r"resume: on_nan: expected 'stop' as in '.*update-000002', got 'skip'"),
        ({"updates": 1}, r"resume: updates: expected at least the 2 that are done, got 1"),
        ({"prompts": [*MANY[:-1], "w1"]}, r"resume: expected the prompts that the run was begun with, got others"),
        (
            {"prompts": [{"prompt": prompt, "level": int(prompt == MANY[-1])} for prompt in MANY]},
            r"resume: expected the columns of the prompts that the run was begun with, got others",
        ),
    ],
)
def test_another_run_is_not_resumed(run, values, message):
    run(updates=2, prompts=[{"prompt": prompt, "level": 0} for prompt in MANY] if "columns" in message else MANY)
    with pytest.raises(UserError, match=f"^{message}$"):
        run(resume=True, **({"updates": 4} | values))


def test_prompts_are_the_same_when_texts_tokens_and_columns_are():
    def digests(texts=("a", "b"), ids=((1, 2), (3,)), column=(None, None)):
        data = Prompts(list(texts), [list(row) for row in ids], {"x": list(column)}, 0)
        found = inputs(torch.nn.Linear(1, 1), prompt_inputs(data))
        return found["columns of the prompts"], found["prompts"]

    def columns(*values):
        return digests(column=values)[0]

    whole = np.zeros(2000)
    part = whole.copy()
    part[1000] = 1  # not in what NumPy writes of it
    assert digests()[1] != digests(texts=("a", "c"))[1]
    assert digests()[1] != digests(ids=((1, 2), (4,)))[1]
    assert columns(whole, None) != columns(part, None)
    assert columns({"b", "a"}, {"k": [1]}) == columns({"a", "b"}, {"k": [1]})
    assert columns("[1, 2]", None) != columns([1, 2], None) != columns([[1], 2], None)
    assert columns(None, object()) == columns(None, object())


def test_a_module_of_the_users_is_fingerprinted_by_its_file(tmp_path, monkeypatch):
    path = tmp_path / "module_of_a_user.py"
    path.write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_callable("module_of_a_user:f", "reward.function")
    specs = ["module_of_a_user:f", "ppo_fast.rewards:exact_answer", "level", None]
    before = file_digests(specs)
    assert {"module_of_a_user"} <= {*before} <= {"module_of_a_user", "ppo_fast.rewards"}
    path.write_text("def f(): return 1\n")
    assert file_digests(specs)["module_of_a_user"] != before["module_of_a_user"]


def test_a_changed_file_of_the_users_is_a_warning(run, tmp_path):
    path, other = tmp_path / "r.py", tmp_path / "other.py"
    text = "def f(completions, **_):\n    return [0.0] * len(completions)\n"
    path.write_text(text)
    other.write_text("def keep(completions, **_):\n    return [True] * len(completions)\n")
    options = {"reward": {"function": f"{path}:f", "filter": f"{other}:keep"}, "checkpoint": {"every": 1}}
    run(None, updates=1, **options)
    run(None, updates=2, resume=True, **options)  # nothing to warn about
    path.write_text(text.replace("0.0", "5.0"))
    message = f"^resume: {str(path)!r} is not as it was when the checkpoint was saved$"
    with pytest.warns(UserWarning, match=message) as warned:
        resumed = run(None, updates=3, resume=True, **options)
    assert len(warned) == 1
    assert [metrics["objective/scores"] > 1 for metrics in resumed.history] == [False, False, True]
    run(None, updates=4, resume=True, **options)  # told once


def test_a_resumed_run_goes_on_watching_and_warns_once(run, monkeypatch):
    always = Rule("length/mean", limit=0.0, factor=0.0, meaning="long", remedy="stop")
    monkeypatch.setattr("ppo_fast.rlhf.ppo.reward_hacking.RULES", (always,))
    monkeypatch.setattr("ppo_fast.rlhf.ppo.reward_hacking.WINDOW", 1)  # the first update is the start, the second tells

    def notes():
        lines = Path(directory, "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("note", "").count("hacking: long") for line in lines]

    directory = run(updates=1).directory
    run(updates=2, resume=True)
    assert notes() == [0, 1]
    run(updates=4, resume=True)
    assert notes() == [0, 1, 0, 0]


def test_the_policy_given_to_a_resumed_run_is_the_one_at_the_start(run):
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
    run(updates=2, policy=policy)
    with pytest.raises(UserError, match=r"^resume: expected the model weights that the run was begun with, got"):
        run(updates=4, policy=policy, resume=True)


def test_a_run_resumes_on_the_kind_of_device_it_was_begun_on(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ppo_fast.rlhf.ppo.train.inputs", lambda *given: inputs(*given) | {"kinds of device": "cuda"})
        run(updates=1)
    with raises_exactly("resume: expected the kinds of device that the run was begun with, got others", UserError):
        run(updates=2, resume=True)


def test_there_must_be_something_to_resume_and_it_must_be_whole(run, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    with raises_exactly(f"resume: expected a complete checkpoint in '{checkpoints}', got none", UserError):
        run(resume=True)
    run(updates=2)
    os.truncate(tmp_path / "run" / "metrics.jsonl", 10)
    with pytest.raises(UserError, match=r"^resume: expected \d+ bytes or more in '.*metrics\.jsonl', got 10$"):
        run(updates=2, resume=True)
    os.truncate(checkpoints / "update-000002" / "state.safetensors", 10)
    with pytest.raises(UserError, match=r"^resume: '.*update-000002' is damaged: state\.safetensors is not as"):
        run(updates=2, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_update_with_a_checkpoint(run, tmp_path, capfd, number):
    seed_globals()
    whole = run(updates=4, output_dir=str(tmp_path / "whole"))
    before = signal.getsignal(number)
    calls = []

    @functools.wraps(reward)
    def interrupted(**arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return reward(**arguments)

    seed_globals()
    with pytest.raises(Interrupted) as stopped:
        run(interrupted, updates=4, checkpoint={"every": 0})
    checkpoint = tmp_path / "run" / "checkpoints" / "update-000003"
    told = f"{number.name}: stopped after update 3; saved {str(checkpoint)!r}, --resume continues there"
    assert str(stopped.value) == told
    assert "ppo-fast: stopping after this update" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    assert left_by(run(updates=4, resume=True).directory) == left_by(whole.directory)


def test_the_clock_ends_the_run_with_a_checkpoint_but_no_finished_one(run, tmp_path):
    with pytest.raises(Interrupted) as stopped:
        run(updates=2, checkpoint={"every": 0}, max_hours=1e-9)
    checkpoint = tmp_path / "run" / "checkpoints" / "update-000001"
    expected = f"max_hours: stopped after update 1; saved {str(checkpoint)!r}, --resume continues there"
    assert (str(stopped.value), stopped.value.number) == (expected, signal.SIGTERM)
    assert len(run(updates=2, resume=True, max_hours=1e-9).history) == 2
    assert (tmp_path / "run" / "final").is_dir()


def test_a_second_interrupt_aborts_at_once(run, tmp_path):
    reached = []

    def twice(completions, **_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        reached.append(1)

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(twice, updates=4)
    assert not isinstance(stopped.value, Interrupted)
    assert not reached
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_signals_are_left_alone_in_other_threads_and_where_they_are_ignored():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopSignals("update"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        enter()
        assert seen[1] is signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
