"""The networks of a run by the configs of its models alone, without weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.config.ppo import ModelConfig, PPOConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.models.adapters import (
    ADAPTER_CONFIG,
    REFERENCE,
    TRAINED,
    VALUE,
    Adapters,
    adapt,
    read_config,
    same_base,
)
from ppo_fast.rlhf.models.forward import backbone_of
from ppo_fast.rlhf.models.loading import checkpoint_activations, disable_dropout, load_pretrained
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.models.offload import Offloaded
from ppo_fast.rlhf.models.value import VALUE_CONFIG, VALUE_DIRECTORY, ValueModel
from ppo_fast.rlhf.planning.fakes import attention, quantize

Make = Callable[[str, "Shape"], Any]  # a model of that class
Name = Callable[[str | None, Iterable[Tensor]], None]  # says what tensors count as; None: they are in host memory


@dataclass(frozen=True)
class Shape:
    """A model: its config of transformers, and that of the adapter on it."""

    config: Any
    adapter: Any | None = None  # peft.LoraConfig
    shared: bool = False  # the adapter is on the policy's base


@dataclass(frozen=True)
class Shapes:
    """The models that a run loads."""

    policy: Shape
    value: Shape | None = None  # None: the policy's
    rewards: tuple[Shape, ...] = ()


class RewardNetwork(NamedTuple):
    """A reward model, and the block that it is itself in, on the device."""

    network: ValueModel
    present: Callable[[], AbstractContextManager[Any]]
    adapter: bool = False  # on the policy's base


class LoadedModels(NamedTuple):
    """The networks of a run."""

    models: Models
    rewards: tuple[RewardNetwork, ...]


def read_shapes(config: PPOConfig, policy: Any = None) -> Shapes:
    """The configs of every model that `config` names; `policy` is that of one that is there already."""
    if policy is None and config.model.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    field = "model.path"
    own = (
        _read(field, config.model.path, config)
        if policy is None
        else Shape(policy, read_config(field, config.model.path))
    )
    base = config.model.path if own.adapter is None else str(own.adapter.base_model_name_or_path)
    rewards = tuple(_read("reward.models", path, config, base) for path in config.reward.models)
    start = config.model.value_path
    if start is not None:
        return Shapes(own, _read("model.value_path", _value_directory(start), config), rewards)
    # As far as configs tell, the critic starts from the first reward model where that has the policy's vocabulary.
    split_by_length = bool(rewards) and rewards[0].config.vocab_size == own.config.vocab_size
    return Shapes(own, rewards[0] if split_by_length else None, rewards)


def _value_directory(path: str) -> str:
    beside = Path(path) / VALUE_DIRECTORY
    own = Path(path) / VALUE_CONFIG
    return str(own) if own.is_file() else str(beside) if (beside / ADAPTER_CONFIG).is_file() else path


def _read(field: str, path: str | None, config: PPOConfig, base: str | None = None) -> Shape:
    """Of a PEFT directory the config of its base, beside its own; `base` is that of the policy."""
    adapter = read_config(field, path)
    path = path if adapter is None else str(adapter.base_model_name_or_path)
    if path is not None and Path(path).is_dir() and not Path(path, "config.json").is_file():
        # transformers 4 would go by the name of the directory.
        raise UserError(f"AutoConfig: cannot load directory {path!r}: it has no config.json")
    shape = load_pretrained(require("transformers").AutoConfig, path, config.model.trust_remote_code)
    return Shape(shape, adapter, adapter is not None and base is not None and same_base(str(path), base))


def count_weights(shape: Shape, config: ModelConfig) -> int:
    """Bytes of the weights of a causal LM, without its adapter."""
    with torch.device("meta"):
        model = _make("AutoModelForCausalLM", shape, config=config, attention=None)
    return sum(weight.nbytes for weight in model.parameters())


def load_models_without_data(config: PPOConfig, shapes: Shapes, device: str, name: Name) -> LoadedModels:
    """The networks in their layout, of tensors without data: to be called under a FakeTensorMode."""
    make = functools.partial(_make, config=config.model, attention=attention(config.model, device))
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
        models = _make_models(config, shapes, make)
        rewards = [_make_scoring(shape, models, make) for shape in shapes.rewards]
    adapters = models.adapters
    if adapters is not None:
        own = [parameter for each in adapters.trained for parameter in adapters.parameters(each)]
        _materialize([*own, *models.value.head.parameters()], "adapters", name)
    offloaded = None
    if config.model.offload and adapters is None:
        offloaded = _offload(models.reference, name)
    for network in (models.policy, models.reference, models.value):
        _materialize(_tensors(network), "weights", name)
    apart = [
        _offload(reward.network, name) if config.model.offload and not reward.adapter else None for reward in rewards
    ]
    for reward in rewards:
        _materialize(_tensors(reward.network), "weights", name)
    presences = [
        reward if offload is None else reward._replace(present=offload.present)
        for reward, offload in zip(rewards, apart, strict=True)
    ]
    return LoadedModels(dataclasses.replace(models, offloaded=offloaded), tuple(presences))


def _make_models(config: PPOConfig, shapes: Shapes, make: Make) -> Models:
    model, adapters = config.model, None
    policy = make("AutoModelForCausalLM", shapes.policy)
    if model.load_in_4bit:
        quantize(policy)
    if model.lora.rank:
        moving = shapes.policy.adapter is not None or config.reference.update != "fixed"
        adapters = _make_adapters(policy, model, moving=moving)
    together = adapters is not None or model.layout == "shared"
    backbone = backbone_of(policy) if together else make("AutoModel", shapes.value or shapes.policy)
    if model.gradient_checkpointing:
        checkpoint_activations(policy)
        checkpoint_activations(backbone)
    return Models(
        policy=policy,
        reference=policy if adapters else make("AutoModelForCausalLM", shapes.policy).requires_grad_(False),
        value=ValueModel(backbone, nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float32, device="meta")),
        tokenizer=None,
        pad_id=0,
        eos_ids=(0,),
        linear=model.fused_head,
        packed=model.packing,
        shared=model.layout == "shared",
        adapters=adapters,
    )


def _make_adapters(policy: Any, config: ModelConfig, *, moving: bool) -> Adapters:
    # There is nothing to draw, and a generator of another device is refused.
    adapters = adapt(policy, config.lora, None, None)  # type: ignore[arg-type]
    adapters.add(VALUE, adapters.config(TRAINED), trained=True)
    if moving:
        adapters.copy(TRAINED, REFERENCE)
    return adapters


def _make_scoring(shape: Shape, models: Models, make: Make) -> RewardNetwork:
    """A reward model, on a base of its own or on the policy's."""
    adapters = models.adapters
    if adapters is not None and shape.shared:
        name = f"reward-{len(adapters.trained)}"
        adapters.add(name, shape.adapter, trained=False)
        return RewardNetwork(models.value, functools.partial(adapters.active, name), adapter=True)
    model = make("AutoModelForSequenceClassification", shape).requires_grad_(False)
    return RewardNetwork(ValueModel(model.base_model, model.score), contextlib.nullcontext)


def _make(kind: str, shape: Shape, *, config: ModelConfig, attention: str | None) -> Any:
    factory, copied = getattr(require("transformers"), kind), copy.deepcopy(shape.config)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    options |= {} if attention is None else {"attn_implementation": attention}
    return disable_dropout(factory.from_config(copied, **options))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _materialize(tensors: Iterable[Tensor], item: str | None, name: Name) -> None:
    """Give tensors on "meta" a storage that is counted as `item`; they stay the objects they are."""
    for tensor in tensors:
        if tensor.device.type == "meta":
            trained = tensor.requires_grad
            made: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=trained)
            # What nn.Parameter(made) would be, whose detour over a view leaves a weak reference that forbids the swap.
            made._is_param = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, made)
            name(item, [tensor])


def _offload(network: nn.Module, name: Name) -> Offloaded:
    _materialize(_tensors(network), None, name)
    return _NamedOffloaded(network, name)


class _NamedOffloaded(Offloaded):
    """Its copies on the device count as weights."""

    def __init__(self, network: nn.Module, name: Name) -> None:
        super().__init__(network, torch.device("cpu"))
        self.name = name

    @contextlib.contextmanager
    def present(self) -> Iterator[Any]:
        with super().present() as network:
            self.name("weights", _tensors(self.network))
            yield network
