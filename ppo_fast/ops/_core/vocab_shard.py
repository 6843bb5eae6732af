"""One rank's slice of a vocabulary that is split over a process group, and the statistics of whole rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.inputs import RowInputs
from ppo_fast.ops._core.results import RowStats

# Local targets of words that another rank holds, and of words that no rank holds.
_ELSEWHERE, _NOWHERE = -1, -2


class VocabShard:
    """The slice of this rank: rank r of ``group`` holds the r-th slice, and the slices may differ in size.

    The row kernels reduce a slice as if it were the vocabulary; one MAX and one SUM all-reduce of a few numbers per row
    turn that into the statistics of the whole row. The backward of a slice needs no communication: its kernels read
    these statistics (Megatron-LM's vocabulary-parallel cross-entropy, Shoeybi et al. 2019, section 3).
    """

    def __init__(self, op: str, group: object, words: int, like: Tensor) -> None:
        """``words`` of this rank, for the rows of ``like``, hidden states or logits [..., any]. Collective."""
        _check(op, group, like)
        assert isinstance(group, dist.ProcessGroup)
        self.op, self.group, self.rank = op, group, dist.get_rank(group)
        rows = like.shape[:-1].numel()
        sizes = torch.zeros(2, dist.get_world_size(group), dtype=torch.int64, device=like.device)
        sizes[0, self.rank], sizes[1, self.rank] = words, rows
        self.sum_(sizes)
        self._words, all_rows = sizes.unbind()
        if like.device.type == "cpu" and (all_rows != rows).any():
            raise ValueError(f"{op}: expected as many rows on every rank of group, got {all_rows.tolist()}")

    @property
    def largest(self) -> int:
        """The size of the largest slice; reads it from the device."""
        return int(self._words.max().item())

    def local(self, targets: Tensor, mask: Tensor | None) -> Tensor:
        """The targets [B, T] among the words of this rank, below 0 where they are not."""
        if targets.device.type == "cpu":
            checks.target_values(self.op, targets, mask, int(self._words.sum().item()))
        targets, first = targets.long(), self._words[: self.rank].sum()
        inside = (targets >= first) & (targets < first + self._words[self.rank])
        exists = (targets >= 0) & (targets < self._words.sum())
        return torch.where(inside, targets - first, torch.where(exists, _ELSEWHERE, _NOWHERE))

    def stats(self, rows: RowInputs, want_entropy: bool, backend: str) -> RowStats:
        """The statistics of whole rows from the slice of this rank; the targets are local ones. Collective."""
        kernel_rows, logits = rows, None
        if rows.targets is not None:
            word = rows.targets.clamp(min=0)
            kernel_rows = rows._replace(targets=word)
            # Not the kernel's log-probability, which is rounded before the share of the slice is added.
            logits = rows.logits.gather(-1, word[..., None])[..., 0].double() / rows.temperature
            logits = torch.where(rows.targets >= 0, logits, torch.where(rows.targets == _NOWHERE, torch.nan, 0.0))
        part = registry.implementation("token_stats", backend)(kernel_rows, want_entropy)
        if part.lse.numel() == 0:
            return part
        return self._joined(part, logits, rows.mask, checks.accumulation_dtype(rows.logits.dtype))

    def sum_(self, x: Tensor) -> None:
        """Add what all ranks have, in place. Collective."""
        dist.all_reduce(x, group=self.group)

    def _joined(self, part: RowStats, target: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> RowStats:
        """The statistics of whole rows from those of the slices, and the ``target`` logits, 0 on the other ranks.

        With s = exp(lse of the slice - m), m the largest of the lse's and S the sum of s over ranks, s / S is the
        slice's probability. H = sum s/S * (H of the slice - log(s/S)); KL likewise, with the log of the ratio of the
        two probabilities of the slice. All in float64.
        """
        full = part.ref_lse.numel() > 0
        tops = torch.stack([part.lse, part.ref_lse]) if full else part.lse[None].clone()
        dist.all_reduce(tops, dist.ReduceOp.MAX, group=self.group)
        log_share = part.lse - tops[0]
        share = log_share.exp()
        sums = {"share": share}
        if target is not None:
            sums["target"] = target
        if part.entropy.numel():
            sums["entropy"] = torch.where(share == 0, 0.0, share * (part.entropy - log_share))
        if full:
            log_ref_share = part.ref_lse - tops[1]
            # The kernels find no distribution in a slice of the reference that is -inf throughout.
            kl = torch.where(log_ref_share == -torch.inf, torch.inf, part.kl + log_share - log_ref_share)
            sums["ref_share"] = log_ref_share.exp()
            sums["kl"] = torch.where(share == 0, 0.0, share * kl)
        total = torch.stack(list(sums.values()))
        self.sum_(total)
        whole = dict(zip(sums, total.unbind(), strict=True))

        log_sum = whole["share"].log()
        log_ref_sum = whole["ref_share"].log() if full else log_sum
        lse = tops[0] + log_sum

        def counted(x: Tensor) -> Tensor:
            return (x if mask is None else torch.where(mask, x, 0.0)).to(dtype)

        return RowStats(
            part.logprobs if target is None else counted(whole["target"] - lse),
            counted(whole["entropy"] / whole["share"] + log_sum) if part.entropy.numel() else part.entropy,
            counted(whole["kl"] / whole["share"] - log_sum + log_ref_sum) if full else part.kl,
            lse,
            tops[1] + log_ref_sum if full else part.ref_lse,
        )


def _check(op: str, group: object, like: Tensor) -> None:
    """Raise unless ``group`` is a process group, which only its ranks have, and nobody traces the call."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{op}: expected group to be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if not registry.runs_directly(like):
        raise ValueError(f"{op}: expected group=None under torch.compile and tracing, got a group")
