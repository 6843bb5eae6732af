"""Checkpoints: complete or not there, and readable by others."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.rlhf import checkpoint
from ppo_fast.rlhf.checkpoint import VALUE_FILE, atomic_directory, save_models


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


def test_an_earlier_directory_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "d") as scratch:
            (scratch / name).write_text(name)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
