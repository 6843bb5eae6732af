"""model.offload_activations: the gradients of training without it, and what waits in host memory."""

import pytest
import torch

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.models import offload
from ppo_fast.rlhf.models.forward import backbone_of
from ppo_fast.rlhf.models.loading import checkpoint_activations, recomputing
from ppo_fast.rlhf.models.offload import offload_activations, to_pinned
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.plan import make_plan
from tests.rlhf.supervised_factories import make_model

IDS = torch.arange(4, 52).view(2, 24)


def gradients_of(model):
    with recomputing(model):
        hidden = backbone_of(model)(input_ids=IDS).last_hidden_state
    hidden.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits_and_no_weight_is_copied(checkpointing, monkeypatch):
    monkeypatch.setattr(offload, "FEWEST_BYTES", 1024)
    plain, offloaded = make_model(), make_model()
    offloaded.load_state_dict(plain.state_dict())
    copied = []
    offload_activations(backbone_of(offloaded), lambda x: copied.append(x) or to_pinned(x))
    if checkpointing:
        for model in (plain, offloaded):
            checkpoint_activations(model)
    ours, expected = gradients_of(offloaded), gradients_of(plain)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    layers = offloaded.config.num_hidden_layers
    assert copied
    assert all(x.nbytes >= 1024 for x in copied)
    if checkpointing:  # the input of each layer, and of the norm behind them
        assert len(copied) < 4 * layers + 8
    weights = {p.untyped_storage()._cdata for p in offloaded.parameters()}
    assert not weights & {x.untyped_storage()._cdata for x in copied}


def test_nothing_is_copied_without_gradients_and_the_block_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(offload, "FEWEST_BYTES", 0)
    model, copied = make_model(), []
    backbone = backbone_of(model)
    offload_activations(backbone, lambda x: copied.append(x) or to_pinned(x))
    with torch.no_grad():
        backbone(input_ids=IDS)
    with pytest.raises(IndexError):
        backbone(input_ids=IDS + 10**6)
    copied.clear()
    (torch.ones(3, requires_grad=True) * 2).exp().sum().backward()  # outside of it
    assert not copied


def test_a_cpu_refuses_it(make_config, make_models):
    with pytest.raises(UserError) as error:
        make_models(make_config(model={"offload_activations": True}))
    expected = "expected false on a CPU, where host memory is its own, got True"
    assert str(error.value) == f"model.offload_activations: {expected}"


def test_the_plan_counts_what_stays_on_the_device(make_config):
    shapes = SavedModels(SavedModel(given=make_model(hidden_size=256, intermediate_size=1024).config))
    values = {"rollout": {"batch_size": 16, "max_new_tokens": 64}, "optim": {"minibatch_size": 16}}
    held = []
    for checkpointing, offloaded in ((False, False), (False, True), (True, False), (True, True)):
        model = {"gradient_checkpointing": checkpointing, "offload_activations": offloaded}
        plan = make_plan(make_config(model=model, **values), "cpu", shapes=shapes, prompt_tokens=64)
        held.append(plan.phases["update"]["activations"])
    assert held[1] < 0.7 * held[0]
    assert held[3] <= held[2]
