"""Training in float16: the gradients of float32, by a scaled loss whose overflows are counted."""

import copy
import json

import numpy as np
import pytest
import torch

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.optim import AdamWConfig
from ppo_fast.rlhf.config.supervised import SFTConfig
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.training.runtime import warn_about_precision
from tests.rlhf.factories import all_rows, made_experience
from tests.rlhf.supervised_factories import make_model

MASTERS = {"master_weights": True, "warmup_frac": 0.0, "final_lr_frac": 1.0}


@pytest.fixture
def make_learner(make_config, make_rollout, tokenizer):
    """make_learner(dtype) -> (learner, experience) of one rollout and one set of weights, those of float16."""

    def make(dtype, **values):
        config = make_config(optim=MASTERS, **values)
        policy = make_model(intermediate_size=256).half().to(dtype)
        models = load_models(config.model, torch.Generator().manual_seed(0), policy=policy, tokenizer=tokenizer)
        reference = copy.deepcopy(models)
        rollout = make_rollout(reference, config)
        generator = torch.Generator().manual_seed(3)
        shape = rollout.generation.mask.shape
        # Advantages so small that gradients are below what float16 holds.
        advantages, returns = 1e-5 * torch.randn(2, *shape, generator=generator)
        return Learner(models, config), made_experience(rollout, advantages, returns)

    return make


def policy_gradient(learner, experience):
    learner.backward(*all_rows(experience), 0.0)
    factor = learner.loss_scale.factor
    gradients = torch.cat([p.grad.float().flatten() for p in learner.policy.parameters])
    return gradients if factor is None else gradients / factor


def test_scaled_gradients_are_those_of_float32_and_unscaled_ones_are_lost(make_learner, monkeypatch):
    learner, experience = make_learner(torch.float32)
    exact = policy_gradient(learner, experience)
    half, same = make_learner(torch.float16)
    error = (policy_gradient(half, same) - exact).norm() / exact.norm()
    assert half.loss_scale.value == 2**16
    assert error < 0.02
    half, same = make_learner(torch.float16)
    half.loss_scale.load_state_dict(half.loss_scale.state_dict() | {"scale": 1.0})
    assert (policy_gradient(half, same) - exact).norm() / exact.norm() > 2 * error


def test_a_step_that_overflows_changes_nothing_and_is_counted(make_learner):
    learner, experience = make_learner(torch.float16)
    learner.loss_scale.load_state_dict(learner.loss_scale.state_dict() | {"scale": 2.0**62})
    before = [p.detach().clone() for p in learner.policy.parameters]
    stats = learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    assert stats.overflows == 4
    assert stats.loss_scale == 2.0**58
    assert stats.skipped == 0
    assert all(torch.equal(p, b) for p, b in zip(learner.policy.parameters, before, strict=True))
    learner.loss_scale.load_state_dict(learner.loss_scale.state_dict() | {"scale": 2.0**16})
    stats = learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    assert stats.overflows < 4
    assert stats.loss_scale == 2.0 ** (16 - stats.overflows)
    assert not all(torch.equal(p, b) for p, b in zip(learner.policy.parameters, before, strict=True))


def test_gradients_that_are_never_finite_stop_the_run(make_learner):
    learner, experience = make_learner(torch.float16)
    learner.loss_scale.load_state_dict(learner.loss_scale.state_dict() | {"scale": 0.5})
    learner.policy.parameters[0].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match=r"^epoch 1, minibatch 1: grad_norm/policy is not finite: nan$"):
        learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))


def test_the_clip_is_that_of_the_gradients_without_the_scale(make_learner):
    learner, experience = make_learner(torch.float16)
    exact, same = make_learner(torch.float32)
    for each, batch in ((learner, experience), (exact, same)):
        each.backward(batch, np.arange(8), 0.0)
    norms = learner.policy.clip(learner.loss_scale.factor), exact.policy.clip()
    torch.testing.assert_close(*norms, rtol=0.01, atol=0)


def test_a_run_resumes_to_the_same_bits_and_stays_near_float32(make_config, tokenizer, tmp_path):
    def go(name, updates, *, dtype=torch.float16, resume=False):
        saved = {"output_dir": str(tmp_path / name), "checkpoint": {"every": 1}}
        result = train_ppo(
            make_config(updates=updates, optim={"lr": 1e-4} | MASTERS, **saved),
            reward_fn=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
            prompts=["w1", "w2 w3", "w4"],
            policy=make_model(intermediate_size=256).half().to(dtype),
            tokenizer=tokenizer,
            resume=resume,
        )
        clock = ("time/", "tokens_per_second", "memory/", "perf/")
        kept = [{n: x for n, x in metrics.items() if not n.startswith(clock)} for metrics in result.history]
        return kept, [p.detach().clone() for p in result.models.policy.parameters()]

    whole = go("whole", 2)
    go("halves", 1)
    state = json.loads((tmp_path / "halves" / "checkpoints" / "update-000001" / "state.json").read_text())
    assert state["state"]["parts"]["learner"]["loss_scale"]["scale"] == whole[0][0]["float16/loss_scale"]
    again = go("halves", 2, resume=True)
    assert again[0] == whole[0]
    assert all(torch.equal(p, q) for p, q in zip(again[1], whole[1], strict=True))
    skipped = sum(metrics["float16/skipped_steps"] for metrics in whole[0])
    assert 0 < skipped < 8  # the gradients of this critic begin above 1
    assert whole[0][-1]["float16/loss_scale"] == 2.0 ** (16 - skipped)
    exact, _ = go("float32", 1, dtype=torch.float32)
    for name in ("loss/value", "policy/entropy"):  # three steps of eight are left out
        assert whole[0][0][name] == pytest.approx(exact[0][name], rel=0.1), name
    assert "float16/loss_scale" not in exact[0]


def test_supervised_stages_scale_their_loss(run_stage, tmp_path):
    results = []
    for name, model in (("half", make_model().half()), ("whole", make_model())):
        optim = {"epochs": 1, "lr": 1e-3, **MASTERS}
        results.append(run_stage("sft", policy=model, optim=optim, output_dir=str(tmp_path / name)))
    half, whole = (result.history for result in results)
    assert half[-1]["train/loss"] == pytest.approx(whole[-1]["train/loss"], rel=0.01)
    assert half[-1]["float16/loss_scale"] == 2.0**16


@pytest.mark.parametrize("kind", [None, SFTConfig])
def test_float16_weights_need_masters(kind):
    options = {} if kind is None else {"kind": kind}
    with pytest.raises(UserError) as error:
        config_from_dict({"model": {"dtype": "float16"}}, **options)
    expected = "true with model.dtype 'float16' unless adapters are trained"
    assert str(error.value) == f"config: optim.master_weights: expected {expected}, got None"
    config_from_dict({"model": {"dtype": "float16"}, "optim": {"master_weights": True}}, **options)


def test_float16_takes_no_steps_in_the_backward_pass():
    with pytest.raises(UserError) as error:
        config_from_dict({"model": {"dtype": "float16"}, "optim": {"master_weights": True, "in_backward": True}})
    assert str(error.value) == "config: optim.in_backward: expected false with model.dtype 'float16', got True"


def test_float16_weights_that_take_their_own_steps_are_warned_of():
    message = (
        r"^a float16 weight w keeps no step below \|w\| / 4096, and AdamW's are about optim\.lr = 1e-06; set "
        r"optim\.master_weights to true, or model\.dtype to float32 unless the run learns$"
    )
    with pytest.warns(UserWarning, match=message):
        warn_about_precision(make_model().half(), AdamWConfig(name="adamw_8bit"))
