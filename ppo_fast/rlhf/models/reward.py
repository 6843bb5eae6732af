"""Reward models: a sequence classification model with one output, or an adapter with its head on the policy's base."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.adapters import Adapters, put_on
from ppo_fast.rlhf.models.forward import backbone_of
from ppo_fast.rlhf.models.loading import disable_dropout
from ppo_fast.rlhf.models.networks import Networks
from ppo_fast.rlhf.models.saved import SavedModel
from ppo_fast.rlhf.models.value import ValueModel


class RewardNetwork(NamedTuple):
    """A reward model, and the block in which the network computes its scores."""

    network: ValueModel
    present: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    shared: bool = False  # it is an adapter on the policy's base


def make_reward_network(saved: SavedModel, networks: Networks, adapters: Adapters | None) -> RewardNetwork:
    """An adapter on the policy's base, if that is its base too; else a frozen network of its own, not placed yet."""
    own = None if adapters is None else saved.value.adapter_on(adapters.base)
    head = None if adapters is None or own is None else networks.head(own, adapters.network)
    if adapters is not None and own is not None and head is not None:
        name = f"reward-{sum(each.startswith('reward-') for each in adapters.trained)}"
        adapters.load(name, own, trained=False)
        head = head.to(networks.device).requires_grad_(False)
        scorer = ValueModel(backbone_of(adapters.network), head)
        return RewardNetwork(scorer, functools.partial(adapters.active, name), shared=True)
    model = networks.classifier(saved)
    if model is None:
        path = saved.path
        raise UserError(f"reward.models: expected a model for sequence classification, got another in {path!r}")
    if saved.adapter is not None:
        put_on(model, saved.adapter)
    return RewardNetwork(ValueModel.from_classifier(disable_dropout(model).requires_grad_(False)))


def add_score_head(
    causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> PreTrainedModel:
    """The backbone of a causal LM, in place, under a new head N(0, 1/sqrt(D+1)) without bias.

    The saved model itself scores the last token that is not padding, so that a padding token that is EOS as well
    would hide the EOS from it: then the config names none, and the model refuses batches rather than misread them.
    """
    config = causal.config
    config.num_labels = 1
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
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
