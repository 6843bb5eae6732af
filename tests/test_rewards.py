"""The ready rewards under ugly completions, and as a run loads them."""

import sys

import pytest

from ppo_fast import rewards
from ppo_fast.rlhf.errors import UserError
from tests.helpers import raises_exactly


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("it is 42.", 42),
        ("10-3", 3),
        ("x = -7", -7),
        ("1,234,567.5 dollars", 1234567.5),
        ("1,23", 23),
        ("6.02e23 of them", 6.02e23),
        ("1e999", None),
        ("9" * 5000, None),
        (".5", 0.5),
        ("3/4 or 1/0", None),
        (r"\dfrac{-1}{4}", -0.25),
        ("version2 and H2O", None),
        ("\u0663", 3),  # a digit of another script
    ],
)
def test_the_last_number(text, number):
    assert rewards.last_number(text) == number


def test_answers_that_differ_by_rounding_are_the_same_and_neighbors_are_not():
    found = rewards.numeric_answer(["0.30000000000000004", "123456789", "-0"], answer=[0.3, 123456790, 0])
    assert found == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "content"),
    [(r"\boxed{a{b}c}", "a{b}c"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed{}", ""), ("}{", None)],
)
def test_the_last_box_that_closes(text, content):
    assert rewards.boxed(text) == content


@pytest.mark.parametrize("text", ["NaN", "[" * 100_000, "", "```json\n{\n```", '{"a": 1} and more'])
def test_what_is_no_json_has_no_reward(text):
    assert rewards.json_schema([text]) == [0.0]


def test_a_schema_may_be_text_and_a_wrong_one_is_named():
    assert rewards.json_schema(["3", "3.5"], ['{"type": "integer"}'] * 2) == [1.0, 0.0]
    problems = {"{": "Expecting property name", '["x"]': "['x'] is not of type 'object', 'boolean'"}
    for schema, problem in problems.items():
        expected = f"json_schema: expected a JSON schema in the column 'schema', got {schema!r}: {problem}"
        with pytest.raises(UserError) as error:
            rewards.json_schema(["3"], [schema])
        assert str(error.value).startswith(expected)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    expected = "this command needs jsonschema, which is not installed: pip install jsonschema"
    with raises_exactly(expected, UserError):
        rewards.json_schema(["3"], [{"type": "integer"}])
