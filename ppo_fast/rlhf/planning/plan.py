"""Plan the memory of a run: bytes by item and phase, and the settings to change if they are too many."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ppo_fast.rlhf.config.ppo import PPOConfig, check_ranks
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.saved import SavedModels
from ppo_fast.rlhf.planning.depth import measure
from ppo_fast.rlhf.planning.dry_run import DryRun
from ppo_fast.rlhf.planning.shapes import read_shapes
from ppo_fast.rlhf.planning.tracing import Breakdown

ITEMS = (
    "weights",
    "gathered weights",
    "adapters",
    "gradients",
    "optimizer states",
    "KV cache",
    "activations",
    "logits chunk",
    "fragmentation",
    "CUDA context",
)
# What comes and goes, and the share of it that CUDA's caching allocator is taken to lose between its blocks.
_VARYING, _LOST = ("gathered weights", "gradients", "KV cache", "activations", "logits chunk"), 0.05
# CUDA's own and the workspace of cuBLAS; an estimate, which differs between GPUs by a few hundred MiB.
_CONTEXT = 600 * 2**20
FEWEST_TOKENS = 64  # of a pass that is advised
ADAPTER_RANK = 64  # of the adapters that are advised
SettingValue = str | int | bool


@dataclass(frozen=True)
class Plan:
    """The fullest moment of each phase of a run."""

    phases: dict[str, Breakdown]  # bytes on the device by phase and item
    host: int  # bytes of models that wait in host memory
    limit: int | None  # bytes of the device; None: not known

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.phases[self.fullest].values())

    @property
    def fits(self) -> bool:
        return self.fits_in(self.phases)

    def fits_in(self, phases: Iterable[str]) -> bool:
        """Whether these phases fit."""
        found = (sum(self.phases.get(phase, {}).values()) for phase in phases)
        return self.limit is None or all(count <= self.limit for count in found)


@dataclass(frozen=True)
class Change:
    """A setting that lowers the peak, on top of those before it."""

    name: str
    value: SettingValue
    plan: Plan


def make_plan(
    config: PPOConfig,
    device: str,
    *,
    limit: int | None = None,
    shapes: SavedModels | None = None,
    prompt_tokens: int | None = None,
    gpus: int = 1,
) -> Plan:
    """Plan the run from the configs of its models, by a step on tensors without data.

    Args:
        device: type, "cpu" or "cuda"; it need not be there.
        limit: bytes of the device.
        shapes: configs of the models; None: read from where `config` says.
        prompt_tokens: of the longest prompt; None: as many as are allowed.
        gpus: over which torchrun splits the run; the plan is that of one of them.
    """
    if gpus > 1:
        check_ranks(config)
    shapes = shapes or read_shapes(config)
    longest = prompt_tokens or longest_prompt(config, shapes)
    peaks, host = measure(config, shapes, lambda models: DryRun(config, models, device, longest, gpus).run())
    overhead = _overhead if device == "cuda" else lambda breakdown: breakdown
    phases = {name: overhead(breakdown) for name, breakdown in peaks.items()}
    return Plan({name: _ordered(breakdown) for name, breakdown in phases.items()}, host, limit)


def longest_prompt(config: PPOConfig, shapes: SavedModels) -> int:
    """`data.max_prompt_tokens`, or the part of the model's context that the response leaves."""
    context = getattr(shapes.policy.config.get_text_config(), "max_position_embeddings", None)
    left = config.data.max_prompt_tokens if context is None else context - config.rollout.max_new_tokens
    if left < 1:
        raise UserError(
            f"rollout.max_new_tokens: expected less than the model's context of {context}, "
            f"got {config.rollout.max_new_tokens}"
        )
    return min(config.data.max_prompt_tokens, left)


def advise(config: PPOConfig, plan: Plan, **given: Any) -> Iterator[Change]:
    """Yield settings to change, each as it is found, until the run fits; the last may not suffice.

    `given` are arguments of `make_plan`.

    The order is that of the price: first what leaves the numbers as they are, by more and smaller passes and then by
    more time, then what rounds them, then what trains less.
    """
    replan = functools.partial(make_plan, limit=plan.limit, **given)
    for setting in (*_SETTINGS, *_SETTINGS):  # again, as the peak may have moved to another phase
        if plan.fits:
            break
        values = setting.values(config) if plan.fullest in setting.phases else ()
        if not values:
            continue
        tried = [_with_setting(config, setting.name, value) for value in values]
        index, found = _first_that_fits(tried, replan, setting.phases)
        if found.peak < plan.peak:
            config, plan = tried[index], found
            yield Change(setting.name, values[index], plan)


def _first_that_fits(
    configs: Sequence[PPOConfig], replan: Callable[[PPOConfig], Plan], phases: Sequence[str]
) -> tuple[int, Plan]:
    """The first in which these phases fit, or the last, with its plan; each needs less than the one before it."""
    low, high = 0, len(configs) - 1
    plan = replan(configs[high])
    while plan.fits_in(phases) and low < high:
        middle = (low + high) // 2
        tried = replan(configs[middle])
        if tried.fits_in(phases):
            high, plan = middle, tried
        else:
            low = middle + 1
    return high, plan


class Setting(NamedTuple):
    """A setting, and the values it may be turned to: the mildest first, none where it is turned already."""

    name: str
    values: Callable[[PPOConfig], Sequence[SettingValue]]
    phases: tuple[str, ...] = ("rollout", "scoring", "reward", "update")  # whose peak it lowers


def _smaller(size: int, whole: int) -> list[int]:
    """Batches of less than `size` that divide `whole`, each half of the one before it or less."""
    sizes = [n for n in range(size - 1, 0, -1) if whole % n == 0]
    kept = [size]
    for n in sizes:
        if 2 * n <= kept[-1]:
            kept.append(n)
    return kept[1:]


def _update_sizes(config: PPOConfig) -> list[int]:
    whole, optim = config.optim.minibatch_size, config.optim
    return [] if optim.tokens_per_pass else _smaller(optim.micro_batch_size or whole, whole)


def _rollout_sizes(config: PPOConfig) -> list[int]:
    whole, rollout = config.rollout.batch_size, config.rollout
    return [] if rollout.tokens_per_pass else _smaller(rollout.micro_batch_size or whole, whole)


def _halves(tokens: int | None) -> list[int]:
    return [tokens >> n for n in range(1, tokens.bit_length()) if tokens >> n >= FEWEST_TOKENS] if tokens else []


def _eight_bits(config: PPOConfig) -> list[str]:
    full = config.optim.name == "adamw" and not config.optim.master_weights
    return ["adamw_8bit"] if full and config.model.layout != "adapters" else []


def _recomputing(config: PPOConfig) -> list[bool]:
    return [] if config.model.gradient_checkpointing else [True]


def _offload(config: PPOConfig) -> list[bool]:
    idle = config.model.layout != "adapters" or bool(config.reward.models)
    return [True] if idle and not config.model.offload else []


def _offload_activations(config: PPOConfig) -> list[bool]:
    recomputing = config.model.gradient_checkpointing  # which costs less
    return [True] if recomputing and not config.model.offload_activations else []


def _four_bits(config: PPOConfig) -> list[bool]:
    base = config.model.layout == "adapters" and not config.model.lora.merge
    return [True] if base and not config.model.load_in_4bit else []


_SETTINGS = (
    Setting("model.fused_head", lambda config: [] if config.model.fused_head else [True]),
    Setting("optim.micro_batch_size", _update_sizes, ("update",)),
    Setting("optim.tokens_per_pass", lambda config: _halves(config.optim.tokens_per_pass), ("update",)),
    Setting("rollout.micro_batch_size", _rollout_sizes, ("rollout", "scoring", "reward")),
    Setting("rollout.tokens_per_pass", lambda config: _halves(config.rollout.tokens_per_pass), ("scoring",)),
    Setting("model.gradient_checkpointing", _recomputing, ("update",)),
    Setting("model.offload", _offload),
    Setting("model.offload_activations", _offload_activations, ("update",)),
    Setting("optim.name", _eight_bits),
    Setting("model.dtype", lambda config: ["bfloat16"] if config.model.dtype == "float32" else []),
    Setting("model.layout", lambda config: [] if config.model.layout == "adapters" else ["adapters"]),
    Setting("model.load_in_4bit", _four_bits),
)


def _with_setting(config: PPOConfig, name: str, value: SettingValue) -> PPOConfig:
    group, _, field = name.partition(".")
    fields: dict[str, object] = {field: value}
    if value == "adapters":  # which say no more where the critic begins, and need a rank
        fields |= {"value_path": None, "lora": dataclasses.replace(config.model.lora, rank=ADAPTER_RANK)}
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


def _overhead(breakdown: Breakdown) -> Breakdown:
    lost = int(_LOST * sum(breakdown.get(item, 0) for item in _VARYING))
    return breakdown | {"fragmentation": lost, "CUDA context": _CONTEXT}


def _ordered(breakdown: Breakdown) -> Breakdown:
    return {item: breakdown[item] for item in ITEMS if breakdown.get(item)}
