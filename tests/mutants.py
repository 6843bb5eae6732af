"""Deliberate faults, each of which some test must notice: ``make mutants`` prints one line per fault.

Every fault is made in a copy of the tree, and the tests named beside it are run there; the run fails when one survives.
A fault in C++ rebuilds the extension of the copy.

    python -m tests.mutants [WORD ...]     # only those whose path or fault contains a word
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REFERENCE, TRITON = "ppo_fast/ops/_backends/reference", "ppo_fast/ops/_backends/triton"
CORE, CPU, RLHF = "ppo_fast/ops/_core", "csrc/cpu", "ppo_fast/rlhf"


class Mutant(NamedTuple):
    """In ``path`` the only occurrence of ``old`` becomes ``new``; ``tests`` must fail."""

    path: str
    old: str
    new: str
    tests: str


NATIVE = "tests/ops/native/test_rows.py"
ADAMW = "tests/ops/triton/test_adamw_8bit.py"
LOSSES = "tests/ops/triton/test_losses.py"
FLOAT16 = "tests/rlhf/training/test_float16.py"
GAE = "tests/ops/test_gae.py"
IN_BACKWARD = "tests/rlhf/training/test_in_backward.py"
MASKED = "tests/ops/test_masked.py"
TRAPS = "tests/ops/test_numerical_edge_cases.py"
POLICY = "tests/ops/test_policy_loss.py"
METRICS = "tests/ops/test_policy_metrics.py"
PREFERENCE = "tests/ops/test_preference.py"
MANNERS = "tests/ops/test_side_effects.py"
SAMPLE = "tests/ops/test_sample_tokens.py"
STATS = "tests/ops/test_token_stats.py"
VALUE = "tests/ops/test_value_loss.py"
VOCAB_SHARD = "tests/ops/test_vocab_shard.py"
SEVERAL_GPUS = "tests/rlhf/planning/test_several_gpus.py"
ERRORS = "tests/ops/test_errors.py"
CONFIG = "tests/rlhf/config/test_config.py"
EXAMPLES = "tests/rlhf/data/test_examples.py"
BATCHES = "tests/rlhf/data/test_packing.py"
TEMPLATES = "tests/rlhf/data/test_templates.py"
ADAPTERS = "tests/rlhf/models/test_adapters.py"
ADAPTER_LAYERS = "tests/rlhf/models/test_adapter_layers.py"
ADAPTER_STAGES = "tests/rlhf/models/test_adapter_stages.py"
KERNELS = "tests/rlhf/models/test_kernels.py"
ATTENTION = "tests/rlhf/models/test_attention.py"
CORRECTION = "tests/rlhf/ppo/test_correction.py"
ASYNC = "tests/rlhf/ppo/test_async_rewards.py"
ENVIRONMENT = "tests/rlhf/ppo/test_environment.py"
EOS = "tests/rlhf/models/test_eos.py"
HEADS = "tests/rlhf/models/test_heads.py"
LAYOUTS = "tests/rlhf/models/test_layouts.py"
SHARED = "tests/rlhf/models/test_shared.py"
ADVANTAGES = "tests/rlhf/ppo/test_advantages.py"
PLACEMENT = "tests/rlhf/ppo/test_kl_placement.py"
GROUPS = "tests/rlhf/ppo/test_groups.py"
CRITIC = "tests/rlhf/test_critic.py"
WARMUP = "tests/rlhf/ppo/test_critic_warmup.py"
BEST = "tests/rlhf/supervised/test_best.py"
EVALUATION = "tests/rlhf/ppo/test_evaluation.py"
ROLLOUT = "tests/rlhf/ppo/test_rollout.py"
SLOTS = "tests/rlhf/decoding/test_slots.py"
VLLM = "tests/rlhf/decoding/test_vllm_engine.py"
UPDATE = "tests/rlhf/ppo/test_update.py"
RESUMED = "tests/rlhf/supervised/test_resume.py"
REWARD = "tests/rlhf/supervised/test_reward_model.py"
RUNS = "tests/rlhf/distributed/test_runs.py"
SHARDING = "tests/rlhf/distributed/test_sharding.py"
SUPERVISED = "tests/rlhf/supervised/test_train.py"
CHECKPOINT = "tests/rlhf/training/test_checkpoint.py"
DAMAGE = "tests/rlhf/training/test_damage.py"
LOCK = "tests/rlhf/training/test_lock.py"
KILLED = "tests/rlhf/distributed/test_killed.py"
ONE_RANK_FAILS = "tests/rlhf/distributed/test_one_rank_fails.py"
OPTIM = "tests/rlhf/training/test_optim.py"
RESUMED_PPO = "tests/rlhf/training/test_resume.py"

MUTANTS = [
    # the plan of several GPUs
    Mutant(f"{RLHF}/planning/dry_run.py", "-(-size // self.gpus) if split else size", "size", SEVERAL_GPUS),
    Mutant(f"{RLHF}/planning/dry_run.py", "return -(-count // self.gpus)", "return count", SEVERAL_GPUS),
    Mutant(f"{RLHF}/planning/gathered.py", "NEIGHBORS = 2", "NEIGHBORS = 1", SEVERAL_GPUS),
    Mutant(f"{RLHF}/planning/gathered.py", "weight.nbytes + 4 * weight.numel()", "0", SEVERAL_GPUS),
    # a vocabulary split over ranks
    Mutant(f"{CORE}/vocab_shard.py", "share * (part.entropy - log_share)", "share * part.entropy", VOCAB_SHARD),
    Mutant(f"{CORE}/vocab_shard.py", "part.kl + log_share - log_ref_share", "part.kl + log_share", VOCAB_SHARD),
    Mutant(
        f"{CORE}/vocab_shard.py", "log_ref_share == -torch.inf, torch.inf", "log_ref_share > 0, torch.inf", VOCAB_SHARD
    ),
    Mutant(
        f"{CORE}/vocab_shard.py", "self._words[: self.rank].sum()", "self._words[: self.rank].sum() * 0", VOCAB_SHARD
    ),
    Mutant("ppo_fast/ops/linear_policy_loss.py", "shard.sum_(gradients.hidden)", "pass", VOCAB_SHARD),
    Mutant("ppo_fast/ops/linear_token_stats.py", "shard.sum_(total.hidden)", "pass", VOCAB_SHARD),
    Mutant(f"{CPU}/rows/backward.h", "max == -kInfinity ? top : top / t", "top / t", VOCAB_SHARD),
    # token_logprobs, token_stats, entropy: the definition and the op around it
    Mutant(f"{REFERENCE}/token_stats.py", "torch.where(p == 0, 0.0, p * x)", "(p * x)", TRAPS),
    Mutant(f"{REFERENCE}/token_stats.py", "(entropy[..., None] + u)", "(u - entropy[..., None])", STATS),
    Mutant(f"{REFERENCE}/token_stats.py", "(u - w.to(u.dtype) - kl[..., None])", "(u - w.to(u.dtype))", STATS),
    Mutant(f"{REFERENCE}/token_stats.py", "(grad / temperature)", "grad", STATS),
    Mutant(f"{REFERENCE}/token_stats.py", "torch.where(mask[..., None], grad, 0.0)", "grad * mask[..., None]", TRAPS),
    # sample_tokens
    Mutant(f"{REFERENCE}/sample_tokens.py", "(k1 + round_ * _WEYL[1])", "(k1 + round_ * _WEYL[0])", SAMPLE),
    Mutant(f"{REFERENCE}/sample_tokens.py", "torch.log1p(-x)", "(1 - x).log()", SAMPLE),
    Mutant(f"{REFERENCE}/sample_tokens.py", "larger = mass.cumsum(-1) - mass", "larger = mass.cumsum(-1)", SAMPLE),
    Mutant(f"{CPU}/simd/philox.h", "a.high ^ c3 ^ k1", "a.high ^ c3 ^ k0", SAMPLE),
    Mutant(f"{CPU}/rows/sample.h", "row.max != -kInfinity", "false", SAMPLE),
    Mutant(f"{CPU}/rows/sample.h", "p[0] * 0x1p33f", "p[0] * 0x1p3f", SAMPLE),
    Mutant(f"{CPU}/rows/sample.h", "(k > 0 ? mass(scratch, n) : sum)", "sum", SAMPLE),
    # policy_loss
    Mutant(
        f"{REFERENCE}/policy_loss.py", "is_clipped = clipped < unclipped", "is_clipped = clipped != unclipped", POLICY
    ),
    Mutant(
        f"{REFERENCE}/policy_loss.py",
        "torch.where(adv < 0, policy.dual_clip * adv",
        "torch.where(adv > 0, policy.dual_clip * adv",
        POLICY,
    ),
    Mutant(
        f"{REFERENCE}/policy_loss.py",
        "r.clamp(1.0 - policy.clip_low, 1.0 + policy.clip_high)",
        "r.clamp(1.0 - policy.clip_high, 1.0 + policy.clip_low)",
        POLICY,
    ),
    Mutant(f"{REFERENCE}/policy_loss.py", "d_log_r = d_log_r + policy.penalty_coef * (r - 1)", "pass", POLICY),
    Mutant(f"{REFERENCE}/policy_loss.py", "d_entropy = -weights * policy", "d_entropy = weights * policy", POLICY),
    Mutant(f"{REFERENCE}/policy_loss.py", "torch.where(inside, d_log_r, 0.0)", "d_log_r", POLICY),
    Mutant(f"{REFERENCE}/policy_loss.py", "(r.clamp(low, high) * adv)", "(r * adv)", POLICY),
    Mutant("ppo_fast/rlhf/ppo/rewards.py", "if kl.config.in_reward and (", "if (", PLACEMENT),
    Mutant(
        "ppo_fast/rlhf/ppo/update.py", 'settings |= {"kl_coef": self.kl_coef} if kl', "settings |= {} if kl", PLACEMENT
    ),
    Mutant(f"{REFERENCE}/policy_loss.py", "d_logprobs - weights * objective.d_logprobs", "d_logprobs", POLICY),
    Mutant(f"{REFERENCE}/policy_loss.py", "(r < low) | (r > high)", "r > high", POLICY),
    Mutant(
        f"{REFERENCE}/policy_loss.py", "torch.where(factor == 0, 0.0, factor * logprobs)", "factor * logprobs", POLICY
    ),
    Mutant("ppo_fast/ops/_core/config.py", 'self.objective == "cispo" and', "False and", ERRORS),
    Mutant("ppo_fast/rlhf/config/objective.py", '("objective", "clip_low",', '("clip_low",', CONFIG),
    Mutant(f"{REFERENCE}/sequences.py", "position, right=True", "position, right=False", POLICY),
    Mutant(f"{REFERENCE}/sequences.py", "(lengths > 0).sum()", "torch.ones_like(lengths).sum()", POLICY),
    # value_loss
    Mutant(f"{REFERENCE}/value_loss.py", "torch.maximum(", "torch.minimum(", VALUE),
    Mutant(
        f"{REFERENCE}/value_loss.py",
        "torch.clamp(v, old - clip, old + clip)",
        "torch.clamp(v, old - clip, old + 2 * clip)",
        VALUE,
    ),
    Mutant(f"{REFERENCE}/value_loss.py", "(grad_values * grad_loss)", "grad_values", VALUE),
    Mutant(
        f"{TRITON}/value_loss.py", "clamped(v, old - clip, old + clip)", "old + clamped(v - old, -clip, clip)", VALUE
    ),
    Mutant(f"{CPU}/rows/value.h", "out.old == out.old ? out.value : out.old", "out.value", MANNERS),
    # preference_loss, dpo_loss
    Mutant("ppo_fast/ops/preference.py", "gap - margin.detach()", "gap + margin.detach()", PREFERENCE),
    Mutant("ppo_fast/ops/preference.py", "margin.detach()", "margin", PREFERENCE),
    Mutant("ppo_fast/ops/preference.py", "beta * (chosen - old_chosen.detach())", "beta * chosen", PREFERENCE),
    Mutant("ppo_fast/ops/preference.py", "(rejected - old_rejected.detach())", "(rejected - old_rejected)", PREFERENCE),
    Mutant("ppo_fast/ops/preference.py", "(gap > 0)", "(gap >= 0)", PREFERENCE),
    Mutant("ppo_fast/ops/preference.py", "max(x.numel(), 1)", "x.numel()", PREFERENCE),
    # gae
    Mutant(f"{REFERENCE}/gae.py", "(gamma * lam) * torch.where(done[:, t], 0.0, adv)", "(gamma * lam) * adv", GAE),
    Mutant(f"{REFERENCE}/gae.py", "torch.where(step, values[:, t], next_value)", "values[:, t]", GAE),
    Mutant(f"{REFERENCE}/gae.py", "boot[:, -1] = bootstrap.to(dtype)", "pass", GAE),
    Mutant(
        f"{REFERENCE}/gae.py",
        "torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[1:] - 1, N)",
        "(cu_seqlens[1:] - 1).clamp(min=0)",
        GAE,
    ),
    # whiten, kl_estimate
    Mutant("ppo_fast/ops/masked.py", "(count - 1).clamp(min=1)", "count.clamp(min=1)", MASKED),
    Mutant(f"{REFERENCE}/policy_loss.py", "return rise - clamped, ", "return rise + clamped, ", MASKED),
    # the Triton kernels, interpreted
    Mutant(f"{TRITON}/device.py", "factor * (w + shift * s)", "factor * w", STATS),
    Mutant(f"{TRITON}/device.py", "tl.constexpr(-3.4028234663852886e38)", "tl.constexpr(0.0)", TRAPS),
    Mutant(f"{TRITON}/token_stats_backward.py", "(g_kl - g_entropy)", "-g_entropy", STATS),
    Mutant(f"{TRITON}/policy_terms.py", "is_clipped = clipped < unclipped", "is_clipped = clipped > unclipped", POLICY),
    Mutant(f"{TRITON}/policy_terms.py", "slope += penalty * rise", "slope += 0.0", POLICY),
    Mutant(f"{TRITON}/policy_loss.py", "0.0, slope) - at_constant_r", "0.0, slope - at_constant_r)", POLICY),
    Mutant(f"{TRITON}/policy_terms.py", "(clamped(r, low, high) * adv)", "(clamped(r, low, high) * -adv)", POLICY),
    Mutant(
        f"{TRITON}/policy_sequences.py", "slopes += tl.where(counted, weight * slope, 0.0)", "slopes += slope", LOSSES
    ),
    Mutant(f"{TRITON}/sequences.py", "number(denominator) * divisor", "number(denominator)", LOSSES),
    Mutant(f"{TRITON}/totals.py", "tl.where(index < 2, loss_count, count)", "count", LOSSES),
    Mutant(f"{TRITON}/gae.py", "tl.where(passes2, value1, value2)", "value2", GAE),
    # the C++ kernels
    Mutant(f"{CPU}/rows/policy.h", "(ratio < args.low) | (ratio > args.high)", "ratio > args.high", POLICY),
    Mutant(
        f"{CPU}/rows/policy.h",
        "inside_clamp(raw, d_log_ratio) + objective.d_logprob",
        "inside_clamp(raw, d_log_ratio + objective.d_logprob)",
        POLICY,
    ),
    Mutant(f"{CPU}/rows/forward.h", "factor * (sums.weighted - delta * sums.sum)", "factor * sums.weighted", NATIVE),
    Mutant(f"{CPU}/rows/forward.h", "sums.cross += delta * sums.sum;", ";", NATIVE),
    Mutant(f"{CPU}/rows/backward.h", "grads.grad_kl - grads.grad_entropy;", "-grads.grad_entropy;", NATIVE),
    # supervised fine-tuning, reward model, DPO
    # optimizers of bfloat16 weights
    Mutant(f"{RLHF}/training/adamw.py", "            torch._foreach_copy_([*chunk], masters)\n", "", OPTIM),
    Mutant(f"{RLHF}/training/adamw.py", ' | {"masters": self.masters}', ' | {"masters": []}', OPTIM),
    Mutant(f"{RLHF}/training/adamw_8bit.py", "count += 1 - keep", "count += 1", OPTIM),
    Mutant(f"{RLHF}/training/adamw_8bit.py", '        self.draws = state_dict["draws"]\n', "", OPTIM),
    Mutant(f"{REFERENCE}/adamw_8bit.py", "torch.where(keep > 0, old, changed)", "changed", OPTIM),
    Mutant(f"{REFERENCE}/adamw_8bit.py", "noise(first, len(value), seed, value.device)", "0x8000", OPTIM),
    Mutant(f"{REFERENCE}/adamw_8bit.py", "* highest + 0.5", "* highest", OPTIM),
    Mutant(f"{REFERENCE}/adamw_8bit.py", "square = root * root", "square = root", OPTIM),
    Mutant(f"{REFERENCE}/adamw_8bit.py", "SMALLEST_SCALE = 1e-30", "SMALLEST_SCALE = 1e-3", OPTIM),
    Mutant(f"{REFERENCE}/adamw_8bit.py", "code.clamp_min(1)", "code", OPTIM),
    Mutant(f"{TRITON}/adamw_8bit.py", "tl.where(keep == 0.0, n_blocks, 0)", "n_blocks", ADAMW),
    Mutant(f"{TRITON}/adamw_8bit.py", "(x >> 15)", "(x >> 14)", ADAMW),
    Mutant(f"{RLHF}/training/optim.py", "self.last_norm = self.norm", "pass", IN_BACKWARD),
    Mutant(
        f"{RLHF}/training/optim.py",
        ' | {"last_norm": self.last_norm}',
        ' | {"last_norm": self.last_norm * 0}',
        IN_BACKWARD,
    ),
    Mutant(f"{RLHF}/training/optim.py", "scale * self.loss_scale", "scale", FLOAT16),
    Mutant(f"{RLHF}/data/packing.py", "count + size <= tokens", "count <= tokens", BATCHES),
    Mutant(f"{RLHF}/training/optim.py", ", dtype=torch.float32)]", ")]", OPTIM),
    Mutant(f"{RLHF}/training/runtime.py", "if p.requires_grad and p.dtype in lost", "if p.dtype in lost", OPTIM),
    # attention over packed rows
    Mutant(f"{RLHF}/models/attention.py", "sliding_window - 1, 0)", "sliding_window, 0)", ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", "x.repeat_interleave(groups, dim=1)", "x.repeat(1, groups, 1)", ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", ' | {"attention_mask": cu_seqlens.new_empty((1, 1, 0, 0))}', "", ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", "back <= window_size[0])", "back <= window_size[0] + 1)", ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", '{"is_causal": mask is None', '{"is_causal": False', ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", " and _use_by_sequence(model, device)", " and False", ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", "if others.get(name) is not None", "if False", ATTENTION),
    Mutant(f"{RLHF}/models/attention.py", " > allowed:", " > 1e9:", ATTENTION),
    Mutant(
        f"{RLHF}/decoding/generate.py",
        "model.generation_config, inner.generation_config = own",
        "model.generation_config = own[0]",
        ROLLOUT,
    ),
    Mutant(f"{RLHF}/supervised/train.py", "linear=linear)", "linear=True)", RESUMED),
    # sampling in slots
    Mutant(f"{RLHF}/decoding/schedule.py", "snapshot > self.slots[index].since and ", "", SLOTS),
    Mutant(f"{RLHF}/decoding/schedule.py", "free.remove(holder)", "free.append(holder)", SLOTS),
    Mutant(f"{RLHF}/decoding/schedule.py", "self.slots[target] = self.slots[source]", "pass", SLOTS),
    Mutant(f"{RLHF}/decoding/cache.py", "latest = self.positions[:, None]", "latest = self.length", SLOTS),
    Mutant(f"{RLHF}/decoding/cache.py", "at > latest - window", "at >= latest - window", SLOTS),
    Mutant(f"{RLHF}/decoding/attention.py", "module.forward = own", "pass", SLOTS),
    Mutant(f"{RLHF}/decoding/slots.py", "x.clone() for x in responses", "x for x in responses", SLOTS),
    Mutant(f"{RLHF}/decoding/vllm_engine.py", "self._check_load(requests, settings)\n", "pass\n", VLLM),
    Mutant(f"{RLHF}/decoding/vllm_engine.py", "self.llm.reset_prefix_cache()", "pass", VLLM),
    Mutant(
        f"{RLHF}/decoding/cache.py",
        "(back < window) if window is not None else back >= 0\n        return",
        "True\n        return",
        SLOTS,
    ),
    Mutant(f"{RLHF}/decoding/cache.py", "at[self.start :, None] - at", "at[: length - self.start, None] - at", SLOTS),
    Mutant(f"{RLHF}/decoding/step.py", "torch.where((found == 0) & ends", "torch.where(ends", SLOTS),
    Mutant(f"{RLHF}/decoding/step.py", "clamp(max=state.longest)", "clamp(max=state.longest - 1)", SLOTS),
    Mutant(f"{RLHF}/decoding/requests.py", "(found > 0) & (found <= limits)", "found > 0", SLOTS),
    Mutant(f"{RLHF}/decoding/attention.py", "SLOTS if own in WITHOUT_SOFTCAP else SOFTCAPPED", "SOFTCAPPED", SLOTS),
    # micro-batches
    Mutant(f"{RLHF}/data/packing.py", "- starts.repeat(lengths)", "", BATCHES),
    Mutant(
        f"{RLHF}/data/packing.py",
        "rank[self.loss_mask[rows, 1:].ravel()]",
        "rank[self.counted[rows, :-1].ravel()]",
        BATCHES,
    ),
    Mutant(f"{RLHF}/data/packing.py", "self.attention[rows].sum(axis=1).argsort", "rows.argsort", UPDATE),
    Mutant(f"{RLHF}/data/packing.py", "None if attention.all() else", "None if True else", BATCHES),
    Mutant(
        f"{RLHF}/data/packing.py", "(attention.cumsum(axis=1) - 1).clip(min=0)", "attention.cumsum(axis=1)", BATCHES
    ),
    Mutant(f"{RLHF}/data/packing.py", "offsets(lengths[lengths > 0])", "offsets(lengths)", BATCHES),
    Mutant(f"{RLHF}/data/packing.py", "first + 1 : last + 1", "first:last", BATCHES),
    Mutant(
        f"{RLHF}/models/forward.py",
        "(index // width + 1) * (width - logits_to_keep)",
        "(width - logits_to_keep)",
        BATCHES,
    ),
    Mutant(f"{RLHF}/ppo/update.py", "int((lengths > 0).sum())", "tokens", UPDATE),
    Mutant(f"{RLHF}/ppo/update.py", "(self.config.loss.vf_coef * error.loss)", "error.loss", UPDATE),
    Mutant(f"{RLHF}/ppo/update.py", "loss.loss + self.config.loss.vf_coef * error", "loss.loss + error", SHARED),
    Mutant(f"{RLHF}/ppo/update.py", '"kl_estimator": kl.loss_estimator', '"kl_estimator": "k2"', UPDATE),
    Mutant(f"{RLHF}/ppo/update.py", " if step.epoch == good[-1].epoch", "", UPDATE),
    Mutant(
        f"{RLHF}/ppo/train.py",
        "                stats = self.learner.update(experience, self.kl.coef, update, self.generator)\n",
        "                self.kl.update(rollout.sums(rewards.kl))\n"
        "                stats = self.learner.update(experience, self.kl.coef, update, self.generator)\n",
        "tests/rlhf/ppo/test_train.py",
    ),
    Mutant(
        f"{RLHF}/ppo/rewards.py",
        "for source in weighted]).argmin",
        "for source in scores]).argmin",
        "tests/rlhf/ppo/test_rewards.py",
    ),
    Mutant(f"{RLHF}/ppo/scoring.py", "models.value is not None and models.shared else", "False else", SHARED),
    Mutant(
        f"{RLHF}/ppo/advantages.py",
        "offsets(lengths)[:-1].repeat(lengths)",
        "offsets(lengths)[1:].repeat(lengths) - 1",
        ADVANTAGES,
    ),
    Mutant(f"{RLHF}/ppo/advantages.py", "torch.where(left >= step,", "torch.where(left >= 0,", ADVANTAGES),
    Mutant(f"{RLHF}/ppo/advantages.py", "        _, returns = _gae(", "        _gae(", ADVANTAGES),
    Mutant(f"{RLHF}/ppo/update.py", "schedule(step - self.warmup,", "schedule(step,", WARMUP),
    Mutant(
        f"{RLHF}/ppo/update.py",
        "            with torch.set_grad_enabled(not self.warming_up):\n                x = ",
        "            if True:\n                x = ",
        WARMUP,
    ),
    Mutant(
        f"{RLHF}/ppo/update.py",
        "        if not self.warming_up:\n            self.penalty",
        "        if True:\n            self.penalty",
        WARMUP,
    ),
    Mutant(f"{RLHF}/ppo/train.py", "if not self.learner.warming_up:", "if True:", WARMUP),
    # group advantages
    Mutant(f"{RLHF}/ppo/advantages.py", "(count / others)[rows] if", "(others / count)[rows] if", GROUPS),
    Mutant(
        f"{RLHF}/ppo/advantages.py",
        "response_sums(centered**2, lengths) / others",
        "response_sums(centered**2, lengths) / count",
        GROUPS,
    ),
    Mutant(
        f"{RLHF}/ppo/advantages.py",
        "torch.where(agreeing(returns, groups)[rows], 0.0, advantages)",
        "advantages",
        GROUPS,
    ),
    Mutant(
        f"{RLHF}/ppo/dynamic_sampling.py",
        "attention_mask=_padded(x.prompts.attention_mask, (left, 0)",
        "attention_mask=_padded(x.prompts.attention_mask, (0, left)",
        GROUPS,
    ),
    Mutant(
        f"{RLHF}/ppo/dynamic_sampling.py",
        "token_indices(lengths, order,",
        "token_indices(lengths, np.arange(len(order)),",
        GROUPS,
    ),
    Mutant(
        f"{RLHF}/ppo/train.py",
        "make_experience(*learned,",
        "make_experience(rollout, rewards,",
        "tests/rlhf/ppo/test_train.py",
    ),
    Mutant(
        f"{RLHF}/ppo/rewards.py",
        "(lengths - (longest - buffer)).float() / buffer",
        "(lengths - longest + 1).float() / buffer",
        "tests/rlhf/ppo/test_rewards.py",
    ),
    # pre-training of the value model
    Mutant(f"{RLHF}/critic.py", "np.arange(n)[::-1]", "np.arange(n)", CRITIC),
    Mutant(
        f"{RLHF}/data/examples.py", 'example.ids if row.get("ended", True) else example.ids[:-1]', "example.ids", CRITIC
    ),
    Mutant(
        f"{RLHF}/supervised/train.py", "(share * output.loss)", "(output.loss * len(micro) / len(examples))", SUPERVISED
    ),
    Mutant(f"{RLHF}/supervised/train.py", "share * part[name] for", "part[name] / len(parts) for", SUPERVISED),
    Mutant(f"{RLHF}/supervised/train.py", "schedule(index,", "schedule(index + 1,", SUPERVISED),
    Mutant(f"{RLHF}/supervised/train.py", "for row in order[count:]]", "for row in order]", SUPERVISED),
    Mutant(f"{RLHF}/supervised/train.py", "        require_finite(**metrics, grad_norm=norm)\n", "", SUPERVISED),
    Mutant(f"{RLHF}/supervised/train.py", "step(factor, failed)", "step(factor)", RESUMED),
    Mutant(f"{RLHF}/supervised/train.py", '{"batches": self.batches, "network"', '{"network"', RESUMED),
    Mutant(f"{RLHF}/supervised/train.py", ', "network": self.network}', "}", RESUMED),
    Mutant(f"{RLHF}/supervised/train.py", '"held-out examples": self.data.held_out}', "}", RESUMED),
    Mutant(
        f"{RLHF}/supervised/train.py", "        load_saved(self.objective.model, directory, ", "        print(", RESUMED
    ),
    Mutant(f"{RLHF}/ppo/train.py", '"reference", "monitors", "scorer"', '"reference", "scorer"', RESUMED_PPO),
    Mutant(f"{RLHF}/training/resume.py", "    for row in rows:", "    for row in [*rows][:1]:", RESUMED_PPO),
    Mutant(
        f"{RLHF}/training/resume.py", 'f"columns of the {kind}prompts": data.columns.items()', '"": ()', RESUMED_PPO
    ),
    Mutant(f"{RLHF}/training/lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", LOCK),
    Mutant(f"{RLHF}/training/lock.py", "os.register_at_fork(after_in_child=_let_go)", "", LOCK),
    Mutant(f"{RLHF}/files.py", "        _follow_umask(scratch)\n", "", CHECKPOINT),
    Mutant(f"{RLHF}/files.py", "    target = target.resolve()\n    target.parent", "    target.parent", CHECKPOINT),
    Mutant(f"{RLHF}/user_code.py", "_copied(value) for name", "value for name", "tests/rlhf/ppo/test_rewards.py"),
    Mutant(f"{RLHF}/supervised/train.py", 'resume, "optim.epochs")', 'resume, "log")', RESUMED),
    # damage
    Mutant(f"{RLHF}/training/log.py", "            os.fsync(file.fileno())\n", "            pass\n", DAMAGE),
    Mutant(f"{RLHF}/training/log.py", "    file.flush()\n", "", DAMAGE),
    Mutant(f"{RLHF}/integrity.py", "        if digest(directory / name) != expected:", "        if False:", DAMAGE),
    Mutant(
        f"{RLHF}/integrity.py", 'if content.pop("digest") != ', 'if content.pop("digest") == 0 or False and ', DAMAGE
    ),
    Mutant(f"{RLHF}/integrity.py", "        if expected != got:", "        if False:", DAMAGE),
    Mutant(f"{RLHF}/training/optim.py", "check_tensors(own, moments, ", "print(", DAMAGE),
    Mutant(
        f"{RLHF}/models/pretrained.py",
        'sorted(name for name in info["missing_keys"] if',
        "sorted(name for name in () if",
        DAMAGE,
    ),
    Mutant(
        f"{RLHF}/training/checkpoint.py",
        "[*filter(is_complete, _numbered(checkpoints))]",
        "_numbered(checkpoints)",
        DAMAGE,
    ),
    Mutant(f"{RLHF}/training/checkpoint.py", "        path.rename(superseded)\n", "", RESUMED),
    Mutant(f"{RLHF}/training/loop.py", "        restore_rng(", "        print(", RESUMED),
    Mutant(f"{RLHF}/training/loop.py", 'state["skipped"]', "0", RESUMED),
    Mutant(f"{RLHF}/training/loop.py", "        if self.total < done:", "        if False:", RESUMED),
    Mutant(f"{RLHF}/training/loop.py", "every == 0 or finished", "every == 0", RESUMED),
    Mutant(f"{RLHF}/training/signals.py", "if late and not finished", "if late", RESUMED_PPO),
    Mutant(f"{RLHF}/ppo/update.py", "if not experience.lengths[rows].any():", "if False:", CORRECTION),
    Mutant(f"{RLHF}/ppo/update.py", "step = len(steps) + empty", "step = len(steps)", CORRECTION),
    Mutant(f"{RLHF}/training/best.py", "self.best, self.worse = value, 0", "self.best = value", EVALUATION),
    Mutant(f"{RLHF}/training/best.py", "self.sign * value <=", "self.sign * value <", BEST),
    Mutant(f"{RLHF}/supervised/train.py", "or self.evaluation.best.exhausted", "", BEST),
    Mutant(f"{RLHF}/supervised/train.py", 'parts["best"] = self.evaluation.best', "pass", BEST),
    Mutant(f"{RLHF}/supervised/train.py", '(config.best or "").endswith("loss")', "False", BEST),
    Mutant(f"{RLHF}/training/optim.py", "math.cos(math.pi * share)", "math.cos(share)", UPDATE),
    Mutant(
        f"{RLHF}/training/loop.py", "            if found != state", "            if False and found != state", RESUMED
    ),
    Mutant(f"{RLHF}/training/loop.py", "keep_last=self.config.checkpoint.keep", "keep_last=0", RESUMED),
    Mutant(f"{RLHF}/training/loop.py", "            self.skipped += 1\n", "", RESUMED),
    Mutant(
        f"{RLHF}/config/files.py",
        'f"{name}." for name in free',
        "name for name in free",
        "tests/rlhf/config/test_config.py",
    ),
    Mutant(
        f"{RLHF}/models/value.py",
        "torch.where(attention_mask, position, 0)",
        "torch.where(attention_mask, 0, 0)",
        REWARD,
    ),
    Mutant(f"{RLHF}/models/reward.py", "weight / (config.hidden_size + 1) ** 0.5", "weight", REWARD),
    Mutant(f"{RLHF}/models/reward.py", "None if tokenizer.pad_token_id == tokenizer.eos_token_id else ", "", REWARD),
    Mutant(
        f"{RLHF}/supervised/reward_model.py",
        "(*self._scores(model, batch), margin=margins)",
        "(*self._scores(model, batch))",
        REWARD,
    ),
    Mutant(
        f"{RLHF}/supervised/reward_model.py",
        "chosen, rejected, margin=self._margins(pairs)",
        "chosen, rejected",
        REWARD,
    ),
    Mutant(f"{RLHF}/supervised/reward_model.py", "torch.sigmoid(gaps.abs())", "torch.sigmoid(gaps)", REWARD),
    Mutant(f"{RLHF}/supervised/dpo.py", "Root(reference=self.reference)", "Root(reference=self.model)", SUPERVISED),
    Mutant(f"{RLHF}/supervised/dpo.py", "*reference, beta=self.beta", "*reference", SUPERVISED),
    Mutant(f"{RLHF}/supervised/dpo.py", "copy.deepcopy(loaded.model)", "loaded.model", SUPERVISED),
    # several ranks
    Mutant(f"{RLHF}/models/sharding.py", "            module.set_gradient_divide_factor(1.0)\n", "", SHARDING),
    Mutant(
        f"{RLHF}/models/sharding.py",
        "            self.reshard()  # fully_shard",
        "            pass  # fully_shard",
        RUNS,
    ),
    Mutant(
        f"{RLHF}/models/sharding.py", "            _forget_passes(self)\n        return", "        return", SHARDING
    ),
    Mutant(f"{RLHF}/models/distribution.py", "empty.setdefault(first, ", "empty.setdefault(name, ", SHARDING),
    Mutant(f"{RLHF}/models/distribution.py", "        found.copy_(x)\n", "        pass\n", SHARDING),
    Mutant(f"{RLHF}/models/distribution.py", "x[rank * each : (rank + 1) * each]", "x[:each]", SHARDING),
    Mutant(f"{RLHF}/models/adapters.py", "self.without_data and current().mesh is None", "self.without_data", SHARDING),
    Mutant(f"{RLHF}/models/networks.py", "network.generation_config = Gen", "Gen", SHARDING),
    Mutant(f"{RLHF}/ppo/update.py", "loss * 0 if self.repeats else loss", "loss", SHARDING),
    Mutant(f"{RLHF}/ppo/update.py", "zeros_like(policy), zeros_like(value)", "policy, value", SHARDING),
    Mutant(f"{RLHF}/training/optim.py", "norm if total is squares else total.sqrt()", "norm", SHARDING),
    Mutant(f"{RLHF}/supervised/train.py", "        yield 0.0, (own or", "        yield 1.0, (own or", RUNS),
    Mutant(f"{RLHF}/ppo/rollout.py", "requests[own.start : own.stop]", "requests[: len(own)]", RUNS),
    # an error of one rank
    Mutant(f"{RLHF}/world.py", "if isinstance(each, Failure):", "if False:", SHARDING),
    Mutant(f"{RLHF}/world.py", "self._objects(Failure(sent), PATIENCE)", "self._objects(Failure(sent))", KILLED),
    Mutant(f"{RLHF}/world.py", "if origin_of(error) is not None or is_lost(error):", "if False:", SHARDING),
    Mutant(f"{RLHF}/world.py", "                raise first from error\n", "                raise error\n", SHARDING),
    Mutant(
        f"{RLHF}/training/streaming.py",
        "        except Exception:\n            _take_part(whole)\n",
        "        except Exception:\n",
        ONE_RANK_FAILS,
    ),
    Mutant(
        f"{RLHF}/training/checkpoint.py",
        "world.each(held.pop_all().close)",
        "held.pop_all().close()",
        ONE_RANK_FAILS,
    ),
    Mutant(
        f"{RLHF}/training/checkpoint.py",
        "world.on_main(lambda: _prune(target.parent, keep_last))",
        "_prune(target.parent, keep_last) if world.is_main else None",
        ONE_RANK_FAILS,
    ),
    Mutant(
        f"{RLHF}/training/loop.py",
        "hook(record) if callback.collective else current().each(lambda: hook(record))",
        "hook(record)",
        ONE_RANK_FAILS,
    ),
    Mutant(
        f"{RLHF}/training/loop.py", "world.each(lambda: self._state(log, rng))", "self._state(log, rng)", ONE_RANK_FAILS
    ),
    Mutant(
        f"{RLHF}/training/loop.py",
        "current().each(checked(lambda: self._restore(start)))",
        "checked(lambda: self._restore(start))()",
        ONE_RANK_FAILS,
    ),
    Mutant(f"{RLHF}/training/resume.py", "if value != first[name]:", "if False:", ONE_RANK_FAILS),
    Mutant(f"{RLHF}/data/prompts.py", "@by_all_ranks\n", "", ONE_RANK_FAILS),
    # tokens, templates and heads
    Mutant(f"{RLHF}/models/loading.py", "        named += ids if isinstance(ids, list | tuple) else [ids]\n", "", EOS),
    Mutant(f"{RLHF}/data/examples.py", "token == eos or token in eos_ids", "token == eos", EOS),
    Mutant(
        f"{RLHF}/ppo/reward_sources.py", "ids[-1] not in self.eos_ids", "ids[-1] != self.tokenizer.eos_token_id", EOS
    ),
    Mutant(f"{RLHF}/ppo/reward_sources.py", " if responses.ended[row] else ids\n", "\n", TEMPLATES),
    Mutant(f"{RLHF}/data/templates.py", "    ids = ids[:-1] if appended else ids\n", "", TEMPLATES),
    Mutant(f"{RLHF}/data/templates.py", "ids[1:] if doubled else ids", "ids", TEMPLATES),
    Mutant(f"{RLHF}/data/templates.py", " if item is not None", "", TEMPLATES),
    Mutant(f"{RLHF}/data/templates.py", "continue_final_message=True", "add_generation_prompt=True", TEMPLATES),
    Mutant(
        f"{RLHF}/models/forward.py", "torch.promote_types(head.weight.dtype, torch.float32)", "head.weight.dtype", HEADS
    ),
    # layouts and adapters
    Mutant(f"{RLHF}/models/adapters.py", "layer._disable_adapters = name is None", "pass", ADAPTERS),
    Mutant(f"{RLHF}/models/adapters.py", "            self._switch(before)", "            pass", ADAPTERS),
    Mutant(f"{RLHF}/models/adapters.py", "parameter.requires_grad_(flag)", "parameter.requires_grad_(True)", ADAPTERS),
    Mutant(f"{RLHF}/models/adapters.py", "a=5**0.5, generator=generator", "a=5**0.5", ADAPTERS),
    Mutant(f"{RLHF}/models/adapters.py", "[*(own.keys() ^ tensors.keys())][:1]", "()", ADAPTERS),
    Mutant(f"{RLHF}/models/adapter_files.py", "plain = value == default if", "plain = True if", ADAPTERS),
    Mutant(
        f"{RLHF}/models/adapter_files.py",
        "if name in defaults else not value",
        "if name in defaults else True",
        ADAPTERS,
    ),
    Mutant(f"{RLHF}/models/adapter_files.py", 'if kind != "LORA":', "if False:", ADAPTERS),
    Mutant(f"{RLHF}/models/adapters.py", "layer.get_base_layer().weight)] == 1", "layer)] == 0", ADAPTERS),
    Mutant(
        f"{RLHF}/models/adapter_layers.py",
        'increment_version(group["params"])',
        "increment_version(())",
        ADAPTER_LAYERS,
    ),
    Mutant(f"{RLHF}/models/adapter_layers.py", "and copy.parameter is factor", "", ADAPTER_LAYERS),
    Mutant(f"{RLHF}/models/adapter_layers.py", "dx.addmm_(low_grad, a)", "dx", ADAPTER_LAYERS),
    Mutant(f"{RLHF}/models/adapter_layers.py", "_scaled(dy, b, ctx.scale)", "_scaled(dy, b, 1.0)", ADAPTER_LAYERS),
    Mutant(f"{RLHF}/models/adapter_layers.py", "(x if dropped is None else dropped)", "x", ADAPTER_LAYERS),
    Mutant(f"{RLHF}/models/adapter_layers.py", " or name in layer.lora_variant", "", ADAPTER_LAYERS),
    Mutant(f"{RLHF}/models/adapter_layers.py", " or base._forward_hooks", "", ADAPTER_LAYERS),
    Mutant(
        f"{RLHF}/models/adapters.py",
        "        refresh(self.copies.get(name, ()) if name is not None else ())\n",
        "",
        ADAPTER_LAYERS,
    ),
    Mutant(f"{RLHF}/models/kernels.py", "        vars(module).update(own)\n", "        pass\n", KERNELS),
    Mutant(f"{RLHF}/models/kernels.py", "            vars(module).pop(name, None)\n", "            pass\n", KERNELS),
    Mutant(f"{RLHF}/models/kernels.py", "names = vars(module) | functions", "names = vars(module)", KERNELS),
    Mutant(
        f"{RLHF}/training/resume.py",
        'kernels="none") if begun_without',
        "kernels=config.kernels) if begun_without",
        KERNELS,
    ),
    Mutant(f"{RLHF}/models/networks.py", "layer.support_avx512bf16_for_cpu = False", "pass", ADAPTERS),
    Mutant(f"{RLHF}/models/loading.py", "            layer.training = training", "            pass", LAYOUTS),
    Mutant(f"{RLHF}/models/loading.py", "            layer.training = True", "            pass", LAYOUTS),
    Mutant(f"{RLHF}/models/offload.py", "            if not self._depth:", "            if True:", LAYOUTS),
    Mutant(f"{RLHF}/models/offload.py", ", copy=True)", ")", LAYOUTS),
    Mutant(f"{RLHF}/models/models.py", 'role == "value" and self.shared', "False", LAYOUTS),
    Mutant(f"{RLHF}/models/models.py", 'loaded.saved is not None or reference.update != "fixed"', "False", LAYOUTS),
    Mutant(f"{RLHF}/models/saved.py", "same_base(self.adapter.base, base)", "True", LAYOUTS),
    Mutant(f"{RLHF}/models/value.py", "head.bias.sub_(mean).div_(std)", "head.bias.div_(std)", LAYOUTS),
    Mutant(f"{RLHF}/models/reward.py", "functools.partial(adapters.active, name)", "contextlib.nullcontext", LAYOUTS),
    Mutant(f"{RLHF}/models/reward.py", "load(name, own, trained=False)", "load(name, own, trained=True)", LAYOUTS),
    Mutant(
        f"{RLHF}/supervised/dpo.py", "self.adapters.active(self.adapters.reference)", "nullcontext()", ADAPTER_STAGES
    ),
    Mutant(f"{RLHF}/supervised/reward_model.py", "score.float().requires_grad_(True)", "score.float()", ADAPTER_STAGES),
    # examples
    Mutant(
        f"{RLHF}/data/examples.py",
        "if end and not tokenizer.decode(ids[end:]).strip()",
        "if end == len(ids)",
        TEMPLATES,
    ),
    Mutant(
        f"{RLHF}/ppo/correction.py",
        "rollout.logprobs - rollout.sampled_logprobs\n    if",
        "0 * rollout.logprobs\n    if",
        CORRECTION,
    ),
    Mutant(f"{RLHF}/ppo/environment.py", ", call {self.calls}", "", ENVIRONMENT),
    Mutant(
        f"{RLHF}/ppo/environment.py", "[prompts.attention_mask, inside]", "[prompts.attention_mask, mask]", ENVIRONMENT
    ),
    Mutant(f"{RLHF}/user_code.py", "except (Exception, SystemExit, asyncio.CancelledError)", "except Exception", ASYNC),
    Mutant(f"{RLHF}/ppo/advantages.py", "loss_mask[loss_mask] = host", "pass", CORRECTION),
    Mutant(f"{RLHF}/ppo/update.py", '"importance_weights": micro.weights,', "", CORRECTION),
    Mutant(f"{RLHF}/data/examples.py", "else [*ids, eos]", "else ids", EXAMPLES),
    Mutant(f"{RLHF}/data/examples.py", "if not whole.startswith(before):", "if False:", EXAMPLES),
    Mutant(f"{RLHF}/data/examples.py", "joined = both[: len(start)] == start", "joined = True", EXAMPLES),
    Mutant(f"{RLHF}/data/examples.py", "(position >= start) & (position < end)", "position >= start", EXAMPLES),
    Mutant(f"{RLHF}/data/examples.py", "sorted(window, key=self.lengths.__getitem__)", "window", EXAMPLES),
    Mutant(f"{RLHF}/data/examples.py", "    if config.deduplicate:", "    if True:", EXAMPLES),
    Mutant(f"{RLHF}/data/examples.py", 'chosen.rfind(" ", 0, end)', "end", EXAMPLES),
    Mutant(
        f"{RLHF}/data/examples.py", ", len(chosen) - 1, len(rejected) - 1)", ", len(chosen), len(rejected))", EXAMPLES
    ),
    Mutant(f"{RLHF}/data/rows.py", "first.setdefault(key(item), item)", "first[key(item)] = item", EXAMPLES),
]


def _environment(mutant: Mutant) -> dict[str, str]:
    interpreted = {"TRITON_INTERPRET": "1"} if mutant.path.startswith(TRITON) else {}
    return os.environ | interpreted | {"OMP_NUM_THREADS": "1", "PPO_FAST_CUDA": "0", "PYTHONDONTWRITEBYTECODE": "1"}


def _passes(mutant: Mutant, tree: Path) -> bool:
    """Whether the mutant's tests pass in ``tree`` as it stands."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
    run = subprocess.run([*command, mutant.tests], cwd=tree, env=_environment(mutant), capture_output=True, check=False)
    if run.returncode not in (0, 1):
        sys.exit(f"{mutant.tests}: pytest ended with {run.returncode}")
    return run.returncode == 0


def survives(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests pass in spite of the fault."""
    path = tree / mutant.path
    source = path.read_text()
    if source.count(mutant.old) != 1:
        sys.exit(f"{mutant.path}: expected one {mutant.old!r}, found {source.count(mutant.old)}")
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        if mutant.path.startswith("csrc"):
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, env=_environment(mutant), check=True, capture_output=True)
        return _passes(mutant, tree)
    finally:
        path.write_text(source)


def main(words: list[str]) -> int:
    """Make each fault in turn; 1 when one survives."""
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.path} {m.old}" for word in words)]
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "*.egg-info", ".*_cache"))
        for mutant in {(m.tests, m.path.startswith(TRITON)): m for m in chosen}.values():
            if not _passes(mutant, tree):
                sys.exit(f"{mutant.tests}: expected to pass without a fault")
        alive = 0
        for mutant in sorted(chosen, key=lambda m: m.path.startswith("csrc")):
            survived = survives(mutant, tree)
            alive += survived
            print(f"{'SURVIVED' if survived else 'caught'}  {mutant.path}: {mutant.old} -> {mutant.new}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} caught")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
