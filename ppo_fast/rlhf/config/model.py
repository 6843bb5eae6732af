"""The networks: where weights come from, in which form they are trained, where they live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ppo_fast.rlhf.config.base import Settings
from ppo_fast.rlhf.errors import check, not_negative, positive


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adapters, trained in place of the weights: W x + alpha / rank * B A x, with B = 0 at the start.

    Source: Hu et al. 2021, arXiv:2106.09685; by the library peft.
    """

    GROUP = "model.lora"

    rank: int = 0  # of B and A; 0: no adapters, all weights are trained
    alpha: float = 32.0  # scale of the adapters, over rank
    targets: tuple[str, ...] = ()  # names of the linear layers that get one; none: all but the head
    merge: bool = False  # save the base with the adapters added to it; else a PEFT directory

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("model.lora.rank", self.rank)
        positive("model.lora.alpha", self.alpha)
        check(self.rank > 0 or not self.targets, "model.lora.targets", "none without lora.rank", self.targets)
        check(self.rank > 0 or not self.merge, "model.lora.merge", "false without lora.rank", self.merge)


@dataclass(frozen=True)
class WeightsConfig(Settings):
    """Where the weights come from and where they live."""

    GROUP = "model"

    path: str | None = None  # causal LM to begin with: a local directory or a hub id
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and products; adapters are float32
    load_in_4bit: bool = False  # the frozen base in 4 bits (NF4), by bitsandbytes; needs lora.rank
    lora: LoraConfig = field(default_factory=LoraConfig)  # low-rank adapters in place of full fine-tuning
    attention: str | None = None  # transformers' attn_implementation; null: by device and packing
    kernels: Literal["auto", "liger", "none"] = "auto"  # norms, rotary embedding, MLP; auto: liger-kernel's if possible
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    device: str = "auto"  # "auto": cuda when there is one, else cpu
    trust_remote_code: bool = False  # run the Python code that a model directory or hub model brings along

    def __post_init__(self) -> None:
        super().__post_init__()
        merged, in_4bit = self.lora.merge, self.load_in_4bit
        check(not (merged and in_4bit), "model.lora.merge", "false with model.load_in_4bit", merged)
        check(not in_4bit or self.lora.rank > 0, "model.load_in_4bit", "false without lora.rank", in_4bit)


@dataclass(frozen=True)
class CausalConfig(WeightsConfig):
    """The language model that is trained."""

    fused_head: bool = True  # chunks of logits from the hidden states; false: all logits at once, by the model itself
    packing: bool = False  # scoring and update take a micro-batch as one row without padding


@dataclass(frozen=True)
class ModelConfig(CausalConfig):
    """The policy and the value model. The reference is the policy as it was at the start."""

    layout: Literal["separate", "shared", "adapters"] = "separate"  # value model apart; a head on the policy; one base
    offload: bool = False  # reference and reward models wait in host memory while they are not used
    offload_activations: bool = False  # those of the update wait in host memory for the backward pass; for long rows
    value_path: str | None = None  # critic's start: causal LM, reward model, final/ of a run; null: reward.models
    value_head: Literal["normal", "zero"] = "normal"  # N(0, 1/sqrt(D+1)) or 0; unused when value_path has a head

    def __post_init__(self) -> None:
        super().__post_init__()
        adapted, rank = self.layout == "adapters", self.lora.rank
        check(rank > 0 or not adapted, "model.lora.rank", "a rank > 0 with model.layout 'adapters'", rank)
        check(rank == 0 or adapted, "model.layout", "'adapters' with model.lora.rank", self.layout)
        check(
            self.layout != "shared" or self.fused_head,
            "model.fused_head",
            "true with model.layout 'shared'",
            self.fused_head,
        )
        check(
            self.value_path is None or self.layout != "shared",
            "model.value_path",
            "null with model.layout 'shared', whose critic is the policy's trunk",
            self.value_path,
        )
