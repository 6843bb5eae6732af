"""The examples in the docstrings of the ops run and give what they show; docs/rules.md names tests that exist."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import ppo_fast.ops

ROOT = Path(__file__).resolve().parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(ppo_fast.ops.__path__, "ppo_fast.ops.") if "_triton" not in m.name]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize(
    "name", [n for n in ppo_fast.ops.__all__ if n not in ("LossOutput", "SampledTokens", "TokenStats")]
)
def test_every_public_name_has_an_example(name: str) -> None:
    public = getattr(ppo_fast.ops, name)
    assert any(test.examples for test in doctest.DocTestFinder(recurse=False).find(public, name))


def test_the_rules_and_the_tests_that_hold_them_name_each_other() -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    tests = set(re.findall(r"^ *def (test_rule_\w+)", "\n".join(sources), re.MULTILINE))
    page = (ROOT / "docs" / "rules.md").read_text()
    rules = {number.zfill(2) for number in re.findall(r"^## (\d+)\. ", page, re.MULTILINE)}
    assert {name.split("_")[2] for name in tests} == rules
    assert set(re.findall(r"`(test_\w+)`", page)) <= tests
    for section in page.split("\n## ")[1:]:  # under its own rule, and no rule without a test
        assert set(re.findall(r"`test_rule_(\d+)_", section)) == {section.split(".")[0].zfill(2)}
