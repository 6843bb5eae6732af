"""Checkpoints: complete or not there, and readable by others."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.rlhf import UserError, checkpoint, tiny
from ppo_fast.rlhf.checkpoint import atomic_directory, save_models
from ppo_fast.rlhf.models import VALUE_FILE, load_models


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
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: flushed.append((path.name, (tmp_path / "d").exists())))
    with atomic_directory(tmp_path / "d") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "file").write_text("x")
        assert not (tmp_path / "d").exists()
    assert {name for name, there in flushed if not there} == {"sub", "file", scratch.name}
    assert flushed[-1] == (tmp_path.name, True)
    assert (tmp_path / "d" / "sub" / "file").read_text() == "x"


def test_an_earlier_directory_comes_back_when_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "first").write_text("x")
    rename = pathlib.Path.rename

    def fail_for_new(self, target):
        return 1 / 0 if ".new-" in self.name else rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_new)
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "d") as scratch:
        (scratch / "second").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "first"]


def test_an_earlier_directory_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "d") as scratch:
            (scratch / name).write_text(name)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
