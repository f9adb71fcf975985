"""AllegroHand: the hand, its cube, observations, rewards, episodes.

Expected numbers are those of the original tasks or follow from them by hand.
"""

import math
from functools import cache
from itertools import pairwise

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from robot_stress import stress
from robots import assert_uniform, every_variant

from isaac_tasks.allegro_hand import AllegroHand
from isaac_tasks.mujoco_simulator import MujocoSimulator
from isaac_tasks.physics import CpuPhysics, WarpPhysics
from isaac_tasks.task import State

GOAL = np.array([0, -0.2, 0.52])
FLEX = (-0.279244, 1.727825)
LIMITS = np.array(
    3 * [(-0.558489, 0.558489), FLEX, FLEX, FLEX]
    + [(0.279244, 1.57075), (-0.331603, 1.151883), FLEX, (-0.279244, 1.762731)]
)
LOW, HIGH = LIMITS.T
DIGITS = ("index", "middle", "ring", "thumb")
NAMES = [f"{name}_{i}" for name in DIGITS for i in range(4)]
MASSES = 3 * [0.0119, 0.065, 0.0355, 0.0096] + [0.0176, 0.0119, 0.038, 0.0388]
INERTIAS = 3 * [
    (1.02, 0.65, 1.02),
    (79.6, 24.7, 79.6),
    (26.4, 13.5, 26.4),
    (4.7, 3.65, 4.7),
]
INERTIAS += [(18.9, 14.3, 18.9), (4.24, 4.52, 4.24), (43, 14.4, 43), (32.9, 14.7, 32.9)]
# Base in the palm, direction f, axis of joint 1, 2 and 3; joint 0 turns about f.
FINGERS = {
    "index": (
        (0.05143, -0.03632, -0.0113),
        (0.99619, -0.0873, 0),
        (-0.0873, -0.99618, 0),
    ),
    "middle": ((0.05374, 0.00878, -0.0113), (1, 0, 0), (0, -1, 0)),
    "ring": ((0.05143, 0.05387, -0.0113), (0.99619, 0.0871, 0), (0.0870, -0.99621, 0)),
}
THUMB = [  # place and axis of its joints in the palm
    ((-0.03675, -0.00813, -0.0295), (-0.99619, 0.08715, 0)),
    ((-0.03675, -0.00813, -0.0245), (-0.0872, -0.99619, 0)),
    ((-0.04158, -0.06332, -0.0245), (0, 0, 1)),
    ((-0.04606, -0.11452, -0.0245), (0, 0, 1)),
]


@cache
def compiled(variant):
    """The task and its model, which the tests share."""
    task = AllegroHand(variant)
    return task, task.spec().compile()


def make_simulator(variant="oige", num_envs=4, seed=0):
    simulator = MujocoSimulator(AllegroHand, num_envs, seed, variant=variant)
    simulator.reset()
    return simulator


def forward(model, joints=None, cube=(0, 0, 3), speeds=0.0, ctrl=0.0):
    """MuJoCo's data with the cube far above the hand, everything computed."""
    data = mujoco.MjData(model)
    data.qpos[:16] = 0 if joints is None else joints
    data.qpos[16:19], data.qvel[:16], data.ctrl[:] = cube, speeds, ctrl
    mujoco.mj_forward(model, data)
    return data


def in_palm(data, point):
    palm = data.body("palm")
    return palm.xmat.reshape(3, 3).T @ (point - palm.xpos)


# --- The model ---


@every_variant
def test_kinematics(variant):
    data = forward(compiled(variant)[1])
    palm = data.body("palm")
    assert_allclose(palm.xpos, (-0.00878, -0.08242, 0.51270), atol=2e-5)
    assert_allclose(palm.xquat, (0.70632, 0.03331, 0.03331, -0.70632), atol=2e-5)
    turn = palm.xmat.reshape(3, 3).T
    expected = {f"thumb_{i}": row for i, row in enumerate(THUMB)}
    for name, (base, direction, axis) in FINGERS.items():
        expected[f"{name}_0"] = base, direction
        for i, along in ((1, 0), (2, 0.054), (3, 0.0924)):
            expected[f"{name}_{i}"] = np.array(base) + along * np.array(direction), axis
    assert set(expected) == set(NAMES)
    for name, (place, axis) in expected.items():
        assert_allclose(in_palm(data, data.joint(name).xanchor), place, atol=2e-4)
        assert_allclose(turn @ data.joint(name).xaxis, axis, atol=2e-4)
    assert_allclose(in_palm(data, (0, -0.2, 0.56)), (0.113, 0.009, 0.058), atol=6e-4)


@every_variant
def test_tips_and_flexing(variant):
    """The tips' ends, at angle 0; a finger's positive angles lift them."""
    model = compiled(variant)[1]

    def end(name, joints):
        data = forward(model, joints)
        geom = data.geom(model.body(f"{name}_tip").geomadr[0])
        size = model.geom_size[model.body(f"{name}_tip").geomadr[0]]
        return in_palm(data, geom.xpos + geom.xmat.reshape(3, 3) @ (size[0], 0, 0))

    assert_allclose(end("thumb", None)[:2], (-0.0478, -0.1918), atol=6e-4)
    for name, (base, direction, _) in FINGERS.items():
        reach = np.array(base) + 0.1546 * np.array(direction)
        assert_allclose(end(name, None)[:2], reach[:2], atol=1e-3)
        for joint in (1, 2, 3):
            bent = np.zeros(16)
            bent[NAMES.index(f"{name}_{joint}")] = 0.5
            assert end(name, bent)[2] > end(name, None)[2] + 0.02


@every_variant
def test_joints_and_masses(variant):
    model = compiled(variant)[1]
    assert [model.joint(i).name for i in range(16)] == NAMES
    assert [model.actuator(i).name for i in range(16)] == NAMES
    assert model.actuator_trnid[:, 0].tolist() == list(range(16))
    assert_allclose(model.jnt_range[:16], LIMITS)
    assert model.jnt_limited[:16].all()
    assert_allclose(model.dof_armature[:16], 0.001)
    assert_allclose([model.body(name).mass[0] for name in NAMES], MASSES)
    assert_allclose([model.body(name).inertia * 1e6 for name in NAMES], INERTIAS)
    assert_allclose([model.body(name).iquat for name in NAMES], [[1, 0, 0, 0]] * 16)
    for finger in ("index", "middle", "ring", "thumb"):
        assert_allclose(model.body(f"{finger}_tip").mass, 0.021)
        assert_allclose(model.body(f"{finger}_tip").inertia, 9.7e-7)
    mass = 0.07087 if variant == "oige" else 0.1099
    cube = model.body("cube")
    assert_allclose(cube.mass, mass, rtol=1e-3)
    assert_allclose(cube.inertia, [cube.mass[0] * 0.065**2 / 6] * 3)
    assert_allclose(model.geom_size[cube.geomadr[0]], 0.0325)


@every_variant
def test_options(variant):
    task, model = compiled(variant)
    step = 0.0083 if variant == "oige" else 0.01667 / 2
    assert (model.opt.timestep, task.substeps) == (step, 4)
    assert_allclose(model.opt.gravity, (0, 0, -9.81))
    assert (task.episode_length, task.clip_obs) == (600, 5.0)
    assert (task.obs_dim, task.act_dim) == (72 if variant == "oige" else 88, 16)
    assert round(1 / (4 * step)) == 30


def test_boxes():
    """Corners in the link's axes."""
    model = compiled("oige")[1]
    corners = {
        "palm": ((-0.058, -0.050, -0.098), (0.042, 0.067, 0)),
        "mount": ((-0.038, -0.038, 0), (0.038, 0.038, 0.023)),
        "index_0": ((-0.0098, -0.0135, -0.0157), (0.0098, 0.0135, 0.0063)),
        "middle_1": ((-0.0088, -0.0147, -0.0142), (0.0628, 0.0098, 0.0142)),
        "ring_2": ((-0.0063, -0.0147, -0.0142), (0.0472, 0.0098, 0.0142)),
        "index_3": ((-0.0063, -0.0100, -0.0137), (0.0370, 0.0085, 0.0137)),
        "middle_tip": ((0.0324, -0.0042, -0.0070), (0.0622, 0.0150, 0.0071)),
        "thumb_0": ((-0.0080, -0.0375, -0.0325), (0.0260, 0.0080, 0.0108)),
        "thumb_1": ((-0.0135, -0.0098, 0.0397), (0.0135, 0.0098, 0.0617)),
        "thumb_2": ((-0.0088, -0.0147, -0.0142), (0.0577, 0.0098, 0.0142)),
        "thumb_3": ((-0.0100, -0.0137, -0.0143), (0.0520, 0.0096, 0.0141)),
        "thumb_tip": ((0.0476, -0.0044, -0.0071), (0.0771, 0.0147, 0.0071)),
    }
    for name, (low, high) in corners.items():
        geom = model.body(name).geomadr[0]
        middle, size = model.geom_pos[geom], model.geom_size[geom]
        assert_allclose((middle - size, middle + size), (low, high), atol=1e-12)


def test_collisions():
    """Fingers, thumb and palm collide; neighbours don't, nor links beside the palm."""
    model = compiled("oige")[1]
    rng, pairs = np.random.default_rng(0), set()
    for _ in range(300):
        for contact in forward(model, rng.uniform(LOW, HIGH)).contact:
            bodies = model.geom_bodyid[contact.geom]
            pairs.add(
                frozenset(model.body(body).name.removesuffix("_tip") for body in bodies)
            )
    for pair in (
        "index_2 middle_2",
        "middle_3 ring_3",
        "index_1 thumb_3",
        "palm thumb_3",
    ):
        assert frozenset(pair.split()) in pairs
    for finger in ("index", "middle", "ring", "thumb"):
        tip = finger
        links = ["palm", *(f"{finger}_{i}" for i in range(4)), tip]
        assert not pairs & {frozenset(pair) for pair in pairwise(links)}
        assert frozenset(("palm", f"{finger}_1")) not in pairs
        assert frozenset((tip, links[3])) not in pairs
    assert frozenset(("palm", "thumb_2")) not in pairs
    assert forward(model, 12 * [0] + [0.3, 0, 0, 0]).ncon == 0  # open


@every_variant
def test_drives(variant):
    """Torque: 3 (q* - q) - 0.1 q' of at most 0.5; gravity doesn't pull the fingers."""
    task, model = compiled(variant)
    rng = np.random.default_rng(0)
    saturated = 0
    for _ in range(20):
        q = rng.uniform(LOW, HIGH)
        action, speeds = rng.uniform(-1, 1, 16), rng.normal(size=16)
        target = LOW + (action + 1) / 2 * (HIGH - LOW)
        ctrl = task.control(torch.tensor(action)[None])[0]
        assert_allclose(ctrl, target, rtol=1e-12)
        data = forward(model, q, speeds=speeds, ctrl=ctrl)
        torque = np.clip(3 * (target - q) - 0.1 * speeds, -0.5, 0.5)
        assert_allclose(data.qfrc_actuator[:16], torque, atol=1e-12)
        saturated += (abs(torque) == 0.5).sum()
    assert 20 < saturated < 300
    open_hand = np.array(12 * [0.1] + [0.6, 0.1, 0.1, 0.1])
    data = forward(model, open_hand, ctrl=open_hand)
    assert abs(data.qacc[:16]).max() < 1e-9
    assert_allclose(data.qacc[16:19], (0, 0, -9.81), atol=1e-9)


@every_variant
def test_joint_speed(variant):
    """The original's joints turn at 6.283 rad/s at most; here drives can't do more."""
    model = compiled(variant)[1]
    data = forward(model, LOW + 0.01, cube=(0, 0, 30))
    data.ctrl[:] = LOW + 0.01
    data.ctrl[[1, 5, 9]] = 1.7  # three fingers bend as fast as they can
    speed = np.zeros(16)
    for _ in range(60):
        mujoco.mj_step(model, data)
        speed = np.maximum(speed, abs(data.qvel[:16]))
    assert_allclose(speed[[1, 5, 9]], 5.7, atol=0.6)
    assert_allclose(data.qpos[[1, 5, 9]], 1.7, atol=0.05)


# --- Observations and rewards ---


def random_states(seed=0, n=50):
    """States with the cube near its goal: some within 0.1 rad, some lost."""
    rng = np.random.default_rng(seed)
    quats = rng.normal(size=(2, n, 4))
    quats[1, ::5] = quats[0, ::5] + 0.02 * rng.normal(size=(len(quats[0, ::5]), 4))
    quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
    qpos = np.concatenate(
        [
            rng.uniform(LOW, HIGH, (n, 16)),
            GOAL + 0.15 * rng.normal(size=(n, 3)),
            quats[0],
        ],
        -1,
    )
    qvel = rng.normal(size=(n, 22))
    return State(*map(torch.tensor, (qpos, qvel, np.zeros((n, 0)), quats[1]))), rng


def times(p, q):
    """The product of two quaternions w,x,y,z, by MuJoCo."""
    product = np.zeros(4)
    mujoco.mju_mulQuat(product, p, q)
    return product


def rotated(vector, quat):
    result = np.zeros(3)
    mujoco.mju_rotVecQuat(result, vector, quat)
    return result


@every_variant
def test_observations(variant):
    task = AllegroHand(variant)
    state, rng = random_states()
    action = rng.uniform(-1, 1, (50, 16))
    obs = task.observe(state, torch.tensor(action))
    assert obs.shape == (50, task.obs_dim)
    order = [0, 1, 2, 3] if variant == "oige" else [1, 2, 3, 0]  # w,x,y,z or x,y,z,w
    forces = [] if variant == "oige" else np.zeros(16)
    for i in range(50):
        q, v, goal = (x[i].numpy() for x in (state.qpos, state.qvel, state.memory))
        difference = times(q[19:], goal * (1, -1, -1, -1))
        expected = [
            *((2 * q[:16] - HIGH - LOW) / (HIGH - LOW)),
            *(0.2 * v[:16]),
            *forces,
            *q[16:19],
            *q[19:][order],
            *v[16:19],
            *(0.2 * rotated(v[19:], q[19:])),
            *GOAL,
            *goal[order],
            *difference[order],
            *action[i],
        ]
        assert_allclose(obs[i], expected, atol=1e-9)


@every_variant
def test_rewards(variant):
    task = AllegroHand(variant)
    state, rng = random_states(1)
    action = rng.uniform(-1, 1, (50, 16))
    rewards = task.reward(state, state, torch.tensor(action))
    lost = task.failed(state)
    successes = 0
    for i in range(50):
        q, goal = state.qpos[i].numpy(), state.memory[i].numpy()
        distance = np.linalg.norm(q[16:19] - GOAL)
        cosine = min(1, abs(times(q[19:], goal * (1, -1, -1, -1))[0]))
        theta = 2 * math.acos(cosine)  # another formula than that of the task
        expected = -10 * distance + 1 / (theta + 0.1) - 0.0002 * (action[i] ** 2).sum()
        expected += 250 if theta <= 0.1 else 0
        assert_allclose(rewards[i], expected, rtol=1e-9)
        assert lost[i] == (distance >= 0.24)
        successes += theta <= 0.1
    assert 0 < successes < 50
    assert lost.any()
    assert not lost.all()


@every_variant
@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ((0, 1, 0, 0), 0.3085),  # by pi
        ((1, 0, 0, 0), 260),
        ((-1, 0, 0, 0), 260),  # the same orientation
        ((math.cos(0.0499), 0, math.sin(0.0499), 0), 250 + 1 / 0.1998),
        ((math.cos(0.0501), 0, math.sin(0.0501), 0), 1 / 0.2002),
    ],
)
def test_reward_at_the_goal(variant, turn, expected):
    task = AllegroHand(variant)
    goal = np.array([0.5, -0.5, 0.5, 0.5])
    row = [*np.zeros(16), *GOAL, *times(np.array(turn, dtype=float), goal)]
    state = State(
        *(torch.tensor(np.array([x])) for x in (row, np.zeros(22), np.zeros(0), goal))
    )
    assert_allclose(
        task.reward(state, state, torch.zeros(1, 16)), [expected], rtol=2e-4
    )
    effort = task.reward(state, state, torch.ones(1, 16)) - expected
    assert_allclose(effort, [-0.0032], atol=0.001 * expected)


# --- Episodes ---


@every_variant
@pytest.mark.parametrize("by", ["reset", "step"])
def test_first_states(variant, by):
    simulator = make_simulator(variant, 2000)
    if by == "step":
        simulator.progress[:] = simulator.max_steps - 1
        simulator.step(torch.zeros(2000, 16))
    assert (simulator.progress == 0).all()
    assert (simulator.physics.qvel == 0).all()
    qpos = simulator.physics.qpos
    for joint in range(16):
        assert_uniform(qpos[:, joint], 0.2 * LOW[joint], 0.2 * HIGH[joint])
    for axis, middle in enumerate((0, -0.2, 0.56)):
        assert_uniform(qpos[:, 16 + axis], middle - 0.01, middle + 0.01)
    angles = []
    for w, x, y, z in (qpos[:, 19:].T, simulator.memory.T):  # Rx(a) Ry(b)
        a, b = 2 * torch.atan2(x, w), 2 * torch.atan2(y, w)
        assert_allclose(z, torch.sin(a / 2) * torch.sin(b / 2), atol=1e-9)
        for angle in (torch.atan(torch.tan(a / 2)), torch.atan(torch.tan(b / 2))):
            assert_uniform(angle, -math.pi / 2, math.pi / 2)
            angles.append(angle)
    numbers = torch.cat([qpos[:, :19].T, torch.stack(angles)])
    assert abs(torch.corrcoef(numbers).tril(-1)).max() < 0.15


@every_variant
def test_new_goal_after_a_success(variant):
    """In the step after it; the success is rewarded and observed with the old goal."""
    simulator = make_simulator(variant, 3)
    zeros = torch.zeros(3, 16)
    # The cube hardly turns in one step.
    simulator.memory[1] = simulator.physics.qpos[1, 19:]
    old = simulator.memory.clone()
    at = 48 if variant == "oige" else 64  # of the goal's quaternion in the observation
    order = [0, 1, 2, 3] if variant == "oige" else [1, 2, 3, 0]
    obs, reward, terminated, truncated, _ = simulator.step(zeros)
    assert torch.equal(simulator.memory, old)  # no success before the first step
    assert reward[1] > 240
    assert (reward[[0, 2]] < 10).all()
    assert not (terminated | truncated).any()
    assert_allclose(obs[:, at : at + 4], old[:, order], rtol=1e-6)
    obs, reward, *_ = simulator.step(zeros)
    assert (simulator.memory[1] != old[1]).any()
    assert torch.equal(simulator.memory[[0, 2]], old[[0, 2]])
    assert_allclose(obs[:, at : at + 4], simulator.memory[:, order], rtol=1e-6)
    assert (reward < 10).all()


@every_variant
@pytest.mark.parametrize("end", ["loss", "time-out", "loss in the last step"])
def test_end_of_an_episode(variant, end):
    """final_obs is the true last observation, obs the first one of the next episode."""
    simulator = make_simulator(variant, 3)
    simulator.step(torch.zeros(3, 16))
    if end != "time-out":
        away = torch.tensor([0.2, -0.2, 0.37])  # by 0.25 m
        simulator.physics.qpos[1, 16:19] = away
        simulator.physics.qvel[1, 16:19] = 0
    if end != "loss":
        simulator.progress[1] = simulator.max_steps - 1
    action = torch.full((3, 16), 0.3)
    obs, _, terminated, truncated, final_obs = simulator.step(action)
    assert terminated.tolist() == [False, end != "time-out", False]
    assert truncated.tolist() == [False, end == "time-out", False]
    assert simulator.progress.tolist() == [2, 0, 2]
    assert torch.equal(obs[[0, 2]], final_obs[[0, 2]])
    assert_allclose(final_obs[:, -16:], action)
    assert (obs[1, -16:] == 0).all()
    place = 32 if variant == "oige" else 48
    assert_allclose(obs[1, place : place + 3], (0, -0.2, 0.56), atol=0.0101)
    if end != "time-out":
        lost = np.linalg.norm(final_obs[1, place : place + 3].numpy() - GOAL)
        assert 0.24 < lost < 0.26
    assert simulator.max_steps == 599


@pytest.mark.slow
@every_variant
def test_cube_stays_in_a_cupped_hand_and_falls_from_an_open_one(variant):
    """60 steps are 2 s; a lost cube is on the hand again at once."""
    kept = {}
    for action in (-0.5, -1.0):
        simulator = make_simulator(variant, 32)
        ended = torch.zeros(32, dtype=torch.bool)
        for _ in range(60):
            _, _, terminated, _, _ = simulator.step(torch.full((32, 16), action))
            ended |= terminated
            distance = (simulator.physics.qpos[:, 16:19] - torch.tensor(GOAL)).norm(
                dim=-1
            )
            assert (distance < 0.24).all()
        kept[action] = (~ended).sum()
    assert kept[-0.5] >= 24
    assert kept[-1.0] <= 8


@every_variant
def test_cube_lies_on_the_hand(variant):
    """At rest above the palm, in contact with the hand, hardly sunk into it."""
    simulator = make_simulator(variant, 8)
    for _ in range(45):
        simulator.step(torch.full((8, 16), -0.5))
    still = 0
    for world in range(8):
        data = simulator.physics.data(world)
        mujoco.mj_forward(simulator.model, data)
        if np.linalg.norm(data.qvel[16:]) > 0.05:
            continue
        still += 1
        cube, bodies = simulator.model.body("cube").id, simulator.model.geom_bodyid
        contacts = [c for c in data.contact if cube in bodies[c.geom]]
        depths = [contact.dist for contact in contacts]
        assert depths
        assert min(depths) > -0.002
        assert in_palm(data, data.body("cube").xpos)[2] > 0
    assert still >= 4


# --- Physics ---


@every_variant
def test_free_fall(variant):
    """The parabola; the spin decays by 0.5 per second, as in PhysX."""
    simulator = make_simulator(variant, 1)
    physics = simulator.physics
    physics.qpos[0, 16:19] = torch.tensor([0, -0.2, 0.7])
    velocity = torch.tensor([0.1, -0.2, 0.6]).double()
    spin = torch.tensor([3.0, -5, 8]).double()
    physics.qvel[0, 16:19], physics.qvel[0, 19:] = velocity, spin
    seconds = 2 * 4 * simulator.task.time_step
    for _ in range(2):
        _, _, terminated, _, _ = simulator.step(torch.zeros(1, 16))
        assert not terminated
    height = 0.7 + 0.6 * seconds - 9.81 * seconds**2 / 2
    place = 0.1 * seconds, -0.2 - 0.2 * seconds, height
    error = 9.81 * seconds * simulator.task.time_step
    assert_allclose(physics.qpos[0, 16:19], place, atol=error)
    assert_allclose(physics.qvel[0, 16:19], velocity.numpy() - [0, 0, 9.81 * seconds])
    assert_allclose(physics.qvel[0, 19:], spin * math.exp(-0.5 * seconds), rtol=1e-3)


@pytest.mark.slow
@every_variant
def test_stress(variant):
    """With the cube, which is on the hand or falls no further than it may."""

    def check(simulator, _step):
        assert (simulator.physics.qpos[:, 18] > 0.2).all()

    stress("AllegroHand", variant, check)


def test_thumb_starts_below_its_limit_and_is_there_at_once():
    simulator = make_simulator("ige", 64)
    assert (simulator.physics.qpos[:, 12] < LOW[12]).any()
    for _ in range(3):
        simulator.step(torch.full((64, 16), -1.0))
    assert (simulator.physics.qpos[:, 12] > LOW[12] - math.radians(1)).all()


@pytest.mark.slow
@every_variant
def test_warp_agrees_with_mujoco(variant):
    """One step on Warp's CPU device: cubes on the hand, and in the air.

    Its kernels compile.

    """
    simulator = make_simulator(variant, 4)
    task, model = simulator.task, simulator.model
    for _ in range(20):
        simulator.step(torch.full((4, 16), -0.5))
    simulator.physics.qpos[2:, 18] += 0.1
    simulator.physics.ctrl[:] = task.control(torch.full((4, 16), 0.2))
    state = simulator.physics.state_dict()
    state["qvel"][:, :16] += 2
    cpu = CpuPhysics(model, 4, 1)
    warp = WarpPhysics(model, 4, "cpu", task.contacts, task.constraints)
    for physics in (cpu, warp):
        physics.load_state_dict(state)
        physics.qacc_warmstart[:] = 0
        physics.step(1)
    assert abs(cpu.qvel - state["qvel"]).max() > 1
    # On the hand Warp finds other contact points.
    for world, tolerance in enumerate((0.5, 0.5, 1e-4, 1e-4)):
        assert_allclose(warp.qpos[world], cpu.qpos[world], atol=0.01 * tolerance)
        assert_allclose(warp.qvel[world], cpu.qvel[world], atol=tolerance)


def test_marker():
    """The goal is shown beside the hand."""
    task, model = compiled("oige")
    data = mujoco.MjData(model)
    goal = torch.tensor([0.5, -0.5, 0.5, 0.5])
    task.show(data, goal)
    mujoco.mj_forward(model, data)
    assert_allclose(data.body("goal").xquat, goal)
    assert_allclose(data.body("goal").xpos - GOAL, (-0.2, -0.06, 0.12), atol=1e-12)
    assert not model.geom_contype[model.body("goal").geomadr[0]]
