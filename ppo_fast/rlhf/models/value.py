"""Value model: a backbone with a scalar head, made new, from a reward model or from disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.integrity import copy_tensors, read_tensors
from ppo_fast.rlhf.models.adapters import (
    ADAPTER_CONFIG,
    TRAINED,
    VALUE,
    Adapters,
    SavedAdapter,
    add_to_weights,
    read_adapter,
    same_base,
)
from ppo_fast.rlhf.models.attention import use_attention
from ppo_fast.rlhf.models.forward import backbone_of, filter_kwargs, head_values
from ppo_fast.rlhf.models.loading import (
    Loaded,
    checkpoint_activations,
    load_network,
    load_pretrained,
)
from ppo_fast.rlhf.models.reward import load_reward_model, read_stats

VALUE_FILE, VALUE_CONFIG = "value_model.safetensors", "value_config.json"


VALUE_DIRECTORY = "value"  # beside a policy's adapter: the value model's, with its head


class ValueModel(nn.Module):
    """A transformer backbone with a scalar head: values [B, L] float32 from token ids [B, L]."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head

    @classmethod
    def from_classifier(cls, classifier: Any) -> ValueModel:
        """The scores of a model for sequence classification with one output, at every token."""
        return cls(classifier.base_model, classifier.score)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "position_ids": positions}
        output = self.backbone(**filter_kwargs(self.backbone, inputs), use_cache=False)
        return head_values(self.head, output.last_hidden_state)


def adapter_on(base: str, field: str, path: str) -> SavedAdapter | None:
    """The adapter at `path`, or that of the value model which a run left there, if it is one on that base."""
    beside = str(Path(path) / VALUE_DIRECTORY)
    saved = read_adapter(field, beside if Path(beside, ADAPTER_CONFIG).is_file() else path)
    return saved if saved is not None and same_base(saved.base, base) else None


def make_value_model(
    config: ModelConfig, loaded: Loaded, generator: torch.Generator, *, normalized: bool = True
) -> ValueModel:
    """A backbone, as the layout has it, with the head at `value_path` if there is one, else with a new one.

    separate: a copy of the policy's backbone, or the model at `value_path`; adapters: the base with a new adapter or
    with that at `value_path`; shared: the policy's own trunk. A new head is N(0, 1/sqrt(D+1)) or zero; its bias is
    zero. That of a reward model gives its scores, `normalized` as PPO's reward has them: (score - mean) / std by the
    `reward_stats.json` beside it. The head is float32.

    Raises UserError for a `value_path` that is no such model or knows fewer tokens than the policy.
    """
    if loaded.adapters is not None:
        backbone, scores = _adapted_backbone(config, loaded.adapters, generator)
    elif config.layout == "shared":
        backbone, scores = backbone_of(loaded.model), None
    else:
        backbone, scores = _own_backbone(config, loaded.model)
        backbone.requires_grad_(True)
    if scores is None:
        head = _new_head(config, backbone.config.hidden_size, generator)
    else:
        head = _head_like(scores, read_stats(str(config.value_path)) if normalized else (0.0, 1.0))
    return ValueModel(backbone, head.to(generator.device).requires_grad_(True))


def _adapted_backbone(
    config: ModelConfig, adapters: Adapters, generator: torch.Generator
) -> tuple[Any, nn.Linear | None]:
    """The base with an adapter "value": that at `value_path`, with its head, or a new one."""
    path = config.value_path
    saved = None if path is None else adapter_on(adapters.base, "model.value_path", path)
    if saved is not None:
        adapters.load(VALUE, saved, trained=True)
        return backbone_of(adapters.network), saved.head
    if path is not None:
        raise UserError(f"model.value_path: expected an adapter on {adapters.base!r}, the policy's base, got {path!r}")
    adapters.add(VALUE, adapters.config(TRAINED), trained=True)
    adapters.draw(VALUE, generator)
    return backbone_of(adapters.network), None


def _own_backbone(config: ModelConfig, policy: Any) -> tuple[Any, nn.Linear | None]:
    """A network apart from the policy."""
    if config.value_path is None:
        return copy.deepcopy(backbone_of(policy)), None
    backbone, scores = _load_backbone(config.value_path, policy.dtype, config.trust_remote_code)
    known, needed = (len(model.get_input_embeddings().weight) for model in (backbone, policy))
    if known < needed:
        raise UserError(f"model.value_path: expected a model of at least {needed} tokens, as the policy, got {known}")
    use_attention(backbone.to(policy.device), config)
    if config.gradient_checkpointing:
        checkpoint_activations(backbone)
    return backbone, scores


def _new_head(config: ModelConfig, width: int, generator: torch.Generator) -> nn.Linear:
    head = nn.Linear(width, 1, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        if config.value_head == "normal":
            shape, device = head.weight.shape, generator.device
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
            head.weight.copy_(noise / (width + 1) ** 0.5)
        else:
            head.weight.zero_()
        head.bias.zero_()
    return head


def _head_like(scores: nn.Linear, stats: tuple[float, float]) -> nn.Linear:
    """(score - mean) / std, float32."""
    head, (mean, std) = nn.Linear(scores.in_features, 1, dtype=torch.float32, device="cpu"), stats
    with torch.no_grad():
        head.weight.copy_(scores.weight).div_(std)
        head.bias.zero_()
        if scores.bias is not None:
            head.bias.copy_(scores.bias)
        head.bias.sub_(mean).div_(std)
    return head


def sequence_scores(model: ValueModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores [B] of a reward model at the last counted token of rows [B, L], padded on either side."""
    scores = model(input_ids, attention_mask)
    position = torch.arange(attention_mask.shape[1], dtype=torch.int64, device=attention_mask.device)
    last = torch.where(attention_mask, position, 0).argmax(dim=1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


def _load_backbone(path: str, dtype: torch.dtype, trust: bool) -> tuple[Any, nn.Linear | None]:
    """The backbone at `path`, with an adapter added to its weights, and its scalar head if it has one."""
    transformers, field = require("transformers"), "model.value_path"
    if (Path(path) / VALUE_FILE).is_file():
        return _load_saved_value(Path(path), dtype)
    beside = str(Path(path) / VALUE_DIRECTORY)
    path = beside if Path(beside, ADAPTER_CONFIG).is_file() else path
    found = load_reward_model(field, path, dtype, trust)
    if found is not None:
        model, saved = found
        if saved is not None:
            add_to_weights(model, saved)
        return model.base_model, model.score
    saved = read_adapter(field, path)
    if saved is None:
        return load_network(transformers.AutoModel, path, trust, dtype=dtype), None
    model = load_network(transformers.AutoModelForCausalLM, saved.base, trust, dtype=dtype)
    add_to_weights(model, saved)
    return model.base_model, None


def _load_saved_value(directory: Path, dtype: torch.dtype) -> tuple[Any, nn.Linear]:
    """The value model that a run left beside its policy."""
    shape = load_pretrained(require("transformers").AutoConfig, str(directory / VALUE_CONFIG))
    backbone = require("transformers").AutoModel.from_config(shape, dtype=dtype)
    saved = ValueModel(backbone, nn.Linear(shape.hidden_size, 1, dtype=torch.float32, device="cpu"))
    path = directory / VALUE_FILE
    copy_tensors(saved.state_dict(), read_tensors(path), str(path), dtypes=False)
    return saved.backbone, saved.head
