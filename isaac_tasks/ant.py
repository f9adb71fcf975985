"""Ant: a quadruped with eight hinges runs forward."""

from typing import ClassVar

import mujoco
from torch import Tensor

from isaac_tasks.locomotion import Locomotion
from isaac_tasks.task import State

LEGS = ("front_left", "front_right", "left_back", "right_back")  # joints 1 to 4

# Ranges of the joints, degrees.
HIP = (-40, 40)
RISING_ANKLE = (30, 100)  # of legs 1 and 4
FALLING_ANKLE = (-100, -30)  # of legs 2 and 3


class Ant(Locomotion):
    """Observation (60): height; velocity (3); angular velocity (3); yaw, roll, angle to
    target; up and heading projection; joint positions (8) and velocities (8); force and
    torque at each foot (24); action (8). Joints: hip and ankle of each of LEGS, for
    both variants.
    """

    variants: ClassVar = {
        "oige": dict(
            gears=(7.5,) * 8,
            dt=1 / 60,
            normalize_angles=True,
            start_height=0.5,
            joint_at_limit=1.0,
        ),
        "ige": dict(
            gears=(15.0,) * 8,
            dt=0.0166,
            normalize_angles=False,
            start_height=0.44,
            joint_at_limit=0.1,
        ),
    }
    joint_at_limit: float
    """cost of a joint at its upper limit"""
    obs_dim, act_dim = 60, 8
    robot_file = "ant.xml"
    friction = 1.25  # Isaac averages that of ant (1.5) and floor (1.0)
    ranges = (
        *(HIP, RISING_ANKLE),
        *(HIP, FALLING_ANKLE),
        *(HIP, FALLING_ANKLE),
        *(HIP, RISING_ANKLE),
    )
    angular_scale, velocity_scale, sensor_scale = 1.0, 0.2, 0.1
    action_cost = 0.005
    fallen_height, fallen_reward = 0.31, -2.0
    max_spin = 64.0
    feet = tuple(f"{leg}_foot" for leg in LEGS)

    def rebuild(self, spec: mujoco.MjSpec):
        """Geometry and limits of nv_ant.xml."""
        spec.compiler.fusestatic = True  # the inner legs become part of the torso
        for body, name in zip(spec.bodies[2::3], LEGS, strict=True):
            body.name = f"{name}_fixed"
            leg = body.bodies[0]
            leg.name = f"{name}_leg"
            leg.bodies[0].name = f"{name}_foot"
        for joint, limits in zip(spec.joints[1:], self.ranges, strict=True):
            joint.range = limits
            joint.armature = 0.01
            joint.damping[0] = 0.1
        for geom in spec.geoms:
            geom.friction[0] = self.friction
            geom.margin = 0

    def limit_cost(self, state: State) -> Tensor:
        """Counts joints at their upper limit; as in the original, none at the lower."""
        return self.joint_at_limit * (self.joint_positions(state) > 0.99).sum(-1)
