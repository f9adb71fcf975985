"""FrankaCabinet: an arm with a gripper opens the top drawer of a cabinet.

Built from code alone.
"""

import math
from typing import ClassVar, NamedTuple

import mujoco
import torch
from torch import Tensor

from isaac_tasks.parts import (
    Box,
    Vector,
    add_box,
    add_drive,
    add_floor_and_light,
    box_inertia,
    set_mass,
)
from isaac_tasks.task import State, Task, Uniform, rotation_matrix

QUARTER = math.pi / 2


class Link(NamedTuple):
    """A link of the arm and the hinge about its z axis; metres, radians, kg."""

    place: Vector
    """its frame's origin in the link before it"""
    turn: float
    """of its frame about the x axis of the link before it"""
    limits: tuple[float, float]
    mass: float
    centre: Vector
    """of mass"""
    box: Box


class Drive(NamedTuple):
    """Pulls a joint to its target.

    N m, rad/s, N m/rad, N m s/rad and kg m^2, or N, m/s and so on. PhysX stops joints
    at their highest speed. Here damping of the joint itself takes all of the effort at
    that speed, and the drive has the rest of the damping.
    """

    effort: float
    """the most"""
    speed: float
    """the most"""
    stiffness: float
    damping: float
    armature: float
    """of the motor: with less, joints damped so much bounce off what they touch"""


ARM = (
    Link((0, 0, 0.333), 0, (-2.8973, 2.8973), 2.975, (0, -0.031, -0.069),
         ((-0.055, -0.129, -0.192), (0.055, 0.055, 0.055))),
    Link((0, 0, 0), -QUARTER, (-1.7628, 1.7628), 3.004, (0, -0.070, 0.031),
         ((-0.055, -0.194, -0.055), (0.055, 0.055, 0.130))),
    Link((0, -0.316, 0), QUARTER, (-2.8973, 2.8973), 2.329, (0.044, 0.025, -0.038),
         ((-0.055, -0.055, -0.121), (0.138, 0.111, 0.055))),
    Link((0.0825, 0, 0), QUARTER, (-3.0718, -0.0698), 2.374, (-0.039, 0.040, 0.025),
         ((-0.138, -0.055, -0.055), (0.055, 0.124, 0.111))),
    Link((-0.0825, 0.384, 0), -QUARTER, (-2.8973, 2.8973), 3.419, (0, 0.038, -0.110),
         ((-0.055, -0.055, -0.265), (0.055, 0.130, 0.052))),
    Link((0, 0, 0), QUARTER, (-0.0175, 3.7525), 1.435, (0.051, 0.007, 0.006),
         ((-0.048, -0.051, -0.044), (0.132, 0.082, 0.056))),
    Link((0.088, 0, 0), QUARTER, (-2.8973, 2.8973), 0.446, (0.010, 0.010, 0.079),
         ((-0.044, -0.044, 0.052), (0.081, 0.081, 0.107))),
)  # fmt: skip
BASE_BOX = ((-0.154, -0.095, 0), (0.072, 0.095, 0.140))
# Mass, its centre, box.
HAND = (0.709, (0, -0.001, 0.024), ((-0.032, -0.104, -0.026), (0.032, 0.100, 0.066)))
LEFT_FINGER = (0.022, (0, 0.012, 0.024), ((-0.0105, 0, 0), (0.0105, 0.0264, 0.0538)))
RIGHT_FINGER = (0.022, (0, -0.012, 0.024), ((-0.0105, -0.0264, 0), (0.0105, 0, 0.0538)))

CABINET = (  # in axes at the cabinet's centre
    ((-0.305, -0.385, 0.373), (0.331, 0.385, 0.405)),
    ((-0.308, -0.385, 0.252), (-0.275, 0.385, 0.381)),
    ((-0.284, -0.386, 0.252), (0.313, -0.358, 0.382)),
    ((-0.284, 0.358, 0.252), (0.313, 0.386, 0.382)),
    # what is below the drawer is closed for good
    ((-0.308, -0.385, -0.384), (0.325, 0.385, 0.252)),
)
DRAWER = (  # in the drawer's axes
    ((0.246, -0.382, -0.064), (0.273, 0.382, 0.064)),
    ((-0.260, -0.353, -0.045), (-0.245, 0.353, 0.045)),
    ((-0.253, -0.353, -0.047), (0.254, -0.339, 0.047)),
    ((-0.253, 0.339, -0.047), (0.254, 0.353, 0.047)),
    ((-0.253, -0.345, -0.045), (0.254, 0.345, -0.040)),
)
HANDLE_BOX = ((0.273, -0.0835, -0.003), (0.312, 0.0835, 0.0214))  # around bar and stems

WHITE = (0.9, 0.9, 0.9, 1)

# What may collide: the robot with what is fixed.
ROBOT = dict(contype=1, conaffinity=0)
FIXED = dict(contype=0, conaffinity=1)

# MuJoCo's solref and solimp of limits and contacts.
STIFF = ((2 * Task.time_step, 1), (0.99, 0.999))

SHOULDER = Drive(87, 2.175, 400, 80, 0.4)
WRIST = Drive(12, 2.61, 400, 80, 0.2)
FINGER = Drive(200, 0.2, 1e5, 1000, 20)
DRIVES = [SHOULDER] * 4 + [WRIST] * 3 + [FINGER] * 2


class FrankaCabinet(Task):
    """Observation (23): positions (9) and velocities (9) of the seven hinges, the left
    and the right finger; vector from the gripper to the handle (3); opening of the
    drawer and its speed. Action (9): steps of the joints' targets. Memory: these
    targets.

    Differences from the originals: the links are boxes; the cubes in the drawer are a
    part of its mass; the cabinet's doors and bottom drawer don't open. Nothing that can
    move feels gravity: the arm doesn't in IsaacGymEnvs, the drawer slides level. The
    speed limits of the joints are damping (see `Drive`); the links' angular damping of
    0.5 1/s is left out. The fingers' stiffness lies between the originals' (oige 1e4,
    ige 1e6). OmniIsaacGymEnvs reads the left finger's pose for the right one too, so
    that its terms "around" and "fingers" are always zero; so are ours.
    """

    variants: ClassVar = {
        "oige": dict(dt=1 / 60, props_mass=0.2, closing=10.0, reads_fingers=0.0),
        "ige": dict(dt=0.0166, props_mass=3.28, closing=0.0, reads_fingers=1.0),
    }
    dt: float
    """s, in the steps of the targets"""
    props_mass: float
    """kg, of the cubes in the drawer"""
    closing: float
    """weight of closed fingers in the reward"""
    reads_fingers: float
    """weight of fingers around the handle"""
    obs_dim, act_dim, memory_dim = 23, 9, 9
    episode_length, clip_obs = 500, 5.0
    speed, finger_speed = 7.5, 0.75  # of the targets at action 1, rad/s and m/s
    finger_range, drawer_range = (0.0, 0.04), (0.0, 0.4)  # m
    hinge_give = 0.05  # rad
    base, cabinet, drawer = (1.0, 0.0, 0.0), (0.0, 0.0, 0.4), (0.0515, 0.0, 0.7172)
    hand_place, finger_place = 0.107, 0.0584  # along link 7 and the hand
    grip = (0.0, 0.04, 0.1654)  # in link 7
    handle_place = (0.3, 0.01, 0.0)  # in the drawer
    drawer_mass, drawer_damping = 5.33, 10.0  # kg, N s/m
    open_drawer = 0.39  # m, ends the episode
    pose = (1.157, -1.066, -0.155, -2.239, -1.841, 1.003, 0.469, 0.035, 0.035)

    def __init__(self, variant: str = "oige", **kwargs):
        super().__init__(variant, **kwargs)
        limits = [link.limits for link in ARM] + [self.finger_range] * 2
        self.lower, self.upper = self.tensor(limits).unbind(-1)
        give = self.hinge_give
        hinges = [(low - give, high + give) for low, high in limits[:7]]
        stops = [self.drawer_range, *hinges, self.finger_range, self.finger_range]
        self.lowest, self.highest = self.tensor(stops).unbind(-1)
        self.fastest = self.tensor([math.inf] + [drive.speed for drive in DRIVES])
        self.steps = self.dt * self.tensor([self.speed] * 7 + [self.finger_speed] * 2)
        self.start = self.tensor(self.pose)
        self.places = self.tensor([link.place for link in ARM])
        turns = self.tensor([link.turn for link in ARM])
        self.turn_cos, self.turn_sin = (turns / 2).cos(), (turns / 2).sin()
        # turned by pi about z
        self.base_axes = torch.diag(self.tensor([-1.0, -1.0, 1.0]))
        self.grip_in_hand = self.tensor(self.grip)
        self.base_place = self.tensor(self.base)
        self.handle = self.tensor(self.drawer) + self.tensor(self.handle_place)
        self.along_x = self.tensor([1.0, 0.0, 0.0])

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        self.set_options(spec)
        # Enough for these drives.
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        spec.option.gravity = (0, 0, 0)
        spec.compiler.degree = False
        # It acts 1 cm early: at full speed a step is as long.
        add_floor_and_light(spec, margin=0.01, **FIXED)
        spec.worldbody.add_camera(
            name="track", pos=(1.1, -1.6, 1.3), xyaxes=(0.9, 0.44, 0, -0.2, 0.4, 0.9)
        )
        self.add_cabinet(spec)
        self.add_arm(spec)
        return spec

    def add_cabinet(self, spec: mujoco.MjSpec):
        cabinet = spec.worldbody.add_body(name="cabinet", pos=self.cabinet)
        drawer = spec.worldbody.add_body(name="drawer", pos=self.drawer)
        for body, boxes, shade in ((cabinet, CABINET, 0.6), (drawer, DRAWER, 0.8)):
            for box in boxes:
                add_stiff_box(body, box, (shade, shade, shade, 1), FIXED)
        add_stiff_box(drawer, HANDLE_BOX, (0.8, 0.2, 0.1, 1), FIXED)
        mass = self.drawer_mass + self.props_mass
        set_mass(drawer, mass, (0, 0, 0), box_inertia(mass, DRAWER[0]))
        slide = add_slide(drawer, self.drawer_range, (1, 0, 0))
        slide.damping[0] = self.drawer_damping
        slide.armature = 0.005

    def add_arm(self, spec: mujoco.MjSpec):
        """Arm, hand and fingers; they collide with all but themselves."""
        parent = spec.worldbody.add_body(name="base", pos=self.base, quat=(0, 0, 0, 1))
        add_stiff_box(parent, BASE_BOX, WHITE, ROBOT)
        joints = []
        for i, link in enumerate(ARM, 1):
            turn = math.cos(link.turn / 2), math.sin(link.turn / 2), 0, 0
            parent = parent.add_body(name=f"link_{i}", pos=link.place, quat=turn)
            add_solid(parent, link.mass, link.centre, link.box)
            joints.append(add_hinge(parent, link.limits))
        turn = math.cos(math.pi / 8), 0, 0, -math.sin(math.pi / 8)
        hand = parent.add_body(name="hand", pos=(0, 0, self.hand_place), quat=turn)
        add_solid(hand, *HAND)
        fingers = (("left", LEFT_FINGER, 1), ("right", RIGHT_FINGER, -1))
        for name, solid, side in fingers:
            finger = hand.add_body(name=f"{name}_finger", pos=(0, 0, self.finger_place))
            add_solid(finger, *solid)
            joints.append(add_slide(finger, self.finger_range, (0, side, 0)))
        for joint, drive in zip(joints, DRIVES, strict=True):
            own_damping = drive.effort / drive.speed
            joint.damping[0] = own_damping
            joint.armature = drive.armature
            rest = drive.damping - own_damping
            add_drive(spec, joint, drive.stiffness, rest, drive.effort)

    def act(self, state: State, action: Tensor) -> tuple[Tensor, Tensor]:
        """The targets move by a step.

        They may run ahead of the joints, not beyond the limits.
        """
        targets = (state.memory + self.steps * action).clamp(self.lower, self.upper)
        return targets, targets

    def limit(self, state: State) -> State:
        """Like in PhysX, no joint is faster than it may be, or beyond its limits.

        (Hinges may pass theirs a little: moving them back each time presses bodies
        together.)
        """
        qpos = state.qpos.clamp(self.lowest, self.highest)
        qvel = torch.where(qpos == state.qpos, state.qvel, 0)
        qvel = qvel.clamp(-self.fastest, self.fastest)
        return State(qpos, qvel, state.sensors, state.memory)

    def initial(self, uniform: Uniform) -> State:
        joints = (self.start + uniform(-0.125, 0.125, 9)).clamp(self.lower, self.upper)
        n, zeros = len(joints), joints.new_zeros
        closed = torch.cat([zeros(n, 1), joints], -1)  # the drawer comes first
        return State(closed, zeros(n, 10), zeros(n, 0), joints)

    def gripper(self, state: State) -> dict[str, Tensor]:
        """Places and axes of the gripper in the world, (N, 3).

        Places of the grip, the left and the right finger; the direction `forward` of
        the fingers, and `across`, in which the left one opens.
        """
        half = state.qpos[:, 1:8] / 2
        cos, sin = half.cos(), half.sin()
        a, b = self.turn_cos, self.turn_sin
        # About x, then about z.
        quats = torch.stack([a * cos, b * cos, -b * sin, a * sin], -1)
        hinges = rotation_matrix(quats)  # (N, 7, 3, 3)
        place, axes = self.base_place, self.base_axes
        for link, hinge in zip(self.places, hinges.unbind(1), strict=True):
            place, axes = place + axes @ link, axes @ hinge
        x, y, forward = axes.unbind(-1)
        across = (x + y) / math.sqrt(2)
        middle = place + (self.hand_place + self.finger_place) * forward
        left, right = state.qpos[:, 8:10].split(1, -1)
        return {
            "grip": place + axes @ self.grip_in_hand,
            "forward": forward,
            "across": across,
            "left": middle + left * across,
            "right": middle - right * across,
        }

    def to_handle(self, state: State, gripper: dict[str, Tensor]) -> Tensor:
        """From the grip to the handle, (N, 3)."""
        return self.handle + state.qpos[:, :1] * self.along_x - gripper["grip"]

    def observe(self, state: State, action: Tensor) -> Tensor:
        span = self.upper - self.lower
        joints = (2 * state.qpos[:, 1:] - self.upper - self.lower) / span
        joint_speeds = 0.1 * state.qvel[:, 1:]
        to_handle = self.to_handle(state, self.gripper(state))
        opening, speed = state.qpos[:, :1], state.qvel[:, :1]
        return torch.cat([joints, joint_speeds, to_handle, opening, speed], -1)

    def reward_terms(
        self, before: State, state: State, action: Tensor
    ) -> dict[str, Tensor]:
        gripper, opening = self.gripper(state), state.qpos[:, 0]
        distance = self.to_handle(state, gripper).norm(dim=-1)
        near = (1 + distance**2) ** -2
        aim, upright = -gripper["forward"][:, 0], gripper["across"][:, 2]
        left = gripper["left"][:, 2] - self.handle[2]
        right = gripper["right"][:, 2] - self.handle[2]
        around = self.reads_fingers * ((left > 0) & (right < 0))
        closed = 2 * self.finger_range[1] - state.qpos[:, 8:].sum(-1)
        opened = 0.5 * (opening > 0.01) + 0.5 * around * (opening > 0.2)
        opened = opened + around * (opening > self.open_drawer)
        return {
            "near": 2 * near * (1 + (distance <= 0.02)),
            "aim": 0.25 * (aim * aim.abs() + upright * upright.abs()),
            "around": 0.125 * around,
            "fingers": 5 * around * (0.08 - left.abs() - right.abs()),
            "closed": self.closing * closed * (distance <= 0.03),
            "drawer": 7.5 * opening * (1 + 0.5 * around),
            "action": -0.01 * action.square().sum(-1),
            "opened": opened,
        }

    def reward(self, before: State, state: State, action: Tensor) -> Tensor:
        """ige: -1 where a finger's origin is further back than the handle's bar."""
        reward = super().reward(before, state, action)
        if self.variant == "oige":
            return reward
        gripper, handle = self.gripper(state), self.handle[0] + state.qpos[:, 0]
        deepest = torch.minimum(gripper["left"][:, 0], gripper["right"][:, 0])
        return torch.where(deepest < handle - 0.04, -1.0, reward)

    def failed(self, state: State) -> Tensor:
        """Where the drawer is open: an end, though not a failure."""
        return state.qpos[:, 0] > self.open_drawer

    def measures(self, state: State) -> dict[str, Tensor]:
        return {"opening of the drawer, m": state.qpos[:, 0]}


def add_stiff_box(body: mujoco.MjsBody, box: Box, colour: tuple, collides: dict):
    """collides: ROBOT or FIXED."""
    geom = add_box(body, box, mass=0, rgba=colour, **collides)
    geom.solref, geom.solimp[:2] = STIFF


def add_solid(body: mujoco.MjsBody, mass: float, centre: Vector, box: Box):
    """Shape and mass of a part of the robot; the inertia is that of the solid box."""
    add_stiff_box(body, box, WHITE, ROBOT)
    set_mass(body, mass, centre, box_inertia(mass, box))


def add_hinge(body: mujoco.MjsBody, limits: tuple[float, float]) -> mujoco.MjsJoint:
    """About the body's z axis, rad."""
    return add_stiff_joint(body, mujoco.mjtJoint.mjJNT_HINGE, limits, (0, 0, 1))


def add_slide(
    body: mujoco.MjsBody, limits: tuple[float, float], axis: Vector
) -> mujoco.MjsJoint:
    """Along an axis of the body, m."""
    return add_stiff_joint(body, mujoco.mjtJoint.mjJNT_SLIDE, limits, axis)


def add_stiff_joint(body, kind, limits, axis) -> mujoco.MjsJoint:
    joint = body.add_joint(name=body.name, type=kind, axis=axis, range=limits)
    joint.solref_limit, joint.solimp_limit[:2] = STIFF
    return joint
