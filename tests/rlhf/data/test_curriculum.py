"""The order of prompts within an epoch."""

import pytest
import torch

from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.config.ppo import DataConfig
from ppo_fast.rlhf.data.curriculum import make_arrangement
from ppo_fast.rlhf.data.prompts import Prompts, PromptSampler
from tests.helpers import raises_exactly


def made(**columns):
    count = len(next(iter(columns.values())))
    return Prompts([f"w{n}" for n in range(count)], [[5]] * count, columns, 0)


def epochs(data, count, *, shuffle=True, **config):
    """The first `count` batches of the length of the data's epoch as arranged."""
    arrange = make_arrangement(data, DataConfig(**config))
    sampler = PromptSampler(len(data.prompts), torch.Generator().manual_seed(0), shuffle=shuffle, arrange=arrange)
    length = len(arrange(list(range(len(data.prompts)))))
    return [sampler.take(length) for _ in range(count)]


def test_easy_prompts_come_first_and_equals_in_a_new_order_every_epoch():
    level = [2, 0, 1, 0, 2, 1, 0, 2]
    first, second = epochs(made(level=level), 2, order="level")
    assert [level[row] for row in first] == [level[row] for row in second] == sorted(level)
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_without_a_shuffle_equals_come_as_in_the_file():
    assert epochs(made(level=[1, 0, 1, 0]), 1, shuffle=False, order="level") == [[1, 3, 0, 2]]


def test_the_difficulty_may_be_a_function(tmp_path):
    path = tmp_path / "order.py"
    path.write_text(
        "def hardest_last(prompts, level):\n    while level:\n        prompts.pop()\n        yield -level.pop(0)\n"
    )
    data = made(level=[1, 3, 2])
    assert epochs(data, 1, order=f"{path}:hardest_last") == [[1, 2, 0]]
    assert (data.prompts, data.columns) == (["w0", "w1", "w2"], {"level": [1, 3, 2]})


def test_topics_are_dealt_out_in_turn_and_the_small_ones_start_over():
    topics = ["a", "a", "a", "b", "c", "c"]
    (rows,) = epochs(made(topic=topics), 1, balance="topic")
    assert {topics[row] for row in rows[:3]} == {"a", "b", "c"}
    assert [topics[row] for row in rows[:3]] == [topics[row] for row in rows[3:6]] == [topics[row] for row in rows[6:]]
    assert {row for row in rows if topics[row] == "a"} == {0, 1, 2}
    assert rows.count(3) == 3
    assert epochs(made(topic=topics), 1, shuffle=False, balance="topic") == [[0, 3, 4, 1, 3, 5, 2, 3, 4]]


def test_order_and_balance_go_together():
    data = made(topic=["a", "b", "a", "b"], level=[2, 1, 1, 2])
    assert epochs(data, 1, shuffle=False, order="level", balance="topic") == [[1, 2, 3, 0]]


def test_topics_may_be_lists():
    (rows,) = epochs(made(topic=[["x"], ["y"], ["x"]]), 1, shuffle=False, balance="topic")
    assert rows == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"balance": "subject"}, "data.balance: expected a column of the prompts (topic), got 'subject'"),
        ({"order": "level"}, "data.order: expected a column of the prompts (topic), got 'level'"),
        ({"order": "topic"}, "data.order: expected a finite number for prompt 0, got 'a'"),
    ],
)
def test_a_column_that_cannot_serve_is_named(config, message):
    with raises_exactly(message, UserError):
        make_arrangement(made(topic=["a", "b"]), DataConfig(**config))


def test_the_answer_of_the_function_is_checked(tmp_path):
    path = tmp_path / "order.py"
    path.write_text("def short(prompts, **_):\n    return [1.0]\ndef broken(prompts, **_):\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"^data\.order function: expected 2 numbers, got 1$"):
        make_arrangement(made(topic=["a", "b"]), DataConfig(order=f"{path}:short"))
    with pytest.raises(UserError, match=r"^the data\.order function 'broken' failed with ZeroDivisionError: .*:4\)$"):
        make_arrangement(made(topic=["a", "b"]), DataConfig(order=f"{path}:broken"))
