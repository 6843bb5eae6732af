"""The update: ratio 1 at the start, one normalizer per step, clips, schedules and early stops."""

import dataclasses

import numpy as np
import pytest
import torch

from ppo_fast import PolicyLossConfig, ops
from ppo_fast.ops._backends.native import extension
from ppo_fast.ops._core import registry
from ppo_fast.rlhf.config.ppo import AdvantageConfig, LossConfig
from ppo_fast.rlhf.models.forward import response_logits, response_values
from ppo_fast.rlhf.ppo.advantages import make_experience
from ppo_fast.rlhf.ppo.rewards import Rewards
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner, MicroBatch, combine
from ppo_fast.rlhf.training.optim import ClippedOptimizer, PenaltyCoefficient, schedule
from tests.rlhf.factories import all_rows, forward_of, made_experience, padded

CPU = torch.device("cpu")
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
}


def random_experience(rollout, seed=3):
    generator = torch.Generator().manual_seed(seed)
    advantages, returns = (torch.randn(rollout.generation.mask.shape, generator=generator) for _ in range(2))
    return made_experience(rollout, advantages, returns)


def made_rewards(rollout):
    zero, scores = torch.zeros_like(rollout.logprobs), torch.zeros(len(rollout.grid.ids))
    return Rewards(zero, scores, zero, torch.tensor(0.0), [], [], [True] * len(scores), None, None)


def random_rewards(rollout):
    """As `made_rewards`, with a reward on every token."""
    noise = torch.randn(rollout.generation.mask.shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(made_rewards(rollout), rewards=3 * noise[rollout.generation.mask])


@pytest.fixture
def setup(make_models, make_config, make_rollout):
    """setup(arch=, **config) -> (learner, rollout, experience) of one ragged rollout."""

    def make(arch="llama", overrides=None, **values):
        config = make_config(**values)
        models = make_models(config, arch=arch, **(overrides or {}))
        rollout = make_rollout(models, config)
        return Learner(models, config), rollout, random_experience(rollout)

    return make


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2"])
def test_rule_04_the_ratio_is_1_bitwise_when_scoring_and_update_run_the_same_batch(setup, arch):
    learner, rollout, experience = setup(arch, DROPOUT[arch], rollout={"temperature": 0.7})
    policy, _ = learner.backward(*all_rows(experience), 0.0)
    assert policy["ratio_max"] == policy["ratio_mean"] == 1
    assert policy["approx_kl"] == policy["clipfrac"] == 0
    assert policy["tokens"] == rollout.generation.mask.sum()


def test_rule_04_the_ratio_is_1_to_rounding_in_a_shuffled_minibatch(setup):
    learner, _, experience = setup()
    rows = np.array([6, 1, 3])
    policy, _ = learner.backward(experience, rows, 0.0)
    assert abs(policy["ratio_max"].item() - 1) < 1e-5


def test_micro_batches_are_of_like_length_and_without_common_padding(setup):
    _, _, experience = setup(rollout={"max_new_tokens": 12})
    grid, rows = experience.grid, np.array([7, 2, 5, 0, 1, 3])
    parts = list(grid.split_by_length(rows, 2))
    sizes = grid.attention.sum(axis=1)
    assert [sizes[row] for part in parts for row in part] == sorted(sizes[rows])
    tokens = 0
    for part in parts:
        micro = MicroBatch.from_experience(experience, part, packed=False)
        inputs, loss_mask = micro.sequences.inputs, experience.lengths[part]
        mask = inputs["attention_mask"]
        assert mask is None or mask.any(dim=0).all()
        assert inputs["input_ids"].shape[0] == len(part)
        # Each counted token follows the state it is drawn from.
        for row, start, length in zip(part, micro.cu_seqlens.tolist(), loss_mask, strict=False):
            response = grid.ids[row][torch.from_numpy(grid.loss_mask[row])]
            assert torch.equal(micro.tokens[start : start + length], response)
        assert {getattr(micro, name).shape for name in ("logprobs", "advantages", "returns")} == {(loss_mask.sum(),)}
        tokens += inputs["input_ids"].numel()
    assert tokens < experience.grid.ids[rows].numel()
    (alone,) = grid.split_by_length(rows, len(rows))
    assert (alone == rows).all()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_rule_11_micro_batches_add_up_to_the_minibatch(setup, aggregation, ratio):
    loss = {"aggregation": aggregation, "ratio": ratio, "ent_coef": 0.1, "dual_clip": 3.0}
    kl = {"placement": "loss", "loss_estimator": "k2", "coef": 0.1}
    results = []
    tokens = {"optim": {"tokens_per_pass": 40}}  # packed and padded; a response goes by itself
    packed = {"model": {"packing": True}}
    for values in ({}, *({"optim": {"micro_batch_size": size}} for size in (4, 1)), tokens, tokens | packed):
        learner, rollout, experience = setup(rollout={"max_new_tokens": 12}, loss=loss, kl=kl, **values)
        assert len(set(rollout.generation.mask.sum(dim=1).tolist())) > 2
        # The policy has moved since the rollout, so that ratios differ from 1 and some are clipped.
        with torch.no_grad():
            learner.models.policy.get_output_embeddings().weight.mul_(8)
        metrics = learner.backward(*all_rows(experience), 0.1)
        assert metrics[0]["clipfrac"] > 0.05
        results.append((gradients(learner.models.policy) | gradients(learner.models.value), metrics))
    (whole, whole_metrics), *others = results
    for grads, metrics in others:
        for name, grad in whole.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item() + 1e-9)
        for mine, theirs in zip(metrics, whole_metrics, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_rule_11_the_normalizer_is_the_count_of_the_aggregation(setup, aggregation):
    learner, rollout, experience = setup(loss={"aggregation": aggregation}, optim={"micro_batch_size": 2})
    logits = response_logits(learner.models.policy, forward_of(rollout))
    advantages = torch.zeros(rollout.generation.mask.shape).masked_scatter(
        rollout.generation.mask, experience.advantages
    )
    whole = ops.policy_loss(
        torch.zeros(*rollout.generation.mask.shape, 64).masked_scatter(rollout.generation.mask[..., None], logits),
        rollout.generation.responses,
        padded(rollout.logprobs, rollout.grid.lengths),
        advantages,
        rollout.generation.mask,
        config=PolicyLossConfig(aggregation=aggregation),
    )
    policy, value = learner.backward(*all_rows(experience), 0.0)
    torch.testing.assert_close(policy["loss"], whole.loss.detach())
    error = 0.5 * (experience.values - experience.returns).square().mean()
    torch.testing.assert_close(value["value_loss"], error)


def test_rule_12_the_entropy_bonus_has_the_gradient_of_the_full_entropy(setup):
    learner, rollout, experience = setup(loss={"ent_coef": 0.5})
    flat = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    policy, _ = learner.backward(*all_rows(flat), 0.0)
    ours = gradients(learner.models.policy)
    learner.models.policy.zero_grad()
    logits = response_logits(learner.models.policy, forward_of(rollout))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    (-0.5 * entropy).backward()
    for name, grad in gradients(learner.models.policy).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-7)
    assert policy["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert 0 <= policy["entropy"] <= torch.tensor(64.0).log()


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_rule_07_kl_in_the_loss_has_the_gradient_of_the_kl(setup, estimator):
    learner, rollout, experience = setup(kl={"placement": "loss", "loss_estimator": estimator})
    with torch.no_grad():
        for parameter in learner.models.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    flat = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    policy, _ = learner.backward(*all_rows(flat), 0.3)
    ours = gradients(learner.models.policy)
    learner.models.policy.zero_grad()
    logprobs = response_logits(learner.models.policy, forward_of(rollout)).log_softmax(-1)
    reference = response_logits(learner.models.reference, forward_of(rollout)).log_softmax(-1).detach()
    rise = (logprobs - reference).gather(-1, experience.tokens[:, None])[:, 0]
    exact = (logprobs.exp() * (logprobs - reference)).sum(-1)
    kl = {"k2": 0.5 * rise**2, "k3": (-rise).expm1() + rise, "full": exact}[estimator]
    mean = kl.mean()
    (0.3 * mean).backward()
    for name, grad in gradients(learner.models.policy).items():
        torch.testing.assert_close(ours[name], grad, rtol=2e-3, atol=2e-6)
    assert policy["kl"] == pytest.approx(mean.item(), rel=1e-4)
    assert policy["kl"] > 1e-3


def test_whitening_multiplies_the_coefficient_of_kl_in_the_loss_by_the_deviation(setup):
    """The gradient is 1 / s of that of the plain advantages with s * coef, as docs/debugging.md states it."""
    learner, rollout, _ = setup(kl={"placement": "loss"})
    noise = torch.randn(rollout.generation.mask.shape, generator=torch.Generator().manual_seed(6))
    rollout = dataclasses.replace(rollout, ref_logprobs=rollout.logprobs + noise[rollout.generation.mask])
    made = [
        make_experience(rollout, random_rewards(rollout), AdvantageConfig(whiten=whiten)) for whiten in (True, False)
    ]
    spread = made[1].advantages.std()
    centered = dataclasses.replace(made[1], advantages=made[1].advantages - made[1].advantages.mean())
    found = []
    for part, coef in ((made[0], 0.3), (centered, 0.3 * spread)):
        learner.backward(*all_rows(part), coef)
        found.append(gradients(learner.models.policy))
        learner.models.policy.zero_grad()
    assert abs(spread - 1) > 0.1
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad / spread, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("placement", "charged"), [("reward", False), ("both", True), ("loss", True)])
def test_rule_07_the_loss_pays_for_kl_only_where_it_is_placed_there(setup, placement, charged):
    learner, _, experience = setup(kl={"placement": placement})
    with torch.no_grad():
        learner.models.policy.get_output_embeddings().weight.mul_(2)
    flat = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    policy, _ = learner.backward(*all_rows(flat), 0.3)
    assert bool(policy["loss"] > 0) is charged


def test_rule_15_the_gradient_norm_is_clipped_once_and_told_before_clipping(make_config):
    weight = torch.nn.Parameter(torch.zeros(2))
    module = torch.nn.Module()
    module.weight = weight
    network = ClippedOptimizer(module.parameters(), 0.1, make_config(optim={"max_grad_norm": 1.0}).optim)
    weight.grad = torch.tensor([3.0, 4.0])
    assert network.clip() == 5
    network.step(1.0, failed=torch.tensor(False))
    # The first step of AdamW is lr * g / (|g| + eps), with g clipped to norm 1.
    clipped = torch.tensor([0.6, 0.8])
    torch.testing.assert_close(weight.detach(), -0.1 * clipped / (clipped + 1e-5))
    assert weight.grad is None
    torch.testing.assert_close(
        network.optimizer.state[weight]["exp_avg"], 0.1 * clipped
    )  # so the moments hold the clipped gradient


def test_rule_15_policy_and_value_are_clipped_apart_once_per_step(setup, monkeypatch):
    calls = []
    clip = ClippedOptimizer.clip
    monkeypatch.setattr(
        ClippedOptimizer, "clip", lambda network, *scale: calls.append(len(network.parameters)) or clip(network, *scale)
    )
    learner, _, experience = setup(optim={"micro_batch_size": 1, "minibatch_size": 4, "epochs": 2})
    stats = learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    assert calls == [len(learner.policy.parameters), len(learner.value.parameters)] * 4
    assert (stats.grad_norms > 0).all()


def test_rule_15_the_learning_rate_warms_up_and_anneals(make_config):
    # 10 updates x 2 epochs x 2 minibatches = 40 steps, 4 of them warm-up.
    config = make_config(updates=10, optim={"warmup_frac": 0.1, "final_lr_frac": 0.2}).optim
    factors = [schedule(step, 40, config) for step in range(40)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == pytest.approx(0.2 + 0.8 / 36)
    assert schedule(22, 40, config) == pytest.approx(0.6)


def test_schedules_after_a_warm_up_by_steps(make_config):
    def factors(**values):
        config = make_config(optim={"warmup_steps": 3, "final_lr_frac": 0.2} | values).optim
        return [schedule(step, 11, config) for step in range(11)]

    cosine = [0.2 + 0.8 * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]
    assert factors(schedule="cosine") == pytest.approx([1 / 3, 2 / 3, 1.0, *cosine])
    assert factors(schedule="constant") == pytest.approx([1 / 3, 2 / 3, *[1.0] * 9])
    assert factors(schedule="linear") == pytest.approx([1 / 3, 2 / 3, 1.0, *(1 - 0.1 * step for step in range(8))])
    assert factors(schedule="constant", warmup_steps=0) == [1.0] * 11
    assert factors(warmup_steps=20) == pytest.approx([step / 20 for step in range(1, 12)])


def test_the_learning_rate_used_is_that_of_the_update(setup):
    learner, _, experience = setup(updates=4, optim={"warmup_frac": 0.0, "final_lr_frac": 0.0})
    stats = learner.update(experience, 0.0, 2, torch.Generator().manual_seed(0))
    # Steps 8 to 11 of 16.
    assert stats.lr == pytest.approx(1e-3 * (1 - 11 / 16))
    assert learner.value.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 11 / 16))


def test_rule_18_target_kl_stops_the_epochs_and_says_so(setup):
    learner, _, experience = setup(optim={"lr": 0.05, "target_kl": 0.01, "epochs": 4})
    stats = learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    assert stats.note is not None
    assert stats.note.startswith("stopped in epoch 1 of 4: approx_kl ")
    assert stats.note.endswith(" > target_kl 0.01")
    assert learner.policy.optimizer.state[learner.policy.parameters[0]]["step"] == 1
    assert all(p.grad is None for p in [*learner.policy.parameters, *learner.value.parameters])
    learner, _, experience = setup(optim={"lr": 0.05, "epochs": 4})
    assert learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0)).note is None
    assert learner.policy.optimizer.state[learner.policy.parameters[0]]["step"] == 8


def test_a_step_raises_the_probability_of_good_tokens_and_the_value_follows_returns(setup):
    learner, rollout, experience = setup(optim={"lr": 1e-3, "value_lr": 1e-2, "epochs": 6}, loss={"value_clip": None})
    learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = response_logits(learner.models.policy, forward_of(rollout))
        new = torch.distributions.Categorical(logits=logits).log_prob(experience.tokens)
        values = response_values(learner.models.value, forward_of(rollout))
    assert (experience.advantages * (new - experience.logprobs)).mean() > 0.01
    error, before = ((v - experience.returns).square().mean() for v in (values, experience.values))
    assert error < 0.8 * before


def test_only_the_trained_networks_change(setup):
    learner, _, experience = setup()
    models = learner.models
    before = {n: p.clone() for n, p in models.reference.named_parameters()}
    policy, value = ([p.clone() for p in m.parameters()] for m in (models.policy, models.value))
    learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    assert all(torch.equal(p, before[n]) for n, p in models.reference.named_parameters())
    assert not all(torch.equal(*pair) for pair in zip(policy, models.policy.parameters(), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(value, models.value.parameters(), strict=True))


@pytest.mark.parametrize("path", ["linear", "materialized"])
def test_scoring_and_update_run_the_ops_of_their_path_on_the_backend_of_this_machine(setup, monkeypatch, path):
    called, ran, lookup = set(), set(), registry.implementation

    def spied(name, op):
        return lambda *inputs, **options: called.add(name) or op(*inputs, **options)

    for name in ("token_stats", "policy_loss", "linear_token_stats", "linear_policy_loss"):
        monkeypatch.setattr(ops, name, spied(name, getattr(ops, name)))
    monkeypatch.setattr(registry, "implementation", lambda *names: ran.add(names) or lookup(*names))
    learner, rollout, _ = setup(model={"fused_head": path == "linear"})
    called.clear()  # the comparison at the start
    score(learner.models, rollout.generation, learner.config.rollout)
    make_experience(rollout, made_rewards(rollout), learner.config.advantage)
    learner.update(random_experience(rollout), 0.0, 0, torch.Generator())
    prefix = "linear_" if path == "linear" else ""
    assert called == {f"{prefix}token_stats", f"{prefix}policy_loss"}
    expected = "torch" if extension.load_error else "native"
    assert ran >= {(op, expected) for op in ("token_stats", "gae", "value_loss")}
    assert {backend for _, backend in ran} == {expected}


def test_the_gradient_takes_the_storage_of_the_logits(setup, monkeypatch):
    seen, op = [], ops.policy_loss
    monkeypatch.setattr(
        ops,
        "policy_loss",
        lambda logits, *rest, **named: (
            seen.append((logits.detach(), logits.detach().clone())) or op(logits, *rest, **named)
        ),
    )
    learner, _, experience = setup(model={"fused_head": False})
    learner.backward(*all_rows(experience), 0.0)
    ((logits, before),) = seen
    assert not torch.equal(logits, before)


def test_vf_coef_scales_the_value_gradient(setup):
    grads = []
    for vf_coef in (0.5, 1.0):
        learner, _, experience = setup(loss={"vf_coef": vf_coef})
        learner.backward(*all_rows(experience), 0.0)
        grads.append(learner.models.value.head.weight.grad)
    torch.testing.assert_close(2 * grads[0], grads[1])


@pytest.mark.parametrize(("clip", "clips"), [(0.2, True), (None, False)])
def test_values_are_clipped_around_the_old_ones(setup, clip, clips):
    learner, _, experience = setup(loss={"value_clip": clip})
    with torch.no_grad():
        learner.models.value.head.bias.add_(1)
    _, value = learner.backward(*all_rows(experience), 0.0)
    assert bool(value["clipfrac"] > 0.1) is clips


def test_the_penalty_doubles_above_and_halves_below_the_target():
    penalty = PenaltyCoefficient(LossConfig(penalty_coef=1.0, penalty_target=0.01), CPU)
    for kl, expected in ((0.016, 2.0), (0.014, 2.0), (0.0068, 2.0), (0.0066, 1.0), (0.0, 0.5)):
        penalty.update(torch.tensor(kl))
        assert float(penalty.coef) == expected
    fixed = PenaltyCoefficient(LossConfig(penalty_coef=1.0), CPU)
    fixed.update(torch.tensor(9.0))
    assert fixed.coef == 1.0


def test_the_penalty_is_adapted_by_the_kl_of_the_last_epoch(setup, monkeypatch):
    learner, _, experience = setup(optim={"minibatch_size": 8, "epochs": 3})
    seen = []
    monkeypatch.setattr(learner.penalty, "update", seen.append)
    backward, of_epochs = learner.backward, []  # one step each

    def recorded(*arguments):
        metrics = backward(*arguments)
        of_epochs.append(metrics[0]["approx_kl"])
        return metrics

    monkeypatch.setattr(learner, "backward", recorded)
    learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
    assert len(of_epochs) == 3
    assert 0 < of_epochs[1] < of_epochs[2]
    assert seen == [of_epochs[2]]


def test_the_adapted_penalty_reaches_the_loss(setup):
    # Without clip the policy runs; under a huge penalty it hardly moves.
    loss = {"penalty_coef": 1e-6, "penalty_target": 1.0, "clip_low": None, "clip_high": None}
    moves = []
    for coef in (0.0, 1000.0):
        learner, _, experience = setup(loss=loss, optim={"lr": 3e-3, "epochs": 8})
        learner.penalty.coef = torch.tensor(coef)
        stats = learner.update(experience, 0.0, 0, torch.Generator().manual_seed(0))
        moves.append(stats.policy["approx_kl"])
    assert moves[1] < 0.2 * moves[0]
    assert learner.penalty.coef == 500


def test_combine_weights_means_by_tokens():
    parts = [
        {
            "tokens": torch.tensor(1.0),
            "kl": torch.tensor(4.0),
            "ratio_max": torch.tensor(2.0),
            "loss": torch.tensor(1.0),
        },
        {
            "tokens": torch.tensor(3.0),
            "kl": torch.tensor(0.0),
            "ratio_max": torch.tensor(5.0),
            "loss": torch.tensor(2.0),
        },
    ]
    assert {k: v.item() for k, v in combine(parts).items()} == {"tokens": 4, "kl": 1, "ratio_max": 5, "loss": 1.5}
    assert combine(parts, losses=torch.sum)["loss"] == 3


def test_minibatches_cover_the_batch_once_per_epoch(setup):
    learner, _, _ = setup(optim={"epochs": 2, "minibatch_size": 4})
    seen = [(epoch, number, rows.tolist()) for epoch, number, rows in learner._minibatches(8, torch.Generator())]
    assert [(epoch, number) for epoch, number, _ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first, second = seen[0][2] + seen[1][2], seen[2][2] + seen[3][2]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_the_options_of_the_loss_are_checked_once_a_run(setup, monkeypatch):
    loss = {"penalty_coef": 0.5, "penalty_target": 0.01}
    learner, _, experience = setup(loss=loss, kl={"placement": "loss", "adaptive": True})
    seen, op = [], ops.linear_policy_loss
    monkeypatch.setattr(PolicyLossConfig, "__post_init__", lambda self: pytest.fail("built again"))
    monkeypatch.setattr(
        ops,
        "linear_policy_loss",
        lambda *rest, config, **named: seen.append(config) or op(*rest, config=config, **named),
    )
    for coef in (0.25, torch.tensor(0.5)):
        penalty = float(learner.penalty.coef)
        learner.update(experience, coef, 0, torch.Generator())
        assert (float(seen[-1].kl_coef), float(seen[-1].penalty_coef)) == (float(coef), penalty)
    assert {id(config) for config in seen} == {id(learner.loss_config)}
