"""The engine `slots`: the tokens of `generate` under the same noise, whatever the slots, blocks and steps."""

import functools
import gc
from types import SimpleNamespace

import pytest
import torch

from ppo_fast import ops
from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.decoding import slots
from ppo_fast.rlhf.decoding.attention import rotary_table
from ppo_fast.rlhf.decoding.flags import Flags
from ppo_fast.rlhf.decoding.generate import run_generate
from ppo_fast.rlhf.decoding.requests import Greedy, Request, Sampling
from ppo_fast.rlhf.decoding.slots import PACES, blocks, run_slots
from ppo_fast.rlhf.decoding.support import SUPPORTED
from tests.helpers import raises_exactly
from tests.rlhf.decoding.factories import ARCHITECTURES, make, requests, settings


def assert_same(ours, theirs):
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.ended, theirs.ended)
    assert (ours.logprobs - theirs.logprobs).abs().max() <= 1e-5


def scored(model, asked, responses, temperature):
    """Log-probabilities by the model's own forward pass over each sequence by itself; 0 past its end."""
    found = torch.zeros_like(responses.logprobs)
    for row, (request, length) in enumerate(zip(asked, responses.lengths.tolist(), strict=True)):
        ids = torch.tensor([[*request.prompt, *responses.tokens[row, :length].tolist()]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
        found[row, :length] = ops.token_logprobs(logits, ids[0, len(request.prompt) :], temperature=temperature)
    return found


def test_every_supported_architecture_is_tested():
    assert sorted(ARCHITECTURES) == sorted(SUPPORTED)


@pytest.mark.parametrize(("arch", "attention"), [*((arch, "sdpa") for arch in ARCHITECTURES), ("gemma2", "eager")])
def test_slots_sample_the_tokens_of_generate_and_the_logprobs_of_scoring(monkeypatch, arch, attention):
    """12 responses of 1 to 20 tokens through 5 slots; prompts longer than a block of prefill, than a window, of 1."""
    monkeypatch.setattr(slots, "PREFILL_TOKENS", 8)
    model = make(arch, attention)
    ours = run_slots(model, requests(), settings())
    assert model.config._attn_implementation == attention
    assert_same(ours, run_generate(model, requests(), settings()))
    assert 0 < ours.ended.sum() < len(ours.ended)
    assert (ours.logprobs - scored(model, requests(), ours, 0.9)).abs().max() <= 1e-5


def test_the_softcap_of_scores_is_that_of_the_models_own_attention():
    """transformers' sdpa leaves the softcap of Gemma 2 out, its eager attention does not."""
    with_cap, without = (run_slots(make("gemma2", name), requests(), settings()) for name in ("eager", "sdpa"))
    assert not torch.equal(with_cap.tokens, without.tokens)


class LateFlags(Flags):
    """Shows the snapshot before the latest, as on a GPU."""

    def __init__(self, buffer):
        super().__init__(buffer)
        self.kept = []

    def take(self):
        super().take()
        self.kept.append(self.buffer.tolist())

    def read(self):
        return (self.taken - 1, self.kept[-2]) if self.taken > 1 else (0, [])


@pytest.mark.parametrize(("width", "late"), [(1, True), (3, False), (64, True)])
def test_a_response_depends_on_neither_slots_nor_the_moment_its_end_is_seen(monkeypatch, width, late):
    model = make("llama")
    expected = run_slots(model, requests(), settings())
    if late:
        monkeypatch.setattr(slots, "Flags", LateFlags)
        monkeypatch.setitem(PACES, "cpu", PACES["cuda"])
    assert_same(run_slots(model, requests(), settings(width=width)), expected)
    few = requests()[7:3:-1]
    alone = run_slots(model, few, settings(width=width))
    for row, request in zip(alone.tokens, few, strict=True):
        assert torch.equal(row, expected.tokens[request.row - 100, : len(row)])


def test_greedy_takes_the_likeliest_token():
    model = make("qwen2")
    ours = run_slots(model, requests(), settings(sampling=Greedy()))
    for request, row, length in zip(requests(), ours.tokens, ours.lengths.tolist(), strict=True):
        ids = torch.tensor([request.prompt])
        theirs = model.generate(
            ids, max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=[5, 11], pad_token_id=0
        )
        assert theirs[0, len(request.prompt) :].tolist() == row[:length].tolist()
        assert not row[length:].any()


def test_a_prompt_is_prefilled_once_for_all_its_samples(monkeypatch):
    """By blocks of bounded tokens, through 2 slots that are refilled one at a time."""
    seen, cut = [], slots.blocks

    def watched(*arguments):
        for block in cut(*arguments):
            seen.append(block.ids.shape)
            yield block

    monkeypatch.setattr(slots, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(slots, "blocks", watched)
    asked = [Request([3 + p] * (5 + 7 * p), 4 * p + i, 3 + 2 * i) for i in range(4) for p in range(3)]
    model = make("llama")
    ours = run_slots(model, asked, settings(width=2))
    assert seen == [(1, 4), (1, 8), (1, 3), (1, 8), (1, 8), (1, 2)]
    assert_same(ours, run_generate(model, asked, settings()))


def test_blocks_hold_bounded_tokens_of_prompts_of_like_length():
    found = [*blocks({4: [1] * 5, 1: [2], 0: [3] * 6, 7: [], 2: [4] * 15}, 12, pad_id=9)]
    assert [(block.slots, block.start) for block in found] == [([2], 0), ([2], 12), ([0, 4], 0), ([1], 0)]
    assert found[2].ids.tolist() == [[3] * 6, [1] * 5 + [9]]
    assert found[1].ids.tolist() == [[4] * 3]


def test_keys_and_values_are_gone_when_the_responses_are_there():
    model = make("llama")
    run_slots(model, requests(), settings())  # whatever is kept for good
    gc.collect()
    gc.disable()  # nobody waits for the collector
    try:
        before = {id(x) for x in gc.get_objects()}
        kept = run_slots(model, requests(), settings())
        found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
    finally:
        gc.enable()
    assert max(x.ndim for x in found) == 2
    assert any(x is kept.tokens for x in found)


def test_an_error_leaves_the_model_its_attention(monkeypatch):
    model = make("llama")
    monkeypatch.setattr(Sampling, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_slots(model, requests(), settings())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bloom"}, f"a model of the type {', '.join(SUPPORTED)}, got 'bloom'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings that do not depend on the batch, got 'dynamic'",
        ),
        ({"use_bidirectional_attention": True}, "causal attention, got use_bidirectional_attention"),
    ],
)
def test_a_model_that_cannot_run_in_slots_is_named_with_the_setting_that_runs_it(changes, reason):
    model = make("llama")
    for name, value in changes.items():
        if name == "model_type":
            type(model.config).model_type = value  # of the class
            continue
        setattr(model.config, name, value)
    try:
        with raises_exactly(f"rollout.engine: expected {reason}; 'generate' runs any model", UserError):
            run_slots(model, requests(), settings())
    finally:
        type(model.config).model_type = "llama"


def test_rotary_embeddings_of_the_table_are_the_modules_own():
    """Positions in any order, both kinds of layer of Gemma 3; a wrapper on the instance is there again afterwards."""
    module, positions = make("gemma3_text").model.rotary_emb, torch.tensor([[9, 0], [4, 31]])
    x = torch.zeros(2, 2, 32)
    own = module.forward = functools.partial(type(module).forward, module)
    for kind in ("full_attention", "sliding_attention"):
        expected = module(x, positions, kind)
        with rotary_table(SimpleNamespace(rotary_emb=module), 32):
            for _ in range(2):
                assert all(map(torch.equal, module(x, positions, kind), expected))
            with pytest.raises(IndexError):
                module(x, positions + 1, kind)
        assert module.forward is own
    del module.forward


def test_responses_can_be_saved_for_a_backward_pass_and_hooks_run():
    """On a CPU the loop keeps no records for autograd."""
    model, calls, asked = make("llama"), [], requests()[:2]
    plain = run_slots(model, asked, settings())
    weight = torch.ones((), requires_grad=True)
    (plain.logprobs * weight).sum().backward()
    assert weight.grad == plain.logprobs.sum()
    handle = model.model.register_forward_hook(lambda *_: calls.append(torch.is_inference_mode_enabled()))
    assert_same(run_slots(model, asked, settings()), plain)
    handle.remove()
    assert calls
    assert not any(calls)
