"""Rollouts written by hand, for the stages that need no model."""

import torch
from torch import Tensor

from ppo_fast.rlhf.data import PromptBatch
from ppo_fast.rlhf.rollout import Generation, Rollout

EOS = 2


def made_rollout(
    lengths: list[int],
    *,
    ended: list[bool] | None = None,
    columns: dict[str, list] | None = None,
    width: int | None = None,
    seed: int = 0,
    fill: float = 0.0,
) -> Rollout:
    """A rollout of responses of these lengths with random contents; `fill` goes where the mask is False."""
    B, T = len(lengths), width or max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        # Drawn row by row up to its length, so that padding columns change nothing.
        rows = [torch.randn(n, generator=generator) for n in lengths]
        return torch.stack([torch.nn.functional.pad(row, (0, T - len(row)), value=fill) for row in rows])

    ids = torch.where(mask, 10 + torch.arange(T).expand(B, T), 0)
    finished = torch.tensor(ended or [True] * B)
    ids[finished, torch.tensor(lengths)[finished] - 1] = EOS
    prompts = PromptBatch(torch.full((B, 1), 5), torch.ones(B, 1, dtype=torch.bool), ["w1"] * B, columns or {})
    generation = Generation(
        prompts=prompts,
        input_ids=torch.cat([prompts.input_ids, ids], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, mask], dim=1),
        mask=mask,
        ended=finished,
        logprobs=random(),
    )
    return Rollout(generation, logprobs=random(), ref_logprobs=random(), entropy=random(), values=random())
