"""The forward passes that scoring and update share: from sequences to statistics, loss and values of counted tokens.

Either the hidden states and the head's weight go to the linear ops, which make a chunk of logits at a time, or the
model's own logits, [N, V] at once, go to the ops on logits. Both give the same numbers to rounding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast import ops
from ppo_fast.rlhf.data.packing import ForwardInputs, TokenBatch
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.attention import packed_arguments

# Of a log-probability, relative to the logits it is the difference of: about one rounding of each in that dtype.
_ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
_ROUNDING_OF_SUMS = 1e-5


class HeadInputs(NamedTuple):
    """Inputs of the head, whose logits are softcap * tanh(x / softcap), x = hidden @ weight.T + bias; None: x."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM itself, out of a PEFT wrapper, whose `base_model` is no backbone."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The part of a causal LM below its head."""
    return unwrapped(model).base_model


def model_inputs(model: PreTrainedModel, sequences: ForwardInputs) -> dict[str, Any]:
    """Arguments of a forward pass."""
    inputs = {"use_cache": False} | filter_kwargs(model, sequences.inputs)
    return (
        inputs
        if sequences.cu_seqlens is None
        else inputs | packed_arguments(model, sequences.cu_seqlens, sequences.max_seqlen)
    )


def filter_kwargs(model: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The inputs of a backbone or model, without positions where it takes none."""
    return {name: x for name, x in inputs.items() if name != "position_ids" or name in _parameters(model.__class__)}


@functools.cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the arguments of the forward pass of a class of modules; asking takes 20 us."""
    return frozenset(inspect.signature(kind.forward).parameters)


def hidden_states(backbone: PreTrainedModel, sequences: ForwardInputs) -> Tensor:
    """The hidden states [N, D] that predict the counted tokens."""
    output = backbone(**model_inputs(backbone, sequences)).last_hidden_state
    return output.flatten(0, 1).index_select(0, sequences.gather_index)


def response_values(value: Any, sequences: ForwardInputs) -> Tensor:
    """Values [N] float32 of the states before each counted token, by a value model's backbone and head."""
    return head_values(value.head, hidden_states(value.backbone, sequences))


def head_values(head: nn.Linear, hidden: Tensor) -> Tensor:
    """`response_values` from hidden states [N, D] at hand, in float32 whatever the dtype of the head's weights."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    if head.weight.dtype == wide:  # called, so that its hooks can gather its weights
        return head(hidden.to(wide)).squeeze(-1)
    bias = None if head.bias is None else head.bias.to(wide)
    return nn.functional.linear(hidden.to(wide), head.weight.to(wide), bias).squeeze(-1)


def response_logits(model: PreTrainedModel, sequences: ForwardInputs) -> Tensor:
    """Logits [N, V] whose row n is the distribution that counted token n was drawn from; the model's own."""
    inputs, index = model_inputs(unwrapped(model), sequences), sequences.gather_index
    if "logits_to_keep" not in _parameters(unwrapped(model).__class__):
        return model(**inputs).logits.flatten(0, 1).index_select(0, index)
    if sequences.cu_seqlens is not None:
        return model(**inputs, logits_to_keep=index).logits[0]
    width, logits_to_keep = inputs["input_ids"].shape[1], sequences.logits_to_keep
    logits = model(**inputs, logits_to_keep=logits_to_keep).logits
    return logits.flatten(0, 1).index_select(0, index - (index // width + 1) * (width - logits_to_keep))


def response_hidden(model: PreTrainedModel, sequences: ForwardInputs) -> HeadInputs:
    """The hidden states that `response_logits` come from, and the head above them."""
    head, config = model.get_output_embeddings(), unwrapped(model).config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadInputs(hidden_states(backbone_of(model), sequences), head.weight, head.bias, softcap)


def response_stats(
    model: PreTrainedModel, sequences: ForwardInputs, targets: Tensor, *, linear: bool, **options: Any
) -> ops.TokenStats:
    """`token_stats` of the counted tokens `targets` [N]; `options` are those of the op."""
    if not linear:
        return ops.token_stats(response_logits(model, sequences), targets, **options)
    return head_stats(response_hidden(model, sequences), targets, **options)


def head_stats(x: HeadInputs, targets: Tensor, **options: Any) -> ops.TokenStats:
    """`response_stats` from hidden states at hand."""
    return ops.linear_token_stats(x.hidden, x.weight, targets, bias=x.bias, softcap=x.softcap, **options)


def response_loss(policy: PreTrainedModel, sequences: ForwardInputs, *, linear: bool, **terms: Any) -> ops.LossOutput:
    """`policy_loss` of the counted tokens; `terms` are the op's arguments by name, tensors [N]."""
    if linear:
        return head_loss(response_hidden(policy, sequences), **terms)
    return ops.policy_loss(response_logits(policy, sequences), mask=None, inplace=True, **terms)


def head_loss(x: HeadInputs, **terms: Any) -> ops.LossOutput:
    """`response_loss` from hidden states at hand."""
    return ops.linear_policy_loss(x.hidden, x.weight, mask=None, bias=x.bias, softcap=x.softcap, **terms)


@torch.no_grad()
def reference_terms(
    reference: PreTrainedModel, sequences: ForwardInputs, *, linear: bool, copied: bool = False
) -> dict[str, Tensor | None]:
    """Terms of `response_loss` for the exact KL to the reference, kl_estimator "full".

    `copied`: the head's weights are gone by the time of the loss, as those of a network that is split over ranks.
    """
    if not linear:
        return {"ref_logits": response_logits(reference, sequences)}
    x = response_hidden(reference, sequences)
    # Detached: an offloaded reference's parameters are in host memory again by the time of the loss.
    bias = None if x.bias is None else x.bias.detach()
    terms = {"ref_hidden": x.hidden, "ref_weight": x.weight.detach(), "ref_bias": bias}
    return {name: x if x is None or not copied else x.clone() for name, x in terms.items()}


@torch.no_grad()
def check_linear(model: PreTrainedModel) -> None:
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
    sequences, targets = _short_batch(model)
    try:
        ours = response_stats(model, sequences, targets, linear=True).logprobs
    except ValueError as reason:
        _refuse(model, f"a head that the linear ops take, got '{reason}'")
    logits = response_logits(model, sequences).double()
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


def _short_batch(model: PreTrainedModel) -> tuple[ForwardInputs, Tensor]:
    """Two rows of eight words from all over the vocabulary, one of them left-padded, and the last four of each."""
    count = len(model.get_input_embeddings().weight)
    ids = (torch.arange(16, dtype=torch.int64, device=model.device) * count // 16).view(2, 8)
    attention = np.arange(8) >= np.array([[0], [3]])
    grid = TokenBatch(ids, attention, np.tile(np.arange(8) >= 4, (2, 1)))
    return grid.sequences(np.arange(2), packed=False), ids[:, 4:].flatten()


def _kind(head: object) -> str:
    return "none" if head is None else f"{type(head).__module__}.{type(head).__qualname__}"


def _refuse(model: PreTrainedModel, found: str) -> NoReturn:
    name = type(unwrapped(model)).__name__
    raise UserError(f"model.fused_head: expected {name} to have {found}; set it to false for this model")
