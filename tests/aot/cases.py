"""One call of each launcher for every kernel variant that ships: dtypes, aligned and unaligned rows, optional terms."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ppo_fast.ops._backends.reference.adamw_8bit import BLOCK, AdamWStep, Moments
from ppo_fast.ops._backends.triton import (
    adamw_8bit,
    gae,
    policy_loss,
    sample_tokens,
    scaled,
    token_stats,
    token_stats_backward,
    value_loss,
)
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import GaeInputs, RowGrads, RowInputs, SampleInputs, ValueInputs
from ppo_fast.ops._core.results import RowStats
from ppo_fast.rlhf.decoding.triton_attention import slot_attention

B, T = 1, 2
VOCABULARIES = {"tiny": 32, "gpt2": 50_257, "llama3": 128_256, "qwen2.5": 152_064}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(B, T, dtype=dtype)


def forward(V: int, dtype: torch.dtype) -> None:
    """token_logprobs, entropy, token_stats without and with a reference and a mask."""
    logits, targets, mask = torch.empty(B, T, V, dtype=dtype), rows(torch.int64), rows(torch.bool)
    token_stats.token_stats(RowInputs(logits, targets, None, None, 1.0), False)
    token_stats.token_stats(RowInputs(logits, None, None, mask, 1.0), True)
    token_stats.token_stats(RowInputs(logits, targets, None, mask, 1.0), True)
    token_stats.token_stats(RowInputs(logits, targets, logits, mask, 1.0), True)


def backward(V: int, dtype: torch.dtype) -> None:
    """Every set of upstream gradients."""
    logits, g, lse = torch.empty(B, T, V, dtype=dtype), rows(), rows(torch.float64)
    inputs = RowInputs(logits, rows(torch.int64), logits, rows(torch.bool), 1.0)
    stats = RowStats(g, g, g, lse, lse)
    for g_logprob, g_entropy, g_kl in itertools.product((None, g), repeat=3):
        if (g_logprob, g_entropy, g_kl) != (None, None, None):
            token_stats_backward.token_stats_backward(RowGrads(g_logprob, g_entropy, g_kl), inputs, stats)


def small() -> None:
    """Several unaligned rows a program, forward and backward, with every term."""
    logits, g, lse = torch.empty(B, T, 1000, dtype=torch.bfloat16), rows(), rows(torch.float64)
    inputs = RowInputs(logits, rows(torch.int64), logits, rows(torch.bool), 1.0)
    token_stats.token_stats(inputs, True)
    token_stats_backward.token_stats_backward(RowGrads(g, g, g), inputs, RowStats(g, g, g, lse, lse), scale=g[0, 0])


def sample(V: int, *filters: float | None) -> None:
    """sample_tokens, with these filters top_k and top_p."""
    logits, keys = torch.empty(B, T, V, dtype=torch.bfloat16), torch.empty(B, T, 3, dtype=torch.int64)
    sample_tokens.sample_tokens(SampleInputs(logits, keys, 1.0, *filters))


def policy(estimator: str, objective: str = "clip") -> None:
    """The terms of the policy loss: only the objective, then all of them."""
    x, mask, none, coef = rows(), rows(torch.bool), torch.empty(0), torch.ones(())
    clips = (0.2, 0.2, 3.0, "token", estimator, "token-mean", objective)
    stats = RowStats(x, x, none, none, none)
    inputs = PolicyInputs(None, x, None, None, None, None, None, None, None, *clips)
    policy_loss.policy_loss_from_stats(stats, None, inputs)
    full, ref = (x, None) if estimator == "full" else (none, x)
    inputs = PolicyInputs(x, x, ref, x, None, None, coef, coef, coef, *clips)
    policy_loss.policy_loss_from_stats(stats._replace(kl=full), mask, inputs)
    if estimator == "full":
        logits, targets = torch.empty(B, T, 8192, dtype=torch.bfloat16), rows(torch.int64)
        policy_loss.policy_loss(RowInputs(logits, targets, logits, mask, 1.0), inputs)


def policy_of_sequences(objective: str) -> None:
    """The terms of the policy loss by sequences, padded and packed."""
    x, mask, none, coef = rows(), rows(torch.bool), torch.empty(0), torch.ones(())
    for ratio, packed in (("token", None), ("sequence", torch.tensor([0, T], dtype=torch.int32))):
        options = (0.2, 0.2, 3.0, ratio, "k3", "seq-mean-token-mean", objective)
        inputs = PolicyInputs(x, x, x, x, packed, None, coef, coef, coef, *options)
        policy_loss.policy_loss_from_stats(RowStats(x, x, none, none, none), mask, inputs)


def value(dtype: torch.dtype) -> None:
    """The value loss, plain, clipped and by sequences."""
    value_loss.value_loss(ValueInputs(rows(dtype), rows(), None, None, None, None, None, "token-mean"))
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        value_loss.value_loss(ValueInputs(rows(dtype), rows(), rows(torch.bool), rows(), None, None, 0.2, aggregation))


def scans(dtype: torch.dtype, steps: int) -> None:
    """gae and gae_packed in both mask modes, plain and with everything optional."""
    x, flags, boot = torch.empty(B, steps, dtype=dtype), torch.empty(B, steps, dtype=torch.bool), torch.zeros(B)
    packed = torch.tensor([0, steps], dtype=torch.int32)
    gae.gae(GaeInputs(x, x, None, None, None, None, 1.0, 0.95, "carry"))
    for mode in ("carry", "zero"):
        gae.gae(GaeInputs(x, x, None, flags, boot, flags, 1.0, 0.95, mode))
        gae.gae(GaeInputs(x[0], x[0], packed, flags[0], boot, flags[0], 1.0, 0.95, mode))


def slots(dtype: torch.dtype, heads: int, width: int, *options: float | None) -> None:
    """Attention of slots to keys and values of so many heads."""
    query, keys = torch.empty(2, 28, 1, width, dtype=dtype), torch.empty(2, heads, 64, width, dtype=dtype)
    slot_attention(query, keys, keys, rows(torch.int64)[0], None, *options)


def adamw(dtype: torch.dtype) -> None:
    """The step of a weight of eight blocks."""
    weight, scale = torch.empty(8 * BLOCK, dtype=dtype), torch.empty(8)
    codes = (torch.empty(8 * BLOCK, dtype=kind) for kind in (torch.int8, torch.uint8))
    step = AdamWStep(torch.empty(5), 0.9, 0.95, 1e-5)
    adamw_8bit.adamw_8bit(weight, weight, Moments(*codes, scale, scale), step, 0)


def head_gradient(dtype: torch.dtype) -> None:
    """The head's gradient as handed out."""
    scaled.scaled(rows(), torch.ones(()), dtype)


# bfloat16 at every vocabulary, the other dtypes at one; the tile depends on the width of the dtype and V only.
_LOGITS = [(name, torch.bfloat16) for name in VOCABULARIES] + [
    ("gpt2", torch.float32),
    ("llama3", torch.float32),
    ("llama3", torch.float16),
]
CASES: dict[str, Callable[[], None]] = {
    **{f"forward-{n}-{d}": functools.partial(forward, VOCABULARIES[n], d) for n, d in _LOGITS},
    **{f"backward-{n}-{d}": functools.partial(backward, VOCABULARIES[n], d) for n, d in _LOGITS},
    "small": small,
    "sample-gpt2": functools.partial(sample, VOCABULARIES["gpt2"], None, None),
    "sample-llama3-filtered": functools.partial(sample, VOCABULARIES["llama3"], 50, 0.95),
    **{f"policy-{estimator}": functools.partial(policy, estimator) for estimator in ("k1", "k2", "k3", "full")},
    **{
        f"policy-sequences-{objective}": functools.partial(policy_of_sequences, objective)
        for objective in ("clip", "cispo")
    },
    "policy-cispo": functools.partial(policy, "k3", "cispo"),
    **{f"value-{dtype}": functools.partial(value, dtype) for dtype in FLOATS},
    **{f"adamw-{dtype}": functools.partial(adamw, dtype) for dtype in FLOATS[:2]},
    **{f"gae-{dtype}-{steps}": functools.partial(scans, dtype, steps) for dtype in FLOATS[:2] for steps in (32, 1000)},
    "slots-7b": functools.partial(slots, torch.bfloat16, 4, 128, None, None),
    "slots-gemma": functools.partial(slots, torch.bfloat16, 14, 256, 33, 50.0),
    "slots-float32": functools.partial(slots, torch.float32, 28, 128, None, None),
    **{f"scaled-{dtype}": functools.partial(head_gradient, dtype) for dtype in FLOATS},
}
