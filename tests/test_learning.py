"""MEow learns: it solves InvertedPendulum-v4 from scratch in about a minute."""

import meow_continuous_action as meow
from meow_continuous_action import Args


def test_inverted_pendulum_is_solved(tmp_path):
    """The final policy balances for nearly all of the 1,000 steps; a random one falls after 5."""
    args = Args(
        env_id="InvertedPendulum-v4",
        total_timesteps=6_000,
        learning_starts=500,
        batch_size=128,
        eval_frequency=2_000,
        eval_episodes=5,
        checkpoint_frequency=0,
        compile=False,
        runs_dir=str(tmp_path),
    )
    assert meow.train(args)["return_mean"] > 900
