"""`from_pretrained` of transformers, strict: a missing weight is an error, and an error is one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.files import check_local

Loader = Any  # a class of transformers that has `from_pretrained`, such as AutoModel


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the bars that transformers draws while it loads and writes out of the console of the run."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pretrained(loader: Loader, path: str | None, trust: bool = False, **options: object) -> Any:
    """`loader.from_pretrained(path, ...)`, with code of the model's own when trusted; UserError when it fails."""
    if path is not None:
        check_local(loader.__name__, path)
    with one_sentence(loader, path), no_progress_bars():
        return loader.from_pretrained(path, trust_remote_code=trust, **options)


@contextlib.contextmanager
def one_sentence(loader: Loader, path: str | None) -> Iterator[None]:
    """Raise a UserError for what `loader` raises on what is at a path."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            reason = "it has Python code of its own, which runs only when model.trust_remote_code is true"
        fault = f"cannot load directory {path!r}"
        if path is None or not Path(path).exists():
            fault = f"no such directory {path!r} in {Path.cwd()}, and no model of the Hub can be loaded by that name"
        raise UserError(f"{loader.__name__}: {fault}: {reason}") from error


def load_network(
    loader: Loader,
    path: str | None,
    trust: bool = False,
    *,
    new: str | None = None,
    exact: bool = False,
    **options: object,
) -> PreTrainedModel:
    """`load_pretrained` of a model; UserError for a weight that is missing or of another shape.

    transformers gives such a weight random values. One whose name begins with `new` may be missing; with `exact` there
    must be no further tensor either.
    """
    flags = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(loader, path, trust, **flags, **options)
    missing = sorted(name for name in info["missing_keys"] if new is None or not name.startswith(new))
    others = [name for name, *_ in sorted(info["mismatched_keys"])]
    further = sorted(info["unexpected_keys"]) if exact else []
    for problem, names in (("no tensor", missing), ("another shape of", others), ("an unexpected tensor", further)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{loader.__name__}: cannot load {path!r}: it has {problem} {names[0]!r}{more}")
    return model
