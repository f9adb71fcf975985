"""Humanoid: a biped with 21 hinges runs forward. Variants: OmniIsaacGymEnvs, IsaacGymEnvs."""

import mujoco
from torch import Tensor

from isaac_tasks.floor import stand_on_floor
from isaac_tasks.locomotion import ASSETS, Locomotion
from isaac_tasks.task import State

# Joint: range (degrees), spring k (N m/rad), damping b (N m s/rad), armature (kg m^2), gear (N m).
LEG = {
    "hip_x": (-45, 15, 10, 5, 0.01, 45),
    "hip_z": (-60, 35, 10, 5, 0.01, 45),
    "hip_y": (-120, 45, 20, 5, 0.01, 135),
    "knee": (-160, 2, 5, 0.1, 0.007, 90),
    "ankle_y": (-50, 50, 2, 1, 0.006, 22.5),
    "ankle_x": (-50, 50, 2, 1, 0.006, 22.5),
}
ARM = {
    "shoulder1": (-90, 70, 10, 5, 0.01, 67.5),
    "shoulder2": (-90, 70, 10, 5, 0.01, 67.5),
    "elbow": (-90, 50, 2, 1, 0.006, 45),
}
JOINTS = {
    "abdomen_z": (-45, 45, 20, 5, 0.02, 67.5),
    "abdomen_y": (-75, 30, 20, 5, 0.01, 67.5),
    "abdomen_x": (-35, 35, 10, 5, 0.01, 67.5),
}
for limb in (LEG, ARM):
    JOINTS |= {
        f"{side}_{name}": limb[name] for side in ("right", "left") for name in limb
    }


class Humanoid(Locomotion):
    """Observation (oige 87, ige 108): height; velocity (3); angular velocity (3); yaw, roll, angle
    to target; up and heading projection; joint positions (21) and velocities (21); ige: joint
    forces (21); force and torque at each foot (12); action (21). Joints: the order of JOINTS.
    """

    act_dim = 21
    ranges = tuple(row[:2] for row in JOINTS.values())
    gears = tuple(row[5] for row in JOINTS.values())
    angular_scale, velocity_scale, sensor_scale = 0.25, 0.1, 0.01
    start_height = 1.34
    alive = 2.0
    action_cost = 0.01
    fallen_height, fallen_reward = 0.8, -1.0
    max_spin = 100.0

    def __init__(self, variant: str = "oige", **kwargs):
        oige = variant == "oige"
        self.obs_dim = 87 if oige else 108
        self.dt = 1 / 60 if oige else 0.0166
        self.feet = ("left_foot", "right_foot") if oige else ("right_foot", "left_foot")
        super().__init__(variant, **kwargs)
        _, _, springs, dampings, _, gears = zip(*JOINTS.values(), strict=True)
        self.spring, self.damping = self.tensor(springs), self.tensor(dampings)
        self.gear = self.tensor(gears)

    def spec(self) -> mujoco.MjSpec:
        """Gymnasium's humanoid.xml with the feet, limits, springs and motors of nv_humanoid.xml."""
        spec = mujoco.MjSpec.from_file(f"{ASSETS}/humanoid.xml")
        self.set_options(spec)
        spec.option.solver = mujoco.mjtSolver.mjSOL_NEWTON
        for tendon in list(spec.tendons):
            spec.delete(tendon)
        spec.geom("floor").size = (0, 0, 1)  # without end
        for side, sign in (("right", -1), ("left", 1)):
            foot = spec.body(f"{side}_foot")
            foot.pos = (0, 0, -0.39)
            spec.delete(foot.geoms[0])
            for y in ((0.02, 0.04), (0.0, -0.02)):  # outer and inner edge of the foot
                ends = (-0.07, sign * y[0], 0, 0.14, sign * y[1], 0)
                capsule = mujoco.mjtGeom.mjGEOM_CAPSULE
                foot.add_geom(type=capsule, size=(0.027, 0, 0), fromto=ends)
            for name, axis in (("ankle_y", (0, 1, 0)), ("ankle_x", (1, 0, 0.5))):
                foot.add_joint(name=f"{side}_{name}", pos=(0, 0, 0.08), axis=axis)
        spec.joint("left_shoulder1").axis = (-2, 1, -1)
        spec.joint("left_shoulder2").axis = (0, -1, -1)
        for name, (low, high, spring, damping, armature, _) in JOINTS.items():
            joint = spec.joint(name)
            joint.range, joint.armature = (low, high), armature
            joint.stiffness[0], joint.damping[0] = spring, damping
        for geom in spec.geoms:
            if geom.name != "floor":
                geom.friction[0], geom.condim = 1.0, 1
                geom.solref[:], geom.solimp[:3] = (0.015, 1), (0.9, 0.99, 0.003)
        stand_on_floor(spec, friction=1.0)
        self.add_motors(spec)
        self.add_foot_sensors(spec)
        return spec

    def joint_forces(self, state: State, action: Tensor) -> Tensor:
        """ige: motor, spring and damper of each joint (N, 21), scaled."""
        if self.variant == "oige":
            return action[:, :0]
        q, velocity = state.qpos[:, 7:], state.qvel[:, 6:]
        return 0.01 * (self.gear * action - self.spring * q - self.damping * velocity)

    def motor_strength(self) -> Tensor:
        return self.gear / 135

    def limit_cost(self, state: State) -> Tensor:
        """Grows from 0 at 98 % of the range of a joint to 0.25 rho at its end, on both sides."""
        excess = (self.joint_positions(state).abs() - 0.98).clamp(min=0) / 0.02
        return 0.25 * (self.motor_strength() * excess).sum(-1)
