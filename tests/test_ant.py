"""Ant: what only this robot has."""

import math

import mujoco
import numpy as np
import torch
from numpy.testing import assert_allclose
from robot_tables import ANT_FEET, RADIUS
from robots import (
    compiled,
    distance,
    every_variant,
    forward,
    make_simulator,
    make_state,
)


def capsule_mass(radius, length, density):
    return density * math.pi * radius**2 * (length + 4 / 3 * radius)


@every_variant
def test_ant_model(variant):
    """What only the Ant has; masses exactly, by its density of 5 kg/m^3."""
    task, model = compiled("Ant", variant)
    for body, length in (("front_left_leg", 0.2), ("front_left_foot", 0.4)):
        mass = capsule_mass(RADIUS, length * math.sqrt(2), 5)
        assert_allclose(model.body(body).mass, mass)
    inner = 4 * capsule_mass(RADIUS, 0.2 * math.sqrt(2), 5)
    assert_allclose(model.body("torso").mass, 5 * 4 / 3 * math.pi * 0.25**3 + inner)
    assert_allclose(model.body("torso").inertia, (0.0136, 0.0111, 0.0111), atol=5e-5)
    assert np.all(model.geom_margin == 0)
    assert task.feet == tuple(ANT_FEET)


@every_variant
def test_ant_does_not_collide_with_itself(variant):
    task, model = compiled("Ant", variant)
    # Beyond the limits: front legs cross.
    joints = np.radians([90, 30, -90, -30, 0, -30, 0, 30])
    data = forward(model, make_state(task, model, joints=joints))
    assert distance(model, data, "front_left_leg", "front_right_leg") < 0
    assert data.ncon == 0


def test_spheres_of_the_ant():
    """One at each hip, knee and foot, and the torso: not two where two bodies meet."""
    _, model = compiled("Ant", "oige")
    assert model.npair == 13


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
