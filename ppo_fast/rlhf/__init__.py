"""RLHF of language models: supervised fine-tuning, reward models, PPO and DPO, each a function over its stages."""

from ppo_fast.rlhf.config.files import load_config
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import DPOConfig, RewardModelConfig, SFTConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.ppo.judge import Judge
from ppo_fast.rlhf.ppo.train import PPOResult, train_ppo
from ppo_fast.rlhf.reports.export import export_pairs
from ppo_fast.rlhf.supervised.dpo import train_dpo
from ppo_fast.rlhf.supervised.reward_model import train_reward_model
from ppo_fast.rlhf.supervised.sft import train_sft
from ppo_fast.rlhf.supervised.train import SupervisedResult
from ppo_fast.rlhf.training.callbacks import Callback, StepRecord
from ppo_fast.rlhf.training.signals import Interrupted

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
    "Callback",
    "StepRecord",
    "Judge",
    "export_pairs",
    "load_config",
    "UserError",
]
