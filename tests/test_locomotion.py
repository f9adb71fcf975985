"""Ant and Humanoid: models, observations, rewards, foot sensors, episodes.

Expected numbers are those of the tasks' definition or follow from it by hand;
independent values come from MuJoCo's own functions, finite differences and conservation
laws.
"""

import copy
import math
from functools import cache

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from robot_stress import own_shapes
from robot_tables import (
    ANT,
    ANT_FEET,
    FALLEN,
    FEET,
    GEARS,
    HUMANOID,
    HUMANOID_JOINTS,
    LAYOUT,
    RADIUS,
    RANGES,
    RHO,
    SCALES,
    START_HEIGHT,
)
from robots import (
    assert_uniform,
    body_velocity,
    compiled,
    each_start,
    every_runner,
    forward,
    make_simulator,
    make_state,
    quaternion,
    random_action,
    random_state,
    start_everywhere,
    terms,
    without_contacts,
    zero_action,
)

from isaac_tasks import TASKS
from isaac_tasks.physics import CpuPhysics
from isaac_tasks.task import State

# --- Model ---


def shapes(model, body):
    """Sorted rows (radius, end, end) of a body's capsules and spheres, in body axes."""
    rows = []
    for geom in np.flatnonzero(
        own_shapes(model) & (model.geom_bodyid == model.body(body).id)
    ):
        radius, half, _ = model.geom_size[geom]
        axis = np.zeros(3)
        mujoco.mju_rotVecQuat(axis, np.array([0, 0, half]), model.geom_quat[geom])
        rows.append((radius, model.geom_pos[geom] - axis, model.geom_pos[geom] + axis))
    return sort_shapes(rows)


def sort_shapes(rows):
    """Sorted by radius and ends, the two ends of each row too: an array (geoms, 7)."""
    rounded = []
    for radius, *ends in rows:
        ends = sorted(tuple(np.round(end, 9) + 0.0) for end in ends)
        rounded.append((radius, *ends))
    return np.array([(r, *a, *b) for r, a, b in sorted(rounded)])


def capsule(*end):
    """Of the Ant: from its body's origin to `end`."""
    return (RADIUS, (0, 0, 0), end)


def runner_tables(name):
    """Bodies and joints in the columns of HUMANOID and HUMANOID_JOINTS."""
    if name == "Humanoid":
        return HUMANOID, HUMANOID_JOINTS
    inner = [capsule(x, y, 0) for x in (0.2, -0.2) for y in (0.2, -0.2)]
    bodies = {
        "torso": ("world", (0, 0, 0.75), 0.4839, [(0.25, (0, 0, 0), (0, 0, 0)), *inner])
    }
    joints = {}
    for body, parent, place, joint, axis, limits in ANT:
        foot = body.endswith("foot")
        end = np.array(place) * (2 if foot else 1)
        bodies[body] = (parent, place, 0.0676 if foot else 0.0392, [capsule(*end)])
        joints[joint] = (body, (0, 0, 0), axis, limits, 0, 0.1, 0.01, None)
    return bodies, joints


@every_runner
def test_bodies_and_joints(name, variant):
    _, model = compiled(name, variant)
    bodies, joints = runner_tables(name)
    assert sorted(model.body(i).name for i in range(1, model.nbody)) == sorted(bodies)
    for body, (parent, place, mass, ends) in bodies.items():
        got = model.body(body)
        assert model.body(got.parentid[0]).name == parent
        assert_allclose(got.pos, place)
        assert_allclose(got.mass, mass, atol=5e-5 if name == "Ant" else 1e-3)
        quat = np.array(
            (1, 0, -0.002, 0) if body in ("lwaist", "pelvis") else (1, 0, 0, 0)
        )
        assert_allclose(got.quat, quat / np.linalg.norm(quat))
        assert_allclose(shapes(model, body), sort_shapes(ends), atol=1e-8)
    total = 0.9109 if name == "Ant" else 40.844
    assert_allclose(model.body_mass.sum(), total, atol=5e-4)
    assert [model.joint(i).name for i in range(1, model.njnt)] == list(joints)
    assert model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE
    for joint, (body, anchor, axis, limits, *passive, _) in joints.items():
        got = model.joint(joint)
        assert got.bodyid == model.body(body).id
        assert_allclose(got.pos, anchor)
        assert_allclose(got.axis, axis / np.linalg.norm(axis))
        assert_allclose(got.range, np.radians(limits))
        assert model.jnt_limited[got.id]
        assert [*got.stiffness, *got.damping, *got.armature] == passive
        assert model.qpos_spring[got.qposadr[0]] == 0 or name == "Ant"
    for passive in (
        model.dof_damping[:6],
        model.dof_armature[:6],
        model.dof_frictionloss,
    ):
        assert np.all(passive == 0)


@every_runner
def test_motor_i_turns_joint_i(name, variant):
    task, model = compiled(name, variant)
    action = random_action(task)
    data = forward(model, make_state(task, model), task.control(action)[0])
    assert np.all(data.qfrc_actuator[:6] == 0)
    assert_allclose(data.qfrc_actuator[6:], GEARS[name, variant] * action[0].numpy())


@every_runner
def test_friction_of_the_feet(name, variant):
    task, model = compiled(name, variant)
    data = mujoco.MjData(model)
    data.qpos[:] = make_state(task, model).qpos[0]
    for height in np.arange(2, 0, -0.005):  # down to the floor
        data.qpos[2] = height
        mujoco.mj_forward(model, data)
        if data.ncon:
            break
    bodies = {model.geom_bodyid[geom] for geom in data.contact.geom[0]}
    names = {model.body(body).name for body in bodies}
    assert "world" in names
    assert any("foot" in name for name in names)
    assert data.contact.dim[0] == 3  # sliding friction acts
    assert_allclose(data.contact.friction[0, :2], 1.25 if name == "Ant" else 1.0)


# --- Observations ---


@every_runner
@pytest.mark.parametrize("yaw", [0.5, -0.5, 3.141])
@pytest.mark.parametrize("roll", [0.3, -0.3, -2.0])
def test_root_observations(name, variant, yaw, roll):
    """Indices 0 to 11, for a torso that is turned, moves and spins."""
    task, model = compiled(name, variant)
    pitch, velocity = 0.4, (3, -2, 1, 4, 5, -6)
    state = make_state(
        task, model, (400, 450, 1.2), quaternion(yaw, pitch, roll), velocity
    )
    obs = task.observe(state, zero_action(task))[0]
    linear, angular = body_velocity(model, forward(model, state), "torso", local=True)
    assert obs[0] == 1.2
    assert_allclose(obs[1:4], linear)
    assert_allclose(obs[4:7], SCALES[name][0] * angular)
    towards = math.atan2(-1.2, 600)  # z over x, as in the original
    if (name, variant) == ("Ant", "ige"):
        assert_allclose(obs[7:9], (yaw % math.tau, roll % math.tau))
        assert_allclose(obs[9], towards - yaw % math.tau)
    else:
        assert_allclose(obs[7:9], (yaw, roll))
        wrapped = towards - yaw if yaw < 3 else towards - yaw + math.tau
        assert_allclose(obs[9], wrapped)
    assert_allclose(obs[10], math.cos(pitch) * math.cos(roll))
    ahead = math.cos(pitch) * np.array([math.cos(yaw), math.sin(yaw)])
    assert_allclose(obs[11], ahead @ [0.8, -0.6])  # the target lies (600, -450) away


@every_runner
def test_joint_observations(name, variant):
    """Positions scaled to [-1, 1] between the limits, velocities, and the action."""
    task, model = compiled(name, variant)
    low, high = RANGES[name].T
    # Beyond the limits too: not clipped.
    fraction = np.linspace(-0.1, 1.1, task.act_dim)
    speeds = np.linspace(-100, 200, task.act_dim)
    joints = low + fraction * (high - low)
    state = make_state(task, model, joints=joints, joint_velocities=speeds)
    action = random_action(task)
    obs = task.observe(state, action)[0]
    positions, velocities, forces, _, last, end = LAYOUT[name, variant]
    assert obs.shape == (end,) == (task.obs_dim,)
    assert_allclose(obs[positions:velocities], 2 * fraction - 1, atol=1e-12)
    assert_allclose(obs[velocities:forces], SCALES[name][1] * speeds)
    assert_allclose(obs[last:], action[0])


@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
def test_order_and_scale_of_the_foot_sensors(name):
    """oige: the sensors' numbers pass, scaled. Force before torque, foot after foot."""
    task, model = compiled(name, "oige")
    numbers = np.arange(1.0, 1 + model.nsensordata)
    obs = task.observe(make_state(task, model, sensors=numbers), zero_action(task))[0]
    start, end = LAYOUT[name, "oige"][3:5]
    assert_allclose(obs[start:end], SCALES[name][2] * numbers)
    bodies = [model.body(model.site_bodyid[site]).name for site in model.sensor_objid]
    assert bodies == [foot for foot in FEET[name, "oige"] for _ in range(2)]
    kinds = mujoco.mjtSensor.mjSENS_FORCE, mujoco.mjtSensor.mjSENS_TORQUE
    assert list(model.sensor_type) == [*kinds] * len(FEET[name, "oige"])


# --- Rewards ---


@every_runner
def test_reward_of_standing_and_of_running(name, variant):
    """Upright, towards the target: 1.1 (Ant) or 2.6 (Humanoid), plus the speed, m/s."""
    task, model = compiled(name, variant)
    standing = 1.1 if name == "Ant" else 2.6
    assert_allclose(terms(task, model)[1], standing)
    dt = 1 / 60 if variant == "oige" else 0.0166
    values, reward = terms(task, model, moved=(3 * dt, 0))
    assert_allclose(reward, standing + 3)
    assert_allclose(values["progress"], 3)
    nearer = 1250 - math.hypot(1000 - 2, 750)  # from (0, -750), 2 m along x
    values, _ = terms(task, model, moved=(2, 0), position=(2, -750, 2))
    assert_allclose(values["progress"], nearer / dt)
    assert terms(task, model, moved=(-0.1, 0))[0]["progress"] < 0


@every_runner
def test_posture_rewards(name, variant):
    task, model = compiled(name, variant)
    for up, expected in ((0.93 + 1e-9, 0.1), (0.93 - 1e-9, 0), (-1, 0)):
        values, _ = terms(task, model, quat=quaternion(roll=math.acos(up)))
        assert_allclose(values["upright"], expected)
    for heading, expected in ((1, 0.5), (0.81, 0.5), (0.4, 0.25), (0, 0), (-1, -0.625)):
        values, _ = terms(task, model, quat=quaternion(yaw=math.acos(heading)))
        assert_allclose(values["heading"], expected, atol=1e-12)
    for offset in (-1e-6, 1e-6):  # continuous at 0.8
        values, _ = terms(task, model, quat=quaternion(yaw=math.acos(0.8 + offset)))
        expected = 0.5 + min(offset, 0) * 0.5 / 0.8
        assert_allclose(values["heading"], expected, rtol=0, atol=1e-12)


@every_runner
def test_costs_of_actions(name, variant):
    task, model = compiled(name, variant)
    action = random_action(task)
    speeds = np.linspace(-20, 30, task.act_dim)
    a = action[0].numpy()
    rho = 1.0 if name == "Ant" else GEARS[name, variant] / 135
    values, _ = terms(task, model, action, joint_velocities=speeds)
    weight = 0.005 if name == "Ant" else 0.01
    assert_allclose(values["action"], -weight * (a**2).sum())
    scale = 0.2 if name == "Ant" else 0.1
    assert_allclose(values["energy"], -0.05 * (rho * abs(a * scale * speeds)).sum())


def at(name, joint, scaled):
    """Joints: one at `scaled` (-1 and 1: its limits), the others in the middle."""
    joints = RANGES[name].mean(-1)
    low, high = RANGES[name][joint]
    joints[joint] += scaled * (high - low) / 2
    return joints


@every_runner
@pytest.mark.parametrize("side", [1, -1])
def test_costs_of_joint_limits(name, variant, side):
    """Ant: counts joints above 0.99 of their range, at the upper limit only.

    Humanoid: 0 at 0.98, 0.25 rho at the limit and on from there, on both sides.

    """
    task, model = compiled(name, variant)
    if name == "Ant":
        weights = np.full(8, (1.0 if variant == "oige" else 0.1) * (side == 1))
        costs = {0.9899: 0, 0.9901: 1, 1.2: 1}
    else:
        weights = np.array([RHO[gear] for gear in GEARS[name, variant]])
        costs = {0.9799: 0, 0.99: 0.125, 1: 0.25, 1.02: 0.5}
    for scaled, cost in costs.items():
        for joint, weight in enumerate(weights):
            values, _ = terms(task, model, joints=at(name, joint, side * scaled))
            assert_allclose(values["limits"], -weight * cost, atol=1e-9)
    low, high = RANGES[name].T
    values, _ = terms(task, model, joints=high if side == 1 else low)
    assert_allclose(values["limits"], -sum(weights) * costs.get(1, 1), atol=1e-9)


@every_runner
def test_reward_of_a_fall(name, variant):
    """Replaces everything; at exactly the limit the robot has not fallen."""
    task, model = compiled(name, variant)
    height, expected = FALLEN[name]
    action = random_action(task)
    fallen = dict(position=(0, 0, height - 1e-9), joints=RANGES[name][:, 1])
    assert terms(task, model, action, moved=(0.1, 0), **fallen)[1] == expected
    assert task.failed(make_state(task, model, **fallen)).item()
    alive = dict(position=(0, 0, height))
    assert terms(task, model, **alive)[1] > 0
    assert not task.failed(make_state(task, model, **alive)).item()


@pytest.mark.parametrize("start", [(0, 0), (300, -40), (960, 7), (-5, 3)])
def test_progress_in_float32(start):
    """To a millionth of the way; a difference of distances would be off by 0.06 mm."""
    rng = np.random.default_rng(0)
    before = np.array(start, np.float32) + rng.normal(size=(100, 2)).astype(np.float32)
    after = before + (0.05 * rng.normal(size=(100, 2))).astype(np.float32)
    target = np.array([1000.0, 0.0])
    exact = np.linalg.norm(target - before, axis=1) - np.linalg.norm(
        target - after, axis=1
    )
    way = np.linalg.norm(after.astype(float) - before, axis=1)
    for dtype, error in ((torch.float32, 1e-6 * way), (torch.float64, 1e-12)):
        task = TASKS["Ant"]("oige", dtype=dtype)
        one = make_state(task, compiled("Ant", "oige")[1])
        states = [
            State(*(t.to(dtype).repeat(100, 1) for t in vars(one).values()))
            for _ in "ab"
        ]
        for state, position in zip(states, (before, after), strict=True):
            state.qpos[:, :2] = torch.tensor(position)
        speed = task.reward_terms(*states, torch.zeros(100, 8, dtype=dtype))["progress"]
        assert speed.dtype == dtype
        assert np.all(abs(speed.double().numpy() / 60 - exact) < error)


# --- Foot sensors ---


def foot_wrenches(name, variant, data):
    """{foot: (force, torque)} in foot axes, as the task reports them for MuJoCo's
    data."""
    task, _ = compiled(name, variant)
    rows = data.qpos, data.qvel, data.sensordata, []
    state = State(*(torch.tensor(np.array([row])) for row in rows))
    rows = task.foot_sensors(state)[0].unflatten(0, (-1, 2, 3)).numpy()
    return dict(zip(FEET[name, variant], rows, strict=True))


@cache
def statue(name, variant):
    """Model and data of a robot with stiff joints that has come to rest on its feet."""
    task, model = compiled(name, variant)
    model = copy.copy(model)
    model.opt.timestep = 0.002
    model.jnt_stiffness[1:], model.dof_damping[6:] = 1e3, 1e2
    degrees = [5, 60, -5, -60, 0, -60, 3, 60] if name == "Ant" else np.zeros(21)
    height = 0.6 if name == "Ant" else 1.29
    state = make_state(task, model, (0, 0, height), joints=np.radians(degrees))
    model.qpos_spring[:] = state.qpos[0]
    data = forward(model, state)
    mujoco.mj_step(model, data, 2500)
    mujoco.mj_forward(model, data)
    assert abs(data.qvel).max() < 1e-3
    return model, data


def contact_wrench(model, data, body):
    """Force of all contacts on a body and their torque about the origin, world axes."""
    force, torque = np.zeros(3), np.zeros(3)
    for i, contact in enumerate(data.contact):
        wrench = np.zeros(6)
        mujoco.mj_contactForce(model, data, i, wrench)
        on_second = contact.frame.reshape(3, 3).T @ wrench[:3]
        for geom, sign in ((contact.geom1, -1), (contact.geom2, 1)):
            if model.geom_bodyid[geom] == model.body(body).id:
                force += sign * on_second
                torque += sign * np.cross(contact.pos, on_second)
    return force, torque


@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
def test_feet_carry_the_weight(name):
    """oige: the parent's wrench on a foot balances the floor's and its weight."""
    model, data = statue(name, "oige")
    total, feet_mass = np.zeros(3), 0.0
    weight = 9.81 * model.body_mass.sum()
    for foot, (force, torque) in foot_wrenches(name, "oige", data).items():
        body = data.body(foot)
        rotation, mass = body.xmat.reshape(3, 3), model.body(foot).mass[0]
        ankle = body.xpos + rotation @ model.jnt_pos[model.body(foot).jntadr[0]]
        force, torque = rotation @ force, rotation @ torque
        floor, floor_torque = contact_wrench(model, data, foot)
        assert floor[2] > 0
        gravity = np.array([0, 0, -9.81 * mass])
        assert_allclose(force + floor + gravity, 0, atol=1e-3 * weight)
        moments = torque + np.cross(ankle, force)
        moments += floor_torque + np.cross(body.xipos, gravity)
        assert_allclose(moments, 0, atol=1e-3 * weight)
        total, feet_mass = total + force, feet_mass + mass
    assert_allclose(total, (0, 0, 9.81 * feet_mass - weight), atol=1e-3 * weight)


@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
def test_no_net_wrench_at_rest(name):
    model, data = statue(name, "ige")
    weight = 9.81 * model.body_mass.sum()
    for force, torque in foot_wrenches(name, "ige", data).values():
        assert_allclose([*force, *torque], 0, atol=1e-3 * weight)


def momentum(model, data, foot):
    """A body's momentum, linear and angular (about its centre of mass); world axes."""
    linear, angular = body_velocity(model, data, foot, mujoco.mjtObj.mjOBJ_BODY)
    axes = data.body(foot).ximat.reshape(3, 3)
    inertia = axes @ np.diag(model.body(foot).inertia) @ axes.T
    return np.concatenate([model.body(foot).mass * linear, inertia @ angular])


@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
@pytest.mark.parametrize("seed", [0, 1])
def test_net_wrench_is_the_change_of_momentum(name, seed):
    """ige: force = dp/dt, torque = dL/dt + c x force, by differences in flight."""
    task, model = compiled(name, "ige")
    model, state = without_contacts(model), random_state(task, model, seed)
    data, h, moved = forward(model, state, random_action(task, seed=seed)[0]), 1e-5, []
    for step in (h, -h):
        neighbour = state.clone()
        qpos = state.qpos[0].numpy().copy()
        mujoco.mj_integratePos(model, qpos, data.qvel + step / 2 * data.qacc, step)
        neighbour.qpos[0] = torch.tensor(qpos)
        neighbour.qvel[0] += step * torch.tensor(data.qacc)
        moved.append(forward(model, neighbour))
    for foot, (force, torque) in foot_wrenches(name, "ige", data).items():
        change = (momentum(model, moved[0], foot) - momentum(model, moved[1], foot)) / (
            2 * h
        )
        rotation = data.body(foot).xmat.reshape(3, 3)
        lever = data.body(foot).xipos - data.body(foot).xpos
        expected_torque = change[3:] + np.cross(lever, change[:3])
        scale = abs(change).max()
        assert_allclose(rotation @ force, change[:3], atol=1e-6 * scale)
        assert_allclose(rotation @ torque, expected_torque, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
def test_both_kinds_of_foot_sensors_agree(name):
    """In flight: net wrench (ige) = joint's wrench (oige) + weight, at its origin."""
    task, model = compiled(name, "oige")
    state = random_state(task, model)
    data = forward(without_contacts(model), state)
    joint = foot_wrenches(name, "oige", data)
    ige_model = without_contacts(compiled(name, "ige")[1])
    net = foot_wrenches(name, "ige", forward(ige_model, state))
    for foot, (force, torque) in joint.items():
        body = model.body(foot)
        gravity = data.body(foot).xmat.reshape(3, 3).T @ [0, 0, -9.81 * body.mass[0]]
        moved = torque + np.cross(model.jnt_pos[body.jntadr[0]], force)
        assert_allclose(net[foot][0], force + gravity, atol=1e-9)
        assert_allclose(net[foot][1], moved + np.cross(body.ipos, gravity), atol=1e-9)


# --- Physics and episodes ---


@pytest.mark.slow
@every_runner
def test_without_action_the_ant_stands_and_the_humanoid_falls(name, variant):
    simulator = make_simulator(name, variant)
    fallen = torch.zeros(4, dtype=torch.bool)
    for _ in range(120):
        _, reward, terminated, _, _ = simulator.step(torch.zeros(4, simulator.act_dim))
        assert (reward[terminated] == FALLEN[name][1]).all()
        fallen |= terminated
    assert torch.equal(fallen, torch.full_like(fallen, name == "Humanoid"))
    for world in range(4 * (name == "Ant")):  # on its feet alone
        data = simulator.physics.data(world)
        mujoco.mj_forward(simulator.model, data)
        bodies = simulator.model.geom_bodyid[data.contact.geom].flatten()
        assert {simulator.model.body(body).name for body in bodies} == {
            "world",
            *ANT_FEET,
        }


@every_runner
def test_joints_rest_at_their_limits(name, variant):
    """Within 2 degrees under full steady torque, floating."""
    task, model = compiled(name, variant)
    model = without_contacts(model)
    model.opt.gravity[:] = 0
    low, high = RANGES[name].T
    names = [model.joint(i).name for i in range(1, model.njnt)]
    # In shoulders two joints push each other.
    single = ["shoulder" not in joint for joint in names]
    physics = CpuPhysics(model, 2, 1)
    physics.qpos[:] = make_state(task, model).qpos
    physics.ctrl[:] = torch.tensor([[1.0], [-1.0]])
    physics.step(400)
    ends = np.stack([high, low])
    assert np.degrees(abs(physics.qpos[:, 7:].numpy() - ends))[:, single].max() < 2


@every_runner
@each_start
def test_first_states_of_the_runners(name, variant, start):
    physics = start_everywhere(name, variant, start).physics
    height = START_HEIGHT.get((name, variant), 1.34)
    assert physics.qpos[:, :7].unique(dim=0).tolist() == [[0, 0, height, 1, 0, 0, 0]]
    assert (physics.qvel[:, :6] == 0).all()
    assert_uniform(physics.qvel[:, 6:], -0.1, 0.1)
    joints = physics.qpos[:, 7:]
    for q, (low, high) in zip(joints.T, RANGES[name], strict=True):
        neutral = np.clip(0, low, high)  # an ankle of the Ant: 30 degrees, its limit
        at_limit = ((q == q.min()) | (q == q.max())).double().mean()
        inside = q[(q > q.min()) & (q < q.max())]
        first, last = max(low, neutral - 0.2), min(high, neutral + 0.2)
        assert_uniform(inside, first, last)
        clipped = 1 - (last - first) / 0.4
        assert abs(at_limit - clipped) < 0.06
        assert q.min() >= low - 1e-12
        assert q.max() <= high + 1e-12
    numbers = torch.cat([joints, physics.qvel[:, 6:]], 1)
    assert abs(torch.corrcoef(numbers.T).tril(-1)).max() < 0.15


@every_runner
def test_speed_limit_of_the_runners(name, variant):
    """64 or 100 rad/s for the torso, its direction kept, and for each joint; like
    PhysX's."""
    task, model = compiled(name, variant)
    limit = 64.0 if name == "Ant" else 100.0
    state = random_state(task, model)
    state.qvel[0, :3] = 200.0
    for factor in (0.9, 1.1):
        state.qvel[0, 3:6] = factor * limit * torch.tensor([0.0, -0.6, 0.8])
        state.qvel[0, 6:] = -factor * limit
        cut = task.limit(state)
        factor = min(factor, 1)
        assert (cut.qvel[0, :3] == 200).all()
        spin = factor * limit * np.array([0, -0.6, 0.8])
        assert_allclose(cut.qvel[0, 3:6], spin, rtol=1e-6)
        assert_allclose(cut.qvel[0, 6:], -factor * limit)
        assert torch.equal(cut.qpos, state.qpos)
