"""Scalar heads of bfloat16 models: scores and values are float32, in every layout."""

import pytest
import torch
from torch import nn

from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.data.examples import Example, Pair
from ppo_fast.rlhf.models.forward import response_values
from ppo_fast.rlhf.models.reward import add_score_head
from ppo_fast.rlhf.models.value import ValueModel
from ppo_fast.rlhf.ppo.reward_sources import ModelSource, Responses
from ppo_fast.rlhf.supervised.reward_model import RewardModel
from tests.rlhf.factories import forward_pass
from tests.rlhf.layout_factories import IDS, LAYOUTS, MASK, models_in, outputs, save_base
from tests.rlhf.supervised_factories import make_model, make_tokenizer

BF16, LOOSE = {"dtype": "bfloat16"}, {"rtol": 0.05, "atol": 0.05}


@pytest.fixture
def reward_model():
    """A bfloat16 reward model with a head of its own dtype."""
    causal = make_model().to(torch.bfloat16)
    model = add_score_head(causal, make_tokenizer(), torch.Generator().manual_seed(0))
    assert model.score.weight.dtype == torch.bfloat16
    return model


@torch.no_grad()
def truth(backbone, head, ids):
    """Scores [B, L] of the hidden states in float64."""
    hidden = backbone(input_ids=ids).last_hidden_state.double()
    bias = None if head.bias is None else head.bias.double()
    return nn.functional.linear(hidden, head.weight.double(), bias).squeeze(-1)


def sequences_of(count):
    return torch.randint(4, 64, (count, 5), generator=torch.Generator().manual_seed(1))


def check(scores, expected):
    """float32 results: as many different ones as the truth has, and none of bfloat16's rounding errors."""
    assert scores.dtype == torch.float32
    assert (scores.double() - expected).abs().max() < 1e-6
    assert scores.unique().numel() == expected.float().unique().numel()


def test_scores_while_a_reward_model_is_trained(reward_model):
    ids = sequences_of(256)
    examples = [Example(tuple(row), 2) for row in ids.tolist()]
    pairs = [Pair(*both) for both in zip(examples[:128], examples[128:], strict=True)]
    objective = RewardModel(reward_model, 0, 16)
    scores = torch.cat(objective.scores(pairs))
    check(scores, truth(reward_model.base_model, reward_model.score, ids)[:, -1])
    objective.loss(pairs).loss.backward()
    assert reward_model.score.weight.grad.dtype == torch.bfloat16


def test_scores_of_a_reward_model_in_ppo(reward_model, tmp_path):
    reward_model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config, ids = ModelConfig(**BF16), sequences_of(256)
    options = {"model": config, "device": torch.device("cpu"), "batch_size": 256}
    source = ModelSource(str(tmp_path), make_tokenizer(), **options)
    prompts, answers = ids[:, :2].tolist(), ids[:, 2:].tolist()
    responses = Responses([""] * 256, prompts, [""] * 256, answers, [False] * 256, {})
    scores = torch.tensor(source(responses))
    assert len(scores.unique()) == 256  # 7 bits of a bfloat16 are not enough for that
    # The backbone rounds to bfloat16, which depends on the kernels of attention.
    torch.testing.assert_close(scores, truth(reward_model.base_model, reward_model.score, ids)[:, -1].float(), **LOOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_in_every_layout(layout, tmp_path):
    models = models_in(layout, save_base(tmp_path / "base"), **BF16)
    with models.using("value") as value:
        expected = truth(value.backbone, value.head, IDS)
        assert value.backbone.dtype == torch.bfloat16
        check(outputs(models, "value"), expected)
        value.head.to(torch.bfloat16)  # the dtype of a head's weights is not that of its values
        check(outputs(models, "value"), truth(value.backbone, value.head, IDS))


def test_a_critic_begins_with_the_scores_of_the_reward_model(reward_model, tmp_path):
    reward_model.save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    models = models_in("separate", save_base(tmp_path / "base"), reward={"models": [str(tmp_path / "rm")]}, **BF16)
    with torch.no_grad():
        scores = ValueModel.from_classifier(reward_model)(IDS, MASK)
    assert torch.equal(outputs(models, "value"), scores)


def test_values_of_packed_rows(reward_model):
    value, ids = ValueModel.from_classifier(reward_model), sequences_of(1)
    with torch.no_grad():
        values = response_values(value, forward_pass(ids, torch.ones_like(ids, dtype=torch.bool), 3, packed=True))
    check(values, truth(reward_model.base_model, reward_model.score, ids)[0, 1:-1])
