"""Inspect the model at a path. Only this module looks at a directory or hub id before weights are read."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, PretrainedConfig

from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.adapter_files import ADAPTER_CONFIG, SavedAdapter, find_adapter, same_base
from ppo_fast.rlhf.models.pretrained import load_pretrained

STATS = "reward_stats.json"  # in the directory of a reward model: mean and std of its scores, and how good they are
VALUE_FILE, VALUE_CONFIG = "value_model.safetensors", "value_config.json"  # in the directory of a policy
VALUE_DIRECTORY = "value"  # in the directory of a policy with adapters: the value model's adapter and its head
CLASSIFIER = "ForSequenceClassification"  # ends the name of an architecture
Kind = Literal["causal", "classifier", "value"]


@dataclass(frozen=True)
class SavedModel:
    """The model at a path. Each question about it is answered at its first use, and once."""

    field: str = "model.path"  # setting that names it, for errors
    path: str | None = None  # directory or hub id; None: the model was given as an object
    trust: bool = False  # `model.trust_remote_code`
    given: PretrainedConfig | None = None  # config of a network that is in memory already
    directory: str | None = None  # where the network is, if not at `path`
    whole_value: bool = False  # it is the whole value model that a run saved with its policy

    @functools.cached_property
    def value(self) -> SavedModel:
        """The value model that a run saved at `path`, whole or as an adapter; the model itself where there is none."""
        if self.path is None:
            return self
        if any(Path(self.path, name).is_file() for name in (VALUE_FILE, VALUE_CONFIG)):
            return dataclasses.replace(self, whole_value=True)
        directory = Path(self.path, VALUE_DIRECTORY)
        return dataclasses.replace(self, directory=str(directory)) if (directory / ADAPTER_CONFIG).is_file() else self

    @functools.cached_property
    def kind(self) -> Kind:
        """The network: "value" of a run, whole; "classifier"; "causal" stands for every other backbone too."""
        if self.whole_value:
            return "value"
        if self.adapter is not None:
            return "classifier" if self.adapter.has_head else "causal"
        return "classifier" if self.architecture.endswith(CLASSIFIER) else "causal"

    @functools.cached_property
    def adapter(self) -> SavedAdapter | None:
        """The LoRA adapter, None where there is none; UserError for an adapter of another kind."""
        return None if self.whole_value else find_adapter(self.field, self.directory or self.path)

    def adapter_on(self, base: str) -> SavedAdapter | None:
        """The adapter, if its base is that one."""
        return self.adapter if self.adapter is not None and same_base(self.adapter.base, base) else None

    @property
    def base(self) -> str | None:
        """Directory or hub id of the whole network: the base of an adapter."""
        return self.adapter.base if self.adapter is not None else self.directory or self.path

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The config of the whole network; UserError where it cannot be read."""
        if self.given is not None:
            return self.given
        path = str(Path(str(self.path), VALUE_CONFIG)) if self.whole_value else self.base
        if path is not None and Path(path).is_dir() and not Path(path, "config.json").is_file():
            # transformers 4 would go by the name of the directory.
            raise UserError(f"AutoConfig: cannot load directory {path!r}: it has no config.json")
        return load_pretrained(AutoConfig, path, self.trust)

    @property
    def architecture(self) -> str:
        """Name of the class that the network was saved from; empty where its config names none."""
        return str((self.config.architectures or [""])[0])

    @property
    def tokenizer(self) -> str | None:
        """Directory or hub id of the tokenizer: that of the base for an adapter that was saved without one."""
        config = Path(self.path or "", ADAPTER_CONFIG)
        if self.path is None or not config.is_file() or Path(self.path, "tokenizer_config.json").is_file():
            return self.path
        try:
            return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
        except (ValueError, KeyError):  # `adapter` raises the error
            return self.path

    @functools.cached_property
    def stats(self) -> tuple[float, float]:
        """Mean and standard deviation of a reward model's scores; 0 and 1 where none are saved."""
        path = Path(str(self.path), STATS)
        if not path.is_file():
            return 0.0, 1.0
        try:
            stats = json.loads(path.read_text(encoding="utf-8"))
            mean, std = float(stats["mean"]), float(stats["std"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}: expected {{"mean": number, "std": number}}, got {error!r}') from error
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise UserError(f"{path}: expected a finite mean and a std > 0, got {mean} and {std}")
        return mean, std


@dataclass(frozen=True)
class SavedModels:
    """The models that a run starts from."""

    policy: SavedModel
    value: SavedModel | None = None  # at `model.value_path`
    rewards: tuple[SavedModel, ...] = ()  # at `reward.models`


def find_models(
    config: ModelConfig, rewards: Sequence[str] = (), policy: PretrainedConfig | None = None
) -> SavedModels:
    """The models that a config names, one object for each path; `policy` is the config of a network in memory."""
    known: dict[str, SavedModel] = {}

    def find(field: str, path: str) -> SavedModel:
        return known.setdefault(path, SavedModel(field, path, config.trust_remote_code))

    value = None if config.value_path is None else find("model.value_path", config.value_path)
    found = tuple(find("reward.models", path) for path in rewards)
    own = SavedModel("model.path", config.path, config.trust_remote_code, policy)
    return SavedModels(own if policy is not None or config.path is None else known.get(config.path, own), value, found)
