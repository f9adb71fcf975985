"""Ingenuity: the helicopter, observations, rewards, episodes.

Expected numbers are those of the task's definition or follow from it by hand.
"""

import math

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from robots import (
    assert_uniform,
    body_velocity,
    compiled,
    each_start,
    every_variant,
    forward,
    make_simulator,
    make_state,
    quaternion,
    start_everywhere,
    terms,
    zero_action,
)

# --- Model ---


def ingenuity_inertia():
    """Mass, height of its centre, I_xx and I_zz about it: a cube and two discs."""
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


@every_variant
def test_ingenuity_collides_with_the_floor_only(variant):
    task, model = compiled("Ingenuity", variant)
    assert forward(model, make_state(task, model)).ncon == 0
    data = forward(model, make_state(task, model, position=(0, 0, 0.05)))
    assert data.ncon > 0
    assert all(model.geom("floor").id in geoms for geoms in data.contact.geom)
    target = model.body("target")
    assert target.mass == 0
    geom = target.geomadr[0]
    assert model.geom_contype[geom] == model.geom_conaffinity[geom] == 0


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
            x, y = np.clip((x, y), -0.2, 0.2)
            rotor = rotation @ [thrust * x, thrust * y, thrust]
        force += rotor
        torque += np.cross(rotation @ [0, 0, height - centre], rotor)
    alpha = rotation @ (rotation.T @ torque / (sideways, sideways, upright))
    acceleration = force / mass + (0, 0, -3.721)
    of_origin = acceleration + np.cross(alpha, rotation @ [0, 0, -centre])
    assert_allclose(data.qacc[:3], of_origin, atol=1e-9)
    assert_allclose(data.qacc[3:], rotation.T @ alpha, atol=1e-8)
    if variant == "oige" and action[2] == 1:
        assert_allclose(acceleration, (0, 0, 9.61), atol=2e-3)


# --- Observations and rewards ---


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


# --- Episodes ---


@every_variant
@each_start
def test_first_states_of_ingenuity(variant, start):
    simulator = start_everywhere("Ingenuity", variant, start)
    position, quat = simulator.physics.qpos.split([3, 4], -1)
    width, low, high, target = 1.5, 0.8, 2.5, 5
    if variant == "oige":
        width, low, high, target = 0.5, 0.5, 1.5, 1
    for axis in range(2):
        assert_uniform(position[:, axis], -width, width)
        assert_uniform(simulator.memory[:, axis], -target, target)
    assert_uniform(position[:, 2], low, high)
    assert_uniform(simulator.memory[:, 2], 1, 2)
    assert (quat == torch.tensor([1.0, 0, 0, 0]).double()).all()
    assert (simulator.physics.qvel == 0).all()
    numbers = torch.cat([position, simulator.memory], 1)
    assert abs(torch.corrcoef(numbers.T).tril(-1)).max() < 0.15


@every_variant
def test_new_targets(variant):
    """At progress 500, 1000 and 1500, before the step; others keep theirs."""
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


@every_variant
def test_speed_limit(variant):
    """The angular velocity is cut to 4 pi rad/s along its direction, and only it."""
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


def test_marker_hovers_above_the_target():
    task, model = compiled("Ingenuity", "oige")
    data = mujoco.MjData(model)
    task.show(data, torch.tensor([1.0, 2.0, 1.5]))
    assert_allclose(data.mocap_pos[0], (1, 2, 1.9), rtol=1e-6)
