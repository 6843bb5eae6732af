"""separate, shared, adapters, offloaded: the same rules and the same task in every layout."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.ppo import ReferenceConfig
from ppo_fast.rlhf.models.adapter_files import ADAPTER_CONFIG
from ppo_fast.rlhf.models.forward import _short_batch, reference_terms
from ppo_fast.rlhf.models.offload import Offloaded
from ppo_fast.rlhf.models.saved import STATS
from ppo_fast.rlhf.models.value import sequence_scores
from ppo_fast.rlhf.ppo.reference import Reference
from ppo_fast.rlhf.ppo.reward_sources import load_sources
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.training.checkpoint import HEAD_FILE, VALUE_FILE, load_weights, save_models, write_models
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import (
    IDS,
    LAYOUTS,
    LORA,
    MASK,
    every_bit,
    models_in,
    outputs,
    run_stage,
    save_base,
    shift,
)
from tests.rlhf.ppo.test_reward_sources import made
from tests.rlhf.supervised_factories import make_model

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
ROLES = ("policy", "reference", "value")


@each_layout
def test_at_the_start_every_network_is_the_base_bit_by_bit(layout, base):
    models, plain = models_in(layout, base), AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        logits, hidden = plain(IDS).logits, plain.base_model(IDS).last_hidden_state
        assert torch.equal(outputs(models, "policy"), logits)
        assert torch.equal(outputs(models, "reference"), logits)
        with models.using("value") as value:
            assert torch.equal(value.backbone(IDS).last_hidden_state, hidden)


@pytest.mark.parametrize("value_path", [False, True])
def test_the_attention_asked_for_is_that_of_every_network(base, value_path):
    models = models_in("separate", base, attention="eager", value_path=base if value_path else None)
    for network in (models.policy, models.reference, models.value.backbone):
        assert network.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"^model\.attention: LlamaForCausalLM cannot have 'none': "):
        models_in("separate", base, attention="none")


@each_layout
def test_the_layouts_draw_the_same_head(layout):
    models = models_in(layout)
    assert models.shared == (layout == "shared")
    assert models.value.head.weight.dtype == torch.float32
    assert models.value.head.weight.std().item() * 33**0.5 == pytest.approx(1, abs=0.4)
    assert not models.value.head.bias.any()
    assert not models_in(layout, value_head="zero").value.head.weight.any()


@each_layout
def test_what_is_trained_is_a_roles_own(layout):
    models = models_in(layout)
    policy, value = models.trained("policy"), models.trained("value")
    assert not {*map(id, policy)} & {*map(id, value)}
    assert {*map(id, models.value.head.parameters())} <= {*map(id, value)}
    assert (len(value) == 2) == (layout == "shared")
    assert models.trained("reference") == []
    trained = {id(p) for network in (models.policy, models.value) for p in network.parameters() if p.requires_grad}
    assert trained == {*map(id, policy), *map(id, value)}


@each_layout
def test_rule_17_a_policy_step_changes_the_policy_alone(layout, make_config, make_rollout):
    config = make_config(model=LAYOUTS[layout], kl={"placement": "both"})
    models = models_in(layout)
    before = {role: outputs(models, role) for role in ROLES}
    flags = [parameter.requires_grad for parameter in models.policy.parameters()]
    bits, learner = every_bit(models.policy), Learner(models, config)
    with models.using("policy") as policy:
        policy(IDS).logits.square().sum().backward()
    learner.policy.step(1.0)
    own = {*map(id, models.trained("policy"))}
    changed = {name for name, p in models.policy.named_parameters() if not torch.equal(p, bits[name])}
    assert changed
    assert changed <= {name for name, p in models.policy.named_parameters() if id(p) in own}
    assert not torch.equal(outputs(models, "policy"), before["policy"])
    assert torch.equal(outputs(models, "reference"), before["reference"])
    assert torch.equal(outputs(models, "value"), before["value"]) == (layout != "shared")
    assert [parameter.requires_grad for parameter in models.policy.parameters()] == flags


@each_layout
def test_rule_17_an_error_inside_leaves_everything_as_it_was(layout):
    models = models_in(layout)
    shift([*models.trained("policy"), *models.trained("value")])
    before = {role: outputs(models, role) for role in ROLES}
    networks = {"policy": models.policy, "reference": models.reference, "value": models.value}
    flags = {role: [p.requires_grad for p in network.parameters()] for role, network in networks.items()}
    for role in ROLES:
        for inner in ROLES:
            with pytest.raises(RuntimeError, match="inside"), models.using(role), models.using(inner):
                raise RuntimeError("inside")
            with models.using(role):
                assert torch.equal(outputs(models, inner), before[inner])
                assert torch.equal(outputs(models, role), before[role])
    for role, network in networks.items():
        assert [p.requires_grad for p in network.parameters()] == flags[role]
    with torch.no_grad():
        assert torch.equal(models.policy(IDS).logits, before["policy"])  # as it is outside of all blocks


def test_rule_14_the_critic_starts_from_a_reward_adapter(base, reward_model):
    scored = peft.AutoPeftModelForSequenceClassification.from_pretrained(reward_model, num_labels=1).eval()
    stats = json.loads(Path(reward_model, STATS).read_text())
    with torch.no_grad():
        score = scored(IDS).logits.squeeze()
    expected = {"dataset": (score - stats["mean"]) / stats["std"], "none": score}
    for layout in ("adapters", "separate"):
        for normalize, value in expected.items():
            models = models_in(layout, base, reward={"models": (reward_model,), "normalize": normalize})
            torch.testing.assert_close(outputs(models, "value")[0, -1], value, atol=1e-5, rtol=1e-5)
            assert len(models.trained("value")) == (16 if layout == "adapters" else 13)
        models = models_in(layout, base, value_path=reward_model)
        torch.testing.assert_close(outputs(models, "value")[0, -1], expected["dataset"], atol=1e-5, rtol=1e-5)


def test_rule_14_a_shared_trunk_has_a_head_of_its_own(base, reward_model):
    models = models_in("shared", base, reward={"models": (reward_model,)})
    assert models.value.backbone is models.policy.base_model
    assert torch.equal(models.value.head.weight, models_in("shared", base).value.head.weight)


def test_the_critic_starts_anew_where_the_reward_model_is_on_another_base(tmp_path, base):
    other = str(run_stage("reward", tmp_path / "other", save_base(tmp_path / "base2", seed=3)).model)
    models = models_in("adapters", base, reward={"models": (other,)})
    assert torch.equal(outputs(models, "value"), outputs(models_in("adapters", base), "value"))
    message = f"model.value_path: expected an adapter on {base!r}, the policy's base, got {other!r}"
    with raises_exactly(message, UserError):
        models_in("adapters", base, value_path=other)


def sources_of(models, *paths, offload=False):
    config = config_from_dict({"reward": {"models": paths}, "model": {"offload": offload}})
    return load_sources(config, models)


RESPONSES = made([[20, 2], [21, 22, 23, 2], [24, 25]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reward_adapters_share_the_policys_base(base, reward_model, dtype):
    models = models_in("adapters", base, dtype=dtype)
    shift(models.trained("policy"))
    before = outputs(models, "policy")
    first, second = sources_of(models, reward_model, reward_model)
    assert {*models.adapters.trained} == {"default", "value", "reward-0", "reward-1"}
    assert first.model.backbone is models.policy.base_model
    own = peft.AutoPeftModelForSequenceClassification.from_pretrained(reward_model, num_labels=1).eval()
    expected = []
    for prompt, completion in zip(RESPONSES.prompt_ids, RESPONSES.completion_ids, strict=True):
        with torch.no_grad():
            expected.append(own(torch.tensor([prompt + completion])).logits.item())
    assert first(RESPONSES) == pytest.approx(expected, abs=1e-5 if dtype == "float32" else 0.3)
    assert second(RESPONSES) == first(RESPONSES)
    assert torch.equal(outputs(models, "policy"), before)
    assert not any(p.requires_grad for n, p in models.policy.named_parameters() if "reward" in n)
    assert not any(p.requires_grad for p in first.model.head.parameters())


@each_layout
def test_rule_04_a_reward_adapter_trained_with_dropout_scores_without(base, reward_model, layout):
    path = Path(reward_model) / ADAPTER_CONFIG
    (plain,) = sources_of(models_in(layout, base), reward_model)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.5}))
    (source,) = sources_of(models_in(layout, base), reward_model)
    assert source(RESPONSES) == plain(RESPONSES)


@each_layout
def test_reward_adapters_on_another_base_bring_it_along(tmp_path, base, layout):
    other = str(run_stage("reward", tmp_path / "other", save_base(tmp_path / "base2", seed=3)).model)
    (source,) = sources_of(models_in(layout, base), other, offload=layout == "offloaded")
    own = peft.AutoPeftModelForSequenceClassification.from_pretrained(other, num_labels=1).eval()
    ids = torch.tensor([[5, 20, 2]])
    with torch.no_grad():
        assert source(RESPONSES)[0] == pytest.approx(own(ids).logits.item(), abs=1e-5)


def test_a_policy_that_begins_with_an_adapter_has_a_frozen_copy_as_reference(tmp_path, base):
    sft = str(run_stage("sft", tmp_path / "sft", base).model)
    models = models_in("adapters", sft)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(sft)
    with torch.no_grad():
        assert torch.equal(outputs(models, "policy"), loaded(IDS).logits)
    start = outputs(models, "reference")
    assert torch.equal(start, outputs(models, "policy"))
    shift(models.trained("policy"))
    assert torch.equal(outputs(models, "reference"), start)
    assert not torch.equal(outputs(models, "policy"), start)
    with torch.no_grad(), models.using("value") as value:  # its adapter is new
        plain = AutoModelForCausalLM.from_pretrained(base).base_model
        assert torch.equal(value.backbone(IDS).last_hidden_state, plain(IDS).last_hidden_state)


@pytest.mark.parametrize("layout", ["separate", "offloaded", "shared", "adapters"])
@pytest.mark.parametrize("update", ["replace", "ema"])
def test_a_reference_moves_in_every_layout(layout, update):
    config = ReferenceConfig(update=update, every=1, decay=0.5)
    models = models_in(layout, reference=dataclasses.asdict(config))
    reference, start = Reference(models, config), outputs(models, "reference")
    shift(models.trained("policy"))
    before = [parameter.detach().clone() for parameter in models.weights("reference")]
    assert torch.equal(outputs(models, "reference"), start)
    reference.update(1)
    pairs = zip(before, models.weights("reference"), models.weights("policy"), strict=True)
    for old, new, policy in pairs:
        torch.testing.assert_close(new, policy if update == "replace" else (old + policy) / 2)
    assert torch.equal(outputs(models, "reference"), outputs(models, "policy")) == (update == "replace")
    assert models.trained("reference") == []
    other = models_in(layout, reference=dataclasses.asdict(config))
    Reference(other, config).load_state_dict(reference.state_dict())
    assert torch.equal(outputs(other, "reference"), outputs(models, "reference"))


def storages(network):
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]


def test_a_offloaded_network_is_on_the_device_within_the_block_alone():
    network = make_model()
    before, host = every_bit(network), storages(network)
    with torch.no_grad():
        expected = network(IDS).logits
    offloaded = Offloaded(network, torch.device("cpu"))
    assert storages(network) == host
    with offloaded.present() as there, offloaded.present():
        inside = storages(network)
        assert not {*inside} & {*host}
        with torch.no_grad():
            assert torch.equal(there(IDS).logits, expected)
            there.lm_head.weight.add_(1.0)  # of the copy
        with pytest.raises(RuntimeError, match="inside"), offloaded.present():
            raise RuntimeError("inside")
        assert storages(network) == inside
    assert storages(network) == host
    with pytest.raises(RuntimeError, match="inside"), offloaded.present():
        raise RuntimeError("inside")
    assert storages(network) == host
    assert all(torch.equal(before[name], parameter) for name, parameter in network.named_parameters())


def test_tied_weights_are_offloaded_once():
    network = make_model(tie_word_embeddings=True)
    offloaded = Offloaded(network, torch.device("cpu"))
    with offloaded.present():
        assert network.lm_head.weight.data_ptr() == network.get_input_embeddings().weight.data_ptr()


def test_a_network_that_does_not_fit_stays_in_host_memory(monkeypatch):
    network, calls = make_model(), []
    offloaded, host, move = Offloaded(network, torch.device("cpu")), storages(network), torch.Tensor.to

    def full(self, *args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("full")
        return move(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError), offloaded.present():
        pass
    assert storages(network) == host
    with offloaded.present():
        assert not {*storages(network)} & {*host}


def test_reference_and_reward_models_are_offloaded_and_no_others(tmp_path, base, reward_model):
    models = models_in("offloaded", base)
    host = storages(models.reference)
    with models.using("policy"), models.using("value"):
        assert storages(models.reference) == host
    with models.using("reference") as reference:
        assert not {*storages(reference)} & {*host}
    (source,), (plain,) = sources_of(models, reward_model, offload=True), sources_of(models, reward_model)
    assert source(RESPONSES) == plain(RESPONSES)
    with source.present():
        inside = storages(source.model)
    assert not {*inside} & {*storages(source.model)}
    assert models_in("adapters", base, offload=True).offloaded is None


def test_the_exact_kl_keeps_the_weight_of_a_offloaded_reference(base):
    """The loss comes after the block."""
    models = models_in("offloaded", base)
    sequences, _ = _short_batch(models.policy)
    with models.using("reference") as reference:
        terms = reference_terms(reference, sequences, linear=True)
        there = reference.lm_head.weight.data_ptr()
    assert terms["ref_weight"].data_ptr() == there != reference.lm_head.weight.data_ptr()


def gradients(models):
    """Of the policy's and the value model's own weights, and the bytes that the forward pass kept for backward."""
    kept = []
    with (
        models.recomputing(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x),
    ):
        with models.using("policy") as policy:
            policy(IDS).logits.square().sum().backward()
        with models.using("value") as value:
            value(IDS, MASK).square().sum().backward()
    both = [*models.trained("policy"), *models.trained("value")]
    return [p.grad for p in both], sum(kept)


@each_layout
def test_recomputed_activations_give_the_same_gradients(layout):
    found = {}
    for checkpointing in (False, True):
        models = models_in(layout, gradient_checkpointing=checkpointing)
        shift([*models.trained("policy"), *models.trained("value")])
        modes = [module.training for module in models.policy.modules()]
        found[checkpointing] = gradients(models)
        assert [module.training for module in models.policy.modules()] == modes
        with pytest.raises(RuntimeError, match="inside"), models.recomputing():
            raise RuntimeError("inside")
        assert [module.training for module in models.policy.modules()] == modes
        assert not any(modes)
    for ours, theirs in zip(found[True][0], found[False][0], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert found[True][1] < 0.5 * found[False][1]


def test_generation_uses_its_cache_with_checkpointing(make_config, make_rollout):
    config, widths = make_config(), []
    models = models_in("separate", gradient_checkpointing=True)
    models.policy.get_input_embeddings().register_forward_pre_hook(lambda _, ids: widths.append(ids[0].shape[1]))
    with models.recomputing():
        pass
    make_rollout(models, config)
    assert widths.count(1) >= 4


def test_stages_recompute_in_training_alone(tmp_path, base):
    results = [run_stage("sft", tmp_path / f"{flag}", base, gradient_checkpointing=flag) for flag in (False, True)]
    losses = [[record["train/loss"] for record in result.history] for result in results]
    assert losses[0] == losses[1]
    assert not any(module.training for module in results[1].trained.modules())
    assert any(getattr(module, "gradient_checkpointing", False) for module in results[1].trained.modules())


@each_layout
def test_what_is_written_is_read_again(tmp_path, layout):
    models, other = models_in(layout), models_in(layout, seed=5)
    shift([*models.trained("policy"), *models.trained("value")])
    (tmp_path / "saved").mkdir()
    write_models(models, tmp_path / "saved")
    load_weights(other, tmp_path / "saved")
    for role in ROLES:
        assert torch.equal(outputs(other, role), outputs(models, role))
    assert (tmp_path / "saved" / HEAD_FILE).exists() == (layout == "shared")
    assert (tmp_path / "saved" / VALUE_FILE).exists() == (layout in ("separate", "offloaded"))
    assert (tmp_path / "saved" / "model.safetensors").exists() == (layout != "adapters")


@pytest.mark.parametrize("merge", [False, True])
def test_the_value_model_may_start_from_that_of_a_run_with_adapters(tmp_path, base, merge):
    first = models_in("adapters", base, lora=LORA["lora"] | {"merge": merge})
    shift([*first.trained("policy"), *first.trained("value")])
    save_models(first, tmp_path / "final")
    assert (tmp_path / "final" / ADAPTER_CONFIG).exists() == (not merge)
    assert (tmp_path / "final" / "model.safetensors").exists() == merge
    second = models_in("adapters", base, value_path=str(tmp_path / "final"))
    assert torch.equal(outputs(second, "value"), outputs(first, "value"))
    assert len(second.trained("value")) == len(first.trained("value"))
    whole = models_in("separate", base, value_path=str(tmp_path / "final"))
    torch.testing.assert_close(outputs(whole, "value"), outputs(first, "value"), atol=1e-5, rtol=1e-5)
    loader = AutoModelForCausalLM if merge else peft.AutoPeftModelForCausalLM
    with torch.no_grad():
        logits = loader.from_pretrained(tmp_path / "final")(IDS).logits
    torch.testing.assert_close(logits, outputs(first, "policy"), atol=1e-5, rtol=1e-5)


def test_the_value_model_may_start_from_an_adapter_without_a_head(tmp_path, base):
    sft = str(run_stage("sft", tmp_path / "sft", base).model)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(sft).get_base_model().base_model
    for layout in ("adapters", "separate"):
        models = models_in(layout, base, value_path=sft)
        with torch.no_grad(), models.using("value") as value:
            hidden = value.backbone(IDS).last_hidden_state
            torch.testing.assert_close(hidden, loaded(IDS).last_hidden_state, atol=1e-5, rtol=1e-5)
        assert models.value.head.weight.any()


def test_sequence_scores_are_those_of_the_last_token(base, reward_model):
    (source,) = sources_of(models_in("separate", base), reward_model)
    with torch.no_grad():
        assert torch.equal(sequence_scores(source.model, IDS, MASK), source.model(IDS, MASK)[:, -1])


def test_generation_is_by_the_policy(make_config, make_rollout, monkeypatch):
    """Whatever was on before."""
    config, models = make_config(), models_in("adapters")
    shift(models.trained("value"))
    first = make_rollout(models, config)
    with models.using("value"):
        values = models.value(IDS, MASK)
    assert torch.equal(make_rollout(models, config).generation.input_ids, first.generation.input_ids)
    assert torch.equal(outputs(models, "value"), values)
