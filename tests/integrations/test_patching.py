"""Replacing functions of a project: everywhere or not at all, counted, taken back."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from ppo_fast.integrations import patching
from ppo_fast.integrations.patching import NotTaken, Report, Target
from tests.helpers import raises_exactly

CORE = """
def double(x, *, by=2):
    # theirs
    return x * by

def helper(x):
    return x

class Loss:
    def forward(self, x):
        y = helper(x)
        return y - 1

REGISTRY = {"double": double}
"""
USER = "from project.core import double as imported\nfrom project import core\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of another project: a core, a module that imports from it, and one that does so later."""
    package = tmp_path / "project"
    package.mkdir()
    for name, source in {"__init__": "", "core": CORE, "user": USER, "late": USER}.items():
        (package / f"{name}.py").write_text(source)
    info = tmp_path / "project-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: project\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("project.user")
    for name in [name for name in sys.modules if name.split(".")[0] == "project"]:
        del sys.modules[name]
    assert not patching._ACTIVE


def ours(x: Any, *, by: int = 2) -> Any:
    return NotTaken("a string") if isinstance(x, str) else 100 * by * x


def target(name: str, new: Callable[..., Any] = ours, **options: Any) -> Target:
    core = sys.modules["project.core"]
    known: Any = core
    for part in name.split("."):
        known = getattr(known, part, None)
    helpers = [getattr(core, helper) for helper in options.get("helpers", ())]
    digests = {} if known is None else {"project 1.0": patching.digest(known, *helpers)}
    return Target("project.core", name, "an op", digests, lambda _: new, **options)


def patch(*targets: Target) -> Report:
    return patching.patch("patch_project", "project", targets, {"more": "not ours"})


def test_every_name_and_registry_is_replaced_and_undone(project: Any) -> None:
    original = project.core.double
    report = patch(target("double"))
    late = importlib.import_module("project.late")
    for function in (project.core.double, project.imported, project.core.REGISTRY["double"], late.imported):
        assert function(3) == 600
    assert sorted(report.replaced["project.core.double"]) == [
        "project.core.REGISTRY.double",
        "project.core.double",
        "project.user.imported",
    ]
    report.undo()
    for function in (project.core.double, project.imported, project.core.REGISTRY["double"], late.imported):
        assert function is original
    report.undo()


def test_a_method_is_replaced_in_its_class_and_undone(project: Any) -> None:
    original, loss = project.core.Loss.forward, project.core.Loss()
    with patch(target("Loss.forward", lambda self, x: 7, helpers=("helper",))) as report:
        assert loss.forward(3) == 7
        assert report.replaced == {"project.core.Loss.forward": ["project.core.Loss.forward"]}
    assert project.core.Loss.forward is original
    assert loss.forward(3) == 2


def test_calls_and_fallbacks_are_counted_and_shown(project: Any) -> None:
    with patch(target("double")) as report:
        assert project.imported(1, by=3) == 300
        assert project.imported("ab") == "abab"
        shown = str(report)
    assert report.calls == {"project.core.double": 1}
    assert report.fallbacks == {("project.core.double", "a string"): 1}
    assert shown.splitlines() == [
        "ppo_fast in project 1.0",
        "  replaced project.core.double (3x), 1 calls",
        "  kept     more: not ours",
        "  original project.core.double, 1 calls: a string",
    ]
    assert str(report).startswith("ppo_fast in project 1.0 (undone)\n")


def test_name_and_signature_are_those_of_the_original(project: Any) -> None:
    signature = inspect.signature(project.core.double)
    with patch(target("double")):
        assert inspect.signature(project.core.double) == signature
        assert project.core.double.__name__ == "double"
        assert project.core.double.__module__ == "project.core"


@pytest.mark.parametrize("changed", ["    # theirs", "return x * by"])
def test_another_source_is_refused_and_nothing_replaced(project: Any, tmp_path: Path, changed: str) -> None:
    known, loss = target("double"), target("Loss.forward")
    path = tmp_path / "project" / "core.py"
    path.write_text(CORE.replace(changed, changed + " + 0"))
    importlib.reload(project.core)
    original, method = project.core.double, project.core.Loss.forward
    message = "patch_project: expected project.core.double as in project 1.0, got another source in project 1.0"
    with raises_exactly(message):
        patch(loss, known)
    assert project.core.double is original
    assert project.core.Loss.forward is method


def test_another_source_of_a_helper_is_refused(project: Any, tmp_path: Path) -> None:
    known = target("Loss.forward", helpers=("helper",))
    (tmp_path / "project" / "core.py").write_text(CORE.replace("    return x\n", "    return x + 1\n"))
    importlib.reload(project.core)
    with pytest.raises(ValueError, match=r"expected project\.core\.Loss\.forward as in"):
        patch(known)


def test_a_function_that_is_gone_is_refused_or_reported(project: Any) -> None:
    with raises_exactly("patch_project: expected project.core.gone, got none in project 1.0"):
        patch(target("gone"))
    with patch(target("gone", optional=True), target("double")) as report:
        assert report.kept == {"project.core.gone": "project 1.0 has none", "more": "not ours"}
    elsewhere = Target("project.gone", "double", "an op", {}, lambda _: ours)
    with pytest.raises(ModuleNotFoundError, match=r"project\.gone"):
        patch(elsewhere)


def test_a_second_patch_is_refused_until_the_first_is_undone(project: Any) -> None:
    with patch(target("double")):
        message = "patch_project: expected project without a patch in effect, got a second one; undo the first"
        with raises_exactly(message):
            patch(target("double"))
        assert project.imported(3) == 600
    with patch(target("double")):
        assert project.imported(3) == 600


def test_a_failure_on_the_way_leaves_nothing_replaced(project: Any) -> None:
    original = project.core.double

    def fails(_: Any) -> Any:
        raise RuntimeError("no")

    broken = target("Loss.forward")
    broken = Target(broken.module, broken.name, broken.op, broken.digests, fails)
    with pytest.raises(RuntimeError, match="no"):
        patch(target("double"), broken)
    assert project.core.double is original
    assert project.imported is original


def test_a_replacement_has_no_graph_break_and_is_not_recompiled_by_its_counter(project: Any) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    with patch(target("double")) as report:
        step = torch.compile(lambda x: project.imported(x) + 1, fullgraph=True, backend=counter)
        for _ in range(3):
            project.imported(1)  # counts
            torch.testing.assert_close(step(torch.ones(2)), torch.full((2,), 201.0))
    assert counter.frame_count == 1
    assert report.calls["project.core.double"] == 3


def test_a_checkout_without_metadata_is_patched_and_named_so(project: Any, tmp_path: Path) -> None:
    (tmp_path / "project-1.0.dist-info" / "METADATA").unlink()
    (tmp_path / "project-1.0.dist-info").rmdir()
    with patch(target("double")) as report:
        assert report.package == "project of a checkout"


def test_rewritten_exchanges_lines_in_the_functions_own_namespace(project: Any) -> None:
    forward = patching.rewritten(
        project.core.Loss.forward, {("y = helper(x)", "return y - 1"): "y = helper(ten)"}, ten=10
    )
    assert forward(None, 3) == 9


def test_rewritten_refuses_lines_that_are_not_there(project: Any) -> None:
    with raises_exactly("Loss.forward: expected 'return 5' once and 'x' after it"):
        patching.rewritten(project.core.Loss.forward, {("return 5", "x"): "pass"})
