"""Policy, frozen reference and value model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .config import CausalConfig, ModelConfig, RewardConfig, WeightsConfig
from .errors import UserError, require
from .forward import accepted, backbone_of, check_linear, head_values

Role = Literal["policy", "reference", "value"]
VALUE_FILE, VALUE_CONFIG = "value_model.safetensors", "value_config.json"
STATS = "reward_stats.json"  # beside a reward model: mean and std of its scores, and how good they are


class ValueModel(nn.Module):
    """A transformer backbone with a scalar head: values [B, L] float32 from token ids [B, L]."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "position_ids": positions}
        output = self.backbone(**accepted(self.backbone, inputs), use_cache=False)
        return head_values(self.head, output.last_hidden_state)


@dataclass(frozen=True)
class Models:
    """The networks of a run, on one device, dropout off in all of them."""

    policy: Any  # causal LM, trained
    reference: Any  # causal LM, frozen copy of the policy as it was at the start
    value: ValueModel  # trained
    tokenizer: Any
    pad_id: int  # fills prompts on the left and responses after EOS; may equal eos_id
    eos_id: int  # ends a response
    linear: bool  # scoring and update use the linear ops; False: the policy's own logits
    packed: bool = False  # scoring and update take sequences packed into one row; False: padded
    shared: bool = False  # the value model is a head on the policy's own trunk

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @contextlib.contextmanager
    def using(self, role: Role) -> Iterator[Any]:
        """The network of that role, ready on the device; what it does and its backward pass belong in the block."""
        yield getattr(self, role)

    def trained(self, role: Role) -> list[nn.Parameter]:
        """What an optimizer step of "policy" or "value" changes."""
        return [parameter for parameter in getattr(self, role).parameters() if parameter.requires_grad]


def load_models(
    config: ModelConfig,
    generator: torch.Generator,
    *,
    policy: Any = None,
    tokenizer: Any = None,
    reward: RewardConfig = RewardConfig(),  # noqa: B008  # frozen
) -> Models:
    """Load what `config` names, or wrap the policy and tokenizer given; the policy given is trained in place.

    The value model starts from `value_path`, or else from the first reward model where that has the policy's
    vocabulary.
    """
    policy, tokenizer = load_policy(config, generator.device, policy, tokenizer)
    if config.value_path is None and reward.models and _reads_as(reward.models[0], tokenizer, config):
        config = dataclasses.replace(config, value_path=reward.models[0])
    value = make_value_model(config, policy, generator, normalised=reward.normalise == "saved")
    return Models(
        policy=policy,
        reference=copy.deepcopy(policy).requires_grad_(False),
        value=disable_dropout(value),
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        eos_id=tokenizer.eos_token_id,
        linear=config.logits == "linear",
        packed=config.batches == "packed",
    )


def _reads_as(path: str, tokenizer: Any, config: ModelConfig) -> bool:
    """Whether the model at `path` has the vocabulary of `tokenizer`."""
    return bool(load_tokenizer(path, config.trust_remote_code).get_vocab() == tokenizer.get_vocab())


def load_policy(config: CausalConfig, device: torch.device, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """`load_causal`; UserError for a model whose log-probabilities cannot be had as `config.logits` wants them."""
    model, tokenizer = load_causal(config, device, model, tokenizer)
    if config.logits == "linear":
        check_linear(model)
    return model, tokenizer


def load_causal(config: WeightsConfig, device: torch.device, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The causal LM and tokenizer given, or what `config` names in place of None; dropout off, fit to be saved."""
    transformers = require("transformers")
    if (model is None or tokenizer is None) and config.path is None:
        raise UserError("model.path: expected a model directory or hub id, got null")
    trust = config.trust_remote_code
    if model is None:
        dtype = getattr(torch, config.dtype)
        model = load_pretrained(transformers.AutoModelForCausalLM, config.path, trust, dtype=dtype)
    model = disable_dropout(model.to(device))
    _make_saveable(model)
    return model, load_tokenizer(config.path, trust) if tokenizer is None else checked_tokenizer(tokenizer)


def load_reward_model(field: str, path: str, dtype: torch.dtype, trust: bool = False) -> Any:
    """The sequence classification model at `path`, None when there is another kind of model.

    Raises UserError naming `field` unless it has a linear head "score" with one output.
    """
    transformers = require("transformers")
    architectures = load_pretrained(transformers.AutoConfig, path, trust).architectures or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        return None
    model = load_pretrained(transformers.AutoModelForSequenceClassification, path, trust, dtype=dtype)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(f"{field}: expected a linear head 'score' with one output, got {head} in {path!r}")
    return model


def read_stats(directory: str) -> tuple[float, float]:
    """Mean and standard deviation of a model's scores; 0 and 1 where none are saved."""
    path = Path(directory) / STATS
    if not path.is_file():
        return 0.0, 1.0
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        mean, std = float(stats["mean"]), float(stats["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: expected {{"mean": number, "std": number}}, got {error!r}') from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise UserError(f"{path}: expected a finite mean and a std > 0, got {mean} and {std}")
    return mean, std


def load_tokenizer(path: str | None, trust: bool = False) -> Any:
    """The tokenizer at `path`; UserError when it has no EOS token."""
    return checked_tokenizer(load_pretrained(require("transformers").AutoTokenizer, path, trust))


def checked_tokenizer(tokenizer: Any) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: expected an EOS token, got none")
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """The token that fills up batches; attention masks say what counts, so that EOS will do where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def make_value_model(
    config: ModelConfig, policy: Any, generator: torch.Generator, *, normalised: bool = True
) -> ValueModel:
    """A copy of the policy's backbone with a new head, or the model at `value_path` with its head if it has one.

    A new head is N(0, 1/sqrt(D+1)) or zero; its bias is zero. That of a reward model gives its scores, `normalised` as
    PPO's reward has them: (score - mean) / std by the `reward_stats.json` beside it. The head is float32.

    Raises UserError for a `value_path` that is no such model or knows fewer tokens than the policy.
    """
    if config.value_path is None:
        backbone, scores = copy.deepcopy(backbone_of(policy)), None
    else:
        backbone, scores = _load_backbone(config.value_path, policy.dtype, config.trust_remote_code)
    known, needed = (len(model.get_input_embeddings().weight) for model in (backbone, policy))
    if known < needed:
        raise UserError(f"model.value_path: expected a model of at least {needed} tokens, as the policy, got {known}")
    head = nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float32)
    with torch.no_grad():
        if scores is not None:
            head.weight.copy_(scores.weight)
        elif config.value_head == "normal":
            noise = torch.randn(head.weight.shape, generator=generator, device=generator.device)
            head.weight.copy_(noise / (head.in_features + 1) ** 0.5)
        else:
            head.weight.zero_()
        head.bias.zero_()
        if scores is not None:
            mean, std = read_stats(str(config.value_path)) if normalised else (0.0, 1.0)
            if scores.bias is not None:
                head.bias.copy_(scores.bias)
            head.bias.sub_(mean).div_(std)
            head.weight.div_(std)
    return ValueModel(backbone, head).to(generator.device).requires_grad_(True)


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


def sequence_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores [B] of a reward model at the last counted token of rows [B, L], padded on either side."""
    scores = ValueModel(model.base_model, model.score)(input_ids, attention_mask)
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = torch.where(attention_mask, position, 0).argmax(dim=1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


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


def _load_backbone(path: str, dtype: torch.dtype, trust: bool) -> tuple[Any, nn.Linear | None]:
    """The backbone at `path`, and its scalar head if it has one."""
    transformers = require("transformers")
    if (Path(path) / VALUE_FILE).is_file():
        return _load_saved_value(Path(path), dtype)
    model = load_reward_model("model.value_path", path, dtype, trust)
    if model is None:
        return load_pretrained(transformers.AutoModel, path, trust, dtype=dtype), None
    return model.base_model, model.score


def _load_saved_value(directory: Path, dtype: torch.dtype) -> tuple[Any, nn.Linear]:
    """The value model that a run left beside its policy."""
    shape = load_pretrained(require("transformers").AutoConfig, str(directory / VALUE_CONFIG))
    backbone = require("transformers").AutoModel.from_config(shape, dtype=dtype)
    saved = ValueModel(backbone, nn.Linear(shape.hidden_size, 1, dtype=torch.float32))
    saved.load_state_dict(require("safetensors.torch").load_file(directory / VALUE_FILE))
    return saved.backbone, saved.head


def load_pretrained(loader: Any, path: str | None, trust: bool = False, **options: Any) -> Any:
    """`loader.from_pretrained(path, ...)`, with code of the model's own when trusted; UserError when it fails."""
    failures = (OSError, ValueError, ImportError, require("safetensors").SafetensorError)
    try:
        with no_progress_bars():
            return loader.from_pretrained(path, trust_remote_code=trust, **options)
    except failures as error:
        where = "directory" if path is not None and Path(path).exists() else "model"
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            reason = "it has Python code of its own, which runs only when model.trust_remote_code is true"
        raise UserError(f"{loader.__name__}: cannot load {where} {path!r}: {reason}") from error
