"""Builds the extension `ppo_fast._C` and the index's copy of the README; pyproject.toml holds the rest.

C++ is always compiled, CUDA where a toolkit is found. A part that does not compile is left out, loudly: without CUDA
the extension runs on CPUs, without a C++ compiler the package is pure Python. What was left out, and why, is written
to `ppo_fast/_build.json`, which `ppo-fast doctor` reads.

    PPO_FAST_CUDA=0         no CUDA; 1: CUDA that does not compile fails the build
    PPO_FAST_CUDA_ARCHS     instead of "80;90;100", each also filtered by what the toolkit knows

An empty variable is an unset one.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

CXX_FLAGS = [
    "-Icsrc",
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
NVCC_FLAGS = ["-Icsrc", "-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90;100"


@dataclass(frozen=True)
class Unit:
    """One compilation: a source file, its own flags, and a name where a file is compiled in variants."""

    source: str
    flags: tuple[str, ...] = ()
    variant: str = "base"


ISAS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ("-mavx2", "-mfma")
    # GCC warns of its own header: _mm512_undefined_ps is uninitialized on purpose.
    ISAS["avx512"] = (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    )
EXACT = "-ffp-contract=off"  # a * b + c is fused where the source says so, and nowhere else
CXX_UNITS = [
    *(Unit("csrc/cpu/rows/kernels.cpp", (EXACT, f"-DISA_NAMESPACE={isa}", *flags), isa) for isa, flags in ISAS.items()),
    Unit("csrc/gae/cpu.cpp", (EXACT,)),
    *(Unit(f"csrc/cpu/{name}.cpp") for name in ("rows/dispatch", "rows/ops", "parallel", "huge_pages")),
    *(Unit(f"csrc/bindings/{name}.cpp") for name in ("fields", "rows")),
]
BINDINGS = {
    False: Unit("csrc/bindings/module.cpp"),
    True: Unit("csrc/bindings/module.cpp", ("-DPPO_FAST_CUDA",), "cuda"),
}
CUDA_SOURCES = ["csrc/gae/cuda.cu"]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def index_readme() -> str:
    """README.md with links that work on a package index: to the files of this version in the repository."""
    repository = re.search(r'^Repository = "(.+)"$', Path("pyproject.toml").read_text(), re.MULTILINE)[1]
    version = re.search(r'^__version__ = "(.+)"$', Path("ppo_fast/_version.py").read_text(), re.MULTILINE)[1]

    def absolute(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        if not Path(target.partition("#")[0]).exists() or target.startswith("#"):
            return link[0]
        view = "raw" if target.endswith((".png", ".svg", ".gif")) else "blob"
        return f"{before}{repository}/{view}/v{version}/{target}{after}"

    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"""(\]\(|(?:src|href)=")([^)"\s]+)([)"])""", absolute, text)


class CudaError(Exception):
    """Why the CUDA part is not built, in a sentence."""


@dataclass(frozen=True)
class CudaToolkit:
    nvcc: str
    root: Path
    archs: list[int]

    def gencode(self) -> list[str]:
        """Machine code for every architecture, and PTX of the highest for those to come."""
        top = max(self.archs)
        pairs = [(arch, f"sm_{arch}") for arch in self.archs] + [(top, f"compute_{top}")]
        return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs]

    def link_args(self) -> list[str]:
        folders = [self.root / "lib64", self.root / "targets" / "x86_64-linux" / "lib"]
        return [
            *(f"-L{folder}" for folder in folders if folder.is_dir()),
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ]


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def find_cuda() -> CudaToolkit:
    """The toolkit of nvcc: from CUDA_HOME, else from the PATH, where nvcc may be a wrapper script."""
    if os.environ.get("PPO_FAST_CUDA") == "0":
        raise CudaError("switched off by PPO_FAST_CUDA=0")
    home = os.environ.get("CUDA_HOME") or None
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise CudaError("nvcc is not on the PATH" if home is None else f"there is no nvcc in {home}/bin")
    try:
        top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE)
        known = {int(arch) for arch in re.findall(r"^sm_(\d+)$", output_of(nvcc, "--list-gpu-code"), re.MULTILINE)}
    except (OSError, subprocess.CalledProcessError) as error:
        raise CudaError(f"{nvcc} does not run: {error}") from error
    wanted = os.environ.get("PPO_FAST_CUDA_ARCHS") or CUDA_ARCHS
    archs = sorted({int(arch) for arch in re.findall(r"\d+", wanted)} & known)
    if top is None or not archs:
        raise CudaError(f"{nvcc} knows none of the architectures {wanted}")
    return CudaToolkit(nvcc, Path(top[1]).resolve(), archs)


def outdated(target: Path, source: str) -> bool:
    inputs = [Path(name) for name in (source, *HEADERS, "setup.py")]
    return not target.exists() or target.stat().st_mtime <= max(path.stat().st_mtime for path in inputs)


class BuildExtension(build_ext):
    """Compiles each unit with its own flags, and only what is out of date."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # it would compile in a folder that is removed; a wheel of this tree links these objects
            self.build_temp = str(Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}"))

    def run(self) -> None:
        self.report: dict[str, object] = {"cpp": None, "cuda": None, "cuda_archs": []}
        super().run()
        target = Path(self.get_ext_fullpath("ppo_fast._C"))
        if self.report["cpp"] is not None:
            target.unlink(missing_ok=True)  # it is that of an earlier build
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name("_build.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        cuda_objects, link_args = self.build_cuda()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = self.compiler.compiler_so_cxx[0]
        if shutil.which(command) is None:
            self.leave_out("cpp", f"there is no C++ compiler: {command} is not on the PATH")
            self.report["cuda"] = self.report["cuda"] or "it needs the C++ part"
            return
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(self.compile_cxx, [*CXX_UNITS, BINDINGS[bool(cuda_objects)]]))
            self.compiler.link_shared_object(
                [*objects, *cuda_objects],
                str(target),
                extra_postargs=["-pthread", "-ldl", *link_args],
                target_lang="c++",
            )
        except (CCompilerError, OSError) as error:
            print(error, file=sys.stderr)
            self.leave_out("cpp", "the C++ compiler failed (`pip install -v` shows what it says)")
            self.report["cuda"] = self.report["cuda"] or "it needs the C++ part"

    def compile_cxx(self, unit: Unit) -> str:
        folder = Path(self.build_temp, f"pybind11-{pybind11.__version__}", unit.variant)
        target = (folder / unit.source).with_suffix(".o")
        if outdated(target, unit.source):
            flags = [f"-I{pybind11.get_include()}", *CXX_FLAGS, *unit.flags]
            self.compiler.compile([unit.source], str(folder), extra_postargs=flags)
        return str(target)

    def build_cuda(self) -> tuple[list[str], list[str]]:
        """The CUDA objects and what they are linked with; two empty lists when there is no CUDA part."""
        try:
            toolkit = find_cuda()
            objects = [self.compile_cuda(toolkit, source) for source in CUDA_SOURCES]
        except CudaError as error:
            if os.environ.get("PPO_FAST_CUDA") == "1":
                raise
            self.leave_out("cuda", str(error))
            return [], []
        self.report["cuda_archs"] = toolkit.archs
        return objects, toolkit.link_args()

    def compile_cuda(self, toolkit: CudaToolkit, source: str) -> str:
        target = Path(self.build_temp, "-".join(map(str, toolkit.archs)), source).with_suffix(".o")
        if outdated(target, source):
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [toolkit.nvcc, *NVCC_FLAGS, *toolkit.gencode(), "-c", source, "-o", str(target)]
            print(shlex.join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise CudaError(f"{toolkit.nvcc} did not compile {source}")
        return str(target)

    def leave_out(self, part: str, reason: str) -> None:
        self.report[part] = reason
        line = "*" * 100
        print(f"{line}\nppo_fast is built WITHOUT its {part} part: {reason}\n{line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("ppo_fast._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildExtension},
        long_description=index_readme(),
        long_description_content_type="text/markdown",
    )
