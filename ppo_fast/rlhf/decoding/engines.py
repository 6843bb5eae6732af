"""The engine of a run: a function (model, requests, settings) -> responses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from ppo_fast.rlhf.decoding.generate import run_generate
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Responses
from ppo_fast.rlhf.decoding.slots import run_slots
from ppo_fast.rlhf.decoding.support import check_supported, why_unsupported
from ppo_fast.rlhf.decoding.vllm_engine import run_vllm

Engine = Callable[[PreTrainedModel, Sequence[Request], DecodingSettings], Responses]
ENGINES: dict[str, Engine] = {"slots": run_slots, "generate": run_generate, "vllm": run_vllm}


def find_engine(name: str | None, model: PreTrainedModel) -> Engine:
    """Return the engine of that name; None: slots where they run the model, else generate."""
    if name is None:
        name = "generate" if why_unsupported(model) else "slots"
    return ENGINES[name]


def check_engine(name: str | None, model: PreTrainedModel) -> None:
    """Warn if the default engine is not the fast one; UserError if the engine named cannot run the model."""
    if name == "slots":
        check_supported(model)
    if name is None and (reason := why_unsupported(model)):
        warnings.warn(f"rollout.engine: {reason}; transformers' own 'generate' samples in its place", stacklevel=2)
