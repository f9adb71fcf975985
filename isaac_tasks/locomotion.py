"""What Ant and Humanoid share: run to a target 1 km away along +x and stay upright."""

import math
from abc import abstractmethod

import gymnasium
import mujoco
import torch
from torch import Tensor

from isaac_tasks.floor import stand_on_floor
from isaac_tasks.task import (
    State,
    Task,
    Uniform,
    normalize_angle,
    roll_and_yaw,
    rotation_matrix,
    shorten,
    to_body,
)

TARGET = (1000.0, 0.0)
ASSETS = f"{gymnasium.__path__[0]}/envs/mujoco/assets"


class Locomotion(Task):
    """qpos: free root (7), joints (A); qvel: free root (6), joints (A).

    One motor per joint.
    """

    robot_file: str
    """of Gymnasium's robots"""
    friction: float
    """between robot and floor"""
    gears: tuple[float, ...]
    """torque of each motor at action 1, N m"""
    ranges: tuple[tuple[float, float], ...]
    """lower and upper limit of each joint, degrees"""
    dt: float
    """seconds by which the reward divides progress"""
    angular_scale: float
    velocity_scale: float
    sensor_scale: float
    normalize_angles = True
    start_height: float
    alive, upright, forward = 0.5, 0.1, 0.5
    action_cost: float
    energy_cost = 0.05
    fallen_height: float
    fallen_reward: float
    max_spin: float
    """rad/s, of the torso and of each joint"""
    feet: tuple[str, ...]
    """bodies with a force sensor, in the order of the observation"""

    def __init__(self, variant: str, **kwargs):
        super().__init__(variant, **kwargs)
        self.target = self.tensor(TARGET)
        self.start = self.tensor([0.0, 0.0, self.start_height, 1.0, 0.0, 0.0, 0.0])
        self.lower, self.upper = self.tensor(self.ranges).mul(math.pi / 180).unbind(-1)
        self.middle = (self.lower + self.upper) / 2
        self.half_range = (self.upper - self.lower) / 2
        self.neutral = self.tensor(0.0).clamp(self.lower, self.upper)
        model = self.spec().compile()
        self.sensor_count = model.nsensordata
        feet = [model.body(name) for name in self.feet]
        axes = rotation_matrix(self.tensor([foot.iquat for foot in feet]))
        moments = torch.diag_embed(self.tensor([foot.inertia for foot in feet]))
        self.foot_mass = self.tensor([foot.mass[0] for foot in feet])
        self.foot_centre = self.tensor([foot.ipos for foot in feet])
        self.foot_inertia = axes @ moments @ axes.transpose(-1, -2)

    def spec(self) -> mujoco.MjSpec:
        """Gymnasium's robot with what `rebuild` changes, motors and foot sensors."""
        spec = mujoco.MjSpec.from_file(f"{ASSETS}/{self.robot_file}")
        self.set_options(spec)
        spec.geom("floor").size = (0, 0, 1)  # without end
        self.rebuild(spec)
        stand_on_floor(spec, self.friction)
        self.add_motors(spec)
        self.add_foot_sensors(spec)
        return spec

    @abstractmethod
    def rebuild(self, spec: mujoco.MjSpec):
        """Turns Gymnasium's robot into NVIDIA's, but for its motors."""

    def add_motors(self, spec: mujoco.MjSpec):
        """One motor per hinge, in the order of the joints, in place of the model's."""
        for actuator in list(spec.actuators):
            spec.delete(actuator)
        hinge = mujoco.mjtJoint.mjJNT_HINGE
        hinges = [joint for joint in spec.joints if joint.type == hinge]
        for joint, gear in zip(hinges, self.gears, strict=True):
            motor = spec.add_actuator(name=joint.name, target=joint.name)
            motor.trntype = mujoco.mjtTrn.mjTRN_JOINT
            motor.gear = [gear, 0, 0, 0, 0, 0]
            motor.ctrllimited = mujoco.mjtLimited.mjLIMITED_FALSE

    def initial(self, uniform: Uniform) -> State:
        joints = uniform(-0.2, 0.2, self.act_dim) + self.neutral
        n = len(joints)
        root = self.start.expand(n, 7)
        qpos = torch.cat([root, joints.clamp(self.lower, self.upper)], -1)
        qvel = torch.cat([root.new_zeros(n, 6), uniform(-0.1, 0.1, self.act_dim)], -1)
        sensors = root.new_zeros(n, self.sensor_count)
        return State(qpos, qvel, sensors, root.new_zeros(n, 0))

    def limit(self, state: State) -> State:
        """PhysX limits the angular velocity of the torso and of joints."""
        linear, angular, joints = state.qvel.split([3, 3, self.act_dim], -1)
        joints = joints.clamp(-self.max_spin, self.max_spin)
        qvel = torch.cat([linear, shorten(angular, self.max_spin), joints], -1)
        return State(state.qpos, qvel, state.sensors, state.memory)

    def joint_positions(self, state: State) -> Tensor:
        """q~ (N, A): joint positions scaled to [-1, 1] between their limits."""
        return (state.qpos[:, 7:] - self.middle) / self.half_range

    def joint_velocities(self, state: State) -> Tensor:
        """Scaled joint velocities (N, A)."""
        return self.velocity_scale * state.qvel[:, 6:]

    def up_and_heading(self, state: State, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (N,) of the torso's axes: z on the world's, x on the target."""
        to_target = self.target - state.qpos[:, :2]
        to_target = torch.nn.functional.normalize(to_target, dim=-1)
        return rotation[:, 2, 2], (rotation[:, :2, 0] * to_target).sum(-1)

    def angles(self, state: State, rotation: Tensor) -> Tensor:
        """Yaw, roll and angle to the target (N, 3).

        As in the original, the last is z over x.
        """
        roll, yaw = roll_and_yaw(rotation)
        to_target = torch.atan2(-state.qpos[:, 2], TARGET[0] - state.qpos[:, 0]) - yaw
        angles = torch.stack([yaw, roll, to_target], -1)
        return normalize_angle(angles) if self.normalize_angles else angles

    def add_foot_sensors(self, spec: mujoco.MjSpec):
        """oige: the wrench of each foot's joint; ige: what `net_wrench` needs."""
        for name in self.feet:
            if self.variant == "oige":
                add_joint_wrench(spec, spec.body(name))
            else:
                add_motion_sensors(spec, spec.body(name))

    def foot_sensors(self, state: State) -> Tensor:
        """Force (3) and torque (3) at each foot in its own axes: (N, 6 feet)."""
        if self.variant == "oige":
            return state.sensors
        sensors = state.sensors.unflatten(-1, (len(self.feet), 13))
        wrench = net_wrench(
            sensors, self.foot_mass, self.foot_centre, self.foot_inertia
        )
        measured = sensors.any(-1, keepdim=True)  # not in first states
        return (wrench * measured).flatten(1)

    def joint_forces(self, state: State, action: Tensor) -> Tensor:
        """A slice of the observation that only the Humanoid's variant "ige" has."""
        return action[:, :0]

    def observe(self, state: State, action: Tensor) -> Tensor:
        rotation = rotation_matrix(state.qpos[:, 3:7])
        parts = [
            state.qpos[:, 2:3],
            to_body(rotation, state.qvel[:, :3]),
            self.angular_scale * state.qvel[:, 3:6],
            self.angles(state, rotation),
            torch.stack(self.up_and_heading(state, rotation), -1),
            self.joint_positions(state),
            self.joint_velocities(state),
            self.joint_forces(state, action),
            self.sensor_scale * self.foot_sensors(state),
            action,
        ]
        return torch.cat(parts, -1)

    @abstractmethod
    def limit_cost(self, state: State) -> Tensor:
        """(N,) cost of joints at their limits."""

    def motor_strength(self) -> Tensor | float:
        """rho (A,) or (): the weight of each motor in the energy cost."""
        return 1.0

    def reward_terms(
        self, before: State, state: State, action: Tensor
    ) -> dict[str, Tensor]:
        up, heading = self.up_and_heading(state, rotation_matrix(state.qpos[:, 3:7]))
        power = (self.motor_strength() * action * self.joint_velocities(state)).abs()
        nearer = progress(before.qpos[:, :2], state.qpos[:, :2], self.target)
        return {
            "progress": nearer / self.dt,
            "alive": torch.full_like(up, self.alive),
            "upright": self.upright * (up > 0.93),
            "heading": self.forward * (heading / 0.8).where(heading <= 0.8, 1.0),
            "action": -self.action_cost * action.square().sum(-1),
            "energy": -self.energy_cost * power.sum(-1),
            "limits": -self.limit_cost(state),
        }

    def measures(self, state: State) -> dict[str, Tensor]:
        return {"speed forwards, m/s": state.qvel[:, 0]}

    def failed(self, state: State) -> Tensor:
        return state.qpos[:, 2] < self.fallen_height

    def reward(self, before: State, state: State, action: Tensor) -> Tensor:
        reward = super().reward(before, state, action)
        return reward.where(~self.failed(state), self.fallen_reward)


def progress(before: Tensor, after: Tensor, target: Tensor) -> Tensor:
    """How much nearer the target is, (N,) m; from positions (N, 2).

    |T - p| - |T - p'| without the cancellation of 1 km minus 1 km, which float32 can't
    afford.
    """
    to_before, to_after = target - before, target - after
    difference_of_squares = ((after - before) * (to_before + to_after)).sum(-1)
    return difference_of_squares / (to_before.norm(dim=-1) + to_after.norm(dim=-1))


def add_joint_wrench(spec: mujoco.MjSpec, body: mujoco.MjsBody):
    """Sensors of force and torque (6) of the parent on the body at its first joint.

    In the body's own axes. OmniIsaacGymEnvs reads them in the axes of the joint, whose
    rotation against the body its robot file has and nobody publishes: the same numbers,
    turned by a constant rotation for each foot.
    """
    site = body.add_site(name=f"{body.name}_joint", pos=body.joints[0].pos)
    for kind in (mujoco.mjtSensor.mjSENS_FORCE, mujoco.mjtSensor.mjSENS_TORQUE):
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_SITE, objname=site.name)


def add_motion_sensors(spec: mujoco.MjSpec, body: mujoco.MjsBody):
    """What `net_wrench` needs (13).

    Linear and angular acceleration, angular velocity (3 each), orientation (4).
    """
    centre_of_mass, frame = mujoco.mjtObj.mjOBJ_BODY, mujoco.mjtObj.mjOBJ_XBODY
    for kind, place in (
        (mujoco.mjtSensor.mjSENS_FRAMELINACC, centre_of_mass),
        (mujoco.mjtSensor.mjSENS_FRAMEANGACC, centre_of_mass),
        (mujoco.mjtSensor.mjSENS_FRAMEANGVEL, centre_of_mass),
        (mujoco.mjtSensor.mjSENS_FRAMEQUAT, frame),
    ):
        spec.add_sensor(type=kind, objtype=place, objname=body.name)


def net_wrench(
    sensors: Tensor, mass: Tensor, centre: Tensor, inertia: Tensor
) -> Tensor:
    """Net force and torque on bodies, in body axes at the body's origin: (N, F, 6).

    Newton and Euler: m a of the centre of mass, and I alpha + omega x (I omega) + c x m
    a. sensors (N, F, 13) of `add_motion_sensors`; mass (F,), centre of mass (F, 3) and
    inertia about it (F, 3, 3) in body axes. MuJoCo's accelerometers include +g, which
    is taken off.
    """
    acceleration, angular, velocity, quat = sensors.split([3, 3, 3, 4], -1)
    gravity = torch.zeros_like(acceleration)
    gravity[..., 2] = 9.81
    rotation = rotation_matrix(quat)
    force = mass[:, None] * to_body(rotation, acceleration - gravity)
    alpha, omega = to_body(rotation, angular), to_body(rotation, velocity)
    spin = torch.linalg.cross(omega, (inertia @ omega[..., None])[..., 0], dim=-1)
    torque = (inertia @ alpha[..., None])[..., 0] + spin
    torque = torque + torch.linalg.cross(centre.expand_as(force), force, dim=-1)
    return torch.cat([force, torque], -1)
