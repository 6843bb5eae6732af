"""RLHF of language models by PPO: the stages, and the loop over them."""

from .config import PPOConfig
from .configfile import load_config
from .errors import UserError
from .export import export_pairs
from .judge import Judge
from .ppo import PPOResult, train_ppo
from .signals import Interrupted

__all__ = ["Judge", "Interrupted", "PPOConfig", "PPOResult", "UserError", "export_pairs", "load_config", "train_ppo"]
