"""`import ppo_fast` is light: its public names come at their first use, and help and version need none of them."""

import json
import pickle
import subprocess
import sys

import pytest

import ppo_fast
from ppo_fast import ops

LIGHT = """
import contextlib, io, json, sys
before = {*sys.modules}
import ppo_fast
from ppo_fast import cli
with contextlib.redirect_stdout(io.StringIO()):
    assert cli.main(["--help"]) == cli.main(["--version"]) == cli.main([]) == 0
    public = dir(ppo_fast)
after = {name.partition(".")[0] for name in {*sys.modules} - before}
from ppo_fast import *
print(json.dumps([sorted(after), public, policy_loss is ppo_fast.ops.policy_loss, "torch" in sys.modules]))
"""


def test_help_and_version_import_the_standard_library_only():
    ran = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    imported, public, same, torch = json.loads(ran.stdout)
    assert {*imported} - sys.stdlib_module_names == {"ppo_fast"}
    assert {*ppo_fast.__all__, "ops"} <= {*public}
    assert (same, torch) == (True, True)


def test_the_public_names_are_those_of_the_ops():
    assert ppo_fast.__all__ == ["__version__", *ops.__all__]
    for name in ops.__all__:
        assert getattr(ppo_fast, name) is getattr(ops, name)
    assert ppo_fast.ops is ops
    assert pickle.loads(pickle.dumps(ppo_fast.policy_loss)) is ops.policy_loss
    assert pickle.loads(pickle.dumps(ppo_fast.PolicyLossConfig(clip_low=0.1))) == ops.PolicyLossConfig(clip_low=0.1)
    with pytest.raises(AttributeError, match="module 'ppo_fast' has no attribute 'polcy_loss'"):
        ppo_fast.polcy_loss  # noqa: B018
