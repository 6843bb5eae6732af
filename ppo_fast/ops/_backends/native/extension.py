"""Load the extension, or say why it is missing.

Launchers take checked tensors of one device. They allocate and launch, and check nothing.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

_REPORT = Path(__file__).parents[3] / "_build.json"


def _build_report() -> dict[str, Any]:
    """Read what was left out, and why: ``{"cpp": reason or None, "cuda": reason or None, "cuda_archs": [...]}``."""
    return json.loads(_REPORT.read_text()) if _REPORT.exists() else {}


def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("ppo_fast._C"), None
    except ImportError as error:
        return None, f"the extension is not built: {_build_report().get('cpp') or error}"


def _cuda_obstacle() -> str | None:
    if load_error is not None:
        return load_error
    if not extension.has_cuda:
        return f"the extension is built without CUDA: {_build_report().get('cuda') or 'unknown reason'}"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    # Asks NVML, where the driver has it: initializing CUDA at import would break processes that fork afterwards.
    return None if torch.cuda.device_count() else "no CUDA device is visible"


extension, load_error = _load()
cuda_error = _cuda_obstacle()
