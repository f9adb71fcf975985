"""What the tests of the robots share: models, states, simulators, rollouts."""

import copy
import math
from functools import cache

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from isaac_tasks import TASKS
from isaac_tasks.mujoco_simulator import MujocoSimulator
from isaac_tasks.task import State

CASES = [(name, variant) for name in TASKS for variant in ("oige", "ige")]


every_task = pytest.mark.parametrize(("name", "variant"), CASES)


RUNNERS = [case for case in CASES if case[0] in ("Ant", "Humanoid")]


every_runner = pytest.mark.parametrize(("name", "variant"), RUNNERS)


# Tests with tables of these three; the others take up each task of TASKS.
FREE = [*RUNNERS, ("Ingenuity", "oige"), ("Ingenuity", "ige")]


every_free_task = pytest.mark.parametrize(("name", "variant"), FREE)


every_variant = pytest.mark.parametrize("variant", ["oige", "ige"])


@cache
def compiled(name, variant):
    """The task and its model, which tests share: copy the model before changing it."""
    task = TASKS[name](variant)
    return task, task.spec().compile()


def quaternion(yaw=0.0, pitch=0.0, roll=0.0):
    """w,x,y,z of the rotation Rz(yaw) Ry(pitch) Rx(roll)."""
    quat = np.zeros(4)
    mujoco.mju_euler2Quat(quat, np.array([yaw, pitch, roll]), "zyx")
    return quat


def make_state(
    task, model, position=(0, 0, 2), quat=(1, 0, 0, 0), velocity=(0,) * 6, **rest
):
    """One environment at a place with a velocity (linear: world axes, angular: body
    axes).

    rest: joints, joint_velocities, sensors, memory; joints default to the middle of
    their range.
    """
    joints, speeds = rest.get("joints"), rest.get("joint_velocities")
    if joints is None:
        joints = model.jnt_range[1:].mean(-1)
    if speeds is None:
        speeds = np.zeros(model.nv - 6)
    sensors = rest.get("sensors", np.zeros(model.nsensordata))
    memory = rest.get("memory", np.zeros(task.memory_dim))
    rows = [*position, *quat, *joints], [*velocity, *speeds], sensors, memory
    return State(*(torch.tensor(np.array([row], dtype=float)) for row in rows))


def random_state(task, model, seed=0, height=5.0):
    """One environment in the air, turned, moving and spinning, joints within ranges."""
    rng = np.random.default_rng(seed)
    low, high = model.jnt_range[1:].T
    quat = rng.normal(size=4)
    return make_state(
        task,
        model,
        (*rng.normal(size=2), height),
        quat / np.linalg.norm(quat),
        2 * rng.normal(size=6),
        joints=rng.uniform(low, high),
        joint_velocities=2 * rng.normal(size=model.nv - 6),
    )


def forward(model, state, ctrl=0.0):
    """MuJoCo's data for the one environment of a state, everything computed."""
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:], data.ctrl[:] = state.qpos[0], state.qvel[0], ctrl
    mujoco.mj_forward(model, data)
    return data


def body_velocity(model, data, body, kind=mujoco.mjtObj.mjOBJ_XBODY, local=False):
    """Linear and angular velocity of a body's frame (XBODY) or mass centre (BODY)."""
    velocity = np.zeros(6)
    mujoco.mj_objectVelocity(model, data, kind, model.body(body).id, velocity, local)
    return velocity[3:], velocity[:3]


def without_contacts(model):
    model = copy.copy(model)
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT.value
    return model


def zero_action(task):
    return torch.zeros(1, task.act_dim, dtype=torch.float64)


def random_action(task, n=1, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = n, task.act_dim
    unit = torch.rand(shape, dtype=torch.float64, generator=generator)
    return scale * (2 * unit - 1)


def distance(model, data, one, other):
    """Between the first geoms of two bodies; negative where they overlap."""
    geoms = [model.body(body).geomadr[0] for body in (one, other)]
    return mujoco.mj_geomDistance(model, data, *geoms, 1.0, None)


def terms(task, model, action=None, moved=(0, 0), **after):
    """The reward's terms after a move by (x, y) m to the state `after`; the reward."""
    after = make_state(task, model, **after)
    before = after.clone()
    before.qpos[:, :2] -= torch.tensor(moved)
    action = zero_action(task) if action is None else action
    rows = task.reward_terms(before, after, action)
    values = {key: row.item() for key, row in rows.items()}
    reward = task.reward(before, after, action).item()
    if not task.failed(after):
        assert_allclose(reward, sum(values.values()))
    return values, reward


def make_simulator(name, variant, num_envs=4, seed=0, **kwargs):
    """After its first reset; helicopters are high enough to fly blindly for 1 s."""
    simulator = MujocoSimulator(TASKS[name], num_envs, seed, variant=variant, **kwargs)
    simulator.reset()
    if name == "Ingenuity":
        simulator.physics.qpos[:, 2] = 4
    return simulator


def actions(simulator, steps, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        random = torch.rand(simulator.num_envs, simulator.act_dim, generator=generator)
        yield scale * (2 * random - 1)


def near_the_end(simulator):
    """Time-outs follow in all environments, one after the other."""
    steps_left = 3 + 2 * torch.arange(simulator.num_envs)
    simulator.progress[:] = simulator.max_steps - steps_left


def rollout(simulator, steps=12):
    """All outputs of random steps, stacked: five tensors (steps, N, ...)."""
    rows = [simulator.step(action) for action in actions(simulator, steps)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_uniform(x, low, high):
    """Samples in [low, high], with the quantiles of the uniform distribution."""
    x, width = x.flatten().numpy(), high - low
    assert low <= x.min() < low + 0.01 * width
    assert high - 0.01 * width < x.max() <= high
    error = 5 * 0.5 / math.sqrt(len(x))  # five standard deviations
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs((x < low + quantile * width).mean() - quantile) < error


each_start = pytest.mark.parametrize("start", ["reset", "step"])


def start_everywhere(name, variant, start):
    """2000 environments in the first state of an episode: by a reset, or in a step."""
    simulator = MujocoSimulator(TASKS[name], 2000, 0, variant=variant, threads=2)
    simulator.reset()
    if start == "step":
        simulator.progress[:] = simulator.max_steps - 1
        simulator.step(torch.zeros(2000, simulator.act_dim))
    assert (simulator.progress == 0).all()
    return simulator
