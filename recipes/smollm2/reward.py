"""The reward: JSON with one integer in it is worth 1, the right integer 1 more."""

from ppo_fast.rewards import json_schema, numeric_answer

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


def reward(completions, answer, **_):
    """0, 1 or 2 for each completion."""
    form = json_schema(completions, schema=[SCHEMA] * len(completions))
    right = numeric_answer(completions, answer=answer)
    return [f + f * r for f, r in zip(form, right, strict=True)]
