"""Rollout: exact sampling, the mask, and two log-probabilities that agree."""

import dataclasses
import gc

import peft
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ppo_fast import ops
from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.config.ppo import DataConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.decoding.requests import Sampling, keys_of
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.forward import response_logits
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.ppo.rollout import generate, warn_about_filters
from ppo_fast.rlhf.ppo.scoring import score
from tests.helpers import raises_exactly
from tests.rlhf.factories import forward_of

PAD, EOS = 0, 2


@pytest.fixture
def scripted(monkeypatch):
    """scripted(rows): these tokens [B, T] are sampled."""

    def script(rows):
        tokens = torch.tensor(rows)

        def draw(self, logits, keys):
            found = tokens[keys[:, 1], keys[:, 2].clamp(max=tokens.shape[1] - 1)]
            return found, ops.token_logprobs(logits, found, temperature=self.temperature)

        monkeypatch.setattr(Sampling, "draw", draw)

    return script


def batch_of(tokenizer, *prompts):
    data = load_prompts(list(prompts), tokenizer, DataConfig())
    return make_batch(data, list(range(len(prompts))), PAD, torch.device("cpu"))


def test_rule_02_the_mask_ends_with_the_first_eos(make_models, make_config, scripted):
    config = make_config()
    models = make_models(config)
    # A sampled pad token before EOS is a token like any other; a second EOS is not seen.
    scripted([[9, EOS, 7, EOS, 9], [PAD, 8, PAD, EOS, 9], [9, 8, 7, 6, 5]])
    prompts = batch_of(models.tokenizer, "w1", "w2 w3", "w4")
    settings = RolloutConfig(batch_size=3, max_new_tokens=5)
    generation = generate(models, prompts, settings, 0)
    assert generation.responses.tolist() == [[9, EOS, PAD, PAD, PAD], [PAD, 8, PAD, EOS, PAD], [9, 8, 7, 6, 5]]
    assert generation.mask.long().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert generation.ended.tolist() == [True, True, False]
    assert torch.equal(generation.attention_mask, torch.cat([prompts.attention_mask, generation.mask], dim=1))


def byte_tokenizer():
    """A token for every byte, after <pad> = 0, <bos> = 1 and <eos> = 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_a_stop_string_ends_a_response_as_eos_does(make_config, scripted):
    tokenizer = byte_tokenizer()
    policy = tiny.make_model(len(tokenizer), hidden=16, heads=2)
    models = load_models(make_config().model, torch.Generator(), policy=policy, tokenizer=tokenizer)
    # The prompt of the second has the stop string, and its response half of it.
    texts = ["ab##cd", "cd#abc", "ab", "# #x##"]
    script = [tokenizer(text)["input_ids"] for text in texts]
    script[2] += [EOS, 7, 7, 7]
    scripted(script)
    prompts = batch_of(tokenizer, "x", "##", "y", "#")
    settings = RolloutConfig(batch_size=4, max_new_tokens=6, stop=("##", "never"))
    generation = generate(models, prompts, settings, 0)
    ids = [row[mask].tolist() for row, mask in zip(generation.responses, generation.mask, strict=True)]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["ab##", "cd#abc", "ab", "# #x##"]
    assert generation.mask.sum(dim=1).tolist() == [4, 6, 3, 6]
    assert generation.ended.tolist() == [True, False, True, True]
    assert torch.equal(generation.logprobs != 0, generation.mask)


def test_a_tokenizer_that_cannot_find_stop_strings_is_named(make_models, make_config):
    models = make_models(make_config())
    settings = RolloutConfig(max_new_tokens=2, stop=("w5",))
    kind = type(models.tokenizer).__name__
    with raises_exactly(f"rollout.stop: expected a tokenizer that can spell any text, got {kind}", UserError):
        generate(models, batch_of(models.tokenizer, "w1"), settings, 0)


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_keys_and_values_are_gone_when_the_responses_are_there(make_models, make_config, engine):
    models = make_models(make_config())
    prompts, settings = batch_of(models.tokenizer, "w1 w2", "w3"), RolloutConfig(max_new_tokens=9, engine=engine)
    generate(models, prompts, settings, 0)  # makes what is kept for good
    gc.collect()
    gc.disable()  # nobody waits for the collector
    try:
        before = {id(x) for x in gc.get_objects()}
        kept = generate(models, prompts, settings, 0)
        found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
    finally:
        gc.enable()
    assert max(x.ndim for x in found) == 2  # keys and values are [B, H, L, E]
    assert any(x is kept.input_ids for x in found)


def test_generation_leaves_no_config_in_a_model_with_adapters(make_models, make_config):
    models = make_models(make_config())
    base = models.policy
    own = base.generation_config
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    generate(
        dataclasses.replace(models, policy=adapted),
        batch_of(models.tokenizer, "w1 w2", "w3"),
        RolloutConfig(max_new_tokens=2, engine="generate"),
        0,
    )
    assert base.generation_config is own
    assert adapted.generation_config is own
    assert models.policy.generation_config.cache_implementation is None


def test_rule_02_pad_may_be_the_same_token_as_eos(make_models, make_config, scripted):
    shared = tiny.make_tokenizer([f"w{i}" for i in range(60)])
    shared.pad_token = shared.eos_token
    config = make_config()
    models = make_models(config, tokenizer=shared)
    assert models.pad_id == models.eos_id == EOS
    scripted([[9, EOS, 7], [9, 8, 7]])
    generation = generate(models, batch_of(shared, "w1", "w2"), RolloutConfig(max_new_tokens=3), 0)
    assert generation.mask.long().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert generation.ended.tolist() == [True, False]


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_rule_02_micro_batches_of_different_length_with_pad_equal_to_eos(make_models, make_config, scripted, engine):
    shared = tiny.make_tokenizer([f"w{i}" for i in range(60)])
    shared.pad_token = shared.eos_token
    models = make_models(make_config(), tokenizer=shared)
    scripted([[9, EOS, 0], [9, 8, 7]])
    settings = RolloutConfig(max_new_tokens=3, micro_batch_size=1, engine=engine)
    generation = generate(models, batch_of(shared, "w1", "w2"), settings, 0)
    assert generation.mask.long().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert generation.ended.tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_rule_03_samples_come_from_the_tempered_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    truth = torch.softmax(logits / temperature, dim=-1)
    count = 40_000
    keys = keys_of(0, torch.arange(count))
    tokens, logprobs = Sampling(temperature).draw(logits.expand(count, 5), keys)
    frequency = tokens.bincount(minlength=5) / count
    assert (frequency - truth).abs().max() < 4 * 0.5 / count**0.5
    assert frequency[-1] == 0
    torch.testing.assert_close(logprobs, truth.log()[tokens])


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rule_05_generation_and_training_forward_agree(make_models, make_config, make_rollout, arch, temperature):
    config = make_config(rollout={"temperature": temperature, "max_new_tokens": 12})
    rollout = make_rollout(make_models(config, arch=arch), config)
    assert rollout.generation.mask.sum() > 30
    assert not rollout.generation.prompts.attention_mask.all()
    assert (rollout.logprobs - rollout.generation.logprobs[rollout.generation.mask]).abs().max() <= 2e-5
    assert rollout.logprobs.max() < 0
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs)  # the reference is still a copy


def test_rule_05_scoring_is_the_same_in_micro_batches(make_models, make_config, make_rollout):
    config = make_config()
    models = make_models(config)
    whole = make_rollout(models, config)
    for settings in (RolloutConfig(micro_batch_size=3), RolloutConfig(tokens_per_pass=16)):
        parts = score(models, whole.generation, settings)
        for name in ("logprobs", "ref_logprobs", "entropy", "values"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_sampling_ignores_what_a_model_directory_says_about_generation(make_models, make_config, make_rollout):
    config = make_config(rollout={"max_new_tokens": 8})
    to_python, biased = make_models(config), make_models(config)
    own = biased.policy.generation_config
    own.repetition_penalty, own.min_new_tokens, own.suppress_tokens = 5.0, 8, list(range(10, 60))
    own.temperature, own.top_k, own.do_sample, own.num_beams, own.forced_eos_token_id = 0.1, 3, True, 2, 7
    assert torch.equal(
        make_rollout(biased, config).generation.input_ids, make_rollout(to_python, config).generation.input_ids
    )
    assert biased.policy.generation_config is own


def test_the_seed_decides_the_samples(make_models, make_config, make_rollout):
    config = make_config()
    models = make_models(config)
    first, again, other = (make_rollout(models, config, seed=seed).generation for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert first.responses.shape != other.responses.shape or not torch.equal(first.responses, other.responses)


def test_filters_keep_the_likeliest_tokens_and_warn():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(2000, 4)
    for settings, kept in (({"top_k": 2}, {1, 2}), ({"top_p": 0.69}, {1, 2}), ({"top_p": 0.71}, {1, 2, 3})):
        config = RolloutConfig(**settings)
        drawn, _ = Sampling(top_k=config.top_k, top_p=config.top_p).draw(logits, keys_of(0, torch.arange(2000)))
        assert set(drawn.tolist()) == kept
        with pytest.warns(UserWarning, match=r"rollout\.top_k and rollout\.top_p bias the ratio"):
            warn_about_filters(config)
    warn_about_filters(RolloutConfig())


def test_rule_12_entropy_is_that_of_the_full_tempered_distribution(make_models, make_config, make_rollout):
    config = make_config(rollout={"temperature": 0.5})
    models = make_models(config)
    rollout = make_rollout(models, config)
    with torch.no_grad():
        logits = response_logits(models.policy, forward_of(rollout))
    truth = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    torch.testing.assert_close(rollout.entropy, truth)
    assert (rollout.entropy >= 0).all()
    assert (rollout.entropy <= torch.tensor(64.0).log()).all()
