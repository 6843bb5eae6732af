"""Save the rows of a rollout batch that made a number not finite, so that the fault can be repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ppo_fast.rlhf.errors import BatchError
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.batch import PPOBatch
from ppo_fast.rlhf.training.checkpoint import write_models
from ppo_fast.rlhf.training.failures import save_batch


def save_failure(models: Models, batch: PPOBatch, target: Path, error: BatchError) -> Path:
    """Write `batch.tensors` of the rows that `error` names, their texts, and the weights."""
    generation = batch.generation
    rows = list(range(len(generation.mask))) if error.rows is None else error.rows
    ids = [generation.responses[row][generation.mask[row]].tolist() for row in rows]
    record = {
        "error": str(error),
        "rows": rows,
        "prompts": [generation.prompts.prompts[row] for row in rows],
        "completions": models.tokenizer.batch_decode(ids),
        "completion_ids": ids,
    }
    return save_batch(target, lambda directory: write_models(models, directory), batch.tensors(np.array(rows)), record)
