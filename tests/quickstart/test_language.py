"""The language of the quickstart: what it generates it recognizes, and the score is what its sentence says."""

import random

import pytest

from ppo_fast.quickstart import language


def test_every_sample_is_valid_and_no_longer_than_stated() -> None:
    rng = random.Random(0)
    samples = [language.sample(rng) for _ in range(2000)]
    assert all(map(language.is_valid, samples))
    assert max(len(text.split()) for text in samples) == language.MAX_WORDS


def test_samples_use_every_word_and_no_other() -> None:
    rng = random.Random(0)
    assert {word for _ in range(5000) for word in language.sample(rng).split()} == set(language.words())


def test_samples_turn_their_tone_at_but_and_nowhere_else() -> None:
    rng = random.Random(0)
    for _ in range(500):
        halves = [half.split() for half in language.sample(rng).split(" but ")]
        warm = [any(word in language.WARM_WORDS for word in half) for half in halves]
        cold = [any(word in language.COLD_WORDS for word in half) for half in halves]
        assert warm == [not c for c in cold]
        assert len(set(warm)) == len(halves)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("the soup was fresh .", 1),
        ("the soup was stale .", -1),
        ("the soup was fresh but the waiter was rude .", 0),
        ("the soup was fresh but the waiter was kind .", 2),
        ("a kind waiter served us fresh soup , we loved the cake and the room was cosy .", 4),
        ("the soup was fresh", -3),
        ("the soup was fresh ,", -3),
        ("the soup were fresh .", -3),
        ("the soup was kind .", -3),
        ("fresh fresh fresh fresh .", -3),
        ("the soup was fresh . the soup was fresh .", -3),
        ("", -3),
    ],
)
def test_score_is_warm_minus_cold_or_minus_three(text: str, score: float) -> None:
    assert language.score(text) == score


def test_reward_judges_the_prompt_with_its_completion() -> None:
    answer = language.reward(
        ["the soup was", "the soup was"], ["fresh .", "fresh"], completion_ids=[[], []], topic=["a"]
    )
    assert answer == [1.0, -3.0]


def test_prompts_are_beginnings_that_leave_something_to_write() -> None:
    prompts = language.sample_prompts(500, random.Random(0), longest=9)
    assert {len(prompt.split()) for prompt in prompts} == set(range(1, 10))
    assert not any("." in prompt for prompt in prompts)
