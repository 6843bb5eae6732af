"""What a run is: nested dataclasses, the one source for the YAML/TOML file and the command-line flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ppo_fast.ops import PolicyLossConfig
from ppo_fast.rlhf.errors import UserError, check, check_choices, divides, not_negative, positive


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights: W x + alpha / rank * B A x, with B = 0 at the start.

    Source: Hu et al. 2021, arXiv:2106.09685; by the library peft.
    """

    rank: int = 0  # of B and A; 0: no adapters, all weights are trained
    alpha: float = 32.0  # scale of the adapters, over rank
    targets: tuple[str, ...] = ()  # names of the linear layers that get one; none: all but the head
    merge: bool = False  # save the base with the adapters added to it; else a PEFT directory

    def __post_init__(self) -> None:
        not_negative("model.lora.rank", self.rank)
        positive("model.lora.alpha", self.alpha)
        check(self.rank > 0 or not self.targets, "model.lora.targets", "none without lora.rank", self.targets)
        check(self.rank > 0 or not self.merge, "model.lora.merge", "false without lora.rank", self.merge)


@dataclass(frozen=True)
class WeightsConfig:
    """Where the weights come from and where they live."""

    path: str | None = None  # causal LM to begin with: a local directory or a hub id
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and products; adapters are float32
    load_in_4bit: bool = False  # the frozen base in 4 bits (NF4), by bitsandbytes; needs lora.rank
    lora: LoraConfig = field(default_factory=LoraConfig)  # low-rank adapters in place of full fine-tuning
    attention: str | None = None  # transformers' attn_implementation; null: by device and packing
    kernels: Literal["auto", "liger", "none"] = "auto"  # norms, rotary embedding, MLP; auto: liger-kernel's if possible
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    device: str = "auto"  # "auto": cuda when there is one, else cpu
    trust_remote_code: bool = False  # run the Python code that a model directory or hub model brings along

    def __post_init__(self) -> None:
        check_choices("model", self)
        merged, in_4bit = self.lora.merge, self.load_in_4bit
        check(not (merged and in_4bit), "model.lora.merge", "false with model.load_in_4bit", merged)
        check(not in_4bit or self.lora.rank > 0, "model.load_in_4bit", "false without lora.rank", in_4bit)


@dataclass(frozen=True)
class CausalConfig(WeightsConfig):
    """The language model that is trained."""

    fused_head: bool = True  # chunks of logits from the hidden states; false: all logits at once, by the model itself
    packing: bool = False  # scoring and update take a micro-batch as one row without padding


@dataclass(frozen=True)
class ModelConfig(CausalConfig):
    """The policy and the value model. The reference is the policy as it was at the start."""

    layout: Literal["separate", "shared", "adapters"] = "separate"  # value model apart; a head on the policy; one base
    offload: bool = False  # reference and reward models wait in host memory while they are not used
    offload_activations: bool = False  # those of the update wait in host memory for the backward pass; for long rows
    value_path: str | None = None  # critic's start: causal LM, reward model, final/ of a run; null: reward.models
    value_head: Literal["normal", "zero"] = "normal"  # N(0, 1/sqrt(D+1)) or 0; unused when value_path has a head

    def __post_init__(self) -> None:
        super().__post_init__()
        adapted, rank = self.layout == "adapters", self.lora.rank
        check(rank > 0 or not adapted, "model.lora.rank", "a rank > 0 with model.layout 'adapters'", rank)
        check(rank == 0 or adapted, "model.layout", "'adapters' with model.lora.rank", self.layout)
        check(
            self.layout != "shared" or self.fused_head,
            "model.fused_head",
            "true with model.layout 'shared'",
            self.fused_head,
        )
        check(
            self.value_path is None or self.layout != "shared",
            "model.value_path",
            "null with model.layout 'shared', whose critic is the policy's trunk",
            self.value_path,
        )


@dataclass(frozen=True)
class DataConfig:
    """Prompts: rows {"prompt": text or role/content messages, ...} of JSONL, Parquet or a dataset saved on disk."""

    prompts: str | None = None  # path; the other columns go to the reward function
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted
    deduplicate: bool = False  # drop prompts that repeat an earlier one, token by token
    shuffle: bool = True  # a new order every epoch
    order: str | None = None  # curriculum, easy prompts first: a column of numbers, or a function, as reward.function
    balance: str | None = None  # column of topics; every topic is drawn equally often

    def __post_init__(self) -> None:
        positive("data.max_prompt_tokens", self.max_prompt_tokens)


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling from softmax(logits / temperature)."""

    batch_size: int = 64  # responses per update
    function: str | None = None  # "file.py:function" that makes the responses, by tools and turns; null: one turn
    samples_per_prompt: int = 1  # responses to the same prompt; divides batch_size
    micro_batch_size: int | None = None  # slots, and sequences per pass of scoring; null: all, as the update to score
    tokens_per_pass: int | None = None  # of scoring, in place of micro_batch_size; null: by that
    max_new_tokens: int = 64  # a response without EOS ends here
    mask_truncated: bool = False  # leave such responses out of losses, whitening and groups; their metrics count
    stop: tuple[str, ...] = ()  # strings that end a response as EOS does; they belong to it
    dynamic_sampling: int = 0  # group: tries to replace prompts whose samples all have one score; 0: they stay
    # null: slots if they take the model; generate: any; vllm: a second copy of the weights, in that package, with noise
    # of its own, so that a resumed run may differ in bits
    engine: Literal["slots", "generate", "vllm"] | None = None
    temperature: float = 1.0  # divides the logits in sampling, scoring and the update alike
    top_k: int | None = None  # keep the k likeliest tokens; biases the ratio
    top_p: float | None = None  # keep the likeliest tokens of total probability p; biases the ratio
    # of sampled for trained probabilities; null: truncate for vllm, else none
    correction: Literal["none", "truncate", "mask"] | None = None
    correction_cap: float = 2.0  # truncate: weights of the policy loss are min(pi_train / pi_sampled, cap)
    correction_band: tuple[float, float] = (0.5, 2.0)  # mask: tokens with a weight outside are left out of the update
    correction_level: Literal["token", "sequence"] = "token"  # sequence: the product of a response's weights

    def __post_init__(self) -> None:
        engines = (None, "slots", "generate", "vllm")
        check(self.engine in engines, "rollout.engine", "'slots', 'generate', 'vllm' or null", self.engine)
        divides("rollout.samples_per_prompt", self.samples_per_prompt, "rollout.batch_size", self.batch_size)
        positive("rollout.max_new_tokens", self.max_new_tokens)
        not_negative("rollout.dynamic_sampling", self.dynamic_sampling)
        check(all(self.stop), "rollout.stop", "strings that are not empty", self.stop)
        allowed = 1e-9 <= self.temperature <= 1e9
        check(allowed, "rollout.temperature", "1e-9 <= temperature <= 1e9", self.temperature)
        check(self.top_k is None or self.top_k >= 1, "rollout.top_k", "an int >= 1 or null", self.top_k)
        check(self.top_p is None or 0 < self.top_p <= 1, "rollout.top_p", "0 < top_p <= 1 or null", self.top_p)
        if self.micro_batch_size is not None:
            positive("rollout.micro_batch_size", self.micro_batch_size)
        _check_tokens_per_pass("rollout", self.tokens_per_pass, self.micro_batch_size)
        check_choices("rollout", self)
        kinds, low, high = (None, "none", "truncate", "mask"), *self.correction_band
        check(self.correction in kinds, "rollout.correction", "'none', 'truncate', 'mask' or null", self.correction)
        check(1 <= self.correction_cap < math.inf, "rollout.correction_cap", "a number >= 1", self.correction_cap)
        around = 0 <= low <= 1 <= high < math.inf
        check(around, "rollout.correction_band", "two numbers, 0 <= low <= 1 <= high", self.correction_band)
        if self.engine == "vllm":
            own = "with rollout.engine 'vllm'"
            check(self.function is None, "rollout.function", f"null {own}", self.function)
            # It would sample at 0.01 in place of a lower temperature.
            check(self.temperature >= 0.01, "rollout.temperature", f"0.01 or more {own}", self.temperature)

    def resolved(self) -> RolloutConfig:
        """Return the settings with the correction that null means for `vllm`, whose log-probabilities differ."""
        chosen = "truncate" if self.engine == "vllm" and self.correction is None else self.correction
        return replace(self, correction=chosen)


@dataclass(frozen=True)
class RewardConfig:
    """The score of a response, before the KL term: sources, normalized, weighted, combined, clipped, less penalties."""

    function: str | None = None  # "path/to/file.py:function" or "module:function", as ppo_fast.rewards:exact_answer
    timeout: float | None = 600.0  # seconds that an `async def` function may take for a batch; null: no limit
    models: tuple[str, ...] = ()  # sequence-classification models with one output; the critic starts from the first
    weights: tuple[float, ...] = ()  # one per source, the function first; none: 1 each
    combine: Literal["sum", "mean", "min", "mean-std"] = "sum"  # of the sources; mean-std: mean - std_coef * std
    std_coef: float = 1.0  # price of disagreement
    normalize: Literal["dataset", "running", "none"] = "dataset"  # by a model's reward_stats.json; by all scores so far
    clip: float | None = 10.0  # scores are clipped to +-clip; null: not clipped
    missing_eos_penalty: float = 1.0  # subtracted, after the clip, when the response has no EOS
    length_penalty: float = 0.0  # subtracted, after the clip, per token of the response
    overlong_penalty: float = 0.0  # subtracted, after the clip, at max_new_tokens; less, linearly, within the buffer
    overlong_buffer: int | None = None  # tokens before max_new_tokens; null: a fifth of it
    filter: str | None = None  # named as function -> True (keep), False (reject) or "mask" for each response
    rejected_score: float = -10.0  # of a response that the filter rejects, in place of its own

    def __post_init__(self) -> None:
        check_choices("reward", self)
        if self.timeout is not None:
            positive("reward.timeout", self.timeout)
        if self.clip is not None:
            positive("reward.clip", self.clip)
        for name in ("missing_eos_penalty", "length_penalty", "overlong_penalty", "std_coef"):
            not_negative(f"reward.{name}", getattr(self, name))
        if self.overlong_buffer is not None:
            positive("reward.overlong_buffer", self.overlong_buffer)
        check(math.isfinite(self.rejected_score), "reward.rejected_score", "a finite number", self.rejected_score)
        for weight in self.weights:
            not_negative("reward.weights", weight)
        check(not self.weights or sum(self.weights) > 0, "reward.weights", "one above 0", self.weights)


@dataclass(frozen=True)
class KLConfig:
    """KL(policy || reference): a per-token reward, a loss term, or both. The reward takes k1: others would bias it."""

    coef: float = 0.05  # start value when adaptive
    placement: Literal["reward", "loss", "both"] = "reward"  # in the loss whitening scales it by std(advantages)
    loss_estimator: str = "k2"  # k2, full (exact, by the reference logits), or k3 for parity with GRPO
    adaptive: bool = False  # steer coef towards the target
    target: float = 6.0  # nats per sequence
    horizon: int = 10_000  # sequences; larger is slower

    def __post_init__(self) -> None:
        check_choices("kl", self)
        not_negative("kl.coef", self.coef)
        check(
            self.loss_estimator in ("k2", "k3", "full"),
            "kl.loss_estimator",
            "'k2', 'full' or 'k3' (the gradient of k1 is zero in expectation)",
            self.loss_estimator,
        )
        positive("kl.target", self.target)
        positive("kl.horizon", self.horizon)
        check(not self.adaptive or self.coef > 0, "kl.coef", "a number > 0 when kl.adaptive", self.coef)

    @property
    def in_reward(self) -> bool:
        return self.placement != "loss"

    @property
    def in_loss(self) -> bool:
        return self.placement != "reward"


@dataclass(frozen=True)
class AdvantageConfig:
    """Per token by generalized advantage estimation, or one for the whole response, with a value model or without."""

    # sequence: return - value of the prompt, on every token; group: return - mean of the prompt's samples, no critic.
    kind: Literal["gae", "sequence", "group"] = "gae"  # gae: per token, by lam; the others: one for each response
    gamma: float = 1.0  # discount
    lam: float | Literal["adaptive"] = 0.95  # 0: TD error, 1: return minus value; adaptive: by each response's length
    lam_alpha: float = 0.05  # adaptive: lam = 1 - 1 / (lam_alpha * length), at least 0
    value_lam: float | None = None  # lam of the value model's targets; 1: the returns themselves; null: lam
    whiten: bool | None = None  # mean 0, variance 1 over the rollout batch's counted tokens; null: true, group: false
    leave_one_out: bool = False  # group: the mean of the other samples (RLOO)
    divide_by_std: bool = False  # group: in units of the samples' deviation (GRPO)

    def __post_init__(self) -> None:
        check_choices("advantage", self)
        check(0 <= self.gamma <= 1, "advantage.gamma", "0 <= gamma <= 1", self.gamma)
        known = self.lam == "adaptive" or (not isinstance(self.lam, str) and 0 <= self.lam <= 1)
        check(known, "advantage.lam", "0 <= lam <= 1 or 'adaptive'", self.lam)
        positive("advantage.lam_alpha", self.lam_alpha)
        if self.value_lam is not None:
            check(0 <= self.value_lam <= 1, "advantage.value_lam", "0 <= value_lam <= 1 or null", self.value_lam)
        for name in ("leave_one_out", "divide_by_std"):
            on = getattr(self, name)
            check(self.kind == "group" or not on, f"advantage.{name}", "false without advantage.kind 'group'", on)

    @property
    def critic(self) -> bool:
        """There is a value model."""
        return self.kind != "group"

    @property
    def whitened(self) -> bool:
        """Whitening would lift the 0 of samples that agree: a group has none by default."""
        return self.critic if self.whiten is None else self.whiten


@dataclass(frozen=True)
class LossConfig:
    """The objective of the update; the meaning of the fields is that of `ppo_fast.PolicyLossConfig`."""

    clip_low: float | None = 0.2  # ratio lower bound 1 - clip_low; null: open
    clip_high: float | None = 0.2  # ratio upper bound 1 + clip_high; null: open
    dual_clip: float | None = None  # c > 1: bound c * A on the objective where A < 0
    ratio: Literal["token", "sequence"] = "token"  # sequence: one length-normalized ratio per response
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"  # over a minibatch
    ent_coef: float = 0.0  # entropy bonus
    penalty_coef: float = 0.0  # PPO-penalty: coefficient of KL(old policy || policy)
    penalty_target: float | None = None  # nats per token: adapt penalty_coef by factors of 2; null: fixed
    vf_coef: float = 0.5  # weight of the value loss
    value_clip: float | None = 0.2  # new values stay within +-value_clip of the old ones; null: plain

    def __post_init__(self) -> None:
        not_negative("loss.vf_coef", self.vf_coef)
        if self.value_clip is not None:
            positive("loss.value_clip", self.value_clip)
        if self.penalty_target is not None:
            positive("loss.penalty_target", self.penalty_target)
            positive("loss.penalty_coef", self.penalty_coef)
        try:
            self.policy_loss()
        except ValueError as error:
            raise UserError(f"loss: {error}") from error

    def policy_loss(self, **others: Any) -> PolicyLossConfig:
        """The config of the policy op; `others` are the fields that come from elsewhere or change in time."""
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("clip_low", "clip_high", "dual_clip", "ratio", "aggregation", "ent_coef", "penalty_coef")
        }
        return PolicyLossConfig(**(fields | others))


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with one clip of the gradient norm a step; linear warm-up, then the schedule."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"  # moments in the weights' dtype; in 8 bits, with stochastic rounding
    master_weights: bool | None = None  # float32 copies of 16-bit weights take the steps; null: those of adapters only
    lr: float = 1e-6  # peak; 1e-6 full fine-tuning, 3e-4 to 2e-3 for tiny models
    betas: tuple[float, float] = (0.9, 0.95)  # decay of AdamW's first and second moments
    eps: float = 1e-5  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled
    max_grad_norm: float = 1.0  # of each trained network, once per optimizer step
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up, down to final_lr_frac or flat
    warmup_frac: float = 0.03  # of all optimizer steps
    warmup_steps: int | None = None  # optimizer steps, in place of warmup_frac; null: by warmup_frac
    final_lr_frac: float = 0.1  # the decay ends at this share of the peak; constant has none

    def __post_init__(self) -> None:
        check_choices("optim", self)
        check(
            not self.master_weights or self.name == "adamw",
            "optim.master_weights",
            "false with optim.name 'adamw_8bit'",
            self.master_weights,
        )
        for name in ("lr", "eps", "max_grad_norm"):
            positive(f"optim.{name}", getattr(self, name))
        for name in ("warmup_frac", "final_lr_frac"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"optim.{name}", f"0 <= {name} <= 1", value)
        if self.warmup_steps is not None:
            not_negative("optim.warmup_steps", self.warmup_steps)
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "two numbers 0 <= beta < 1", self.betas)
        not_negative("optim.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class OptimConfig(AdamWConfig):
    """Two AdamW optimizers, policy and value, over epochs x minibatches x micro-batches."""

    value_lr: float = 5e-6  # peak for the value model
    critic_warmup_updates: int = 0  # first updates in which only the value model learns; shared layout: only its head
    epochs: int = 4  # passes over one rollout batch
    minibatch_size: int = 16  # sequences per optimizer step; divides rollout.batch_size
    micro_batch_size: int | None = None  # sequences per forward pass; divides minibatch_size; null: all
    tokens_per_pass: int | None = None  # tokens per forward pass, prompts and padding included, in place of that
    target_kl: float | None = None  # stop the epochs when a minibatch's approx_kl exceeds this
    in_backward: bool = False  # weights take their steps in the backward pass; clips by the norm of the step before

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("value_lr", "epochs"):
            positive(f"optim.{name}", getattr(self, name))
        not_negative("optim.critic_warmup_updates", self.critic_warmup_updates)
        if self.target_kl is not None:
            positive("optim.target_kl", self.target_kl)
        if self.micro_batch_size is not None:
            divides("optim.micro_batch_size", self.micro_batch_size, "optim.minibatch_size", self.minibatch_size)
        _check_tokens_per_pass("optim", self.tokens_per_pass, self.micro_batch_size)
        if self.in_backward:
            whole = self.tokens_per_pass is None and self.micro_batch_size in (None, self.minibatch_size)
            check(whole, "optim.in_backward", "false with several forward passes an optimizer step", True)
            check(self.target_kl is None, "optim.target_kl", "null with optim.in_backward", self.target_kl)


@dataclass(frozen=True)
class RunLogConfig:
    """What a run shows and records."""

    tensorboard: bool = True  # event files
    console: bool = True  # progress bar, a line per update, tables of samples
    print_every: int = 1  # updates between lines on the console; 0: only the progress bar
    wandb: str | None = None  # project of Weights & Biases that gets the metrics as well; needs the package wandb

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int):
                not_negative(f"log.{name}", value)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, which a run resumes from."""

    every: int = 0  # updates (other stages: optimizer steps) between checkpoints; 0: only when a signal stops the run
    keep: int = 2  # checkpoints kept; 0: all

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            not_negative(f"checkpoint.{name}", value)


@dataclass(frozen=True)
class LogConfig(RunLogConfig):
    """What a PPO run shows and records."""

    samples_every: int = 10  # updates between tables of samples; 0: never
    samples: int = 4  # rows of the table
    all_samples: bool = False  # samples.jsonl takes every response of every update, for `ppo-fast export`


@dataclass(frozen=True)
class ReferenceConfig:
    """What the KL is measured against: the model at the start, or one that follows the policy."""

    update: Literal["fixed", "replace", "ema"] = "fixed"  # replace: by the policy; ema: a moving average of it
    every: int = 10  # updates between two changes
    decay: float = 0.9  # ema: reference = decay * reference + (1 - decay) * policy; bfloat16 loses small changes

    def __post_init__(self) -> None:
        check_choices("reference", self)
        positive("reference.every", self.every)
        check(0 <= self.decay < 1, "reference.decay", "0 <= decay < 1", self.decay)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts, answered and scored during the run; metrics eval/*."""

    every: int = 0  # updates between evaluations; 0: never
    prompts: str | None = None  # held-out prompts, in the format of data.prompts
    evaluators: tuple[str, ...] = ()  # named as reward.function; f(generate, model, tokenizer) -> {name: number}
    best: str | None = "eval/scores"  # metric by which RUN/best is kept; null: no such directory
    best_is: Literal["max", "min"] = "max"  # of that metric
    patience: int = 0  # evaluations in a row without a better `best` that end the run; 0: none do

    def __post_init__(self) -> None:
        check_choices("evaluation", self)
        not_negative("evaluation.every", self.every)
        not_negative("evaluation.patience", self.patience)
        watched = self.best is not None and self.every > 0
        check(watched or not self.patience, "evaluation.patience", "0 without evaluation.every and best", self.patience)


@dataclass(frozen=True)
class RunConfig:
    """What all stages have in common."""

    output_dir: str = "runs"  # config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, final/
    overwrite: bool = False  # write over an earlier run in output_dir
    seed: int = 0  # of every random number of the run
    threads: int | None = None  # torch CPU threads during the run; 1 is quickest for tiny models
    max_hours: float | None = None  # of training; the step that ends later is the last: checkpoint, exit, --resume
    on_nan: Literal["stop", "skip"] = "stop"  # at a NaN or an infinity; skip: leave the step or batch out and count it
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check(self.on_nan in ("stop", "skip"), "on_nan", "one of 'stop', 'skip'", self.on_nan)
        not_negative("seed", self.seed)
        if self.threads is not None:
            positive("threads", self.threads)
        if self.max_hours is not None:
            positive("max_hours", self.max_hours)


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


def check_float16(model: WeightsConfig, optim: AdamWConfig) -> None:
    """Refuse float16 weights that take the steps themselves: the squares of their gradients would be 0."""
    trained = model.dtype == "float16" and not model.lora.rank
    check(
        not trained or bool(optim.master_weights),
        "optim.master_weights",
        "true with model.dtype 'float16' unless adapters are trained",
        optim.master_weights,
    )


def _check_tokens_per_pass(group: str, tokens: int | None, micro_batch_size: int | None) -> None:
    if tokens is not None:
        positive(f"{group}.tokens_per_pass", tokens)
        check(micro_batch_size is None, f"{group}.tokens_per_pass", f"null with {group}.micro_batch_size", tokens)
