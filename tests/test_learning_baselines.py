"""The baselines solve InvertedPendulum from scratch."""

import statistics

import pytest
from learning import inverted_pendulum

import sac_continuous_action as sac
import sql_continuous_action as sql

pytestmark = pytest.mark.slow
SAC = {"policy_lr": 1e-3, "total_timesteps": 6_000}
SQL = {"policy_lr": 1e-3, "q_lr": 1e-3, "reward_scale": 10}


@pytest.mark.parametrize(
    ("script", "settings"), [(sac, SAC), (sql, SQL)], ids=["sac", "sql"]
)
def test_inverted_pendulum_is_solved(script, settings, tmp_path):
    """Most of the last three evaluations reach at least half of the maximum."""
    returns = inverted_pendulum(script, tmp_path, **settings)
    assert statistics.median(returns[-3:]) > 500
