"""Where the memory of a run goes, before the run: bytes by item and phase, and what to change if they are too many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import PPOConfig
from .errors import UserError
from .rehearsal import Rehearsal
from .shapes import Shapes, read_shapes
from .tracing import Account

ITEMS = (
    "weights",
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
_VARYING, _LOST = ("gradients", "KV cache", "activations", "logits chunk"), 0.05
# CUDA's own and the workspace of cuBLAS; an estimate, which differs between GPUs by a few hundred MiB.
_CONTEXT = 600 * 2**20


@dataclass(frozen=True)
class Plan:
    """The fullest moment of each phase of a run."""

    phases: dict[str, Account]  # bytes on the device by phase and item
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
        return self.limit is None or self.peak <= self.limit


@dataclass(frozen=True)
class Change:
    """A setting that lowers the peak, on top of those before it."""

    name: str
    value: Any
    plan: Plan


def make_plan(
    config: PPOConfig,
    device: str,
    *,
    limit: int | None = None,
    shapes: Shapes | None = None,
    prompt_tokens: int | None = None,
) -> Plan:
    """Plan the run from the configs of its models alone, by a step on tensors without data.

    Args:
        device: type, "cpu" or "cuda"; it need not be there.
        limit: bytes of the device.
        shapes: configs of the models; None: read from where `config` says.
        prompt_tokens: of the longest prompt; None: as many as are allowed.
    """
    shapes = shapes or read_shapes(config)
    longest = prompt_tokens or longest_prompt(config, shapes)
    timeline = Rehearsal(config, shapes, device, longest).run()
    overhead = _overhead if device == "cuda" else lambda account: account
    phases = {name: overhead(account) for name, account in timeline.peaks().items()}
    return Plan({name: _ordered(account) for name, account in phases.items()}, timeline.aside, limit)


def longest_prompt(config: PPOConfig, shapes: Shapes) -> int:
    """`data.max_prompt_tokens`, or what the model's context leaves beside the response."""
    context = getattr(shapes.policy.get_text_config(), "max_position_embeddings", None)
    left = config.data.max_prompt_tokens if context is None else context - config.rollout.max_new_tokens
    if left < 1:
        raise UserError(
            f"rollout.max_new_tokens: expected less than the model's context of {context}, "
            f"got {config.rollout.max_new_tokens}"
        )
    return min(config.data.max_prompt_tokens, left)


def advise(config: PPOConfig, plan: Plan, **given: Any) -> list[Change]:
    """What to change, in order, until the run fits; the last may still not do. `given` are arguments of `make_plan`.

    The order is that of the price: first what leaves the numbers as they are, by more and smaller passes and then by
    more time, then what rounds them, then what trains less.
    """
    changes = dict[str, Change]()
    for knob in _KNOBS:
        while not plan.fits and (found := knob(config, plan)) is not None:
            name, changed = found
            tried = make_plan(changed, limit=plan.limit, **given)
            if tried.peak >= plan.peak:
                break
            config, plan = changed, tried
            changes[name] = Change(name, _value(config, name), plan)
    return [*changes.values()]


Turned = tuple[str, PPOConfig] | None  # the setting that is changed, and the config then; None: nothing to change
Knob = Callable[[PPOConfig, Plan], Turned]


def _linear(config: PPOConfig, plan: Plan) -> Turned:
    return _changed(config, "model.logits", "linear") if config.model.logits == "materialised" else None


def _smaller(group: str, phases: tuple[str, ...]) -> Knob:
    """Micro-batches of half the size, or less where the whole is odd, while the peak is in one of these phases."""

    def knob(config: PPOConfig, plan: Plan) -> Turned:
        whole = config.optim.minibatch_size if group == "optim" else config.rollout.batch_size
        size = getattr(config, group).micro_batch_size or whole
        if plan.fullest not in phases or size == 1:
            return None
        return _changed(config, f"{group}.micro_batch_size", next(n for n in range(size // 2, 0, -1) if whole % n == 0))

    return knob


def _recompute(config: PPOConfig, plan: Plan) -> Turned:
    off = not config.model.checkpointing and plan.fullest == "update"
    return _changed(config, "model.checkpointing", True) if off else None


def _park(config: PPOConfig, plan: Plan) -> Turned:
    idle = config.model.layout != "adapters" or config.reward.models
    return _changed(config, "model.park", True) if idle and not config.model.park else None


def _states(config: PPOConfig, plan: Plan) -> Turned:
    full = config.optim.states == "full" and not config.optim.masters and config.model.layout != "adapters"
    return _changed(config, "optim.states", "8bit") if full else None


def _half(config: PPOConfig, plan: Plan) -> Turned:
    return _changed(config, "model.dtype", "bfloat16") if config.model.dtype == "float32" else None


def _adapters(config: PPOConfig, plan: Plan) -> Turned:
    if config.model.layout == "adapters":
        return None
    lora = dataclasses.replace(config.model.lora, rank=64)
    model = dataclasses.replace(config.model, layout="adapters", lora=lora, value_path=None)
    return "model.layout", dataclasses.replace(config, model=model)


def _quantise(config: PPOConfig, plan: Plan) -> Turned:
    fit = config.model.layout == "adapters" and config.model.quantise == "none"
    return _changed(config, "model.quantise", "nf4") if fit else None


_KNOBS: tuple[Knob, ...] = (
    _linear,
    _smaller("optim", ("update", "scoring")),
    _smaller("rollout", ("rollout", "scoring", "reward")),
    _recompute,
    _park,
    _states,
    _half,
    _adapters,
    _quantise,
)


def _changed(config: PPOConfig, name: str, value: Any) -> tuple[str, PPOConfig]:
    group, _, field = name.partition(".")
    part = dataclasses.replace(getattr(config, group), **{field: value})
    return name, dataclasses.replace(config, **{group: part})


def _value(config: PPOConfig, name: str) -> Any:
    group, _, field = name.partition(".")
    return getattr(getattr(config, group), field)


def _overhead(account: Account) -> Account:
    lost = int(_LOST * sum(account.get(item, 0) for item in _VARYING))
    return account | {"fragmentation": lost, "CUDA context": _CONTEXT}


def _ordered(account: Account) -> Account:
    return {item: account[item] for item in ITEMS if account.get(item)}
