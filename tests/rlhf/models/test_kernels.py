"""model.kernels: what is resolved, checked, kept to one network, saved and kept by a resume; by a fake liger-kernel."""

import copy
import sys
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.errors import install_command
from ppo_fast.rlhf.models import kernels, tiny
from ppo_fast.rlhf.models.kernels import kernels_of, use_kernels
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import save_base
from tests.rlhf.supervised_factories import STAGES, rows

IDS = torch.arange(8)[None]


def make_model(arch="llama"):
    return tiny.make_model(64, arch=arch, hidden=32, layers=2, heads=2)


def normed(self, x):
    return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon) * self.factor


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    rotary.calls += 1
    return OWN_ROTARY(q, k, cos, sin, unsqueeze_dim)


OWN_ROTARY = modeling_llama.apply_rotary_pos_emb
normed.__module__ = "liger_kernel.transformers.rms_norm"


def applier(model, cross_entropy, fused_linear_cross_entropy, factor=1.0):
    """Change a network and its module as `apply_liger_kernel_to_llama` does."""
    assert not cross_entropy
    assert not fused_linear_cross_entropy
    modeling_llama.apply_rotary_pos_emb = rotary
    modeling_llama.LlamaRMSNorm = nn.RMSNorm
    for norm in (model.norm, *(layer.input_layernorm for layer in model.layers)):
        norm.factor = factor
        vars(norm)["forward"] = MethodType(normed, norm)


@pytest.fixture
def liger(monkeypatch):
    """A fake liger-kernel that any device can have; the return value sets its error."""
    rotary.calls = 0
    options = {"factor": 1.0}
    monkeypatch.setattr(kernels, "_appliers", lambda: {"llama": lambda **given: applier(**given, **options)})
    monkeypatch.setattr(kernels, "_unavailable", lambda model, device: None)
    return options


def test_one_network_is_changed_and_no_other(liger):
    module, model = dict(vars(modeling_llama)), make_model()
    other, expected = copy.deepcopy(model), model(IDS).logits
    use_kernels(model, "liger")
    assert all(vars(modeling_llama)[name] is value for name, value in module.items())
    assert vars(modeling_llama).keys() == module.keys()
    calls = rotary.calls
    torch.testing.assert_close(model(IDS).logits, expected)
    assert rotary.calls == calls + 2
    assert torch.equal(other(IDS).logits, expected)
    assert torch.equal(make_model()(IDS).logits, expected)
    assert rotary.calls == calls + 2
    clone = copy.deepcopy(model)  # as the reference is made
    assert [kernels_of(each) for each in (model, other, clone)] == ["liger", "none", "liger"]
    with torch.no_grad():
        clone.model.norm.weight.mul_(2)
    torch.testing.assert_close(clone(IDS).logits, 2 * expected)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_a_network_that_it_changes_keeps_its_own(liger):
    liger["factor"] = 1.01
    model = make_model()
    model.model.norm.forward = model.model.norm.forward  # bound by somebody else
    own, expected = model.model.norm.forward, model(IDS).logits
    wrong = r"for LlamaForCausalLM, whose hidden states or gradients liger-kernel changes by 0\.0\d+"
    with pytest.warns(UserWarning, match=rf"^model\.kernels: 'none' {wrong}$"):
        use_kernels(model, "auto")
    assert kernels_of(model) == "none"
    assert torch.equal(model(IDS).logits, expected)
    assert model.model.norm.forward == own
    with pytest.raises(UserError, match=rf"^model\.kernels: expected 'auto' or 'none' {wrong}, got 'liger'$"):
        use_kernels(model, "liger")


def test_where_it_cannot_be_had(monkeypatch):
    model = make_model()
    for wanted in ("auto", "none"):
        use_kernels(model, wanted)
        assert kernels_of(model) == "none"
    expected = "model.kernels: expected 'auto' or 'none' {}, got 'liger'"
    with raises_exactly(expected.format("on the device 'cpu'"), UserError):
        use_kernels(model, "liger")
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), base_model=model.base_model)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    start = f"where liger-kernel cannot be imported ({install_command('gpu')}): "
    assert kernels._unavailable(on_a_gpu, on_a_gpu.device).startswith(start)
    monkeypatch.setattr(kernels, "_appliers", lambda: {"mistral": applier})
    assert kernels._unavailable(on_a_gpu, on_a_gpu.device) == "for SimpleNamespace, which liger-kernel does not know"
    monkeypatch.setattr(kernels, "_appliers", lambda: {"llama": applier})
    assert kernels._unavailable(on_a_gpu, on_a_gpu.device) is None


def run(directory, path, resume=False, epochs=1):
    train, kind, _ = STAGES["sft"]
    config = kind(
        output_dir=str(directory),
        model=kind().model.__class__(path=path),
        optim=kind().optim.__class__(epochs=epochs, batch_size=20),
        checkpoint=kind().checkpoint.__class__(every=1),
        log=kind().log.__class__(console=False, tensorboard=False),
    )
    return train(config, train=rows(40), resume=resume)


def test_a_resumed_run_keeps_the_kernels_it_was_begun_with(tmp_path, liger, monkeypatch):
    base = save_base(tmp_path / "base")
    with_liger, without = tmp_path / "liger", tmp_path / "none"
    assert kernels_of(run(with_liger, base).trained) == "liger"
    monkeypatch.setattr(kernels, "_unavailable", lambda model, device: "on a Sunday")
    assert kernels_of(run(without, base).trained) == "none"
    message = "resume: expected the kernels of the model that the run was begun with, got others"
    with raises_exactly(message, UserError):
        run(with_liger, base, resume=True, epochs=2)
    monkeypatch.setattr(kernels, "_unavailable", lambda model, device: None)
    assert kernels_of(run(without, base, resume=True, epochs=2).trained) == "none"
    assert kernels_of(run(with_liger, base, resume=True, epochs=2).trained) == "liger"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_kernel_gives_the_models_own_numbers(dtype):
    """Through the whole network: losses and gradients of all weights, with a recomputed forward pass too."""
    pytest.importorskip("liger_kernel")
    own = tiny.make_model(64, arch="qwen2", hidden=64, layers=2, heads=2).to("cuda", dtype)
    model = copy.deepcopy(own)
    use_kernels(model, "liger")
    assert [kernels_of(own), kernels_of(model)] == ["none", "liger"]
    ids = torch.arange(40, device="cuda").view(2, 20)
    truth = copy.deepcopy(own).double()
    found = {}
    for name, each in {"truth": truth, "own": own, "liger": model}.items():
        each(ids, labels=ids).loss.backward()
        found[name] = torch.cat([weight.grad.double().flatten() for weight in each.parameters()])
    error = {name: (found[name] - found["truth"]).norm() for name in ("own", "liger")}
    assert error["liger"] <= 2 * error["own"] + 1e-6 * found["truth"].norm()
