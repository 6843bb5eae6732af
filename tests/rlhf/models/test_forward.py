"""The two ways from token ids to the loss: equal where the linear one is taken, refused by name where it cannot be."""

import math

import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast import PolicyLossConfig
from ppo_fast.ops._core import head_buffers
from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.forward import check_linear, reference_terms, response_logits, response_loss, response_stats
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.factories import all_rows, forward_pass, made_experience

V, D = 64, 32
WIDTHS = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(family, seed=0, **overrides):
    """A one-layer model with logits of a few units and, where there is a bias on them, a bias that is not 0."""
    config = getattr(transformers, f"{family}Config")(**(WIDTHS | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        head = model.get_output_embeddings()
        with torch.no_grad():
            head.weight.mul_(10)
            if head.bias is not None:
                head.bias.normal_()
    return model


def adapted(module, seed=0, **options):
    """A Llama under a LoRA of that module, whose weights are not 0."""
    config = peft.LoraConfig(target_modules=[module], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(make("Llama", seed), config)


def gpt2(seed=0):
    return tiny.make_model(V, arch="gpt2", hidden=D, layers=1, heads=2, seed=seed)


LINEAR = {
    "Llama": lambda seed: make("Llama", seed),
    "tied Qwen2": lambda seed: make("Qwen2", seed, tie_word_embeddings=True),
    "tied GPT-2": gpt2,
    "Phi, with a bias": lambda seed: make("Phi", seed),
    "Gemma 2, softcapped": lambda seed: make("Gemma2", seed, head_dim=16, final_logit_softcapping=2.0),
    "Granite without scaling": lambda seed: make("Granite", seed),
    "LoRA of q_proj": lambda seed: adapted("q_proj", seed),
}


def batch(*, packed=False):
    """A pass over three rows, padded on both sides, and their N = 11 counted tokens."""
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    attention_mask = torch.cat([torch.arange(4) >= torch.tensor([[0], [2], [3]]), mask], dim=1)
    return forward_pass(ids, attention_mask, mask, packed=packed), ids[:, -5:][mask]


@pytest.mark.parametrize("name", LINEAR)
def test_both_ways_give_the_same_statistics(name):
    model = LINEAR[name](0)
    check_linear(model)
    sequences, targets = batch()
    with torch.no_grad():
        ours, theirs = (
            response_stats(model, sequences, targets, linear=linear, temperature=0.7) for linear in (True, False)
        )
        logprobs = (response_logits(model, sequences).double() / 0.7).log_softmax(-1)
    truth = logprobs.gather(-1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(ours.logprobs, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("exact_kl", [False, True])
def test_both_ways_give_the_same_loss_and_gradient_of_every_parameter(name, exact_kl):
    sequences, targets = batch()
    advantages = torch.randn(11, generator=torch.Generator().manual_seed(2))
    config = PolicyLossConfig(ent_coef=0.1, kl_coef=0.5 * exact_kl, kl_estimator="full", temperature=0.7)
    found = []
    for linear in (True, False):
        policy = LINEAR[name](0)
        reference = LINEAR[name](1).requires_grad_(False) if exact_kl else None
        terms = {"targets": targets, "old_logprobs": torch.full((11,), -4.0), "advantages": advantages}
        options = reference_terms(reference, sequences, linear=linear) if exact_kl else {}
        options |= terms | {"config": config, "denominator": 7}
        out = response_loss(policy, sequences, linear=linear, **options)
        out.loss.backward()
        found.append((out.loss, out.metrics, {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}))
    (loss, metrics, ours), (other_loss, other_metrics, theirs) = found
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(metrics, other_metrics, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in ours.items():
        other = theirs[parameter]
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


def without_head():
    model = make("Llama")
    model.get_output_embeddings = lambda: None
    return model


def without_backbone():
    class Whole(transformers.LlamaForCausalLM):
        base_model_prefix = ""

    return Whole(make("Llama").config)


def with_wide_head():
    model = make("Llama")
    model.lm_head.double()
    return model


DIFFERENT = (
    r"logits that are its output embedding of its last hidden states, got log-probabilities that differ by \d+(\.\d+)?"
)
REFUSED = {
    "Granite": (lambda: make("Granite", logits_scaling=8.0), "GraniteForCausalLM", DIFFERENT),
    "Cohere": (lambda: make("Cohere"), "CohereForCausalLM", DIFFERENT),
    "LoRA of lm_head": (
        lambda: adapted("lm_head"),
        "LlamaForCausalLM",
        r"an output embedding that is a torch\.nn\.Linear, got peft\.tuners\.lora\.layer\.Linear",
    ),
    "trained copy of lm_head": (
        lambda: adapted("q_proj", modules_to_save=["lm_head"]),
        "LlamaForCausalLM",
        r"an output embedding that is a torch\.nn\.Linear, got peft\.utils\.other\.ModulesToSaveWrapper",
    ),
    "no head": (without_head, "LlamaForCausalLM", r"an output embedding that is a torch\.nn\.Linear, got none"),
    "no backbone": (without_backbone, "Whole", "a backbone that gives hidden states, got none"),
    "head in another dtype": (
        with_wide_head,
        "LlamaForCausalLM",
        "a head that the linear ops take, got 'linear_token_stats: expected weight in the dtype of hidden .*'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_makes_its_logits_another_way_is_refused_by_name(name):
    model, kind, found = REFUSED[name]
    end = r"; set it to false for this model$"
    with pytest.raises(UserError, match=rf"^model\.fused_head: expected {kind} to have {found}{end}"):
        check_linear(model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_difference_is_rounding_and_a_larger_one_is_not(dtype):
    model = make("Granite").to(dtype)
    check_linear(model)
    model.config.logits_scaling = 1 + (1e-6 if dtype == torch.float32 else 1e-3)
    check_linear(model)
    model.config.logits_scaling = 1.001 if dtype == torch.float32 else 1.2
    with pytest.raises(UserError, match=DIFFERENT):
        check_linear(model)


def test_softcapped_logits_that_the_model_rounds_to_bfloat16_are_not_refused():
    # The linear ops keep them in float32.
    check_linear(make("Gemma2", head_dim=16, final_logit_softcapping=2.0).bfloat16())


def test_a_word_that_the_model_bans_from_its_logits_is_a_difference():
    model = make("Llama")
    ban = torch.zeros(V).index_fill(0, torch.tensor([12 * V // 16]), torch.finfo(torch.float32).min)
    model.lm_head.register_forward_hook(lambda head, given, logits: logits + ban)
    with pytest.raises(UserError, match=r"differ by 3\.4e\+38"):
        check_linear(model)


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(make_config, tokenizer, tmp_path):
    """run(policy, path, **config) -> PPOResult whose `model.fused_head` is that of the path."""

    def go(policy, path, **values):
        config = make_config(model={"fused_head": path == "linear"}, output_dir=str(tmp_path / path), **values)
        return train_ppo(config, reward_fn=reward, prompts=PROMPTS, policy=policy, tokenizer=tokenizer)

    return go


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tied GPT-2", {"kl": {"placement": "both", "loss_estimator": "full"}, "advantage": {"whiten": False}}),
        ("Gemma 2, softcapped", {}),
    ],
)
def test_both_ways_give_the_same_run(run, name, values):
    ours, theirs = (
        run(LINEAR[name](0), path, updates=3, loss={"ent_coef": 0.01}, **values) for path in ("linear", "materialized")
    )
    clock = ("time/", "tokens_per_second", "memory/")
    for mine, other in zip(ours.history, theirs.history, strict=True):
        assert mine.keys() == other.keys()
        for metric in mine:
            if not metric.startswith(clock):
                # A token may be just inside the clip in one and just outside in the other.
                slack = 0.02 if metric.endswith("clipfrac") else 2e-5
                same = math.isclose(mine[metric], other[metric], rel_tol=1e-3, abs_tol=slack)
                assert same or math.isnan(mine[metric]), (metric, mine[metric], other[metric])
    before = dict(LINEAR[name](0).named_parameters())
    for parameter, mine in ours.models.policy.named_parameters():
        other = theirs.models.policy.get_parameter(parameter)
        moved = (mine - before[parameter]).abs().max()
        assert moved > 1e-3
        assert (mine - other).abs().max() <= 0.02 * moved


def test_a_refused_model_trains_with_its_own_logits(run, tmp_path):
    with pytest.raises(UserError, match=r"^model\.fused_head: expected GraniteForCausalLM to have"):
        run(make("Granite", logits_scaling=8.0), "linear")
    assert not (tmp_path / "linear").exists()
    result = run(make("Granite", logits_scaling=8.0), "materialized", rollout={"engine": "generate"})
    assert result.history[1]["objective/kl"] != 0
    assert max(metrics["rollout/logprob_diff_max"] for metrics in result.history) <= 2e-5


class LargestOverWords(TorchDispatchMode):
    """The most rows of any tensor [..., words] that an operation returns."""

    def __init__(self, words):
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.words,):
                self.rows = max(self.rows, x.numel() // self.words)
        return out


@pytest.mark.parametrize(("path", "exists"), [("linear", False), ("materialized", True)])
def test_the_logits_of_a_batch_exist_in_the_materialized_path_alone(
    make_models, make_config, make_rollout, monkeypatch, tokenizer, path, exists
):
    monkeypatch.setattr(head_buffers, "_CPU_CHUNK", 8)
    config = make_config(
        model={"fused_head": path == "linear"},
        rollout={"max_new_tokens": 12},
        kl={"placement": "loss", "loss_estimator": "full"},
        optim={"minibatch_size": 8},
    )
    models = make_models(config)
    rollout = make_rollout(models, config)
    rows = int(rollout.generation.mask.sum())
    assert rows > D  # [D, V] is the transposed weight
    experience = made_experience(rollout, rollout.logprobs, rollout.values)
    for work in (
        lambda: score(models, rollout.generation, config.rollout),
        lambda: Learner(models, config).backward(*all_rows(experience), 0.1),
    ):
        with LargestOverWords(V) as largest:
            work()
        assert largest.rows >= rows if exists else 0 < largest.rows <= D
