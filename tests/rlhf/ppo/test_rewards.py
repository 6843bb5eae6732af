"""Rewards: where the score lands, what the KL costs, and what a bad reward function is told."""

import json
import os
import sys

import numpy
import pytest
import torch

from ppo_fast.rlhf.config.ppo import KLConfig, RewardConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.ppo.reward_sources import FunctionSource, Responses
from ppo_fast.rlhf.ppo.rewards import KLCoefficient, Scorer, compute_rewards, without_masked
from ppo_fast.rlhf.user_code import call, clear_module_cache, load_callable
from tests.helpers import raises_exactly
from tests.rlhf.factories import EOS, made_rollout, padded

CPU = torch.device("cpu")


@pytest.fixture
def rewarded(tokenizer):
    """rewarded(rollout, function or list of them, reward={...}, kl={...}, filter_fn=...) -> Rewards."""

    def compute(rollout, function, *, reward=None, kl=None, filter_fn=None):
        functions = function if isinstance(function, list) else [function]
        scorer = Scorer([FunctionSource(f) for f in functions], RewardConfig(**(reward or {})), filter_fn)
        return compute_rewards(rollout, tokenizer, scorer, KLCoefficient(KLConfig(**(kl or {})), CPU))

    return compute


def grid(rollout, x):
    """x [N] as [B, T]."""
    return padded(x, rollout.grid.lengths)


def scores(*values):
    return lambda **_: list(values)


def test_what_the_sources_gave_is_kept_without_clip_penalty_and_normalization(rewarded):
    """Two functions of one name; the filter rejects the last response, the second one has no EOS."""
    rollout = made_rollout([2, 3, 1], ended=[True, False, True])
    settings = {"clip": 1.0, "weights": [2.0, 1.0], "normalize": "running", "missing_eos_penalty": 3.0}
    functions = [scores(4.0, [1.0, 2.0, 3.0], 8.0), scores(0.5, 1.0, 1.5)]
    made = rewarded(rollout, functions, reward=settings, filter_fn=lambda **_: [True, True, False])
    assert made.own.names == ("function", "function-2")
    assert made.own.sources.tolist() == [[4, 0.5], [6, 1], [8, 1.5]]
    assert made.own.combined.tolist() == [8.5, 13, 17.5]
    unit = 1.5**0.5  # normalized, both are -unit, 0, unit
    assert made.own.unpenalized.tolist() == pytest.approx([-3 * unit, 0, -10], abs=1e-6)
    assert made.scores.tolist() == pytest.approx([-1, 1 + 1 - 1 - 3, -10], abs=1e-6)  # each token is clipped


def test_rule_06_reward_is_minus_kl_per_token_plus_the_score_on_the_last_counted_one(rewarded):
    rollout = made_rollout([2, 4, 3])
    rewards = rewarded(rollout, scores(1.0, 2.0, -3.0), kl={"coef": 0.1})
    expected = grid(rollout, -0.1 * (rollout.logprobs - rollout.ref_logprobs))
    for row, (last, score) in enumerate([(1, 1.0), (3, 2.0), (2, -3.0)]):
        assert rollout.generation.responses[row, last] == EOS
        expected[row, last] += score
    torch.testing.assert_close(grid(rollout, rewards.rewards), expected)
    assert rewards.scores.tolist() == [1.0, 2.0, -3.0]
    torch.testing.assert_close(rewards.kl[:2], (rollout.logprobs - rollout.ref_logprobs)[:2])


def published(length, longest, buffer):
    """Equation 13 of DAPO."""
    if length <= longest - buffer:
        return 0.0
    return ((longest - buffer) - length) / buffer if length <= longest else -1.0


@pytest.mark.parametrize(("longest", "buffer"), [(10, 4), (10, None), (7, 7), (3, None)])
def test_an_overlong_response_pays_by_its_length(longest, buffer, tokenizer):
    lengths = list(range(1, longest + 3))
    settings = {"overlong_penalty": 0.5, "overlong_buffer": buffer, "clip": 1.0}
    scorer = Scorer(
        [FunctionSource(lambda **_: [7.0] * len(lengths))], RewardConfig(**settings), max_new_tokens=longest
    )
    rewards = compute_rewards(made_rollout(lengths), tokenizer, scorer, KLCoefficient(KLConfig(), CPU))
    width = buffer or max(1, longest // 5)
    expected = [1 + 0.5 * published(length, longest, width) for length in lengths]
    assert rewards.scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("placement", "charged"), [("reward", True), ("both", True), ("loss", False)])
def test_rule_07_the_reward_pays_for_kl_only_where_it_is_placed_there(rewarded, placement, charged):
    rewards = rewarded(made_rollout([3]), scores(0.0), kl={"coef": 0.5, "placement": placement})
    assert bool((rewards.rewards != 0).any()) is charged
    assert rewards.kl.abs().sum() > 0


@pytest.mark.parametrize("coef", [0.0, 0])
def test_a_coefficient_of_0_leaves_the_kl_out_of_the_reward(rewarded, coef):
    rollout = made_rollout([2])
    rollout.ref_logprobs[0] = -torch.inf
    assert grid(rollout, rewarded(rollout, scores(1.0), kl={"coef": coef}).rewards).tolist() == [[0.0, 1.0]]


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
    assert grid(rollout, rewards.rewards).tolist() == [[0.0, 10.0], [0.0, 8.5], [0.0, -11.5]]
    unclipped = rewarded(rollout, scores(50.0, 0.0, 0.0), reward={"clip": None})
    assert unclipped.scores[0] == 50


def test_a_list_scores_every_token(rewarded):
    rollout = made_rollout([2, 3])
    rewards = rewarded(rollout, scores([1.0, 2.0], (0.5, 0.0, 0.25)), kl={"coef": 0.0})
    assert grid(rollout, rewards.rewards).tolist() == [[1.0, 2.0, 0.0], [0.5, 0.0, 0.25]]
    assert rewards.scores.tolist() == [3.0, 0.75]


def test_a_tensor_of_scores_is_taken(rewarded):
    assert rewarded(made_rollout([1, 2]), lambda **_: torch.tensor([1.0, 2.0])).scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array])
def test_arrays_of_scores_are_taken_per_response_and_per_token(rewarded, kind):
    rollout = made_rollout([2, 3])
    single = rewarded(rollout, scores(kind(1.0), kind([2.0])[0]), kl={"coef": 0.0})
    assert single.scores.tolist() == [1.0, 2.0]
    by_token = rewarded(rollout, scores(kind([1.0, 2.0]), kind([0.5, 0.0, 0.25])), kl={"coef": 0.0})
    assert grid(rollout, by_token.rewards).tolist() == [[1.0, 2.0, 0.0], [0.5, 0.0, 0.25]]


def test_the_function_sees_prompts_completions_tokens_and_columns(rewarded):
    seen = {}

    def function(prompts, completions, completion_ids, topic, role):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, topic=topic, role=role)
        return [0.0, 0.0]

    rewarded(made_rollout([2, 3], columns={"topic": ["a", "b"], "role": ["c", "d"]}), function)
    assert seen["prompts"] == ["w1", "w1"]
    assert seen["ids"] == [[10, EOS], [10, 11, EOS]]
    assert seen["completions"] == ["w6", "w6 w7"]
    assert (seen["topic"], seen["role"]) == (["a", "b"], ["c", "d"])


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


def leave(**_):
    raise SystemExit("no judge")


def generated(**_):
    yield 1.0
    yield 1 / 0


@pytest.mark.parametrize(
    ("function", "fault"),
    [(leave, "SystemExit: no judge"), (generated, "ZeroDivisionError: division by zero")],
)
def test_a_function_that_exits_or_fails_while_it_generates_is_one_sentence(function, fault):
    line = function.__code__.co_firstlineno + (1 if function is leave else 2)
    with raises_exactly(f"the filter {function.__name__!r} failed with {fault} (test_rewards.py:{line})", UserError):
        call("filter", function, prompts=["w1"])


def emptying(prompts, completions, completion_ids, topic):
    """ScoredBatch, after taking all_rows out of the arguments, at any depth."""
    count = len(completions)
    topic[0]["name"].clear()
    for ids in completion_ids:
        ids.clear()
    for argument in (prompts, completions, completion_ids, topic):
        argument.clear()
    return [1.0] * count


def test_functions_that_empty_their_arguments_change_nothing(rewarded):
    columns = {"topic": [{"name": ["a"]}, {"name": ["b"]}]}
    rollout = made_rollout([2, 3], columns=columns)
    rewards = rewarded(rollout, [emptying, emptying], filter_fn=lambda **given: [x > 0 for x in emptying(**given)])
    assert rewards.completion_ids == [[10, EOS], [10, 11, EOS]]
    assert rewards.completions == ["w6", "w6 w7"]
    assert rewards.scores.tolist() == [2.0, 2.0]
    assert columns == {"topic": [{"name": ["a"]}, {"name": ["b"]}]}
    assert rollout.generation.prompts.prompts == ["w1", "w1"]


def test_an_answer_to_what_is_left_of_the_arguments_names_the_count(rewarded):
    def popping(completions, **_):
        completions.pop()
        return [1.0 for _ in completions]

    with raises_exactly("reward function: expected 2 scores, got 1", UserError):
        rewarded(made_rollout([2, 3]), popping)


def test_a_function_is_loaded_from_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_callable("ppo_fast.rewards:exact_answer", "reward.function")(["a"], ["a"]) == [1.0]
    (tmp_path / "package_of_a_user").mkdir()
    (tmp_path / "package_of_a_user" / "broken.py").write_text("import package_that_nobody_has\n")
    messages = {
        "ppo_fast.rewards:exact": "no function 'exact' in 'ppo_fast.rewards'",
        "ppo_fast.reward:f": f"no such module 'ppo_fast.reward', and no file of that name in {tmp_path}",
        "package_that_nobody_has.sub:f": "no such module 'package_that_nobody_has.sub', and no file of that name "
        f"in {tmp_path}",
        "package_of_a_user.broken:f": "'package_of_a_user.broken' does not import: ModuleNotFoundError: No module "
        "named 'package_that_nobody_has' (broken.py:1)",
    }
    for spec, message in messages.items():
        with raises_exactly(f"reward.function: {message}", UserError):
            load_callable(spec, "reward.function")


def test_a_reward_file_may_hold_dataclasses(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import KW_ONLY, dataclass\n"
        "@dataclass\nclass Weights:\n    _: KW_ONLY\n    length: float = 2.0\n"
        "def f(completions, **_):\n    return [Weights().length] * len(completions)\n"
    )
    assert load_callable(f"{path}:f", "reward.function")(completions=["a"]) == [2.0]


def test_a_file_that_is_written_twice_in_a_second_is_read_twice(tmp_path, monkeypatch):
    """In the time of its compiled code, which has seconds, and in size it is the same file."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "reward.py"
    for written, score in enumerate((1.0, 2.0)):
        path.write_text(f"def f(completions, **_):\n    return [{score}]\n")
        os.utime(path, ns=(0, 10**18 + written))
        assert load_callable(f"{path}:f", "reward.function")(completions=["a"]) == [score]


def test_a_function_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    assert load_callable(f"{path}:length", "reward.function")(completions=["ab"]) == [2]
    with pytest.raises(UserError, match=r"reward\.function: no function 'width' in"):
        load_callable(f"{path}:width", "reward.function")
    with pytest.raises(UserError, match=r"reward\.function: no such file 'none\.py'"):
        load_callable("none.py:f", "reward.function")
    with pytest.raises(
        UserError, match=r"reward\.function: expected 'path/to/file\.py:function' or 'module:function', got None"
    ):
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
    kl.update(torch.tensor([[1.0, 0.0], [2.0, 2.0]]).sum(dim=1))
    assert float(kl.coef) == pytest.approx(0.2 * (1 + 0.2 * 2 / 100))
    # Mean 1.9: error = -0.05, inside the clip.
    kl.update(torch.tensor([[1.9, 0.0], [1.0, 0.9]]).sum(dim=1))
    assert float(kl.coef) == pytest.approx(0.2 * (1 + 0.2 * 2 / 100) * (1 - 0.05 * 2 / 100))
    before = float(kl.coef)
    kl.update(torch.zeros(2))
    assert float(kl.coef) == pytest.approx(before * (1 - 0.2 * 2 / 100))


def test_a_fixed_coefficient_stays():
    kl = KLCoefficient(KLConfig(coef=0.2), CPU)
    kl.update(torch.full((2,), 200.0))
    assert kl.coef == 0.2


NO_EXTRAS = {"clip": None, "missing_eos_penalty": 0.0}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Totals per source: (1, 4) and (3, -2), weights 1 and 3.
        ("sum", [10.0, -2.0]),
        ("mean", [2.5, -0.5]),
        ("min", [1.0, -6.0]),
        # Weighted deviations: sqrt((1.5^2 + 3 * 0.5^2) / 4) and sqrt((4.5^2 + 3 * 1.5^2) / 4).
        ("mean-std", [2.5 - 2 * 0.75**0.5, -0.5 - 2 * 6.75**0.5]),
    ],
)
def test_sources_are_combined(rewarded, rule, expected):
    reward = {"combine": rule, "weights": (1.0, 3.0), "std_coef": 2.0, **NO_EXTRAS}
    rewards = rewarded(made_rollout([2, 3]), [scores(1.0, 4.0), scores(3.0, -2.0)], reward=reward, kl={"coef": 0.0})
    assert rewards.scores.tolist() == pytest.approx(expected)
    assert rewards.rewards[1] == pytest.approx(expected[0])
    if rule == "sum":
        assert rewards.std is None
    else:
        assert rewards.std.tolist() == pytest.approx([0.75**0.5, 6.75**0.5])


def test_min_keeps_the_tokens_of_the_lowest_source(rewarded):
    sources = [scores([1.0, 2.0], 0.0), scores(2.5, [0.5, 0.0, -1.0])]
    rollout = made_rollout([2, 3])
    rewards = rewarded(rollout, sources, reward={"combine": "min", **NO_EXTRAS}, kl={"coef": 0.0})
    assert grid(rollout, rewards.rewards).tolist() == [[0.0, 2.5, 0.0], [0.5, 0.0, -1.0]]


def test_min_chooses_by_the_weighted_scores(rewarded):
    reward = {"combine": "min", "weights": (1.0, 3.0), **NO_EXTRAS}
    rewards = rewarded(made_rollout([2, 2]), [scores(2.0, 5.0), scores(1.0, 1.0)], reward=reward, kl={"coef": 0.0})
    assert rewards.scores.tolist() == [2.0, 3.0]


def test_weights_must_fit_the_sources(rewarded):
    with pytest.raises(UserError, match=r"^reward\.weights: expected one for each of the 2 sources, got \(1\.0,\)$"):
        rewarded(made_rollout([2]), [scores(1.0), scores(1.0)], reward={"weights": (1.0,)})


def test_scores_are_normalized_by_the_statistics_of_their_source(tokenizer):
    def fixed(responses):
        return [7.0, [1.0, 2.0, 4.0]]

    fixed.saved_stats = (3.0, 2.0)
    rollout = made_rollout([2, 3])
    responses = Responses.from_generation(rollout.generation, tokenizer)
    saved = Scorer([fixed], RewardConfig(**NO_EXTRAS))(responses)
    assert grid(rollout, saved.per_token_scores).tolist() == [[0.0, 2.0, 0.0], [0.5, 1.0, 0.5]]
    raw = Scorer([fixed], RewardConfig(normalize="none", **NO_EXTRAS))(responses)
    assert raw.totals.tolist() == [7.0, 7.0]


def test_running_statistics_are_those_of_all_scores_so_far(tokenizer):
    answers = iter([[1.0, 3.0], [5.0, 11.0], [4.0, 6.0]])
    scorer = Scorer([lambda responses: next(answers)], RewardConfig(normalize="running", **NO_EXTRAS))
    rollout = made_rollout([2, 3])
    responses = Responses.from_generation(rollout.generation, tokenizer)
    assert scorer(responses).totals.tolist() == pytest.approx([-1.0, 1.0])
    mean, std = 5.0, (56 / 4) ** 0.5  # of 1, 3, 5, 11
    expected = [0.0, (11 - mean) / std]
    assert scorer(responses).totals.tolist() == pytest.approx(expected, abs=1e-6)
    resumed = Scorer([lambda responses: [4.0, 6.0]], scorer.config)
    resumed.load_state_dict(json.loads(json.dumps(scorer.state_dict())))
    for one in (scorer, resumed):  # scored by the statistics, without changing them
        measured = one(responses, learn=False).totals.tolist()
        assert measured == pytest.approx([-1 / std, 1 / std])
    assert scorer.running[0].count == resumed.running[0].count == 4


def test_equal_scores_are_centered_alone(tokenizer):
    scorer = Scorer([lambda responses: [4.0, 4.0]], RewardConfig(normalize="running", **NO_EXTRAS))
    rollout = made_rollout([2, 3])
    assert scorer(Responses.from_generation(rollout.generation, tokenizer)).totals.tolist() == [0, 0]


def test_length_is_charged_per_token_after_the_clip(rewarded):
    reward = {"clip": 1.0, "length_penalty": 0.25, "missing_eos_penalty": 0.0}
    rollout = made_rollout([2, 4])
    rewards = rewarded(rollout, scores(5.0, 0.0), reward=reward, kl={"coef": 0.0})
    assert grid(rollout, rewards.rewards).tolist() == [[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]]


def test_a_rejected_response_has_the_score_of_the_rejected(rewarded):
    rollout = made_rollout([2, 3], ended=[False, True], columns={"topic": ["a", "b"]})
    reward = {"rejected_score": -4.0, "length_penalty": 0.5}
    rewards = rewarded(
        rollout,
        scores([1.0, 9.0], 2.0),
        reward=reward,
        kl={"coef": 0.0},
        filter_fn=lambda prompts, completions, completion_ids, topic: [name != "a" for name in topic],
    )
    assert grid(rollout, rewards.rewards).tolist() == [[0.0, -4.0, 0.0], [0.0, 0.0, 0.5]]
    assert rewards.verdicts == [False, True]


def test_masked_responses_leave_rollout_and_rewards(rewarded):
    rollout = made_rollout([2, 3, 4], columns={"topic": ["a", "b", "c"]})
    rewards = rewarded(rollout, scores(1.0, 2.0, 3.0), filter_fn=lambda **_: [True, "mask", numpy.bool_(False)])
    kept, earned = without_masked(rollout, rewards)
    assert earned.completion_ids == [rewards.completion_ids[0], rewards.completion_ids[2]]
    assert earned.scores.tolist() == [1.0, -10.0]
    assert kept.generation.prompts.columns == {"topic": ["a", "c"]}
    for name, found in kept.packed().items():
        both = grid(kept, found), grid(rollout, getattr(rollout, name))[[0, 2]]
        assert torch.equal(*both), name
    assert torch.equal(kept.generation.mask, rollout.generation.mask[[0, 2]])
    assert torch.equal(kept.cu_seqlens, torch.tensor([0, 2, 6]))
    assert (kept.grid.lengths == [2, 4]).all()
    assert torch.equal(grid(kept, earned.kl), grid(rollout, rewards.kl)[[0, 2]])
    assert without_masked(kept, earned) == (kept, earned)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([True], "filter: expected 2 verdicts, got 1"),
        ([True, "drop"], "filter: expected True, False or 'mask' for sample 1, got 'drop'"),
        ([1, True], "filter: expected True, False or 'mask' for sample 0, got 1"),
    ],
)
def test_a_bad_verdict_names_the_sample(rewarded, answer, message):
    with pytest.raises(UserError) as error:
        rewarded(made_rollout([2, 3]), scores(0.0, 0.0), filter_fn=lambda **_: answer)
    assert str(error.value) == message


def test_a_filter_that_masks_everything_is_an_error(rewarded):
    rollout = made_rollout([2, 3])
    rewards = rewarded(rollout, scores(0.0, 0.0), filter_fn=lambda **_: ["mask", "mask"])
    with pytest.raises(UserError, match=r"^filter: expected one response or more to be kept, got 'mask' for all 2$"):
        without_masked(rollout, rewards)


def test_functions_of_one_file_share_its_variables_until_the_next_run(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("seen = []\ndef a(**_):\n    seen.append(1)\n    return seen\ndef b(**_):\n    return seen\n")
    first, other = (load_callable(f"{path}:{name}", "reward.function") for name in "ab")
    assert first() is other()
    clear_module_cache()
    assert load_callable(f"{path}:b", "reward.function")() == []
