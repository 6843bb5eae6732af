"""Directories that hold a config and no weights."""

import json

import pytest

from tests.rlhf.planning.factories import QWEN, tiny_policy


@pytest.fixture
def qwen(tmp_path):
    """A directory with the config of Qwen2.5-7B and nothing else."""
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN))
    return str(tmp_path / "qwen")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Flags of a run on a model directory that holds a config alone, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    tiny_policy().config.save_pretrained("model")
    return ["plan", "--model", "model", "--rollout.batch-size", "16", "--rollout.max-new-tokens", "32"]
