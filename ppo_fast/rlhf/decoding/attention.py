"""The attention that a model has while slots are sampled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ppo_fast.rlhf.decoding.cache import View
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
    slots: View | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return attention [b, n, H, E] of query [b, H, n, E] to the keys and values of a view of the slots."""
    assert slots is not None, f"{type(module).__name__} does not hand its arguments on"
    return slots.attend(query, key, value, scaling, sliding_window, softcap), None


def slot_attention(*arguments: Any, softcap: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """Return `softcapped_attention` without the softcap."""
    return softcapped_attention(*arguments, **options)


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
