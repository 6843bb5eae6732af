"""Attention kernels for one query token of each slot: flash-attn's where it is installed, else our own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import utils

# query [S, H, 1, E], key and value [S, K, L, E], positions [S], scaling, window, softcap -> [S, 1, H, E]
CachedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, int | None, float | None], Tensor]


def cached_attention(query: Tensor) -> CachedAttention | None:
    """Return the kernel for a query on its device; None: torch's attention with a mask.

    The kernels read a slot's keys and values up to its position, whatever the length of the buffers.
    """
    if query.device.type != "cuda":
        return None
    if query.dtype in (torch.bfloat16, torch.float16) and utils.is_flash_attn_2_available():
        return flash_attention
    from ppo_fast.rlhf.decoding.triton_attention import slot_attention

    return slot_attention


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return [S, 1, H, E] by flash-attn, whose kernel takes heads after positions."""
    from flash_attn import flash_attn_with_kvcache

    output: Tensor = flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=(positions + 1).int(),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output
