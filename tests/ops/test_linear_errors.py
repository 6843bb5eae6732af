"""Every ValueError that only the linear ops raise, word for word; and that no raise statement is missing here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests.helpers import raises_exactly
from tests.ops.test_errors import FLOATS, HUGE, META, line_of, raise_statements

HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
TARGETS, ROWS = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
REF = torch.zeros(2, 3, 7)
STATS, LOSS = "linear_token_stats", "linear_policy_loss"
IGNORED = "targets in [0, 5) where mask is True, got -100: pass mask=targets != -100"


def stats(**changes: Any) -> Callable[[], Any]:
    """A linear_token_stats call with one thing wrong."""
    return lambda: pf.linear_token_stats(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **changes})


def loss(**changes: Any) -> Callable[[], Any]:
    """A linear_policy_loss call with one thing wrong."""
    inputs = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "old_logprobs": ROWS, "advantages": ROWS}
    return lambda: pf.linear_policy_loss(**{**inputs, "mask": None, **changes})


def quantized(package: str) -> Tensor:
    """A weight of a class of that package, which says it is float32."""
    kind = type("PackedWeight", (Tensor,), {"__module__": f"{package}.tensors"})
    return WEIGHT.as_subclass(kind)


UNQUANTISED = f"to be an unquantized {FLOATS} tensor"

TABLE: list[tuple[Callable[[], Any], str]] = [
    # hidden states and head
    (stats(hidden=[1.0]), f"{STATS}: expected hidden to be a tensor, got list"),
    (stats(weight=None), f"{STATS}: expected weight to be a tensor, got NoneType"),
    (loss(bias=0.0), f"{LOSS}: expected bias to be a tensor, got float"),
    (
        stats(hidden=HIDDEN.int()),
        f"{STATS}: expected hidden {UNQUANTISED}, got Tensor of torch.int32: pass it dequantized",
    ),
    (
        loss(weight=WEIGHT.to(torch.float8_e4m3fn)),
        f"{LOSS}: expected weight {UNQUANTISED}, got Tensor of torch.float8_e4m3fn: pass it dequantized",
    ),
    (
        loss(weight=quantized("torchao")),
        f"{LOSS}: expected weight {UNQUANTISED}, got PackedWeight of torch.float32: pass it dequantized",
    ),
    (
        loss(weight=quantized("bitsandbytes")),
        f"{LOSS}: expected weight {UNQUANTISED}, got PackedWeight of torch.float32: pass it dequantized",
    ),
    (
        stats(hidden=torch.tensor(0.0)),
        f"{STATS}: expected hidden of shape [..., D] with D >= 1, got []",
    ),
    (
        stats(hidden=HIDDEN[..., :0]),
        f"{STATS}: expected hidden of shape [..., D] with D >= 1, got [2, 3, 0]",
    ),
    (
        stats(weight=WEIGHT.T),
        f"{STATS}: expected weight of shape [V, 4] to match hidden [2, 3, 4], got [4, 5]",
    ),
    (
        loss(weight=WEIGHT[:0]),
        f"{LOSS}: expected weight of shape [V, 4] to match hidden [2, 3, 4], got [0, 4]",
    ),
    (
        loss(weight=WEIGHT[0]),
        f"{LOSS}: expected weight of shape [V, 4] to match hidden [2, 3, 4], got [4]",
    ),
    (
        stats(weight=WEIGHT.bfloat16()),
        f"{STATS}: expected weight in the dtype of hidden (torch.float32), got torch.bfloat16",
    ),
    (stats(weight=WEIGHT.to(META)), f"{STATS}: expected weight on the device of hidden (cpu), got meta"),
    (stats(bias=BIAS[:4]), f"{STATS}: expected bias to match the words of weight [5], got [4]"),
    (stats(bias=BIAS.double()), f"{STATS}: expected bias in the dtype of hidden (torch.float32), got torch.float64"),
    # targets
    (stats(targets=None), f"{STATS}: expected targets to be a tensor, got NoneType"),
    (stats(targets=ROWS), f"{STATS}: expected targets to be int32 or int64, got torch.float32"),
    (
        loss(targets=TARGETS[:, :2]),
        f"{LOSS}: expected targets to match hidden [2, 3, 4] without the last dimension, got [2, 2]",
    ),
    (stats(targets=TARGETS.to(META)), f"{STATS}: expected targets on the device of hidden (cpu), got meta"),
    (stats(targets=TARGETS + 5), f"{STATS}: expected targets in [0, 5) where mask is True, got 5"),
    (loss(targets=TARGETS - 1), f"{LOSS}: expected targets in [0, 5) where mask is True, got -1"),
    (stats(targets=TARGETS - 100), f"{STATS}: expected {IGNORED}"),
    (loss(targets=TARGETS - 100), f"{LOSS}: expected {IGNORED}"),
    # the reference
    (stats(ref_weight=WEIGHT), f"{STATS}: expected ref_hidden with ref_weight, got None"),
    (loss(ref_bias=BIAS), f"{LOSS}: expected ref_hidden with ref_bias, got None"),
    (
        stats(ref_hidden=REF),
        f"{STATS}: expected ref_weight of shape [V, 7] to match ref_hidden [2, 3, 7], got [5, 4]",
    ),
    (
        stats(ref_hidden=HIDDEN[:1]),
        f"{STATS}: expected ref_hidden to match hidden [2, 3, 4] except in the last dimension, got [1, 3, 4]",
    ),
    (
        stats(ref_hidden=REF, ref_weight=torch.zeros(6, 7)),
        f"{STATS}: expected ref_weight of as many words as weight, 5, got 6",
    ),
    (
        stats(ref_hidden=REF.to(META), ref_weight=torch.zeros(5, 7, device=META)),
        f"{STATS}: expected ref_hidden on the device of hidden (cpu), got meta",
    ),
    (loss(ref_hidden=HIDDEN), f"{LOSS}: expected ref_logprobs with kl_estimator='k3', got ref_hidden"),
    (
        loss(config=pf.PolicyLossConfig(kl_estimator="full", kl_coef=0.1)),
        f"{LOSS}: expected ref_hidden with kl_coef=0.1, got no reference",
    ),
    (loss(ref_hidden=HIDDEN, ref_logprobs=ROWS), f"{LOSS}: expected ref_logprobs or ref_hidden, got both"),
    # the rest
    (stats(mask=ROWS), f"{STATS}: expected mask to be bool, got torch.float32"),
    (stats(temperature=0), f"{STATS}: expected temperature to be a number in [1e-09, 1e+09], got 0"),
    (stats(softcap=-1.0), f"{STATS}: expected softcap to be a number in [1e-09, 1e+09], got -1.0"),
    (stats(chunk_size=0), f"{STATS}: expected chunk_size to be an integer in [1, 2147483647], got 0"),
    (stats(chunk_size=10**400), f"{STATS}: expected chunk_size to be an integer in [1, 2147483647], got {HUGE}"),
    (stats(softcap=1e-45), f"{STATS}: expected softcap to be a number in [1e-09, 1e+09], got 1e-45"),
    (loss(denominator=torch.tensor(-1.0)), f"{LOSS}: expected denominator in [1e-30, 1e+30], got a tensor of -1.0"),
    (
        loss(config=pf.PolicyLossConfig(ent_coef=torch.tensor(-1.0))),
        f"{LOSS}: expected ent_coef in [0, 1e+30], got a tensor of -1.0",
    ),
    (stats(half_logits=1), f"{STATS}: expected half_logits to be True or False, got 1"),
    (loss(chunk_size=2.0), f"{LOSS}: expected chunk_size to be an integer in [1, 2147483647], got 2.0"),
    (loss(chunk_size=True), f"{LOSS}: expected chunk_size to be an integer in [1, 2147483647], got True"),
    (loss(config=None), f"{LOSS}: expected config to be a PolicyLossConfig, got NoneType"),
    (loss(advantages=ROWS[0]), f"{LOSS}: expected advantages to match targets [2, 3] or [2, 1], got [3]"),
    (
        loss(
            hidden=HIDDEN[0], targets=TARGETS[0], old_logprobs=None, advantages=ROWS[0], cu_seqlens=torch.tensor([0, 2])
        ),
        f"{LOSS}: expected cu_seqlens to rise from 0 to 3, got [0, 2]",
    ),
    (
        stats(backend="cuda"),
        f"{STATS}: expected a usable backend, got 'cuda': {STATS} has no cuda implementation",
    ),
]


@pytest.mark.parametrize(("call", "message"), TABLE, ids=[message for _, message in TABLE])
def test_message(call: Callable[[], Any], message: str) -> None:
    with raises_exactly(message):
        call()


def test_no_raise_statement_is_missing() -> None:
    assert raise_statements("_linear_*.py") <= {line_of(call) for call, _ in TABLE}
