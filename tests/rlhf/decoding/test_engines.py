"""The engines as the trainer calls them: layouts, stop strings, seeds, and which model gets which engine."""

import warnings

import peft
import pytest
import torch

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.config.ppo import DataConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.decoding.engines import check_engine, find_engine
from ppo_fast.rlhf.decoding.generate import run_generate
from ppo_fast.rlhf.decoding.requests import noise_seed
from ppo_fast.rlhf.decoding.slots import run_slots
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.ppo.rollout import generate
from ppo_fast.rlhf.ppo.scoring import score
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import LAYOUTS, models_in, shift
from tests.rlhf.ppo.test_rollout import byte_tokenizer

PROMPTS = ["w1 w2 w3", "w4"]


def responses_of(models, **rollout):
    data = load_prompts(PROMPTS, models.tokenizer, DataConfig())
    batch = make_batch(data, [0, 0, 0, 1, 1, 1], models.pad_id, models.device)
    return generate(models, batch, RolloutConfig(max_new_tokens=12, **rollout), 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_samples_the_same_by_both_engines_and_scores_the_same(layout):
    """Three samples to each prompt; an adapter that is trained, not merged."""
    models = models_in(layout)
    shift(models.trained("policy"))
    slots, theirs = (responses_of(models, engine=engine, micro_batch_size=4) for engine in ("slots", "generate"))
    assert torch.equal(slots.input_ids, theirs.input_ids)
    assert torch.equal(slots.ended, theirs.ended)
    assert (slots.logprobs - theirs.logprobs).abs().max() <= 1e-5
    rollout = score(models, slots, RolloutConfig())
    assert (rollout.logprobs - rollout.sampled_logprobs).abs().max() <= 1e-5
    if models.shared or models.adapters is not None or layout == "separate":
        assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_a_stop_string_across_tokens_ends_a_response_of_either_engine(make_config, engine):
    """Of 1,000 sampled bytes some spell it; the response ends there and nowhere else."""
    tokenizer = byte_tokenizer()
    policy = tiny.make_model(len(tokenizer), hidden=16, heads=2, layers=1)
    with torch.no_grad():  # nearly every byte is one of three
        favored = torch.tensor(tokenizer("ab#")["input_ids"])
        policy.get_output_embeddings().bias = torch.nn.Parameter(
            torch.zeros(len(tokenizer)).index_fill(0, favored, 9.0)
        )
    models = load_models(make_config().model, torch.Generator(), policy=policy, tokenizer=tokenizer)
    data = load_prompts(["x#", "b"], tokenizer, DataConfig())
    batch = make_batch(data, [0, 1] * 4, models.pad_id, models.device)
    settings = RolloutConfig(max_new_tokens=10, stop=("#a", "#b#"), engine=engine, micro_batch_size=3)
    found = generate(models, batch, settings, 1)
    rows = zip(found.responses, found.mask, found.ended.tolist(), strict=True)
    texts = [(tokenizer.decode(row[mask]), ended) for row, mask, ended in rows]
    assert {ended for _, ended in texts} == {True, False}
    for text, ended in texts:
        inside = text[:-1]
        assert ended == text.endswith(("#a", "#b#"))
        assert "#a" not in inside
        assert "#b#" not in inside
        assert ended or len(text) == 10


def test_the_place_of_a_response_in_the_run_decides_its_noise():
    models = models_in("separate")
    data = load_prompts(["w1"], models.tokenizer, DataConfig())
    batch = make_batch(data, [0] * 4, models.pad_id, models.device)
    settings = RolloutConfig(max_new_tokens=6)
    first, second = (generate(models, batch, settings, 5, row).responses for row in (0, 2))
    width = min(first.shape[1], second.shape[1])
    assert torch.equal(first[2:, :width], second[:2, :width])
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_phases_and_seeds_have_noise_of_their_own():
    seeds = {noise_seed(seed, phase) for seed in (0, 1, 2**40) for phase in ("rollout", "evaluation")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_default_engine_is_slots_where_they_run_the_model():
    model = tiny.make_model(16, hidden=16, heads=2, layers=1)
    assert find_engine(None, model) is find_engine("slots", model) is run_slots
    assert find_engine("generate", model) is run_generate
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_engine(None, model)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert find_engine(None, model) is run_generate
    reason = "rollout.engine: expected rotary embeddings that do not depend on the batch, got 'dynamic'; "
    with pytest.warns(UserWarning, match=f"^{reason}transformers' own 'generate' samples in its place$"):
        check_engine(None, model)
    with raises_exactly(f"{reason}'generate' runs any model", UserError):
        check_engine("slots", model)
    check_engine("generate", model)


def test_a_wrapper_of_peft_is_sampled_from_with_its_adapter():
    models = models_in("separate")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    base = models.policy
    plain = responses_of(models)
    adapted = peft.get_peft_model(base, config)
    object.__setattr__(models, "policy", adapted)
    slots, theirs = (responses_of(models, engine=engine) for engine in ("slots", "generate"))
    assert torch.equal(slots.input_ids, theirs.input_ids)
    assert slots.logprobs.shape != plain.logprobs.shape or not torch.equal(slots.logprobs, plain.logprobs)
