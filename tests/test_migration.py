"""docs/migrating-from-trl.md names what exists, on both sides."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_fast.rlhf import PPOConfig, train_ppo
from ppo_fast.rlhf.config.model import LoraConfig

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migrating-from-trl.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def field(name: str) -> Any:
    """The default of a dotted field of our config."""
    value: Any = PPOConfig()
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and re.fullmatch(r"[\d.e+-]+", str(value)) is not None


def test_every_field_of_ours_exists_with_the_default_named() -> None:
    named = 0
    for row in ROWS:
        for name in re.findall(
            r"`((?:model|data|rollout|reward|kl|advantage|loss|optim|log|reference|evaluation)\.\w+)\b(?!\()",
            " ".join(row),
        ):
            default = field(name)
            shown = re.search(rf"`{re.escape(name)}` \(([\d.e+-]+)\)", row[1]) if len(row) > 1 else None
            if shown:
                assert default == pytest.approx(float(shown[1])), name
                named += 1
    assert named >= 15


def test_every_name_without_a_dot_is_a_field_or_an_argument() -> None:
    known = {item.name for item in dataclasses.fields(PPOConfig)} | {*inspect.signature(train_ppo).parameters}
    known |= {item.name for item in dataclasses.fields(LoraConfig)} | {"eos", "PPOConfig", "train_ppo"}
    ours = " ".join(row[1] for row in ROWS)
    names = {name for name in re.findall(r"`([A-Za-z_]\w*)=?`", ours) if not name.startswith("ppo_fast")}
    assert {"updates", "seed", "policy", "rank"} <= names
    assert names - known == set()


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_what_trl_has_by_default_is_what_the_page_says(tmp_path: Path) -> None:
    from trl.experimental.ppo import PPOConfig as Theirs

    config, checked = Theirs(output_dir=str(tmp_path), use_cpu=True), 0
    for row in ROWS:
        for names, shown in re.findall(r"((?:`\w+`, )*`\w+`) \(([^)=]+)\)", row[0]):
            values = [yaml.safe_load(value.strip()) for value in shown.split(",")]
            values = [None if value == "None" else float(value) if _number(value) else value for value in values]
            for name, value in zip(re.findall(r"\w+", names)[-len(values) :], values, strict=True):
                assert getattr(config, name) == value, name
                checked += 1
    assert checked >= 25


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_the_arguments_of_the_trainer_have_a_row() -> None:
    from trl.experimental.ppo import PPOTrainer

    left = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    assert {*inspect.signature(PPOTrainer.__init__).parameters} - {"self"} - left == set()


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_every_field_of_trl_has_a_row() -> None:
    from trl.experimental.ppo import PPOConfig as Theirs
    from trl.trainer.base_config import _BaseConfig

    own = {item.name for item in dataclasses.fields(Theirs)} - {item.name for item in dataclasses.fields(_BaseConfig)}
    left = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    assert own - left == set()
    assert left & own


def test_the_settings_at_the_end_are_a_config() -> None:
    settings = re.search(r"## The same settings\n\n<!--.*-->\n```yaml\n(.*)```", PAGE, re.DOTALL)[1]  # type: ignore[index]
    config = PPOConfig(**yaml.safe_load(settings))
    assert config.optim.betas == (0.9, 0.999)
    assert config.reward.models == ("my-reward-model",)
