"""Sums over sequences, and the weight that an aggregation gives each token."""

import torch
from torch import Tensor


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum over each sequence: [B, T] -> [B]; packed [1, N] -> [S]. Deterministic, without a host sync."""
    if cu_seqlens is None:
        return x.sum(-1)
    return torch.segment_reduce(x.flatten(), "sum", offsets=cu_seqlens.long(), initial=0)


def to_tokens(per_sequence: Tensor, cu_seqlens: Tensor | None, shape: torch.Size) -> Tensor:
    """One number per sequence spread over its tokens: [B] or [S] -> [B, T]."""
    if cu_seqlens is None:
        return per_sequence[:, None].expand(shape)
    position = torch.arange(shape.numel(), dtype=torch.int64, device=per_sequence.device)
    index = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    return per_sequence[index.clamp(max=per_sequence.shape[0] - 1)].view(shape)


def token_weights(
    counted: Tensor,
    cu_seqlens: Tensor | None,
    denominator: Tensor | float | None,
    aggregation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [B, T] of each token's loss: the loss is the sum of weight * loss."""
    ones = counted.to(dtype)
    if aggregation == "token-mean":
        count = ones.sum() if denominator is None else denominator
        return torch.where(counted, ones / count, 0.0)
    lengths = sequence_sum(ones, cu_seqlens)
    count = (lengths > 0).sum().to(dtype) if denominator is None else denominator
    if aggregation == "seq-mean-token-sum":
        return torch.where(counted, ones / count, 0.0)
    return torch.where(counted, 1.0 / (count * to_tokens(lengths, cu_seqlens, counted.shape)), 0.0)


def counted_mean(x: Tensor, counted: Tensor) -> Tensor:
    """The mean over counted tokens, 0 where none counts."""
    return torch.where(counted, x, 0.0).sum() / counted.sum().clamp(min=1)
