"""The files that a release would upload: `make package` builds sdist and wheel into build/dist before it runs these."""

import email
import os
import re
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIST = ROOT / "build" / "dist"
SMOKE = Path(__file__).with_name("smoke.py")


def _tracked(*patterns: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, text=True, capture_output=True, check=True)
    return set(listed.stdout.split())


def _only(pattern: str) -> Path:
    (path,) = DIST.glob(pattern)
    return path


def _metadata() -> Message:
    with zipfile.ZipFile(_only("*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def _install(tmp_path: Path, distribution: Path, **environment: str) -> Path:
    """Installs a distribution in an environment of its own, which takes its dependencies from this one; its Python."""
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    packages = sysconfig.get_path("purelib")
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True, capture_output=True
    )
    # A path in a .pth file is added; the .pth files in it, which an editable install has, are not read.
    Path(inside.stdout.strip(), "dependencies.pth").write_text(packages)
    command = ["-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    done = subprocess.run(
        [python, *command, distribution], env=_clean() | environment, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=Path(command[0]).parent, env=_clean(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(_only("*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    built = {name for name in names if re.fullmatch(r"ppo_fast/(_C\..*\.so|_build\.json)", name)}
    assert len(built) == 2
    assert names - built == _tracked("ppo_fast")


def test_the_sdist_holds_what_a_build_needs() -> None:
    with tarfile.open(_only("*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if sdist.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    files = {name for name in names if not name.startswith("ppo_fast.egg-info/")}
    sources = _tracked("ppo_fast", "csrc/**.h", "csrc/**.cpp", "csrc/**.cu")
    roots = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    assert files - made == sources | roots


def test_links_of_the_index_page_leave_the_repository() -> None:
    metadata = _metadata()
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    assert isinstance(page, str)
    assert page.startswith("# ppo_fast")
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert len(links) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    (picture,) = re.findall(r"!\[[^\]]*\]\((\S+quickstart.png)\)", prose)
    assert f"/raw/v{metadata['Version']}/docs/quickstart.png" in picture
    repository = next(url for url in metadata.get_all("Project-URL") if url.startswith("Repository, "))
    assert picture.startswith(repository.partition(", ")[2] + "/raw/")


def test_the_wheel_computes_natively(tmp_path: Path) -> None:
    python = _install(tmp_path, _only("*.whl"))
    assert f": {tmp_path}" in _run(python, SMOKE, "native")


def test_without_a_compiler_the_sdist_installs_as_pure_python(tmp_path: Path) -> None:
    python = _install(tmp_path, _only("*.tar.gz"), CXX="no-such-compiler", CC="no-such-compiler", PPO_FAST_CUDA="0")
    assert f": {tmp_path}" in _run(python, SMOKE, "torch")
    printed = _run(python.with_name("ppo-fast"), "doctor")
    reason = "the extension is not built: there is no C++ compiler: no-such-compiler is not on the PATH"
    assert reason in " ".join(printed.split())
