"""The examples in the docstrings of the ops run and give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import ppo_fast.ops

MODULES = [m.name for m in pkgutil.walk_packages(ppo_fast.ops.__path__, "ppo_fast.ops.") if "_triton" not in m.name]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("name", [n for n in ppo_fast.ops.__all__ if n not in ("LossOutput", "TokenStats")])
def test_every_public_name_has_an_example(name: str) -> None:
    public = getattr(ppo_fast.ops, name)
    assert any(test.examples for test in doctest.DocTestFinder(recurse=False).find(public, name))
