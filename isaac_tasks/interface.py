"""What a simulator of many environments at once offers to the scripts, and its error.

Nothing here knows a simulator: they import this module, and `make` imports them.
"""

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

SimulatorName = Literal["auto", "isaacgym", "isaaclab", "mujoco"]


class SimulatorError(RuntimeError):
    """A simulator can't be used, or has failed; one sentence for the user."""


class Simulator(Protocol):
    """N environments stepped together; every tensor lies on `device`, float32 or bool.

    An environment whose episode ends starts its next one within the same step: `obs` is
    then the new episode's first observation and `final_obs` the last one of the old.
    Where a simulator resets one step late (Isaac Gym), `obs` equals `final_obs` at the
    end of an episode, and the next row, which is not `valid`, brings the new episode's
    first observation. Observations and rewards are the caller's to keep: no later step
    changes them.
    """

    num_envs: int
    obs_dim: int
    act_dim: int
    device: torch.device
    max_steps: int
    """an environment's time-outs are at least so many steps apart"""
    valid: Tensor | None
    """(N,) bool: rows of the last step that belong to the task. The others were spent
    on a late reset, or their physics broke down and a new episode was started: their
    flags are False, their reward is 0, and they must not be learned from. None: all are
    valid"""
    diverged: int
    """environments whose physics broke down in the last step"""
    exact_resume: bool
    """after `load_state_dict` the same actions have the same results, bit for bit"""
    one_per_process: bool
    """a second simulator can't exist beside this one, not even for evaluation"""
    fps: int
    """control steps per second of simulated time"""

    def reset(self, seed: int | None = None) -> Tensor:
        """Starts new episodes everywhere; first observations (N, S).

        seed: as Gymnasium's.
        """

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One control step with actions (N, A), clipped to [-1, 1].

        Returns obs (N, S), reward (N,), terminated (N,), truncated (N,) and
        final_obs (N, S).
        terminated: the task ended (no bootstrapping).
        truncated: the time limit cut it off; never both.
        final_obs: what the action led to, before any reset; equals obs without one.
        Raises: SimulatorError.
        """

    def render(self) -> np.ndarray:
        """An image (H, W, 3), uint8, of environment 0. Raises: SimulatorError."""

    def state_dict(self) -> dict:
        """Empty where environments can't be saved: then their episodes start anew."""

    def load_state_dict(self, state: dict): ...
