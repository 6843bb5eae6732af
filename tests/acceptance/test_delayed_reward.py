"""A critic on whole returns that learns first: the delayed-reward task in two thirds of the updates. Minutes."""

from pathlib import Path

import pytest

from tests.acceptance.delayed_reward import PLAIN, READY, UPDATES, mean, reached, smooth, train_all


@pytest.mark.slow
def test_value_lam_1_and_a_warm_up_reach_what_plain_gae_does_in_two_thirds_of_the_updates(tmp_path: Path) -> None:
    plain, ready = (mean(train_all(tmp_path, kind)) for kind in (PLAIN, READY))  # of three seeds
    level = smooth(plain)[-1]
    assert level > 0.3  # it learns; 0.13 by chance
    assert smooth(ready)[-1] > level
    number = reached(ready, level)
    assert number is not None
    assert number <= UPDATES * 2 / 3
