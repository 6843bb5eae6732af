"""The linear ops under real transformers, tied embeddings included, and under torch.compile with a trained head."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import ppo_fast as pf
from tests.helpers import assert_same, each_backend

V, B, L = 37, 2, 4


def gpt2() -> Any:
    """Two layers; GPT-2 ties its embeddings."""
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def qwen2(**options: Any) -> Any:
    """Two layers; embeddings tied or not."""
    config = transformers.Qwen2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return transformers.Qwen2ForCausalLM(config)


def gemma2() -> Any:
    """Final-logit softcapping, embeddings tied."""
    config = transformers.Gemma2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=2.0,
        tie_word_embeddings=True,
    )
    return transformers.Gemma2ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "tied qwen2": lambda: qwen2(tie_word_embeddings=True),
    "untied qwen2": lambda: qwen2(tie_word_embeddings=False),
    "gemma2": gemma2,
}


def batch() -> tuple[Tensor, ...]:
    """(ids, old_logprobs, advantages, mask) of the tokens after the first."""
    ids = torch.randint(V, (B, L))
    return ids, torch.randn(B, L - 1) - 3.6, torch.randn(B, L - 1), torch.rand(B, L - 1) < 0.7


CONFIG = pf.PolicyLossConfig(ent_coef=0.1, temperature=0.9)


@pytest.mark.parametrize("name", MODELS)
@each_backend("linear_policy_loss")
def test_every_parameter_gets_the_gradient_of_the_materialized_path(name: str, backend: str) -> None:
    model = MODELS[name]().eval()
    ids, *rows = batch()
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    assert tied == (name != "untied qwen2")
    hidden = model.base_model(input_ids=ids).last_hidden_state
    softcap = getattr(model.config, "final_logit_softcapping", None)
    ours = pf.linear_policy_loss(
        hidden[:, :-1], head.weight, ids[:, 1:], *rows, config=CONFIG, softcap=softcap, chunk_size=4, backend=backend
    )
    found = torch.autograd.grad(ours.loss, list(model.parameters()))
    theirs = pf.policy_loss(model(input_ids=ids).logits[:, :-1], ids[:, 1:], *rows, config=CONFIG, backend=backend)
    expected = torch.autograd.grad(theirs.loss, list(model.parameters()))
    torch.testing.assert_close(ours.loss, theirs.loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_with_a_trained_head() -> None:
    weight, bias = torch.randn(V, 16, requires_grad=True), torch.randn(V, requires_grad=True)
    projection = torch.randn(16, 16, requires_grad=True)

    def loss(x: Tensor, ids: Tensor, *rows: Tensor) -> Tensor:
        hidden = torch.tanh(x @ projection)
        out = pf.linear_policy_loss(hidden, weight, ids, *rows, bias=bias, config=CONFIG)
        stats = pf.linear_token_stats(hidden, weight, ids, bias=bias, mask=rows[2])
        return 2 * out.loss + stats.entropy.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (projection, weight, bias)
    for length in (L, L + 1, L + 2):
        rows = torch.randn(B, length) - 3.6, torch.randn(B, length), torch.rand(B, length) < 0.7
        given = torch.randn(B, length, 16), torch.randint(V, (B, length)), *rows
        ours, theirs = compiled(*given), loss(*given)
        assert_same(ours.detach(), theirs.detach())
        assert_same(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves))
