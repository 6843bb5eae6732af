"""Packed rows: each sequence has the hidden states and gradients that it has alone, and no [S, S] mask is made."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.config.model import CausalConfig, ModelConfig, WeightsConfig
from ppo_fast.rlhf.models import attention, tiny
from ppo_fast.rlhf.models.attention import (
    VARLEN,
    attention_implementation,
    check_packed,
    packed_arguments,
    use_attention,
    varlen_attention,
)
from tests.helpers import raises_exactly

LENGTHS = (5, 1, 7, 3)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
GROUPED = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "gpt2": lambda: tiny.make_model(64, arch="gpt2", hidden=32),
    "llama": lambda: tiny.make_model(64, hidden=32, num_key_value_heads=2),
    "qwen2": lambda: tiny.make_model(64, arch="qwen2", hidden=32),
    "mistral": lambda: made(transformers.MistralConfig(**GROUPED, sliding_window=3)),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def sequences(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 64, (length,), generator=generator) for length in lengths]


def packed_states(backbone, parts):
    """Hidden states [S, D] of the sequences as one row."""
    device = parts[0].device
    ends = torch.tensor([0, *(len(part) for part in parts)], device=device).cumsum(0).int()
    row = {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat([torch.arange(len(part), device=device) for part in parts])[None],
        "attention_mask": None,
    }
    more = packed_arguments(backbone, ends, max(map(len, parts)))
    return backbone(**row | more, use_cache=False).last_hidden_state[0]


def lone_states(backbone, parts):
    alone = ({"input_ids": part[None], "attention_mask": torch.ones_like(part)[None]} for part in parts)
    return torch.cat([backbone(**inputs, use_cache=False).last_hidden_state[0] for inputs in alone])


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch's varlen_attn computes, sequence by sequence."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    found = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_k.tolist()[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        one = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
        found.append(one[0].transpose(0, 1))
    return torch.cat(found)


def plain_varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture(params=[attention._by_sequence, plain_varlen, plain_varlen_of_torch_2_11])
def on_a_cpu(request, monkeypatch):
    """The attention of ours on a CPU, by what it computes there and by what stands for torch's kernel."""
    monkeypatch.setattr(attention, "_by_sequence", request.param)
    attention.register()


def with_varlen(model):
    model.set_attn_implementation(VARLEN)
    return model


@each_shape
def test_a_sequence_in_a_packed_row_sees_no_other(shape):
    backbone, parts = SHAPES[shape]().base_model, sequences()
    states = packed_states(backbone, parts)
    torch.testing.assert_close(states, lone_states(backbone, parts), atol=2e-6, rtol=1e-5)
    changed = [part + (index == 2) * (1 - 2 * (part > 60).long()) for index, part in enumerate(parts)]
    again = packed_states(backbone, changed)
    same = (again == states).all(dim=1).split(LENGTHS)
    assert [part.all().item() for part in same] == [True, True, False, True]


@each_shape
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_varlen_attention_gives_states_and_gradients_of_each_sequence_alone(shape, checkpointing, on_a_cpu):
    plain = SHAPES[shape]()
    ours, parts = with_varlen(copy.deepcopy(plain)), sequences()
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train().config.attention_dropout = 0.0
        for module in ours.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    weight = torch.randn(sum(LENGTHS), 32)
    states = [packed_states(ours.base_model, parts), lone_states(plain.base_model, parts)]
    torch.testing.assert_close(*states, atol=2e-6, rtol=1e-5)
    for found in states:
        (found * weight).sum().backward()
    for mine, theirs in zip(ours.base_model.parameters(), plain.base_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made in the block has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize(("ours", "square"), [(True, False), (False, True)])
def test_no_mask_of_the_whole_row_is_made(on_a_cpu, ours, square):
    model, parts = tiny.make_model(64, hidden=8, heads=1), sequences([4] * 128)
    if ours:
        with_varlen(model)
    with torch.no_grad(), Largest() as largest:
        packed_states(model.base_model, parts)
    assert (largest.elements >= 512 * 512) is square


def test_nobody_asks_the_device_whether_positions_start_again(on_a_cpu, monkeypatch):
    """`find_packed_sequence_indices` would, and the host would wait."""
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", None)
    packed_states(with_varlen(tiny.make_model(64, hidden=32)).base_model, sequences())


@each_shape
def test_padded_batches_and_generation_are_those_of_sdpa(shape):
    attention.register()
    plain = SHAPES[shape]()
    ours = with_varlen(copy.deepcopy(plain))
    ids = torch.stack(sequences((6, 6)))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert torch.equal(ours(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    for cache in (None, "static"):
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        assert torch.equal(*(m.generate(ids, attention_mask=mask, **options) for m in (ours, plain)))


def test_without_the_ends_a_packed_row_goes_by_the_mask(monkeypatch):
    """As weights of float32 do on a GPU, whose kernel does not take them."""
    attention.register()
    backbone, parts = with_varlen(tiny.make_model(64, hidden=32)).base_model, sequences()
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    assert packed_arguments(backbone, torch.tensor([0, 1]).int(), 1) == {}
    monkeypatch.setattr(attention, "packed_arguments", lambda *_: {})
    torch.testing.assert_close(packed_states(backbone, parts), lone_states(backbone, parts), atol=2e-6, rtol=1e-5)


def test_flash_attention_asked_for_by_name_gets_the_ends():
    backbone, ends = tiny.make_model(64, hidden=32).base_model, torch.tensor([0, 2, 3]).int()
    backbone.config._attn_implementation_internal = "flash_attention_2"
    found = packed_arguments(backbone, ends, 2)
    assert found == {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 2, "max_length_k": 2}


def test_the_name_of_ours_is_not_saved(tmp_path):
    attention.register()
    with_varlen(tiny.make_model(64, hidden=32)).save_pretrained(tmp_path)
    assert VARLEN not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("config", "device", "dtype", "expected"),
    [
        (ModelConfig(packing=True, dtype="bfloat16"), "cuda", None, VARLEN),
        (ModelConfig(packing=True, dtype="bfloat16"), "cpu", None, None),
        (ModelConfig(packing=True), "cuda", None, None),
        (ModelConfig(packing=True), "cuda", torch.bfloat16, VARLEN),
        (CausalConfig(dtype="bfloat16"), "cuda", None, None),
        (WeightsConfig(dtype="bfloat16"), "cuda", None, None),
        (CausalConfig(packing=True, dtype="bfloat16", attention="eager"), "cuda", None, "eager"),
    ],
)
def test_the_attention_follows_from_batches_dtype_and_device(config, device, dtype, expected, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert attention_implementation(config, torch.device(device), dtype) == expected


def test_flash_attn_is_taken_for_packed_rows_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    config, cuda = CausalConfig(packing=True, dtype="bfloat16"), torch.device("cuda")
    assert attention_implementation(config, cuda) == "flash_attention_2"
    assert attention_implementation(config, torch.device("cpu")) is None
    assert attention_implementation(CausalConfig(dtype="bfloat16"), cuda) is None
    named = CausalConfig(packing=True, dtype="bfloat16", attention="sdpa")
    assert attention_implementation(named, cuda) == "sdpa"


@each_shape
def test_models_that_can_be_packed_pass_the_check(shape):
    check_packed(SHAPES[shape]().base_model)


@pytest.mark.parametrize(
    ("config", "name", "why"),
    [
        (
            transformers.OPTConfig(**GROUPED, ffn_dim=64, word_embed_proj_dim=32),
            "OPTModel",
            "whose sequences in one row do not stay apart",
        ),
        (
            transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
            "MambaModel",
            "whose forward pass takes no positions",
        ),
    ],
)
def test_models_that_cannot_are_refused(config, name, why):
    with raises_exactly(f"model.packing: expected false for {name}, {why}, got True"):
        check_packed(made(config).base_model)


def test_an_attention_with_a_softcap_is_refused(on_a_cpu):
    model = made(transformers.Gemma2Config(**GROUPED, head_dim=8))
    message = "model.packing: expected false for Gemma2Attention, which has a softcap, got True"
    with raises_exactly(message):
        check_packed(with_varlen(model).base_model)


def test_layers_that_keep_the_ends_to_themselves_are_refused():
    heads, empty = torch.randn(1, 2, 4, 8), torch.empty(1, 1, 0, 0)
    message = "model.packing: expected false for Linear, which does not hand the ends of sequences on, got True"
    with raises_exactly(message):
        varlen_attention(torch.nn.Linear(1, 1), heads, heads, heads, empty)


def test_a_model_gets_the_attention_asked_for():
    for model in (tiny.make_model(64, hidden=32), tiny.make_model(64, hidden=32).base_model):
        use_attention(model, CausalConfig(packing=True))
        assert model.config._attn_implementation == VARLEN
        use_attention(model, WeightsConfig(attention="eager"))
        assert model.base_model.config._attn_implementation == "eager"


def test_on_a_cpu_a_model_that_adds_to_the_scores_keeps_its_own_attention():
    model = made(transformers.Gemma2Config(**GROUPED, head_dim=8))
    model.set_attn_implementation("sdpa")
    use_attention(model, CausalConfig(packing=True))
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_that_nobody_has_is_named():
    with pytest.raises(UserError, match=r"^model\.attention: LlamaForCausalLM cannot have 'fast': .*\beager\b"):
        use_attention(tiny.make_model(64, hidden=32), WeightsConfig(attention="fast"))


def test_a_model_that_cannot_be_packed_is_refused_when_it_is_loaded():
    model = made(transformers.OPTConfig(**GROUPED, ffn_dim=64, word_embed_proj_dim=32))
    use_attention(model, CausalConfig())
    message = "model.packing: expected false for OPTModel, whose sequences in one row do not stay apart, got True"
    with raises_exactly(message, UserError):
        use_attention(model, CausalConfig(packing=True, attention="sdpa"))


@pytest.mark.parametrize(
    ("on_a_cpu", "logits"),
    [
        (attention._by_sequence, "linear"),
        (plain_varlen, "materialized"),
        (plain_varlen_of_torch_2_11, "linear"),
    ],
    indirect=["on_a_cpu"],
)
def test_a_run_by_the_ends_is_the_run_by_the_mask(make_config, tokenizer, on_a_cpu, monkeypatch, tmp_path, logits):
    calls, weights = list[int](), list[Any]()
    monkeypatch.setattr(attention, "_varlen", lambda *x, real=attention._varlen, **y: calls.append(1) or real(*x, **y))
    for kind in ("sdpa", VARLEN):
        result = train_ppo(
            make_config(
                model={"packing": True, "fused_head": logits == "linear", "attention": kind},
                optim={"micro_batch_size": 2},
                kl={"placement": "loss", "loss_estimator": "full"},
                advantage={"whiten": False},
                output_dir=str(tmp_path / kind),
            ),
            reward_fn=lambda completion_ids, **_: [sum(token % 2 for token in ids) for ids in completion_ids],
            prompts=["w1", "w2 w3 w4", "w5"],
            policy=tiny.make_model(64, hidden=32, heads=2),
            tokenizer=tokenizer,
        )
        assert bool(calls) is (kind == VARLEN)
        weights.append(torch.nn.utils.parameters_to_vector(result.models.policy.parameters()).detach())
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama", "qwen2", "mistral"])
def test_on_a_gpu_sequences_of_a_packed_row_are_those_alone(shape):
    attention.register()
    plain = made(transformers.MistralConfig(**GROUPED | {"hidden_size": 128}, sliding_window=3))
    if shape != "mistral":
        plain = tiny.make_model(64, arch=shape, hidden=128, num_key_value_heads=2)
    plain = plain.cuda().bfloat16()
    ours, parts = with_varlen(copy.deepcopy(plain)), [part.cuda() for part in sequences()]
    check_packed(ours.base_model)
    weight = torch.randn(sum(LENGTHS), 128, device="cuda")
    for model, states in ((ours, packed_states), (plain, lone_states)):
        (states(model.base_model, parts).float() * weight).sum().backward()
    for mine, theirs in zip(ours.base_model.parameters(), plain.base_model.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 0.03 * theirs.grad.norm()
