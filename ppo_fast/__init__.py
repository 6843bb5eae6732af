"""ppo_fast: kernel-accelerated PPO for RLHF of language models.

The ops are imported at their first use (PEP 562): help and version of the command need no torch.
"""

from typing import TYPE_CHECKING

from ppo_fast._version import __version__

if TYPE_CHECKING:
    from ppo_fast import ops as ops
    from ppo_fast.ops import *  # noqa: F403

# ruff: noqa: F405

__all__ = [
    "__version__",
    "token_logprobs",
    "token_stats",
    "entropy",
    "sample_tokens",
    "policy_loss",
    "linear_token_stats",
    "linear_policy_loss",
    "value_loss",
    "preference_loss",
    "dpo_loss",
    "gae",
    "gae_packed",
    "kl_estimate",
    "masked_mean",
    "whiten",
    "backends",
    "PolicyLossConfig",
    "LossOutput",
    "SampledTokens",
    "TokenStats",
]


def __getattr__(name: str) -> object:
    """The module `ops`, or one of the public ops, listed there; every other public one is then there too."""
    if name != "ops" and name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    ops = importlib.import_module(f"{__name__}.ops")
    globals().update({public: getattr(ops, public) for public in ops.__all__}, ops=ops)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "ops"})
