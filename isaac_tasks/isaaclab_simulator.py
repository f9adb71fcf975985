"""Isaac Lab's tasks, with resets inside the step that ends an episode.

Isaac Lab 3.0 or newer.
"""

import contextlib

import gymnasium
import torch
from torch import Tensor

from isaac_tasks.interface import SimulatorError
from isaac_tasks.nvidia_simulator import NvidiaSimulator, first_line

NEEDED = (
    "Isaac Lab 3.0 or newer is needed: older ones hide an episode's final observation"
)
# Isaac Lab's physics stays open until the process ends: closing it may end the process.
until_exit = contextlib.ExitStack()


class IsaacLabSimulator(NvidiaSimulator):
    """N environments of a task; see `isaac_tasks.Simulator` for its methods."""

    name = "Isaac Lab"
    valid = None

    def __init__(self, env_id: str, num_envs: int, seed: int, device="cpu"):
        try:
            from isaaclab import app

            launch = getattr(app, "launch_simulation", None)
            if launch is None:  # before 3.0 the app must start before all other imports
                self.app = app.AppLauncher(headless=True, device=str(device)).app
            import isaaclab_tasks  # noqa: F401  # registers the tasks
            from isaaclab_tasks.utils import parse_env_cfg
        except ImportError as error:
            raise SimulatorError(f"{NEEDED} ({error})") from error
        self.device = torch.device(device)
        try:
            cfg = parse_env_cfg(env_id, device=str(device), num_envs=num_envs)
        except gymnasium.error.Error as error:
            hint = "since 3.0 names have no ending -v0, as in Isaac-Ant-Direct"
            raise SimulatorError(f"Isaac Lab has no task {env_id}; {hint}") from error
        if not hasattr(cfg, "compute_final_obs"):
            raise SimulatorError(NEEDED)
        cfg.seed, cfg.compute_final_obs = seed, True
        try:
            if launch:
                options = {"headless": True, "device": str(device)}
                until_exit.enter_context(launch(cfg, options))
            self.env = gymnasium.make(env_id, cfg=cfg)
        except Exception as error:  # whatever the graphics and physics libraries raise
            raise SimulatorError(
                f"Isaac Lab can't make {env_id}: {first_line(error)}"
            ) from error
        unwrapped = self.env.unwrapped
        self.num_envs = num_envs
        spaces = getattr(unwrapped, "single_observation_space", {})
        self.obs_dim = flat_length(
            spaces.get("policy"), f'{env_id}: observations "policy"'
        )
        space = getattr(unwrapped, "single_action_space", None)
        self.act_dim = flat_length(space, f"{env_id}: actions")
        self.max_steps = int(unwrapped.max_episode_length) - 1

    def reset(self, seed: int | None = None) -> Tensor:
        obs, _ = self.env.reset(seed=seed)
        return obs["policy"].clone()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        obs, reward, terminated, truncated, extras = self.env.step(action.clamp(-1, 1))
        # All these are buffers that Isaac Lab may use again.
        obs = obs["policy"].clone()
        reward = reward.clone()
        terminated = terminated.clone()
        done = terminated | truncated
        # There only after a step with resets, but it would stay for the following ones.
        before_reset = extras.pop("final_obs", None)
        if before_reset is not None:
            final_obs = torch.where(done[:, None], before_reset["policy"], obs)
        elif done.any():
            raise SimulatorError(
                "Isaac Lab did not return the final observation of an episode"
            )
        else:
            final_obs = obs.clone()
        return obs, reward, terminated, truncated & ~terminated, final_obs


def flat_length(space: gymnasium.Space | None, what: str) -> int:
    """The length of the flat vectors in a space. Raises: SimulatorError."""
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise SimulatorError(f"{what} must be one flat vector, not {space}")
    return space.shape[0]
