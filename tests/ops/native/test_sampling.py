"""The kernel of sample_tokens on every instruction set: widths of vectors, blocks and stretches, many threads."""

import pytest
import torch

import ppo_fast as pf
from tests.helpers import assert_same
from tests.ops.native.isas import each_dtype, each_isa, each_vocabulary, logits_of, threads, using
from tests.ops.test_sample_tokens import keys_of

ROWS = 12


@each_isa
@each_dtype
@each_vocabulary
def test_every_instruction_set_draws_the_words_of_the_definition(isa: str, dtype: torch.dtype, vocab: int) -> None:
    logits, keys = logits_of(ROWS, vocab, dtype, banned=True), keys_of(ROWS, seed=vocab)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 100, "top_p": 0.9}):
        with using(isa):
            ours = pf.sample_tokens(logits, keys, temperature=0.8, backend="native", **filters)
        truth = pf.sample_tokens(logits.double(), keys, temperature=0.8, backend="torch", **filters)
        assert_same(ours.tokens, truth.tokens)
        torch.testing.assert_close(ours.logprobs, truth.logprobs.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("order", [False, True], ids=["falling", "rising"])
def test_the_largest_of_a_sorted_row_are_found(order: bool) -> None:
    logits, keys = torch.arange(5000.0).mul(1e-3).flip(0 if not order else ()).expand(40, -1), keys_of(40)
    for top_k in (1, 50, 1000, 4999):
        ours = pf.sample_tokens(logits, keys, top_k=top_k, backend="native")
        assert_same(ours.tokens, pf.sample_tokens(logits.double(), keys, top_k=top_k, backend="torch").tokens)


def test_threads_change_nothing() -> None:
    logits, keys = logits_of(60, 3000), keys_of(60)
    whole = pf.sample_tokens(logits, keys, top_k=40, backend="native")
    with threads(4):
        assert_same(tuple(pf.sample_tokens(logits, keys, top_k=40, backend="native")), tuple(whole))
