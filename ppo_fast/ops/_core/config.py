"""The options of the policy loss, and its inputs as the registered ops take them."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ppo_fast.ops._core import checks

OBJECTIVES = ("clip", "cispo")
RATIOS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3", "full")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")

# Each a number or a 0-d tensor, field of PolicyLossConfig and of PolicyInputs.
COEFFICIENTS = ("penalty_coef", "ent_coef", "kl_coef")

_OP = "PolicyLossConfig"


def _check_coefficient(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        checks.tensor(_OP, name, value)
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{_OP}: expected {name} to be a number or a 0-d floating tensor, "
                f"got a tensor of shape {list(value.shape)} and dtype {value.dtype}"
            )
    else:
        checks.number(_OP, name, value, 0.0)


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of :func:`ppo_fast.policy_loss`, validated at construction.

    A coefficient that is the Python number 0 drops its term (and the term's backward) altogether. A schedule that
    changes a coefficient under ``torch.compile`` passes a 0-d tensor: a Python float recompiles at every new value.
    The loss refuses a coefficient tensor below 0 or not finite on a CPU. It reads none on a GPU, which would wait for
    the device: there a negative coefficient turns its term around, and NaN makes the loss NaN.

    Attributes:
        clip_low: in [0, 1]; the ratio is clipped below at ``1 - clip_low``; None leaves that side open.
        clip_high: the ratio is clipped above at ``1 + clip_high``; None leaves that side open.
        dual_clip: c > 1 bounds the objective from below by ``c * A`` where A < 0 (Ye et al. 2020, eq. 3); None: off.
        ratio: "token" (PPO), or "sequence": the length-normalized ratio of GSPO (Zheng et al. 2025, eq. 7).
        penalty_coef: weight of ``r - 1 - log r``, an unbiased estimate of KL(old || pi) (PPO-penalty).
        ent_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to the reference.
        kl_estimator: "k1" | "k2" | "k3" (Schulman 2020, from ``ref_logprobs``) or "full" (exact, over the vocabulary).
        temperature: in [1e-9, 1e9], divides the logits of policy and reference.
        aggregation: "token-mean" | "seq-mean-token-mean" | "seq-mean-token-sum".
        objective: "clip" (PPO), or "cispo": ``clip(r) * A * logprob``, with no gradient through the clipped ratio, so
            that a token outside the clip keeps a bounded gradient (MiniMax 2025, arXiv:2506.13585, eq. 4, where
            ``clip_low`` is None).

    Raises:
        ValueError: a field is out of its range; ``dual_clip`` with objective "cispo".

    Example:
        >>> PolicyLossConfig(clip_high=0.28, ent_coef=0.01).clip_high
        0.28
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    penalty_coef: float | Tensor = 0.0
    ent_coef: float | Tensor = 0.0
    kl_coef: float | Tensor = 0.0
    kl_estimator: str = "k3"
    temperature: float = 1.0
    aggregation: str = "token-mean"
    objective: str = "clip"

    def __post_init__(self) -> None:
        if self.clip_low is not None:
            checks.unit_interval(_OP, "clip_low", self.clip_low)
        if self.clip_high is not None:
            checks.number(_OP, "clip_high", self.clip_high, 0.0)
        if self.dual_clip is not None:
            checks.number(_OP, "dual_clip", self.dual_clip, 1.0, above=True)
        checks.one_of(_OP, "objective", self.objective, OBJECTIVES)
        if self.objective == "cispo" and self.dual_clip is not None:
            raise ValueError(f"{_OP}: expected dual_clip to be None with objective='cispo', got {self.dual_clip}")
        checks.one_of(_OP, "ratio", self.ratio, RATIOS)
        checks.one_of(_OP, "kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        checks.one_of(_OP, "aggregation", self.aggregation, AGGREGATIONS)
        for name in COEFFICIENTS:
            _check_coefficient(name, getattr(self, name))
        checks.scale(_OP, "temperature", self.temperature)

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss depends on where a sequence begins and ends."""
        return self.ratio == "sequence" or self.aggregation != "token-mean"


class PolicyInputs(NamedTuple):
    """Inputs of the policy losses in addition to logits or hidden states. Floats have the accumulation dtype."""

    old_logprobs: Tensor | None  # [B, T], contiguous, as all [B, T] here; None: the log-probabilities themselves
    advantages: Tensor  # [B, T]
    ref_logprobs: Tensor | None  # [B, T]; None: no reference, or reference logits
    importance_weights: Tensor | None  # [B, T]; None: 1
    cu_seqlens: Tensor | None  # [S + 1], int32 or int64, contiguous; None: a row is a sequence
    denominator: Tensor | float | None  # [] or a number; None: the count of the aggregation
    penalty_coef: Tensor | float | None  # [] or a number, as all coefficients; None leaves the term out
    ent_coef: Tensor | float | None
    kl_coef: Tensor | float | None
    clip_low: float  # infinite: open
    clip_high: float
    dual_clip: float  # infinite: none
    ratio: str
    kl_estimator: str
    aggregation: str
    objective: str
