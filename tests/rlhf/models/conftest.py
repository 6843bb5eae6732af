"""A base and a reward model on disk."""

import pytest

from tests.rlhf.layout_factories import run_stage, save_base


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def reward_model(tmp_path, base):
    """A reward model that is an adapter on the base."""
    return str(run_stage("reward", tmp_path / "reward", base).model)
