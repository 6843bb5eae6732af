"""Adapters: exact at the start, isolated, saved as peft does and read from what it saved, on a base in 4 bits."""

import copy
import dataclasses
import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.model import LoraConfig
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.adapter_files import ADAPTER_CONFIG, ADAPTER_FILE, PLAIN_FIELDS, same_base
from ppo_fast.rlhf.models.adapters import Adapters, adapt, add_to_weights, put_on
from ppo_fast.rlhf.models.loading import checkpoint_activations
from ppo_fast.rlhf.planning.shapes import read_shapes
from ppo_fast.rlhf.training.checkpoint import write_model
from ppo_fast.rlhf.training.state import fingerprint
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import (
    IDS,
    LORA,
    every_bit,
    logits,
    models_in,
    read_adapter,
    run_stage,
    save_base,
    shift,
)
from tests.rlhf.supervised_factories import STAGES, make_model, make_tokenizer

ARCHITECTURES = ["llama", "gpt2", "qwen2"]


def adapted(network=None, seed=0, **lora):
    config = LoraConfig(**{"rank": 4, "alpha": 8.0} | lora)
    return adapt(network or make_model(), config, None, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_and_none_are_the_base_bit_by_bit(arch, dtype):
    network = tiny.make_model(64, arch=arch, hidden=32, layers=1, heads=2).to(dtype)
    before = logits(network)
    adapters = adapted(network)
    assert torch.equal(logits(network), before)
    assert all(parameter.dtype == torch.float32 for parameter in adapters.parameters("default"))
    shift(adapters.parameters("default"))
    assert not torch.equal(logits(network), before)
    with adapters.active(None):
        assert torch.equal(logits(network), before)
    assert not torch.equal(logits(network), before)


def test_all_linear_layers_below_the_head_get_one():
    adapters = adapted()
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in adapters.named("default")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    names = adapted(targets=("q_proj", "mlp.up_proj")).named("default")
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "up_proj"}


def test_a_new_adapter_is_drawn_from_the_generator_alone():
    state = torch.get_rng_state()
    first, second, other = adapted(), adapted(), adapted(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in first.named("default").items():
        assert torch.equal(parameter, second.named("default")[name])
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            assert bound / 2 < parameter.abs().max() <= bound
            assert not torch.equal(parameter, other.named("default")[name])
        else:
            assert not parameter.any()


def test_the_scale_is_alpha_over_rank():
    network = make_model()
    weight = network.model.layers[0].mlp.down_proj.weight.detach().clone()
    adapters = adapted(network, alpha=6.0)
    shift(adapters.parameters("default"))
    x, layer = torch.randn(3, weight.shape[1]), network.model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ (weight + 1.5 * b @ a).T)


def test_rule_17_switching_leaves_everything_as_it_was():
    adapters = adapted()
    adapters.add("value", adapters.config("default"), trained=True)
    adapters.copy("default", "reference")
    shift([*adapters.parameters("default"), *adapters.parameters("value")])
    network = adapters.network
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert {name.split(".")[-2] for name, flag in flags.items() if flag} == {"default", "value"}
    before, bits = logits(network), every_bit(network)
    with pytest.raises(RuntimeError, match="inside"), adapters.active("value"), adapters.active(None):
        raise RuntimeError("inside")
    with adapters.active("value"):
        of_value = logits(network)
        with adapters.active(None), adapters.active("default"):
            assert torch.equal(logits(network), before)
            assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags
        assert torch.equal(logits(network), of_value)
    assert torch.equal(logits(network), before)
    assert not torch.equal(of_value, before)
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags
    assert all(torch.equal(bits[name], parameter) for name, parameter in network.named_parameters())


def test_gradients_reach_the_active_adapter_alone():
    adapters = adapted()
    adapters.add("value", adapters.config("default"), trained=True)
    adapters.draw("value", torch.Generator().manual_seed(1))
    with adapters.active("value"):
        adapters.network(IDS).logits.square().sum().backward()
    found = {name for name, parameter in adapters.network.named_parameters() if parameter.grad is not None}
    assert found
    assert all(".value." in name for name in found)


def test_a_layer_called_value_is_no_adapter_of_that_name():
    """As BERT's and Falcon's layers are; peft itself goes by the word alone."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Linear(3, 3)
            self.query_key_value = torch.nn.Linear(3, 3)

    config = peft.LoraConfig(r=2, target_modules=["value", "query_key_value"])
    adapters = Adapters(Odd(), config)
    adapters.add("value", config, trained=True)
    own, values = adapters.parameters("default"), adapters.parameters("value")
    assert len(own) == len(values) == 4
    assert not {*map(id, own)} & {*map(id, values)}


def test_saved_adapters_are_read_again(tmp_path):
    adapters = adapted()
    shift(adapters.parameters("default"))
    write_model(adapters.network, make_tokenizer(), tmp_path, adapters)
    other, source = adapted(seed=3), load_file(tmp_path / ADAPTER_FILE)
    other.fill("default", source, "here")
    assert torch.equal(logits(other.network), logits(adapters.network))
    key = next(iter(source))
    with raises_exactly(f"here: expected the adapter of the base's layers, got another at {key!r}", UserError):
        other.fill("default", {name: value for name, value in source.items() if name != key}, "here")
    with raises_exactly(f"here: expected {key!r} to have the shape [4, 128], got [3, 128]", UserError):
        other.fill("default", source | {key: source[key][:3]}, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "model.path: expected a LoRA adapter with bias = 'none', got 'all' in {path!r}"),
        (
            {"modules_to_save": ["lm_head"]},
            "model.path: expected a LoRA adapter with modules_to_save = None, got ['lm_head'] in {path!r}",
        ),
        (
            {"init_lora_weights": "pissa"},
            "model.path: expected a LoRA adapter with init_lora_weights = True, got 'pissa' in {path!r}",
        ),
        ({"of_a_later_peft": 1}, "model.path: expected a LoRA adapter with of_a_later_peft = None, got 1 in {path!r}"),
        ({"peft_type": "IA3"}, "model.path: expected a LoRA adapter, got IA3 in {path!r}"),
        ({"base_model_name_or_path": None}, "model.path: expected an adapter that names its base model, got {path!r}"),
    ],
)
def test_adapters_that_cannot_be_read(tmp_path, base, change, message):
    path = str(run_stage("sft", tmp_path / "sft", base).model)
    config = json.loads((tmp_path / "sft/final" / ADAPTER_CONFIG).read_text())
    (tmp_path / "sft/final" / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with raises_exactly(message.format(path=path), UserError):
        read_adapter("model.path", path)


PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]}
# Every field of peft's that may shape an adapter with plain matrices, on a model of two layers.
SHAPED = {
    "targets_of_peft": {"target_modules": None},
    "all_linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["up_proj"]},
    "patterns": {"rank_pattern": {"up_proj": 2, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"up_proj": 9}},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "begun_random": {"init_lora_weights": False, "lora_dropout": 0.5},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


def random_adapter(directory, base, **options):
    """A randomly filled adapter as peft saves it, and the logits of peft's own model."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**PLAIN | options, task_type="CAUSAL_LM"))
    shift([parameter for name, parameter in model.named_parameters() if "lora_" in name])
    model.save_pretrained(directory, save_embedding_layers=False)
    return str(directory), logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), directory))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models of two layers on disk and in memory, one with the head tied to the embeddings."""
    root, options = tmp_path_factory.mktemp("bases"), {"llama": {}, "gpt2": {}, "tied": {"tie_word_embeddings": True}}
    for name, option in options.items():
        arch = "gpt2" if name == "gpt2" else "llama"
        tiny.make_model(64, arch=arch, hidden=32, layers=2, heads=2, **option).save_pretrained(root / name)
    return {name: AutoModelForCausalLM.from_pretrained(root / name).eval() for name in options}


@pytest.mark.parametrize("shape", SHAPED)
def test_what_peft_saved_has_pefts_logits_continued_merged_and_saved_again(tmp_path, bases, shape):
    base = bases["gpt2" if shape == "conv1d" else "llama"]
    path, expected = random_adapter(tmp_path / "peft", base, **SHAPED[shape])
    saved, network, whole, other = (read_adapter("init", path), *(copy.deepcopy(base) for _ in range(3)))
    assert (expected - logits(network)).abs().max() > 1e-2
    adapters = adapt(network, LoraConfig(rank=4, alpha=8.0, merge=True), saved, None)
    torch.testing.assert_close(logits(network), expected, atol=1e-6, rtol=1e-5)
    adapters.load("value", saved, trained=True)
    adapters.copy("value", "reference")
    for name in ("value", "reference"):
        with adapters.active(name):
            torch.testing.assert_close(logits(network), expected, atol=1e-6, rtol=1e-5)
    other.load_state_dict(adapters.merged_state(network))
    write_model(network, make_tokenizer(), tmp_path / "again", adapters)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    add_to_weights(whole, saved)
    for model in (other, again, whole):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_every_other_field_of_peft_is_refused_by_name(tmp_path, bases):
    """What `SHAPED` leaves out, and what peft of another release may write."""
    path, _ = random_adapter(tmp_path, bases["llama"])
    plain = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    others = {field.name for field in dataclasses.fields(peft.LoraConfig)} - PLAIN_FIELDS - {"runtime_config"}
    assert {"use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "target_parameters"} <= others
    for name in others:
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(plain | {name: ["x"]}))
        with pytest.raises(UserError, match=f"^init: expected a LoRA adapter with {name} = .*, got \\['x'\\] in '"):
            read_adapter("init", path)
    for kind in {*peft.PeftType} - {"LORA"}:
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(plain | {"peft_type": kind}))
        with raises_exactly(f"init: expected a LoRA adapter, got {kind.value} in {path!r}", UserError):
            read_adapter("init", path)


def test_adapters_that_do_not_fit_their_base(tmp_path, bases):
    base = bases["llama"]
    path, _ = random_adapter(tmp_path / "embeddings", base, target_modules=["embed_tokens", "q_proj"])
    with raises_exactly(f"{path}: expected an adapter of linear layers, got 'Embedding'", UserError):
        put_on(copy.deepcopy(base), read_adapter("init", path))
    path, _ = random_adapter(tmp_path / "plain", base)
    saved = read_adapter("init", path)
    message = rf"^{path}: expected an adapter that fits its base {base.name_or_path!r}: Target modules .* not found"
    other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, target_modules={"c_attn"}))
    with pytest.raises(UserError, match=message):
        put_on(copy.deepcopy(base), other)
    message = f"{path}: expected an adapter on a model without adapters, got {base.name_or_path!r}"
    with raises_exactly(message, UserError):
        put_on(AutoModelForCausalLM.from_pretrained(path), saved)
    quantized = copy.deepcopy(base)
    quantized.quantization_method = "bitsandbytes"
    message = f"{path}: expected an adapter on a base that is not quantized, to merge it, got {base.name_or_path!r}"
    with raises_exactly(message, UserError):
        add_to_weights(quantized, saved)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head_is_continued_and_not_merged(tmp_path, bases):
    """The sum of weights would change the embeddings as well."""
    path, expected = random_adapter(tmp_path, bases["tied"], target_modules=["q_proj", "lm_head"])
    saved, network = read_adapter("init", path), copy.deepcopy(bases["tied"])
    put_on(network, saved)
    torch.testing.assert_close(logits(network), expected, atol=1e-6, rtol=1e-5)
    message = f"{path}: expected an adapter of layers that share no weight, to merge it, got 'lm_head'"
    with raises_exactly(message, UserError):
        add_to_weights(copy.deepcopy(bases["tied"]), saved)
    with raises_exactly(message, UserError):
        adapt(copy.deepcopy(bases["tied"]), LoraConfig(rank=4, alpha=8.0, merge=True), saved, None)


def test_the_plan_refuses_what_a_run_refuses(tmp_path, bases):
    path, _ = random_adapter(tmp_path, bases["llama"])
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {"lora_bias": True}))
    message = f"model.path: expected a LoRA adapter with lora_bias = False, got True in {path!r}"
    with raises_exactly(message, UserError):
        read_shapes(config_from_dict({"model": {"path": path}}))


def test_a_broken_adapter_is_told(tmp_path, base):
    path = run_stage("sft", tmp_path / "sft", base).model
    (path / ADAPTER_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^init: cannot read the adapter in '.*': "):
        read_adapter("init", str(path))
    assert read_adapter("init", None) is None
    assert read_adapter("init", base) is None


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "model.lora.rank: expected 4, that of the adapter in {path!r}, got 8"),
        ({"alpha": 9.0}, "model.lora.alpha: expected 8.0, that of the adapter in {path!r}, got 9.0"),
    ],
)
def test_an_adapter_is_continued_as_it_is(tmp_path, base, lora, message):
    path = str(run_stage("sft", tmp_path / "sft", base).model)
    with raises_exactly(message.format(path=path), UserError):
        run_stage("sft", tmp_path / "more", path, lora=LORA["lora"] | lora)


def test_targets_and_models_that_cannot_be_used():
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    expected = f"model.lora.targets: expected names of linear layers below the head ({known}), got"
    for target in ("query", "lm_head", "proj"):
        with raises_exactly(f"{expected} {target!r}", UserError):
            adapted(targets=(target,))
    message = "model.lora.rank: expected 0 for a model that has adapters already, got 4"
    with raises_exactly(message, UserError):
        adapted(adapted().network)


def test_an_adapter_on_layers_named_by_a_pattern_is_continued(tmp_path, base):
    adapter = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, target_modules=r".*self_attn\.[qv]_proj")
    )
    adapter.save_pretrained(tmp_path / "own")
    result = run_stage("sft", tmp_path / "sft", str(tmp_path / "own"))
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(result.model)), logits(result.trained))
    assert not torch.equal(logits(result.trained), logits(AutoModelForCausalLM.from_pretrained(base)))


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path, base):
    path = run_stage("sft", tmp_path / "sft", base).model
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    assert models_in("adapters", str(path)).tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_a_model_that_cannot_recompute_is_told():
    network = make_model()
    network.supports_gradient_checkpointing = False
    message = "model.gradient_checkpointing: expected false for LlamaForCausalLM, which has none, got True"
    with raises_exactly(message, UserError):
        checkpoint_activations(network)


def test_peft_agrees_on_what_is_on():
    adapters = adapted()
    adapters.add("value", adapters.config("default"), trained=True)
    layer = adapters.network.model.layers[0].mlp.up_proj
    for name in ("value", None, "default"):
        with adapters.active(name):
            assert layer.disable_adapters == (name is None)
            assert name is None or layer.active_adapters == [name]
    assert (layer.active_adapters, layer.disable_adapters) == (["default"], False)


def test_a_base_is_the_same_by_name_or_by_place(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_base("base", base)
    assert same_base("org/model", "org/model")
    assert not same_base("", "")
    assert not same_base(base, save_base(tmp_path / "other"))


def test_merged_weights_are_rounded_once(tmp_path):
    network = make_model().to(torch.bfloat16)
    adapters = adapted(network)
    shift(adapters.parameters("default"))
    layer = network.model.layers[0].self_attn.q_proj
    weight, a, b = (
        x.detach().double() for x in (layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    state = adapters.merged_state(network)
    found = state["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (weight + 2 * b @ a).float().to(torch.bfloat16))
    assert not any("lora" in name or "base_layer" in name for name in state)


@pytest.fixture
def wide(tmp_path):
    """A base whose layers are as wide as a block of bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    return save_base(tmp_path / "wide", hidden=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_4_bits(wide, dtype):
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    models = models_in("adapters", wide, load_in_4bit=True, dtype=dtype)
    layer = models.policy.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.dtype == torch.uint8
    head = models.policy.get_output_embeddings()
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == getattr(torch, dtype)
    assert all(parameter.dtype == torch.float32 for parameter in models.trained("policy"))
    whole = AutoModelForCausalLM.from_pretrained(wide).to(getattr(torch, dtype))
    shift_of = (logits(models.policy) - logits(whole)).float()
    assert 0 < shift_of.norm() < 0.3 * logits(whole).float().norm()
    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=getattr(torch, dtype))
    for name, own in plain.named_modules():
        if isinstance(own, torch.nn.Linear) and name != "lm_head":
            packed = models.policy.get_submodule(name).base_layer.weight
            own.weight.data = dequantize_4bit(packed.data, packed.quant_state).to(own.weight.dtype)
    plain = adapted(plain)
    plain.fill("default", models.adapters.named("default"), "the other")
    for network in (models.policy, plain.network):
        network(IDS).logits.float().square().sum().backward()
    for ours, theirs in zip(models.trained("policy"), plain.parameters("default"), strict=True):
        assert (ours.grad - theirs.grad).norm() <= (1e-4 if dtype == "float32" else 0.05) * theirs.grad.norm()
    assert fingerprint(models.policy) == fingerprint(models_in("adapters", wide, load_in_4bit=True, dtype=dtype).policy)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_base_in_4_bits(tmp_path, wide, stage):
    result = run_stage(stage, tmp_path / "run", wide, load_in_4bit=True, optim={"epochs": 2})
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    assert (result.model / ADAPTER_FILE).exists()


def test_4_bits_that_cannot_be_had(tmp_path, monkeypatch, base):
    message = "model.load_in_4bit: expected false for a model given as an object, got True"
    with raises_exactly(message, UserError):
        models_in("adapters", load_in_4bit=True)
    with raises_exactly("model.load_in_4bit: expected false with init, got True", UserError):
        run_stage("reward", tmp_path / "rm", None, init=base, load_in_4bit=True)
    values = {"model": {"layout": "adapters", "load_in_4bit": True, "lora": {"rank": 4, "merge": True}}}
    refused = "config: model.lora.merge: expected false with model.load_in_4bit, got True"
    with raises_exactly(refused, UserError):
        config_from_dict(values)
    quantized = make_model()
    quantized.quantization_method = "bitsandbytes"
    with raises_exactly("model.lora.merge: expected false for a base in 4 bits, got True", UserError):
        adapted(quantized, merge=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install bitsandbytes$"):
        models_in("adapters", base, load_in_4bit=True)
