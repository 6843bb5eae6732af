"""What a release is checked by, and that the workflows call targets of the Makefile."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-01\n\n## [1.1.0] - 2025-01-01\n"


@pytest.fixture(scope="module")
def release_version() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_version", ROOT / ".ci" / "release_version.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "changelog", "tag", "found"),
    [
        ("1.2.0", CHANGELOG, None, None),
        ("1.2.0", CHANGELOG, "v1.2.0", None),
        ("1.2.0", CHANGELOG, "v1.2.1", "tag: expected v1.2.0, got v1.2.1"),
        ("1.3.0", CHANGELOG, "v1.3.0", "CHANGELOG.md: expected a section [1.3.0] first, got 1.2.0"),
        ("1.1.0", CHANGELOG, None, "CHANGELOG.md: expected a section [1.1.0] first, got 1.2.0"),
        ("1.2.0", "## [Unreleased]\n", None, "CHANGELOG.md: expected a section [1.2.0] first, got None"),
    ],
)
def test_version_changelog_and_tag_agree(
    release_version: ModuleType, version: str, changelog: str, tag: str | None, found: str | None
) -> None:
    assert release_version.disagreement(version, changelog, tag) == found


def _jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def test_the_workflows_call_targets_of_the_makefile_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [
        step["run"] for path in WORKFLOWS for job in _jobs(path).values() for step in job["steps"] if "run" in step
    ]
    called = {word for line in lines for word in re.findall(r"^make ([\w-]+)", line)}
    assert called == {"wheels", "sdist", "release-check"}
    assert called <= targets
    assert any((ROOT / line.split()[1]).is_file() for line in lines if line.startswith("bash "))


def test_only_a_tag_uploads_and_only_that_job_may_sign_in() -> None:
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
        for name, job in _jobs(path).items():
            uploads = any("pypi-publish" in step.get("uses", "") for step in job["steps"])
            assert uploads == (name == "upload")
            assert ("id-token" in job.get("permissions", {})) == uploads
            assert (job.get("if") == "github.ref_type == 'tag'") == uploads
    assert any("upload" in _jobs(path) for path in WORKFLOWS)
