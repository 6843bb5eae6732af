"""TRL: log-probabilities and entropy of all its trainers, GAE and losses of its PPOTrainer."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppo_fast.integrations.common import in_dtype_of_log_softmax, in_unit_interval, loop_gae
from ppo_fast.integrations.patching import NotTaken, Report, Target, patch, rewritten
from ppo_fast.integrations.top_k import top_k_logprobs
from ppo_fast.ops import PolicyLossConfig, entropy, policy_loss, token_logprobs, token_stats, value_loss


def _in_their_dtype(result: Tensor, logits: Tensor, *others: Tensor | None) -> Tensor:
    """float32 where the release has a Triton kernel and would run it, else what its log_softmax gives."""
    theirs = importlib.import_module("trl.trainer.utils")
    takes_kernel = getattr(theirs, "_supports_trl_loss_kernel", None)
    if takes_kernel is not None and takes_kernel(logits, *others):
        return result
    return in_dtype_of_log_softmax(result, logits)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of ``index``: [...], or [..., K] for K per row; 0 where ``row_mask`` is 0."""
    mask = None if row_mask is None else row_mask != 0
    if index.ndim == logits.ndim - 1:
        result = token_logprobs(logits, index, mask=mask, temperature=temperature)
    else:
        result = top_k_logprobs(logits, index, temperature)
        result = result if mask is None else result.masked_fill(~mask, 0.0)
    return _in_their_dtype(result, logits, index, row_mask)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row; nothing of size V exists, so that no chunk is needed."""
    return _in_their_dtype(entropy(logits), logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one pass, 0 where ``row_mask`` is 0."""
    stats = token_stats(logits, index, mask=None if row_mask is None else row_mask != 0, temperature=temperature)
    rows = stats.entropy if entropy_requires_grad else stats.entropy.detach()
    return tuple(_in_their_dtype(x, logits, index, row_mask) for x in (stats.logprobs, rows))  # type: ignore[return-value]


# Lines of PPOTrainer.train, from the first up to the second, and what stands there instead. The names that are set
# to None are deleted further down. Padded tokens have advantage 0, so that without a mask they add nothing to the loss
# and count in the mean entropy, as in the original.
_PPO_TRAIN = {
    ("lastgaelam = 0", "advantages = masked_whiten(advantages, ~padding_mask)"): """
        advantages, returns = loop_gae(rewards, values, args.gamma, args.lam)
    """,
    ("new_logprobs = selective_log_softmax(logits, mb_responses)", "new_logprobs = torch.masked_fill("): """
        actor_loss = policy_loss(
            logits, mb_responses, mb_logprobs, mb_advantage, None,
            config=PolicyLossConfig(clip_low=min(args.cliprange, 1.0), clip_high=args.cliprange),
            denominator=(~padding_mask[micro_batch_inds]).sum(),
        )
        new_logprobs = actor_loss.per_token.logprobs
    """,
    ("vpredclipped = torch.clamp(", "logprobs_diff = new_logprobs - mb_logprobs"): """
        critic_loss = value_loss(
            vpred, mb_return, ~padding_mask_p1[micro_batch_inds], old_values=mb_values, clip=args.cliprange_value
        )
        vf_loss, vf_clipfrac = critic_loss.loss, critic_loss.metrics["clipfrac"]
        vpredclipped = vf_losses1 = vf_losses2 = None
    """,
    (
        "pg_loss = masked_mean(pg_loss_max, ~padding_mask[micro_batch_inds])",
        "loss = pg_loss + args.vf_coef * vf_loss",
    ): """
        pg_loss = actor_loss.loss
    """,
    ("prob_dist = torch.nn.functional.softmax(logits, dim=-1)", "approxkl = 0.5 * (logprobs_diff**2).mean()"): """
        prob_dist, entropy = None, actor_loss.per_token.entropy
    """,
}


def _ppo_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """PPOTrainer.train with GAE, both losses and the entropy from the ops."""
    train = rewritten(
        original,
        _PPO_TRAIN,
        loop_gae=loop_gae,
        policy_loss=policy_loss,
        value_loss=value_loss,
        PolicyLossConfig=PolicyLossConfig,
    )

    def checked(trainer: Any) -> Any:
        args = trainer.args
        if args.cliprange_value <= 0 or not in_unit_interval(args.gamma, args.lam):
            return NotTaken("cliprange_value 0, or gamma or lam outside [0, 1]")
        return train(trainer)

    return checked


_TARGETS = (
    Target(
        "trl.trainer.utils",
        "selective_log_softmax",
        "token_logprobs",
        {"trl 1.12.0": "61284efc30b54be1", "trl 1.14.2": "922f5a187823bd60", "trl 1.16.0": "8c7ac1620f1cde9c"},
        lambda _: selective_log_softmax,
    ),
    Target(
        "trl.trainer.utils",
        "entropy_from_logits",
        "entropy",
        {"trl 1.12.0": "79651129812d1efa", "trl 1.14.2": "d74ffdc70b8a6bec", "trl 1.16.0": "c48d57c745610b08"},
        lambda _: entropy_from_logits,
    ),
    Target(
        "trl.trainer.utils",
        "selective_log_softmax_and_entropy",
        "token_stats",
        {"trl 1.14.2": "8c79da4d6af25c75", "trl 1.16.0": "aa10c5e0ec400b65"},
        lambda _: selective_log_softmax_and_entropy,
        optional=True,
    ),
    Target(
        "trl.experimental.ppo.ppo_trainer",
        "PPOTrainer.train",
        "gae, policy_loss, value_loss",
        {"trl 1.12.0": "24ea422162de16b2"},
        _ppo_train,
        helpers=("masked_mean",),
        optional=True,
    ),
)
_KEPT = {"the losses of GRPO and DPO": "they are lines inside the trainers, on [B, T]; what feeds them is replaced"}
_KEPT_KERNELS = {"trl.kernels.ChunkedLogProbFunction": "it never holds all logits; GRPO and DPO use it since TRL 1.15"}


def patch_trl() -> Report:
    """Let TRL's trainers compute with the ops; also a context manager, undone at its end.

    ``selective_log_softmax`` (with its top-K form), ``entropy_from_logits`` and, in newer releases, the two in one,
    wherever they were imported: GRPO, DPO, RLOO, KTO, SFT and the experimental trainers. ``PPOTrainer.train`` where the
    release has it: GAE, both losses and the entropy.

    Results have the shapes and dtypes of the originals. They differ where a logit is -inf: the entropy of such a row
    is a number, not NaN.

    Returns:
        :class:`ppo_fast.integrations.Report`: what was replaced, what was not and why, calls, and ``undo()``.

    Raises:
        ValueError: TRL's source is not one of the known ones, or a patch is in effect already.
        ModuleNotFoundError: TRL is not installed.

    Example::

        with patch_trl() as report:
            GRPOTrainer(...).train()
        print(report)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        report = patch("patch_trl", "trl", _TARGETS, _KEPT)
    if importlib.util.find_spec("trl.kernels"):
        report.kept |= _KEPT_KERNELS
    return report
