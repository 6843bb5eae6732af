"""RLHF of language models by PPO: the stages, and the loop over them."""

from .config import PPOConfig
from .configfile import load_config
from .errors import UserError
from .ppo import PPOResult, train_ppo
from .signals import Interrupted

__all__ = ["Interrupted", "PPOConfig", "PPOResult", "UserError", "load_config", "train_ppo"]
