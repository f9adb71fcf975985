"""The embedded simulator and its tasks: models, observations, rewards, physics, episodes, GPU.

Expected numbers are those of the tasks' definition or follow from it by hand; independent values
come from MuJoCo's own functions, finite differences and conservation laws.
"""

import copy
import math
import subprocess
import sys
from functools import cache

import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT
from mujoco.batch import Batch
from numpy.testing import assert_allclose
from robot_stress import depths, own_shapes, stress
from torch.overrides import TorchFunctionMode

from isaac_tasks import TASKS, SimulatorError
from isaac_tasks.limits import distance_to_root
from isaac_tasks.mujoco_simulator import MujocoSimulator
from isaac_tasks.physics import STATE, CpuPhysics, WarpPhysics
from isaac_tasks.task import State

CASES = [(name, variant) for name in TASKS for variant in ("oige", "ige")]
every_task = pytest.mark.parametrize(("name", "variant"), CASES)
RUNNERS = [case for case in CASES if case[0] in ("Ant", "Humanoid")]
every_runner = pytest.mark.parametrize(("name", "variant"), RUNNERS)
# Tests with tables of these three; the others take up each task of TASKS.
FREE = [*RUNNERS, ("Ingenuity", "oige"), ("Ingenuity", "ige")]
every_free_task = pytest.mark.parametrize(("name", "variant"), FREE)
every_variant = pytest.mark.parametrize("variant", ["oige", "ige"])

GRAVITY = {"Ant": 9.81, "Humanoid": 9.81, "Ingenuity": 3.721}
RADIUS = 0.08  # of all capsules of the Ant

# Body, parent, place in the parent; its joint, axis, range (degrees).
ANT = [
    ("front_left_leg", "torso", (0.2, 0.2, 0), "hip_1", (0, 0, 1), (-40, 40)),
    (
        "front_left_foot",
        "front_left_leg",
        (0.2, 0.2, 0),
        "ankle_1",
        (-1, 1, 0),
        (30, 100),
    ),
    ("front_right_leg", "torso", (-0.2, 0.2, 0), "hip_2", (0, 0, 1), (-40, 40)),
    (
        "front_right_foot",
        "front_right_leg",
        (-0.2, 0.2, 0),
        "ankle_2",
        (1, 1, 0),
        (-100, -30),
    ),
    ("left_back_leg", "torso", (-0.2, -0.2, 0), "hip_3", (0, 0, 1), (-40, 40)),
    (
        "left_back_foot",
        "left_back_leg",
        (-0.2, -0.2, 0),
        "ankle_3",
        (-1, 1, 0),
        (-100, -30),
    ),
    ("right_back_leg", "torso", (0.2, -0.2, 0), "hip_4", (0, 0, 1), (-40, 40)),
    (
        "right_back_foot",
        "right_back_leg",
        (0.2, -0.2, 0),
        "ankle_4",
        (1, 1, 0),
        (30, 100),
    ),
]

# Body: parent, place in it, mass (kg), capsules (radius, end, end; spheres have equal ends).
# The left limbs are the right ones, mirrored in y.
HUMANOID = {
    "torso": (
        "world",
        (0, 0, 1.4),
        5.854 + 3.054,  # with the head, which is welded to it
        [
            (0.07, (0, -0.07, 0), (0, 0.07, 0)),
            (0.06, (-0.01, -0.06, -0.12), (-0.01, 0.06, -0.12)),
            (0.09, (0, 0, 0.19), (0, 0, 0.19)),
        ],
    ),
    "lwaist": (
        "torso",
        (-0.01, 0, -0.26),
        2.262,
        [(0.06, (0, -0.06, 0), (0, 0.06, 0))],
    ),
    "pelvis": (
        "lwaist",
        (0, 0, -0.165),
        6.616,
        [(0.09, (-0.02, -0.07, 0), (-0.02, 0.07, 0))],
    ),
    "right_thigh": (
        "pelvis",
        (0, -0.1, -0.04),
        4.752,
        [(0.06, (0, 0, 0), (0, 0.01, -0.34))],
    ),
    "right_shin": (
        "right_thigh",
        (0, 0.01, -0.403),
        2.756,
        [(0.049, (0, 0, 0), (0, 0, -0.3))],
    ),
    "right_foot": (
        "right_shin",
        (0, 0, -0.39),
        1.131,
        [
            (0.027, (-0.07, -0.02, 0), (0.14, -0.04, 0)),
            (0.027, (-0.07, 0, 0), (0.14, 0.02, 0)),
        ],
    ),
    "right_upper_arm": (
        "torso",
        (0, -0.17, 0.06),
        1.661,
        [(0.04, (0, 0, 0), (0.16, -0.16, -0.16))],
    ),
    "right_lower_arm": (
        "right_upper_arm",
        (0.18, -0.18, -0.18),
        0.962 + 0.268,  # with the hand
        [
            (0.031, (0.01, 0.01, 0.01), (0.17, 0.17, 0.17)),
            (0.04, (0.18, 0.18, 0.18), (0.18, 0.18, 0.18)),
        ],
    ),
}


def mirrored(point):
    return (point[0], -point[1], point[2])


for body, (parent, place, mass, ends) in list(HUMANOID.items()):
    if body.startswith("right"):
        ends = [(r, mirrored(a), mirrored(b)) for r, a, b in ends]
        left = [text.replace("right", "left") for text in (body, parent)]
        HUMANOID[left[0]] = (left[1], mirrored(place), mass, ends)

# Joint: body, anchor, axis, range (degrees), spring, damping, armature, gear.
HUMANOID_JOINTS = {
    "abdomen_z": ("lwaist", (0, 0, 0.065), (0, 0, 1), (-45, 45), 20, 5, 0.02, 67.5),
    "abdomen_y": ("lwaist", (0, 0, 0.065), (0, 1, 0), (-75, 30), 20, 5, 0.01, 67.5),
    "abdomen_x": ("pelvis", (0, 0, 0.1), (1, 0, 0), (-35, 35), 10, 5, 0.01, 67.5),
    "right_hip_x": ("right_thigh", (0, 0, 0), (1, 0, 0), (-45, 15), 10, 5, 0.01, 45),
    "right_hip_z": ("right_thigh", (0, 0, 0), (0, 0, 1), (-60, 35), 10, 5, 0.01, 45),
    "right_hip_y": ("right_thigh", (0, 0, 0), (0, 1, 0), (-120, 45), 20, 5, 0.01, 135),
    "right_knee": (
        "right_shin",
        (0, 0, 0.02),
        (0, -1, 0),
        (-160, 2),
        5,
        0.1,
        0.007,
        90,
    ),
    "right_ankle_y": (
        "right_foot",
        (0, 0, 0.08),
        (0, 1, 0),
        (-50, 50),
        2,
        1,
        0.006,
        22.5,
    ),
    "right_ankle_x": (
        "right_foot",
        (0, 0, 0.08),
        (1, 0, 0.5),
        (-50, 50),
        2,
        1,
        0.006,
        22.5,
    ),
    "left_hip_x": ("left_thigh", (0, 0, 0), (-1, 0, 0), (-45, 15), 10, 5, 0.01, 45),
    "left_hip_z": ("left_thigh", (0, 0, 0), (0, 0, -1), (-60, 35), 10, 5, 0.01, 45),
    "left_hip_y": ("left_thigh", (0, 0, 0), (0, 1, 0), (-120, 45), 20, 5, 0.01, 135),
    "left_knee": ("left_shin", (0, 0, 0.02), (0, -1, 0), (-160, 2), 5, 0.1, 0.007, 90),
    "left_ankle_y": (
        "left_foot",
        (0, 0, 0.08),
        (0, 1, 0),
        (-50, 50),
        2,
        1,
        0.006,
        22.5,
    ),
    "left_ankle_x": (
        "left_foot",
        (0, 0, 0.08),
        (1, 0, 0.5),
        (-50, 50),
        2,
        1,
        0.006,
        22.5,
    ),
    "right_shoulder1": (
        "right_upper_arm",
        (0, 0, 0),
        (2, 1, 1),
        (-90, 70),
        10,
        5,
        0.01,
        67.5,
    ),
    "right_shoulder2": (
        "right_upper_arm",
        (0, 0, 0),
        (0, -1, 1),
        (-90, 70),
        10,
        5,
        0.01,
        67.5,
    ),
    "right_elbow": (
        "right_lower_arm",
        (0, 0, 0),
        (0, -1, 1),
        (-90, 50),
        2,
        1,
        0.006,
        45,
    ),
    "left_shoulder1": (
        "left_upper_arm",
        (0, 0, 0),
        (-2, 1, -1),
        (-90, 70),
        10,
        5,
        0.01,
        67.5,
    ),
    "left_shoulder2": (
        "left_upper_arm",
        (0, 0, 0),
        (0, -1, -1),
        (-90, 70),
        10,
        5,
        0.01,
        67.5,
    ),
    "left_elbow": (
        "left_lower_arm",
        (0, 0, 0),
        (0, -1, -1),
        (-90, 50),
        2,
        1,
        0.006,
        45,
    ),
}
RANGES = {
    "Ant": np.radians([row[5] for row in ANT]),
    "Humanoid": np.radians([row[3] for row in HUMANOID_JOINTS.values()]),
}
GEARS = {
    ("Ant", "oige"): np.full(8, 7.5),
    ("Ant", "ige"): np.full(8, 15.0),
    ("Humanoid", "oige"): np.array([row[7] for row in HUMANOID_JOINTS.values()]),
    ("Humanoid", "ige"): np.array([row[7] for row in HUMANOID_JOINTS.values()]),
}
RHO = {67.5: 0.5, 45: 1 / 3, 135: 1, 90: 2 / 3, 22.5: 1 / 6}  # by gear, Humanoid
ANT_FEET = ["front_left_foot", "front_right_foot", "left_back_foot", "right_back_foot"]
FEET = {
    ("Ant", "oige"): ANT_FEET,
    ("Ant", "ige"): ANT_FEET,
    ("Humanoid", "oige"): ["left_foot", "right_foot"],
    ("Humanoid", "ige"): ["right_foot", "left_foot"],
}
# First index of: joint positions, velocities, joint forces, foot sensors, action; the end.
LAYOUT = {
    ("Ant", "oige"): (12, 20, 28, 28, 52, 60),
    ("Ant", "ige"): (12, 20, 28, 28, 52, 60),
    ("Humanoid", "oige"): (12, 33, 54, 54, 66, 87),
    ("Humanoid", "ige"): (12, 33, 54, 75, 87, 108),
}
SCALES = {
    "Ant": (1.0, 0.2, 0.1),
    "Humanoid": (0.25, 0.1, 0.01),
}  # spin, q', foot sensors
FALLEN = {"Ant": (0.31, -2.0), "Humanoid": (0.8, -1.0)}  # height, reward
START_HEIGHT = {("Ant", "oige"): 0.5, ("Ant", "ige"): 0.44}  # Humanoid: 1.34


@cache
def compiled(name, variant):
    """The task and its model; shared by the tests, so copy the model before changing it."""
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
    """One environment at a place with a velocity (linear: world axes, angular: body axes).

    rest: joints, joint_velocities, sensors, memory; joints default to the middle of their range.
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
    """One environment in the air, turned, moving and spinning, its joints within their ranges."""
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
    """Linear and angular velocity of a body's frame (XBODY) or centre of mass (BODY)."""
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
    return scale * (
        2 * torch.rand(n, task.act_dim, dtype=torch.float64, generator=generator) - 1
    )


# --- Models ---


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
    rows = [
        (r, *sorted(tuple(np.round(end, 9) + 0.0) for end in ends)) for r, *ends in rows
    ]
    return np.array([(r, *a, *b) for r, a, b in sorted(rows)])


def capsule_mass(radius, length, density):
    return density * math.pi * radius**2 * (length + 4 / 3 * radius)


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
    assert_allclose(
        model.body_mass.sum(), 0.9109 if name == "Ant" else 40.844, atol=5e-4
    )
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


@every_variant
def test_ant_model(variant):
    """What only the Ant has; masses exactly, by its density of 5 kg/m^3."""
    task, model = compiled("Ant", variant)
    for body, length in (("front_left_leg", 0.2), ("front_left_foot", 0.4)):
        assert_allclose(
            model.body(body).mass, capsule_mass(RADIUS, length * math.sqrt(2), 5)
        )
    inner = 4 * capsule_mass(RADIUS, 0.2 * math.sqrt(2), 5)
    assert_allclose(model.body("torso").mass, 5 * 4 / 3 * math.pi * 0.25**3 + inner)
    assert_allclose(model.body("torso").inertia, (0.0136, 0.0111, 0.0111), atol=5e-5)
    assert np.all(model.geom_margin == 0)
    assert task.feet == tuple(ANT_FEET)


@every_variant
def test_humanoid_contacts(variant):
    _, model = compiled("Humanoid", variant)
    body = own_shapes(model)
    assert np.all(model.geom_condim[body] == 1)
    assert_allclose(model.geom_solref[body], [(0.015, 1)] * body.sum())
    assert_allclose(model.geom_solimp[body, :3], [(0.9, 0.99, 0.003)] * body.sum())
    assert model.ntendon == 0


def ingenuity_inertia():
    """Mass, height of the centre of mass, I_xx and I_zz about it: a cube and two discs."""
    cube, disc = 50 * 0.12**3, 1000 * math.pi * 0.15**2 * 0.01
    mass = cube + 2 * disc
    centre = disc * 0.025 / mass
    cube_moment = cube * 0.12**2 / 6
    disc_xx, disc_zz = disc * (3 * 0.15**2 + 0.01**2) / 12, disc * 0.15**2 / 2
    shift = (cube + disc) * centre**2 + disc * (0.025 - centre) ** 2
    return mass, centre, cube_moment + 2 * disc_xx + shift, cube_moment + 2 * disc_zz


@every_variant
def test_ingenuity_model(variant):
    task, model = compiled("Ingenuity", variant)
    mass, centre, sideways, upright = ingenuity_inertia()
    assert_allclose(
        [mass, centre, sideways, upright], [1.5001, 0.01178, 0.0084, 0.01611], atol=2e-5
    )
    assert_allclose(model.body("chassis").mass, 0.0864)
    for rotor, z in (("lower_rotor", 0), ("upper_rotor", 0.025)):
        assert_allclose(model.body(rotor).mass, 0.7069, atol=5e-5)
        assert_allclose(model.body(rotor).pos, (0, 0, z))
    assert model.njnt == 1  # the rotors are welded to the chassis
    data = forward(model, make_state(task, model))
    assert_allclose(model.body_subtreemass[model.body("chassis").id], mass)
    assert_allclose(data.subtree_com[model.body("chassis").id], (0, 0, 2 + centre))
    inertia = np.zeros((6, 6))
    mujoco.mj_fullM(model, data, inertia)  # about the chassis' origin
    about_origin = [sideways + mass * centre**2] * 2 + [upright]
    assert_allclose(inertia[3:, 3:], np.diag(about_origin), atol=1e-12)
    assert np.all(model.dof_damping == 0)
    assert np.all(model.dof_armature == 0)


@every_free_task
def test_options(name, variant):
    task, model = compiled(name, variant)
    copter = name == "Ingenuity"
    assert_allclose(model.opt.gravity, (0, 0, -GRAVITY[name]))
    step, substeps = (0.01, 1) if variant == "oige" else (0.005, 2)
    step, substeps = (step, substeps) if copter else (0.0083, 2)
    assert (model.opt.timestep, task.time_step, task.substeps) == (step, step, substeps)
    flags = mujoco.mjtDisableBit
    useless = flags.mjDSBL_ISLAND.value | flags.mjDSBL_WARMSTART.value
    assert model.opt.disableflags == flags.mjDSBL_AUTORESET.value | useless
    assert (task.episode_length, task.clip_obs) == (
        (2000, 5.0) if copter else (1000, math.inf)
    )


def test_unknown_variant():
    with pytest.raises(ValueError, match="oige, ige"):
        TASKS["Ant"]("isaac")


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


def distance(model, data, one, other):
    """Between the first geoms of two bodies; negative where they overlap."""
    geoms = [model.body(body).geomadr[0] for body in (one, other)]
    return mujoco.mj_geomDistance(model, data, *geoms, 1.0, None)


@every_variant
def test_ant_does_not_collide_with_itself(variant):
    task, model = compiled("Ant", variant)
    joints = np.radians(
        [90, 30, -90, -30, 0, -30, 0, 30]
    )  # beyond the limits: front legs cross
    data = forward(model, make_state(task, model, joints=joints))
    assert distance(model, data, "front_left_leg", "front_right_leg") < 0
    assert data.ncon == 0


@every_variant
def test_humanoid_collides_with_itself(variant):
    task, model = compiled("Humanoid", variant)
    data = forward(model, make_state(task, model, joints=np.zeros(21)))
    assert (
        distance(model, data, "right_thigh", "right_shin") < 0
    )  # parent and child: not counted
    assert data.ncon == 0
    crossed = [math.radians(15) * name.endswith("hip_x") for name in HUMANOID_JOINTS]
    data = forward(model, make_state(task, model, joints=crossed))
    pairs = [
        {model.body(model.geom_bodyid[g]).name for g in geoms}
        for geoms in data.contact.geom
    ]
    assert {"right_shin", "left_shin"} in pairs


@every_variant
def test_ingenuity_collides_with_the_floor_only(variant):
    task, model = compiled("Ingenuity", variant)
    assert forward(model, make_state(task, model)).ncon == 0
    data = forward(model, make_state(task, model, position=(0, 0, 0.05)))
    assert data.ncon > 0
    assert all(model.geom("floor").id in geoms for geoms in data.contact.geom)
    target = model.body("target")
    assert target.mass == 0
    assert (
        not model.geom_contype[target.geomadr[0]]
        | model.geom_conaffinity[target.geomadr[0]]
    )


@every_variant
@pytest.mark.parametrize("action", [(0, 0, 1, 0, 0, 0), (0.1, -0.5, 0.3, 1, 0.7, -0.4)])
def test_thrust_on_a_tilted_body(variant, action):
    """Accelerations by Newton and Euler: F = m a and I alpha = r x F, from rest."""
    task, model = compiled("Ingenuity", variant)
    mass, centre, sideways, upright = ingenuity_inertia()
    state = make_state(task, model, quat=quaternion(0.3, 0.5, -0.8))
    control = task.control(torch.tensor([action], dtype=torch.float64))[0]
    data = forward(model, state, control)
    rotation = data.body("chassis").xmat.reshape(3, 3)
    force, torque = np.zeros(3), np.zeros(3)  # world axes; about the centre of mass
    for (x, y, z), height in zip((action[:3], action[3:]), (0, 0.025), strict=True):
        thrust = 20 * z
        if variant == "oige":  # the full range of x and y matters
            rotor = np.array([thrust * 0.2 * x, thrust * 0.2 * y, thrust])
        else:
            rotor = rotation @ [
                thrust * np.clip(x, -0.2, 0.2),
                thrust * np.clip(y, -0.2, 0.2),
                thrust,
            ]
        force += rotor
        torque += np.cross(rotation @ [0, 0, height - centre], rotor)
    alpha = rotation @ (rotation.T @ torque / (sideways, sideways, upright))
    acceleration = force / mass + (0, 0, -3.721)
    of_origin = acceleration + np.cross(alpha, rotation @ [0, 0, -centre])
    assert_allclose(data.qacc[:3], of_origin, atol=1e-9)
    assert_allclose(data.qacc[3:], rotation.T @ alpha, atol=1e-8)
    if variant == "oige" and action[2] == 1:
        assert_allclose(acceleration, (0, 0, 9.61), atol=2e-3)


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
    fraction = np.linspace(
        -0.1, 1.1, task.act_dim
    )  # beyond the limits too: not clipped
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


def test_humanoid_joint_forces():
    """ige, indices 54 to 74: motor, spring and damper, as MuJoCo applies them."""
    task, model = compiled("Humanoid", "ige")
    state, action = random_state(task, model), random_action(task)
    data = forward(model, state, task.control(action)[0])
    torque = (data.qfrc_actuator + data.qfrc_passive)[6:]
    assert_allclose(task.observe(state, action)[0, 54:75], 0.01 * torque)
    _, _, _, _, k, b, _, gear = HUMANOID_JOINTS["left_knee"]
    q, speed = state.qpos[0, 19], state.qvel[0, 18]
    assert_allclose(torque[12], gear * action[0, 12] - k * q - b * speed)


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


@every_variant
def test_ingenuity_observations(variant):
    task, model = compiled("Ingenuity", variant)
    quat = quaternion(0.3, 0.5, -0.8)
    velocity, target = (1, -2, 3, 0.5, 1.5, -2.5), (0.4, -0.7, 1.6)
    state = make_state(task, model, (1, 2, 3), quat, velocity, memory=target)
    obs = task.observe(state, zero_action(task))[0]
    _, angular = body_velocity(model, forward(model, state), "chassis")
    assert_allclose(obs[:3], [-0.2, -0.9, -1.4 / 3])
    w, x, y, z = quat
    assert_allclose(obs[3:7], (w, x, y, z) if variant == "oige" else (x, y, z, w))
    assert_allclose(obs[7:10], [0.5, -1, 1.5])
    assert_allclose(obs[10:13], angular / math.pi)
    assert obs.shape == (13,)


@every_free_task
def test_clipping_of_observations(name, variant):
    simulator = MujocoSimulator(TASKS[name], 1, 0, variant=variant)
    simulator.reset()
    simulator.physics.qpos[0, 2] = 3
    simulator.physics.qvel[0, :3] = torch.tensor([70.0, -70.0, 0.0])
    _, _, _, _, obs = simulator.step(torch.zeros(1, simulator.act_dim))
    if name == "Ingenuity":
        assert obs[0, 7:9].tolist() == [5, -5]
    else:
        assert_allclose(obs[0, 1:3], (70, -70), rtol=0.1)


# --- Rewards ---


def terms(task, model, action=None, moved=(0, 0), **after):
    """The reward's terms for a robot that has just moved by (x, y) m to the state `after`."""
    after = make_state(task, model, **after)
    before = after.clone()
    before.qpos[:, :2] -= torch.tensor(moved)
    action = zero_action(task) if action is None else action
    values = {
        key: t.item() for key, t in task.reward_terms(before, after, action).items()
    }
    reward = task.reward(before, after, action).item()
    if not task.failed(after):
        assert_allclose(reward, sum(values.values()))
    return values, reward


@every_runner
def test_reward_of_standing_and_of_running(name, variant):
    """Upright and heading for the target: 1.1 (Ant) or 2.6 (Humanoid), and the speed in m/s."""
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
        assert_allclose(
            values["heading"], 0.5 + min(offset, 0) * 0.5 / 0.8, rtol=0, atol=1e-12
        )


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
    """Joint positions: one at `scaled` (-1 and 1: its limits), the others in the middle."""
    joints = RANGES[name].mean(-1)
    low, high = RANGES[name][joint]
    joints[joint] += scaled * (high - low) / 2
    return joints


@every_runner
@pytest.mark.parametrize("side", [1, -1])
def test_costs_of_joint_limits(name, variant, side):
    """Ant: counts joints above 0.99 of their range, at the upper limit only. Humanoid: 0 at 0.98,
    0.25 rho at the limit and on from there, on both sides."""
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
    """To a millionth of the way, where a difference of distances would be off by 0.06 mm."""
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


@every_variant
@pytest.mark.parametrize(
    ("away", "quat", "spin", "ige", "oige"),
    [
        ((0, 0, 0), {}, (0, 0, 0), 7, 3),
        ((0, 0, 2), {}, (0, 0, 0), 7 / 5, 3 / 11),
        ((-1.2, 1.6, 0), {}, (0, 0, 0), 7 / 5, 3 / 11),
        ((0, 0, 0), {"pitch": math.pi / 3}, (0, 0, 0), 1 + 4 + 1, 1 + 1 / 8.5 + 1),
        ((0, 0, 0), {}, (5, -5, -2), 1 + 5 + 1 / 5, 1 + 1 + 1 / 41),
        # on its side, spinning about its y axis, which is upright
        (
            (0, 0, 0),
            {"roll": math.pi / 2},
            (0, 2, 0),
            1 + 2.5 + 1 / 5,
            1 + 1 / 31 + 1 / 41,
        ),
    ],
)
def test_ingenuity_reward(variant, away, quat, spin, ige, oige):
    task, model = compiled("Ingenuity", variant)
    target = np.array([0.3, -0.2, 1.5])
    place = dict(position=target + away, quat=quaternion(**quat), memory=target)
    values, reward = terms(task, model, velocity=(1, 2, 3, *spin), **place)
    assert_allclose(reward, ige if variant == "ige" else oige)
    assert set(values) == {"position", "upright", "spin"}
    near = 1 / (1 + (1 if variant == "ige" else 2.5) * np.square(away).sum())
    assert_allclose(values["position"], near)


@every_variant
def test_ingenuity_failure(variant):
    """Too far away or below half a metre; the reward stays as it is."""
    task, model = compiled("Ingenuity", variant)
    limit = 8 if variant == "ige" else 20
    for z, failed in (
        (0.5, False),
        (0.5 - 1e-9, True),
        (1 + limit, False),
        (1.001 + limit, True),
    ):
        place = dict(position=(0, 0, z), memory=(0, 0, 1))
        assert task.failed(make_state(task, model, **place)).item() == failed
        values, reward = terms(task, model, **place)
        assert_allclose(reward, sum(values.values()))


# --- Foot sensors ---


def foot_wrenches(name, variant, data):
    """{foot: (force, torque)} in foot axes, as the task reports them for MuJoCo's data."""
    task, _ = compiled(name, variant)
    state = State(
        *(
            torch.tensor(np.array([x]))
            for x in (data.qpos, data.qvel, data.sensordata, [])
        )
    )
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
    """oige: the wrench of the parent on each foot balances the floor's and the foot's weight."""
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
        moments = (
            torque
            + np.cross(ankle, force)
            + floor_torque
            + np.cross(body.xipos, gravity)
        )
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
    """Linear and angular momentum of a body, the latter about its centre of mass; world axes."""
    linear, angular = body_velocity(model, data, foot, mujoco.mjtObj.mjOBJ_BODY)
    axes = data.body(foot).ximat.reshape(3, 3)
    inertia = axes @ np.diag(model.body(foot).inertia) @ axes.T
    return np.concatenate([model.body(foot).mass * linear, inertia @ angular])


@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
@pytest.mark.parametrize("seed", [0, 1])
def test_net_wrench_is_the_change_of_momentum(name, seed):
    """ige: force = dp/dt and torque = dL/dt + c x force, by central differences in flight."""
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
    """In flight: net wrench (ige) = wrench of the joint (oige) + weight, at the foot's origin."""
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


# --- Physics ---


@every_free_task
def test_conservation_in_free_fall(name, variant):
    """Without contacts, limits, damping, springs and motors: p, L, energy and the parabola."""
    task, model = compiled(name, variant)
    model = without_contacts(model)
    model.dof_damping[:], model.jnt_stiffness[:] = 0, 0
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_LIMIT.value
    model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY.value
    model.opt.integrator, model.opt.timestep = mujoco.mjtIntegrator.mjINT_RK4, 1e-3
    data = forward(model, random_state(task, model))
    root = model.body("chassis" if name == "Ingenuity" else "torso").id
    measured = []
    for _ in range(2):
        mujoco.mj_subtreeVel(model, data)
        fields = data.subtree_com, data.subtree_linvel, data.subtree_angmom
        measured.append([*(field[root].copy() for field in fields), data.energy.sum()])
        mujoco.mj_step(model, data, 300)
        mujoco.mj_forward(model, data)
    (place, velocity, spin, energy), (place_2, velocity_2, spin_2, energy_2) = measured
    gravity, t = np.array([0, 0, -GRAVITY[name]]), 0.3
    assert_allclose(velocity_2, velocity + gravity * t, atol=1e-6)
    assert_allclose(place_2, place + velocity * t + gravity * t**2 / 2, atol=1e-6)
    assert_allclose(spin_2, spin, atol=1e-6 * np.linalg.norm(spin))
    assert_allclose(energy_2, energy, rtol=1e-6)
    assert abs(spin).max() > 1e-3


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
    single = [
        "shoulder" not in joint for joint in names
    ]  # shoulders: two joints push each other
    physics = CpuPhysics(model, 2, 1)
    physics.qpos[:] = make_state(task, model).qpos
    physics.ctrl[:] = torch.tensor([[1.0], [-1.0]])
    physics.step(400)
    ends = np.stack([high, low])
    assert np.degrees(abs(physics.qpos[:, 7:].numpy() - ends))[:, single].max() < 2


@pytest.mark.parametrize("speed", [1.0, 10.0, 40.0])
def test_a_joint_stops_at_its_limit(speed):
    """A fast one and a slow one, without torque: at the limit, neither before nor behind it."""
    task, model = compiled("Ant", "oige")
    model = without_contacts(model)
    model.opt.gravity[:] = 0
    model.dof_damping[:] = 0
    low, high = RANGES["Ant"].T
    physics = CpuPhysics(model, 2, 1)
    physics.qpos[:] = make_state(task, model).qpos
    hips = [7, 9, 11, 13]
    physics.qvel[0, 6:14:2], physics.qvel[1, 6:14:2] = speed, -speed
    nearest, beyond = np.full(2, np.inf), 0.0
    for _ in range(150):
        physics.step(1)
        q = physics.qpos[:, hips].numpy()
        distance = np.minimum(q - low[0], high[0] - q)
        nearest = np.minimum(nearest, abs(distance).min(1))
        beyond = max(beyond, -distance.min())
    assert np.degrees(beyond) < 0.5
    assert np.degrees(nearest).max() < 1


@every_variant
def test_a_limit_acts_on_outward_motion_only(variant):
    """Joints at their limits leave them as if there were none."""
    task, model = compiled("Ant", variant)
    model = without_contacts(model)
    low, high = RANGES["Ant"].T
    rows = []
    for disable in (False, True):
        free = copy.copy(model)
        if disable:
            free.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_LIMIT.value
        physics = CpuPhysics(free, 2, 1)
        physics.qpos[:] = make_state(task, model).qpos
        physics.qpos[0, 7:], physics.qpos[1, 7:] = torch.tensor(low), torch.tensor(high)
        physics.qvel[0, 6:], physics.qvel[1, 6:] = 3.0, -3.0
        physics.step(1)
        rows.append(physics.qvel.clone())
    assert_allclose(rows[0], rows[1], atol=1e-6)


def lowest_point(model, data):
    """Of all capsules and spheres of the robot, m above the floor."""
    heights = []
    for geom in np.flatnonzero(model.geom_bodyid > 0):
        radius, half, _ = model.geom_size[geom]
        axis = abs(data.geom_xmat[geom].reshape(3, 3)[2, 2])
        heights.append(data.geom_xpos[geom, 2] - radius - half * axis)
    return min(heights)


@every_variant
def test_the_ant_rests_on_its_feet(variant):
    """Neither hovers above the floor nor sinks into it by more than 1 mm."""
    simulator = make_simulator("Ant", variant, num_envs=1)
    for _ in range(180):
        simulator.step(torch.zeros(1, 8))
    data = simulator.physics.data(0)
    mujoco.mj_forward(simulator.model, data)
    assert abs(data.qvel).max() < 0.05
    assert abs(lowest_point(simulator.model, data)) < 1e-3


@every_free_task
def test_energy_does_not_grow_in_free_flight(name, variant):
    """With the simulator's own integrator and step, without action: within 1 % for 60 steps."""
    task, model = compiled(name, variant)
    model = without_contacts(model)
    model.opt.gravity[:] = 0
    model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY.value
    physics = CpuPhysics(model, 4, 1)
    for i in range(4):
        state = random_state(task, model, seed=i)
        physics.qpos[i], physics.qvel[i] = state.qpos[0], state.qvel[0]
    energies = []
    for _ in range(60):
        physics.step(task.substeps)
        worlds = [physics.data(i) for i in range(4)]
        for data in worlds:
            mujoco.mj_forward(model, data)
        energies.append([data.energy.sum() for data in worlds])
    start, later = energies[0], np.array(energies)
    assert np.all(later < np.array(start) * 1.01)


every_stander = pytest.mark.parametrize(
    "name", ["Ant", "Humanoid", "Ingenuity", "Anymal"]
)


@every_stander
def test_spheres_at_the_floor_are_the_robot(name):
    """In any pose its lowest point is that of a sphere, but for rounded corners and rims."""
    _, model = compiled(name, "oige")
    spheres, bodies = model.pair_geom2, Batch(model, 20, 1)
    _ = bodies.geom_xpos, bodies.geom_xmat
    rng = np.random.default_rng(0)
    for row in bodies.qpos:
        row[3:7] = rng.standard_normal(4)
        row[7:] = rng.uniform(*model.jnt_range[1:].T)
    bodies.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)
    heights = bodies.geom_xpos[:, spheres, 2] - model.geom_size[spheres, 0]
    assert_allclose(heights.min(1), -depths(model, bodies), atol=1.5e-3)
    assert np.all(heights.argmin(1) != 0)  # many of them in turn
    from_root = bodies.geom_xpos[:, spheres] - bodies.qpos[:, None, :3]
    farthest = (np.linalg.norm(from_root, axis=-1) + model.geom_size[spheres, 0]).max()
    assert farthest < CpuPhysics(model, 1, 1).limits.floor.reach - 0.05


def test_a_body_that_turns_about_a_far_anchor_is_far_from_the_root():
    """Half a turn of the hinge, half a metre outside the body's origin, takes it 1 m outwards."""
    body = (
        "<body pos='1 0 0'><joint axis='0 0 1' pos='.5 0 0'/><geom size='.1'/></body>"
    )
    root = f"<body><freejoint/><geom size='.1'/>{body}</body>"
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{root}</worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    data.qpos[7] = np.pi
    mujoco.mj_forward(model, data)
    assert_allclose(distance_to_root(model, 1), np.linalg.norm(data.geom_xpos[1]) + 0.1)


def test_spheres_of_the_ant():
    """One at each hip, knee and foot, and the torso: not two where two bodies meet."""
    _, model = compiled("Ant", "oige")
    assert model.npair == 13


@every_stander
def test_the_way_of_spheres_is_that_of_the_coming_step(name):
    """If nothing accelerates: to first order as the bodies move and turn."""
    task, model = compiled(name, "oige")
    model = copy.copy(model)
    model.opt.timestep = 1e-6
    physics = CpuPhysics(model, 20, 1)
    for seed in range(20):
        state = random_state(task, model, seed)
        physics.qpos[seed], physics.qvel[seed] = state.qpos[0], state.qvel[0]
    physics.qpos[:, 2] = 0.1
    physics._look()
    floor = physics.limits.floor
    height, way = floor.height, floor.way
    for qpos, qvel in zip(physics.qpos.numpy(), physics.qvel.numpy(), strict=True):
        mujoco.mj_integratePos(model, qpos, qvel, model.opt.timestep)
    physics._look()
    assert_allclose(height - floor.height, way, atol=1e-9)
    assert abs(way).max() > 1e-6


@every_stander
def test_a_robot_far_above_the_floor_needs_no_look(name, monkeypatch):
    """Only the lower one of two is looked at; with both high up nothing is."""
    task, model = compiled(name, "oige")
    physics = CpuPhysics(model, 2, 1)
    state = random_state(task, model)
    physics.qpos[:], physics.qvel[:] = state.qpos, state.qvel
    physics.qpos[1, 2] = 0.1
    looked, forward = [], physics.looker.forward
    monkeypatch.setattr(
        physics.looker, "forward", lambda i, s: looked.append(i) or forward(i, s)
    )
    physics._look()
    floor = physics.limits.floor
    assert [*looked[0]] == [1]
    assert np.all(floor.height[0] == floor.far)
    assert np.all(floor.height[1] < 2)
    assert floor.near
    physics.qpos[1, 2] = 9
    physics._look()
    assert len(looked[1]) == 0
    assert not floor.near


def test_a_robot_in_the_floor_is_lifted():
    """To 3 mm below it, straight up."""
    physics = dropped("Ant", -0.05, 0)
    before = physics.qpos.clone()
    physics.step(1)
    assert_allclose(physics.limits.floor.height.min(), -0.003, atol=1e-9)
    assert_allclose(physics.qpos[0, 2] - before[0, 2], 0.047, atol=0.005)
    assert_allclose(physics.qpos[:, :2], before[:, :2], atol=0.01)


def dropped(name, height, speed):
    """CpuPhysics of one robot, its lowest sphere so high (m), moving down; without its motors."""
    task, model = compiled(name, "oige")
    model = copy.copy(model)
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION.value
    physics = CpuPhysics(model, 1, 1)
    physics.qpos[:] = task.initial(
        lambda *range_and_n: torch.zeros(1, range_and_n[2])
    ).qpos
    physics.qpos[:, 2] = 0
    physics._look()
    physics.qpos[:, 2] = height - physics.limits.floor.height.min()
    physics.qvel[:, 2] = -speed
    physics._look()
    return physics


@every_stander
@pytest.mark.parametrize("speed", [0.0, 1.0, 4.0])
def test_a_robot_falls_freely_until_it_lands(name, speed):
    """As without a floor while steps end 2 cm above it, and then not even half a mm into it."""
    physics = dropped(name, 0.4, speed)
    free = CpuPhysics(without_contacts(physics.model), 1, 1)
    free.load_state_dict(physics.state_dict())
    floor, steps = physics.limits.floor, 0
    while (floor.height - floor.way).min() > 0.02:
        physics.step(1)
        free.step(1)
        assert_allclose(physics.qpos, free.qpos, atol=1e-9)
        steps += 1
    assert steps > 3
    heights = []
    for _ in range(100):
        physics.step(1)
        heights.append(floor.height.min())
    assert -0.0005 < min(heights) < 0.001


def pulled(share):
    """Speeds (10,) of a helicopter on the floor, each 0.1 s, under this share of its weight."""
    physics = dropped("Ingenuity", 0.001, 0)
    physics.step(50)
    weight = physics.model.body_subtreemass[physics.model.body("chassis").id] * 3.721
    chassis = physics.model.body("chassis").id
    centre = physics.batch.xfrc_applied.reshape(-1, 6)[chassis]
    speeds = []
    for _ in range(10):
        centre[0] = share * weight
        physics.step(10)
        speeds.append(physics.qvel[0, 0].item())
    return np.array(speeds)


def test_friction():
    """Of 1: less than the weight doesn't move a body, more accelerates it by the difference."""
    assert abs(pulled(0.8)).max() < 0.02
    assert_allclose(
        np.diff(pulled(1.5)).mean(), 0.5 * 3.721 * 0.1, rtol=0.15
    )  # it wobbles


@pytest.mark.slow
@every_free_task
def test_stress(name, variant):
    stress(name, variant)


# --- The simulator ---


def make_simulator(name, variant, num_envs=4, seed=0, **kwargs):
    """After its first reset; the helicopter is high enough to fly blindly for a second."""
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
    simulator.progress[:] = (
        simulator.max_steps - 3 - 2 * torch.arange(simulator.num_envs)
    )


def rollout(simulator, steps=12):
    """All outputs of random steps, stacked: five tensors (steps, N, ...)."""
    rows = [simulator.step(action) for action in actions(simulator, steps)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_task
def test_reset(name, variant):
    """Starts new episodes everywhere, also in the middle of others."""
    simulator = make_simulator(name, variant)
    rollout(simulator, 3)
    old = simulator._state().clone()
    obs = simulator.reset()
    state = simulator._state()
    assert (state.qpos != old.qpos).any(-1).all()
    assert (simulator.progress == 0).all()
    first = State(state.qpos, state.qvel, torch.zeros_like(state.sensors), state.memory)
    action = torch.zeros(4, simulator.act_dim, dtype=torch.float64)
    assert torch.equal(obs, simulator.task.observe(first, action).float())


@every_task
def test_rollouts_depend_on_the_seed_only(name, variant):
    """Bit by bit, resets included, for any number of threads."""
    rollouts = []
    for seed, threads in ((1, 1), (1, 2), (2, 1)):
        simulator = make_simulator(name, variant, seed=seed, threads=threads)
        near_the_end(simulator)
        rollouts.append(rollout(simulator))
    obs, reward, terminated, truncated, final_obs = rollouts[0]
    assert obs.shape == final_obs.shape == (12, 4, simulator.obs_dim)
    assert reward.shape == terminated.shape == truncated.shape == (12, 4)
    assert {t.dtype for t in (obs, reward, final_obs)} == {torch.float32}
    assert {t.dtype for t in (terminated, truncated)} == {torch.bool}
    assert torch.equal(
        obs[~truncated & ~terminated], final_obs[~truncated & ~terminated]
    )
    assert simulator.fps == {"Ant": 60, "Humanoid": 60, "Ingenuity": 100}.get(
        name, simulator.fps
    )
    assert truncated.any(0).all()  # each environment has been reset
    assert same(rollouts[0], rollouts[1])
    assert not torch.equal(rollouts[0][0], rollouts[2][0])
    assert torch.equal(simulator.reset(seed=5), simulator.reset(seed=5))
    assert not torch.equal(simulator.reset(seed=5), simulator.reset())


@pytest.mark.slow
@every_task
def test_batch_equals_single_environments(name, variant):
    batch = make_simulator(name, variant, num_envs=3)
    rollout(batch, 3)
    singles = []
    for i in range(3):
        single = make_simulator(name, variant, num_envs=1, seed=9)
        for field in STATE:
            getattr(single.physics, field)[0] = getattr(batch.physics, field)[i]
        single.memory[0], single.progress[0] = batch.memory[i], batch.progress[i]
        singles.append(single)
    alive, steps = torch.ones(3, dtype=torch.bool), 0
    for action in actions(batch, 26):
        alone = zip(
            *(s.step(action[i : i + 1]) for i, s in enumerate(singles)), strict=True
        )
        obs, *rest = batch.step(action)
        obs_alone, *rest_alone = (torch.cat(column) for column in alone)
        assert same([t[alive] for t in rest], [t[alive] for t in rest_alone])
        alive &= ~(rest[1] | rest[2])  # resets draw other numbers
        assert torch.equal(obs[alive], obs_alone[alive])
        steps += alive.any()
    assert steps == 26


def assert_uniform(x, low, high):
    """Samples in [low, high], with the quantiles of the uniform distribution."""
    x, width = x.flatten().numpy(), high - low
    assert low <= x.min() < low + 0.01 * width
    assert high - 0.01 * width < x.max() <= high
    error = 5 * 0.5 / math.sqrt(len(x))  # five standard deviations
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs((x < low + quantile * width).mean() - quantile) < error


@pytest.fixture(params=["reset", "step"])
def start_everywhere(request):
    """Simulator of 2000 environments in the first state of an episode: by reset, in a step."""

    def start(name, variant):
        simulator = MujocoSimulator(TASKS[name], 2000, 0, variant=variant, threads=2)
        simulator.reset()
        if request.param == "step":
            simulator.progress[:] = simulator.max_steps - 1
            simulator.step(torch.zeros(2000, simulator.act_dim))
        assert (simulator.progress == 0).all()
        return simulator

    return start


@every_runner
def test_first_states_of_the_runners(start_everywhere, name, variant):
    physics = start_everywhere(name, variant).physics
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
    assert (
        abs(
            torch.corrcoef(torch.cat([joints, physics.qvel[:, 6:]], 1).T).tril(-1)
        ).max()
        < 0.15
    )


@every_variant
def test_first_states_of_ingenuity(start_everywhere, variant):
    simulator = start_everywhere("Ingenuity", variant)
    position, quat = simulator.physics.qpos.split([3, 4], -1)
    width, low, high, target = (
        (0.5, 0.5, 1.5, 1) if variant == "oige" else (1.5, 0.8, 2.5, 5)
    )
    for axis in range(2):
        assert_uniform(position[:, axis], -width, width)
        assert_uniform(simulator.memory[:, axis], -target, target)
    assert_uniform(position[:, 2], low, high)
    assert_uniform(simulator.memory[:, 2], 1, 2)
    assert (quat == torch.tensor([1.0, 0, 0, 0]).double()).all()
    assert (simulator.physics.qvel == 0).all()
    numbers = torch.cat([position, simulator.memory], 1)
    assert abs(torch.corrcoef(numbers.T).tril(-1)).max() < 0.15


def fail(simulator, world):
    """Puts a world into a state in which the task terminates within the next step."""
    low, high = simulator.model.jnt_range[1:].T
    pose = {
        "Ant": (0, 0, 0.28, 0, 1, 0, 0),  # on its back
        "Humanoid": (0, 0, 0.75, *quaternion(pitch=math.pi / 2)),  # lying
        "Ingenuity": (0, 0, 0.45, 1, 0, 0, 0),
    }[type(simulator.task).__name__]
    joints = [*np.clip(0, low, high)]
    simulator.physics.qpos[world] = torch.tensor([*pose, *joints], dtype=torch.float64)
    simulator.physics.qvel[world] = 0


@every_free_task
@pytest.mark.parametrize("end", ["failure", "time-out", "failure in the last step"])
def test_end_of_an_episode(name, variant, end):
    """final_obs is the true last observation, obs the first one of the next episode."""
    simulator = make_simulator(name, variant, num_envs=3)
    task, physics = simulator.task, simulator.physics
    rollout(simulator, 2)
    if end != "time-out":
        fail(simulator, 1)
    if end != "failure":
        simulator.progress[1] = simulator.max_steps - 1
    action = next(actions(simulator, 1))
    before = simulator._state().clone()  # of all worlds
    world = CpuPhysics(simulator.model, 1, 1)  # what the episode's last step does
    for field in STATE:
        getattr(world, field)[0] = getattr(physics, field)[1]
    world.ctrl[:] = task.control(action[1:2].double())
    world.step(task.substeps)
    target = before.memory[1]
    last = task.limit(State(world.qpos, world.qvel, world.sensordata, target[None]))

    obs, reward, terminated, truncated, final_obs = simulator.step(action)
    assert terminated.tolist() == [False, end != "time-out", False]
    assert truncated.tolist() == [False, end == "time-out", False]
    assert simulator.progress.tolist() == [3, 0, 3]
    expected = task.observe(last, action[1:2].double()).clamp(
        -task.clip_obs, task.clip_obs
    )
    assert_allclose(final_obs[1:2], expected, rtol=1e-6, atol=1e-6)
    old = State(*(t[1:2] for t in vars(before).values()))
    assert_allclose(
        reward[1], task.reward(old, last, action[1:2].double())[0], rtol=1e-5
    )
    assert torch.equal(obs[[0, 2]], final_obs[[0, 2]])
    now = [physics.qpos[1:2], physics.qvel[1:2], torch.zeros_like(last.sensors)]
    first = State(*now, simulator.memory[1:2])
    assert torch.equal(obs[1:2], task.observe(first, zero_action(task)).float())
    if name == "Ingenuity":
        assert obs[1, 7:].tolist() == [0] * 6
        assert not torch.equal(simulator.memory[1], target)
    else:
        feet = LAYOUT[name, variant][3]
        assert obs[1, 0] == torch.tensor(START_HEIGHT.get((name, variant), 1.34))
        assert (obs[1, 1:7] == 0).all()
        assert (
            obs[1, feet:] == 0
        ).all()  # neither a wrench at the feet nor an action yet
        assert (final_obs[1, feet:] != 0).all()
    assert (physics.qacc_warmstart[1] == 0).all()
    simulator.step(action)
    assert simulator.progress.tolist() == [4, 1, 4]


@every_task
def test_time_outs_come_after_l_minus_1_steps(name, variant):
    simulator = make_simulator(name, variant)
    assert simulator.max_steps == simulator.task.episode_length - 1
    simulator = make_simulator(name, variant, num_envs=2)
    simulator.max_steps = 5
    ends = []
    for action in actions(simulator, 15):
        if name == "Ingenuity":
            simulator.physics.qpos[:, 2] = 4
        _, _, terminated, truncated, _ = simulator.step(action)
        assert not terminated.any()
        ends.append(truncated.tolist())
    assert ends == [[step % 5 == 0] * 2 for step in range(1, 16)]


@every_variant
def test_new_targets(variant):
    """At progress 500, 1000 and 1500, before the step; other environments keep theirs."""
    simulator = make_simulator("Ingenuity", variant, num_envs=8)
    due = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    simulator.progress[:] = torch.tensor([499, 500, 501, 1000, 250, 1500, 0, 1999 - 2])
    old = simulator.memory.clone()
    obs, *_ = simulator.step(torch.zeros(8, 6))
    assert torch.equal((simulator.memory != old).all(-1), due)
    assert torch.equal((simulator.memory != old).any(-1), due)
    to_target = (simulator.memory - simulator.physics.qpos[:, :3]) / 3
    assert_allclose(obs[:, :3], to_target.clamp(-5, 5), rtol=1e-6)
    width = 1 if variant == "oige" else 5
    assert (simulator.memory[:, :2].abs() <= width).all()
    assert ((simulator.memory[:, 2] >= 1) & (simulator.memory[:, 2] <= 2)).all()
    simulator.step(torch.zeros(8, 6))
    assert (simulator.memory[0] != old[0]).all()  # its progress was 500 by then


@every_runner
def test_speed_limit_of_the_runners(name, variant):
    """64 or 100 rad/s for the torso, its direction kept, and for each joint; like PhysX's."""
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
        assert_allclose(
            cut.qvel[0, 3:6], factor * limit * np.array([0, -0.6, 0.8]), rtol=1e-6
        )
        assert_allclose(cut.qvel[0, 6:], -factor * limit)
        assert torch.equal(cut.qpos, state.qpos)


@every_variant
def test_speed_limit(variant):
    """The angular velocity is cut to 4 pi rad/s, its direction kept; the rest is not touched."""
    simulator = make_simulator("Ingenuity", variant, num_envs=2)
    limit, axis = 4 * math.pi, torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64)
    simulator.physics.qvel[:, :3] = 3
    simulator.physics.qvel[0, 3:] = 2.5 * limit * torch.tensor([0.0, 0, 1]).double()
    simulator.physics.qvel[1, 3:] = 0.9 * limit * torch.tensor([0.0, 0, 1]).double()
    obs, *_ = simulator.step(torch.zeros(2, 6))
    assert_allclose(simulator.physics.qvel[0, 3:], (0, 0, limit), atol=1e-9)
    assert_allclose(simulator.physics.qvel[1, 3:], (0, 0, 0.9 * limit), atol=1e-9)
    assert_allclose(obs[:, 12], (4, 3.6), rtol=1e-6)
    assert_allclose(simulator.physics.qvel[:, :2], 3, atol=0.05)
    state = simulator._state().clone()
    state.qvel[:, 3:] = 2 * limit * axis
    cut = simulator.task.limit(state)
    assert_allclose(cut.qvel[:, 3:], (limit * axis).expand(2, 3))
    assert torch.equal(cut.qvel[:, :3], state.qvel[:, :3])


@every_task
def test_resume(name, variant):
    """From the middle of episodes, in another simulator, through resets, bit by bit.

    The saved state stays as it was while the simulator goes on.
    """
    simulator = make_simulator(name, variant)
    near_the_end(simulator)
    rollout(simulator, 4)
    saved = simulator.state_dict()
    expected = rollout(simulator)
    assert expected[3].any()
    other = make_simulator(name, variant, seed=7)
    other.load_state_dict(saved)
    assert same(rollout(other), expected)
    simulator.load_state_dict(saved)
    assert same(rollout(simulator), expected)


class BrokenPhysics(CpuPhysics):
    """Whose second world breaks down: `number` stands in `field` after each step while set."""

    number, field = None, "qpos"

    def step(self, substeps):
        super().step(substeps)
        if self.number is not None:
            getattr(self, self.field)[1, 2] = self.number


@every_task
@pytest.mark.parametrize(
    ("field", "number"), [("qpos", math.nan), ("qvel", math.inf), ("qvel", -1e5)]
)
def test_a_diverged_environment_starts_anew(monkeypatch, name, variant, field, number):
    """It is not valid and says nothing about the task; the others don't notice."""
    sound = make_simulator(name, variant, num_envs=3)
    monkeypatch.setattr("isaac_tasks.mujoco_simulator.CpuPhysics", BrokenPhysics)
    broken = make_simulator(name, variant, num_envs=3)
    kept = torch.tensor([0, 2])
    for step, action in enumerate(actions(broken, 4)):
        broken.physics.field = field
        broken.physics.number = number if step == 1 else None
        rows, expected = broken.step(action), sound.step(action)
        assert same([t[kept] for t in rows], [t[kept] for t in expected])
        assert all(t.isfinite().all() for t in rows)
        if step == 1:
            obs, reward, terminated, truncated, final_obs = rows
            assert broken.valid.tolist() == [True, False, True]
            assert (reward[1], terminated[1], truncated[1]) == (0, False, False)
            assert torch.equal(obs[1], final_obs[1])
            assert broken.progress[1] == 0
            assert (broken._state().qpos[1] != sound._state().qpos[1]).any()
        else:
            assert broken.valid is None
        assert broken.diverged == (step == 1)
    assert broken.progress.tolist() == [4, 2, 4]


class NoHostNumbers(TorchFunctionMode):
    """Forbids to make tensors from Python's or NumPy's numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.tensor,
            torch.as_tensor,
            torch.from_numpy,
            torch.Tensor.new_tensor,
        )
        return func(*args, **(kwargs or {}))


@every_task
def test_steps_copy_nothing_from_the_host(name, variant):
    """CUDA graphs can't record such copies."""
    simulator = make_simulator(name, variant)
    with NoHostNumbers():
        simulator.step(torch.zeros(4, simulator.act_dim))


# --- Images ---


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["Ingenuity", *(pytest.param(n, marks=SLOW) for n in RANGES)]
)
def test_render(name):
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>")).close()
    except Exception as error:
        pytest.skip(f"no off-screen renderer works here: {error}")
    simulator = make_simulator(name, "oige")
    simulator.step(torch.zeros(4, simulator.act_dim))
    simulator.physics.qpos[0, 0] = 5
    before = simulator.state_dict()
    image = simulator.render()
    assert (
        abs(simulator.renderer.scene.camera[0].pos[0] - 5) < 1
    )  # it follows the robot
    assert image.shape == (480, 640, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5
    assert same(before["physics"].values(), simulator.state_dict()["physics"].values())


def test_render_error(monkeypatch):
    def broken(*_args):
        raise RuntimeError("no display")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(SimulatorError, match="no display"):
        make_simulator("Ant", "oige").render()


def test_marker_hovers_above_the_target():
    task, model = compiled("Ingenuity", "oige")
    data = mujoco.MjData(model)
    task.show(data, torch.tensor([1.0, 2.0, 1.5]))
    assert_allclose(data.mocap_pos[0], (1, 2, 1.9), rtol=1e-6)


# --- The GPU's physics ---


@pytest.mark.slow
@every_free_task
def test_warp_agrees_with_mujoco(name, variant):
    """One control step from the same states, in the air and on the floor, on Warp's CPU device.

    The first run compiles Warp's kernels, which takes minutes.
    """
    task, model = compiled(name, variant)
    cpu = CpuPhysics(model, 4, 1)
    warp = WarpPhysics(model, 4, "cpu", task.contacts, task.constraints)
    height, settle = {
        "Ant": (0.5, 30),
        "Humanoid": (1.285, 25),
        "Ingenuity": (0.07, 50),
    }[name]
    neutral = np.clip(0, *model.jnt_range[1:].T)
    floor = [make_state(task, model, (i, 0, height), joints=neutral) for i in range(2)]
    air = [random_state(task, model, seed) for seed in range(2)]
    for i, state in enumerate(floor + air):
        cpu.qpos[i], cpu.qvel[i] = state.qpos[0], state.qvel[0]
    cpu.step(settle)
    lowest = cpu.limits.floor.height.min(1)
    assert np.all(lowest[:2] < cpu.limits.floor.touching)
    assert np.all(lowest[2:] > 0.1)
    cpu.ctrl[:] = task.control(random_action(task, 4))
    cpu.qacc_warmstart[:] = 0
    warp.load_state_dict(cpu.state_dict())
    cpu.step(task.substeps)
    warp.step(task.substeps)
    for field, tolerance in (("qpos", 2e-6), ("qvel", 2e-5), ("sensordata", 1e-4)):
        expected = getattr(cpu, field)
        error = (getattr(warp, field).double() - expected).abs()
        allowed = tolerance * (1 + expected.norm(dim=-1, keepdim=True))
        assert (error < allowed).all(), (field, (error / allowed).amax(-1))


def test_what_cannot_be_recorded_as_a_graph_is_one_sentence(monkeypatch):
    def refuse(_simulator):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(MujocoSimulator, "_record", refuse)
    simulator = make_simulator("Ant", "oige")
    simulator.recorded = True
    text = "^can't record a step on cpu as a CUDA graph: no luck$"
    with pytest.raises(SimulatorError, match=text):
        simulator.step(simulator.action)


@pytest.mark.slow
def test_warp_prints_nothing():
    code = "from isaac_tasks import TASKS, physics; "
    code += "model = TASKS['Ingenuity']('oige').spec().compile(); "
    code += "physics.WarpPhysics(model, 4, 'cpu', 64, 256)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    unexpected = [
        line for line in done.stderr.splitlines() if "CUDA driver" not in line
    ]
    assert (done.returncode, done.stdout, unexpected) == (0, "", [])


@pytest.mark.slow
def test_warp_says_why_there_are_no_environments(monkeypatch):
    import mujoco_warp

    def refuse(*_args, **_options):
        raise RuntimeError("Failed to allocate 9 bytes on device 'cpu'\nand more")

    monkeypatch.setattr(mujoco_warp, "make_data", refuse)
    with pytest.raises(
        SimulatorError, match=r"^can't make 4 environments on cpu: .* 'cpu'$"
    ):
        WarpPhysics(compiled("Ant", "oige")[1], 4, "cpu", 64, 256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_task
def test_cuda_graphs(name, variant):
    """The recorded steps give what the functions themselves do, resets included."""
    graphs, functions = (make_simulator(name, variant, device="cuda") for _ in range(2))
    functions.recorded = False
    for simulator in (graphs, functions):
        near_the_end(simulator)
    ended = torch.zeros(4, dtype=torch.bool, device="cuda")
    for action in actions(graphs, 12):
        got, expected = graphs.step(action.cuda()), functions.step(action.cuda())
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(graphs.memory, functions.memory)
        assert torch.equal(graphs.progress, functions.progress)
        ended |= got[3]
    assert ended.all()
    assert graphs.graph
    kept = graphs.step(action.cuda())
    copies = [t.clone() for t in kept]
    graphs.step(-action.cuda())
    assert same(kept, copies)
