"""Every ValueError of the ops, word for word; and that no raise statement is missing from the table."""

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo_fast as pf
from ppo_fast import PolicyLossConfig as Config
from tests.helpers import raises_exactly
from tests.ops.examples import EXAMPLES, run

OPS = Path(pf.__file__).parent / "ops"
LOGITS, TARGETS, ROWS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
FULL = Config(kl_estimator="full")
MASK, FLAT, OFFSETS = torch.ones(2, 3, dtype=torch.bool), torch.zeros(6), torch.tensor([0, 2, 6])
KEYS = torch.zeros(2, 3, 3, dtype=torch.long)
META = "meta"


def policy(**changes: Any) -> Callable[[], Any]:
    """A policy_loss call with one thing wrong."""
    inputs = {"logits": LOGITS, "targets": TARGETS, "old_logprobs": ROWS, "advantages": ROWS, "mask": MASK}
    return lambda: pf.policy_loss(**{**inputs, **changes})


def packed_policy(**changes: Any) -> Callable[[], Any]:
    """The same on packed [N]."""
    inputs = {"logits": LOGITS.flatten(0, 1), "targets": TARGETS.flatten(), "old_logprobs": FLAT, "advantages": FLAT}
    return policy(**{**inputs, "mask": None, **changes})


def value(**changes: Any) -> Callable[[], Any]:
    """A value_loss call with one thing wrong."""
    return lambda: pf.value_loss(**{"values": ROWS, "returns": ROWS, "mask": MASK, **changes})


def gae(**changes: Any) -> Callable[[], Any]:
    """A gae call with one thing wrong."""
    return lambda: pf.gae(**{"rewards": ROWS, "values": ROWS, **changes})


def gae_packed(**changes: Any) -> Callable[[], Any]:
    """A gae_packed call with one thing wrong."""
    return lambda: pf.gae_packed(**{"rewards": FLAT, "values": FLAT, "cu_seqlens": OFFSETS, **changes})


def stats(**changes: Any) -> Callable[[], Any]:
    """A token_stats call with one thing wrong."""
    return lambda: pf.token_stats(**{"logits": LOGITS, "targets": TARGETS, **changes})


def sample(**changes: Any) -> Callable[[], Any]:
    """A sample_tokens call with one thing wrong."""
    return lambda: pf.sample_tokens(**{"logits": LOGITS, "keys": KEYS, **changes})


class DTensor(torch.Tensor):
    """As that of torch.distributed.tensor, by name."""


def dtensor(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(DTensor)


def config(**fields: Any) -> Callable[[], Any]:
    """A PolicyLossConfig with one thing wrong."""
    return lambda: Config(**fields)


FLOATS = "float32, bfloat16, float16 or float64"
HUGE, SPARSE = "an integer beyond every float", "one of layout torch.sparse_coo"
IGNORED = "targets in [0, 4) where mask is True, got -100: pass mask=targets != -100"
POSITIVE = "a number in [1e-30, 1e+30]"
HEAD = ": pass {0}.full_tensor(grad_placements=[Partial()]), or call the op in the sharded module's forward"
PENALTY = "PolicyLossConfig: expected penalty_coef to be"

TABLE: list[tuple[Callable[[], Any], str]] = [
    # logits and targets
    (stats(logits=[1.0]), "token_stats: expected logits to be a tensor, got list"),
    (stats(logits=LOGITS.int()), f"token_stats: expected logits to be {FLOATS}, got torch.int32"),
    (stats(logits=torch.tensor(0.0)), "token_stats: expected logits of shape [..., V] with V >= 1, got []"),
    (stats(logits=LOGITS[..., :0]), "token_stats: expected logits of shape [..., V] with V >= 1, got [2, 3, 0]"),
    (stats(targets=None), "token_stats: expected targets to be a tensor, got NoneType"),
    (stats(targets=ROWS), "token_stats: expected targets to be int32 or int64, got torch.float32"),
    (
        stats(targets=TARGETS[:, :2]),
        "token_stats: expected targets to match logits [2, 3, 4] without the vocabulary, got [2, 2]",
    ),
    (stats(targets=TARGETS.to(META)), "token_stats: expected targets on the device of logits (cpu), got meta"),
    (stats(targets=TARGETS - 1), "token_stats: expected targets in [0, 4) where mask is True, got -1"),
    (policy(targets=TARGETS + 4), "policy_loss: expected targets in [0, 4) where mask is True, got 4"),
    (
        lambda: pf.token_logprobs(LOGITS, TARGETS + 4),
        "token_logprobs: expected targets in [0, 4) where mask is True, got 4",
    ),
    (stats(targets=TARGETS - 100), f"token_stats: expected {IGNORED}"),
    (policy(targets=TARGETS - 100), f"policy_loss: expected {IGNORED}"),
    (lambda: pf.token_logprobs(LOGITS, TARGETS - 100), f"token_logprobs: expected {IGNORED}"),
    (stats(ref_logits=LOGITS[:1]), "token_stats: expected ref_logits to match logits [2, 3, 4], got [1, 3, 4]"),
    (stats(ref_logits=LOGITS.long()), f"token_stats: expected ref_logits to be {FLOATS}, got torch.int64"),
    (stats(ref_logits=LOGITS.to(META)), "token_stats: expected ref_logits on the device of logits (cpu), got meta"),
    # tensors that are no plain ones
    (stats(logits=LOGITS.to_sparse()), f"token_stats: expected logits to be a dense tensor, got {SPARSE}"),
    (
        stats(logits=LOGITS.to_mkldnn()),
        "token_stats: expected logits to be a dense tensor, got one of layout torch._mkldnn",
    ),
    (
        stats(logits=torch.nested.as_nested_tensor([LOGITS[0], LOGITS[1]], layout=torch.jagged)),
        "token_stats: expected logits to be a dense tensor, got a nested one",
    ),
    (
        policy(ref_logits=LOGITS.to_sparse(), config=FULL),
        f"policy_loss: expected ref_logits to be a dense tensor, got {SPARSE}",
    ),
    (policy(targets=TARGETS.to_sparse()), f"policy_loss: expected targets to be a dense tensor, got {SPARSE}"),
    (policy(advantages=ROWS.to_sparse()), f"policy_loss: expected advantages to be a dense tensor, got {SPARSE}"),
    (policy(mask=MASK.to_sparse()), f"policy_loss: expected mask to be a dense tensor, got {SPARSE}"),
    (
        packed_policy(cu_seqlens=OFFSETS.to_sparse()),
        f"policy_loss: expected cu_seqlens to be a dense tensor, got {SPARSE}",
    ),
    (value(values=ROWS.to_sparse()), f"value_loss: expected values to be a dense tensor, got {SPARSE}"),
    (gae(bootstrap=FLAT[:2].to_sparse()), f"gae: expected bootstrap to be a dense tensor, got {SPARSE}"),
    (lambda: pf.whiten(ROWS.to_sparse(), None), f"whiten: expected x to be a dense tensor, got {SPARSE}"),
    (
        lambda: pf.dpo_loss(FLAT, FLAT, FLAT, FLAT.to_sparse()),
        f"dpo_loss: expected ref_rejected to be a dense tensor, got {SPARSE}",
    ),
    # masks and per-token tensors
    (stats(mask=[True]), "token_stats: expected mask to be a tensor, got list"),
    (stats(mask=ROWS), "token_stats: expected mask to be bool, got torch.float32"),
    (stats(mask=MASK[0]), "token_stats: expected mask to match logits [2, 3], got [3]"),
    (policy(mask=MASK.to(META)), "policy_loss: expected mask on the device of targets (cpu), got meta"),
    (policy(advantages=None), "policy_loss: expected advantages to be a tensor, got NoneType"),
    (policy(advantages=ROWS.int()), f"policy_loss: expected advantages to be {FLOATS}, got torch.int32"),
    (
        policy(advantages=ROWS[0]),
        "policy_loss: expected advantages to match targets [2, 3] or [2, 1], got [3]",
    ),
    (policy(old_logprobs=ROWS[:, :1]), "policy_loss: expected old_logprobs to match targets [2, 3], got [2, 1]"),
    (
        policy(importance_weights=ROWS.T),
        "policy_loss: expected importance_weights to match targets [2, 3] or [2, 1], got [3, 2]",
    ),
    (packed_policy(advantages=FLAT[:1]), "policy_loss: expected advantages to match targets [6], got [1]"),
    (policy(ref_logprobs=ROWS[0]), "policy_loss: expected ref_logprobs to match targets [2, 3], got [3]"),
    # temperature
    (stats(temperature=0.0), "token_stats: expected temperature to be a number in [1e-09, 1e+09], got 0.0"),
    (stats(temperature=math.nan), "token_stats: expected temperature to be a number in [1e-09, 1e+09], got nan"),
    (stats(temperature=math.inf), "token_stats: expected temperature to be a number in [1e-09, 1e+09], got inf"),
    (stats(temperature=1e-45), "token_stats: expected temperature to be a number in [1e-09, 1e+09], got 1e-45"),
    (stats(temperature=10**400), f"token_stats: expected temperature to be a number in [1e-09, 1e+09], got {HUGE}"),
    (stats(temperature=-(10**5000)), f"token_stats: expected temperature to be a number in [1e-09, 1e+09], got {HUGE}"),
    (stats(temperature=True), "token_stats: expected temperature to be a number in [1e-09, 1e+09], got True"),
    (stats(temperature="1"), "token_stats: expected temperature to be a number in [1e-09, 1e+09], got '1'"),
    (
        lambda: pf.entropy(LOGITS, temperature=-1),
        "entropy: expected temperature to be a number in [1e-09, 1e+09], got -1",
    ),
    (lambda: pf.token_logprobs(LOGITS, None), "token_logprobs: expected targets to be a tensor, got NoneType"),
    (
        lambda: pf.token_logprobs(LOGITS, TARGETS, mask=MASK[0]),
        "token_logprobs: expected mask to match logits [2, 3], got [3]",
    ),
    # sampling
    (sample(logits=LOGITS.long()), f"sample_tokens: expected logits to be {FLOATS}, got torch.int64"),
    (sample(keys=None), "sample_tokens: expected keys to be a tensor, got NoneType"),
    (sample(keys=KEYS.int()), "sample_tokens: expected keys to be int64, got torch.int32"),
    (
        sample(keys=KEYS[0]),
        "sample_tokens: expected keys to be [2, 3, 3]: seed, row and step for each row of logits [2, 3, 4], got [3, 3]",
    ),
    (sample(keys=KEYS.to(META)), "sample_tokens: expected keys on the device of logits (cpu), got meta"),
    (sample(keys=KEYS - 1), "sample_tokens: expected steps, keys[..., 2], in [0, 2^32), got -1"),
    (sample(keys=KEYS + (1 << 32)), "sample_tokens: expected steps, keys[..., 2], in [0, 2^32), got 4294967296"),
    (sample(temperature=0), "sample_tokens: expected temperature to be a number in [1e-09, 1e+09], got 0"),
    (sample(top_k=0), "sample_tokens: expected top_k to be an integer >= 1 or None, got 0"),
    (sample(top_k=2.0), "sample_tokens: expected top_k to be an integer >= 1 or None, got 2.0"),
    (sample(top_p=0), "sample_tokens: expected top_p to be a number in (0, 1] or None, got 0"),
    (sample(top_p=math.nan), "sample_tokens: expected top_p to be a number in (0, 1] or None, got nan"),
    # sequences
    (packed_policy(cu_seqlens=[0, 6]), "policy_loss: expected cu_seqlens to be a tensor, got list"),
    (
        packed_policy(cu_seqlens=OFFSETS.float()),
        "policy_loss: expected cu_seqlens to be int32 or int64 of shape [S + 1], got torch.float32 of shape [3]",
    ),
    (
        packed_policy(cu_seqlens=OFFSETS[:0]),
        "policy_loss: expected cu_seqlens to be int32 or int64 of shape [S + 1], got torch.int64 of shape [0]",
    ),
    (
        packed_policy(cu_seqlens=OFFSETS[None]),
        "policy_loss: expected cu_seqlens to be int32 or int64 of shape [S + 1], got torch.int64 of shape [1, 3]",
    ),
    (
        policy(cu_seqlens=OFFSETS),
        "policy_loss: expected packed targets of shape [N] with cu_seqlens, got [2, 3]",
    ),
    (
        packed_policy(cu_seqlens=OFFSETS.to(META)),
        "policy_loss: expected cu_seqlens on the device of targets (cpu), got meta",
    ),
    (packed_policy(cu_seqlens=OFFSETS + 1), "policy_loss: expected cu_seqlens to rise from 0 to 6, got [1, 3, 7]"),
    (gae_packed(cu_seqlens=OFFSETS[:-1]), "gae_packed: expected cu_seqlens to rise from 0 to 6, got [0, 2]"),
    (
        gae_packed(cu_seqlens=torch.tensor([0, 4, 2, 6])),
        "gae_packed: expected cu_seqlens to rise from 0 to 6, got [0, 4, 2, 6]",
    ),
    (
        gae_packed(cu_seqlens=torch.tensor([0, 1, 2, 3, 2, 4, 5, 5, 6])),
        "gae_packed: expected cu_seqlens to rise from 0 to 6, got [0, 1, 2, 3, '...', 6]",
    ),
    (
        packed_policy(config=Config(ratio="sequence")),
        "policy_loss: expected cu_seqlens for packed [N] targets with ratio='sequence', "
        "aggregation='token-mean', got None",
    ),
    (
        value(values=FLAT, returns=FLAT, mask=None, aggregation="seq-mean-token-sum"),
        "value_loss: expected cu_seqlens for packed [N] values with aggregation='seq-mean-token-sum', got None",
    ),
    # denominators
    (
        policy(denominator=0),
        "policy_loss: expected denominator to be a number in [1e-30, 1e+30] or a 0-d tensor, got 0",
    ),
    (
        policy(denominator=math.inf),
        "policy_loss: expected denominator to be a number in [1e-30, 1e+30] or a 0-d tensor, got inf",
    ),
    (
        policy(denominator="8"),
        "policy_loss: expected denominator to be a number in [1e-30, 1e+30] or a 0-d tensor, got '8'",
    ),
    (
        value(denominator=True),
        "value_loss: expected denominator to be a number in [1e-30, 1e+30] or a 0-d tensor, got True",
    ),
    (
        value(denominator=torch.ones(1)),
        "value_loss: expected denominator to be a number or a 0-d tensor of one, "
        "got a tensor of shape [1] and dtype torch.float32",
    ),
    (
        policy(denominator=torch.tensor(True)),
        "policy_loss: expected denominator to be a number or a 0-d tensor of one, "
        "got a tensor of shape [] and dtype torch.bool",
    ),
    (policy(denominator=10**400), f"policy_loss: expected denominator to be {POSITIVE} or a 0-d tensor, got {HUGE}"),
    (policy(denominator=dtensor(FLAT[0])), "policy_loss: expected denominator to be a whole tensor, got a DTensor"),
    (
        policy(denominator=torch.tensor(-1.0)),
        "policy_loss: expected denominator in [1e-30, 1e+30], got a tensor of -1.0",
    ),
    (policy(denominator=torch.tensor(0)), "policy_loss: expected denominator in [1e-30, 1e+30], got a tensor of 0.0"),
    (
        value(denominator=torch.tensor(math.nan)),
        "value_loss: expected denominator in [1e-30, 1e+30], got a tensor of nan",
    ),
    # coefficients that come as tensors
    (
        policy(config=Config(ent_coef=torch.tensor(-0.1, dtype=torch.float64))),
        "policy_loss: expected ent_coef in [0, 1e+30], got a tensor of -0.10000000149011612",
    ),
    (
        policy(config=Config(penalty_coef=torch.tensor(math.inf))),
        "policy_loss: expected penalty_coef in [0, 1e+30], got a tensor of inf",
    ),
    (
        policy(config=Config(kl_coef=torch.tensor(math.nan)), ref_logprobs=ROWS),
        "policy_loss: expected kl_coef in [0, 1e+30], got a tensor of nan",
    ),
    # the policy loss's own
    (policy(config={}), "policy_loss: expected config to be a PolicyLossConfig, got dict"),
    (
        policy(ref_logprobs=ROWS, ref_logits=LOGITS),
        "policy_loss: expected ref_logprobs or ref_logits, got both",
    ),
    (
        policy(ref_logits=LOGITS),
        "policy_loss: expected ref_logprobs with kl_estimator='k3', got ref_logits",
    ),
    (
        policy(ref_logprobs=ROWS, config=Config(kl_estimator="full")),
        "policy_loss: expected ref_logits with kl_estimator='full', got ref_logprobs",
    ),
    (
        policy(config=Config(kl_coef=0.1)),
        "policy_loss: expected ref_logprobs with kl_coef=0.1, got no reference",
    ),
    (
        policy(config=Config(kl_coef=torch.tensor(0.0), kl_estimator="full")),
        "policy_loss: expected ref_logits with kl_coef=0.0, got no reference",
    ),
    (
        policy(logits=LOGITS.clone().requires_grad_(), inplace=True),
        "policy_loss: expected logits that are no leaf with inplace=True, got a leaf that requires grad",
    ),
    (
        policy(logits=(torch.zeros(2, 4, 3, requires_grad=True) * 1).mT, inplace=True),
        "policy_loss: expected logits that need no copy (unit stride over V) with inplace=True, "
        "got shape [2, 3, 4] with strides [12, 1, 3]",
    ),
    (
        policy(logits=(torch.zeros(4, requires_grad=True) * 1).expand(2, 3, 4), inplace=True),
        "policy_loss: expected logits without overlapping memory with inplace=True, "
        "got shape [2, 3, 4] with strides [0, 0, 1]",
    ),
    # the value loss's own
    (value(clip=0.2), "value_loss: expected old_values with clip=0.2, got None"),
    (value(clip=1e-45, old_values=ROWS), f"value_loss: expected clip to be {POSITIVE}, got 1e-45"),
    (value(clip=0, old_values=ROWS), "value_loss: expected clip to be a number in [1e-30, 1e+30], got 0"),
    (value(returns=None), "value_loss: expected returns to be a tensor, got NoneType"),
    (value(returns=ROWS[0]), "value_loss: expected returns to match values [2, 3], got [3]"),
    (
        value(aggregation="mean"),
        "value_loss: expected aggregation to be one of 'token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum', "
        "got 'mean'",
    ),
    # advantages
    (gae(rewards=torch.tensor(1.0)), "gae: expected rewards of shape [..., T], got []"),
    (gae(values=None), "gae: expected values to be a tensor, got NoneType"),
    (gae(values=ROWS[0]), "gae: expected values to match rewards [2, 3], got [3]"),
    (gae(bootstrap=torch.zeros(3)), "gae: expected bootstrap to match the sequences [2], got [3]"),
    (gae(dones=ROWS), "gae: expected dones to be bool, got torch.float32"),
    (gae(gamma=10**400), f"gae: expected gamma to be a number in [0, 1], got {HUGE}"),
    (gae(gamma=1.1), "gae: expected gamma to be a number in [0, 1], got 1.1"),
    (gae(lam=math.nan), "gae: expected lam to be a number in [0, 1], got nan"),
    (gae(lam=True), "gae: expected lam to be a number in [0, 1], got True"),
    (gae(mask_mode="skip"), "gae: expected mask_mode to be one of 'carry', 'zero', got 'skip'"),
    (gae_packed(rewards=ROWS), "gae_packed: expected rewards of shape [N], got [2, 3]"),
    (gae_packed(cu_seqlens=None), "gae_packed: expected cu_seqlens to be a tensor, got NoneType"),
    (gae_packed(bootstrap=torch.zeros(3)), "gae_packed: expected bootstrap to match the sequences [2], got [3]"),
    # masked functions
    (lambda: pf.masked_mean(TARGETS, None), f"masked_mean: expected x to be {FLOATS}, got torch.int64"),
    (lambda: pf.whiten(ROWS, MASK[0]), "whiten: expected mask to match x [2, 3], got [3]"),
    (
        lambda: pf.kl_estimate(ROWS, ROWS, "full"),
        "kl_estimate: expected estimator to be one of 'k1', 'k2', 'k3', got 'full'",
    ),
    (lambda: pf.kl_estimate(ROWS, None), "kl_estimate: expected ref_logprobs to be a tensor, got NoneType"),
    (
        lambda: pf.kl_estimate(ROWS, ROWS[0]),
        "kl_estimate: expected ref_logprobs to match logprobs [2, 3], got [3]",
    ),
    # preference pairs
    (
        lambda: pf.preference_loss(TARGETS, ROWS),
        f"preference_loss: expected chosen_scores to be {FLOATS}, got torch.int64",
    ),
    (lambda: pf.preference_loss(FLAT, None), "preference_loss: expected rejected_scores to be a tensor, got NoneType"),
    (
        lambda: pf.preference_loss(FLAT, FLAT[:2]),
        "preference_loss: expected rejected_scores to match chosen_scores [6], got [2]",
    ),
    (
        lambda: pf.preference_loss(FLAT, FLAT, margin=FLAT[:1]),
        "preference_loss: expected margin to match chosen_scores [6], got [1]",
    ),
    (
        lambda: pf.preference_loss(FLAT, FLAT.to(META)),
        "preference_loss: expected rejected_scores on the device of chosen_scores (cpu), got meta",
    ),
    (lambda: pf.dpo_loss(FLAT, FLAT, FLAT, None), "dpo_loss: expected ref_rejected to be a tensor, got NoneType"),
    (
        lambda: pf.dpo_loss(FLAT, FLAT, FLAT[:2], FLAT),
        "dpo_loss: expected ref_chosen to match logprobs_chosen [6], got [2]",
    ),
    (
        lambda: pf.dpo_loss(FLAT, FLAT, FLAT, FLAT, beta=0),
        "dpo_loss: expected beta to be a number in [1e-30, 1e+30], got 0",
    ),
    # the configuration
    (config(clip_low=-0.1), "PolicyLossConfig: expected clip_low to be a number in [0, 1], got -0.1"),
    (config(clip_high=math.inf), "PolicyLossConfig: expected clip_high to be a number in [0, 1e+30], got inf"),
    (config(dual_clip=1.0), "PolicyLossConfig: expected dual_clip to be a number in (1, 1e+30], got 1.0"),
    (config(temperature=0), "PolicyLossConfig: expected temperature to be a number in [1e-09, 1e+09], got 0"),
    (config(clip_low=2.0), "PolicyLossConfig: expected clip_low to be a number in [0, 1], got 2.0"),
    (config(clip_high=1e300), "PolicyLossConfig: expected clip_high to be a number in [0, 1e+30], got 1e+300"),
    (config(dual_clip=math.nan), "PolicyLossConfig: expected dual_clip to be a number in (1, 1e+30], got nan"),
    (config(temperature=1e-45), "PolicyLossConfig: expected temperature to be a number in [1e-09, 1e+09], got 1e-45"),
    (config(kl_coef=10**400), f"PolicyLossConfig: expected kl_coef to be a number in [0, 1e+30], got {HUGE}"),
    (config(ent_coef=ROWS.to_sparse()), f"PolicyLossConfig: expected ent_coef to be a dense tensor, got {SPARSE}"),
    (config(kl_coef=dtensor(torch.ones(()))), "PolicyLossConfig: expected kl_coef to be a whole tensor, got a DTensor"),
    (config(temperature=True), "PolicyLossConfig: expected temperature to be a number in [1e-09, 1e+09], got True"),
    (config(ent_coef=math.nan), "PolicyLossConfig: expected ent_coef to be a number in [0, 1e+30], got nan"),
    (config(kl_coef="0.1"), "PolicyLossConfig: expected kl_coef to be a number in [0, 1e+30], got '0.1'"),
    (
        config(penalty_coef=torch.zeros(2)),
        f"{PENALTY} a number or a 0-d floating tensor, got a tensor of shape [2] and dtype torch.float32",
    ),
    (
        config(penalty_coef=torch.tensor(1)),
        f"{PENALTY} a number or a 0-d floating tensor, got a tensor of shape [] and dtype torch.int64",
    ),
    (
        config(objective="ppo"),
        "PolicyLossConfig: expected objective to be one of 'clip', 'cispo', got 'ppo'",
    ),
    (
        config(objective="cispo", dual_clip=3.0),
        "PolicyLossConfig: expected dual_clip to be None with objective='cispo', got 3.0",
    ),
    (config(ratio="group"), "PolicyLossConfig: expected ratio to be one of 'token', 'sequence', got 'group'"),
    (
        config(kl_estimator="k4"),
        "PolicyLossConfig: expected kl_estimator to be one of 'k1', 'k2', 'k3', 'full', got 'k4'",
    ),
    (
        config(aggregation="sum"),
        "PolicyLossConfig: expected aggregation to be one of 'token-mean', 'seq-mean-token-mean', "
        "'seq-mean-token-sum', got 'sum'",
    ),
    # backends
    (
        gae(backend="numba"),
        "gae: expected backend to be one of 'auto', 'torch', 'triton', 'native', 'cuda', got 'numba'",
    ),
    (
        stats(backend="cuda"),
        "token_stats: expected a usable backend, got 'cuda': token_stats has no cuda implementation",
    ),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_op_refuses_a_dtensor_and_a_sparse_tensor_in_every_argument(name: str) -> None:
    op = EXAMPLES[name].op or name
    for argument, value in EXAMPLES[name].inputs.items():
        hint = HEAD.format(argument) if argument.endswith(("weight", "bias")) else ""
        with raises_exactly(f"{op}: expected {argument} to be a whole tensor, got a DTensor{hint}"):
            run(name, "auto", {**EXAMPLES[name].inputs, argument: dtensor(value)})
        with raises_exactly(f"{op}: expected {argument} to be a dense tensor, got {SPARSE}"):
            run(name, "auto", {**EXAMPLES[name].inputs, argument: value.to_sparse()})


@pytest.mark.parametrize("op", [policy, value])
def test_a_denominator_of_0_is_the_count_of_nothing(op: Callable[..., Any]) -> None:
    """As that of micro-batches none of whose tokens counts."""
    nothing = torch.zeros_like(MASK)
    assert op(mask=nothing, denominator=nothing.sum())().loss.item() == 0


@pytest.mark.parametrize(("call", "message"), TABLE, ids=[message for _, message in TABLE])
def test_message(call: Callable[[], Any], message: str) -> None:
    with raises_exactly(message):
        call()


def test_inplace_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with raises_exactly("policy_loss: expected inplace=False under torch.compile, got inplace=True"):
        policy(logits=LOGITS.clone().requires_grad_() * 1, inplace=True)()


def raise_statements(pattern: str) -> set[tuple[str, int]]:
    """(file, line) of each ``raise ValueError`` in the ops' files of that pattern."""
    found = set()
    for path in OPS.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and "ValueError" in ast.unparse(node):
                found.add((path.name, node.lineno))
    return found


def line_of(call: Callable[[], Any]) -> tuple[str, int]:
    """Where the call raised."""
    with pytest.raises(ValueError) as caught:
        call()
    last = caught.traceback[-1]
    return last.path.name, last.lineno + 1


def test_no_raise_statement_is_missing_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = {line_of(call) for call, _ in TABLE}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    reached.add(line_of(policy(logits=LOGITS.clone().requires_grad_() * 1, inplace=True)))
    linear = raise_statements("_linear_*.py")
    assert raise_statements("*.py") - linear <= reached


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_without_a_layout_of_their_own() -> None:
    """Their layout is that of dense tensors, and they have no shape to compare."""
    nested = torch.nested.nested_tensor([LOGITS[0], LOGITS[1]])
    with raises_exactly("token_stats: expected logits to be a dense tensor, got a nested one"):
        stats(logits=nested)()
    with raises_exactly("policy_loss: expected advantages to be a dense tensor, got a nested one"):
        policy(advantages=nested)()
