"""RLHF of language models by PPO: the stages, and the loop over them."""

from .config import PPOConfig, UserError, load_config
from .ppo import PPOResult, train_ppo

__all__ = ["PPOConfig", "PPOResult", "UserError", "load_config", "train_ppo"]
