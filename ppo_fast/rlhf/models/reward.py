"""Reward models from disk: a sequence classification model with one output, and its score statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.models.adapters import SavedAdapter, read_adapter
from ppo_fast.rlhf.models.loading import (
    disable_dropout,
    load_network,
    load_pretrained,
)

STATS = "reward_stats.json"  # beside a reward model: mean and std of its scores, and how good they are


def load_reward_model(
    field: str, path: str, dtype: torch.dtype, trust: bool = False
) -> tuple[Any, SavedAdapter | None] | None:
    """The sequence classification model at `path`, None when there is another kind of model.

    Of a PEFT directory it is the base with the head of the adapter, which is not on it yet.
    Raises UserError naming `field` unless it has a linear head "score" with one output.
    """
    transformers, saved = require("transformers"), read_adapter(field, path)
    if saved is not None:
        return None if saved.head is None else (_load_classifier_base(saved, dtype, trust), saved)
    architectures = load_pretrained(transformers.AutoConfig, path, trust).architectures or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        return None
    model = load_network(transformers.AutoModelForSequenceClassification, path, trust, dtype=dtype)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(f"{field}: expected a linear head 'score' with one output, got {head} in {path!r}")
    return model, None


def _load_classifier_base(saved: SavedAdapter, dtype: torch.dtype, trust: bool) -> Any:
    """The base of a reward model's adapter as a model for sequence classification, with the head saved."""
    logging, loader = require("transformers.utils.logging"), require("transformers").AutoModelForSequenceClassification
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base has no such head
    try:
        with torch.random.fork_rng(devices=[]):
            model = load_network(loader, saved.base, trust, new="score.", dtype=dtype, num_labels=1)
    finally:
        logging.set_verbosity(verbosity)
    model.score = saved.head
    return model


def read_stats(directory: str) -> tuple[float, float]:
    """Mean and standard deviation of a model's scores; 0 and 1 where none are saved."""
    path = Path(directory) / STATS
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


def add_score_head(causal: Any, tokenizer: Any, generator: torch.Generator) -> Any:
    """The backbone of a causal LM, in place, under a new head N(0, 1/sqrt(D+1)) without bias.

    The saved model itself scores the last token that is not padding, so that a padding token that is EOS as well
    would hide the EOS from it: then the config names none, and the model refuses batches rather than misread them.
    """
    config = causal.config
    config.num_labels = 1
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            model = require("transformers").AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        known = "an architecture that transformers has a sequence classifier of"
        raise UserError(f"model.path: expected {known}, got {type(config).__name__}") from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"model.path: expected an architecture with a linear head 'score', got {type(model).__name__}")
    setattr(model, model.base_model_prefix, causal.base_model)
    shape, device = (1, config.hidden_size), generator.device
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    model.score = nn.Linear(config.hidden_size, 1, bias=False, device=device, dtype=causal.dtype)
    with torch.no_grad():
        model.score.weight.copy_(weight / (config.hidden_size + 1) ** 0.5)
    return disable_dropout(model)
