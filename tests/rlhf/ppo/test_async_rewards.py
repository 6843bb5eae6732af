"""Reward functions that are `async def`: awaited together, in order, within a time limit."""

import asyncio
import time

import pytest

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.ppo.reward_sources import FunctionSource, Responses, load_sources
from ppo_fast.rlhf.user_code import load_callable
from tests.helpers import raises_exactly

N = 40
RESPONSES = Responses(["w1"] * N, [[5]] * N, [f"{n}" for n in range(N)], [[7]] * N, [True] * N, {"level": [*range(N)]})
EXPECTED = [float(n) for n in range(N)]
SECONDS = 0.1  # of each response: four seconds one after the other


async def judge(text):
    await asyncio.sleep(SECONDS)
    return float(text)


async def whole_batch(completions, level, **_):
    assert level == [*range(N)]
    return await asyncio.gather(*map(judge, completions))


def one_awaitable_each(completions, **_):
    return [judge(text) for text in completions]


async def awaitables_from_a_coroutine(completions, **_):
    return [judge(text) for text in completions]


@pytest.mark.parametrize("function", [whole_batch, one_awaitable_each, awaitables_from_a_coroutine])
def test_the_calls_of_a_batch_are_awaited_together(function):
    start = time.perf_counter()
    assert FunctionSource(function, 3.0)(RESPONSES) == EXPECTED
    assert time.perf_counter() - start < N * SECONDS / 2


def test_a_file_of_a_user_may_hold_one_and_keep_what_belongs_to_a_loop(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(
        "import asyncio\nlocks = []\n"
        "async def reward(completions, **_):\n"
        "    locks.append(asyncio.get_running_loop())\n"
        "    return [len(set(locks)) for _ in completions]\n"
    )
    source = FunctionSource(load_callable(f"{path}:reward", "reward.function"), 3.0)
    assert source(RESPONSES) == source(RESPONSES) == [1.0] * N


def test_the_limit_is_that_of_the_config(make_config, make_models):
    config = make_config(reward={"timeout": 0.01})
    (source,) = load_sources(config, make_models(config), whole_batch)
    with raises_exactly("reward.timeout: the reward function 'whole_batch' gave no answer within 0.01 s", UserError):
        source(RESPONSES)


def test_a_loop_that_already_runs_does_not_matter():
    async def notebook():
        return FunctionSource(one_awaitable_each, 3.0)(RESPONSES)

    assert asyncio.run(notebook()) == EXPECTED


@pytest.mark.parametrize("function", [whole_batch, one_awaitable_each])
def test_the_time_limit_ends_in_one_sentence(function):
    message = f"reward.timeout: the reward function '{function.__name__}' gave no answer within 0.01 s"
    with raises_exactly(message, UserError):
        FunctionSource(function, 0.01)(RESPONSES)


@pytest.mark.parametrize("error", ["ValueError('no judge')", "SystemExit('no judge')"])
def test_a_failure_names_the_line_and_leaves_the_loop_usable(tmp_path, error):
    path = tmp_path / "failing.py"
    path.write_text(
        f"async def judge(n):\n    if n == 3:\n        raise {error}\n    return n\n"
        "async def whole(level, **_):\n    return [await judge(n) for n in level]\n"
        "def each(level, **_):\n    return [judge(n) for n in level]\n"
    )
    kind = error.split("(")[0]
    for name in ("whole", "each"):
        function = load_callable(f"{path}:{name}", "reward.function")
        with raises_exactly(f"the reward function '{name}' failed with {kind}: no judge (failing.py:3)", UserError):
            FunctionSource(function, 3.0)(RESPONSES)
    assert FunctionSource(one_awaitable_each)(RESPONSES) == EXPECTED
