"""Models and tokenizers from disk or as given, dropout off: whole, in 4 bits, or as adapters on a base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.rlhf.config.model import CausalConfig, WeightsConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.adapter_files import SavedAdapter
from ppo_fast.rlhf.models.adapters import Adapters, adapt, add_to_weights
from ppo_fast.rlhf.models.forward import check_linear
from ppo_fast.rlhf.models.networks import networks_of_rank
from ppo_fast.rlhf.models.pretrained import load_pretrained
from ppo_fast.rlhf.models.saved import SavedModel
from ppo_fast.rlhf.world import by_all_ranks, current

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """A network to train, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saved: SavedAdapter | None = None  # adapter at the path; it is not on the model yet
    adapters: Adapters | None = None  # what is trained of the model; None: all of it
    eos_ids: tuple[int, ...] = ()  # end a response; see `all_eos_ids`


@by_all_ranks
def load_policy(
    config: CausalConfig,
    generator: torch.Generator,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    saved: SavedModel | None = None,
) -> Loaded:
    """`load_causal` with the adapters that `config.lora` asks for.

    Raises UserError for a model whose log-probabilities cannot be had as `config.logits` wants them.
    """
    loaded = with_adapters(load_causal(config, generator.device, model, tokenizer, saved), config, generator)
    if config.fused_head and current().mesh is None:  # a network that will be split is checked then
        check_linear(loaded.model)
    return loaded


def load_causal(
    config: WeightsConfig,
    device: torch.device,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    saved: SavedModel | None = None,
) -> Loaded:
    """The causal LM and tokenizer given, or those at `config.path` in place of None; dropout off, fit to be saved.

    For a PEFT directory the model is the base, and `Loaded.saved` is the adapter that belongs on it. `saved` describes
    `config.path`; None: it is inspected here.
    """
    if (model is None or tokenizer is None) and config.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    saved = saved or SavedModel("model.path", config.path, config.trust_remote_code)
    networks, adapter = networks_of_rank(config, device), None
    if model is None:
        model, adapter = networks.causal(saved), saved.adapter
    elif config.load_in_4bit:
        raise UserError("model.load_in_4bit: expected false for a model given as an object, got True")
    networks.place(disable_dropout(model))
    _make_saveable(model)
    tokenizer = load_tokenizer(saved) if tokenizer is None else checked_tokenizer(tokenizer)
    eos_ids = all_eos_ids(tokenizer, model.generation_config)
    # Saved with the model: `generate` of the final one ends where training ended.
    model.generation_config.eos_token_id = [*eos_ids] if len(eos_ids) > 1 else eos_ids[0]
    return Loaded(model, tokenizer, adapter, eos_ids=eos_ids)


def with_adapters(loaded: Loaded, config: WeightsConfig, generator: torch.Generator) -> Loaded:
    """The model with adapters if `config.lora` wants some; else with a saved one added to its weights for good."""
    model, saved, adapters = loaded.model, loaded.saved, None
    if config.lora.rank:
        adapters = adapt(model, config.lora, saved, generator)
    elif saved is not None:
        add_to_weights(model, saved)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return dataclasses.replace(loaded, model=disable_dropout(model), adapters=adapters)


def checkpoint_activations(network: PreTrainedModel) -> None:
    """Enable activation checkpointing in the layers of a network; it is active within `recomputing` only."""
    if not network.supports_gradient_checkpointing:
        name = type(network).__name__
        raise UserError(f"model.gradient_checkpointing: expected false for {name}, which has none, got True")
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def recomputing(*networks: nn.Module) -> Iterator[None]:
    """Activate the checkpointing of activations within the block.

    transformers does it only in train mode, in which `generate` does not use its cache. The block puts only the layers
    concerned into train mode.
    """
    layers = [m for network in networks for m in network.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def load_tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved model; UserError when it has no EOS token."""
    return checked_tokenizer(load_pretrained(AutoTokenizer, saved.tokenizer, saved.trust))


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: expected an EOS token, got none")
    return tokenizer


def all_eos_ids(
    tokenizer: PreTrainedTokenizerBase, *configs: PretrainedConfig | GenerationConfig | None
) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS first, then those of the model's configs."""
    named = [tokenizer.eos_token_id]
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [ids]
    return tuple(dict.fromkeys(token for token in named if token is not None))


def saved_eos_ids(path: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> tuple[int, ...]:
    """`all_eos_ids` of a reward model at `path`, whose generation config transformers does not load."""
    own = Path(path, GENERATION).is_file()
    generation = GenerationConfig.from_pretrained(path) if own else None
    return all_eos_ids(tokenizer, generation, config)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up batches; attention masks say what counts, so that EOS will do where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout probability to 0, modules and plain attributes alike, and go to eval mode.

    Some architectures read a float attribute (`attention_dropout`) rather than own an `nn.Dropout`, so that
    a later `train()` would undo eval mode.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
    return model.eval()


def _make_saveable(policy: PreTrainedModel) -> None:
    """Find out before the run, not after it, whether `save_pretrained` will take the generation config.

    It refuses a temperature or top-p with do_sample = False, which many published models have.
    """
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:
        policy.generation_config.do_sample = True
        try:
            policy.generation_config.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.path: its generation config cannot be saved: {reason}") from error
