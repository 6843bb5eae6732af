"""rollout.function: a user's turns and tools; what of them counts, what is refused, that runs repeat."""

import dataclasses

import pytest
import torch

from examples import calculator
from ppo_fast.rlhf import train_ppo
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.ppo.environment import TurnSampler, respond
from ppo_fast.rlhf.ppo.reward_sources import Responses
from ppo_fast.rlhf.ppo.scoring import score
from tests.helpers import raises_exactly
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.ppo.test_rollout import byte_tokenizer

TOOL = [11, 12]


def two_turns(prompt_ids, sample, **_):
    """Three tokens of the policy, two of a tool, and in every other response up to two more of the policy."""
    first = sample(prompt_ids, max_new_tokens=3)
    again = [row for row in range(len(prompt_ids)) if row % 2]
    second = dict(
        zip(again, sample([prompt_ids[row] + first[row][0] + TOOL for row in again], max_new_tokens=2), strict=True)
    )
    responses = []
    for row, (ids, logprobs) in enumerate(first):
        more, more_logprobs = second.get(row, ([], []))
        mask = [True] * len(ids) + [False] * 2 + [True] * len(more)
        responses.append((ids + TOOL + more, mask, [*logprobs, 9.0, 9.0, *more_logprobs]))
    return responses


@pytest.fixture
def setup(make_config, make_models):
    """setup(**config) -> (models, config, batch of prompts)."""

    def make(prompts=PROMPTS, **values):
        config = make_config(**values)
        models = make_models(config)
        data = load_prompts(prompts, models.tokenizer, config.data)
        return models, config, make_batch(data, [*range(len(prompts))], models.pad_id, models.device)

    return make


@pytest.mark.parametrize("engine", ["slots", "generate"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_policys_tokens_count_and_the_tools_are_only_read(setup, engine, packing):
    models, config, batch = setup(rollout={"engine": engine, "temperature": 0.7}, model={"packing": packing})
    generation = respond(models, batch, config.rollout, 1, function=two_turns)
    rollout = score(models, generation, config.rollout)
    # Sampled turn by turn, scored in one pass: equal only if both read the tool's tokens at their places.
    assert (rollout.sampled_logprobs - rollout.logprobs).abs().max() < 2e-5
    responses = Responses.from_generation(generation, models.tokenizer)
    for row, (counted, whole) in enumerate(zip(responses.completion_ids, responses.response_ids, strict=True)):
        place = next(i for i in range(len(whole)) if whole[i : i + 2] == TOOL and i in (1, 2, 3))
        assert counted == whole[:place] + whole[place + 2 :]
        assert (len(whole) == place + 2) == (row % 2 == 0)
        assert rollout.grid.lengths[row] == len(counted)
        assert models.tokenizer.decode(TOOL) in responses.completions[row]
        assert generation.ended[row] == (row % 2 == 0 or whole[-1] == models.eos_id)
    assert rollout.tokens.tolist() == [token for ids in responses.completion_ids for token in ids]


def test_the_engines_agree_and_each_call_and_batch_has_its_own_noise(setup):
    models, config, batch = setup()
    drawn = {
        (engine, first): respond(
            models, batch, dataclasses.replace(config.rollout, engine=engine), 1, first, two_turns
        ).responses.tolist()
        for engine, first in (("slots", 0), ("generate", 0), ("slots", 8))
    }
    assert drawn["slots", 0] == drawn["generate", 0] != drawn["slots", 8]
    same = []

    def calls(prompt_ids, sample, **_):
        same.extend(sample(prompt_ids, max_new_tokens=6) for _ in range(2))
        return [(ids, [True] * len(ids), logprobs) for ids, logprobs in same[0]]

    respond(models, batch, config.rollout, 1, function=calls)
    assert same[0] != same[1]


def test_sample_takes_stop_strings_and_nothing(make_config):
    tokenizer, config = byte_tokenizer(), make_config(rollout={"max_new_tokens": 9, "stop": ["never"]})
    policy = tiny.make_model(len(tokenizer), hidden=16, heads=2)
    models = load_models(config.model, torch.Generator(), policy=policy, tokenizer=tokenizer)

    def sampler():
        return TurnSampler(models, config.rollout, 1, 0)

    assert sampler()([]) == []
    ((whole, logprobs),) = sampler()([[5, 6]])
    assert len(whole) == 9
    letter = next(text for text in map(tokenizer.decode, whole) if text.isascii())
    ((cut, cut_logprobs),) = sampler()([[5, 6]], stop=[letter])
    end = [*map(tokenizer.decode, whole)].index(letter) + 1
    assert end < 9
    assert (cut, len(cut_logprobs)) == (whole[:end], end)
    assert cut_logprobs == pytest.approx(logprobs[:end], rel=1e-5)
    assert [ids for ids, _ in sampler()([[5, 6]], max_new_tokens=4)] == [whole[:4]]


def test_a_stop_string_ends_a_response_with_a_function_as_without(make_config):
    tokenizer, config = byte_tokenizer(), make_config()
    policy = tiny.make_model(len(tokenizer), hidden=16, heads=2)
    models = load_models(config.model, torch.Generator(), policy=policy, tokenizer=tokenizer)
    data = load_prompts(["a", "b", "c"], tokenizer, config.data)
    batch = make_batch(data, [0, 1, 2], models.pad_id, models.device)

    def one_turn(prompt_ids, sample, **_):
        return [(ids, [True] * len(ids), logprobs) for ids, logprobs in sample(prompt_ids)]

    def responses(stop):
        return respond(models, batch, dataclasses.replace(config.rollout, stop=stop), 1, function=one_turn)

    texts = map(tokenizer.decode, responses(()).responses[0])
    assert not responses(("never",)).ended.any()
    stopped = responses((next(text for text in texts if text.isascii()),))
    assert stopped.ended[0]
    assert stopped.ended.tolist() == [n < config.rollout.max_new_tokens for n in stopped.mask.sum(dim=1)]


def answers(item):
    return lambda prompts, **_: [item] * len(prompts)


BEGIN = "rollout function: sample 0: expected"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: None, "rollout function: expected a list of 4 responses, got None"),
        (lambda **_: [1], "rollout function: expected 4 responses, got 1"),
        (answers([5, 6]), f"{BEGIN} token ids, a mask and log-probabilities, got [5, 6]"),
        (answers(([5], [True, False], [0.0])), f"{BEGIN} three lists of the same length, 1 or more, got (1, 2, 1)"),
        (answers(([], [], [])), f"{BEGIN} three lists of the same length, 1 or more, got (0, 0, 0)"),
        (answers(([5], [False], [0.0])), f"{BEGIN} a mask with True once or more, got [False]"),
        (answers(([5], [1], [0.0])), f"{BEGIN} a mask with True once or more, got [1]"),
        (answers(([5], [True], [float("nan")])), f"{BEGIN} finite log-probabilities, got [nan]"),
        (answers(([64], [True], [0.0])), f"{BEGIN} one or more token ids in [0, 64), got [64]"),
        (
            answers(([5] * 128, [True] * 128, [0.0] * 128)),
            f"{BEGIN} at most 128 tokens of prompt and response, got 129",
        ),
        (
            lambda sample, **_: sample([[5]], max_new_tokens=0),
            "rollout function: sample: expected max_new_tokens >= 1, got 0",
        ),
        (
            lambda sample, **_: sample([[]]),
            "rollout function: sample: expected one or more token ids in [0, 64), got []",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_one_sentence(setup, function, message):
    models, config, batch = setup()
    with raises_exactly(message, UserError):
        respond(models, batch, config.rollout, 1, function=function)


def test_a_failing_tool_and_a_taken_column_are_named(setup):
    def broken(**_):
        raise OSError("no connection")

    models, config, batch = setup()
    line = broken.__code__.co_firstlineno + 1
    message = f"the rollout function 'broken' failed with OSError: no connection (test_environment.py:{line})"
    with raises_exactly(message, UserError):
        respond(models, batch, config.rollout, 1, function=broken)
    models, config, batch = setup([{"prompt": "w1", "sample": 1}])
    message = "rollout function: the column name 'sample' is taken by an argument of its own"
    with raises_exactly(message, UserError):
        respond(models, batch, config.rollout, 1, function=two_turns)


def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(make_config, tokenizer, tmp_path):
    path = tmp_path / "environment.py"
    source = "import sys\nsys.path.insert(0, '.')\nfrom tests.rlhf.ppo.test_environment import two_turns\n"
    path.write_text(source)
    calls = []

    def run(name, *, stop=False, resume=False):
        def reward(completion_ids, **_):
            calls.append(name)
            if stop and calls.count(name) == 4:  # two answers to the held-out prompts at the start, then two updates
                raise KeyboardInterrupt
            return [sum(ids) % 7 / 7 for ids in completion_ids]

        config = make_config(
            updates=3,
            output_dir=str(tmp_path / name),
            checkpoint={"every": 1},
            rollout={"function": f"{path}:two_turns"},
            evaluation={"every": 3},
        )
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        return train_ppo(
            config,
            reward_fn=reward,
            prompts=PROMPTS,
            eval_prompts=PROMPTS[:2],
            policy=policy,
            tokenizer=tokenizer,
            resume=resume,
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop=True)
    resumed = run("stopped", resume=True)
    for name, weight in whole.models.policy.state_dict().items():
        assert torch.equal(weight, resumed.models.policy.state_dict()[name]), name
    assert whole.history[-1]["eval/kl"] == resumed.history[-1]["eval/kl"]
    assert len(resumed.history) == 3


def test_a_policy_learns_to_ask_and_to_say_what_it_was_told(tmp_path):
    config = calculator.settings(str(tmp_path), updates=24)
    history = calculator.train(config).history
    assert history[0]["objective/scores"] < 0.25
    assert history[-1]["objective/scores"] > 0.8
    assert history[-1]["length/mean"] > 1.8  # the call and the answer: two tokens of the policy
    assert max(metrics["rollout/logprob_diff_max"] for metrics in history) < 2e-5
