"""AdamW of 16-bit weights: float32 masters, moments of 8 bits with stochastic rounding, clipping, saving."""

import json
import warnings
from contextlib import nullcontext

import pytest
import torch

from ppo_fast.ops._backends.reference.adamw_8bit import BLOCK, MEANS, ROOTS, decode, encode, noise, rounded
from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.optim import AdamWConfig
from ppo_fast.rlhf.training import adamw
from ppo_fast.rlhf.training.adamw_8bit import SMALLEST, AdamW8bit, new_moments
from ppo_fast.rlhf.training.checkpoint import load_checkpoint, save_checkpoint
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from ppo_fast.rlhf.training.runtime import warn_about_precision
from tests.helpers import no_host_sync
from tests.rlhf.supervised_factories import make_model

STATES = {"full": {}, "masters": {"master_weights": True}, "8bit": {"name": "adamw_8bit"}}
FLAT = {"final_lr_frac": 1.0}  # a learning rate that does not depend on the number of updates
each_states = pytest.mark.parametrize("states", STATES)


def make_network(states, *, dtype=torch.bfloat16, lr=1e-3, shape=(32, 256), **options):
    """A matrix large enough for moments of 8 bits, a vector too small for them, a float32 head."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) * 0.02, torch.randn(7), torch.randn(1, 300)]
    kinds = (dtype, dtype, torch.float32)
    parameters = [torch.nn.Parameter(w.to(kind)) for w, kind in zip(weights, kinds, strict=True)]
    return ClippedOptimizer(parameters, lr, AdamWConfig(**STATES[states], **options))


def give_gradients(network, seed, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (scale * (noise + 0.5)).to(parameter.dtype)


def step(network, seed, *, failed=False, scale=1e-2):
    give_gradients(network, seed, scale)
    network.step(1.0, failed=torch.tensor(failed))


def weights_of(network):
    return [parameter.detach().clone() for parameter in network.parameters]


def numbers_of(network):
    """Weights and every tensor of the optimizer that a step changes, the noise aside."""
    found, todo = weights_of(network), [network.state_dict()]
    while todo:
        part = todo.pop()
        if isinstance(part, torch.Tensor):
            found.append(part.clone())
        elif isinstance(part, dict):
            todo += [item for name, item in part.items() if name != "noise"]
        elif isinstance(part, list):
            todo += part
    return found


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def moved(states, steps=200, **options):
    """How far the matrix went on average, in learning rates."""
    network = make_network(states, **options)
    before = weights_of(network)[0].float()
    for _ in range(steps):
        for parameter in network.parameters:
            parameter.grad = torch.ones_like(parameter)
        network.step(1.0)
    return ((before - weights_of(network)[0].float()) / network.lr).mean().item()


def test_small_steps_are_lost_in_bfloat16_and_kept_by_masters_and_stochastic_rounding():
    # Weights of 0.02 have a spacing of 1e-4: to nearest, a step of 1e-6 does nothing.
    assert moved("full", lr=1e-6) < 5
    assert moved("masters", lr=1e-6) == pytest.approx(200, rel=0.1)
    assert moved("8bit", lr=1e-6) == pytest.approx(200, rel=0.1)


def test_masters_are_adamw_in_float32_rounded():
    ours = make_network("masters")
    exact = ClippedOptimizer([torch.nn.Parameter(w.float()) for w in weights_of(ours)], ours.lr, AdamWConfig())
    for seed in range(5):
        give_gradients(ours, seed)
        for mine, theirs in zip(ours.parameters, exact.parameters, strict=True):
            theirs.grad = mine.grad.float()
        ours.step(1.0)
        exact.step(1.0)
    assert same(weights_of(ours), [w.to(p.dtype) for w, p in zip(weights_of(exact), ours.parameters, strict=True)])
    assert same(ours.optimizer.masters, weights_of(exact)[:2])


def test_weights_in_float32_have_no_second_copy():
    network = make_network("masters", dtype=torch.float32)
    assert network.optimizer.masters == []
    to_python = make_network("full", dtype=torch.float32)
    for seed in range(3):
        step(network, seed)
        step(to_python, seed)
    assert same(weights_of(network), weights_of(to_python))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}])
def test_8_bits_go_where_adamw_goes(options):
    ours, exact = (make_network(states, dtype=torch.float32, **options) for states in ("8bit", "full"))
    before = weights_of(exact)
    for seed in range(50):
        step(ours, seed)
        step(exact, seed)
    for start, mine, theirs in zip(before, weights_of(ours), weights_of(exact), strict=True):
        # What is too small for 8 bits has moments of float32.
        share = 0.02 if mine.numel() >= SMALLEST else 1e-5
        assert (mine - theirs).norm() <= share * (theirs - start).norm()


def test_gradients_of_many_sizes_in_one_block_keep_their_own_step():
    """By its square the second moment of the small ones would be rounded to 0."""
    weight = torch.nn.Parameter(torch.zeros(SMALLEST))
    optimizer = AdamW8bit([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    sizes = torch.logspace(-4, 0, BLOCK).repeat(SMALLEST // BLOCK)
    for _ in range(20):
        weight.grad = sizes.clone()
        optimizer.step()
    assert (weight / -20 - 1).abs().max() < 0.4
    assert (weight / -20 - 1).abs().mean() < 0.05


def test_small_gradients_take_the_steps_of_large_ones():
    """2^-20 is about 1e-6, and scaling by it is exact."""
    weights = []
    for factor in (1.0, 2.0**-20):
        weight = torch.nn.Parameter(torch.zeros(SMALLEST))
        optimizer = AdamW8bit([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
        for seed in range(5):
            weight.grad = factor * torch.randn(SMALLEST, generator=torch.Generator().manual_seed(seed)).add(2).exp()
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=0)


def test_large_matrices_are_taken_in_chunks(monkeypatch):
    exact, chunked = (make_network("8bit", dtype=torch.float32) for _ in range(2))  # without noise
    step(exact, 0)
    monkeypatch.setattr("ppo_fast.rlhf.training.adamw_8bit.CHUNK", 5 * BLOCK)
    step(chunked, 0)
    assert same(numbers_of(chunked), numbers_of(exact))


@pytest.mark.parametrize("highest", [MEANS, ROOTS])
def test_codes_stand_for_themselves(highest):
    codes = torch.arange(-127, 129).clamp_max(127) if highest == MEANS else torch.arange(256)
    values = decode(codes, torch.tensor([3.0]), highest)
    assert values.max() == pytest.approx(3.0, rel=1e-6)
    again, scale = encode(values, highest)
    assert torch.equal(again, codes.int())
    torch.testing.assert_close(decode(again, scale, highest), values)


def test_a_root_above_0_is_never_stored_as_0():
    values = torch.zeros(BLOCK).index_fill(0, torch.tensor([0]), 1.0).index_fill(0, torch.tensor([1]), 1e-20)
    codes, _ = encode(values, ROOTS)
    assert codes[:3].tolist() == [255, 1, 0]


def test_moments_take_a_byte_each():
    moments = new_moments(torch.empty(64, 256))
    assert sum(m.nbytes for m in moments.values()) == 2 * (64 * 256 + 4 * 64)


def test_stochastic_rounding_is_right_in_the_mean_and_gives_the_neighbors():
    values = torch.tensor([1.0, 1.001, -1.001, 3e-5, -2.0078125, 0.0]).repeat(100_000, 1)
    bits = noise(0, values.numel(), 7, values.device)
    got = rounded(values.view(-1), bits).view(values.shape)
    spacing = torch.tensor([2**-7, 2**-7, 2**-7, 2.0**-23, 2**-6, 0])
    assert ((got.float().mean(0) - values[0]).abs() <= 0.006 * spacing + 1e-45).all()
    assert ((got.float() - values).abs() < spacing + 1e-45).all()
    # What bfloat16 can hold stays what it is.
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(exact.float(), bits[:1000]), exact)


def test_the_noise_differs_from_step_to_step_and_repeats_with_the_run():
    networks = [make_network("8bit", lr=1e-6) for _ in range(2)]
    seen = []
    for seed in range(3):
        for network in networks:
            before = weights_of(network)[0]
            step(network, 0)
            seen.append(weights_of(network)[0] != before)
        torch.rand(seed)  # of a generator that is none of its business
    assert same(seen[::2], seen[1::2])
    assert not torch.equal(seen[0], seen[2])


@each_states
def test_a_failed_step_changes_nothing(states):
    network = make_network(states)
    step(network, 0)
    before = numbers_of(network)
    step(network, 1, failed=True, scale=float("nan"))
    assert same(numbers_of(network), before)
    assert all(parameter.grad is None for parameter in network.parameters)
    give_gradients(network, 1)
    network.step(1.0)  # the flag is that of its own step
    assert not same(numbers_of(network), before)


@pytest.mark.gpu
@each_states
def test_on_a_gpu_the_numbers_are_those_of_the_cpu_and_the_host_does_not_wait(states):
    here, there = (make_network(states, dtype=torch.float32) for _ in range(2))
    there = ClippedOptimizer([torch.nn.Parameter(w.cuda()) for w in weights_of(there)], there.lr, here.config)
    for seed in range(3):
        for network in (here, there):
            give_gradients(here, seed)
            for mine, other in zip(there.parameters, here.parameters, strict=True):
                mine.grad = other.grad.cuda()
            failed = torch.zeros((), dtype=torch.bool, device=network.parameters[0].device)
            torch.cuda.synchronize()
            with no_host_sync() if seed else nullcontext():  # the first step compiles
                network.clip()
                network.step(1.0, failed)
    # By a code that is rounded to its neighbor a step of 1e-3 is 3 % off.
    atol = 1e-4 if states == "8bit" else 1e-5
    for mine, other in zip(weights_of(there), weights_of(here), strict=True):
        torch.testing.assert_close(mine.cpu(), other, atol=atol, rtol=1e-4)


@each_states
def test_discarded_gradients_are_gone(states):
    network = make_network(states)
    give_gradients(network, 0)
    network.optimizer.zero_grad()
    before = weights_of(network)
    network.step(1.0)
    assert same(weights_of(network), before)


@each_states
def test_a_weight_without_a_gradient_stays(states):
    network = make_network(states, weight_decay=0.1)
    give_gradients(network, 0)
    network.parameters[0].grad = None
    before = weights_of(network)
    network.clip()
    network.step(1.0)
    kept = [torch.equal(a, b) for a, b in zip(before, weights_of(network), strict=True)]
    assert kept == [True, False, False]


@each_states
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_saved_and_loaded_go_on_to_the_same_bits(states, dtype, tmp_path):
    whole, again = (make_network(states, dtype=dtype) for _ in range(2))
    for seed in range(3):
        step(whole, seed)
    save_checkpoint(tmp_path / "step-3", lambda _: None, {"network": whole.state_dict()})
    again.load_state_dict(load_checkpoint(tmp_path).state["network"])
    for mine, theirs in zip(again.parameters, whole.parameters, strict=True):
        mine.data.copy_(theirs)
    assert same(numbers_of(again), numbers_of(whole))
    for seed in range(3, 6):
        step(whole, seed)
        step(again, seed)
    assert same(numbers_of(again), numbers_of(whole))


def test_the_norm_is_that_of_all_dtypes_together_in_float32():
    network = make_network("full", max_grad_norm=1.0)
    gradients = [torch.full_like(p, 0.123) for p in network.parameters]
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = network.clip()
    assert norm.dtype == torch.float32
    expected = torch.cat([g.double().view(-1) for g in gradients]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


@each_states
def test_a_clipped_step_is_the_step_of_clipped_gradients(states):
    ours, by_hand = (make_network(states, dtype=torch.float32, max_grad_norm=2.0**-6) for _ in range(2))
    for seed in range(3):
        give_gradients(ours, seed)
        norm = ours.clip()
        assert norm > 2.0**-6
        for mine, other in zip(ours.parameters, by_hand.parameters, strict=True):
            other.grad = mine.grad * 2.0**-6 / norm
        for network in (ours, by_hand):
            network.step(1.0)
    for mine, other in zip(weights_of(ours), weights_of(by_hand), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    step(ours, 3)  # the factor is that of its own step
    step(by_hand, 3)
    for mine, other in zip(weights_of(ours), weights_of(by_hand), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_many_small_weights_step_together_as_each_by_itself():
    """The noise of one of them depends on the others: float32 has none."""
    weights = [torch.nn.Parameter(torch.randn(size)) for size in (3, 17, 1)]
    together = AdamW8bit(weights, lr=0.1, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    apart = [AdamW8bit([copy], lr=0.1, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1) for copy in copies]
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.randn_like(weight)
            copy.grad = weight.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert same([*weights], [*copies])


@pytest.mark.parametrize("options", [{"master_weights": True}, {"name": "adamw_8bit"}])
def test_no_warning_where_small_steps_are_kept(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_precision(make_model().bfloat16(), AdamWConfig(**options))


def test_only_trained_weights_are_warned_of():
    model = make_model().bfloat16().requires_grad_(False)
    model.adapter = torch.nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_precision(model, AdamWConfig())
    message = (
        r"^a bfloat16 weight w keeps no step below \|w\| / 512, and AdamW's are about optim\.lr = 1e-06; "
        r"set optim\.master_weights to true, optim\.name to 'adamw_8bit' or model\.dtype to float32 unless "
        r"the run learns$"
    )
    with pytest.warns(UserWarning, match=message):
        warn_about_precision(make_model().bfloat16(), AdamWConfig())


def left_by(directory):
    """What must not depend on where a run was stopped: weights, and metrics without the clock's."""
    files = list((directory / "final").iterdir())
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "tokens_per_second", "memory/")
    metrics = [{n: x for n, x in record.items() if not n.startswith(clock)} for record in records]
    return metrics, {path.name: path.read_bytes() for path in files}


def bfloat16_model():
    return make_model(intermediate_size=256).bfloat16()


@pytest.mark.filterwarnings("ignore:a bfloat16 weight")
@each_states
def test_a_ppo_run_resumes_to_the_same_bits(states, make_config, tokenizer, tmp_path):
    def go(name, updates, *, resume=False):
        optim = {"lr": 1e-4, "warmup_frac": 0.0, **FLAT, **STATES[states]}
        saved = {"output_dir": str(tmp_path / name), "checkpoint": {"every": 1}}
        config = make_config(updates=updates, optim=optim, **saved)
        train_ppo(
            config,
            reward_fn=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
            prompts=["w1", "w2 w3", "w4"],
            policy=bfloat16_model(),
            tokenizer=tokenizer,
            resume=resume,
        )
        return left_by(tmp_path / name)

    whole = go("whole", 2)
    go("halves", 1)
    assert go("halves", 2, resume=True) == whole


@pytest.mark.filterwarnings("ignore:a bfloat16 weight")
@each_states
def test_an_sft_run_resumes_to_the_same_bits(states, run_stage, tmp_path):
    def go(name, epochs, *, resume=False):
        optim = {"epochs": epochs, "lr": 1e-4, "warmup_frac": 0.0, **FLAT, **STATES[states]}
        saved = {"output_dir": str(tmp_path / name), "checkpoint": {"every": 5}}
        run_stage("sft", policy=bfloat16_model(), optim=optim, resume=resume, **saved)
        return left_by(tmp_path / name)

    whole = go("whole", 2)
    go("halves", 1)
    assert go("halves", 2, resume=True) == whole


def test_masters_step_in_chunks_as_all_at_once(monkeypatch):
    def run(chunk):
        monkeypatch.setattr(adamw, "_CHUNK", chunk)
        generator = torch.Generator().manual_seed(0)
        kinds = (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)
        weights = [torch.nn.Parameter(torch.randn(5, generator=generator).to(kind)) for kind in kinds]
        optimizer = adamw.MasterAdamW(weights, lr=0.1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(5, generator=generator).to(weight.dtype)
            optimizer.step()
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
        return weights

    for mine, other in zip(run(7), run(2**28), strict=True):
        assert torch.equal(mine, other)
