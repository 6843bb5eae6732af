"""What is kept of a batch that made a number not finite, so that the fault can be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .advantages import Experience
from .checkpoint import atomic_directory, save_tensors, write_models
from .errors import NotFiniteError
from .models import Models
from .rollout import Generation


def save_batch(
    target: Path, write: Callable[[Path], None], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> Path:
    """Write the weights as they are, by `write`, and the batch: batch.safetensors and batch.json."""
    with atomic_directory(target) as scratch:
        write(scratch)
        save_tensors(tensors, scratch / "batch.safetensors")
        (scratch / "batch.json").write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    return target


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
        tensors = part.of(np.array(rows)) if isinstance(part, Experience) else tensors
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
