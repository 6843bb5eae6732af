"""Policy, reference and value model, in one of three layouts.

separate: three networks. shared: the value model is a head on the policy's own trunk. adapters: one frozen base with an
adapter each for policy and value model; the reference is the base alone, or a frozen adapter where the policy began
with an adapter or the reference moves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapters import (
    ADAPTER_CONFIG,
    REFERENCE,
    TRAINED,
    VALUE,
    Adapters,
    SavedAdapter,
    add_to_weights,
    read_adapter,
    same_base,
)
from .attention import use_attention
from .config import ModelConfig, ReferenceConfig, RewardConfig
from .errors import UserError, require
from .forward import accepted, backbone_of, head_values
from .integrity import copy_tensors, read_tensors
from .loading import (
    Loaded,
    checkpoint_activations,
    disable_dropout,
    load_network,
    load_policy,
    load_pretrained,
    load_reward_model,
    load_tokenizer,
    padding_id,
    read_stats,
    recomputing,
)
from .parking import Parked

Role = Literal["policy", "reference", "value"]
VALUE_FILE, VALUE_CONFIG = "value_model.safetensors", "value_config.json"
VALUE_DIRECTORY = "value"  # beside a policy's adapter: the value model's, with its head


class ValueModel(nn.Module):
    """A transformer backbone with a scalar head: values [B, L] float32 from token ids [B, L]."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head

    @classmethod
    def of(cls, classifier: Any) -> ValueModel:
        """The scores of a model for sequence classification with one output, at every token."""
        return cls(classifier.base_model, classifier.score)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "position_ids": positions}
        output = self.backbone(**accepted(self.backbone, inputs), use_cache=False)
        return head_values(self.head, output.last_hidden_state)


@dataclass(frozen=True)
class Models:
    """The networks of a run, on one device, dropout off in all of them."""

    policy: Any  # causal LM, trained
    reference: Any  # causal LM, frozen: the policy as it was at the start; the policy itself where adapters tell them
    value: ValueModel  # trained
    tokenizer: Any
    pad_id: int  # fills prompts on the left and responses after EOS; may equal eos_id
    eos_ids: tuple[int, ...]  # each ends a response; the tokenizer's EOS is the first
    linear: bool  # scoring and update use the linear ops; False: the policy's own logits
    packed: bool = False  # scoring and update take sequences packed into one row; False: padded
    shared: bool = False  # the value model is a head on the policy's trunk
    adapters: Adapters | None = None  # on one base, one for each role
    parked: Parked | None = None  # the reference, which waits in host memory
    merge: bool = False  # a saved model is the base with the adapters added to it

    @property
    def eos_id(self) -> int:
        """The tokenizer's EOS."""
        return self.eos_ids[0]

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @contextlib.contextmanager
    def using(self, role: Role) -> Iterator[Any]:
        """The network of that role, ready on the device; what it does and its backward pass belong in the block.

        Blocks nest. In the layout "adapters" a network is that of its role within its block alone; outside of all
        blocks it is the policy.
        """
        with contextlib.ExitStack() as stack:
            if self.adapters is not None:
                stack.enter_context(self.adapters.active(self._adapter(role)))
            if role == "reference" and self.parked is not None:
                stack.enter_context(self.parked.present())
            yield getattr(self, role)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Where backward passes recompute activations, if `model.checkpointing` asks for it: around the update."""
        with recomputing(self.policy, self.value):
            yield

    def weights(self, role: Role) -> list[nn.Parameter]:
        """What the network of a role has for itself; nothing where the reference is the base of adapters."""
        head = [*self.value.head.parameters()] if role == "value" else []
        if self.adapters is not None:
            name = self._adapter(role)
            return head + ([] if name is None else self.adapters.parameters(name))
        if role == "value" and self.shared:
            return head
        return [*getattr(self, role).parameters()]

    def trained(self, role: Role) -> list[nn.Parameter]:
        """What an optimizer step of "policy" or "value" changes."""
        return [parameter for parameter in self.weights(role) if parameter.requires_grad]

    def _adapter(self, role: Role) -> str | None:
        assert self.adapters is not None
        return {"policy": TRAINED, "value": VALUE, "reference": self.adapters.reference}[role]


def load_models(
    config: ModelConfig,
    generator: torch.Generator,
    *,
    policy: Any = None,
    tokenizer: Any = None,
    reward: RewardConfig = RewardConfig(),  # noqa: B008  # frozen
    reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008
) -> Models:
    """Load what `config` names, or wrap the policy and tokenizer given; the policy given is trained in place.

    The value model starts from `value_path`, or else from the first reward model where that has the policy's
    vocabulary; of adapters, where it is an adapter on the policy's base. That of the layout "shared" is a new head.
    """
    loaded = load_policy(config, generator, policy, tokenizer)
    policy, tokenizer, adapters = loaded.model, loaded.tokenizer, loaded.adapters
    if config.layout != "shared" and config.value_path is None and reward.models:
        config = dataclasses.replace(config, value_path=_critics_start(config, reward.models[0], loaded))
    value = make_value_model(config, loaded, generator, normalised=reward.normalise == "saved")
    if adapters is None:
        frozen = copy.deepcopy(policy).requires_grad_(False)
    elif loaded.saved is not None or reference.update != "fixed":
        adapters.copy(TRAINED, REFERENCE)
    return Models(
        policy=policy,
        reference=policy if adapters is not None else frozen,
        value=disable_dropout(value),
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        eos_ids=loaded.eos_ids,
        linear=config.logits == "linear",
        packed=config.batches == "packed",
        shared=config.layout == "shared",
        adapters=adapters,
        parked=Parked(frozen, generator.device) if config.park and adapters is None else None,
        merge=config.lora.merge,
    )


def _critics_start(config: ModelConfig, path: str, loaded: Loaded) -> str | None:
    """The path of a reward model if the value model can start from it."""
    fits = loaded.adapters is None or adapter_on(loaded.adapters.base, "reward.models", path) is not None
    own = load_tokenizer(path, config.trust_remote_code) if fits else None
    return path if own is not None and own.get_vocab() == loaded.tokenizer.get_vocab() else None


def adapter_on(base: str, field: str, path: str) -> SavedAdapter | None:
    """The adapter at `path`, or that of the value model which a run left there, if it is one on that base."""
    beside = str(Path(path) / VALUE_DIRECTORY)
    saved = read_adapter(field, beside if Path(beside, ADAPTER_CONFIG).is_file() else path)
    return saved if saved is not None and same_base(saved.base, base) else None


def make_value_model(
    config: ModelConfig, loaded: Loaded, generator: torch.Generator, *, normalised: bool = True
) -> ValueModel:
    """A backbone, as the layout has it, with the head at `value_path` if there is one, else with a new one.

    separate: a copy of the policy's backbone, or the model at `value_path`; adapters: the base with a new adapter or
    with that at `value_path`; shared: the policy's own trunk. A new head is N(0, 1/sqrt(D+1)) or zero; its bias is
    zero. That of a reward model gives its scores, `normalised` as PPO's reward has them: (score - mean) / std by the
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
        head = _head_like(scores, read_stats(str(config.value_path)) if normalised else (0.0, 1.0))
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
    if config.checkpointing:
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
