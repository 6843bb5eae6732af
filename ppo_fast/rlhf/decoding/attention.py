"""The attention that a model has while slots are sampled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ppo_fast.rlhf.decoding.cache import AttentionInputs, Decode, Prefill
from ppo_fast.rlhf.models.attention import VARLEN

SLOTS, SOFTCAPPED = "ppo_fast_slots", "ppo_fast_slots_softcapped"
# Attentions that leave a softcap of the scores (Gemma 2) out. Sampling does as scoring and training do.
WITHOUT_SOFTCAP = ("sdpa", VARLEN)


@functools.cache
def register() -> None:
    """Make the attentions known to transformers."""
    for name, function in ((SLOTS, slot_attention), (SOFTCAPPED, softcapped_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def softcapped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slots: Prefill | Decode | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return attention [b, n, H, E] of query [b, H, n, E] to the keys and values of a view of the slots."""
    assert slots is not None, f"{type(module).__name__} does not hand its arguments on"
    return slots.attend(AttentionInputs(query, key, value, scaling, sliding_window, softcap)), None


def slot_attention(*arguments: Any, softcap: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """Return `softcapped_attention` without the softcap."""
    return softcapped_attention(*arguments, **options)


@contextlib.contextmanager
def rotary_table(backbone: PreTrainedModel, length: int) -> Iterator[None]:
    """Let a backbone look up the rotary embeddings of positions below `length` within the block.

    Its own module computes them, once for each dtype and kind of layer in place of at every step.
    """
    module: Any = getattr(backbone, "rotary_emb", None)
    if module is None:  # learned positions
        yield
        return
    tables: dict[object, tuple[Tensor, Tensor]] = {}
    compute, own = module.forward, vars(module).get("forward")

    def look_up(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        kind = () if layer_type is None else (layer_type,)
        key = (x.dtype, *kind)
        if key not in tables:
            every = torch.arange(length, dtype=torch.int64, device=x.device)[None]
            cos, sin = compute(x, every, *kind)
            tables[key] = cos[0], sin[0]
        cos, sin = tables[key]
        return nn.functional.embedding(position_ids, cos), nn.functional.embedding(position_ids, sin)

    module.forward = look_up
    try:
        yield
    finally:
        del module.forward
        if own is not None:  # a wrapper that somebody put on the instance
            module.forward = own


@contextlib.contextmanager
def attending_to_slots(backbone: PreTrainedModel) -> Iterator[None]:
    """Let a backbone attend to slots within the block, and as before afterwards."""
    register()
    config: Any = backbone.config
    own = config._attn_implementation
    config._attn_implementation = SLOTS if own in WITHOUT_SOFTCAP else SOFTCAPPED
    try:
        yield
    finally:
        config._attn_implementation = own
