"""Humanoid: what only this robot has."""

import math

import numpy as np
from numpy.testing import assert_allclose
from robot_stress import own_shapes
from robot_tables import HUMANOID_JOINTS
from robots import (
    compiled,
    distance,
    every_variant,
    forward,
    make_state,
    random_action,
    random_state,
)


@every_variant
def test_humanoid_contacts(variant):
    _, model = compiled("Humanoid", variant)
    body = own_shapes(model)
    assert np.all(model.geom_condim[body] == 1)
    assert_allclose(model.geom_solref[body], [(0.015, 1)] * body.sum())
    assert_allclose(model.geom_solimp[body, :3], [(0.9, 0.99, 0.003)] * body.sum())
    assert model.ntendon == 0


@every_variant
def test_humanoid_collides_with_itself(variant):
    task, model = compiled("Humanoid", variant)
    data = forward(model, make_state(task, model, joints=np.zeros(21)))
    # Parent and child are not counted.
    assert distance(model, data, "right_thigh", "right_shin") < 0
    assert data.ncon == 0
    crossed = [math.radians(15) * name.endswith("hip_x") for name in HUMANOID_JOINTS]
    data = forward(model, make_state(task, model, joints=crossed))
    bodies = model.geom_bodyid[data.contact.geom]
    pairs = [{model.body(body).name for body in pair} for pair in bodies]
    assert {"right_shin", "left_shin"} in pairs


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
