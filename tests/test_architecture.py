"""Imports go one way: ops import no stage, a subpackage of the trainer imports from its left; there is no cycle."""

import ast
from pathlib import Path

import pytest

import ppo_fast

ROOT = Path(ppo_fast.__file__).parent
# The subpackages and modules of `ppo_fast.rlhf`; each imports from those before it and, but for PEERS, from itself.
ORDER = [
    "errors",
    "files",
    "split",
    "integrity",
    "user_code",
    "world",
    "config",
    "data",
    "preflight",
    "models",
    "decoding",
    "training",
    "reports",
    "ppo",
    "supervised",
    "critic",
    "arguments",
    "planning",
]
PEERS = {"ppo", "supervised", "arguments"}  # none of them imports another


def name_of(path: Path) -> str:
    parts = ["ppo_fast", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, at the top or inside a function: modules, and names in modules."""
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


def parts_of(names: set[str]) -> set[str]:
    """The subpackages and modules of `ppo_fast.rlhf` that dotted names lie in."""
    return {name.split(".")[2] for name in names if name.startswith("ppo_fast.rlhf.")}


def files(part: str) -> list[Path]:
    """The module of that name in `ppo_fast.rlhf`, or those of the subpackage."""
    module = ROOT / "rlhf" / f"{part}.py"
    return [module] if module.is_file() else sorted((ROOT / "rlhf" / part).rglob("*.py"))


@pytest.mark.parametrize("part", ORDER)
def test_a_subpackage_imports_from_its_left(part):
    left = {*ORDER[: ORDER.index(part)], part} - (PEERS - {part} if part in PEERS else set())
    assert files(part)
    for path in files(part):
        assert parts_of(imports(path)) & {*ORDER} <= left, path


def test_every_module_of_the_trainer_has_a_place():
    found = {path.stem if path.suffix else path.name for path in (ROOT / "rlhf").iterdir()} - {"__pycache__"}
    assert found == {*ORDER, "__init__"}


def test_imports_have_no_cycle():
    """Imports inside functions count."""
    paths = modules()
    graph = {
        name: {other for other in imports(path) & paths.keys() if other != name and not is_own_package(other, name)}
        for name, path in paths.items()
    }
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"imports go round among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


def is_own_package(package: str, name: str) -> bool:
    """Whether `package` holds `name`: a module's import of a sibling names their package too."""
    return name.startswith(f"{package}.")


def test_ops_import_no_stage_and_nothing_that_is_built_on_them():
    above = ("ppo_fast.rlhf", "ppo_fast.cli", "ppo_fast.integrations", "ppo_fast.nn")
    for path in (ROOT / "ops").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith(above)}, path


@pytest.mark.parametrize(("below", "above"), [("_core", "_backends"), ("reference", "native"), ("reference", "triton")])
def test_the_private_parts_of_the_ops_import_from_their_left(below, above):
    folders = {"_core": ROOT / "ops" / "_core"} | {
        name: ROOT / "ops" / "_backends" / name for name in ("reference", "native", "triton")
    }
    assert folders[below].is_dir()
    for path in folders[below].rglob("*.py"):
        assert not {name for name in imports(path) if f".{above}" in name and name.startswith("ppo_fast.ops.")}, path


def test_every_backend_has_the_same_file_names():
    folders = {name: ROOT / "ops" / "_backends" / name for name in ("reference", "native", "triton")}
    for name in ("token_stats", "policy_loss", "value_loss", "gae"):
        assert all((folder / f"{name}.py").is_file() for folder in folders.values()), name


def test_integrations_import_ops_alone():
    for path in (ROOT / "integrations").glob("*.py"):
        own = {name for name in imports(path) if name.startswith("ppo_fast.")}
        assert all(name.startswith(("ppo_fast.ops", "ppo_fast.integrations")) for name in own), path


def test_the_walk_sees_relative_absolute_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    (tmp_path / "rlhf").mkdir()
    path = tmp_path / "rlhf" / "x.py"
    path.write_text(
        "from .models import loading\nfrom . import ppo\nimport ppo_fast.rlhf.planning\n"
        "def f():\n    from ppo_fast.rlhf.training.loop import Loop\n    from ppo_fast.rlhf import reports\n"
    )
    assert {"models", "ppo", "planning", "training", "reports"} <= parts_of(imports(path))


def calls(path: Path, *names: str) -> list[str]:
    """The attribute calls in a file whose name is one of `names`."""
    tree = ast.walk(ast.parse(path.read_text()))
    found = (node.func.attr for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [name for name in found if name in names]


@pytest.mark.parametrize(
    ("owner", "others", "names"),
    [
        # The only place of the PPO loop that changes parameters. TrainingLoop.step is a method of its own.
        (
            "ppo/update",
            {
                "training/optim": {"step", "zero_grad"},
                "training/adamw": {"step", "zero_grad"},
                "training/adamw_8bit": {"step"},
                "training/loop": {"step"},
                "supervised/train": {"step", "backward"},
                "planning": {"step", "zero_grad", "backward"},  # without numbers
            },
            ("backward", "step", "zero_grad"),
        ),
        # The only place that writes weights; vllm reads a tokenizer from a directory.
        ("training/checkpoint", {"decoding/vllm_engine": {"save_pretrained"}}, ("save_pretrained", "save_file")),
    ],
)
def test_one_module_alone_does_it(owner, others, names):
    owner_path = ROOT / "rlhf" / f"{owner}.py"
    assert calls(owner_path, *names)
    for path in sorted((ROOT / "rlhf").rglob("*.py")):
        place = path.relative_to(ROOT / "rlhf").with_suffix("").as_posix()
        if path == owner_path or place == "models/tiny":
            continue
        allowed = others.get(place, others.get(place.partition("/")[0], set()))
        assert set(calls(path, *names)) <= allowed, place


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
