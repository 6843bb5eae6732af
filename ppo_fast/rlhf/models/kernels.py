"""liger-kernel's norms, rotary embedding and gated MLP in place of a network's own, never its losses.

liger-kernel changes the module of transformers that a network's class lives in, for every network of the process. Here
that module is restored, and one network gets the new forward passes.

Source: Hsu et al. 2024, arXiv:2410.10989.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.rlhf.errors import UserError, install_command
from ppo_fast.rlhf.world import current

Run = Callable[..., Any]  # run(function) is function(network), with the weights that it needs gathered

# Architectures for which liger-kernel changes nothing but names of their module of transformers and forward passes of
# the network's own modules.
KNOWN = frozenset(
    [
        *("gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral"),
        *("olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
    ]
)
BOUND = ("forward", "extra_repr", "_get_name")  # methods that liger-kernel binds to modules
# Differences allowed in hidden states and gradients, relative to their norm.
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_ROUNDING_OF_SUMS = 1e-4


def use_kernels(
    model: PreTrainedModel, kernels: str, run: Run | None = None, device: torch.device | None = None
) -> None:
    """Give a network on its device the kernels that `model.kernels` asks for; "auto": those that can be had.

    Args:
        run: for a network that is split over ranks, all of which call this.
        device: where the forward passes of a split network run.

    Raises:
        UserError: "liger" without a GPU, without the package, for an architecture that it does not know, or where
            hidden states and gradients differ from the network's own by more than rounding. "auto" warns of the last.
    """
    if kernels == "none":
        return
    device = device or model.device
    reason = _unavailable(model, device)
    if reason is None:
        reason = _apply_checked(model, run or (lambda function: function(model)), device)
        if reason is not None and kernels == "auto":
            warnings.warn(f"model.kernels: 'none' {reason}", stacklevel=2)
    if reason is not None and kernels == "liger":
        raise UserError(f"model.kernels: expected 'auto' or 'none' {reason}, got 'liger'")


def kernels_of(model: nn.Module) -> str:
    """The kernels that a network has: "liger" or "none"."""
    forwards = (vars(module).get("forward") for module in model.modules())
    found = any(getattr(forward, "__module__", "").startswith("liger_kernel.") for forward in forwards)
    return "liger" if found else "none"


def _unavailable(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why a network cannot have liger-kernel; None if it can."""
    if device.type != "cuda":
        return f"on the device {device.type!r}"
    try:
        known = _appliers().keys() & KNOWN
    except ImportError as error:
        return f"where liger-kernel cannot be imported ({install_command('gpu')}): {error}"
    kind = model.base_model.config.model_type
    return None if kind in known else f"for {type(model).__name__}, which liger-kernel does not know"


def _appliers() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    appliers: dict[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return appliers


def _apply_checked(model: PreTrainedModel, run: Run, device: torch.device) -> str | None:
    """`apply_liger`, undone if the network differs from what it was; then return by how much."""
    modules = [*model.modules()]
    before = [{name: vars(module)[name] for name in BOUND if name in vars(module)} for module in modules]
    expected = _states_and_gradients(model, run, device)
    apply_liger(model)
    found = _states_and_gradients(model, run, device)
    # Rank 0 decides for all: kernels round differently from one launch to the next.
    errors = current().objects([((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)])[0]
    if max(errors) <= _ROUNDING.get(model.dtype, _ROUNDING_OF_SUMS) or not all(y.isfinite().all() for y in expected):
        return None  # a network without finite numbers is for the first update to name
    for module, methods in zip(modules, before, strict=True):
        for name in BOUND:
            vars(module).pop(name, None)
        vars(module).update(methods)
    return f"for {type(model).__name__}, whose hidden states or gradients liger-kernel changes by {max(errors):.2g}"


def apply_liger(model: PreTrainedModel) -> None:
    """Bind liger-kernel's forward passes to the modules of one network of `KNOWN` architecture."""
    backbone = model.base_model
    module = sys.modules[type(backbone).__module__]
    own = dict(vars(module))
    try:
        applier = _appliers()[backbone.config.model_type]
        applier(model=backbone, cross_entropy=False, fused_linear_cross_entropy=False)
        changed = {name: value for name, value in vars(module).items() if own.get(name) is not value}
    finally:
        vars(module).update(own)
    # The rotary embedding is a function of the module, called by name.
    functions = {name: value for name, value in changed.items() if isinstance(value, FunctionType)}
    names = vars(module) | functions
    for layer in backbone.modules():
        forward: Any = inspect.unwrap(type(layer).forward)
        if type(layer).__module__ == module.__name__ and functions.keys() & {*forward.__code__.co_names}:
            layer.forward = MethodType(_with_globals(forward, names), layer)


def _with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The function, which looks up global names in `names`."""
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _states_and_gradients(model: PreTrainedModel, run: Run, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [2, 8, D] of words from all over the vocabulary, and the gradient of a sum of them, in float32."""
    backbone, embeddings = model.base_model, model.get_input_embeddings()
    count = len(embeddings.weight)
    ids = (torch.arange(16, dtype=torch.int64, device=device) * count // 16).view(2, 8)
    with torch.no_grad():
        inputs = run(lambda _: embeddings(ids))
    inputs.requires_grad_()
    with torch.enable_grad():
        states = run(lambda _: backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state.clone())
        weights = torch.linspace(-1, 1, states[0].numel(), dtype=states.dtype, device=device).view(states[0].shape)
        (gradient,) = torch.autograd.grad((states * weights).sum(), inputs)
    return states.detach().float(), gradient.float()
