"""A task from chance to nearly all of the reward in 20 updates."""

from pathlib import Path

from tests.acceptance import good_token


def test_half_the_tokens_are_good_after_10_updates_and_nine_tenths_after_20(tmp_path: Path, seed: int) -> None:
    history = good_token.train(good_token.config(tmp_path / "run", seed)).history
    scores = [metrics["objective/scores"] for metrics in history]
    assert scores[0] < 0.15
    assert scores[9] >= 0.5
    assert scores[19] >= 0.9
    assert max(metrics["rollout/logprob_diff_max"] for metrics in history) <= 2e-5
    assert sum(metrics["value/explained_variance"] for metrics in history[2:12]) / 10 > 0.1
