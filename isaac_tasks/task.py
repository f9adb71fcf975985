"""What a task is: a MuJoCo model and batched functions of its state. Adding a task adds a file.

Shapes: N environments, S observation, A action. Units: metres, radians, seconds, newtons; z is up.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from torch import Tensor

# uniform(low, high, n): (N, n) numbers drawn from [low, high)
Uniform = Callable[[float, float, int], Tensor]


@dataclass
class State:
    """The state of N environments, in MuJoCo's conventions.

    A free joint holds position (3), quaternion w,x,y,z in qpos and the linear velocity in world
    axes, the angular velocity in body axes in qvel.
    """

    qpos: Tensor
    """(N, nq)"""
    qvel: Tensor
    """(N, nv)"""
    sensors: Tensor
    """(N, nsensordata), as of the last physics step; zero in the first state of an episode"""
    memory: Tensor
    """(N, memory_dim) numbers of the task's own, such as a target"""

    def clone(self) -> "State":
        return State(*(t.clone() for t in vars(self).values()))


class Task(ABC):
    """One robot task; subclasses fill in the class attributes and the methods below.

    All functions are pure, batched and run on any device: state in, tensors out.

    variant: "oige", the constants of OmniIsaacGymEnvs 2023.1.1 (the MEow paper's runs), or "ige",
    those of IsaacGymEnvs 1.5.1.
    """

    variants = ("oige", "ige")
    obs_dim: int
    act_dim: int
    memory_dim = 0
    time_step = 0.0083
    """seconds of one physics step"""
    substeps = 2
    """physics steps per control step"""
    episode_length = 1000
    """L: an episode times out at the end of its step L - 1"""
    clip_obs = math.inf
    """observations are clipped to +- this"""
    contacts, constraints = 64, 256
    """most contacts (on average) and constraint rows of one environment on the GPU"""

    def __init__(self, variant: str = "oige", device="cpu", dtype: torch.dtype = torch.float64):
        if variant not in self.variants:
            raise ValueError(f"variant {variant}: must be one of {', '.join(self.variants)}")
        self.variant, self.device, self.dtype = variant, torch.device(device), dtype

    def tensor(self, values) -> Tensor:
        return torch.as_tensor(np.array(values), dtype=self.dtype, device=self.device)

    def set_options(self, spec: mujoco.MjSpec):
        """The options that all models share."""
        spec.option.timestep = self.time_step
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_DISCRETE
        spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET  # a NaN stays visible

    @abstractmethod
    def spec(self) -> mujoco.MjSpec:
        """The model: one control per number that `control` returns."""

    def control(self, action: Tensor) -> Tensor:
        """Action (N, A) in [-1, 1] to the model's controls (N, nu)."""
        return action

    def act(self, state: State, action: Tensor) -> tuple[Tensor, Tensor]:
        """The controls (N, nu) of an action, and the memory (N, memory_dim) that it leaves.

        For tasks whose actions add up, such as steps of a joint's target.
        """
        return self.control(action), state.memory

    @abstractmethod
    def initial(self, uniform: Uniform) -> State:
        """First states of N episodes."""

    def before_step(self, state: State, progress: Tensor, fresh: State) -> Tensor:
        """The memory (N, memory_dim) for the coming step.

        progress (N,): steps since the reset. fresh: new first states to take from.
        """
        return state.memory

    def limit(self, state: State) -> State:
        """The state after a physics step, where the simulator limits it (e.g. speeds)."""
        return state

    @abstractmethod
    def observe(self, state: State, action: Tensor) -> Tensor:
        """Observations (N, S); action (N, A): the one just applied, zero after a reset."""

    @abstractmethod
    def reward_terms(self, before: State, state: State, action: Tensor) -> dict[str, Tensor]:
        """The addends (N,) of the reward by name, for a step without failure."""

    @abstractmethod
    def failed(self, state: State) -> Tensor:
        """(N,) bool: where the episode terminates."""

    def reward(self, before: State, state: State, action: Tensor) -> Tensor:
        """(N,) rewards of the step from `before` to `state` with `action`."""
        return sum(self.reward_terms(before, state, action).values())

    def show(self, data: mujoco.MjData, memory: Tensor):  # noqa: B027 (most have nothing to do)
        """Prepares an image: data and memory (memory_dim,) of one environment."""


def rotation_matrix(quat: Tensor) -> Tensor:
    """R (..., 3, 3), body to world, of unit quaternions w,x,y,z (..., 4)."""
    w, v = quat[..., None, :1], quat[..., None, 1:].expand(*quat.shape[:-1], 3, 3)
    unit = torch.eye(3, dtype=quat.dtype, device=quat.device)
    across = 2 * torch.linalg.cross(v, unit.expand_as(v))
    columns = unit + w * across + torch.linalg.cross(v, across)  # R e = e + 2 w v x e + 2 v x v x e
    return columns.transpose(-1, -2)


def to_body(rotation: Tensor, vector: Tensor) -> Tensor:
    """R^T v: world axes to body axes. (N, 3, 3), (N, 3) -> (N, 3)."""
    return (rotation.transpose(-1, -2) @ vector[..., None])[..., 0]


def roll_and_yaw(quat: Tensor) -> tuple[Tensor, Tensor]:
    """Euler angles in [0, 2 pi) of quaternions w,x,y,z (N, 4) -> (N,), (N,)."""
    w, x, y, z = quat.unbind(-1)
    roll = torch.atan2(2 * (w * x + y * z), w * w - x * x - y * y + z * z)
    yaw = torch.atan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)
    return roll % (2 * math.pi), yaw % (2 * math.pi)


def shorten(vector: Tensor, most: float) -> Tensor:
    """Vectors (N, 3) of at most this length."""
    return vector * (most / vector.norm(dim=-1, keepdim=True).clamp(min=most))


def normalize_angle(angle: Tensor) -> Tensor:
    """To (-pi, pi]."""
    return torch.atan2(torch.sin(angle), torch.cos(angle))


def stand_on_floor(spec: mujoco.MjSpec, friction: float):
    """Lets the robot, whose root is free, touch the geom "floor" (z = 0) with spheres alone.

    On a plane a capsule is the two spheres at its ends, a box its corners. Each sphere and the
    floor become a contact pair of the model, on which `Floor` in limits.py acts.
    """
    model = spec.compile()
    floor = spec.geom("floor")
    floor.contype = floor.conaffinity = 0
    kind = mujoco.mjtGeom.mjGEOM_SPHERE
    shape = dict(type=kind, mass=0, contype=0, conaffinity=0, margin=0, group=4)  # not drawn
    for i, (body, place, radius) in enumerate(touching_spheres(model)):
        sphere = spec.body(model.body(body).name).add_geom(name=f"touch_{i}", **shape)
        sphere.pos, sphere.size[0] = place, radius
        pair = spec.add_pair(geomname1=floor.name, geomname2=sphere.name, condim=3)
        pair.friction[:2] = friction


def touching_spheres(model: mujoco.MjModel) -> list[tuple[int, np.ndarray, float]]:
    """Body, place in it (3,) and radius of each sphere with which a robot can touch a plane.

    Spheres inside another shape of the same body are left out, and those that stay together with
    a sphere of another body, such as at a knee.
    """
    solid = model.geom_contype | model.geom_conaffinity
    geoms = [g for g in np.flatnonzero(solid) if model.geom_bodyid[g] > 0]
    spheres = []
    for geom in geoms:
        others = [g for g in geoms if model.geom_bodyid[g] == model.geom_bodyid[geom] and g != geom]
        for place, radius in ends(model, geom):
            if not any(inside(model, other, place, radius) for other in others):
                spheres.append((int(model.geom_bodyid[geom]), place, radius))
    data, different = mujoco.MjData(model), []
    poses = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        mujoco.mj_integratePos(model, data.qpos, rng.standard_normal(model.nv), 1)
        mujoco.mj_kinematics(model, data)
        poses.append([data.xpos[b] + data.xmat[b].reshape(3, 3) @ p for b, p, _ in spheres])
    rows = np.concatenate([*poses, [[r] * 3 for _, _, r in spheres]], -1)
    for i, row in enumerate(rows):
        if not any(np.allclose(row, rows[j]) for j in different):
            different.append(i)
    return [spheres[i] for i in different]


def ends(model: mujoco.MjModel, geom: int) -> list[tuple[np.ndarray, float]]:
    """Centres (3,), in the body, and radii of the spheres whose hull is a geom.

    The hull of a sphere or capsule exactly, of a box with corners rounded by a millimetre, of a
    cylinder with eight places of each rim, rounded.
    """
    kind, size = model.geom_type[geom], model.geom_size[geom]
    rotation = rotation_matrix(torch.from_numpy(model.geom_quat[geom])[None])[0].numpy()
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        radius, offsets = size[0], [(0, 0, 0)]
    elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        radius, offsets = size[0], [(0, 0, -size[1]), (0, 0, size[1])]
    elif kind == mujoco.mjtGeom.mjGEOM_BOX:
        radius = 1e-3
        offsets = np.array(list(itertools.product((-1, 1), repeat=3))) * (size - radius)
    elif kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        radius, angles = size[:2].min(), np.arange(8) * math.pi / 4
        x, y = (size[0] - radius) * np.array([np.cos(angles), np.sin(angles)])
        rims = radius - size[1], size[1] - radius
        offsets = [(x[i], y[i], z) for i in range(8) for z in rims]
    else:
        raise ValueError(f"{model.geom(geom).name}: no sphere, capsule, box or cylinder")
    return [(model.geom_pos[geom] + rotation @ offset, float(radius)) for offset in offsets]


def inside(model: mujoco.MjModel, geom: int, place: np.ndarray, radius: float) -> bool:
    """Whether a sphere lies in a sphere, capsule or box of the same body."""
    size = model.geom_size[geom]
    rotation = rotation_matrix(torch.from_numpy(model.geom_quat[geom])[None])[0].numpy()
    local = rotation.T @ (place - model.geom_pos[geom])
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CYLINDER:
        return False
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX:
        return bool(np.all(abs(local) + radius <= size))
    length = size[1] * (model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CAPSULE)
    nearest = np.array([0, 0, np.clip(local[2], -length, length)])
    return bool(np.linalg.norm(local - nearest) + radius <= size[0])
