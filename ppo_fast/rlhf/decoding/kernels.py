"""Attention kernels for one query token of each slot, where the machine has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import utils

CachedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, int | None, float | None], Tensor]


def cached_attention(query: Tensor) -> CachedAttention | None:
    """Return the kernel for a query [n, H, 1, E], or None: torch's attention with a mask."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return _flash if query.device.type == "cuda" and half and utils.is_flash_attn_2_available() else None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return [n, 1, H, E] by flash-attn's kernel, which reads keys and values up to each slot's position only."""
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
