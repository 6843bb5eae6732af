"""A critic on whole returns that learns first gets through a delayed reward sooner. Minutes."""

from pathlib import Path

import pytest

from tests.acceptance.delayed_reward import PLAIN, READY, mean, reached, smooth, train_all


@pytest.mark.slow
def test_value_lam_1_and_a_warm_up_reach_half_of_the_score_in_four_fifths_of_the_updates(tmp_path: Path) -> None:
    plain, ready = (mean(train_all(tmp_path, kind)) for kind in (PLAIN, READY))  # of three seeds
    assert smooth(ready)[-1] > smooth(plain)[-1]
    before, after = (reached(curve, 0.5) for curve in (plain, ready))
    assert before is not None
    assert after is not None
    assert after <= 0.8 * before
