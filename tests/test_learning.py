"""MEow learns: it solves InvertedPendulum from scratch, in one environment and in many."""

import csv
import statistics

import gymnasium
import mujoco
import torch

import isaac_tasks
import meow_continuous_action
import meow_isaacgym
from isaac_tasks.task import State, Task


def evaluations(script, **settings) -> list[float]:
    """Mean returns of the evaluations of a run."""
    run = script.train(script.Args(**settings, eval_episodes=5, checkpoint_frequency=0))
    with open(run["run_dir"] + "/metrics.csv") as f:
        return [float(r["value"]) for r in csv.DictReader(f) if r["name"] == "eval/return_mean"]


def test_inverted_pendulum_is_solved(tmp_path):
    """Most of the last eight evaluations reach the maximum, 1,000; a random policy gets 5.

    With the sign of the soft value in the target flipped, their median was 39.
    """
    returns = evaluations(
        meow_continuous_action,
        env_id="InvertedPendulum-v4",
        total_timesteps=8_000,
        learning_starts=500,
        batch_size=128,
        tau=0.02,
        eval_frequency=500,
        runs_dir=str(tmp_path),
    )
    assert statistics.median(returns[-8:]) > 900


class Pendulum(Task):
    """Gymnasium's InvertedPendulum as a task of many environments."""

    obs_dim, act_dim, episode_length = 4, 1, 1001
    time_step, substeps = 0.02, 2

    def spec(self) -> mujoco.MjSpec:
        assets = f"{gymnasium.__path__[0]}/envs/mujoco/assets"
        spec = mujoco.MjSpec.from_file(f"{assets}/inverted_pendulum.xml")
        self.set_options(spec)
        return spec

    def control(self, action):
        return 3 * action

    def initial(self, uniform):
        qpos, qvel = uniform(-0.01, 0.01, 2), uniform(-0.01, 0.01, 2)
        return State(qpos, qvel, qpos[:, :0], qpos[:, :0])

    def observe(self, state, _action):
        return torch.cat([state.qpos, state.qvel], -1)

    def reward_terms(self, _before, state, _action):
        return {"alive": torch.ones_like(state.qpos[:, 0])}

    def failed(self, state):
        return state.qpos[:, 1].abs() > 0.2


def test_many_inverted_pendulums_are_solved(tmp_path, monkeypatch):
    """The same on 16 environments with two updates per step: the last six evaluations.

    With the sign of the soft value in the target flipped, their median was 76.
    """
    monkeypatch.setitem(isaac_tasks.TASKS, "Pendulum", Pendulum)
    returns = evaluations(
        meow_isaacgym,
        env_id="Pendulum",
        num_envs=16,
        updates_per_step=2,
        total_timesteps=3_500,
        batch_size=128,
        tau=0.02,
        eval_frequency=250,
        runs_dir=str(tmp_path),
    )
    assert statistics.median(returns[-6:]) > 900
