"""Fakes with the memory footprint of GPU-only layers: layers of 4 bits, fused attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ppo_fast.rlhf.config.ppo import ModelConfig

Context = Any  # of a torch.autograd.Function, with what its forward pass keeps
FUSED = "ppo_fast_fused"
SCALED = 64  # weights to a scale of 8 bits, and 4 * 64 of these to one of 32 bits


def attention(config: ModelConfig, device: str) -> str | None:
    """The attn_implementation of a network without data, None: the model's own."""
    fused = device == "cpu" or (device == "cuda" and config.dtype != "float32")
    packed = config.packing and fused
    named = config.attention or ""
    if not (named.startswith("flash") or (packed and not named)):
        return config.attention
    _register()
    return FUSED


@functools.cache
def _register() -> None:
    AttentionInterface.register(FUSED, _fused_attention)
    AttentionMaskInterface.register(FUSED, _mask)


def _mask(
    batch_size: int, q_length: int | None = None, kv_length: int | None = None, **others: object
) -> Tensor | None:
    """None for a packed row; else that of sdpa, which such kernels leave generation to."""
    if batch_size == 1 and q_length == kv_length:
        return None
    made: Tensor | None = sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **others)
    return made


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: object
) -> tuple[Tensor, None]:
    """Attention [B, S, H, E] of query [B, H, S, E] to key and value [B, K, S, E]."""
    if attention_mask is None:
        return _Fused.apply(query, key, value), None
    sdpa = AttentionInterface()["sdpa"]
    output: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **others)
    return output


class _Fused(torch.autograd.Function):
    """Keeps its inputs, its output and the logsumexp of each row."""

    @staticmethod
    def forward(ctx: Context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        output = query.new_empty(batch, length, heads, width)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def quantize(network: PreTrainedModel) -> None:
    """Put what takes the memory of a layer of 4 bits in the place of every linear layer but the head."""
    for parent in [*network.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Linear and layer is not network.get_output_embeddings():
                setattr(parent, name, FourBits(layer))


class FourBits(nn.Linear):
    """The memory, not the numbers, of a linear layer of 4 bits, whose weight is whole only during a product.

    4 bits a weight, 8 bits a scale of 64 weights, and 32 bits a scale of 256 scales.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        count = layer.weight.numel()
        held = count // 2 + count // SCALED + count // SCALED // 64
        self.weight = nn.Parameter(layer.weight.new_empty(held, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.out_features, self.bias)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        ctx.in_features = x.shape[-1]
        return nn.functional.linear(x, x.new_empty(out_features, x.shape[-1]), bias)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(gradient.shape[-1], ctx.in_features), None, None
