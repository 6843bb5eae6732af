"""ppo_fast: kernel-accelerated PPO for RLHF of language models."""

from ppo_fast import ops
from ppo_fast._version import __version__
from ppo_fast.ops import *  # noqa: F403  # the public ops, listed there

__all__ = ["__version__"]
__all__ += ops.__all__
