"""The constructor of networks: from what is at a path to a network in memory, with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.integrity import copy_tensors, read_tensors
from ppo_fast.rlhf.models.adapter_files import SavedAdapter
from ppo_fast.rlhf.models.adapters import add_to_weights
from ppo_fast.rlhf.models.attention import use_attention
from ppo_fast.rlhf.models.kernels import use_kernels
from ppo_fast.rlhf.models.offload import to_pinned
from ppo_fast.rlhf.models.pretrained import Loader, load_network
from ppo_fast.rlhf.models.saved import CLASSIFIER, VALUE_FILE, SavedModel
from ppo_fast.rlhf.models.value import ValueModel


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
            self.merge(model, adapter)
        return model.base_model, None if classifier is None else model.score

    # A plan overrides the methods below.

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

    def merge(self, network: PreTrainedModel, adapter: SavedAdapter) -> None:
        """Add an adapter to the weights of `network`, for good."""
        add_to_weights(network, adapter)

    def place(self, network: PreTrainedModel) -> None:
        """Move the network to the device and give it the attention and the kernels that the config means."""
        use_attention(network if self.config.load_in_4bit else network.to(self.device), self.config)
        use_kernels(network, self.config.kernels)

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
