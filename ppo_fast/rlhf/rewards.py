"""From responses to a reward per token: the user's score, its clip and penalties, and the KL to the reference."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_fast import ops

from .config import KLConfig, RewardConfig
from .errors import NotFiniteError, UserError
from .rollout import Rollout

RewardFunction = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Rewards:
    """What a rollout earned."""

    rewards: Tensor  # [B, T] float32: score on the last counted token (or spread) - kl_coef * k1; 0 where masked
    scores: Tensor  # [B] float32: clipped score, missing-EOS penalty included
    kl: Tensor  # [B, T] float32: logprob - ref_logprob; 0 where masked
    kl_coef: Tensor  # 0-d float32: the coefficient these rewards were made with
    completion_ids: list[list[int]]  # [B] the counted tokens of each response, EOS included
    completions: list[str]  # [B] decoded responses without special tokens


class KLCoefficient:
    """coef, fixed or steered: error = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + error * n / horizon.

    KL is the mean over sequences of the per-sequence sum, n the number of sequences. The steered coefficient is
    a 0-d tensor, so that steering waits for no device. Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, config: KLConfig, device: torch.device) -> None:
        self.config = config
        self.coef: float | Tensor = config.coef
        if config.adaptive:
            self.coef = torch.tensor(config.coef, dtype=torch.float32, device=device)

    def update(self, kl: Tensor) -> None:
        """Steer by the KL [B, T] of the rollout just used."""
        if self.config.adaptive:
            error = (kl.sum(dim=1).mean() / self.config.target - 1).clamp(-0.2, 0.2)
            self.coef = self.coef * (1 + error * len(kl) / self.config.horizon)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        coef = state["coef"]
        self.coef = coef.to(self.coef.device) if isinstance(self.coef, Tensor) else coef


def load_reward_function(spec: str | None) -> RewardFunction:
    """Load "path/to/file.py:function"; UserError when there is no such file or function, or the file fails."""
    path, separator, name = (spec or "").rpartition(":")
    if not separator:
        raise UserError(f"reward.function: expected 'path/to/file.py:function', got {spec!r}")
    if not Path(path).is_file():
        raise UserError(f"reward.function: no such file {path!r}")
    module_spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"reward.function: expected a Python file, got {path!r}")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward.function: {path!r} does not import: {_told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward.function: no function {name!r} in {path!r}")
    return function


def compute_rewards(
    rollout: Rollout,
    tokenizer: Any,
    function: RewardFunction,
    kl: KLCoefficient,
    config: RewardConfig,
) -> Rewards:
    """Score the responses, then r[t] = score at the last counted token - kl_coef * (logprob - ref_logprob)."""
    mask = rollout.mask
    lengths = mask.sum(dim=1).tolist()
    ids = [row[:length] for row, length in zip(rollout.generation.responses.tolist(), lengths, strict=True)]
    completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
    prompts = rollout.generation.prompts
    answer = _call(function, prompts=prompts.prompts, completions=completions, completion_ids=ids, **prompts.columns)
    spread = _spread(_validated(answer, ids), lengths, mask, config.clip)
    penalty = torch.where(rollout.generation.ended, 0.0, config.missing_eos_penalty)
    rewards = spread + torch.where(_is_last(mask), -penalty[:, None], 0.0)
    scores = rewards.sum(dim=1)
    k1 = torch.where(mask, ops.kl_estimate(rollout.logprobs, rollout.ref_logprobs, kl.config.reward_estimator), 0.0)
    if kl.config.in_reward and (isinstance(kl.coef, Tensor) or kl.coef != 0):
        rewards = rewards - kl.coef * k1
    return Rewards(rewards, scores, k1, torch.as_tensor(kl.coef, device=mask.device), ids, completions)


def _call(function: RewardFunction, **arguments: Any) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise UserError(f"the reward function {name!r} failed with {_told(error)}") from error


def _told(error: BaseException) -> str:
    """Type and message of an error in the user's code, and the innermost line of the user's file, in one line."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    lines = [frame.lineno for frame in theirs if frame.filename == theirs[0].filename]
    return f"{message} ({Path(theirs[0].filename).name}:{lines[-1]})" if theirs else message


def _validated(answer: Any, ids: list[list[int]]) -> list[float | list[float]]:
    """A number per response or a list of numbers per response, all finite."""
    try:
        answer = list(_plain(answer))
    except TypeError as error:
        raise UserError(f"reward function: expected a list of {len(ids)} scores, got {answer!r}") from error
    if len(answer) != len(ids):
        raise UserError(f"reward function: expected {len(ids)} scores, one per completion, got {len(answer)}")
    checked: list[float | list[float]] = []
    for sample, (score, tokens) in enumerate(zip(map(_plain, answer), ids, strict=True)):
        per_token = isinstance(score, list | tuple)
        values = [_number(value, sample) for value in (score if per_token else [score])]
        if per_token and len(values) != len(tokens):
            raise UserError(
                f"reward function: expected {len(tokens)} scores for the tokens of sample {sample}, got {len(values)}"
            )
        checked.append(values if per_token else values[0])
    return checked


def _plain(value: Any) -> Any:
    """Numbers and lists of tensors and of NumPy arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any, sample: int) -> float:
    value = _plain(value)
    try:
        finite = math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        kind = NotFiniteError if isinstance(value, int | float) else UserError
        raise kind(f"reward function: expected a finite score for sample {sample}, got {value!r}")
    return float(value)


def _spread(scores: list[float | list[float]], lengths: list[int], mask: Tensor, clip: float | None) -> Tensor:
    """[B, T] float32: a list goes on its tokens, a number on the last counted token; both clipped."""
    rows = torch.zeros(mask.shape)
    for row, score, length in zip(rows, scores, lengths, strict=True):
        if isinstance(score, list):
            row[:length] = torch.tensor(score)
        else:
            row[length - 1] = score
    return (rows if clip is None else rows.clamp(-clip, clip)).to(mask.device)


def _is_last(mask: Tensor) -> Tensor:
    """[B, T] bool: the last counted token of each row."""
    return mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
