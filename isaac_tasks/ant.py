"""Ant: a quadruped with eight hinges runs forward. Variants: OmniIsaacGymEnvs, IsaacGymEnvs."""

import mujoco
from torch import Tensor

from isaac_tasks.floor import stand_on_floor
from isaac_tasks.locomotion import ASSETS, Locomotion
from isaac_tasks.task import State

LEGS = ("front_left", "front_right", "left_back", "right_back")  # joints 1 to 4


class Ant(Locomotion):
    """Observation (60): height; velocity (3); angular velocity (3); yaw, roll, angle to target;
    up and heading projection; joint positions (8) and velocities (8); force and torque at each
    foot (24); action (8). Joints: hip and ankle of each of LEGS, for both variants.
    """

    obs_dim, act_dim = 60, 8
    hip, rising, falling = (-40, 40), (30, 100), (-100, -30)  # ankles 1, 4 and 2, 3
    ranges = (hip, rising, hip, falling, hip, falling, hip, rising)
    angular_scale, velocity_scale, sensor_scale = 1.0, 0.2, 0.1
    action_cost = 0.005
    fallen_height, fallen_reward = 0.31, -2.0
    max_spin = 64.0
    feet = tuple(f"{leg}_foot" for leg in LEGS)

    def __init__(self, variant: str = "oige", **kwargs):
        oige = variant == "oige"
        self.gears = (7.5 if oige else 15.0,) * 8
        self.dt = 1 / 60 if oige else 0.0166
        self.normalize_angles = oige
        self.start_height = 0.5 if oige else 0.44
        self.joint_at_limit = 1.0 if oige else 0.1
        super().__init__(variant, **kwargs)

    def spec(self) -> mujoco.MjSpec:
        """Gymnasium's ant.xml with the geometry, limits and motors of nv_ant.xml."""
        spec = mujoco.MjSpec.from_file(f"{ASSETS}/ant.xml")
        self.set_options(spec)
        spec.compiler.fusestatic = True  # the inner legs become part of the torso
        for body, name in zip(spec.bodies[2::3], LEGS, strict=True):
            body.name = f"{name}_fixed"
            leg = body.bodies[0]
            leg.name, leg.bodies[0].name = f"{name}_leg", f"{name}_foot"
        for joint, limits in zip(spec.joints[1:], self.ranges, strict=True):
            joint.range, joint.armature, joint.damping[0] = limits, 0.01, 0.1
        for (
            geom
        ) in spec.geoms:  # Isaac averages the friction of ant (1.5) and floor (1.0)
            geom.friction[0], geom.margin = 1.25, 0
        spec.geom("floor").size = (0, 0, 1)  # without end
        stand_on_floor(spec, friction=1.25)
        self.add_motors(spec)
        self.add_foot_sensors(spec)
        return spec

    def limit_cost(self, state: State) -> Tensor:
        """Counts the joints at their upper limit; like the original not those at the lower one."""
        return self.joint_at_limit * (self.joint_positions(state) > 0.99).sum(-1)
