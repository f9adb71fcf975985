"""AllegroHand: four fingers turn a cube to given orientations.

Built from code alone.
"""

import math
from typing import ClassVar, NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor

from isaac_tasks.parts import (
    Box,
    Vector,
    add_box,
    add_drive,
    add_floor_and_light,
    set_mass,
)
from isaac_tasks.task import State, Task, Uniform, rotation_matrix

PI, RIGHT = math.pi, math.pi / 2


class Link(NamedTuple):
    """A link of a finger and the hinge about its z axis; metres, radians, kg."""

    place: Vector
    """origin in the parent's axes"""
    turn: Vector
    """roll, pitch and yaw (about the parent's x, y and z axes) at joint angle 0"""
    limits: tuple[float, float]
    mass: float
    inertia: Vector
    """about the link's axes, 1e-6 kg m^2"""
    box: Box
    """around the link"""


# The tips are fixed to the last links: their boxes lie in these links' axes.
TIP_MASS, TIP_INERTIA = 0.021, (0.97, 0.97, 0.97)
FINGERTIP = ((0.0324, -0.0042, -0.0070), (0.0622, 0.0150, 0.0071))
THUMB_TIP = ((0.0476, -0.0044, -0.0071), (0.0771, 0.0147, 0.0071))
FLAT = (0, 0, 0)
SWAY = (-0.558489, 0.558489)
BEND = (-0.279244, 1.727825)


def finger(place: Vector, yaw: float) -> list[Link]:
    """The links of a finger: its base in the palm, turned about the palm's normal."""
    return [
        Link(place, (PI, -RIGHT, yaw), SWAY, 0.0119, (1.02, 0.65, 1.02),
             ((-0.0098, -0.0135, -0.0157), (0.0098, 0.0135, 0.0063))),
        Link(FLAT, (PI, -RIGHT, RIGHT), BEND, 0.065, (79.6, 24.7, 79.6),
             ((-0.0088, -0.0147, -0.0142), (0.0628, 0.0098, 0.0142))),
        Link((0.054, 0, 0), FLAT, BEND, 0.0355, (26.4, 13.5, 26.4),
             ((-0.0063, -0.0147, -0.0142), (0.0472, 0.0098, 0.0142))),
        Link((0.0384, 0, 0), FLAT, BEND, 0.0096, (4.70, 3.65, 4.70),
             ((-0.0063, -0.0100, -0.0137), (0.0370, 0.0085, 0.0137))),
    ]  # fmt: skip


THUMB = [
    Link((-0.03675, -0.00813, -0.0295), (-RIGHT, -RIGHT, 1.48348611),
         (0.279244, 1.57075), 0.0176, (18.9, 14.3, 18.9),
         ((-0.0080, -0.0375, -0.0325), (0.0260, 0.0080, 0.0108))),
    Link((0.005, 0, 0), (RIGHT, 0, 0),
         (-0.331603, 1.151883), 0.0119, (4.24, 4.52, 4.24),
         ((-0.0135, -0.0098, 0.0397), (0.0135, 0.0098, 0.0617))),
    Link((0, 0, 0.0554), (PI, -RIGHT, 0),
         BEND, 0.038, (43.0, 14.4, 43.0),
         ((-0.0088, -0.0147, -0.0142), (0.0577, 0.0098, 0.0142))),
    Link((0.0514, 0, 0), FLAT,
         (-0.279244, 1.762731), 0.0388, (32.9, 14.7, 32.9),
         ((-0.0100, -0.0137, -0.0143), (0.0520, 0.0096, 0.0141))),
]  # fmt: skip
HAND = {  # the order of the joints
    "index": finger((0.05143, -0.03632, -0.0113), -0.08726389),
    "middle": finger((0.05374, 0.00878, -0.0113), 0.0),
    "ring": finger((0.05143, 0.05387, -0.0113), 0.08726389),
    "thumb": THUMB,
}
MOUNT_BOX = ((-0.038, -0.038, 0), (0.038, 0.038, 0.023))
PALM_BOX = ((-0.058, -0.050, -0.098), (0.042, 0.067, 0))


class AllegroHand(Task):
    """Observation (oige 72, ige 88): joint positions and velocities (16 each); ige:
    joint forces (16), which the original never measures, so they are 0; the cube's pose
    (7), velocity (3) and angular velocity (3) in world axes; the goal's pose (7);
    rotation from goal to cube (4); action (16). Quaternions are w,x,y,z (oige) or
    x,y,z,w (ige). Action: target angle of each joint, from its lower to its upper
    limit. Memory: the goal's orientation (4), w,x,y,z.

    Joints: index, middle, ring finger and thumb, from the palm outwards, for both
    variants. The originals' links are convex hulls of meshes, ours the boxes around
    these, with the mass in the middle. (The originals have it at the link's origin.
    There a finger's link 1 doesn't move with its joints, so that MuJoCo takes its
    contacts for rigid ones, and they explode.) oige's cube is a file that we couldn't
    read, its edge is ige's. Joint friction (PhysX: 0.01 of the load) and the original's
    mean number of successes are left out.
    """

    cube_mass: float
    """kg"""
    act_dim, memory_dim = 16, 4
    episode_length, clip_obs = 600, 5.0
    substeps = 4
    stiffness, damping, torque = 3.0, 0.1, 0.5  # N m/rad, N m s/rad, N m
    armature = 0.001  # kg m^2
    edge = 0.065  # m, of the cube
    joint_speed = 6.283  # rad/s, the most
    spin_damping = 0.5  # 1/s, of the cube
    mount = (0, 0, 0.5), (0.25755, 0.28304, 0.68333, -0.62178)
    palm = (-0.008219, -0.02063, 0.08086), (0, -1.5708, 0.785398)
    goal_place, cube_place = (0, -0.2, 0.52), (0, -0.2, 0.56)
    marker_place = (-0.2, -0.26, 0.64)
    success_angle, lost_distance = 0.1, 0.24
    variants: ClassVar = {
        "oige": dict(obs_dim=72, time_step=0.0083, cube_mass=0.07087),
        "ige": dict(obs_dim=88, time_step=0.01667 / 2, cube_mass=400 * edge**3),
    }

    def __init__(self, variant: str = "oige", **kwargs):
        super().__init__(variant, **kwargs)
        limits = [link.limits for links in HAND.values() for link in links]
        self.lower, self.upper = self.tensor(limits).unbind(-1)
        self.conjugate = self.tensor([1.0, -1.0, -1.0, -1.0])
        self.goal = self.tensor(self.goal_place)
        self.start = self.tensor(self.cube_place)

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        self.set_options(spec)
        spec.compiler.degree = False
        contact = spec.default.geom  # pushes out slowly what fast fingers make overlap
        contact.solref, contact.solimp[:2] = (0.02, 2), (0.95, 0.99)
        add_floor_and_light(spec)
        world = spec.worldbody
        world.add_camera(
            name="track", pos=(-0.1, -0.55, 0.85), xyaxes=(1, 0, 0, 0, 0.65, 0.75)
        )
        paint_faces(spec)
        half = self.edge / 2
        box = dict(type=mujoco.mjtGeom.mjGEOM_BOX, size=[half] * 3, material="painted")
        goal = world.add_body(name="goal", mocap=True, pos=self.marker_place)
        goal.add_geom(mass=0, contype=0, conaffinity=0, **box)
        self.add_hand(spec)
        cube = world.add_body(name="cube", pos=self.cube_place)
        cube.add_freejoint(name="cube")
        cube.add_geom(mass=self.cube_mass, **box)
        return spec

    def add_hand(self, spec: mujoco.MjSpec):
        """Palm and fingers, with a position drive at each joint."""
        place, quat = self.mount
        mount = spec.worldbody.add_body(name="mount", pos=place, quat=quat)
        add_box(mount, MOUNT_BOX)
        place, turn = self.palm
        palm = mount.add_body(name="palm", pos=place, quat=quaternion(turn))
        add_box(palm, PALM_BOX)
        for name, links in HAND.items():
            parent = palm
            for i, link in enumerate(links):
                parent = parent.add_body(
                    name=f"{name}_{i}", pos=link.place, quat=quaternion(link.turn)
                )
                add_solid(parent, link.mass, link.inertia, link.box)
                self.add_joint(spec, parent, link.limits)
                if i < 2 or parent.name == "thumb_2":
                    # The boxes overlap where the bodies don't.
                    spec.add_exclude(bodyname1="palm", bodyname2=parent.name)
            tip = parent.add_body(name=f"{name}_tip")
            tip_box = THUMB_TIP if name == "thumb" else FINGERTIP
            add_solid(tip, TIP_MASS, TIP_INERTIA, tip_box)

    def add_joint(
        self, spec: mujoco.MjSpec, body: mujoco.MjsBody, limits: tuple[float, float]
    ):
        """A hinge about z and its drive."""
        joint = body.add_joint(name=body.name, range=limits, armature=self.armature)
        # All the drive's torque at that speed.
        joint.damping[2] = self.torque / self.joint_speed**3
        add_drive(spec, joint, self.stiffness, self.damping, self.torque)

    def control(self, action: Tensor) -> Tensor:
        """Target angles (N, 16): -1 is the lower limit, 1 the upper one."""
        return self.lower + 0.5 * (action + 1) * (self.upper - self.lower)

    def initial(self, uniform: Uniform) -> State:
        unit = uniform(0, 1, self.act_dim)
        # thumb_0 starts below its limit.
        joints = 0.2 * (self.lower + unit * (self.upper - self.lower))
        n, zeros = len(joints), joints.new_zeros
        place = self.start + 0.01 * uniform(-1, 1, 3)
        quat, goal = random_rotation(uniform), random_rotation(uniform)
        qpos = torch.cat([joints, place, quat], -1)
        return State(qpos, zeros(n, 22), zeros(n, 0), goal)

    def before_step(self, state: State, progress: Tensor, fresh: State) -> Tensor:
        """A new goal in the step after a success."""
        due = (progress > 0) & (self.angle_to_goal(state) <= self.success_angle)
        return torch.where(due[:, None], fresh.memory, state.memory)

    def limit(self, state: State) -> State:
        """PhysX damps the cube's spin."""
        joints, linear, spin = state.qvel.split([16, 3, 3], -1)
        spin = spin * math.exp(-self.spin_damping * self.substeps * self.time_step)
        qvel = torch.cat([joints, linear, spin], -1)
        return State(state.qpos, qvel, state.sensors, state.memory)

    def to_goal(self, state: State) -> Tensor:
        """The rotation from goal to cube, a quaternion (N, 4)."""
        return multiply(state.qpos[:, 19:], state.memory * self.conjugate)

    def angle_to_goal(self, state: State) -> Tensor:
        """theta (N,) in [0, pi]."""
        return 2 * torch.asin(self.to_goal(state)[:, 1:].norm(dim=-1).clamp(max=1))

    def distance(self, state: State) -> Tensor:
        """(N,) m between cube and goal."""
        return (state.qpos[:, 16:19] - self.goal).norm(dim=-1)

    def observe(self, state: State, action: Tensor) -> Tensor:
        joints, place, quat = state.qpos.split([16, 3, 4], -1)
        speeds, linear, spin = state.qvel.split([16, 3, 3], -1)
        scaled = (2 * joints - self.upper - self.lower) / (self.upper - self.lower)
        spin = (rotation_matrix(quat) @ spin[..., None])[..., 0]
        goal = self.goal.expand_as(place)
        goal_quat, to_goal = state.memory, self.to_goal(state)
        forces = joints[:, :0]
        if self.variant == "ige":
            quat = quat.roll(-1, -1)
            goal_quat = goal_quat.roll(-1, -1)
            to_goal = to_goal.roll(-1, -1)
            forces = torch.zeros_like(joints)
        hand = [scaled, 0.2 * speeds, forces]
        cube = [place, quat, linear, 0.2 * spin]
        return torch.cat([*hand, *cube, goal, goal_quat, to_goal, action], -1)

    def reward_terms(
        self, before: State, state: State, action: Tensor
    ) -> dict[str, Tensor]:
        angle = self.angle_to_goal(state)
        return {
            "distance": -10 * self.distance(state),
            "rotation": 1 / (angle + 0.1),
            "action": -0.0002 * action.square().sum(-1),
            "success": 250.0 * (angle <= self.success_angle),
        }

    def failed(self, state: State) -> Tensor:
        """Where the cube has left the hand."""
        return self.distance(state) >= self.lost_distance

    def measures(self, state: State) -> dict[str, Tensor]:
        return {"angle to the goal, rad": self.angle_to_goal(state)}

    def show(self, data: mujoco.MjData, memory: Tensor):
        data.mocap_quat[0] = memory.cpu()


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """The product of quaternions w,x,y,z: (N, 4), (N, 4) -> (N, 4)."""
    scalar, vector = p[:, :1], p[:, 1:]
    other_scalar, other_vector = q[:, :1], q[:, 1:]
    cross = torch.linalg.cross(vector, other_vector, dim=-1)
    real = scalar * other_scalar - (vector * other_vector).sum(-1, keepdim=True)
    imaginary = scalar * other_vector + other_scalar * vector + cross
    return torch.cat([real, imaginary], -1)


def random_rotation(uniform: Uniform) -> Tensor:
    """R_x(pi u) R_y(pi v), u and v uniform in [-1, 1): quaternions (N, 4).

    Not uniform in SO(3).
    """
    half = 0.5 * PI * uniform(-1, 1, 2)
    (cos_x, cos_y), (sin_x, sin_y) = half.cos().unbind(-1), half.sin().unbind(-1)
    return torch.stack([cos_x * cos_y, sin_x * cos_y, cos_x * sin_y, sin_x * sin_y], -1)


def quaternion(turn: tuple[float, float, float]) -> np.ndarray:
    """w,x,y,z of the rotation by roll, pitch and yaw about the parent's axes."""
    quat = np.zeros(4)
    mujoco.mju_euler2Quat(quat, np.array(turn, dtype=float), "XYZ")
    return quat


def paint_faces(spec: mujoco.MjSpec):
    """A material "painted": x, y, z are red, green, blue; dark on the side of -x."""
    faces = spec.add_texture(name="faces", type=mujoco.mjtTexture.mjTEXTURE_CUBE)
    faces.width, faces.height, faces.nchannel = 32, 6 * 32, 3
    colours = np.kron(np.eye(3), [[255], [120]])
    faces.data = colours.astype(np.uint8).repeat(32 * 32, 0).tobytes()
    painted = spec.add_material(name="painted")
    painted.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "faces"


def add_solid(body: mujoco.MjsBody, mass: float, inertia: Vector, box: Box):
    """A box with its mass (kg) in the middle, not pulled by gravity.

    inertia: 1e-6 kg m^2.
    """
    geom = add_box(body, box)
    set_mass(body, mass, geom.pos, np.array(inertia) * 1e-6)
    body.gravcomp = 1
