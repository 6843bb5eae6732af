"""RLHF of language models: supervised fine-tuning, reward models, PPO and DPO, each a function over its stages."""

from .config import PPOConfig
from .configfile import load_config
from .dpo import train_dpo
from .errors import UserError
from .export import export_pairs
from .judge import Judge
from .ppo import PPOResult, train_ppo
from .reward_model import train_reward_model
from .sft import train_sft
from .signals import Interrupted
from .supervised import SupervisedResult
from .supervised_config import DPOConfig, RewardModelConfig, SFTConfig

__all__ = [
    "Interrupted",
    "PPOConfig",
    "PPOResult",
    "train_ppo",
    "SFTConfig",
    "RewardModelConfig",
    "DPOConfig",
    "SupervisedResult",
    "train_sft",
    "train_reward_model",
    "train_dpo",
    "Judge",
    "export_pairs",
    "load_config",
    "UserError",
]
