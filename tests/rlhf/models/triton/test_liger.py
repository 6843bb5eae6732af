"""liger-kernel's own kernels in the interpreter: hidden states and gradients of each known architecture are its own."""

import pytest
import torch
import triton.language as tl
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

from ppo_fast.rlhf.models import kernels

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Number(float):
    """A float as a kernel on a GPU has it."""

    def to(self, dtype):
        return self


@pytest.fixture(autouse=True)
def _interpretable(monkeypatch):
    """Mend what the interpreter lacks: methods of numbers, and functions of CUDA's library."""
    norms = pytest.importorskip("liger_kernel.ops.rms_norm")
    gated = pytest.importorskip("liger_kernel.ops.geglu")
    convert = interpreter._implicit_cvt
    monkeypatch.setattr(interpreter, "_implicit_cvt", lambda x: Number(x) if type(x) is float else convert(x))
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(gated, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


OTHERS = sorted(kernels.KNOWN - {"qwen2"})


@pytest.mark.parametrize("kind", ["qwen2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_hidden_states_and_gradients_are_the_models_own(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    run, device = (lambda function: function(model)), model.device
    own = kernels._states_and_gradients(model, run, device)
    assert kernels._apply_checked(model, run, device) is None
    assert kernels.kernels_of(model) == "liger"
    for a, b in zip(kernels._states_and_gradients(model, run, device), own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
