"""Rewards: where the score lands, what the KL costs, and what a bad reward function is told."""

import json

import numpy
import pytest
import torch

from ppo_fast.rlhf.callables import load_callable
from ppo_fast.rlhf.config import KLConfig, RewardConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.reward_sources import FunctionSource
from ppo_fast.rlhf.rewards import KLCoefficient, Scorer, compute_rewards
from tests.rlhf.made import EOS, made_rollout

CPU = torch.device("cpu")


@pytest.fixture
def rewarded(tokenizer):
    """rewarded(rollout, function or list of them, reward={...}, kl={...}, filter_fn=...) -> Rewards."""

    def compute(rollout, function, *, reward=None, kl=None, filter_fn=None):
        functions = function if isinstance(function, list) else [function]
        scorer = Scorer([FunctionSource(f) for f in functions], RewardConfig(**(reward or {})), filter_fn)
        return compute_rewards(rollout, tokenizer, scorer, KLCoefficient(KLConfig(**(kl or {})), CPU))

    return compute


def scores(*values):
    return lambda **_: list(values)


def test_rule_06_reward_is_minus_kl_per_token_plus_the_score_on_the_last_counted_one(rewarded):
    rollout = made_rollout([2, 4, 3])
    rewards = rewarded(rollout, scores(1.0, 2.0, -3.0), kl={"coef": 0.1})
    expected = torch.where(rollout.mask, -0.1 * (rollout.logprobs - rollout.ref_logprobs), 0.0)
    for row, (last, score) in enumerate([(1, 1.0), (3, 2.0), (2, -3.0)]):
        assert rollout.generation.responses[row, last] == EOS
        expected[row, last] += score
    torch.testing.assert_close(rewards.rewards, expected)
    assert rewards.scores.tolist() == [1.0, 2.0, -3.0]
    torch.testing.assert_close(rewards.kl[0, :2], (rollout.logprobs - rollout.ref_logprobs)[0, :2])


@pytest.mark.parametrize(("placement", "charged"), [("reward", True), ("both", True), ("loss", False)])
def test_rule_07_the_reward_pays_for_kl_only_where_it_is_placed_there(rewarded, placement, charged):
    rewards = rewarded(made_rollout([3]), scores(0.0), kl={"coef": 0.5, "placement": placement})
    assert bool((rewards.rewards != 0).any()) is charged
    assert rewards.kl.abs().sum() > 0


@pytest.mark.parametrize("coef", [0.0, 0])
def test_a_coefficient_of_0_leaves_the_kl_out_of_the_reward(rewarded, coef):
    rollout = made_rollout([2])
    rollout.ref_logprobs[0, 0] = -torch.inf
    assert rewarded(rollout, scores(1.0), kl={"coef": coef}).rewards.tolist() == [[0.0, 1.0]]


def test_rule_10_garbage_in_masked_positions_changes_nothing(rewarded):
    clean = rewarded(made_rollout([2, 4]), scores(1.0, 2.0))
    dirty = rewarded(made_rollout([2, 4], fill=float("nan")), scores(1.0, 2.0))
    assert torch.equal(clean.rewards, dirty.rewards)
    assert torch.equal(clean.kl, dirty.kl)


def test_scores_are_clipped_and_then_a_missing_eos_is_charged(rewarded):
    rollout = made_rollout([2, 2, 2], ended=[True, False, False])
    rewards = rewarded(
        rollout, scores(50.0, 50.0, -50.0), reward={"clip": 10.0, "missing_eos_penalty": 1.5}, kl={"coef": 0.0}
    )
    assert rewards.scores.tolist() == [10.0, 8.5, -11.5]
    assert rewards.rewards.tolist() == [[0.0, 10.0], [0.0, 8.5], [0.0, -11.5]]
    unclipped = rewarded(rollout, scores(50.0, 0.0, 0.0), reward={"clip": None})
    assert unclipped.scores[0] == 50


def test_a_list_scores_every_token(rewarded):
    rollout = made_rollout([2, 3])
    rewards = rewarded(rollout, scores([1.0, 2.0], (0.5, 0.0, 0.25)), kl={"coef": 0.0})
    assert rewards.rewards.tolist() == [[1.0, 2.0, 0.0], [0.5, 0.0, 0.25]]
    assert rewards.scores.tolist() == [3.0, 0.75]


def test_a_tensor_of_scores_is_taken(rewarded):
    assert rewarded(made_rollout([1, 2]), lambda **_: torch.tensor([1.0, 2.0])).scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array])
def test_arrays_of_scores_are_taken_per_response_and_per_token(rewarded, kind):
    rollout = made_rollout([2, 3])
    single = rewarded(rollout, scores(kind(1.0), kind([2.0])[0]), kl={"coef": 0.0})
    assert single.scores.tolist() == [1.0, 2.0]
    spread = rewarded(rollout, scores(kind([1.0, 2.0]), kind([0.5, 0.0, 0.25])), kl={"coef": 0.0})
    assert spread.rewards.tolist() == [[1.0, 2.0, 0.0], [0.5, 0.0, 0.25]]


def test_the_function_sees_prompts_completions_tokens_and_columns(rewarded):
    seen = {}

    def function(prompts, completions, completion_ids, topic):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, topic=topic)
        return [0.0, 0.0]

    rewarded(made_rollout([2, 3], columns={"topic": ["a", "b"]}), function)
    assert seen["prompts"] == ["w1", "w1"]
    assert seen["ids"] == [[10, EOS], [10, 11, EOS]]
    assert seen["completions"] == ["w6", "w6 w7"]
    assert seen["topic"] == ["a", "b"]


def broken(**_):
    raise KeyError("topic")


def broken_below(**_):
    json.loads("{")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: None, "reward function: expected a list of 2 scores, got None"),
        (scores(1.0), "reward function: expected 2 scores, got 1"),
        (scores(1.0, float("nan")), "reward function: expected a finite score for sample 1, got nan"),
        (scores(None, 1.0), "reward function: expected a finite score for sample 0, got None"),
        (scores("1.0", 1.0), "reward function: expected a finite score for sample 0, got '1.0'"),
        (scores(1.0, 1e39), "reward function: expected a finite score for sample 1, got 1e+39"),
        (lambda **_: 1.0, "reward function: expected a list of 2 scores, got 1.0"),
        (scores([1.0], 1.0), "reward function: expected 2 scores for the tokens of sample 0, got 1"),
        (scores(1.0, [0.0, float("inf"), 0.0]), "reward function: expected a finite score for sample 1, got inf"),
    ],
)
def test_a_bad_answer_names_the_sample(rewarded, function, message):
    with pytest.raises(UserError) as error:
        rewarded(made_rollout([2, 3]), function)
    assert str(error.value) == message


def test_a_failing_function_is_named_with_its_line(rewarded):
    with pytest.raises(
        UserError, match=r"the reward function 'broken' failed with KeyError: 'topic' \(test_rewards\.py:\d+\)"
    ):
        rewarded(made_rollout([2]), broken)
    line = broken_below.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"JSONDecodeError: .* \(test_rewards\.py:{line}\)$"):
        rewarded(made_rollout([2]), broken_below)
    with pytest.raises(UserError, match=r"failed with TypeError: .* unexpected keyword argument 'completions'$"):
        rewarded(made_rollout([2]), lambda prompts, completion_ids: [0.0])


def test_a_reward_file_may_hold_dataclasses(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import KW_ONLY, dataclass\n"
        "@dataclass\nclass Weights:\n    _: KW_ONLY\n    length: float = 2.0\n"
        "def f(completions, **_):\n    return [Weights().length] * len(completions)\n"
    )
    assert load_callable(f"{path}:f", "reward.function")(completions=["a"]) == [2.0]


def test_a_function_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    assert load_callable(f"{path}:length", "reward.function")(completions=["ab"]) == [2]
    with pytest.raises(UserError, match=r"reward\.function: no function 'width' in"):
        load_callable(f"{path}:width", "reward.function")
    with pytest.raises(UserError, match=r"reward\.function: no such file 'none\.py'"):
        load_callable("none.py:f", "reward.function")
    with pytest.raises(UserError, match=r"reward\.function: expected 'path/to/file\.py:function', got None"):
        load_callable(None, "reward.function")
    path.write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"reward\.function: .*r\.py.* ModuleNotFoundError: .*no_such_module"):
        load_callable(f"{path}:length", "reward.function")
    (tmp_path / "r.txt").write_text("")
    with pytest.raises(UserError, match=r"reward\.function: expected a Python file, got"):
        load_callable(f"{tmp_path / 'r.txt'}:f", "reward.function")


def test_rule_13_the_coefficient_follows_the_published_rule():
    kl = KLCoefficient(KLConfig(coef=0.2, adaptive=True, target=2.0, horizon=100), CPU)
    # Per-sequence sums 1 and 4, mean 2.5: error = 0.25, clipped to 0.2; n = 2 sequences.
    kl.update(torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    assert float(kl.coef) == pytest.approx(0.2 * (1 + 0.2 * 2 / 100))
    # Mean 1.9: error = -0.05, inside the clip.
    kl.update(torch.tensor([[1.9, 0.0], [1.0, 0.9]]))
    assert float(kl.coef) == pytest.approx(0.2 * (1 + 0.2 * 2 / 100) * (1 - 0.05 * 2 / 100))
    before = float(kl.coef)
    kl.update(torch.zeros(2, 2))
    assert float(kl.coef) == pytest.approx(before * (1 - 0.2 * 2 / 100))


def test_a_fixed_coefficient_stays():
    kl = KLCoefficient(KLConfig(coef=0.2), CPU)
    kl.update(torch.full((2, 2), 100.0))
    assert kl.coef == 0.2
