"""The seam between the scripts and a simulator of many environments at once."""

import importlib.util
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

NAMES = Literal["auto", "isaacgym", "isaaclab", "mujoco"]


class SimulatorError(RuntimeError):
    """A simulator can't be used, or has failed; the message is one sentence for the user."""


class Simulator(Protocol):
    """N environments stepped together; every tensor lies on `device`, float32 or bool.

    An environment whose episode ends starts its next one within the same step: `obs` is then the
    new episode's first observation and `final_obs` the last one of the old. Where a simulator
    resets one step late (Isaac Gym), `obs` equals `final_obs` at the end of an episode, and the
    next row, which is not `valid`, brings the new episode's first observation. Observations and
    rewards are the caller's to keep: no later step changes them.
    """

    num_envs: int
    obs_dim: int
    act_dim: int
    device: torch.device
    max_steps: int
    """an environment's time-outs are at least so many steps apart"""
    valid: Tensor | None
    """(N,) bool: rows of the last step that belong to the task. The others were spent on a late
    reset: their flags are False, their reward is 0, and they must not be learned from.
    None: all are valid"""
    exact_resume: bool
    """`load_state_dict` restores the environments; if not, episodes start anew"""
    one_per_process: bool
    """a second simulator can't exist beside this one, not even for evaluation"""

    fps: int
    """control steps per second of simulated time"""

    def reset(self, seed: int | None = None) -> Tensor:
        """Starts new episodes everywhere; first observations (N, S). seed: as Gymnasium's."""

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One control step with actions (N, A), clipped to [-1, 1].

        Returns obs (N, S), reward (N,), terminated (N,), truncated (N,), final_obs (N, S).
        terminated: the task ended (no bootstrapping); truncated: the time limit cut it off; never
        both. final_obs: what the action led to, before any reset; equals obs without one.
        Raises: SimulatorError.
        """

    def render(self) -> np.ndarray:
        """An image (H, W, 3), uint8, of environment 0. Raises: SimulatorError."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict): ...


def choose_simulator(name: str, env_id: str) -> str:
    """What "auto" means: the embedded tasks on MuJoCo, ids Isaac-... on Isaac Lab."""
    from isaac_tasks import TASKS

    if name != "auto":
        return name
    if env_id in TASKS:
        return "mujoco"
    return "isaaclab" if env_id.startswith(("Isaac-", "IsaacContrib-")) else "isaacgym"


def make_simulator(
    name: str,
    env_id: str,
    num_envs: int,
    seed: int,
    device: torch.device | str = "cpu",
    threads: int = 1,
    variant: str = "oige",
) -> Simulator:
    """The simulator `name` (of NAMES) with `num_envs` environments of the task `env_id`.

    threads: of the CPU (mujoco); variant: which task's constants (mujoco). Raises: SimulatorError.
    """
    from isaac_tasks import TASKS

    chosen = choose_simulator(name, env_id)
    if chosen == "mujoco":
        if env_id not in TASKS:
            known = ", ".join(TASKS)
            raise SimulatorError(f"the embedded simulator has no task {env_id}; it has {known}")
        from isaac_tasks.mujoco_simulator import MujocoSimulator

        return MujocoSimulator(TASKS[env_id], num_envs, seed, device, threads, variant)
    package = {"isaacgym": "isaacgymenvs", "isaaclab": "isaaclab_tasks"}[chosen]
    if importlib.util.find_spec(package) is None:
        known = f"the embedded tasks are {', '.join(TASKS)}"
        raise SimulatorError(f"{env_id} needs {chosen}, and {package} is not installed; {known}")
    if chosen == "isaacgym":
        from isaac_tasks.isaacgym_simulator import IsaacGymSimulator

        return IsaacGymSimulator(env_id, num_envs, seed, device)
    from isaac_tasks.isaaclab_simulator import IsaacLabSimulator

    return IsaacLabSimulator(env_id, num_envs, seed, device)
