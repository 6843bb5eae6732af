"""LoRA adapters on disk, as peft saves them. The config is checked first; the tensors are read when they are used."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import find_adapter_config_file

from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.files import check_local

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# LoRA initializations that leave the weights of the base unchanged; the others of peft change them as well.
SAFE_LORA_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Fields of peft's LoraConfig that leave a layer's output at x W + scaling (x A) B, or say nothing about it. Every other
# field must have peft's default: it changes what peft computes, or it is of a release that this one does not know.
PLAIN_FIELDS = frozenset(
    [
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "r"),
        *("alpha_pattern", "lora_alpha", "use_rslora", "lora_dropout", "fan_in_fan_out", "eva_config"),
    ]
)
HEAD = "base_model.model.score."  # what peft calls the head of a sequence classification model


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter on disk. Its tensors are read at the first use."""

    field: str  # setting that names it, for errors
    path: str  # directory or hub id
    config: LoraConfig
    has_head: bool  # a scalar head was saved with it

    @property
    def base(self) -> str:
        """Directory or hub id of the model that it adapts."""
        return str(self.config.base_model_name_or_path)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by peft's names."""
        return self._contents[0]

    @property
    def head(self) -> nn.Linear | None:
        """The float32 scalar head of a reward model or value model that was saved with it."""
        return self._contents[1]

    def read(self) -> SavedAdapter:
        """Read the tensors now. Raises UserError where they cannot be read, or where the head is missing."""
        assert self._contents
        return self

    @functools.cached_property
    def _contents(self) -> tuple[dict[str, Tensor], nn.Linear | None]:
        try:
            tensors = dict(load_peft_weights(self.path, device="cpu"))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise _unreadable(self.field, self.path, error) from error
        names = [name for name in tensors if name.startswith(HEAD)]
        head = {name.removeprefix(HEAD): tensors.pop(name) for name in names}
        check(bool(head) or not self.has_head, self.field, "the head 'score' of the adapter", self.path)
        return tensors, _linear(self.field, self.path, head)


def find_adapter(field: str, path: str | None) -> SavedAdapter | None:
    """The adapter at `path`; None where there is none.

    Raises UserError naming `field` for an adapter of another kind than plain LoRA.
    """
    if path is None:
        return None
    check_local(field, path)
    if (file := _config_file(path)) is None:
        return None
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        _check_plain(field, path, values, vars(LoraConfig()))
        config = PeftConfig.from_pretrained(path)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(field, path, error) from error
    check(bool(config.base_model_name_or_path), field, "an adapter that names its base model", path)
    has_head = "score" in (config.modules_to_save or ())
    config.modules_to_save = config.task_type = None  # else peft wraps the head and saves its own copy of it
    config.lora_dropout = 0.0  # peft would make new layers with dropout in train mode
    return SavedAdapter(field, path, config, has_head)


def same_base(a: str, b: str) -> bool:
    """Whether two names of a base mean one model."""
    if not (a and b):
        return False
    return Path(a).samefile(b) if Path(a).exists() and Path(b).exists() else a == b


def _config_file(path: str) -> str | None:
    """The config file of the adapter in a directory or at a hub id; None where there is none."""
    if Path(path).exists():
        return str(Path(path) / ADAPTER_CONFIG) if (Path(path) / ADAPTER_CONFIG).is_file() else None
    try:
        file: str | None = find_adapter_config_file(path)
    except (OSError, ValueError):
        return None
    return file


def _check_plain(field: str, path: str, values: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
    """Refuse by name what makes an adapter more than matrices A and B of layers, and a scalar head.

    Args:
        values: of the adapter's config as it is on disk; peft drops the names that it does not know.
        defaults: of peft's LoraConfig.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{field}: expected a LoRA adapter, got {kind} in {path!r}")
    for name in sorted(values.keys() - PLAIN_FIELDS):
        value, default = values[name], defaults.get(name)
        if name == "init_lora_weights":
            plain = value in SAFE_LORA_INITS
        elif name == "modules_to_save":
            plain = not {*(value or ())} - {"score", "classifier"}
        else:
            plain = value == default if name in defaults else not value
        if not plain:
            raise UserError(f"{field}: expected a LoRA adapter with {name} = {default!r}, got {value!r} in {path!r}")


def _linear(field: str, path: str, tensors: Mapping[str, Tensor]) -> nn.Linear | None:
    """The head of these weight [1, D] and bias [1]; None of none."""
    if not tensors:
        return None
    weight, bias = tensors.get("weight"), tensors.get("bias")
    known = tensors.keys() <= {"weight", "bias"} and (bias is None or bias.shape == (1,))
    if weight is None or weight.ndim != 2 or len(weight) != 1 or not known:
        raise UserError(f"{field}: expected a linear head 'score' with one output, got another in {path!r}")
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None, dtype=torch.float32, device="cpu")
    head.load_state_dict({name: value.float() for name, value in tensors.items()})
    return head


def _unreadable(field: str, path: str, error: Exception) -> UserError:
    return UserError(f"{field}: cannot read the adapter in {path!r}: {first_line(error)}")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
