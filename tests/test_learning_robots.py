"""MEow in many environments solves InvertedPendulum from scratch."""

import statistics

import gymnasium
import mujoco
import pytest
import torch
from learning import evaluations

import isaac_tasks
import meow_isaacgym
from isaac_tasks.task import State, Task

pytestmark = pytest.mark.slow


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
    """The same on 16 environments with two updates per step; with that sign flipped
    it got 109.
    """
    monkeypatch.setitem(isaac_tasks.TASKS, "Pendulum", Pendulum)
    settings = dict(
        env_id="Pendulum", total_timesteps=2_000, num_envs=16, updates_per_step=2
    )
    returns = evaluations(meow_isaacgym, tmp_path, eval_frequency=500, **settings)
    assert statistics.median(returns[-3:]) > 500
