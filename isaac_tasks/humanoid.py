"""Humanoid: a biped with 21 hinges runs forward."""

from typing import ClassVar, NamedTuple

import mujoco
from torch import Tensor

from isaac_tasks.locomotion import Locomotion
from isaac_tasks.task import State


class Joint(NamedTuple):
    low: float
    """degrees"""
    high: float
    spring: float
    """N m/rad"""
    damping: float
    """N m s/rad"""
    armature: float
    """kg m^2"""
    gear: float
    """torque of the motor at action 1, N m"""


LEG = {
    "hip_x": Joint(-45, 15, 10, 5, 0.01, 45),
    "hip_z": Joint(-60, 35, 10, 5, 0.01, 45),
    "hip_y": Joint(-120, 45, 20, 5, 0.01, 135),
    "knee": Joint(-160, 2, 5, 0.1, 0.007, 90),
    "ankle_y": Joint(-50, 50, 2, 1, 0.006, 22.5),
    "ankle_x": Joint(-50, 50, 2, 1, 0.006, 22.5),
}
ARM = {
    "shoulder1": Joint(-90, 70, 10, 5, 0.01, 67.5),
    "shoulder2": Joint(-90, 70, 10, 5, 0.01, 67.5),
    "elbow": Joint(-90, 50, 2, 1, 0.006, 45),
}
JOINTS = {
    "abdomen_z": Joint(-45, 45, 20, 5, 0.02, 67.5),
    "abdomen_y": Joint(-75, 30, 20, 5, 0.01, 67.5),
    "abdomen_x": Joint(-35, 35, 10, 5, 0.01, 67.5),
}
for limb in (LEG, ARM):
    for side in ("right", "left"):
        JOINTS |= {f"{side}_{name}": joint for name, joint in limb.items()}


class Humanoid(Locomotion):
    """Observation (oige 87, ige 108): height; velocity (3); angular velocity (3); yaw,
    roll, angle to target; up and heading projection; joint positions (21) and
    velocities (21); ige: joint forces (21); force and torque at each foot (12); action
    (21). Joints: the order of JOINTS.
    """

    variants: ClassVar = {
        "oige": dict(obs_dim=87, dt=1 / 60, feet=("left_foot", "right_foot")),
        "ige": dict(obs_dim=108, dt=0.0166, feet=("right_foot", "left_foot")),
    }
    act_dim = 21
    robot_file = "humanoid.xml"
    friction = 1.0
    ranges = tuple((joint.low, joint.high) for joint in JOINTS.values())
    gears = tuple(joint.gear for joint in JOINTS.values())
    angular_scale, velocity_scale, sensor_scale = 0.25, 0.1, 0.01
    start_height = 1.34
    alive = 2.0
    action_cost = 0.01
    fallen_height, fallen_reward = 0.8, -1.0
    max_spin = 100.0

    def __init__(self, variant: str = "oige", **kwargs):
        super().__init__(variant, **kwargs)
        joints = JOINTS.values()
        self.spring = self.tensor([joint.spring for joint in joints])
        self.damping = self.tensor([joint.damping for joint in joints])
        self.gear = self.tensor(self.gears)

    def rebuild(self, spec: mujoco.MjSpec):
        """Feet, limits and springs of nv_humanoid.xml."""
        spec.option.solver = mujoco.mjtSolver.mjSOL_NEWTON
        for tendon in list(spec.tendons):
            spec.delete(tendon)
        self.replace_foot(spec, "right", -1)
        self.replace_foot(spec, "left", 1)
        spec.joint("left_shoulder1").axis = (-2, 1, -1)
        spec.joint("left_shoulder2").axis = (0, -1, -1)
        for name, values in JOINTS.items():
            joint = spec.joint(name)
            joint.range = (values.low, values.high)
            joint.armature = values.armature
            joint.stiffness[0] = values.spring
            joint.damping[0] = values.damping
        for geom in spec.geoms:
            if geom.name != "floor":
                geom.friction[0] = self.friction
                geom.condim = 1
                geom.solref[:] = (0.015, 1)
                geom.solimp[:3] = (0.9, 0.99, 0.003)

    def replace_foot(self, spec: mujoco.MjSpec, side: str, sign: int):
        """Two capsules, its outer and inner edge, and an ankle of two hinges."""
        foot = spec.body(f"{side}_foot")
        foot.pos = (0, 0, -0.39)
        spec.delete(foot.geoms[0])
        for heel, toe in ((0.02, 0.04), (0.0, -0.02)):
            foot.add_geom(
                type=mujoco.mjtGeom.mjGEOM_CAPSULE,
                size=(0.027, 0, 0),
                fromto=(-0.07, sign * heel, 0, 0.14, sign * toe, 0),
            )
        for name, axis in (("ankle_y", (0, 1, 0)), ("ankle_x", (1, 0, 0.5))):
            foot.add_joint(name=f"{side}_{name}", pos=(0, 0, 0.08), axis=axis)

    def joint_forces(self, state: State, action: Tensor) -> Tensor:
        """ige: motor, spring and damper of each joint (N, 21), scaled."""
        if self.variant == "oige":
            return action[:, :0]
        q, velocity = state.qpos[:, 7:], state.qvel[:, 6:]
        return 0.01 * (self.gear * action - self.spring * q - self.damping * velocity)

    def motor_strength(self) -> Tensor:
        return self.gear / 135

    def limit_cost(self, state: State) -> Tensor:
        """0 at 98 % of a joint's range, 0.25 rho at its end, on both sides."""
        excess = (self.joint_positions(state).abs() - 0.98).clamp(min=0) / 0.02
        return 0.25 * (self.motor_strength() * excess).sum(-1)
