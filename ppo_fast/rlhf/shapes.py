"""The models of a run by their configs alone, without weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import ModelConfig, PPOConfig
from .errors import UserError, require
from .forward import backbone_of
from .models import VALUE_CONFIG, Models, ValueModel, disable_dropout, load_pretrained


@dataclass(frozen=True)
class Shapes:
    """Configs of transformers."""

    policy: Any
    value: Any | None = None  # None: the policy's
    rewards: tuple[Any, ...] = ()


class Scoring(NamedTuple):
    """A reward model, and the block that it is on the device in."""

    network: ValueModel
    present: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Resident:
    """The networks of a run."""

    models: Models
    rewards: tuple[Scoring, ...]

    def items(self) -> dict[str | None, list[Tensor]]:
        """Tensors of weights by the item of the plan that they count as."""
        networks = [self.models.policy, self.models.reference, self.models.value, *(x.network for x in self.rewards)]
        return {"weights": [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]}


def read_shapes(config: PPOConfig, policy: Any = None) -> Shapes:
    """The config of every model that `config` names; `policy` is that of one that is there already."""
    if policy is None and config.model.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    policy = policy or _read(config.model.path, config)
    rewards = tuple(_read(path, config) for path in config.reward.models)
    start = config.model.value_path
    if start is not None:
        return Shapes(policy, _read(_value_shape(start), config), rewards)
    # As far as configs tell, the critic starts from the first reward model where that has the policy's vocabulary.
    alike = bool(rewards) and rewards[0].vocab_size == policy.vocab_size
    return Shapes(policy, rewards[0] if alike else None, rewards)


def _value_shape(path: str) -> str:
    own = Path(path) / VALUE_CONFIG
    return str(own) if own.is_file() else path


def _read(path: str | None, config: PPOConfig) -> Any:
    return load_pretrained(require("transformers").AutoConfig, path, config.model.trust_remote_code)


def make_resident(config: PPOConfig, shapes: Shapes) -> Resident:
    """The networks in their layout; under a FakeTensorMode they take no memory."""
    policy = _make("AutoModelForCausalLM", shapes.policy, config.model)
    shared = config.model.layout == "shared"
    backbone = backbone_of(policy) if shared else _make("AutoModel", shapes.value or shapes.policy, config.model)
    models = Models(
        policy=policy,
        reference=_make("AutoModelForCausalLM", shapes.policy, config.model).requires_grad_(False),
        value=ValueModel(backbone, nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float32)),
        tokenizer=None,
        pad_id=0,
        eos_id=0,
        linear=config.model.logits == "linear",
        packed=config.model.batches == "packed",
        shared=shared,
    )
    return Resident(models, tuple(_make_reward(shape, config.model) for shape in shapes.rewards))


def _make_reward(shape: Any, config: ModelConfig) -> Scoring:
    model = _make("AutoModelForSequenceClassification", shape, config).requires_grad_(False)
    return Scoring(ValueModel(model.base_model, model.score), contextlib.nullcontext)


def _make(kind: str, shape: Any, config: ModelConfig) -> Any:
    """A model of that config; made anew for each use, as tensors without data cannot be deep-copied."""
    factory, dtype = getattr(require("transformers"), kind), getattr(torch, config.dtype)
    trust = config.trust_remote_code
    return disable_dropout(factory.from_config(copy.deepcopy(shape), dtype=dtype, trust_remote_code=trust))
