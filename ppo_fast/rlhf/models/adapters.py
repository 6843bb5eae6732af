"""Low-rank adapters on one frozen base, by the library peft: made, filled, switched on and off, merged.

A network with adapters is the base's own module, whose linear layers have become layers with adapters. What such a
layer computes depends on which adapter is on. The adapter that is trained on the base is peft's "default". It is on
unless `Adapters.active` says otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppo_fast.rlhf.config.model import LoraConfig
from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.models.adapter_files import HEAD, SavedAdapter, first_line
from ppo_fast.rlhf.models.adapter_layers import AdapterLayer, RoundedCopy, refresh, use_fast_forward
from ppo_fast.rlhf.split import whole
from ppo_fast.rlhf.world import current

TRAINED, VALUE, REFERENCE = "default", "value", "reference"  # names of adapters


class Adapters:
    """Adapters by name on one frozen base. At most one of them is on at a time."""

    def __init__(self, network: PreTrainedModel, config: peft.LoraConfig) -> None:
        self.network = network  # the base, with layers for adapters in it
        self.trained: dict[str, bool] = {}  # whether an adapter is, by name
        self.copies: dict[str, list[RoundedCopy]] = {}  # what the layers multiply by on a base of 16 bits, by name
        with self._making():
            self.model = peft.get_peft_model(network, config, adapter_name=TRAINED)
        self._now: str | None = TRAINED
        self._settle(TRAINED, trained=True)

    @property
    def base(self) -> str:
        """Directory or hub id that the base was loaded from; empty for a model given as an object."""
        return str(getattr(self.network, "name_or_path", ""))

    @property
    def without_data(self) -> bool:
        """Whether the network is on the meta device, as in a plan, or until rank 0 sends the weights."""
        return any(parameter.is_meta for parameter in self.network.parameters())

    @property
    def reference(self) -> str | None:
        """Name of the adapter of the reference; None: the reference is the base."""
        return REFERENCE if REFERENCE in self.trained else None

    def add(self, name: str, config: peft.LoraConfig, *, trained: bool) -> None:
        """Add an adapter. `draw`, `fill` or `copy` gives it values."""
        with self._making():
            self.model.add_adapter(name, copy.deepcopy(config))
        self._settle(name, trained=trained)

    @torch.no_grad()
    def draw(self, name: str, generator: torch.Generator) -> None:
        """Initialize an adapter: A uniform in +-1 / sqrt(inputs), as torch initializes a linear layer; B = 0."""
        if self.without_data and current().mesh is None:  # a plan has no numbers
            return
        for parameter_name, parameter in self.named(name).items():
            if ".lora_A." in parameter_name:
                # On the generator's device, and on ranks without data as well: generators stay in step.
                noise = torch.empty_like(parameter, device=generator.device)
                parameter.copy_(nn.init.kaiming_uniform_(noise, a=5**0.5, generator=generator))
            else:
                parameter.zero_()

    @torch.no_grad()
    def fill(self, name: str, tensors: Mapping[str, Tensor], source: str) -> None:
        """Set the values by peft's names; UserError naming their `source` when they belong to other layers."""
        for layer in () if is_quantized(self.network) else self._adapted(name).values():
            base = layer.get_base_layer()
            linear = isinstance(base, nn.Linear | Conv1D)
            check(linear, source, "an adapter of linear layers", type(base).__name__)
        own = self.named(name)
        for key in [*(own.keys() ^ tensors.keys())][:1]:
            raise UserError(f"{source}: expected the adapter of the base's layers, got another at {key!r}")
        for key, parameter in own.items():
            if parameter.shape != tensors[key].shape:
                shapes = f"{[*parameter.shape]}, got {[*tensors[key].shape]}"
                raise UserError(f"{source}: expected {key!r} to have the shape {shapes}")
            parameter.copy_(tensors[key])

    def load(self, name: str, saved: SavedAdapter, *, trained: bool) -> None:
        """Add an adapter from disk."""
        with _errors_of_peft(saved):
            self.add(name, saved.config, trained=trained)
        self.fill_from(name, saved)

    def fill_from(self, name: str, saved: SavedAdapter) -> None:
        """`fill` from disk; nothing is read for a network without data."""
        if not self.without_data:
            self.fill(name, saved.tensors, saved.path)

    def copy(self, source: str, name: str) -> None:
        """Add a frozen copy of an adapter."""
        self.add(name, self.config(source), trained=False)
        self.fill(name, self.named(source), source)

    def config(self, name: str) -> peft.LoraConfig:
        """peft's config of an adapter."""
        return self.model.peft_config[name]

    def saved_as(self, name: str, head: nn.Linear | None = None) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
        """The config and the tensors that `SavedAdapter` reads, with those of a scalar head.

        A head makes it an adapter for sequence classification to peft and transformers, else it is one of a causal LM.
        """
        config, tensors = copy.copy(self.config(name)), {key: value.detach() for key, value in self.named(name).items()}
        config.inference_mode, config.task_type = True, "CAUSAL_LM" if head is None else "SEQ_CLS"
        if not isinstance(config.target_modules, str):  # a pattern
            config.target_modules = sorted(config.target_modules)  # of a set, which has no order of its own
        if Path(self.base).is_dir():  # peft keeps it as it was given, which means nothing in another directory
            config.base_model_name_or_path = str(Path(self.base).absolute())
        if head is not None:
            config.modules_to_save = ["score"]
            tensors |= {f"{HEAD}{key}": value for key, value in head.state_dict().items()}
        return config, tensors

    def named(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by the names that peft saves them under."""
        # Searched by hand: peft takes every name that holds the adapter's, such as that of a layer "value".
        ending = re.compile(rf"(\.lora_\w+)\.{re.escape(name)}(?=\.|$)")
        named = self.model.named_parameters()
        return {ending.sub(r"\1", key): parameter for key, parameter in named if ending.search(key)}

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [*self.named(name).values()]

    def drop_masters(self) -> None:
        """Keep the trained adapters in the dtype of the base: 16-bit weights take the steps."""
        for name in (name for name, trained in self.trained.items() if trained):
            for parameter in self.parameters(name):
                parameter.data = parameter.data.to(self.network.dtype)
            for rounded in self.copies[name]:
                rounded.value = None

    def forget_copies(self) -> None:
        """Drop the rounded copies, which keep whole factors alive: split ones are rounded where they are used."""
        self.copies.clear()
        for layer in self._layers:
            if isinstance(layer, AdapterLayer):
                layer.copies = {}

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Turn on that adapter within the block, or none, which leaves the base.

        The adapter of before is on again afterwards, also after an error. Blocks nest.
        """
        before = self._now
        try:
            self._switch(name)
            yield
        finally:
            self._switch(before)

    def merged_state(self, network: PreTrainedModel) -> dict[str, Tensor]:
        """The state dict of `network` with W + alpha / rank * B A, rounded once, for every W that has an adapter."""
        # Sums in host memory: the device may not hold two copies of a base. Only rank 0 saves them.
        return dict(merged_weights(network, TRAINED, device=torch.device("cpu"), keep=current().is_main))

    def check_mergeable(self, source: str) -> None:
        """Raise UserError naming `source` where a sum of weights would change more than the adapter does."""
        check(
            not is_quantized(self.network), source, "an adapter on a base that is not quantized, to merge it", self.base
        )
        owners = Counter(id(weight) for layer in self.network.modules() for weight in layer.parameters(recurse=False))
        for name, layer in self._adapted(TRAINED).items():
            apart = owners[id(layer.get_base_layer().weight)] == 1
            check(apart, source, "an adapter of layers that share no weight, to merge it", name)

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """The block makes an adapter, without data where the network has none."""
        # peft draws from the global generator what `draw` and `fill` replace.
        with torch.random.fork_rng(devices=[]), torch.device("meta") if self.without_data else contextlib.nullcontext():
            yield

    def _adapted(self, name: str) -> dict[str, LoraLayer]:
        return adapted_layers(self.network, name)

    def _settle(self, name: str, *, trained: bool) -> None:
        """Restore what peft changes in all adapters when it adds one."""
        self.trained[name] = trained
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        self.copies[name] = [copy for layer in self._layers for copy in use_fast_forward(layer, name)]
        self._switch(self._now)
        for each, flag in self.trained.items():
            for parameter in self.parameters(each):
                parameter.requires_grad_(flag)

    def _switch(self, name: str | None) -> None:
        # peft's own `set_adapter` and `enable_adapters` change which adapters require gradients as well, and take 11 ms
        # for the 196 layers of a 7B instead of 1: too much for a switch in every micro-batch.
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        refresh(self.copies.get(name, ()) if name is not None else ())
        self._now = name


def _gathered(layer: LoraLayer, adapter: str) -> LoraLayer:
    """The layer with the whole weights of that adapter, if they are split over ranks."""
    found = copy.copy(layer)
    found._modules = dict(layer._modules)
    for name in ("lora_A", "lora_B"):
        factor = copy.copy(getattr(layer, name)[adapter])
        factor._parameters = {key: None if x is None else whole(x) for key, x in factor._parameters.items()}
        found._modules[name] = nn.ModuleDict({adapter: factor})
    return found


def adapted_layers(network: PreTrainedModel, name: str) -> dict[str, LoraLayer]:
    """The layers of the network that have this adapter, by their names."""
    return {key: layer for key, layer in network.named_modules() if name in getattr(layer, "r", ())}


@torch.no_grad()
def merged_weights(
    network: PreTrainedModel, name: str, device: torch.device | None = None, *, keep: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of the base's state dict, with that adapter's sums, on `device`, where there is one.

    A sum W + alpha / rank * B A is rounded once to the dtype of W, and made when it is asked for. All ranks that
    split the weights take part; those with keep=False get empty tensors for the sums.
    """
    layers = adapted_layers(network, name)
    for key, value in network.state_dict().items():
        layer, part, end = key.rpartition(".base_layer.")
        if part and end == "weight" and layer in layers:
            weight = whole(value)
            sums = weight + _gathered(layers[layer], name).get_delta_weight(name)  # of float32
            value = sums.to(device=device, dtype=weight.dtype) if keep else weight.new_empty(0, device=device)
        if ".lora_" not in key:
            yield key.replace(".base_layer.", "."), value


def adapt(
    network: PreTrainedModel, config: LoraConfig, saved: SavedAdapter | None, generator: torch.Generator
) -> Adapters:
    """`network` with the adapter that was saved, or with a new one of B = 0; its own weights frozen."""
    if hasattr(network, "peft_config") and saved is None:
        raise UserError(f"model.lora.rank: expected 0 for a model that has adapters already, got {config.rank}")
    if config.merge and is_quantized(network):
        raise UserError("model.lora.merge: expected false for a base in 4 bits, got True")
    if saved is None:
        adapters = Adapters(network, _new_config(network, config))
        adapters.draw(TRAINED, generator)
        return adapters
    for name, found in (("rank", saved.config.r), ("alpha", saved.config.lora_alpha)):
        given = getattr(config, name)
        check(given == found, f"model.lora.{name}", f"{found}, that of the adapter in {saved.path!r}", given)
    adapters = put_on(network, saved)
    if config.merge:
        adapters.check_mergeable(saved.path)
    return adapters


def put_on(network: PreTrainedModel, saved: SavedAdapter) -> Adapters:
    """`network` with the adapter that was saved."""
    check(not hasattr(network, "peft_config"), saved.path, "an adapter on a model without adapters", saved.base)
    with _errors_of_peft(saved):
        adapters = Adapters(network, saved.config)
    adapters.fill_from(TRAINED, saved)
    return adapters


def add_to_weights(network: PreTrainedModel, saved: SavedAdapter) -> None:
    """Add the saved adapter to the weights of `network`, for good, and make all of them trainable."""
    if not any(parameter.is_meta for parameter in network.parameters()):  # else there is nothing to add to
        adapters = put_on(network, saved)
        adapters.check_mergeable(saved.path)
        adapters.model.merge_and_unload()
    network.requires_grad_(True)


def _new_config(network: PreTrainedModel, config: LoraConfig) -> peft.LoraConfig:
    head, layers = network.get_output_embeddings(), network.base_model.named_modules()
    linear = {name: layer for name, layer in layers if isinstance(layer, nn.Linear | Conv1D) and layer is not head}
    for target in config.targets:
        known = any(f".{name}".endswith(f".{target}") for name in linear)
        last = sorted({name.rpartition(".")[2] for name in linear})
        check(known, "model.lora.targets", f"names of linear layers below the head ({', '.join(last)})", target)
    targets = config.targets or {name.rpartition(".")[2] for name in linear}
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[*targets],
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
    )


@contextlib.contextmanager
def _errors_of_peft(saved: SavedAdapter) -> Iterator[None]:
    """Turn an error of peft into a sentence about the saved adapter."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, re.error) as error:
        reason = first_line(error)
        raise UserError(f"{saved.path}: expected an adapter that fits its base {saved.base!r}: {reason}") from error


def is_quantized(network: PreTrainedModel) -> bool:
    """Whether the network has quantized weights, such as those of 4 bits."""
    return getattr(network, "quantization_method", None) is not None
