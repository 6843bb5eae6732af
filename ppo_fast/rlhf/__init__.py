"""RLHF of language models by PPO: the stages, and the loop over them."""

from .config import PPOConfig
from .configfile import load_config
from .errors import UserError
from .ppo import PPOResult, train_ppo

__all__ = ["PPOConfig", "PPOResult", "UserError", "load_config", "train_ppo"]
