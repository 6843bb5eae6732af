"""Signs of reward hacking: told once, only when they are there, and across a resumed run."""

import json

import pytest

from ppo_fast.rlhf.ppo.reward_hacking import RULES, WINDOW, RewardHackingMonitor

# Metric: at the start, healthy later, hacked later.
RUNS = {
    "objective/kl": (0.5, 6.0, 14.0),
    "hacking/repetition": (0.1, 0.2, 0.6),
    "hacking/distinct_n": (0.8, 0.5, 0.1),
    "hacking/length_reward_corr": (0.2, 0.5, 0.95),
    "hacking/ensemble_std": (0.3, 0.5, 0.9),
}


def warnings(monitors, metric, *values):
    return [warning for value in values for warning in monitors.update({metric: value})]


def test_every_sign_has_a_run():
    assert {sign.metric for sign in RULES} == RUNS.keys()


@pytest.mark.parametrize("sign", RULES, ids=lambda sign: sign.metric)
def test_a_sign_is_told_once_with_its_remedy(sign):
    start, healthy, hacked = RUNS[sign.metric]
    monitors = RewardHackingMonitor()
    assert warnings(monitors, sign.metric, *[start] * WINDOW, *[healthy] * 3 * WINDOW) == []
    (told,) = warnings(monitors, sign.metric, *[hacked] * 2 * WINDOW)
    assert told.startswith(f"sign of reward hacking: {sign.meaning} ({sign.metric} ")
    assert told.endswith(f"at the start {start:.3g}); {sign.remedy}")
    assert warnings(monitors, sign.metric, *[hacked] * WINDOW) == []


@pytest.mark.parametrize("metric", RUNS)
def test_what_was_so_from_the_start_is_no_sign(metric):
    assert warnings(RewardHackingMonitor(), metric, *[RUNS[metric][2]] * 4 * WINDOW) == []


def test_one_update_alone_is_no_sign():
    assert warnings(RewardHackingMonitor(), "hacking/repetition", *[0.1] * 2 * WINDOW, 0.9, *[0.1] * WINDOW) == []


def test_a_metric_that_is_not_measured_is_not_watched():
    assert RewardHackingMonitor().update({"objective/scores": 1.0}) == []


def test_monitors_go_on_where_they_were():
    values = [0.1] * WINDOW + [0.6] * (WINDOW - 1)
    monitors, resumed = RewardHackingMonitor(), RewardHackingMonitor()
    warnings(monitors, "hacking/repetition", *values)
    resumed.load_state_dict(json.loads(json.dumps(monitors.state_dict())))
    assert len(warnings(resumed, "hacking/repetition", 0.6)) == 1
    told = RewardHackingMonitor()
    told.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert warnings(told, "hacking/repetition", *[0.6] * WINDOW) == []
