"""Keys and values of slots, in buffers of fixed size, as transformers' attention layers read and write them.

Slot s of a layer is keys[s] and values[s] [heads, length, width]; position p of its sequence is at index p. A forward
pass sees the buffers through a view: `Prefill` for a block of prompt tokens, `Decode` for one token of each slot. The
view is both `past_key_values`, which takes new keys and values, and the argument `slots` of `slot_attention`, which
attends to them. Masks follow from positions, so transformers makes none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from ppo_fast.rlhf.decoding import kernels


class KeyValues:
    """Keys and values [slots, heads, length, width] of each layer, made when a layer first writes to them."""

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer; new keys are `like` [b, heads, n, width]."""
        if index not in self.layers:
            shape = (self.slots, like.shape[1], self.length, like.shape[3])
            # Zeros: a masked position has weight 0, and 0 times an arbitrary value may be NaN.
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[index]

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` positions of slots `source` [n] to slots `target` [n]; the two may overlap."""
        for layer in self.layers.values():
            for buffer in layer:
                buffer[target, :, :length] = buffer[source, :, :length]


class AttentionInputs(NamedTuple):
    """What an attention layer attends with; K divides H."""

    query: Tensor  # [b, H, n, E]
    key: Tensor  # [b, K, L, E], as `update` returned it
    value: Tensor  # [b, K, L, E]
    scaling: float | None  # of the scores; None: 1 / sqrt(E)
    window: int | None  # tokens that are seen at most; None: all
    softcap: float | None  # c of c tanh(score / c); None: the scores as they are


class View(Cache):
    """The part of the buffers that one forward pass reads and writes."""

    is_compileable = True

    def __init__(self, buffers: KeyValues) -> None:  # the base class makes layers of its own
        self.buffers = buffers
        self.layers: list[Any] = []  # of the base class; the views have none

    def get_seq_length(self, *_: object, **__: object) -> int:
        return 0


class Prefill(View):
    """Tokens `start` to `start + n` of the prompts of some slots, right-padded; earlier ones are in the buffers.

    Padding follows the prompt, so no token of it attends there, and sampled tokens overwrite its keys.
    """

    def __init__(self, buffers: KeyValues, slots: Tensor, start: int) -> None:
        super().__init__(buffers)
        self.slots, self.start = slots, start

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        keys, values = self.buffers.layer(layer_idx, key)
        end = self.start + key.shape[2]
        keys[self.slots, :, self.start : end] = key
        values[self.slots, :, self.start : end] = value
        return (keys[self.slots, :, :end], values[self.slots, :, :end]) if self.start else (key, value)

    def attend(self, x: AttentionInputs) -> Tensor:
        """Return attention [b, n, H, E]."""
        query, key, value, scaling, window, softcap = x
        length, windowed = key.shape[2], window is not None and window < key.shape[2]
        if not self.start and not windowed and softcap is None:
            return _attend(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)
        at = torch.arange(length, dtype=torch.int64, device=query.device)
        back = at[self.start :, None] - at
        seen = (back >= 0) & (back < window) if window is not None else back >= 0
        return attention(query, key, value, _additive(seen, query.dtype), scaling, softcap)


class Decode(View):
    """One token of each of the first slots, at a position of its own.

    Args:
        positions: [n] int64, of the tokens.
        length: attention reads the buffers up to here; beyond every position, except those of slots that are free.
    """

    def __init__(self, buffers: KeyValues, positions: Tensor, length: int) -> None:
        super().__init__(buffers)
        self.positions, self.length = positions, length
        self.count = len(positions)
        self.index: Tensor | None = None  # [n * heads] int64: where each slot and head writes
        self.masks: dict[int | None, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self.buffers.layer(layer_idx, key), (key, value), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, self._index(buffer), new.flatten(0, 2))
        keys, values = self.buffers.layers[layer_idx]
        return keys[: self.count, :, : self.length], values[: self.count, :, : self.length]

    def _index(self, buffer: Tensor) -> Tensor:
        """Return the rows [n * heads] of the flattened buffer that the tokens have; equal in all layers."""
        if self.index is None:
            heads, length = buffer.shape[1:3]
            first = torch.arange(self.count * heads, dtype=torch.int64, device=buffer.device).view(self.count, heads)
            self.index = (first * length + self.positions[:, None]).flatten()
        return self.index

    def attend(self, x: AttentionInputs) -> Tensor:
        """Return attention [b, n, H, E]."""
        query, key, value, scaling, window, softcap = x
        if (kernel := kernels.cached_attention(query)) is not None:
            return kernel(query, key, value, self.positions, scaling, window, softcap)
        count, heads, _, width = query.shape
        groups = key.shape[1]
        # The query heads of a key head are its rows, so keys and values are not repeated.
        query = query.view(count, groups, heads // groups, width)
        mask = self._mask(window, query.dtype).expand(-1, -1, heads // groups, -1)
        return attention(query, key, value, mask, scaling, softcap).transpose(1, 2).reshape(count, 1, heads, width)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return [n, 1, 1, L], 0 where a slot attends and else -inf; made once a step."""
        if window not in self.masks:
            at = torch.arange(self.length, dtype=torch.int64, device=self.positions.device)
            latest = self.positions[:, None]
            seen = at <= latest if window is None else (at <= latest) & (at > latest - window)
            self.masks[window] = _additive(seen, dtype)[:, None, None]
        return self.masks[window]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where True, else -inf."""
    return torch.full(seen.shape, -torch.inf, dtype=dtype, device=seen.device).masked_fill_(seen, 0.0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return attention [b, n, H, E] of query [b, H, n, E] to keys [b, K, L, E]; K divides H.

    A softcap c turns scores s into c tanh(s / c) before the additive mask, as Gemma 2 does (arXiv:2408.00118).
    """
    if softcap is None:
        return _attend(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return torch's attention [b, H, n, E] to keys and values of K heads."""
    grouped = key.shape[1] != query.shape[1]
    if grouped and query.dtype == torch.float32 and query.device.type == "cuda":
        # The kernels that know groups take 16 bits only. Without one, all scores would be in memory at once.
        key, value, grouped = _repeated(key, query.shape[1]), _repeated(value, query.shape[1]), False
    output: Tensor = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)
    return output


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
