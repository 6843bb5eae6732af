"""Rows of a rollout batch that made a number not finite, saved so that the fault can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ppo_fast.rlhf.errors import NotFiniteError
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.advantages import Experience
from ppo_fast.rlhf.ppo.rollout import Generation
from ppo_fast.rlhf.training.checkpoint import write_models
from ppo_fast.rlhf.training.failures import save_batch


def save_failure(
    models: Models, generation: Generation, others: Sequence[Any], target: Path, error: NotFiniteError
) -> Path:
    """`save_batch` of the rows of a rollout batch that are concerned.

    Every tensor [B, ...] of `generation` and of `others` (dataclasses) is saved as "class.field"; those of an
    `Experience` hold the rows' tokens one after another.
    """
    size = len(generation.mask)
    rows = list(range(size)) if error.rows is None else error.rows
    chosen: dict[str, Tensor] = {}
    for part in (generation, *others):
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        tensors = {name: x[rows] for name, x in values.items() if isinstance(x, Tensor) and x.shape[:1] == (size,)}
        tensors = part.select(np.array(rows)) if isinstance(part, Experience) else tensors
        chosen |= {f"{type(part).__name__.lower()}.{name}": x for name, x in tensors.items()}
    ids = [generation.responses[row][generation.mask[row]].tolist() for row in rows]
    record = {
        "error": str(error),
        "rows": rows,
        "prompts": [generation.prompts.prompts[row] for row in rows],
        "completions": models.tokenizer.batch_decode(ids),
        "completion_ids": ids,
    }
    return save_batch(target, lambda directory: write_models(models, directory), chosen, record)
