"""The build: what it does without a compiler or a toolkit, and what nvcc says of the kernels."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# A compiler that leaves an empty file where its output should be.
TOUCH = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""
BROKEN_NVCC = """#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ TOP=/nowhere' ;;
  *--list-gpu-code*) echo sm_90 ;;
  *) echo 'internal error' >&2; exit 1 ;;
esac
"""


def _script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def _build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Runs build_ext into an empty folder; the process, and the package's folder there."""
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/tmp"]
    # An nvcc of this machine is found through CUDA_HOME only where a test names it.
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "PPO_FAST_CUDA", "PPO_FAST_CUDA_ARCHS")}
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, text=True, capture_output=True)
    return done, tmp_path / "lib" / "ppo_fast"


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_no_torch_header_is_included() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 5
    for path in sources:
        included = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10)/", name)], path


def test_without_a_cxx_compiler_the_package_is_pure_python_and_says_so(tmp_path: Path) -> None:
    done, package = _build(tmp_path, CXX="/bin/false", CC="/bin/false", PPO_FAST_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "ppo_fast is built WITHOUT its cpp part: the C++ compiler failed" in done.stderr
    assert not list(package.glob("*.so"))
    report = json.loads((package / "_build.json").read_text())
    assert report["cpp"].startswith("the C++ compiler failed")
    assert report["cuda"] == "switched off by PPO_FAST_CUDA=0"


def test_cuda_that_does_not_compile_is_left_out_loudly(tmp_path: Path) -> None:
    compiler = _script(tmp_path / "c++", TOUCH)
    (tmp_path / "bin").mkdir()
    _script(tmp_path / "bin" / "nvcc", BROKEN_NVCC)
    done, package = _build(tmp_path, CXX=compiler, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "ppo_fast is built WITHOUT its cuda part" in done.stderr
    assert "did not compile csrc/gae/cuda.cu" in done.stderr
    assert list(package.glob("_C.*.so"))
    report = json.loads((package / "_build.json").read_text())
    assert report["cpp"] is None
    assert "did not compile" in report["cuda"]

    done, _ = _build(tmp_path, CXX=compiler, CUDA_HOME=str(tmp_path), PPO_FAST_CUDA="1")
    assert done.returncode != 0
    assert "did not compile csrc/gae/cuda.cu" in done.stderr


def test_a_missing_toolkit_is_a_reason(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("PPO_FAST_CUDA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_py.CudaError, match=r"^nvcc is not on the PATH$"):
        setup_py.find_cuda()
    monkeypatch.setenv("CUDA_HOME", "")
    with pytest.raises(setup_py.CudaError, match=r"^nvcc is not on the PATH$"):
        setup_py.find_cuda()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup_py.CudaError, match=r"^there is no nvcc in .*/bin$"):
        setup_py.find_cuda()


def test_a_toolkit_that_knows_no_wanted_architecture_is_a_reason(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    _script(tmp_path / "bin" / "nvcc", BROKEN_NVCC)
    monkeypatch.delenv("PPO_FAST_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PPO_FAST_CUDA_ARCHS", "80;90")
    toolkit = setup_py.find_cuda()
    assert toolkit.archs == [90]
    monkeypatch.setenv("PPO_FAST_CUDA_ARCHS", "")
    assert setup_py.find_cuda().archs == [90]
    assert toolkit.gencode() == ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    monkeypatch.setenv("PPO_FAST_CUDA_ARCHS", "123")
    with pytest.raises(setup_py.CudaError, match=r"knows none of the architectures 123$"):
        setup_py.find_cuda()


def test_cuda_kernels_use_no_stack_and_do_not_spill(setup_py: ModuleType, tmp_path: Path) -> None:
    """Where there is no toolkit, the build must have a reason to leave CUDA out."""
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        with pytest.raises(setup_py.CudaError, match=r"^nvcc is not on the PATH$"):
            setup_py.find_cuda()
        return
    toolkit = setup_py.find_cuda()
    command = [toolkit.nvcc, *setup_py.NVCC_FLAGS, *toolkit.gencode(), "-Xptxas=-v", "-c", "csrc/gae/cuda.cu"]
    done = subprocess.run([*command, "-o", str(tmp_path / "gae.o")], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(usage) == 9 * len(toolkit.archs)  # every pair of three input dtypes
    assert set(usage) == {("0", "0", "0")}
