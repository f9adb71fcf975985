"""The physics under all robots: motion, joint limits, floor; the GPU's against the
CPU's.

Independent values come from MuJoCo's own functions and conservation laws.
"""

import copy
import math
import subprocess
import sys

import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT
from mujoco.batch import Batch
from numpy.testing import assert_allclose
from robot_stress import depths, stress
from robot_tables import GRAVITY, RANGES
from robots import (
    compiled,
    every_free_task,
    every_variant,
    forward,
    make_state,
    random_action,
    random_state,
    without_contacts,
)

from isaac_tasks import SimulatorError
from isaac_tasks.limits import distance_to_root
from isaac_tasks.physics import CpuPhysics, WarpPhysics

# --- Motion ---


every_stander = pytest.mark.parametrize(
    "name", ["Ant", "Humanoid", "Ingenuity", "Anymal"]
)


@every_free_task
def test_options(name, variant):
    task, model = compiled(name, variant)
    copter = name == "Ingenuity"
    assert_allclose(model.opt.gravity, (0, 0, -GRAVITY[name]))
    step, substeps = 0.0083, 2
    if copter:
        step, substeps = (0.01, 1) if variant == "oige" else (0.005, 2)
    assert (model.opt.timestep, task.time_step, task.substeps) == (step, step, substeps)
    flags = mujoco.mjtDisableBit
    useless = flags.mjDSBL_ISLAND.value | flags.mjDSBL_WARMSTART.value
    assert model.opt.disableflags == flags.mjDSBL_AUTORESET.value | useless
    length, clip = (2000, 5.0) if copter else (1000, math.inf)
    assert (task.episode_length, task.clip_obs) == (length, clip)


@every_free_task
def test_conservation_in_free_fall(name, variant):
    """Without contacts, limits, damping, springs, motors: p, L, energy, parabola."""
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


@every_free_task
def test_energy_does_not_grow_in_free_flight(name, variant):
    """With the simulator's integrator and step, no action: within 1 %, 60 steps."""
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


@pytest.mark.slow
@every_free_task
def test_stress(name, variant):
    stress(name, variant)


# --- Joint limits ---


@pytest.mark.parametrize("speed", [1.0, 10.0, 40.0])
def test_a_joint_stops_at_its_limit(speed):
    """Fast or slow, without torque: at the limit, neither before nor behind it."""
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


# --- Floor ---


@every_stander
def test_spheres_at_the_floor_are_the_robot(name):
    """In any pose its lowest point is a sphere's, but for rounded corners and rims."""
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
    """Half a turn of a hinge 0.5 m outside the body's origin takes it 1 m outwards."""
    hinge = "<joint axis='0 0 1' pos='.5 0 0'/>"
    body = f"<body pos='1 0 0'>{hinge}<geom size='.1'/></body>"
    root = f"<body><freejoint/><geom size='.1'/>{body}</body>"
    xml = f"<mujoco><worldbody>{root}</worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    data.qpos[7] = np.pi
    mujoco.mj_forward(model, data)
    assert_allclose(distance_to_root(model, 1), np.linalg.norm(data.geom_xpos[1]) + 0.1)


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

    def recorded(worlds, stage):
        looked.append(worlds)
        forward(worlds, stage)

    monkeypatch.setattr(physics.looker, "forward", recorded)
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
    """One robot, its lowest sphere so high (m), moving down; motors off."""
    task, model = compiled(name, "oige")
    model = copy.copy(model)
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION.value
    physics = CpuPhysics(model, 1, 1)
    start = task.initial(lambda _low, _high, n: torch.zeros(1, n))
    physics.qpos[:] = start.qpos
    physics.qpos[:, 2] = 0
    physics._look()
    physics.qpos[:, 2] = height - physics.limits.floor.height.min()
    physics.qvel[:, 2] = -speed
    physics._look()
    return physics


@every_stander
@pytest.mark.parametrize("speed", [0.0, 1.0, 4.0])
def test_a_robot_falls_freely_until_it_lands(name, speed):
    """As without a floor while steps end 2 cm above it; then not half a mm into it."""
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
    """Speeds (10,), each 0.1 s, of a helicopter on the floor, pulled by this share
    of its weight."""
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
    """Of 1: less than the weight moves no body, more accelerates by the difference."""
    assert abs(pulled(0.8)).max() < 0.02
    gained = np.diff(pulled(1.5)).mean()
    assert_allclose(gained, 0.5 * 3.721 * 0.1, rtol=0.15)  # it wobbles


# --- The GPU's physics ---


@pytest.mark.slow
@every_free_task
def test_warp_agrees_with_mujoco(name, variant):
    """One control step from the same states, in the air and on the floor, on Warp's CPU
    device.

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


def test_without_warp_a_gpu_user_is_told_of_the_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(
        SimulatorError, match=r"needs mujoco_warp: pip install .*, or .* with --no-cuda"
    ):
        WarpPhysics(compiled("Ant", "oige")[1], 4, "cuda", 64, 256)
