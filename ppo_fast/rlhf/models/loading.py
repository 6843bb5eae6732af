"""Models and tokenizers from disk or as given, dropout off: whole, in 4 bits, or as adapters on a base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_fast.rlhf.config.ppo import CausalConfig, WeightsConfig
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.models.adapters import Adapters, SavedAdapter, adapt, add_to_weights, read_adapter, tokenizer_path
from ppo_fast.rlhf.models.attention import use_attention
from ppo_fast.rlhf.models.forward import check_linear

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """A network to train, with its tokenizer."""

    model: Any
    tokenizer: Any
    saved: SavedAdapter | None = None  # adapter at the path; it is not on the model yet
    adapters: Adapters | None = None  # what is trained of the model; None: all of it
    eos_ids: tuple[int, ...] = ()  # end a response; see `all_eos_ids`


def load_policy(config: CausalConfig, generator: torch.Generator, model: Any, tokenizer: Any) -> Loaded:
    """`load_causal` with the adapters that `config.lora` asks for.

    Raises UserError for a model whose log-probabilities cannot be had as `config.logits` wants them.
    """
    loaded = with_adapters(load_causal(config, generator.device, model, tokenizer), config, generator)
    if config.fused_head:
        check_linear(loaded.model)
    return loaded


def load_causal(config: WeightsConfig, device: torch.device, model: Any, tokenizer: Any) -> Loaded:
    """The causal LM and tokenizer given, or what `config` names in place of None; dropout off, fit to be saved.

    Of a PEFT directory it is the base, beside the adapter that belongs on it.
    """
    transformers = require("transformers")
    if (model is None or tokenizer is None) and config.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    trust, saved = config.trust_remote_code, None
    if model is None:
        saved = read_adapter("model.path", config.path)
        if saved is not None and saved.head is not None:
            raise UserError(f"model.path: expected a causal LM, got the adapter of a scalar model in {config.path!r}")
        path = config.path if saved is None else saved.base
        options = {"dtype": getattr(torch, config.dtype)} | quantization(config, device)
        architecture = (load_pretrained(transformers.AutoConfig, path, trust).architectures or [""])[0]
        if architecture.endswith("ForSequenceClassification"):  # its head is another
            raise UserError(f"model.path: expected a causal LM, got a {architecture} in {path!r}")
        model = load_network(transformers.AutoModelForCausalLM, path, trust, **options)
        _keep_differentiable(model)
    elif config.load_in_4bit:
        raise UserError("model.load_in_4bit: expected false for a model given as an object, got True")
    model = disable_dropout(model if config.load_in_4bit else model.to(device))
    use_attention(model, config)
    _make_saveable(model)
    tokenizer = load_tokenizer(config.path, trust) if tokenizer is None else checked_tokenizer(tokenizer)
    eos_ids = all_eos_ids(tokenizer, model.generation_config)
    # Saved with the model: `generate` of the final one ends where training ended.
    model.generation_config.eos_token_id = [*eos_ids] if len(eos_ids) > 1 else eos_ids[0]
    return Loaded(model, tokenizer, saved, eos_ids=eos_ids)


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


def quantization(config: WeightsConfig, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that `config.load_in_4bit` means.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    if not config.load_in_4bit:
        return {}
    require("bitsandbytes", "bitsandbytes")
    nf4 = require("transformers").BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    return {"quantization_config": nf4, "device_map": {"": device}}


def _keep_differentiable(model: Any) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks weights in eval mode for a product without a gradient."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def checkpoint_activations(network: Any) -> None:
    """Have the layers of a network recompute their activations in backward passes, within `recomputing` alone."""
    if not network.supports_gradient_checkpointing:
        name = type(network).__name__
        raise UserError(f"model.gradient_checkpointing: expected false for {name}, which has none, got True")
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def recomputing(*networks: nn.Module) -> Iterator[None]:
    """Where the layers of these networks that are to recompute their activations do so.

    transformers does it in train mode alone, in which `generate` makes no use of its cache; only the layers concerned
    are put into it.
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


def load_tokenizer(path: str | None, trust: bool = False) -> Any:
    """The tokenizer at `path`, or at the base of an adapter there; UserError when it has no EOS token."""
    return checked_tokenizer(load_pretrained(require("transformers").AutoTokenizer, tokenizer_path(path), trust))


def checked_tokenizer(tokenizer: Any) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: expected an EOS token, got none")
    return tokenizer


def all_eos_ids(tokenizer: Any, *configs: Any) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS first, then those of the model's configs."""
    named = [tokenizer.eos_token_id]
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [ids]
    return tuple(dict.fromkeys(token for token in named if token is not None))


def saved_eos_ids(path: str, tokenizer: Any, config: Any) -> tuple[int, ...]:
    """`all_eos_ids` of a reward model at `path`, whose generation config transformers does not load."""
    own = Path(path, GENERATION).is_file()
    generation = require("transformers").GenerationConfig.from_pretrained(path) if own else None
    return all_eos_ids(tokenizer, generation, config)


def padding_id(tokenizer: Any) -> int:
    """The token that fills up batches; attention masks say what counts, so that EOS will do where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def disable_dropout(model: Any) -> Any:
    """Set every dropout probability to 0, modules and plain attributes alike, and go to eval mode.

    Some architectures read a float attribute (`attention_dropout`) rather than own an `nn.Dropout`, so that
    eval mode alone would be undone by a later `train()`.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
    return model.eval()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the bars that transformers draws while it loads and writes out of the console of the run."""
    bars = require("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _make_saveable(policy: Any) -> None:
    """Find out before the run, not after it, whether `save_pretrained` will take the generation config.

    It refuses a temperature or top-p beside do_sample = False, which many published models have.
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


def load_pretrained(loader: Any, path: str | None, trust: bool = False, **options: Any) -> Any:
    """`loader.from_pretrained(path, ...)`, with code of the model's own when trusted; UserError when it fails."""
    failures = (OSError, ValueError, ImportError, require("safetensors").SafetensorError)
    try:
        with no_progress_bars():
            return loader.from_pretrained(path, trust_remote_code=trust, **options)
    except failures as error:
        where = "directory" if path is not None and Path(path).exists() else "model"
        reason = str(error).strip().partition("\n")[0]
        if where == "model" and path is not None and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
            reason = "no such directory"  # nor can it be the name of a hub model
        if "trust_remote_code" in str(error):
            reason = "it has Python code of its own, which runs only when model.trust_remote_code is true"
        raise UserError(f"{loader.__name__}: cannot load {where} {path!r}: {reason}") from error


def load_network(
    loader: Any, path: str | None, trust: bool = False, *, new: str | None = None, exact: bool = False, **options: Any
) -> Any:
    """`load_pretrained` of a model; UserError for a weight that is missing or of another shape.

    transformers gives such a weight random values. One whose name begins with `new` may be missing; with `exact` there
    must be no further tensor either.
    """
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(loader, path, trust, **told, **options)
    missing = sorted(name for name in info["missing_keys"] if new is None or not name.startswith(new))
    others = [name for name, *_ in sorted(info["mismatched_keys"])]
    further = sorted(info["unexpected_keys"]) if exact else []
    for problem, names in (("no tensor", missing), ("another shape of", others), ("an unexpected tensor", further)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{loader.__name__}: cannot load {path!r}: it has {problem} {names[0]!r}{more}")
    return model
