"""Anymal: the robot, its drives, observations, rewards and episodes.

Expected numbers are those of the original tasks or follow from them by hand.
"""

import math

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from robot_stress import stress
from robots import every_variant

from isaac_tasks.anymal import Anymal
from isaac_tasks.mujoco_simulator import MujocoSimulator
from isaac_tasks.physics import CpuPhysics, WarpPhysics
from isaac_tasks.task import State

LEGS = {"LF": (1, 1), "LH": (-1, 1), "RF": (1, -1), "RH": (-1, -1)}
POSE = np.array([[0.03 * y, 0.4 * x, -0.8 * x] for x, y in LEGS.values()]).ravel()
HAA = {1: (-0.72, 0.49), -1: (-0.49, 0.72)}
SWING = (-9.42478, 9.42478)
LIMITS = np.array([row for _, y in LEGS.values() for row in (HAA[y], SWING, SWING)])


def make_simulator(variant="oige", num_envs=4, seed=0):
    simulator = MujocoSimulator(Anymal, num_envs, seed, variant=variant)
    simulator.reset()
    return simulator


def forward(variant="ige", joints=POSE, height=1.0):
    model = Anymal(variant).spec().compile()
    data = mujoco.MjData(model)
    data.qpos[2], data.qpos[7:] = height, joints
    mujoco.mj_forward(model, data)
    return model, data


# --- Robot ---


def test_bodies():
    model, data = forward(joints=np.zeros(12))
    assert sum(model.body_mass) == pytest.approx(52.135, abs=0.003)
    rows = {
        "HIP": (2.781, (0.2999, 0.104, 0), (0.0567, 0.0174, -0.0005)),
        "THIGH": (3.071, (0.3598, 0.18781, 0), (0, 0.0308, -0.2457)),
        "SHANK": (0.588, (0.3598, 0.28811, -0.285), (0.0613, 0.0055, -0.0807)),
    }
    for leg, (x, y) in LEGS.items():
        mirror = np.array([x, y, 1])
        for part, (mass, place, centre) in rows.items():
            body = data.body(f"{leg}_{part}")
            assert model.body(body.id).mass == mass
            assert_allclose(body.xpos - (0, 0, 1), mirror * place, atol=1e-12)
            assert_allclose(body.xipos - body.xpos, mirror * centre, atol=1e-12)
        foot = data.geom(f"{leg}_FOOT").xpos - (0, 0, 1)
        assert_allclose(foot, mirror * (0.44775, 0.30116, -0.60047), atol=1e-9)


@pytest.mark.parametrize(("leg", "side"), LEGS.items())
def test_inertia(leg, side):
    """Tensors about the centres of mass; their products change signs with the side."""
    model, _ = forward()
    x, y = side
    for name, moments, products in (
        (f"{leg}_HIP", (0.00330, 0.00494, 0.00583), (0, 0, 0)),
        (f"{leg}_THIGH", (0.02990, 0.02956, 0.00486), (0, 0, 0.00414 * y)),
        (f"{leg}_SHANK", (0.00881, 0.01016, 0.00155), (0, 0.00182 * x, 0)),
        ("base", (0.2167, 1.7852, 1.8337), (0.0092, 0.0589, -0.0002)),
    ):
        body, axes = model.body(name), np.zeros(9)
        mujoco.mju_quat2Mat(axes, body.iquat)
        axes = axes.reshape(3, 3)
        expected = np.diag(np.array(moments, dtype=float))
        for (i, j), product in zip(((0, 1), (0, 2), (1, 2)), products, strict=True):
            expected[i, j] = expected[j, i] = product
        assert_allclose(axes @ np.diag(body.inertia) @ axes.T, expected, atol=1e-9)


def test_joints():
    model, data = forward(joints=np.zeros(12))
    names = [f"{leg}_{part}" for leg in LEGS for part in ("HIP", "THIGH", "SHANK")]
    assert [model.joint(i).name for i in range(1, 13)] == names
    assert_allclose(model.jnt_range[1:], LIMITS, atol=1e-5)
    assert_allclose(data.xaxis[1:], 4 * [(1, 0, 0), (0, 1, 0), (0, 1, 0)], atol=1e-12)
    assert (model.dof_armature == 0).all()
    assert (model.dof_damping == 0).all()


def test_default_pose():
    """The lowest points of the feet lie 0.543 m below the base."""
    _, data = forward()
    for leg in LEGS:
        assert data.geom(f"{leg}_FOOT").xpos[2] - 0.03 == pytest.approx(
            1 - 0.543, abs=0.001
        )


def test_only_the_floor_is_touched():
    """Folded legs pass through each other and the base."""
    _, data = forward(joints=np.tile([0.3, 2.5, 2.5], 4))
    assert data.ncon == 0
    _, data = forward(height=0.5)
    assert data.ncon >= 4


@pytest.mark.slow
@every_variant
def test_zero_action_stands(variant):
    """For six seconds: no fall, and hardly any creep."""
    simulator = make_simulator(variant, 4)
    simulator.memory[:, :3] = 0
    for step in range(300):
        _, reward, terminated, truncated, _ = simulator.step(torch.zeros(4, 12))
        assert not (terminated | truncated).any()
        if step == 100:
            place = simulator.physics.qpos.clone()
    assert (abs(simulator.physics.qpos - place)[:, :3] < 0.01).all()
    # ige's drives give way under the weight.
    assert (simulator.physics.qpos[:, 2] > 0.49).all()
    assert (reward > (0.024 if variant == "oige" else 0.025)).all()


def test_steps_of_the_target_add_up():
    """oige: 0.225 rad a step, within the limits; another episode starts at the pose."""
    simulator = make_simulator("oige", 2)
    action = torch.zeros(2, 12)
    action[0, 0] = 1
    for target in (0.03 + 0.225, 0.03 + 0.45, 0.49, 0.49):
        simulator.step(action)
        assert simulator.physics.ctrl[0, 0] == pytest.approx(target)
    assert_allclose(simulator.physics.ctrl[1], POSE)
    simulator.progress[:] = simulator.max_steps - 1
    simulator.step(action)
    simulator.step(action)
    assert simulator.physics.ctrl[0, 0] == pytest.approx(0.03 + 0.225)


def test_target_follows_the_action():
    """ige: half a radian from the pose at most; torques are limited to 80 N m."""
    simulator = make_simulator("ige", 2)
    for a in (1.0, -0.4):
        simulator.step(torch.full((2, 12), a))
        target = np.tile(POSE + 0.5 * a, (2, 1))
        assert_allclose(simulator.physics.ctrl, target, atol=1e-6)
    assert (simulator.model.actuator_forcerange == [-80, 80]).all()


def trot(time, speed, period=0.4):
    """Joints (worlds, 12) at a time, s: diagonal legs bend and swing in turn.

    speed (worlds,).

    """
    phase = 2 * np.pi * (time / period + np.array([0, 0.5, 0.5, 0]))
    forwards = speed[:, None] * period / 4 * np.cos(phase)  # of the foot, m
    knee = -0.4 * np.array([x for x, _ in LEGS.values()]) * (-np.sin(phase)).clip(0)
    hip = -knee / 2 - forwards / 0.543  # the leg's length, m
    return POSE + np.stack(np.broadcast_arrays(0, hip, knee), -1).reshape(-1, 12)


@pytest.mark.slow
def test_a_scripted_trot_follows_the_command():
    """oige: forwards, on the spot and backwards for six seconds, without a fall.

    At two thirds of the command; standing would be worth
    50 (exp(-0.8^2 / 0.25) + 0.5) = 29 in an episode.

    """
    simulator, speed, target = make_simulator("oige", 3), np.array([0.8, 0, -0.8]), POSE
    simulator.memory[:, :3], simulator.memory[:, 0] = 0, torch.tensor(speed)
    rewards = []
    for step in range(1, 301):
        faster = speed * min(1, 0.02 * step)
        now, soon = trot(0.02 * step, faster), trot(0.02 * (step + 1), faster)
        ahead = now + 0.1 * (soon - now) / 0.02  # drives lag by 0.1 s
        action = ((ahead - target) / 0.225).clip(-1, 1)
        target = target + 0.225 * action
        _, reward, terminated, _, _ = simulator.step(torch.tensor(action))
        assert not terminated.any()
        rewards.append(reward)
        if step == 100:
            place = simulator.physics.qpos.clone()
    x, y = ((simulator.physics.qpos - place)[:, :2] / 4).T  # m/s
    assert_allclose(x, 0.67 * speed, atol=0.1)
    assert (abs(y) < 0.1).all()
    assert (3000 * torch.stack(rewards[100:]).mean(0) > 35).all()


# --- Observation and reward ---


def random_state(task, n=200):
    rng = np.random.default_rng(0)
    quat = rng.normal(size=(n, 4))
    qpos = np.concatenate(
        [
            rng.normal(size=(n, 2)),
            rng.uniform(0.4, 0.7, (n, 1)),
            quat / np.linalg.norm(quat, axis=1, keepdims=True),
            POSE + rng.normal(size=(n, 12)) * 0.25,
        ],
        axis=1,
    )
    qvel = rng.normal(size=(n, 18)) * 0.7
    memory = rng.uniform(-1, 1, (n, task.memory_dim))
    sensors = np.zeros((n, 0))
    if task.variant == "ige":
        sensors = rng.normal(size=(n, 15)) * 0.5
    action = rng.uniform(-1, 1, (n, 12))
    state = State(*map(torch.from_numpy, (qpos, qvel, sensors, memory)))
    return state, torch.from_numpy(action)


def rotate(quat, vector):
    """By quaternions w,x,y,z: v + 2 u x (u x v + w v)."""
    w, u = quat[:, :1], quat[:, 1:]
    return vector + 2 * np.cross(u, np.cross(u, vector) + w * vector)


@every_variant
def test_observations(variant):
    task = Anymal(variant)
    state, action = random_state(task)
    qpos, qvel = state.qpos.numpy(), state.qvel.numpy()
    command = state.memory.numpy()[:, :3]
    quat = qpos[:, 3:7]
    inverse = quat * [1, -1, -1, -1]
    gravity = rotate(quat, np.tile([0.0, 0, -1], (len(quat), 1)))
    expected = [2 * rotate(inverse, qvel[:, :3]), 0.25 * qvel[:, 3:6], gravity]
    expected += [
        command * [2, 2, 0.25],
        qpos[:, 7:] - POSE,
        0.05 * qvel[:, 6:],
        action.numpy(),
    ]
    assert_allclose(task.observe(state, action), np.concatenate(expected, 1), atol=1e-9)
    assert task.clip_obs == 5
    assert task.obs_dim == 48


@every_variant
def test_rewards(variant):
    task = Anymal(variant)
    state, action = random_state(task)
    before, _ = random_state(task)
    before.qvel = before.qvel * 0.3 + 0.1
    memory = state.memory
    if variant == "oige":
        memory[:, 39] = (torch.arange(len(memory)) % 2).double()
    a, command, quat = action.numpy(), memory.numpy()[:, :3], state.qpos.numpy()[:, 3:7]
    v = rotate(quat * [1, -1, -1, -1], state.qvel.numpy()[:, :3])
    joints, speeds = state.qpos.numpy()[:, 7:], state.qvel.numpy()[:, 6:]
    e_xy = (command[:, 0] - v[:, 0]) ** 2 + (command[:, 1] - v[:, 1]) ** 2
    e_yaw = (command[:, 2] - state.qvel.numpy()[:, 5]) ** 2
    expected = np.exp(-e_xy / 0.25) + 0.5 * np.exp(-e_yaw / 0.25)
    if variant == "ige":
        torque = np.clip(85 * (POSE + 0.5 * a - joints) - 2 * speeds, -80, 80)
        expected = np.maximum(0, 0.02 * (expected - 2.5e-5 * (torque**2).sum(1)))
    else:
        earlier = before.qvel.numpy()[:, 6:] * memory.numpy()[:, 39:]
        expected -= 0.03 * v[:, 2] ** 2 + 0.0003 * ((earlier - speeds) ** 2).sum(1)
        expected -= 0.006 * ((memory.numpy()[:, 27:39] - a) ** 2).sum(1)
        expected -= 0.06 * abs(joints - POSE)[:, [0, 3, 6, 9]].sum(1)
        expected = np.maximum(0, expected / 60)
        expected[state.qpos.numpy()[:, 2] < 0.51] = -1
        assert (expected == -1).any()
    assert (expected == 0).any()
    assert (expected > 0).sum() > 20
    assert_allclose(task.reward(before, state, action), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "command", "expected"),
    [
        ("ige", (0, 0, 0), 0.03),
        ("oige", (0, 0, 0), 0.025),
        ("ige", (1, 0, 0), 0.02 * (math.exp(-4) + 0.5)),
    ],
)
def test_reward_of_standing_still(variant, command, expected):
    """In the default pose with zero action: tracking perfectly, or not."""
    task = Anymal(variant)
    qpos = torch.tensor([[0, 0, 0.55, 1, 0, 0, 0, *POSE]], dtype=torch.float64)
    memory = torch.zeros(1, task.memory_dim, dtype=torch.float64)
    memory[0, :3] = torch.tensor(command)
    state = State(qpos, qpos.new_zeros(1, 18), qpos.new_zeros(1, 15), memory)
    reward = task.reward(state, state, qpos.new_zeros(1, 12))
    assert reward.item() == pytest.approx(expected, abs=1e-9)


def test_last_action_and_velocities_of_the_reward():
    """oige: those of the step before in this episode, 0 in its first step."""
    seen = []

    class Watched(Anymal):
        def reward_terms(self, before, state, action):
            seen.append((state.memory.clone(), before.qvel.clone()))
            return super().reward_terms(before, state, action)

    simulator = MujocoSimulator(Watched, 2, 0)
    simulator.reset()
    actions = torch.rand(4, 2, 12, generator=torch.Generator().manual_seed(0)) * 0.1
    for i, action in enumerate(actions):
        if i == 3:
            simulator.progress[1] = 0
            simulator.memory[1, 15:] = 0
        speeds = simulator.physics.qvel.clone()
        simulator.step(action)
        memory, before = seen[-1]
        assert torch.equal(before, speeds)
        last = actions[i - 1].double() if i else torch.zeros(2, 12).double()
        later = torch.full((2,), float(i > 0)).double()
        if i == 3:
            last[1], later[1] = 0, 0
        assert torch.equal(memory[:, 27:39], last)
        assert torch.equal(memory[:, 39], later)


# --- Episodes ---


@every_variant
@pytest.mark.parametrize("by", ["reset", "step"])
def test_first_states(variant, by):
    simulator = make_simulator(variant, 2000)
    if by == "step":
        simulator.progress[:] = simulator.max_steps - 1
        simulator.step(torch.zeros(2000, 12))
    qpos, qvel = simulator.physics.qpos.numpy(), simulator.physics.qvel.numpy()
    assert_allclose(qpos[:, :7], np.tile([0, 0, 0.62, 1, 0, 0, 0], (2000, 1)))
    assert (qvel[:, :6] == 0).all()
    assert_uniform(qvel[:, 6:], -0.1, 0.1)
    assert abs(np.tril(np.corrcoef(qvel[:, 6:].T), -1)).max() < 0.15
    for i, most in enumerate((2, 1, 1)):
        assert_uniform(simulator.memory.numpy()[:, i], -most, most)
    if variant == "ige":
        assert_uniform(qpos[:, 7:] / POSE, 0.5, 1.5)
    else:
        assert_allclose(qpos[:, 7:], np.tile(POSE, (2000, 1)))
        assert_allclose(simulator.memory[:, 3:15], qpos[:, 7:])
        assert (simulator.memory[:, 15:] == 0).all()


def assert_uniform(x, low, high):
    """Columns of samples in [low, high], each with a uniform distribution's median."""
    width = high - low
    assert low <= x.min() < low + 0.01 * width
    assert high - 0.01 * width < x.max() <= high
    error = 5 * 0.5 / math.sqrt(len(x))  # five standard deviations
    assert (abs((x < low + 0.5 * width).mean(0) - 0.5) < error).all()


@every_variant
def test_command_is_fixed_for_an_episode(variant):
    simulator = make_simulator(variant, 3)
    command = simulator.memory[:, :3].clone()
    simulator.progress[1] = simulator.max_steps - 2
    for _ in range(2):
        simulator.step(torch.zeros(3, 12))
    assert torch.equal(simulator.memory[[0, 2], :3], command[[0, 2]])
    assert (simulator.memory[1, :3] != command[1]).all()


@every_variant
def test_a_lying_robot_has_fallen(variant):
    """ige: base and thighs on the ground; oige: too low, with reward -1."""
    simulator = make_simulator(variant, 2)
    simulator.step(torch.zeros(2, 12))
    quat = torch.tensor([0, 1.0, 0, 0])  # on its back, falling
    simulator.physics.qpos[1, 2:7] = torch.cat([torch.tensor([0.35]), quat])
    terminated = torch.zeros(2, dtype=torch.bool)
    for _ in range(25):
        _, reward, terminated, truncated, _ = simulator.step(torch.zeros(2, 12))
        if terminated.any():
            break
    assert terminated.tolist() == [False, True]
    assert not truncated.any()
    assert reward[1] == -1 if variant == "oige" else reward[1] >= 0


@pytest.mark.parametrize("part", ["base", "LF_THIGH", "RH_THIGH", "RF_SHANK"])
def test_contacts_that_end_an_episode(part):
    """ige: the force on the base and on each thigh, not on shanks and feet."""
    simulator = make_simulator("ige", 1)
    model, data = simulator.model, simulator.physics.data(0)
    names = ["base", "LF_THIGH", "LH_THIGH", "RF_THIGH", "RH_THIGH"]
    assert [model.body(model.sensor_objid[i]).name for i in range(5)] == names
    data.qpos[2] = 5
    mujoco.mj_forward(model, data)
    lowest = data.body(part).xpos[2] - 5
    others = model.geom_bodyid[model.pair_geom2] != model.body(part).id
    model.pair_margin[others] = -100  # a floor that only this body reaches
    data.qpos[2] = -lowest
    mujoco.mj_forward(model, data)
    forces = torch.from_numpy(data.sensordata.reshape(1, 15).copy())
    touched = (forces.unflatten(-1, (5, 3)).norm(dim=-1) > 1)[0].tolist()
    assert touched == [name == part for name in names]
    state = State(torch.zeros(1, 19), torch.zeros(1, 18), forces, torch.zeros(1, 3))
    assert simulator.task.failed(state).item() == (part in names)
    for newtons in (0.9, 1.1):
        state.sensors = torch.zeros(1, 15)
        state.sensors[0, [3 * names.index(part if part in names else "base")]] = newtons
        assert simulator.task.failed(state).item() == (newtons > 1)


@pytest.mark.parametrize(("variant", "last"), [("oige", 2999), ("ige", 2499)])
def test_time_out(variant, last):
    simulator = make_simulator(variant, 2)
    simulator.progress[1] = last - 1
    _, _, terminated, truncated, _ = simulator.step(torch.zeros(2, 12))
    assert truncated.tolist() == [False, True]
    assert not terminated.any()
    assert simulator.progress.tolist() == [1, 0]


# --- Physics ---


@pytest.mark.slow
@every_variant
def test_stress(variant):
    """sqrt(k / I) of the joints is 6 to 70 rad/s."""

    def check(simulator, _step):
        assert (simulator.physics.qpos[:, 2] > 0.05).all()
        assert (simulator.physics.qvel[:, 6:].abs() <= 20).all()

    stress("Anymal", variant, check)


@pytest.mark.slow
@every_variant
def test_warp_agrees_with_mujoco(variant):
    """One step on Warp's CPU device: standing, and in the air. Its kernels compile."""
    simulator = make_simulator(variant, 4)
    task, model = simulator.task, simulator.model
    for _ in range(20):
        simulator.step(torch.zeros(4, 12))
    simulator.physics.qpos[2:, 2] += 0.3
    state = simulator.physics.state_dict()
    state["qvel"][:, 6:] += 0.5
    cpu = CpuPhysics(model, 4, 1)
    warp = WarpPhysics(model, 4, "cpu", task.contacts, task.constraints)
    for physics in (cpu, warp):
        physics.load_state_dict(state)
        physics.qacc_warmstart[:] = 0
        physics.step(1)
    assert abs(cpu.qvel - state["qvel"]).max() > 0.05
    assert_allclose(warp.qvel[2:], cpu.qvel[2:], atol=1e-3)
    assert_allclose(warp.qvel[:2], cpu.qvel[:2], atol=0.05)
    assert_allclose(warp.qpos, cpu.qpos, atol=1e-3)
