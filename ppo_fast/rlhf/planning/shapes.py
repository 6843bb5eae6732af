"""The networks of a run from the configs of its models, without weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ppo_fast.rlhf.config.ppo import ModelConfig, PPOConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.adapter_files import SavedAdapter
from ppo_fast.rlhf.models.loading import Loaded, disable_dropout, with_adapters
from ppo_fast.rlhf.models.models import Models, build_models, critic_start, make_value_model
from ppo_fast.rlhf.models.networks import EmptyNetworks, Networks, empty_head
from ppo_fast.rlhf.models.offload import Offloaded
from ppo_fast.rlhf.models.pretrained import Loader
from ppo_fast.rlhf.models.reward import RewardNetwork, make_reward_network
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels, find_models
from ppo_fast.rlhf.planning.fakes import attention, quantize

Name = Callable[[str | None, Iterable[Tensor]], None]  # says what tensors count as; None: they are in host memory
TOKENIZER: Any = SimpleNamespace(eos_token_id=0, pad_token_id=0)  # a plan reads none


class LoadedModels(NamedTuple):
    """The networks of a run."""

    models: Models
    rewards: tuple[RewardNetwork, ...]


def read_shapes(config: PPOConfig, policy: PretrainedConfig | None = None) -> SavedModels:
    """The models that `config` names, their configs read; `policy` is the config of a policy in memory."""
    if policy is None and config.model.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    saved = find_models(config.model, config.reward.models, policy)
    for each in (saved.policy, *saved.rewards, *([] if saved.value is None else [saved.value.value])):
        assert each.config is not None
    return saved


class NetworksWithoutData(EmptyNetworks):
    """Makes the networks of a plan, whose configs are all that there is."""

    def __init__(self, config: ModelConfig, device: str, name: Name = lambda item, tensors: None) -> None:
        super().__init__(config, torch.device("meta"))
        self.name = name
        self.attention = attention(config, device)

    def make(
        self,
        loader: Loader,
        saved: SavedModel,
        dtype: torch.dtype | None = None,
        *,
        quantized: bool = False,
        **options: object,
    ) -> PreTrainedModel:
        kind = {} if self.attention is None else {"attn_implementation": self.attention}
        network = disable_dropout(self.build(loader, saved, dtype, **options, **kind))
        if quantized:
            quantize(network)
        return network

    def read(self, adapter: SavedAdapter) -> None:
        pass

    def head(self, adapter: SavedAdapter, network: PreTrainedModel) -> nn.Linear | None:
        return empty_head(network) if adapter.has_head else None

    def place(self, network: PreTrainedModel) -> None:
        pass

    def to_host(self, x: Tensor) -> Tensor:
        host = super().to_host(x)
        self.name(None, [host])
        return host


def count_weights(policy: SavedModel, config: ModelConfig) -> int:
    """Bytes of the weights of a causal LM, without its adapter."""
    with torch.device("meta"):
        model = NetworksWithoutData(config, "meta").make(AutoModelForCausalLM, policy)
    return sum(weight.nbytes for weight in model.parameters())


def load_models_without_data(
    config: PPOConfig, saved: SavedModels, device: str, name: Name, gpus: int = 1
) -> LoadedModels:
    """The networks in their layout, of tensors without data; to be called under a FakeTensorMode.

    Split over several `gpus`, an offloaded network is never whole on the device.
    """
    networks, offload = NetworksWithoutData(config.model, device, name), config.model.offload and gpus == 1
    idle = None if config.model.offload and gpus > 1 else "weights"
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
        models = _make_models(config, networks, saved)
        if models.adapters is not None and config.optim.master_weights is False:
            models.adapters.drop_masters()
        rewards = [make_reward_network(each, networks, models.adapters) for each in saved.rewards]
        # The head of an adapter on the policy's base is not counted: a reward model's is that of the value model.
        if models.value is not None:
            rewards = [each._replace(network=models.value) if each.shared else each for each in rewards]
    adapters = models.adapters
    if adapters is not None:
        own = [parameter for each in adapters.trained for parameter in adapters.parameters(each)]
        head = [] if models.value is None else [*models.value.head.parameters()]
        _materialize([*own, *head], "adapters", name)
        dtype, copies = models.policy.dtype, (copy for each in adapters.copies.values() for copy in each)
        name("adapters", [copy.get(dtype) for copy in copies if copy.parameter.dtype != dtype])
    offloaded = _offload(models.reference, name) if offload and adapters is None else None
    if adapters is None:
        _materialize(_tensors(models.reference), idle, name)
    for network in filter(None, (models.policy, models.reference, models.value)):
        _materialize(_tensors(network), "weights", name)
    apart = [_offload(reward.network, name) if offload and not reward.shared else None for reward in rewards]
    for reward in rewards:
        _materialize(_tensors(reward.network), "weights" if reward.shared else idle, name)
    placed = [
        reward if waiting is None else reward._replace(present=waiting.present)
        for reward, waiting in zip(rewards, apart, strict=True)
    ]
    return LoadedModels(dataclasses.replace(models, offloaded=offloaded), tuple(placed))


def _make_models(config: PPOConfig, networks: Networks, saved: SavedModels) -> Models:
    """`load_models`, but a vocabulary is known by its size only."""
    model, generator, adapter = config.model, torch.Generator(), None
    if model.lora.rank:  # else it is added to the weights
        adapter = saved.policy.adapter
    loaded = Loaded(networks.causal(saved.policy), TOKENIZER, adapter, eos_ids=(0,))
    loaded = with_adapters(loaded, model, generator)
    size = saved.policy.config.vocab_size
    start = critic_start(model, saved, loaded.adapters, lambda reward: reward.config.vocab_size == size)
    critic = config.advantage.critic
    value = make_value_model(model, networks, loaded, start, generator, normalized=False) if critic else None
    models = build_models(model, loaded, value, config.reference)
    if model.offload_activations:
        models.offload_activations(networks.to_host)
    return models


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
    def present(self) -> Iterator[nn.Module]:
        with super().present() as network:
            self.name("weights", _tensors(self.network))
            yield network
