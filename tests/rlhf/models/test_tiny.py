"""The models and tokenizers that need no download."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.rlhf.models import tiny
from tests.helpers import raises_exactly

ARCHITECTURES = ("llama", "qwen2", "gpt2")


def test_words_follow_the_special_tokens_and_decode_with_spaces() -> None:
    tokenizer = tiny.make_tokenizer(["soup", "was", "."])
    assert tokenizer("soup was  .")["input_ids"] == [4, 5, 6]
    assert tokenizer("a soup")["input_ids"] == [3, 4]
    assert tokenizer.decode([4, 5, 6, 2, 0], skip_special_tokens=True) == "soup was ."
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_prompts_are_padded_on_the_left() -> None:
    batch = tiny.make_tokenizer(["a", "b"])(["a b", "b"], padding=True)
    assert batch["input_ids"] == [[4, 5], [0, 5]]


@pytest.mark.parametrize("word", ["a", "", "two words", "<eos>"])
def test_words_that_cannot_be_told_apart_are_refused(word: str) -> None:
    with raises_exactly(f"make_tokenizer: expected words to be unique and without spaces, got {word!r}"):
        tiny.make_tokenizer(["a", word])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_model_has_the_shape_asked_for(arch: str) -> None:
    model = tiny.make_model(20, arch=arch, hidden=32, layers=3, heads=2, max_positions=48)
    assert model(torch.zeros(2, 5, dtype=torch.int64)).logits.shape == (2, 5, 20)
    config = model.config
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.max_position_embeddings)
    assert shape == (32, 3, 2, 48)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = torch.cat([p.flatten() for p in tiny.make_model(20, seed=1).parameters()])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = torch.cat([p.flatten() for p in tiny.make_model(20, seed=1).parameters()])
    other = torch.cat([p.flatten() for p in tiny.make_model(20, seed=2).parameters()])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_configuration_fields_can_be_overridden() -> None:
    assert tiny.make_model(20, arch="gpt2", attn_pdrop=0.3).config.attn_pdrop == 0.3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_saved_model_and_tokenizer_load_again(arch: str, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(["a", "b"])
    model = tiny.make_model(len(tokenizer), arch=arch, hidden=16, layers=1, heads=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("a b a", return_tensors="pt").input_ids
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_unknown_architecture_is_refused() -> None:
    with raises_exactly("make_model: expected arch to be one of llama, qwen2, gpt2, got 'bert'"):
        tiny.make_model(20, arch="bert")


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with raises_exactly("make_model: expected hidden to be a multiple of heads = 4, got 30"):
        tiny.make_model(20, hidden=30)
