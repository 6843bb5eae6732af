"""The engine `vllm` by the package itself, `make peers`: loads that take, ends of responses, a run that learns."""

import dataclasses
import inspect

import pytest
import torch

from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.config.files import load_config
from ppo_fast.rlhf.config.ppo import DataConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.decoding.vllm_engine import running
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.ppo.rollout import generate
from ppo_fast.rlhf.ppo.scoring import score
from tests.rlhf.decoding import fake_vllm
from tests.rlhf.layout_factories import shift
from tests.rlhf.ppo.test_rollout import byte_tokenizer

pytestmark = pytest.mark.peers
vllm = pytest.importorskip("vllm")
CONFIG = RolloutConfig(engine="vllm", batch_size=16, max_new_tokens=20, temperature=0.8, stop=("#a", "#b#"))


@pytest.mark.parametrize("name", ["collective_rpc", "generate", "reset_prefix_cache", "sleep", "wake_up"])
def test_the_fake_of_the_unit_tests_has_the_packages_signatures(name):
    """Arguments that the engine does not pass may be missing in the fake."""
    theirs = inspect.signature(getattr(vllm.LLM, name)).parameters
    for argument in inspect.signature(getattr(fake_vllm.LLM, name)).parameters.values():
        assert theirs[argument.name].kind == argument.kind
        assert theirs[argument.name].default == argument.default


def sampled(models, seed=0, **changes):
    """Responses, and the mean difference of sampled log-probabilities from those of scoring."""
    data = load_prompts(["x#", "b"], models.tokenizer, DataConfig())
    batch = make_batch(data, [0, 1] * 8, models.pad_id, models.device)
    config = dataclasses.replace(CONFIG, **changes)
    found = generate(models, batch, config, seed)
    rollout = score(models, found, config)
    return found, (rollout.logprobs - rollout.sampled_logprobs).abs().mean().item()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_adapters_are_sampled_from_as_they_are_at_each_call(make_config, dtype, tolerance):
    """The weights that the engine starts with, those of the first call, and those of the third differ by far more."""
    tokenizer = byte_tokenizer()
    policy = tiny.make_model(len(tokenizer), hidden=64, heads=2, layers=2).to(getattr(torch, dtype))
    favored = torch.tensor([*tokenizer("ab#")["input_ids"], tokenizer.eos_token_id])
    with torch.no_grad():  # few tokens are likely
        policy.model.norm.weight.fill_(4)
        policy.get_output_embeddings().weight[favored] *= 4
    config = make_config(model={"layout": "adapters", "lora": {"rank": 4}}).model
    models = load_models(config, torch.Generator().manual_seed(0), policy=policy, tokenizer=tokenizer)
    weights = models.trained("policy")
    shift(weights)
    with running(models, CONFIG, 64):
        first, difference = sampled(models)
        assert difference <= tolerance
        assert torch.equal(sampled(models)[0].responses, first.responses)
        assert not torch.equal(sampled(models, seed=1)[0].responses, first.responses)
        for row, mask, ended in zip(first.responses, first.mask, first.ended.tolist(), strict=True):
            ids, text = row[mask].tolist(), tokenizer.decode(row[mask])
            assert ended == (ids[-1] == models.eos_id or text.endswith(("#a", "#b#")))
            assert models.eos_id not in ids[:-1]
            assert "#a" not in text[:-1]
            assert ended or len(ids) == 20
        assert {True, False} == {*first.ended.tolist()}
        shift(weights, seed=2)
        moved, difference = sampled(models)
        assert difference <= tolerance
        assert moved.logprobs.shape != first.logprobs.shape or not torch.equal(moved.logprobs, first.logprobs)
        greedy = sampled(models, top_k=1)[0]
        assert not greedy.logprobs.any()  # of the one token that is left
        assert len({tuple(row) for row in greedy.responses[::2].tolist()}) == 1


def test_a_run_learns_and_keeps_the_resolved_correction(make_config, tokenizer):
    config = make_config(
        updates=12,
        rollout={"engine": "vllm", "batch_size": 32, "max_new_tokens": 8},
        optim={"lr": 1e-2, "value_lr": 1e-2, "minibatch_size": 16, "epochs": 4},
        kl={"coef": 0.0},
        reward={"missing_eos_penalty": 0.0},
    )

    def even(completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    policy = tiny.make_model(64, hidden=64, layers=1, heads=2)  # vLLM's attention on a CPU takes widths from 32 on
    result = train_ppo(config, reward_fn=even, prompts=["w1", "w2"], policy=policy, tokenizer=tokenizer)
    scores = [row["objective/scores"] for row in result.history]
    assert scores[-1] > max(0.75, scores[0] + 0.2)
    assert all(0 <= row["mismatch/kl"] <= 1e-6 for row in result.history)
    assert load_config(result.directory / "config.yaml").rollout.correction == "truncate"
