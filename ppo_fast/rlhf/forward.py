"""The policy's forward pass, which scoring and update share: from token ids to statistics and loss of the responses.

Either the hidden states and the head's weight go to the linear ops, which make a chunk of logits at a time, or the
model's own logits, [B, T, V] at once, go to the ops on logits. Both give the same numbers to rounding.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ppo_fast import ops

from .errors import UserError

Inputs = tuple[Tensor, Tensor, int]  # token ids [B, L] int64, attention mask [B, L] bool, T

# Of a log-probability, relative to the logits it is the difference of: about one rounding of each in that dtype.
_ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
_ROUNDING_OF_SUMS = 1e-5


class HeadInputs(NamedTuple):
    """What the head makes logits of: softcap * tanh(x / softcap), x = hidden @ weight.T + bias; None: x."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None


def position_ids(attention_mask: Tensor) -> Tensor:
    """cumsum(mask) - 1 [B, L] int64: the first real token is position 0, however much padding is before it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def model_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a forward pass over left-padded ids [B, L]; positions only where the model takes them."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    if "position_ids" in _parameters(model.__class__):
        inputs["position_ids"] = position_ids(attention_mask)
    return inputs


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    """Names of the arguments of the forward pass of a class of modules; asking takes 20 us."""
    return frozenset(inspect.signature(kind.forward).parameters)


def unwrapped(model: Any) -> Any:
    """The causal LM itself, out of a PEFT wrapper, whose `base_model` is no backbone."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: Any) -> Any:
    """The part of a causal LM below its head."""
    return unwrapped(model).base_model


def response_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """Logits [B, T, V] whose row t is the distribution that response token t was drawn from; T = `length`."""
    inputs: dict[str, Any] = model_inputs(unwrapped(model), input_ids, attention_mask)
    if "logits_to_keep" in _parameters(unwrapped(model).__class__):
        inputs["logits_to_keep"] = length + 1
    return model(**inputs, use_cache=False).logits[:, -length - 1 : -1]


def response_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> HeadInputs:
    """The hidden states that `response_logits` come from, and the head above them."""
    base, head = unwrapped(model), model.get_output_embeddings()
    output = base.base_model(**model_inputs(base.base_model, input_ids, attention_mask), use_cache=False)
    softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return HeadInputs(output.last_hidden_state[:, -length - 1 : -1], head.weight, head.bias, softcap)


def response_stats(model: Any, inputs: Inputs, targets: Tensor, *, linear: bool, **options: Any) -> ops.TokenStats:
    """`token_stats` of the response tokens `targets` [B, T]; `options` are those of the op."""
    if not linear:
        return ops.token_stats(response_logits(model, *inputs), targets, **options)
    x = response_hidden(model, *inputs)
    return ops.linear_token_stats(x.hidden, x.weight, targets, bias=x.bias, softcap=x.softcap, **options)


def response_loss(
    policy: Any, inputs: Inputs, *terms: Tensor, linear: bool, reference: Any = None, **options: Any
) -> ops.LossOutput:
    """`policy_loss` of the responses; `terms` and `options` are those of the op, from `targets` on.

    Args:
        reference: the model whose exact KL kl_estimator "full" charges; None: no such term.
    """
    if not linear:
        if reference is not None:
            with torch.no_grad():
                options["ref_logits"] = response_logits(reference, *inputs)
        return ops.policy_loss(response_logits(policy, *inputs), *terms, inplace=True, **options)
    if reference is not None:
        with torch.no_grad():
            ref = response_hidden(reference, *inputs)
        options |= {"ref_hidden": ref.hidden, "ref_weight": ref.weight, "ref_bias": ref.bias}
    x = response_hidden(policy, *inputs)
    return ops.linear_policy_loss(x.hidden, x.weight, *terms, bias=x.bias, softcap=x.softcap, **options)


@torch.no_grad()
def check_linear(model: Any) -> None:
    """Compare log-probabilities from hidden states and head with those of the model's logits on one short batch.

    Raises:
        UserError: the head is no linear layer, the hidden states are not at hand, or the log-probabilities differ by
            more than rounding: the model does something else to its logits, such as scaling them.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        _refuse(model, f"an output embedding that is a torch.nn.Linear, got {_kind(head)}")
    if backbone_of(model) is unwrapped(model):
        _refuse(model, "a backbone that gives hidden states, got none")
    inputs = _short_batch(model)
    targets = inputs[0][:, -inputs[2] :]
    try:
        ours = response_stats(model, inputs, targets, linear=True).logprobs
    except ValueError as reason:
        _refuse(model, f"a head that the linear ops take, got '{reason}'")
    logits = response_logits(model, *inputs).double()
    lse = logits.logsumexp(dim=-1)
    theirs = logits.gather(-1, targets[..., None])[..., 0] - lse
    error = (ours - theirs).abs()
    allowed = _ROUNDING.get(model.dtype, _ROUNDING_OF_SUMS) * (1 + lse.abs() + ours.abs())
    # A model without finite numbers is for the first update to name.
    wrong = ~((error <= allowed) | theirs.isnan())
    if wrong.any():
        _refuse(
            model,
            "logits that are its output embedding of its last hidden states, "
            f"got log-probabilities that differ by {error[wrong].max().item():.2g}",
        )


def _short_batch(model: Any) -> Inputs:
    """Two rows of eight words from all over the vocabulary, one of them left-padded."""
    count = len(model.get_input_embeddings().weight)
    ids = (torch.arange(16, device=model.device) * count // 16).view(2, 8)
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    attention_mask[1, :3] = False
    return ids, attention_mask, 4


def _kind(head: Any) -> str:
    return "none" if head is None else f"{type(head).__module__}.{type(head).__qualname__}"


def _refuse(model: Any, found: str) -> NoReturn:
    name = type(unwrapped(model)).__name__
    raise UserError(f"model.logits: expected {name} to have {found}; set it to 'materialised' for this model")
