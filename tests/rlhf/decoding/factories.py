"""Tiny models of every supported architecture, and requests for them."""

from typing import Any

import torch
import transformers

from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Sampling

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"sliding_window": 7, "head_dim": 16, "query_pre_attn_scalar": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 7},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 9},
}


def make(arch: str, attention: str = "sdpa", **overrides: Any) -> Any:
    """A model of that architecture in float32, with weights large enough that no two logits are near."""
    dropped = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"} if arch == "gpt2" else ()
    shape = {name: value for name, value in SHAPE.items() if name not in dropped}
    config = transformers.AutoConfig.for_model(arch, **shape | ARCHITECTURES[arch] | overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    return model


def requests() -> list[Request]:
    """Twelve responses to eight prompts of 1 to 14 tokens; four prompts are asked twice."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 9, 1, 14, 5, 7, 2, 11)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    limits = (12, 5, 20, 1, 12)
    return [Request(prompts[i if i < 8 else i - 8], 100 + i, limits[i % 5]) for i in range(12)]


def settings(**changes: Any) -> DecodingSettings:
    """Two EOS ids, a temperature, top-k and top-p; five responses at a time."""
    values = {"eos_ids": (5, 11), "pad_id": 0, "sampling": Sampling(0.9, top_k=40, top_p=0.95), "seed": 3, "width": 5}
    return DecodingSettings(**values | changes)
