"""Checkpoints: complete or not there, and readable by others."""

import collections
import json
import os
import pathlib
import random
import signal
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.rlhf import UserError, files
from ppo_fast.rlhf.files import atomic_directory
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.models.saved import VALUE_FILE
from ppo_fast.rlhf.training.checkpoint import load_checkpoint, save_checkpoint, save_models
from ppo_fast.rlhf.training.state import fingerprint, restore_rng, rng_state
from tests.helpers import raises_exactly


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2"])
def test_a_saved_policy_is_a_model_directory(make_models, make_config, tmp_path, tokenizer, arch):
    models = make_models(make_config(), arch=arch)
    directory = save_models(models, tmp_path / "a" / "final")
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for ours, theirs in zip(models.policy.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(directory).get_vocab() == tokenizer.get_vocab()
    state = load_file(directory / VALUE_FILE)
    assert state.keys() == models.value.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in models.value.state_dict().items())


def test_a_model_with_sampling_settings_but_greedy_decoding_can_be_saved(make_config, tmp_path, tokenizer):
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
    policy.generation_config.temperature, policy.generation_config.top_p = 0.6, 0.9
    with pytest.raises(ValueError, match="do_sample"):
        policy.save_pretrained(tmp_path / "refused")
    models = load_models(make_config().model, torch.Generator(), policy=policy, tokenizer=tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(save_models(models, tmp_path / "final")).generation_config
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


def test_a_generation_config_that_cannot_be_saved_is_refused_before_the_run(make_config, tokenizer):
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
    policy.generation_config.length_penalty = 2.0
    with pytest.raises(UserError, match=r"model\.path: its generation config cannot be saved: .*length_penalty"):
        load_models(make_config().model, torch.Generator(), policy=policy, tokenizer=tokenizer)


def test_a_failed_save_leaves_the_earlier_one(make_models, make_config, tmp_path, monkeypatch):
    models = make_models(make_config())
    target = save_models(models, tmp_path / "final")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr(models.tokenizer, "save_pretrained", lambda path: 1 / 0)
    with torch.no_grad():
        models.policy.get_output_embeddings().weight.add_(1)
    with pytest.raises(ZeroDivisionError):
        save_models(models, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_directory_appears_only_when_everything_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "_fsync", lambda path: flushed.append((path.name, (tmp_path / "d").exists())))
    with atomic_directory(tmp_path / "d") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "file").write_text("x")
        assert not (tmp_path / "d").exists()
    assert {name for name, there in flushed if not there} == {"sub", "file", scratch.name}
    assert flushed[-1] == (tmp_path.name, True)
    assert (tmp_path / "d" / "sub" / "file").read_text() == "x"


def test_an_earlier_directory_comes_back_when_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "first").write_text("x")
    rename = pathlib.Path.rename

    def fail_for_new(self, target):
        return 1 / 0 if self.name.endswith(".new") else rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_new)
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "d") as scratch:
        (scratch / "second").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "first"]


def test_what_a_process_killed_in_the_exchange_left_is_put_right(tmp_path):
    for name in (".d.old", ".d.new"):  # the earlier directory moved aside, its successor not yet in its place
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "d") as scratch:
        1 / len(list(scratch.iterdir()))
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d" / "file").read_text() == ".d.old"


@pytest.mark.parametrize("able", [True, False])
def test_an_earlier_directory_is_replaced_as_a_whole(tmp_path, monkeypatch, able):
    if not able:  # a file system without the exchange in one step
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "d") as scratch:
            (scratch / name).write_text(name)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_earlier_directory_is_exchanged_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(pathlib.Path, "rename", None)  # the two steps of the other way
    with atomic_directory(tmp_path / "d") as scratch:
        (scratch / "new").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "new"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_stays(tmp_path, there):
    if there:
        (tmp_path / "disk" / "d").mkdir(parents=True)
    (tmp_path / "d").symlink_to(tmp_path / "disk" / "d")
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "d") as scratch:
            (scratch / name).write_text(name)
    assert (tmp_path / "d").is_symlink()
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["d", "second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "disk"]


def test_saved_files_follow_the_umask(make_models, make_config, tmp_path):
    before = os.umask(0o027)
    try:
        directory = save_models(make_models(make_config()), tmp_path / "final")
        with atomic_directory(tmp_path / "d") as scratch:
            os.mkdir(scratch / "sub", 0o700)
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert "model.safetensors" in files
    assert set(files.values()) == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory, tmp_path / "d" / "sub")} == {0o750}


def save(target, state=None, keep_last=0):
    return save_checkpoint(target, lambda directory: None, state or {}, keep_last=keep_last)


def test_a_state_comes_back_as_it_was(tmp_path):
    shared = torch.randn(3, 4)
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {
        "numbers": [1, 0.1 + 0.2, float("inf"), True, None, "text"],
        "nested": {"a": [{"b": torch.arange(3)}], "empty": {}},
        "tied": [shared, shared, shared.T],
        "dtypes": [torch.ones((), dtype=d) for d in (torch.bfloat16, torch.float64, torch.uint8, torch.bool)],
        "optimizer": optimizer.state_dict(),
    }
    save(tmp_path / "step-1", state)
    loaded = load_checkpoint(tmp_path).state
    stored = tmp_path / "step-1" / "state.safetensors"
    with stored.open("r+b") as file:
        file.write(bytes(stored.stat().st_size))  # what was loaded is no view of the file
    assert loaded["numbers"] == state["numbers"]
    assert torch.equal(loaded["nested"]["a"][0]["b"], torch.arange(3))
    assert loaded["nested"]["empty"] == {}
    for name in ("tied", "dtypes"):
        for ours, theirs in zip(loaded[name], state[name], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    again = torch.optim.AdamW(module.parameters())
    again.load_state_dict(loaded["optimizer"])
    assert again.state_dict()["state"].keys() == {0, 1}
    assert torch.equal(again.state[module.weight]["exp_avg"], optimizer.state[module.weight]["exp_avg"])
    assert load_checkpoint(tmp_path, tensors=False).state["numbers"][0] == 1


def test_a_state_that_only_a_pickle_could_hold_is_refused(tmp_path):
    expected = "expected tensors, NumPy arrays, numbers, text, bytes, lists, tuples, sets and dicts"
    for value in (tmp_path, collections.Counter("a"), np.ma.array([1]), np.array([None]), signal.SIGINT, 1j):
        with raises_exactly(f"state.part.0: {expected}, got {type(value).__name__}", UserError):
            save(tmp_path / "step-1", {"part": [value]})
    for tensor in (torch.ones(1, dtype=torch.complex64), torch.eye(2).to_sparse()):
        with raises_exactly(f"state.part: {expected}, got Tensor", UserError):
            save(tmp_path / "step-1", {"part": tensor})
    assert not (tmp_path / "step-1").exists()


def same(ours, theirs):
    """Equal in value and in type, at every depth."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(map(same, [*ours, *ours.values()], [*theirs, *theirs.values()]))
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, np.ndarray | np.generic):
        return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize(
    "value",
    [
        *(np.float64(0.1), np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("a"), np.datetime64("2020-01-01")),
        *(
            np.array([[1.5, np.inf]]),
            np.array(2.0),
            np.zeros((0, 3)),
            np.arange(6).reshape(2, 3).T,
            np.array(["a", "bc"]),
        ),
        *(np.arange(3, dtype=">i2"), np.array([1j])),
        *({1, "a", (2, b"b")}, set(), frozenset({1}), b"\x00\xff", (1, (2.0, [3])), ()),
        *({"<set>": 1}, {"<tensor>": {"<tuple>": [1]}}, {1: 2, "1": 3, (4, 5): 6, None: 7, 1.5: 8}, 2**80),
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(2)}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_users_state_comes_back_exactly(tmp_path, value):
    save(tmp_path / "step-1", {"part": [value]})
    assert same(load_checkpoint(tmp_path).state["part"][0], value)


def test_a_state_without_its_tensors_keeps_its_other_values(tmp_path):
    save(tmp_path / "step-1", {"config": {"models": ("a", "b")}, "part": torch.ones(1)})
    assert load_checkpoint(tmp_path, tensors=False).state["config"] == {"models": ("a", "b")}


def test_the_newest_are_kept_and_names_without_a_number_are_left_alone(tmp_path):
    save(tmp_path / "best")
    (tmp_path / ".step-1.new").mkdir()  # left by a killed process
    for number in (8, 9, 10):
        save(tmp_path / f"step-{number}", {"step": number}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-10", "step-9"]
    assert load_checkpoint(tmp_path).state == {"step": 10}
    save(tmp_path / "step-11", keep_last=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-10", "step-11", "step-9"]


def test_every_generator_goes_on_where_it_was():
    generator = torch.Generator().manual_seed(3)

    def draw():
        normal = np.random.normal(), random.gauss(0, 1)  # both keep a second number back
        return *normal, random.random(), torch.rand(2).tolist(), torch.rand(2, generator=generator).tolist()

    draw()
    state = json.loads(json.dumps(rng_state(generator), default=lambda x: {"tensor": x.tolist()}))
    state = {name: torch.tensor(x["tensor"], dtype=torch.uint8) if "tensor" in x else x for name, x in state.items()}
    expected = draw()
    draw()
    restore_rng(state, generator)
    assert draw() == expected


def test_a_fingerprint_tells_weights_apart():
    first, second = tiny.make_model(64, hidden=32), tiny.make_model(64, hidden=32)
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first.bfloat16()) != fingerprint(second)
    with torch.no_grad():
        next(second.parameters())[3, 4] += 1e-6
    assert fingerprint(tiny.make_model(64, hidden=32)) != fingerprint(second)
