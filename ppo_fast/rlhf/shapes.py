"""The models of a run by their configs alone, without weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import ModelConfig, PPOConfig
from .errors import UserError, require
from .models import Models, ValueModel, disable_dropout, load_pretrained


@dataclass(frozen=True)
class Shapes:
    """Configs of transformers."""

    policy: Any
    value: Any  # None: the policy's backbone
    rewards: tuple[Any, ...]


def read_shapes(config: PPOConfig) -> Shapes:
    """The config of every model that `config` names."""
    if config.model.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    return Shapes(_read(config.model.path, config), None, ())


def _read(path: str, config: PPOConfig) -> Any:
    return load_pretrained(require("transformers").AutoConfig, path, config.model.trust_remote_code)


def make_models(config: PPOConfig, shapes: Shapes) -> Models:
    """The models in their layout, all weights on the device; under a FakeTensorMode they take no memory."""
    policy = _make("AutoModelForCausalLM", shapes.policy, config.model)
    backbone = _make("AutoModel", shapes.value or shapes.policy, config.model)
    head = nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float32)
    return Models(
        policy=policy,
        reference=_make("AutoModelForCausalLM", shapes.policy, config.model).requires_grad_(False),
        value=ValueModel(backbone, head),
        tokenizer=None,
        pad_id=0,
        eos_id=0,
        linear=config.model.logits == "linear",
        packed=config.model.batches == "packed",
    )


def _make(kind: str, shape: Any, config: ModelConfig) -> Any:
    """A model of that config; made anew, as tensors without data cannot be deep-copied."""
    factory, dtype = getattr(require("transformers"), kind), getattr(torch, config.dtype)
    trust = config.trust_remote_code
    return disable_dropout(factory.from_config(copy.deepcopy(shape), dtype=dtype, trust_remote_code=trust))
