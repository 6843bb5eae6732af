"""Imports go one way: ops import no stage, a stage imports from its left."""

import ast
from pathlib import Path

import pytest

import ppo_fast

ROOT = Path(ppo_fast.__file__).parent
STAGES = [
    "errors",
    "integrity",
    "callables",
    "config",
    "supervised_config",
    "runtime",
    "lock",
    "configfile",
    "data",
    "curriculum",
    "attention",
    "batches",
    "forward",
    "examples",
    "adapters",
    "parking",
    "loading",
    "models",
    "rollout",
    "reward_sources",
    "rewards",
    "advantages",
    "adamw",
    "optim",
    "update",
    "planning",
    "reference",
    "metrics",
    "monitors",
    "runlog",
    "checkpoint",
    "evaluation",
    "failures",
    "signals",
    "resume",
    "loop",
    "ppo",
    "supervised",
    "sft",
    "reward_model",
    "dpo",
]
# What stands around the stages; no stage imports them.
TOOLS = ["tiny", "plots", "report", "judge", "export", "__init__"]


def imports(path: Path) -> set[str]:
    """Absolute names of every module a file imports, at the top or inside a function."""
    package = ["ppo_fast", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def files(stage: str) -> list[Path]:
    """The module of a stage, or those of its package."""
    module = ROOT / "rlhf" / f"{stage}.py"
    return [module] if module.is_file() else sorted((ROOT / "rlhf" / stage).glob("*.py"))


def stages_of(names: set[str]) -> set[str]:
    return {name.split(".")[2] for name in names if name.startswith("ppo_fast.rlhf.")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_from_its_left(stage):
    left = set(STAGES[: STAGES.index(stage)])
    for path in files(stage):
        own = {stage} if path.parent.name == stage else set()
        assert stages_of(imports(path)) & {*STAGES, *TOOLS} <= left | own, path


def test_every_module_of_the_trainer_has_a_place():
    modules = [path.stem for path in (ROOT / "rlhf").glob("*.py")]
    packages = [path.parent.name for path in (ROOT / "rlhf").glob("*/__init__.py")]
    assert {*modules, *packages} <= {*STAGES, *TOOLS}


def test_ops_import_no_stage_and_nothing_that_is_built_on_them():
    above = ("ppo_fast.rlhf", "ppo_fast.cli", "ppo_fast.integrations", "ppo_fast.nn")
    for path in (ROOT / "ops").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith(above)}, path


def test_integrations_import_ops_alone():
    for path in (ROOT / "integrations").glob("*.py"):
        own = {name for name in imports(path) if name.startswith("ppo_fast.")}
        assert all(name.startswith(("ppo_fast.ops", "ppo_fast.integrations")) for name in own), path


def test_the_walk_sees_relative_absolute_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    (tmp_path / "rlhf").mkdir()
    path = tmp_path / "rlhf" / "x.py"
    path.write_text(
        "from .update import Learner\nfrom . import ppo\nimport ppo_fast.rlhf.cli\n"
        "def f():\n    from ppo_fast.rlhf.metrics import collect\n    from ppo_fast.rlhf import plots\n"
    )
    assert {"update", "ppo", "cli", "metrics", "plots"} <= stages_of(imports(path))


def calls(path: Path, *names: str) -> list[str]:
    """The attribute calls in a file whose name is one of `names`."""
    tree = ast.walk(ast.parse(path.read_text()))
    found = (node.func.attr for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [name for name in found if name in names]


@pytest.mark.parametrize(
    ("owner", "others", "names"),
    [
        # The only stage that changes parameters, by the optimizers of `optim`. Loop.step is a loop's own.
        (
            "update",
            {
                "optim": {"step", "zero_grad"},
                "adamw": {"step", "zero_grad"},
                "loop": {"step"},
                "supervised": {"step", "backward"},
                "planning": {"step", "zero_grad", "backward"},  # without numbers
            },
            ("backward", "step", "zero_grad"),
        ),
        # The only stage that writes weights.
        ("checkpoint", {}, ("save_pretrained", "save_file")),
    ],
)
def test_one_stage_alone_does_it(owner, others, names):
    for stage in set(STAGES) - {owner}:
        found = {name for path in files(stage) for name in calls(path, *names)}
        assert found <= others.get(stage, set()), stage
    assert calls(ROOT / "rlhf" / f"{owner}.py", *names)


MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
MAKERS |= {"asarray", "logspace", "normal", "scalar_tensor", "tensor", "zeros"}
FACTORIES = {f"torch.{name}" for name in MAKERS} | {"nn.Linear", "nn.Embedding"}


@pytest.mark.parametrize("room", ["ops", "rlhf"])
def test_a_new_tensor_names_its_dtype_and_device(room: str) -> None:
    """Else `torch.set_default_dtype` and `torch.set_default_device` decide what a kernel writes to."""
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                named = {keyword.arg for keyword in node.keywords}
                if not {"dtype", "device"} <= named:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert found == []
