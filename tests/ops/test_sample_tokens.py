"""sample_tokens: published noise, the distribution that it draws from, filters against their definition, keys."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.ops._backends.reference.sample_tokens import exponential, noise, philox
from tests.helpers import DTYPES, INTERPRETED, assert_near_truth, assert_same, each_backend, each_case
from tests.ops.test_memory import peak_bytes

INF, NAN = math.inf, math.nan
# The interpreter takes a thirtieth of a second for a row.
FEW = 1 if INTERPRETED else 40
EXTREMES = {0: 2.0**-32, 1: 1.5 * 2.0**-31, (1 << 31) - 1: 32 * math.log(2)}


def keys_of(n: int, seed: int = 3, step: int = 0) -> Tensor:
    """Keys [n, 3] of rows 0 to n - 1."""
    return torch.stack([torch.full((n,), seed), torch.arange(n), torch.full((n,), step)], dim=-1)


def scores(logits: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The Gumbel race of the definition, in float64; of logits [N, V] or [V]."""
    return logits.double() / temperature - noise(keys, logits.shape[-1]).double().log()


def kept_by_definition(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> list[int]:
    """The words of logits [V] that the docstring keeps, each compared with all others."""
    x = logits.double()
    larger = x[None, :] > x[:, None]
    kept = larger.sum(-1) < (top_k or len(x))
    if top_p is not None:
        p = torch.where(kept, torch.exp((x - x.max()) / temperature), 0.0)
        kept &= (torch.where(larger, p, 0.0).sum(-1) < top_p * p.sum()) | ~larger.any(-1)
    return kept.nonzero()[:, 0].tolist()


def test_words_are_those_of_random123() -> None:
    """The known answers of philox4x32-10 in Random123's kat_vectors."""
    answers = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
            *(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    }
    for (counter, key), expected in answers.items():
        words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(word.item() for word in words) == expected


def test_noise_is_open_and_keeps_the_digits_of_both_ends() -> None:
    upper = torch.tensor([*EXTREMES, 1 << 26, (1 << 26) - 1])
    drawn = exponential(upper << 1)
    truth = -torch.log1p(-(upper.double() + 0.5) * 2.0**-31)
    assert ((drawn - truth) / truth).abs().max() < 1e-5
    assert drawn[:3].tolist() == pytest.approx([*EXTREMES.values()], rel=1e-6)


def test_each_part_of_the_key_and_each_word_draws_other_noise() -> None:
    plain = [5, 6, 7]
    others = [[5 + (1 << 32), 6, 7], [6, 6, 7], [5, 6 + (1 << 32), 7], [5, 7, 7], [5, 6, 8], [-5, 6, 7], [5, -6, 7]]
    drawn = noise(torch.tensor([plain, *others]), 9)
    assert drawn.unique().numel() == drawn.numel()


@each_case("sample_tokens", DTYPES[:2] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("V", [1, 33, 2100] if INTERPRETED else [1, 2, 3, 33, 1000, 50_257])
def test_the_race_is_won_by_the_word_of_the_definition(backend: str, dtype: torch.dtype, V: int) -> None:
    n = 1 if V > 1000 else FEW
    logits, keys = (3 * torch.randn(n, V)).to(dtype), keys_of(n, seed=-(1 << 40) + V, step=(1 << 32) - 1)
    sampled = pf.sample_tokens(logits, keys, temperature=0.7, backend=backend)
    assert_same(sampled.tokens, scores(logits, keys, 0.7).argmax(-1))
    truth = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, sampled.tokens[:, None])[:, 0]
    eager = torch.log_softmax(logits.float() / 0.7, -1).gather(-1, sampled.tokens[:, None])[:, 0]
    assert_near_truth(sampled.logprobs, truth, eager, dtype=dtype)


@pytest.mark.skipif(INTERPRETED, reason="thousands of rows take minutes; other tests compare word by word")
@each_backend("sample_tokens")
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_chi_square_of_the_distribution(backend: str, temperature: float) -> None:
    n, logits = 4000, torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -INF, 1.5, -2.0, 0.0])
    expected = n * torch.softmax(logits / temperature, -1)
    sampled = pf.sample_tokens(logits.expand(n, -1), keys_of(n), temperature=temperature, backend=backend)
    seen = torch.bincount(sampled.tokens, minlength=len(logits))
    possible = expected > 0
    assert seen[~possible].sum() == 0
    # Seven degrees of freedom: above 24.3 with probability 0.001.
    assert ((seen - expected) ** 2 / expected)[possible].sum() < 24.3


@each_backend("sample_tokens")
@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 1.0, 2.0, -1.0, 0.5, 1.2],
        [1.0, 2.0, 2.0, 0.0, 1.0, 2.0, -INF, -1.0],
        [0.0, -0.0, 1.0, -1.0, 0.0],
        [0.0] * 5,
        [3e4 + 2, 3e4, 3e4 + 1],
        [-INF, 0.0, -INF],
    ][: 2 if INTERPRETED else None],
)
def test_filters_keep_the_words_of_the_definition(backend: str, logits: list[float]) -> None:
    x, keys = torch.tensor(logits), keys_of(FEW)
    race = scores(x, keys, 1.5)
    for top_k in (None, 2) if INTERPRETED else (None, 1, 2, 3, 5, 100):
        for top_p in (None, 0.55) if INTERPRETED else (None, 1e-9, 0.3, 0.55, 0.9, 0.999, 1.0):
            kept = torch.tensor(kept_by_definition(x, 1.5, top_k, top_p))
            filters = {"top_k": top_k, "top_p": top_p}
            ours = pf.sample_tokens(x.expand(FEW, -1), keys, temperature=1.5, backend=backend, **filters)
            assert_same(ours.tokens, kept[race[:, kept].argmax(-1)])


@each_case("sample_tokens", DTYPES[1:3] if INTERPRETED else DTYPES)
def test_filters_of_wide_rows(backend: str, dtype: torch.dtype) -> None:
    n, V = 1 if INTERPRETED else 6, 1501
    logits, keys = (4 * torch.randn(n, V)).to(dtype), keys_of(n)
    race = scores(logits, keys, 0.9)
    several = ((50, None), (None, 0.95), (700, 0.8), (V, 0.3), (1500, None))
    for top_k, top_p in several[2:3] if INTERPRETED else several:
        ours = pf.sample_tokens(logits, keys, temperature=0.9, top_k=top_k, top_p=top_p, backend=backend)
        for row in range(n):
            words = torch.tensor(kept_by_definition(logits[row], 0.9, top_k, top_p))
            assert ours.tokens[row] == words[race[row, words].argmax()], (top_k, top_p, row)
        plain = pf.token_logprobs(logits, ours.tokens, temperature=0.9)
        assert_near_truth(ours.logprobs, plain, plain, dtype=dtype)


@each_backend("sample_tokens")
@pytest.mark.parametrize(("V", "filters"), [(1500, {}), (40, {"top_k": 9, "top_p": 0.8})])
def test_a_row_depends_on_its_key_and_logits_only(backend: str, V: int, filters: dict[str, Any]) -> None:
    shape = (2, 2) if INTERPRETED else (4, 3)
    logits, keys = torch.randn(*shape, V).bfloat16(), keys_of(math.prod(shape), seed=9).view(*shape, 3)
    whole = pf.sample_tokens(logits, keys, backend=backend, **filters)
    order = torch.randperm(math.prod(shape))
    shuffled = (x.flatten(0, 1)[order] for x in (logits, keys))
    assert_same(
        tuple(pf.sample_tokens(*shuffled, backend=backend, **filters)), tuple(x.flatten()[order] for x in whole)
    )
    single = pf.sample_tokens(logits[1:2, 1], keys[1:2, 1], backend=backend, **filters)
    assert_same(tuple(single), tuple(x[1:2, 1] for x in whole))
    strided = pf.sample_tokens(logits.transpose(0, 1), keys.transpose(0, 1), backend=backend, **filters)
    assert_same(tuple(strided), tuple(x.T for x in whole))


@each_backend("sample_tokens")
def test_extreme_temperatures(backend: str) -> None:
    keys = keys_of(4)
    for logits, temperature in ([0.0, 1e-6, -3.0, 1e-6], 1e-9), ([5.0, -5.0, 0.0], 1e9), ([3e38, -3e38, 0.0], 1.0):
        x = torch.tensor(logits)
        ours = pf.sample_tokens(x.expand(4, -1), keys, temperature=temperature, backend=backend)
        assert_same(ours.tokens, scores(x, keys, temperature).argmax(-1))


@each_backend("sample_tokens")
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.5}])
def test_rows_without_a_distribution(backend: str, filters: dict[str, Any]) -> None:
    logits = torch.zeros(5, 600)
    logits[0, 300], logits[1, 400], logits[2], logits[3, 5] = NAN, INF, -INF, 40.0
    sampled = pf.sample_tokens(logits, keys_of(5), backend=backend, **filters)
    assert sampled.tokens[:4].tolist() == [0, 0, 0, 5]
    assert sampled.logprobs.isnan().tolist() == [True, True, True, False, False]


@each_backend("sample_tokens")
def test_no_rows_and_no_leading_shape(backend: str) -> None:
    empty = pf.sample_tokens(torch.zeros(0, 2, 5), torch.zeros(0, 2, 3, dtype=torch.long), backend=backend)
    assert [x.shape for x in empty] == [(0, 2), (0, 2)]
    one = pf.sample_tokens(torch.zeros(5), torch.tensor([1, 2, 3]), backend=backend)
    assert [x.shape for x in one] == [(), ()]
    assert one.logprobs == pytest.approx(-math.log(5))


@pytest.mark.skipif(INTERPRETED, reason="tests/aot counts what the launcher allocates")
@each_backend("sample_tokens")
def test_nothing_of_the_size_of_the_logits_is_allocated(backend: str) -> None:
    if backend == "torch":
        pytest.skip("the definition draws the noise of about a million words at once")
    n = 16
    logits, keys = torch.randn(n, 4096).bfloat16(), keys_of(n)
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        peak = peak_bytes(lambda filters=filters: pf.sample_tokens(logits, keys, backend=backend, **filters))
        assert peak <= 64 * n


def test_results_carry_no_gradient() -> None:
    sampled = pf.sample_tokens(torch.zeros(2, 5, requires_grad=True), keys_of(2))
    assert not sampled.logprobs.requires_grad
