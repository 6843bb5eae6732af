"""RLHF of language models: supervised fine-tuning, reward models, PPO and DPO, each a function over its stages.

A name is imported at its first use: configs need no transformers, so that the help of a command comes at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppo_fast.rlhf.config.files import load_config
    from ppo_fast.rlhf.config.model import CausalConfig, LoraConfig, ModelConfig, WeightsConfig
    from ppo_fast.rlhf.config.objective import AdvantageConfig, LossConfig
    from ppo_fast.rlhf.config.optim import OptimConfig
    from ppo_fast.rlhf.config.ppo import EvaluationConfig, PPOConfig
    from ppo_fast.rlhf.config.reward import KLConfig, ReferenceConfig, RewardConfig
    from ppo_fast.rlhf.config.rollout import DataConfig, RolloutConfig
    from ppo_fast.rlhf.config.run import CheckpointConfig, LogConfig
    from ppo_fast.rlhf.config.supervised import (
        BestModelConfig,
        DPOConfig,
        ExamplesConfig,
        RewardModelConfig,
        SFTConfig,
        SupervisedLogConfig,
        SupervisedOptimConfig,
        ValueConfig,
    )
    from ppo_fast.rlhf.critic import sample_scored, train_value_model
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
    "ValueConfig",
    "SupervisedResult",
    "train_sft",
    "train_reward_model",
    "train_dpo",
    "train_value_model",
    "sample_scored",
    "Callback",
    "StepRecord",
    "Judge",
    "export_pairs",
    "load_config",
    "UserError",
    "CausalConfig",
    "LoraConfig",
    "ModelConfig",
    "WeightsConfig",
    "AdvantageConfig",
    "LossConfig",
    "OptimConfig",
    "EvaluationConfig",
    "KLConfig",
    "ReferenceConfig",
    "RewardConfig",
    "DataConfig",
    "RolloutConfig",
    "CheckpointConfig",
    "LogConfig",
    "BestModelConfig",
    "ExamplesConfig",
    "SupervisedLogConfig",
    "SupervisedOptimConfig",
]

_MODULES = {
    "config.files": ["load_config"],
    "config.model": ["CausalConfig", "LoraConfig", "ModelConfig", "WeightsConfig"],
    "config.objective": ["AdvantageConfig", "LossConfig"],
    "config.optim": ["OptimConfig"],
    "config.ppo": ["EvaluationConfig", "PPOConfig"],
    "config.reward": ["KLConfig", "ReferenceConfig", "RewardConfig"],
    "config.rollout": ["DataConfig", "RolloutConfig"],
    "config.run": ["CheckpointConfig", "LogConfig"],
    "config.supervised": [
        "BestModelConfig",
        "DPOConfig",
        "ExamplesConfig",
        "RewardModelConfig",
        "SFTConfig",
        "SupervisedLogConfig",
        "SupervisedOptimConfig",
        "ValueConfig",
    ],
    "critic": ["sample_scored", "train_value_model"],
    "errors": ["UserError"],
    "ppo.judge": ["Judge"],
    "ppo.train": ["PPOResult", "train_ppo"],
    "reports.export": ["export_pairs"],
    "supervised.dpo": ["train_dpo"],
    "supervised.reward_model": ["train_reward_model"],
    "supervised.sft": ["train_sft"],
    "supervised.train": ["SupervisedResult"],
    "training.callbacks": ["Callback", "StepRecord"],
    "training.signals": ["Interrupted"],
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
