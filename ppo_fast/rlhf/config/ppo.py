"""What a PPO run is: nested dataclasses, the one source for the YAML/TOML file and the command-line flags."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ppo_fast.rlhf.config.base import Settings
from ppo_fast.rlhf.config.model import ModelConfig
from ppo_fast.rlhf.config.objective import AdvantageConfig, LossConfig
from ppo_fast.rlhf.config.optim import OptimConfig, check_float16
from ppo_fast.rlhf.config.reward import KLConfig, ReferenceConfig, RewardConfig
from ppo_fast.rlhf.config.rollout import DataConfig, RolloutConfig
from ppo_fast.rlhf.config.run import LogConfig, RunConfig
from ppo_fast.rlhf.errors import check, divides, not_negative, positive


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Held-out prompts, answered and scored during the run; metrics eval/*."""

    GROUP = "evaluation"

    every: int = 0  # updates between evaluations; 0: never
    prompts: str | None = None  # held-out prompts, in the format of data.prompts
    evaluators: tuple[str, ...] = ()  # named as reward.function; f(generate, model, tokenizer) -> {name: number}
    best: str | None = "eval/scores"  # metric by which RUN/best is kept; null: no such directory
    best_is: Literal["max", "min"] = "max"  # of that metric
    patience: int = 0  # evaluations in a row without a better `best` that end the run; 0: none do

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("evaluation.every", self.every)
        not_negative("evaluation.patience", self.patience)
        watched = self.best is not None and self.every > 0
        check(watched or not self.patience, "evaluation.patience", "0 without evaluation.every and best", self.patience)


@dataclass(frozen=True)
class PPOConfig(RunConfig):
    """One PPO run."""

    output_dir: str = "runs/ppo"  # config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, final/
    updates: int = 100  # rollout batches
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("updates", self.updates)
        divides("optim.minibatch_size", self.optim.minibatch_size, "rollout.batch_size", self.rollout.batch_size)
        warmup = self.optim.critic_warmup_updates
        check(warmup < self.updates, "optim.critic_warmup_updates", f"fewer than updates = {self.updates}", warmup)
        skips = self.on_nan == "skip"
        check(not (skips and self.optim.in_backward), "on_nan", "'stop' with optim.in_backward", self.on_nan)
        check_float16(self.model, self.optim)
        float16 = self.model.dtype == "float16"
        check(not (float16 and self.optim.in_backward), "optim.in_backward", "false with model.dtype 'float16'", True)
        buffer, longest = self.reward.overlong_buffer, self.rollout.max_new_tokens
        allowed = f"at most rollout.max_new_tokens = {longest}"
        check(buffer is None or buffer <= longest, "reward.overlong_buffer", allowed, buffer)
        if self.rollout.engine == "vllm":
            for name in ("load_in_4bit", "trust_remote_code"):
                check(not getattr(self.model, name), f"model.{name}", "false with rollout.engine 'vllm'", True)
        self._check_groups()

    def _check_groups(self) -> None:
        """Refuse what a group of samples cannot have, and what only a group can have."""
        samples, model, tries = self.rollout.samples_per_prompt, self.model, self.rollout.dynamic_sampling
        if self.advantage.critic:
            check(not tries, "rollout.dynamic_sampling", "0 without advantage.kind 'group'", tries)
            return
        group = "with advantage.kind 'group'"
        check(samples > 1, "rollout.samples_per_prompt", f"2 or more {group}", samples)
        no_critic = f"{group}, which has no value model"
        check(model.layout != "shared", "model.layout", f"'separate' or 'adapters' {no_critic}", model.layout)
        check(model.value_path is None, "model.value_path", f"null {no_critic}", model.value_path)
        warmup, value_lam = self.optim.critic_warmup_updates, self.advantage.value_lam
        check(not warmup, "optim.critic_warmup_updates", f"0 {no_critic}", warmup)
        check(value_lam is None, "advantage.value_lam", f"null {no_critic}", value_lam)

    @property
    def steps_per_epoch(self) -> int:
        return self.rollout.batch_size // self.optim.minibatch_size

    @property
    def scoring(self) -> RolloutConfig:
        """The settings of sampling with the passes of scoring: by default those of the update.

        So scoring never materializes the logits of the whole rollout.
        """
        rollout, optim = self.rollout, self.optim
        if rollout.micro_batch_size or rollout.tokens_per_pass:
            return rollout
        if optim.tokens_per_pass:
            return replace(rollout, tokens_per_pass=optim.tokens_per_pass)
        return replace(rollout, micro_batch_size=optim.micro_batch_size or optim.minibatch_size)


def check_ranks(config: PPOConfig) -> None:
    """Refuse by name what several processes, or weights split over them, cannot have."""
    one = "false under torchrun"
    check(not config.optim.in_backward, "optim.in_backward", f"{one}, where no rank has a whole gradient", True)
    activations = config.model.offload_activations
    check(not activations, "model.offload_activations", f"{one}, which gathers weights in the backward pass", True)
    engine = config.rollout.engine
    check(engine != "vllm", "rollout.engine", "'slots', 'generate' or null under torchrun", engine)
