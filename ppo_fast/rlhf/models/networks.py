"""The constructor of networks: from what is at a path to a network in memory, with its weights or without data."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.integrity import copy_tensors, read_tensors
from ppo_fast.rlhf.models.adapter_files import SavedAdapter
from ppo_fast.rlhf.models.adapters import add_to_weights, is_quantized
from ppo_fast.rlhf.models.attention import use_attention
from ppo_fast.rlhf.models.distribution import drop_data
from ppo_fast.rlhf.models.forward import check_linear
from ppo_fast.rlhf.models.kernels import Run, use_kernels
from ppo_fast.rlhf.models.offload import to_pinned
from ppo_fast.rlhf.models.pretrained import Loader, load_network, one_sentence
from ppo_fast.rlhf.models.saved import CLASSIFIER, VALUE_FILE, SavedModel
from ppo_fast.rlhf.models.value import ValueModel
from ppo_fast.rlhf.world import current


class Networks:
    """Makes the networks of a run from what is at their paths. That of a plan makes them without data."""

    def __init__(self, config: WeightsConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype: torch.dtype = getattr(torch, config.dtype)

    def causal(self, saved: SavedModel) -> PreTrainedModel:
        """Make the causal LM, in 4 bits if `config.quantize` says so. For an adapter, make its base without it."""
        if saved.adapter is not None:
            if saved.adapter.has_head:
                path = saved.path
                raise UserError(f"{saved.field}: expected a causal LM, got the adapter of a scalar model in {path!r}")
            self.read(saved.adapter)
        if saved.architecture.endswith(CLASSIFIER):  # its head is another
            raise UserError(f"{saved.field}: expected a causal LM, got a {saved.architecture} in {saved.base!r}")
        return self.make(AutoModelForCausalLM, saved, quantized=self.config.load_in_4bit)

    def classifier(self, saved: SavedModel, dtype: torch.dtype | None = None) -> PreTrainedModel | None:
        """Make the model for sequence classification with one output; None for another kind of model.

        For an adapter, make its base under the saved head, without the adapter.
        Raises UserError unless it has a linear head "score" with one output.
        """
        if saved.kind != "classifier":
            return None
        if saved.adapter is not None:
            self.read(saved.adapter)
            model = self._classifier_base(saved, dtype)
            model.score = self.head(saved.adapter, model)
            return model
        model = self.make(AutoModelForSequenceClassification, saved, dtype)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            path = saved.base
            raise UserError(f"{saved.field}: expected a linear head 'score' with one output, got {head} in {path!r}")
        return model

    def backbone(self, saved: SavedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, nn.Linear | None]:
        """Make the part below the head, an adapter added to its weights, and the scalar head if there is one."""
        if saved.kind == "value":
            return self.whole_value(saved, dtype)
        classifier, adapter = self.classifier(saved, dtype), saved.adapter
        if classifier is None and adapter is None:
            return self.make(AutoModel, saved, dtype), None
        model = self.make(AutoModelForCausalLM, saved, dtype) if classifier is None else classifier
        if adapter is not None:
            add_to_weights(model, adapter)
        return model.base_model, None if classifier is None else model.score

    # Networks without data override the methods below.

    def make(
        self,
        loader: Loader,
        saved: SavedModel,
        dtype: torch.dtype | None = None,
        *,
        quantized: bool = False,
        **options: Any,
    ) -> PreTrainedModel:
        """The whole network at a path by a class such as AutoModel; UserError where a weight is missing."""
        options |= quantization(self.config, self.device) if quantized else {}
        model = load_network(loader, saved.base, saved.trust, dtype=dtype or self.dtype, **options)
        _keep_differentiable(model)
        return model

    def whole_value(self, saved: SavedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, nn.Linear]:
        """Backbone and head of the value model that a run saved with its policy."""
        backbone = AutoModel.from_config(saved.config, dtype=dtype)
        head = nn.Linear(saved.config.hidden_size, 1, dtype=torch.float32, device="cpu")
        path = Path(str(saved.path), VALUE_FILE)
        copy_tensors(ValueModel(backbone, head).state_dict(), read_tensors(path), str(path), dtypes=False)
        return backbone, head

    def read(self, adapter: SavedAdapter) -> None:
        """Read an adapter before its base, for an error at once."""
        adapter.read()

    def head(self, adapter: SavedAdapter, network: PreTrainedModel) -> nn.Linear | None:
        """The scalar head that was saved with an adapter of `network`."""
        return adapter.head

    def place(self, network: PreTrainedModel) -> None:
        """Move the network to the device and `equip` it; one that will be split waits in host memory for that."""
        if current().mesh is not None:
            self.hold(network)
            return
        if not self.config.load_in_4bit:
            network.to(self.device)
        equip(network, self.config)

    def hold(self, network: PreTrainedModel) -> None:
        """Keep the network in host memory until it is split. Quantized weights are whole on the device of each rank."""
        if not self.config.load_in_4bit:  # which is there already
            network.to(self.device if is_quantized(network) else "cpu")

    def to_host(self, x: Tensor) -> Tensor:
        """Copy an activation to host memory."""
        return to_pinned(x)

    def _classifier_base(self, saved: SavedModel, dtype: torch.dtype | None) -> PreTrainedModel:
        """The base of a reward model's adapter as a model for sequence classification, with a random head."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that the base has no such head
        try:
            with torch.random.fork_rng(devices=[]):
                return self.make(AutoModelForSequenceClassification, saved, dtype, new="score.", num_labels=1)
        finally:
            logging.set_verbosity(verbosity)


class EmptyNetworks(Networks):
    """Makes networks without data, on the meta device, from their configs: rank 0 sends the other ranks their rows.

    A quantized network is whole on each rank, which loads it.
    """

    def make(
        self,
        loader: Loader,
        saved: SavedModel,
        dtype: torch.dtype | None = None,
        *,
        quantized: bool = False,
        **options: Any,
    ) -> PreTrainedModel:
        if quantized or getattr(saved.config, "quantization_config", None) is not None:
            return super().make(loader, saved, dtype, quantized=quantized, **options)
        with one_sentence(loader, saved.base), torch.device("meta"):
            network = self.build(loader, saved, dtype, **options)
        if network.can_generate() and saved.base is not None:
            with contextlib.suppress(OSError):  # there is none: then it follows from the config
                network.generation_config = GenerationConfig.from_pretrained(saved.base)
        return network.eval()

    def build(self, loader: Loader, saved: SavedModel, dtype: torch.dtype | None, **options: Any) -> PreTrainedModel:
        """The network by its config, on the default device."""
        config = copy.deepcopy(saved.config)
        config.num_labels = options.pop("num_labels", config.num_labels)
        options.pop("new", None)
        network: PreTrainedModel = loader.from_config(
            config, dtype=dtype or self.dtype, trust_remote_code=saved.trust, **options
        )
        return network

    def whole_value(self, saved: SavedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, nn.Linear]:
        backbone = self.make(AutoModel, saved, dtype)
        return backbone, empty_head(backbone)

    def hold(self, network: PreTrainedModel) -> None:
        if is_quantized(network):
            super().hold(network)
        else:
            drop_data(network)


def empty_head(network: PreTrainedModel) -> nn.Linear:
    """A scalar head without data."""
    return nn.Linear(network.config.hidden_size, 1, dtype=torch.float32, device="meta")


def networks_of_rank(config: WeightsConfig, device: torch.device) -> Networks:
    """Those of a run: without data on all ranks but the first."""
    return (Networks if current().is_main else EmptyNetworks)(config, device)


def equip(
    network: PreTrainedModel,
    config: WeightsConfig,
    run: Run | None = None,
    device: torch.device | None = None,
    *,
    linear: bool = False,
) -> None:
    """Give a network the attention and the kernels that the config means, and check that its outputs allow them.

    Args:
        run: for a network that is split; all ranks call it.
        device: where the forward passes of a split network run.
        linear: check as well that its log-probabilities follow from the head's weights.
    """
    run = run or (lambda function: function(network))
    with torch.no_grad():
        run(lambda _: use_attention(network, config, device))
    use_kernels(network, config.kernels, run, device)
    if linear:
        with torch.no_grad():
            run(lambda _: check_linear(network))


def quantization(config: WeightsConfig, device: torch.device) -> dict[str, object]:
    """Options of `from_pretrained` that `config.load_in_4bit` means.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    if not config.load_in_4bit:
        return {}
    require("bitsandbytes", "bitsandbytes")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    return {"quantization_config": nf4, "device_map": {"": device}}


def _keep_differentiable(model: PreTrainedModel) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks weights in eval mode for a product without a gradient."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
