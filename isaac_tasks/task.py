"""What a task is: a MuJoCo model and batched functions of its state.

Adding a task adds a file.
Shapes: N environments, S observation, A action.
Units: metres, radians, seconds, newtons; z is up.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
import torch
from torch import Tensor

# uniform(low, high, n): (N, n) numbers drawn from [low, high)
Uniform = Callable[[float, float, int], Tensor]


@dataclass
class State:
    """The state of N environments, in MuJoCo's conventions.

    A free joint holds position (3) and quaternion w,x,y,z in qpos; in qvel the linear
    velocity in world axes and the angular velocity in body axes.
    """

    qpos: Tensor
    """(N, nq)"""
    qvel: Tensor
    """(N, nv)"""
    sensors: Tensor
    """(N, nsensordata), of the last physics step; zero in an episode's first state"""
    memory: Tensor
    """(N, memory_dim) numbers of the task's own, such as a target"""

    def clone(self) -> "State":
        return State(*(t.clone() for t in vars(self).values()))


class Task(ABC):
    """One robot task; subclasses fill in the class attributes and the methods below.

    All functions are pure, batched and run on any device: state in, tensors out.

    variant: "oige", the constants of OmniIsaacGymEnvs 2023.1.1 (the MEow paper's runs),
    or "ige", those of IsaacGymEnvs 1.5.1.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {"oige": {}, "ige": {}}
    """the constants in which they differ; a task has its variant's as attributes"""
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

    def __init__(
        self, variant: str = "oige", device="cpu", dtype: torch.dtype = torch.float64
    ):
        if variant not in self.variants:
            raise ValueError(
                f"variant {variant}: must be one of {', '.join(self.variants)}"
            )
        vars(self).update(self.variants[variant])
        self.variant = variant
        self.device = torch.device(device)
        self.dtype = dtype

    def tensor(self, values) -> Tensor:
        return torch.as_tensor(np.array(values), dtype=self.dtype, device=self.device)

    def set_options(self, spec: mujoco.MjSpec):
        """The options that all models share."""
        spec.option.timestep = self.time_step
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_DISCRETE
        # A NaN stays visible.
        spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET

    @abstractmethod
    def spec(self) -> mujoco.MjSpec:
        """The model: one control per number that `control` returns."""

    def control(self, action: Tensor) -> Tensor:
        """Action (N, A) in [-1, 1] to the model's controls (N, nu)."""
        return action

    def act(self, state: State, action: Tensor) -> tuple[Tensor, Tensor]:
        """The controls (N, nu) of an action, and the memory (N, memory_dim) it leaves.

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
        """The state after a control step, within limits of the simulator."""
        return state

    @abstractmethod
    def observe(self, state: State, action: Tensor) -> Tensor:
        """Observations (N, S).

        action (N, A): the one just applied, zero after a reset.
        """

    @abstractmethod
    def reward_terms(
        self, before: State, state: State, action: Tensor
    ) -> dict[str, Tensor]:
        """The addends (N,) of the reward by name, for a step without failure."""

    @abstractmethod
    def failed(self, state: State) -> Tensor:
        """(N,) bool: where the episode terminates."""

    def reward(self, before: State, state: State, action: Tensor) -> Tensor:
        """(N,) rewards of the step from `before` to `state` with `action`."""
        return sum(self.reward_terms(before, state, action).values())

    def measures(self, state: State) -> dict[str, Tensor]:
        """What the task is about, by name and unit, (N,): for people."""
        return {}

    def show(self, data: mujoco.MjData, memory: Tensor):  # noqa: B027 (not abstract)
        """Prepares an image: data and memory (memory_dim,) of one environment.

        Most tasks have nothing to prepare.
        """


def rotation_matrix(quat: Tensor) -> Tensor:
    """R (..., 3, 3), body to world, of unit quaternions w,x,y,z (..., 4)."""
    w, v = quat[..., None, :1], quat[..., None, 1:].expand(*quat.shape[:-1], 3, 3)
    unit = torch.eye(3, dtype=quat.dtype, device=quat.device)
    across = 2 * torch.linalg.cross(v, unit.expand_as(v))
    # R e = e + 2 w v x e + 2 v x v x e
    columns = unit + w * across + torch.linalg.cross(v, across)
    return columns.transpose(-1, -2)


def to_body(rotation: Tensor, vector: Tensor) -> Tensor:
    """R^T v: world axes to body axes. (N, 3, 3), (N, 3) -> (N, 3)."""
    return (rotation.transpose(-1, -2) @ vector[..., None])[..., 0]


def roll_and_yaw(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Euler angles in [0, 2 pi) of R, body to world (N, 3, 3) -> (N,), (N,)."""
    roll = torch.atan2(rotation[:, 2, 1], rotation[:, 2, 2])
    yaw = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
    return roll % (2 * math.pi), yaw % (2 * math.pi)


def shorten(vector: Tensor, most: float) -> Tensor:
    """Vectors (N, 3) of at most this length."""
    return vector * (most / vector.norm(dim=-1, keepdim=True).clamp(min=most))


def normalize_angle(angle: Tensor) -> Tensor:
    """To (-pi, pi]."""
    return torch.atan2(torch.sin(angle), torch.cos(angle))
