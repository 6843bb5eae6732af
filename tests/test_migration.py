"""docs/migrating-from-trl.md names what exists, on both sides."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_fast.rlhf import PPOConfig

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migrating-from-trl.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def field(name: str) -> Any:
    """The default of a dotted field of our config."""
    value: Any = PPOConfig()
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_field_of_ours_exists_with_the_default_named() -> None:
    named = 0
    for row in ROWS:
        for name in re.findall(
            r"`((?:model|data|rollout|reward|kl|advantage|loss|optim|log|reference|evaluation)\.\w+)`", " ".join(row)
        ):
            default = field(name)
            shown = re.search(rf"`{re.escape(name)}` \(([\d.e+-]+)\)", row[1]) if len(row) > 1 else None
            if shown:
                assert default == pytest.approx(float(shown[1])), name
                named += 1
    assert named >= 15


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_every_field_of_trl_has_a_row() -> None:
    from trl.experimental.ppo import PPOConfig as Theirs
    from trl.trainer.base_config import _BaseConfig

    own = {item.name for item in dataclasses.fields(Theirs)} - {item.name for item in dataclasses.fields(_BaseConfig)}
    left = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    assert own - left == set()
    assert left & own


def test_the_settings_at_the_end_are_a_config() -> None:
    settings = yaml.safe_load(re.search(r"## The same settings\n\n(.*)", PAGE, re.DOTALL)[1])  # type: ignore[index]
    config = PPOConfig()
    for section, values in settings.items():
        old = getattr(config, section)
        new = values if not isinstance(values, dict) else dataclasses.replace(old, **values)
        config = dataclasses.replace(config, **{section: new})
    assert config.optim.betas == [0.9, 0.999]
