"""Which kernel a machine gets, and how flash-attn's is called."""

import sys
import types

import pytest
import torch
from transformers import utils

from ppo_fast.rlhf.decoding import kernels
from ppo_fast.rlhf.decoding.slots import run_slots
from tests.rlhf.decoding.factories import make, requests, settings


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size, softcap):
    """The documented results for one query token, which stands at the end of the first `cache_seqlens` keys."""
    assert causal
    assert cache_seqlens.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k_cache, v_cache))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * softmax_scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    back = cache_seqlens[:, None] - 1 - torch.arange(k.shape[1])
    seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
    return torch.einsum("bhqk,bkhe->bqhe", scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
def test_flash_attn_gives_the_tokens_of_attention_with_a_mask(monkeypatch, arch):
    model = make(arch, "eager")
    expected = run_slots(model, requests(), settings())
    module = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(kernels, "cached_attention", lambda query: kernels.flash_attention)
    found = run_slots(model, requests(), settings())
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.logprobs - expected.logprobs).abs().max() <= 1e-5


def test_the_kernel_of_a_device(monkeypatch):
    half, single = (
        types.SimpleNamespace(device=torch.device("cuda"), dtype=x) for x in (torch.bfloat16, torch.float32)
    )
    assert kernels.cached_attention(torch.zeros(1)) is None
    for installed in (False, True):
        monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda installed=installed: installed)
        name = "flash_attention" if installed else "slot_attention"
        assert kernels.cached_attention(half).__name__ == name
        assert kernels.cached_attention(single).__name__ == "slot_attention"
