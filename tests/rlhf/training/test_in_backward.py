"""optim.in_backward: the steps of ordinary training, without the gradients of the whole model."""

import json

import pytest
import torch

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.optim import AdamWConfig
from ppo_fast.rlhf.training.adamw_8bit import SMALLEST
from ppo_fast.rlhf.training.checkpoint import load_checkpoint
from ppo_fast.rlhf.training.optim import ClippedOptimizer, InBackwardOptimizer
from tests.rlhf.supervised_factories import make_model

STATES = {"full": {}, "masters": {"master_weights": True}, "8bit": {"name": "adamw_8bit"}}
pytestmark = pytest.mark.filterwarnings("ignore:a bfloat16 weight")


def make_net(kind, states="full", **options):
    """Two large layers with small biases, bfloat16, on which a backward pass can be taken."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)]
    net = torch.nn.Sequential(*layers).bfloat16()
    return net, kind(net.parameters(), 1e-3, AdamWConfig(**STATES[states], **options))


def take_step(net, optimizer, seed, scale=1.0):
    """The norm of the gradients of one step, by a loss whose gradients grow with `scale`."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    failed = torch.tensor(False)
    optimizer.begin(1.0, failed)
    (scale * net(x)).float().square().sum().backward()
    norm = optimizer.clip()
    optimizer.step(1.0, failed | ~norm.isfinite())
    return norm


@pytest.mark.parametrize("states", STATES)
def test_without_clipping_the_bits_are_those_of_ordinary_steps(states):
    nets = [make_net(kind, states, max_grad_norm=1e9) for kind in (ClippedOptimizer, InBackwardOptimizer)]
    for seed in range(3):
        norms = [take_step(*each, seed) for each in nets]
        torch.testing.assert_close(*norms)
    for mine, other in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("kind", "most"), [(InBackwardOptimizer, 0), (ClippedOptimizer, 2)])
def test_the_gradient_of_a_large_weight_is_gone_before_the_next_one_is_made(kind, most):
    net, optimizer = make_net(kind)
    alive = []
    for weight in net.parameters():
        hook = lambda _: alive.append(  # noqa: E731
            [w.numel() for w in net.parameters() if w.grad is not None and w.numel() >= SMALLEST]
        )
        weight.register_post_accumulate_grad_hook(hook)
        weight.register_hook(lambda gradient, hook=hook: hook(gradient))  # a gradient, before it is the weight's
    take_step(net, optimizer, 0)
    assert len(alive) == 8
    assert max(map(len, alive)) == most
    assert all(weight.grad is None for weight in net.parameters())


def test_a_step_is_clipped_by_the_norm_of_the_step_before():
    (net, ours), (by_hand, plain) = (
        make_net(kind, max_grad_norm=1.0) for kind in (InBackwardOptimizer, ClippedOptimizer)
    )
    last = None
    for seed in range(3):
        norm = take_step(net, ours, seed, scale=1.0 + seed)
        plain.clip = lambda last=last: setattr(plain, "norm", last) or torch.ones(())
        take_step(by_hand, plain, seed, scale=1.0 + seed)
        last = norm
        assert norm > 1
    for mine, other in zip(net.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_nothing_changes_after_a_gradient_that_is_not_finite():
    net, optimizer = make_net(InBackwardOptimizer)
    take_step(net, optimizer, 0)
    before = [weight.detach().clone() for weight in net.parameters()]
    assert not take_step(net, optimizer, 1, scale=float("nan")).isfinite()
    assert all(torch.equal(w, b) for w, b in zip(net.parameters(), before, strict=True))


def run(make_config, tokenizer, directory, updates, *, resume=False, reward=1.0, **optim):
    optim = {"lr": 1e-4, "warmup_frac": 0.0, "final_lr_frac": 1.0, "in_backward": True, "max_grad_norm": 0.01} | optim
    config = make_config(updates=updates, optim=optim, output_dir=str(directory), checkpoint={"every": 1})
    train_ppo(
        config,
        reward_fn=lambda completion_ids, **_: [reward * len(ids) for ids in completion_ids],
        prompts=["w1", "w2 w3", "w4"],
        policy=make_model(intermediate_size=256).bfloat16(),
        tokenizer=tokenizer,
        resume=resume,
    )
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clock = ("time/", "tokens_per_second", "memory/", "perf/")
    metrics = [{n: x for n, x in json.loads(line).items() if not n.startswith(clock)} for line in lines]
    return metrics, (directory / "final" / "model.safetensors").read_bytes()


def test_a_run_resumes_to_the_same_bits_and_ends_as_an_ordinary_one(make_config, tokenizer, tmp_path):
    whole = run(make_config, tokenizer, tmp_path / "whole", 2)
    run(make_config, tokenizer, tmp_path / "halves", 1)
    assert run(make_config, tokenizer, tmp_path / "halves", 2, resume=True) == whole
    unclipped = [
        run(make_config, tokenizer, tmp_path / name, 1, in_backward=name == "in", max_grad_norm=1e9)
        for name in ("in", "ordinary")
    ]
    assert unclipped[0][1] == unclipped[1][1] != whole[1]


def test_after_a_failed_step_the_last_checkpoint_stays(make_config, tokenizer, tmp_path, monkeypatch):
    run(make_config, tokenizer, tmp_path / "run", 1)
    saved = load_checkpoint(tmp_path / "run" / "checkpoints").directory
    before = (saved / "model.safetensors").read_bytes()
    broken = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: broken(*args, **kwargs) * torch.nan)
    message = (
        r"^update 2: epoch 1, minibatch 1: grad_norm/policy is not finite: nan; the batch and the weights, of which "
    )
    with pytest.raises(UserError, match=message + r"the step has changed some, are in"):
        run(make_config, tokenizer, tmp_path / "run", 2, resume=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoints").directory == saved
    assert (saved / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optim": {"in_backward": True, "micro_batch_size": 4}},
            "optim.in_backward: expected false with several forward passes an optimizer step, got True",
        ),
        (
            {"optim": {"in_backward": True, "tokens_per_pass": 4096}},
            "optim.in_backward: expected false with several forward passes an optimizer step, got True",
        ),
        (
            {"optim": {"in_backward": True, "target_kl": 0.1}},
            "optim.target_kl: expected null with optim.in_backward, got 0.1",
        ),
        (
            {"optim": {"in_backward": True}, "on_nan": "skip"},
            "on_nan: expected 'stop' with optim.in_backward, got 'skip'",
        ),
    ],
)
def test_what_it_cannot_go_with_is_refused(values, message):
    with pytest.raises(UserError) as error:
        config_from_dict(values)
    assert str(error.value) == f"config: {message}"
