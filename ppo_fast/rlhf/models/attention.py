"""Attention over packed rows: the sequences of a row [1, S] do not see each other.

A backbone takes a packed row as `input_ids` and `position_ids` [1, S], whose positions start again at 0 with each
sequence, `attention_mask` None, `use_cache` False and `packed_arguments`. transformers would make a mask [S, S] from
the positions. On a GPU flash-attn, or the attention registered here, takes `cu_seqlens` instead and needs no mask. On a
CPU the attention registered here computes each sequence by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, utils
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.errors import UserError

VARLEN = "ppo_fast_varlen"
# Dtypes that the kernel takes; other weights use the mask.
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
# Score modifications that the kernel cannot apply.
UNKNOWN = ("softcap", "s_aux", "position_bias")
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 5e-3}
_ROUNDING_OF_SUMS = 1e-4


def attention_implementation(
    config: WeightsConfig, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """Choose attn_implementation for `from_pretrained` or `set_attn_implementation`; None: the model's own.

    Args:
        dtype: of a model that is there already; None: that of `config`.
    """
    packed = getattr(config, "packing", False)
    half = (dtype or getattr(torch, config.dtype)) in VARLEN_DTYPES
    if config.attention is not None or not (packed and half and device.type == "cuda"):
        return config.attention
    if utils.is_flash_attn_2_available():
        return "flash_attention_2"
    register()
    return VARLEN


def use_attention(model: PreTrainedModel, config: WeightsConfig, device: torch.device | None = None) -> None:
    """Give a model on its device, or a backbone, the attention that `config` means, packed rows included.

    `device` is where its forward passes run, None: where its weights are.

    On a CPU packed rows of a model with sdpa go sequence by sequence, unless that model adds to the scores.

    Raises UserError for an attention that transformers does not have, and for a model that cannot be packed.
    """
    device = device or model.device
    name = attention_implementation(config, device, model.dtype)
    if name is not None:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.attention: {type(model).__name__} cannot have {name!r}: {reason}") from error
    if getattr(config, "packing", False):
        if name is None and device.type == "cpu" and _use_by_sequence(model, device):
            return
        check_packed(model.base_model, device)


def _use_by_sequence(model: PreTrainedModel, device: torch.device) -> bool:
    """Give a model with sdpa the attention sequence by sequence; False leaves its own, where that one cannot be had."""
    own = model.config._attn_implementation
    if own != "sdpa":
        return False
    register()
    model.set_attn_implementation(VARLEN)
    try:
        check_packed(model.base_model, device)
    except UserError:
        model.set_attn_implementation(own)
        return False
    return True


def packed_arguments(model: PreTrainedModel, cu_seqlens: Tensor, longest: int) -> dict[str, Tensor | int]:
    """Return the arguments that give a backbone's forward pass the ends of the sequences of a packed row.

    Args:
        cu_seqlens: [b + 1] int32: sequence i is cu_seqlens[i] to cu_seqlens[i + 1].
        longest: tokens of the longest sequence.
    """
    kind = model.config._attn_implementation or ""
    ends: dict[str, Tensor | int] = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    ends |= {"max_length_q": longest, "max_length_k": longest}
    if kind == VARLEN and (model.dtype in VARLEN_DTYPES or model.device.type == "cpu"):
        # A mask of four dimensions is handed on as it is: transformers neither makes one nor asks the device, which
        # the host would wait for, whether positions start again. Nothing can attend by an empty one unnoticed.
        return ends | {"attention_mask": cu_seqlens.new_empty((1, 1, 0, 0))}
    return ends if kind.startswith("flash_attention") else {}


@torch.no_grad()
def check_packed(backbone: PreTrainedModel, device: torch.device | None = None) -> None:
    """Compare a sequence in a packed row with the same sequence by itself.

    `device` is where the forward passes run, None: where the weights are.

    Raises:
        UserError: hidden states differ by more than rounding: the model sees across sequences, or goes on counting.
    """
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        raise _refused(backbone, "whose forward pass takes no positions")
    known = len(backbone.get_input_embeddings().weight)
    ids = (torch.arange(12, dtype=torch.int64, device=device or backbone.device) * known // 12)[None]
    lengths = (5, 7)
    positions = torch.cat([torch.arange(n, dtype=torch.int64, device=ids.device) for n in lengths])[None]
    row = {"input_ids": ids, "position_ids": positions, "attention_mask": None, "use_cache": False}
    ends = torch.tensor([0, 5, 12], dtype=torch.int32, device=ids.device)
    packed = backbone(**row | packed_arguments(backbone, ends, max(lengths))).last_hidden_state[:, 5:]
    single = {"input_ids": ids[:, 5:], "attention_mask": torch.ones_like(ids[:, 5:])}
    expected = backbone(**single, use_cache=False).last_hidden_state
    allowed = _ROUNDING.get(expected.dtype, _ROUNDING_OF_SUMS) * expected.abs().max()
    if (packed - expected).abs().max() > allowed:
        raise _refused(backbone, "whose sequences in one row do not stay apart")


@functools.cache
def register() -> None:
    """Make `VARLEN` known to transformers: attention by the ends of the sequences, else its own sdpa, mask and all."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention [1, S, H, E] of query [1, H, S, E] to key and value [1, K, S, E], each sequence to itself.

    Without the ends of sequences it is transformers' sdpa.
    """
    if attention_mask is None or attention_mask.numel():
        sdpa = AttentionInterface()["sdpa"]
        output: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output
    if cu_seq_lens_q is None:
        raise _refused(module, "which does not hand the ends of sequences on")
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise _refused(module, f"which has a {name}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return _varlen(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window_size=window)[None], None


def _varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int | None, **options: object) -> Tensor:
    """Causal attention [S, H, E] of query [S, H, E] to key and value [S, K, E]; K divides H."""
    from torch.nn.attention.varlen import varlen_attn

    attend: Callable[..., Any] = _by_sequence if query.device.type == "cpu" else varlen_attn
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in inspect.signature(attend).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output: Tensor = attend(query, key, value, ends, ends, longest, longest, **options)
    return output


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    _ends_of_keys: Tensor,
    _longest: int,
    _longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, 0),
    enable_gqa: bool = False,
) -> Tensor:
    """Compute torch's varlen_attn by one sdpa for each sequence."""
    found = []
    inner = ends[1:-1].long()  # what tensor_split takes
    for parts in zip(*(x.transpose(0, 1).tensor_split(inner, dim=1) for x in (query, key, value)), strict=True):
        q, k, v = (part[None] for part in parts)
        mask, length = None, q.shape[2]
        if 0 <= window_size[0] < length - 1:
            steps = torch.arange(length, dtype=torch.int64, device=query.device)
            back = steps[:, None] - steps
            mask = (back >= 0) & (back <= window_size[0])
        options: dict[str, Any] = {"is_causal": mask is None, "scale": scale, "enable_gqa": enable_gqa}
        found.append(nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)[0])
    return torch.cat(found, dim=1).transpose(0, 1)


def _refused(module: nn.Module, why: str) -> UserError:
    return UserError(f"model.packing: expected false for {type(module).__name__}, {why}, got True")
