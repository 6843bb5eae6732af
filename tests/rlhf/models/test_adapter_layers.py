"""Layers with an adapter: peft's values and gradients, few operators, little kept, copies that follow every step."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.model import LoraConfig
from ppo_fast.rlhf.config.optim import AdamWConfig
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.adapter_files import ADAPTER_FILE
from ppo_fast.rlhf.models.adapter_layers import AdapterLayer
from ppo_fast.rlhf.models.adapters import Adapters, adapt
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from tests.rlhf.layout_factories import run_stage, save_base, shift


class Counter(TorchDispatchMode):
    """Names of the operators that move or compute numbers, in the order they ran."""

    FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias"} | {
        *("unsqueeze", "squeeze", "empty", "new_empty", "empty_like", "as_strided")
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class One(nn.Module):
    """A network of one linear layer."""

    def __init__(self, kind, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind == "bias")
        self.to(dtype).requires_grad_(False)
        self.dtype = dtype

    def forward(self, x):
        return self.layer(x)


def pair(kind="bias", dtype=torch.float32, **options):
    """The same layer with the same adapter: by ours, by peft's forward pass."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], fan_in_fan_out=kind == "conv1d", **options)
    adapters = Adapters(One(kind, dtype), config)
    shift(adapters.parameters("default"))
    theirs = copy.deepcopy(adapters.network.layer)
    theirs.__class__ = type(theirs).__mro__[2]
    assert type(theirs) is peft.tuners.lora.Linear
    assert isinstance(adapters.network.layer, AdapterLayer)
    return adapters, adapters.network.layer, theirs


def passed(layer, x, grad, call=lambda layer, x: layer(x)):
    """Output and gradients of x, A, B."""
    x = x.detach().requires_grad_()
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = call(layer, x)
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], grad)]


def rerun(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


@pytest.mark.parametrize("kind", ["bias", "plain", "conv1d"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}], ids=["", "rslora", "dropout"])
@pytest.mark.parametrize("call", [lambda layer, x: layer(x), rerun], ids=["plain", "recomputed"])
def test_values_and_gradients_are_pefts(kind, options, call):
    _, ours, theirs = pair(kind, **options)
    x, grad = torch.randn(2, 4, 5), torch.randn(2, 4, 7)
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(1)  # of the dropout
        found.append(passed(layer.train(), x, grad, call))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_near_to_float64_as_pefts():
    torch.manual_seed(0)
    x, grad = torch.randn(64, 5).bfloat16(), torch.randn(64, 7).bfloat16()
    _, ours, theirs = pair(dtype=torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    truth = passed(exact, x.double(), grad.double())
    errors = [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(passed(layer, x, grad), truth, strict=True)]
        for layer in (ours, theirs)
    ]
    for mine, peft_error in zip(errors[0][:2], errors[1][:2], strict=True):
        assert mine <= 1.25 * peft_error
    assert max(errors[0][2:]) <= 2**-8  # peft's are those of float32
    assert all(g.dtype == torch.float32 for g in passed(ours, x, grad)[2:])


def test_nothing_is_kept_but_x_and_its_low_rank_image():
    _, ours, _ = pair(dtype=torch.bfloat16)
    x, kept = torch.randn(2, 4, 5).bfloat16().requires_grad_(), []
    own = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    own |= {c.get(torch.bfloat16).untyped_storage().data_ptr() for c in ours.copies["default"]}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(x)
    assert kept == [(8, 5), (8, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_products_forward_and_five_backward(dtype):
    _, ours, _ = pair(dtype=dtype)
    x = torch.randn(2, 4, 5, dtype=dtype).requires_grad_()
    ours(x)  # makes the copies
    with Counter() as forward:
        y = ours(x)
    with Counter() as backward:
        y.backward(torch.ones_like(y))
    assert forward.names == ["addmm", "addmm", "addmm_"]
    rest = [name for name in backward.names if name not in ("mm", "addmm", "addmm_", "ones_like")]
    assert len(backward.names) - len(rest) - 1 == 5
    assert rest == [] if dtype == torch.float32 else ["_to_copy"] * 2  # on a GPU the product itself is float32


OPTIMIZERS = {"another's": {}, "fused": {}, "masters": {"master_weights": True}, "8bit": {"name": "adamw_8bit"}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_products_follow_every_step_in_place(optimizer):
    """A captured CUDA graph reads the storage of the copies; torch's fused step leaves version counters as they are."""
    adapters, ours, _ = pair(dtype=torch.bfloat16)
    x = torch.randn(4, 5).bfloat16()
    before, places = ours(x), [each.value.data_ptr() for each in adapters.copies["default"]]
    parameters = adapters.parameters("default")
    before.float().square().sum().backward()
    if optimizer == "another's":
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
    else:
        ClippedOptimizer(parameters, 0.1, AdamWConfig(**OPTIMIZERS[optimizer])).step(1.0)
    with adapters.active("default"):  # before a replay
        for each in adapters.copies["default"]:
            assert torch.equal(each.value, each.parameter.bfloat16())
    assert not torch.equal(ours(x), before)
    assert [each.value.data_ptr() for each in adapters.copies["default"]] == places
    with torch.no_grad():
        ours.lora_B["default"].weight.zero_()
    assert torch.equal(ours(x), ours.base_layer(x))


def test_switching_roles_launches_nothing():
    network = tiny.make_model(64, hidden=32, layers=2, heads=2).bfloat16()
    adapters = adapt(network, LoraConfig(rank=4), None, torch.Generator().manual_seed(0))
    adapters.copy("default", "reference")
    ids = torch.arange(8)[None]
    for name in ("reference", "default"):
        with adapters.active(name):
            network(ids)
    with Counter() as counter, adapters.active("reference"), adapters.active(None), adapters.active("default"):
        pass
    assert counter.names == []
    shift(adapters.parameters("default"))
    with Counter() as counter, adapters.active("reference"), adapters.active("default"):
        pass
    assert counter.names == ["_foreach_copy_"]


def added(layer):
    layer.update_layer("second", 2, lora_alpha=2, config=peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False))
    layer.set_adapter(["default", "second"])
    return {}


def merged(layer):
    layer.merge()
    return {}


def mixed(layer):
    return {"adapter_names": ["default", "__base__", "default"]}


def hooked(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    return {}


def trained_base(layer):
    layer.base_layer.weight.requires_grad_(True)
    return {}


@pytest.mark.parametrize("change", [added, merged, mixed, hooked, trained_base])
def test_whatever_else_a_layer_can_do_is_pefts(change):
    _, ours, theirs = pair()
    x, found = torch.randn(3, 5), []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        options = change(layer)
        y = layer(x, **options)
        base = layer.base_layer.weight
        found.append([y, *(torch.autograd.grad(y.sum(), base) if base.requires_grad else ())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_variant_of_peft_and_autocast_go_through_pefts_forward():
    for options in ({"use_dora": True}, {"lora_bias": True}):
        _, ours, theirs = pair(**options)
        x = torch.randn(3, 5)
        assert torch.equal(ours(x), theirs(x))
    _, ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))


def test_a_parameter_put_in_the_place_of_another_is_read_at_the_call():
    """As sharding does, which gathers into an object of its own without a change of its version."""
    _, ours, _ = pair(dtype=torch.bfloat16)
    x = torch.randn(3, 5).bfloat16()
    ours(x)
    ours.lora_B["default"].weight = nn.Parameter(torch.zeros(7, 3))
    assert torch.equal(ours(x), ours.base_layer(x))


def test_a_copy_and_a_moved_layer_read_their_own_parameters():
    _, ours, _ = pair(dtype=torch.bfloat16)
    x = torch.randn(3, 5).bfloat16()
    ours(x)
    with torch.no_grad():
        ours.lora_B["default"].weight.zero_()  # not read before the copy is made, whose versions start again
    assert torch.equal(copy.deepcopy(ours)(x), ours.base_layer(x))
    moved = ours.to("meta")
    assert moved(x.to("meta")).device.type == "meta"


def test_it_learns_as_pefts_forward_does():
    def losses(kind):
        torch.manual_seed(0)
        network = tiny.make_model(64, hidden=32, layers=1, heads=2).bfloat16()
        adapters = adapt(network, LoraConfig(rank=4), None, torch.Generator().manual_seed(0))
        for layer in network.modules():
            if kind == "peft" and isinstance(layer, AdapterLayer):
                layer.__class__ = type(layer).__mro__[2]
        optimizer = ClippedOptimizer(adapters.parameters("default"), 3e-2, AdamWConfig())
        ids, found = torch.randint(0, 64, (4, 16)), []
        for _ in range(20):
            loss = network(ids, labels=torch.full_like(ids, 5)).loss
            loss.backward()
            optimizer.step(1.0)
            found.append(loss.item())
        return found

    ours, theirs = losses("ours"), losses("peft")
    assert theirs[-1] < 0.9 * theirs[0]
    assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < 0.03


def test_without_masters_the_adapters_are_of_16_bits():
    network = tiny.make_model(64, hidden=32, layers=1, heads=2).bfloat16()
    adapters = adapt(network, LoraConfig(rank=4), None, torch.Generator().manual_seed(0))
    ids = torch.arange(8)[None]
    network(ids)
    adapters.drop_masters()
    assert {parameter.dtype for parameter in adapters.parameters("default")} == {torch.bfloat16}
    network(ids).logits.float().logsumexp(-1).sum().backward()
    assert {parameter.grad.dtype for parameter in adapters.parameters("default")} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:a bfloat16 weight")
def test_runs_without_masters_train_and_save_16_bits(tmp_path, make_config, tokenizer):
    """The value model's adapter too; the reference, which follows the policy, stays float32."""
    lora = {"dtype": "bfloat16", "layout": "adapters", "lora": {"rank": 2}}
    config = make_config(model=lora, optim={"master_weights": False}, reference={"update": "ema", "every": 1})
    policy = tiny.make_model(64, hidden=32, layers=1, heads=2).bfloat16()
    rewards = {"reward_fn": lambda completions, **_: [1.0] * len(completions), "prompts": ["w1", "w2"]}
    models = train_ppo(config, policy=policy, tokenizer=tokenizer, **rewards).models
    kinds = [
        {weight.dtype for weight in models.adapters.parameters(name)} for name in ("default", "value", "reference")
    ]
    assert kinds == [{torch.bfloat16}, {torch.bfloat16}, {torch.float32}]
    base = save_base(tmp_path / "base")
    trained = run_stage("sft", tmp_path / "sft", base, dtype="bfloat16", optim={"master_weights": False})
    saved = load_file(trained.model / ADAPTER_FILE)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
