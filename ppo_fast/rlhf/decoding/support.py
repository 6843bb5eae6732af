"""The models that the engine `slots` runs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.forward import unwrapped

# Model types whose attention layers take keys, values and positions as `decoding.cache` gives them; tested one by one.
SUPPORTED = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Rotary embeddings whose frequencies follow from the longest sequence of a batch: the host would wait for it at a step.
CHANGING_ROTARY = ("dynamic", "longrope")


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Return what keeps a model from being sampled in slots, as the end of a sentence; None: nothing does."""
    config: Any = unwrapped(model).config
    kind = config.model_type
    if kind not in SUPPORTED:
        return f"expected a model of the type {', '.join(SUPPORTED)}, got {kind!r}"
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rotary, *rotary.values()):
        name = part.get("rope_type") if isinstance(part, dict) else None
        if name in CHANGING_ROTARY:
            return f"expected rotary embeddings that do not depend on the batch, got {name!r}"
    if getattr(config, "use_bidirectional_attention", False):
        return "expected causal attention, got use_bidirectional_attention"
    return None


def check_supported(model: PreTrainedModel) -> None:
    """Raise UserError, which names the reason and the setting that runs the model, if it cannot run in slots."""
    if reason := why_unsupported(model):
        raise UserError(f"rollout.engine: {reason}; 'generate' runs any model")
