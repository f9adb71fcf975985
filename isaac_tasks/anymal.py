"""Anymal: a quadruped with twelve hinges follows a commanded velocity.

Built from code alone.
"""

import math
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from isaac_tasks.floor import stand_on_floor
from isaac_tasks.parts import Vector, add_drive, add_floor_and_light, set_mass
from isaac_tasks.task import State, Task, Uniform, rotation_matrix, to_body

# Leg: its side along x (1 front, -1 hind) and y (1 left, -1 right).
# In the order of the joints.
LEGS = {"LF": (1, 1), "LH": (-1, 1), "RF": (1, -1), "RH": (-1, -1)}

# Shapes: radius and length of a capsule along an axis, or the edges of a box; then the
# centre. The originals are cylinders, which Isaac Gym takes for capsules. Metres; x and
# y are those of the leg LF, and in other legs have the signs of its side.
BASE = [
    ((0.58, 0.14, 0.18), (0, 0, 0)),
    ((0.024, 0.024, 0.01), (0.2488, 0.008, 0.051)),
    ((0.07, 0.12, "z"), (-0.364, 0, 0.1335)),
]
for x in (1, -1):
    BASE.append(((0.11, 0.14, 0.18), (0.4695 * x, 0, 0)))
    for y in (1, -1):
        BASE.append(((0.09, 0.145, "x"), (0.2175 * x, 0.07 * y, 0)))
        BASE.append(((0.09, 0.11, "x"), (0.4695 * x, 0.07 * y, 0)))
HIP = [((0.05, 0.14, "y"), (0.0599, 0.0138, 0))]
THIGH = [
    ((0.065, 0.08, "y"), (0, 0.04, 0)),
    ((0.075, 0.06, 0.2826), (0, 0.03, -0.1413)),
    ((0.05, 0.14, "y"), (0, 0.0303, -0.285)),
]
SHANK = [((0.0175, 0.2825, "z"), (0.08795, 0.01305, -0.169))]
FOOT = 0.03, (0.08795, 0.01305, -0.31547)  # radius and centre in the shank
TURNS = {
    "x": (0.5**0.5, 0, 0.5**0.5, 0),
    "y": (0.5**0.5, 0.5**0.5, 0, 0),
    "z": (1, 0, 0, 0),
}

# Part: joint's place in the parent, its axis, mass (kg), centre of mass, inertia about
# it (kg m^2: xx, yy, zz, xy, xz, yz), shapes. Lengths and products have the signs of
# the leg's side.
PARTS = {
    "HIP": ((0.2999, 0.104, 0), (1, 0, 0), 2.781, (0.0567, 0.0174, -0.0005),
            (0.00330, 0.00494, 0.00583, 0, 0, 0), HIP),
    "THIGH": ((0.0599, 0.08381, 0), (0, 1, 0), 3.071, (0, 0.0308, -0.2457),
              (0.02990, 0.02956, 0.00486, 0, 0, 0.00414), THIGH),
    "SHANK": ((0, 0.1003, -0.285), (0, 1, 0), 0.588, (0.0613, 0.0055, -0.0807),
              (0.00881, 0.01016, 0.00155, 0, 0.00182, 0), SHANK),
}  # fmt: skip
BASE_MASS, BASE_CENTRE = 26.373, (-0.0178, -0.0002, 0.0085)
BASE_INERTIA = (0.2167, 1.7852, 1.8337, 0.0092, 0.0589, -0.0002)


class Anymal(Task):
    """Observation (48): 2 velocity, angular velocity / 4 (body axes); gravity's
    direction, turned by the base's rotation as in the originals (not its inverse);
    command x (2, 2, 1/4); joint positions from the default pose (12); joint velocities
    / 20 (12); action (12). Action: target angle of each joint, from the default pose
    (ige) or from the last target (oige). Joints: HAA, HFE, KFE of each of LEGS, for
    both variants.

    Memory: the command v_x, v_y, yaw rate (3); oige also: target angles (12), this
    action (12), the last one (12), and 1 after the first step (1). oige's drives have
    23 times the stiffness and damping in PhysX; what is kept is their ratio, the 0.1 s
    by which a joint lags behind.
    """

    variants: ClassVar = {
        "oige": dict(
            memory_dim=40,
            episode_length=3000,
            dt=1 / 60,
            stiffness=1000,
            damping=100,
            torque=1000,
        ),
        "ige": dict(
            memory_dim=3,
            episode_length=2500,
            dt=0.02,
            stiffness=85,
            damping=2,
            torque=80,
        ),
    }
    dt: float
    """s, in the reward"""
    stiffness: float
    """N m/rad"""
    damping: float
    """N m s/rad"""
    torque: float
    """N m, the most"""
    obs_dim, act_dim = 48, 12
    time_step, substeps = 0.005, 4  # PhysX: 0.01, 2
    clip_obs = 5.0
    start_height = 0.62  # m
    action_scale = 0.5  # rad (ige)
    target_step = 13.5 / 60  # rad (oige)
    joint_speed = 20.0  # rad/s, the most

    def __init__(self, variant: str = "oige", **kwargs):
        super().__init__(variant, **kwargs)
        swing = (-3 * math.pi, 3 * math.pi)
        limits, pose = [], []
        for side_x, side_y in LEGS.values():
            inwards = (-0.72, 0.49) if side_y == 1 else (-0.49, 0.72)
            limits += [inwards, swing, swing]
            pose += [0.03 * side_y, 0.4 * side_x, -0.8 * side_x]
        self.limits = limits
        self.lower, self.upper = self.tensor(limits).unbind(-1)
        self.pose = self.tensor(pose)
        self.start = self.tensor([0, 0, self.start_height, 1, 0, 0, 0])
        self.command_range = self.tensor([2.0, 1.0, 1.0])  # m/s, m/s, rad/s
        self.command_scale = self.tensor([2.0, 2.0, 0.25])
        self.down = self.tensor([0.0, 0.0, -1.0])

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        self.set_options(spec)
        spec.compiler.degree = False
        add_floor_and_light(spec, contype=0, conaffinity=1)
        base = spec.worldbody.add_body(name="base", pos=(0, 0, self.start_height))
        base.add_freejoint(name="root")
        base.add_camera(
            name="track",
            mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM,
            pos=(0, -2, 0.8),
            xyaxes=(1, 0, 0, 0, 0.35, 1),
        )
        set_mass(base, BASE_MASS, BASE_CENTRE, BASE_INERTIA)
        add_shapes(base, BASE, (1, 1))
        limits = iter(self.limits)
        for leg, side in LEGS.items():
            self.add_leg(spec, base, leg, side, limits)
        stand_on_floor(spec, friction=1.0)
        if self.variant == "ige":
            for name in ("base", *(f"{leg}_THIGH" for leg in LEGS)):
                add_contact_force(spec, name)
        return spec

    def add_leg(
        self, spec: mujoco.MjSpec, base: mujoco.MjsBody, leg: str, side, limits
    ):
        """Three parts with a driven hinge each, and a foot.

        limits: of the hinges that come next.
        """
        body = base
        for part, (place, axis, mass, centre, inertia, shapes) in PARTS.items():
            body = body.add_body(name=f"{leg}_{part}", pos=mirror(place, side))
            set_mass(body, mass, mirror(centre, side), mirror_inertia(inertia, side))
            add_shapes(body, shapes, side)
            hinge = body.add_joint(name=body.name, axis=axis, range=next(limits))
            add_drive(spec, hinge, self.stiffness, self.damping, self.torque)
        radius, place = FOOT
        body.add_geom(
            name=f"{leg}_FOOT",
            type=mujoco.mjtGeom.mjGEOM_SPHERE,
            size=(radius, 0, 0),
            pos=mirror(place, side),
            conaffinity=0,
        )

    def initial(self, uniform: Uniform) -> State:
        command = self.command_range * uniform(-1, 1, 3)
        speeds = uniform(-0.1, 0.1, 12)
        n, zeros = len(command), command.new_zeros
        pose = self.pose.expand(n, 12)
        if self.variant == "oige":
            sensors = zeros(n, 0)
            memory = torch.cat([command, pose, zeros(n, 25)], -1)
        else:
            pose = pose * uniform(0.5, 1.5, 12)
            sensors = zeros(n, 15)
            memory = command
        qpos = torch.cat([self.start.expand(n, 7), pose], -1)
        return State(qpos, torch.cat([zeros(n, 6), speeds], -1), sensors, memory)

    def before_step(self, state: State, progress: Tensor, fresh: State) -> Tensor:
        if self.variant == "ige":
            return state.memory
        later = (progress > 0).to(self.dtype)
        return torch.cat([state.memory[:, :39], later[:, None]], -1)

    def act(self, state: State, action: Tensor) -> tuple[Tensor, Tensor]:
        """Target angles (N, 12).

        oige's move by steps from the last ones, within the limits.
        """
        if self.variant == "ige":
            return self.pose + self.action_scale * action, state.memory
        command, target, last, _, later = state.memory.split([3, 12, 12, 12, 1], -1)
        target = (target + self.target_step * action).clamp(self.lower, self.upper)
        return target, torch.cat([command, target, action, last, later], -1)

    def limit(self, state: State) -> State:
        """PhysX limits the speed of joints."""
        base, joints = state.qvel.split([6, 12], -1)
        qvel = torch.cat([base, joints.clamp(-self.joint_speed, self.joint_speed)], -1)
        return State(state.qpos, qvel, state.sensors, state.memory)

    def velocities(self, state: State) -> tuple[Tensor, Tensor]:
        """v_b and omega_b (N, 3): linear and angular velocity in the base's axes."""
        rotation = rotation_matrix(state.qpos[:, 3:7])
        return to_body(rotation, state.qvel[:, :3]), state.qvel[:, 3:6]

    def observe(self, state: State, action: Tensor) -> Tensor:
        linear, angular = self.velocities(state)
        gravity = rotation_matrix(state.qpos[:, 3:7]) @ self.down
        command = self.command_scale * state.memory[:, :3]
        parts = [
            2 * linear,
            0.25 * angular,
            gravity,
            command,
            state.qpos[:, 7:] - self.pose,
            0.05 * state.qvel[:, 6:],
            action,
        ]
        return torch.cat(parts, -1)

    def reward_terms(
        self, before: State, state: State, action: Tensor
    ) -> dict[str, Tensor]:
        """Following the command is worth most; `reward` cuts sums off below 0."""
        linear, angular = self.velocities(state)
        velocity = torch.cat([linear[:, :2], angular[:, 2:]], -1)
        error = (state.memory[:, :3] - velocity).square()
        joints, speeds = state.qpos[:, 7:], state.qvel[:, 6:]
        terms = {
            "velocity": torch.exp(-error[:, :2].sum(-1) / 0.25),
            "turning": 0.5 * torch.exp(-error[:, 2] / 0.25),
        }
        if self.variant == "ige":
            drive = self.stiffness * (self.pose + self.action_scale * action - joints)
            torque = (drive - self.damping * speeds).clamp(-self.torque, self.torque)
            terms["torque"] = -2.5e-5 * torque.square().sum(-1)
        else:
            last, later = state.memory[:, 27:39], state.memory[:, 39:]
            change = later * before.qvel[:, 6:] - speeds
            terms["bouncing"] = -0.03 * linear[:, 2].square()
            terms["acceleration"] = -3e-4 * change.square().sum(-1)
            terms["action"] = -0.006 * (last - action).square().sum(-1)
            terms["hips"] = -0.06 * (joints - self.pose)[:, ::3].abs().sum(-1)
        return {name: self.dt * term for name, term in terms.items()}

    def reward(self, before: State, state: State, action: Tensor) -> Tensor:
        reward = super().reward(before, state, action).clamp(min=0)
        if self.variant == "ige":
            return reward
        return reward.where(~self.failed(state), -1.0)

    def failed(self, state: State) -> Tensor:
        """oige: the base is too low; ige: over 1 N from the floor on base or thighs."""
        if self.variant == "oige":
            return state.qpos[:, 2] < 0.51
        forces = state.sensors.unflatten(-1, (5, 3))
        return (forces.norm(dim=-1) > 1).any(-1)

    def measures(self, state: State) -> dict[str, Tensor]:
        velocity, command = self.velocities(state)[0][:, :2], state.memory[:, :2]
        return {
            "commanded speed, m/s": command.norm(dim=-1),
            "speed, m/s": velocity.norm(dim=-1),
            "error of the velocity, m/s": (command - velocity).norm(dim=-1),
        }


def mirror(vector: Vector, side: tuple[int, int]) -> Vector:
    """A vector of the leg LF in the leg of this side."""
    return (vector[0] * side[0], vector[1] * side[1], vector[2])


def mirror_inertia(
    inertia: tuple[float, ...], side: tuple[int, int]
) -> tuple[float, ...]:
    """xx, yy, zz, xy, xz, yz of the leg LF in the leg of this side."""
    xy, xz, yz = inertia[3:]
    return (*inertia[:3], xy * side[0] * side[1], xz * side[0], yz * side[1])


def add_shapes(body: mujoco.MjsBody, shapes: list, side: tuple[int, int]):
    """Boxes and capsules, which touch the floor only."""
    for size, place in shapes:
        geom = body.add_geom(pos=mirror(place, side), conaffinity=0)
        if size[2] in TURNS:
            radius, length, axis = size
            geom.type = mujoco.mjtGeom.mjGEOM_CAPSULE
            geom.size[:2] = radius, length / 2
            geom.quat = TURNS[axis]
        else:
            geom.type = mujoco.mjtGeom.mjGEOM_BOX
            geom.size = [edge / 2 for edge in size]


def add_contact_force(spec: mujoco.MjSpec, body: str):
    """A sensor of the net contact force (3) on a body."""
    sensor = spec.add_sensor(type=mujoco.mjtSensor.mjSENS_CONTACT, objname=body)
    sensor.objtype = mujoco.mjtObj.mjOBJ_BODY
    force = 1 << int(mujoco.mjtConDataField.mjCONDATA_FORCE)
    net = 3
    sensor.intprm[:3] = force, net, 1  # what, how contacts are added up, how many sums
