"""Slots on a GPU: replayed graphs and the attention kernel give the tokens of the CPU."""

import pytest
import torch

from ppo_fast.rlhf.decoding.slots import run_slots
from tests.rlhf.decoding.factories import make, requests, settings


@pytest.mark.gpu
@pytest.mark.parametrize(("arch", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "sdpa")])
def test_a_gpu_samples_the_tokens_of_a_cpu(arch, attention):
    model = make(arch, attention)
    expected = run_slots(model, requests(), settings())
    found = run_slots(model.cuda(), requests(), settings())
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    assert torch.equal(found.lengths.cpu(), expected.lengths)
    assert (found.logprobs.cpu() - expected.logprobs).abs().max() <= 1e-3
