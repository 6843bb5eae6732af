"""Save a batch that made a number not finite, so that the fault can be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ppo_fast.rlhf.training.checkpoint import directory_of_run, save_tensors
from ppo_fast.rlhf.world import current


def save_batch(
    target: Path, write: Callable[[Path], None], tensors: Mapping[str, Tensor], record: Mapping[str, object]
) -> Path:
    """Write the weights by `write`, and the batch: batch.safetensors and batch.json."""
    with directory_of_run(target) as scratch:
        write(scratch)
        save_tensors(tensors, scratch / "batch.safetensors")
        text = json.dumps(record, ensure_ascii=False, indent=1)
        current().on_main(lambda: (scratch / "batch.json").write_text(text, encoding="utf-8"))
    return target
