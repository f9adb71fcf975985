"""Isaac Gym's own tasks (IsaacGymEnvs), whose resets come one step late."""

import numpy as np
import torch
from torch import Tensor

from isaac_tasks.interface import SimulatorError
from isaac_tasks.nvidia_simulator import NvidiaSimulator, first_line


class IsaacGymSimulator(NvidiaSimulator):
    """N environments of a task; `isaac_tasks.Simulator` says what its methods return.

    Isaac Gym resets an environment in the step after the one that raised its done flag.
    Where an episode ends, `obs` is therefore the same as `final_obs`; the next row of
    that environment joins two episodes: it is not `valid`, and its `obs` is the first
    one of the new episode.

    seed: of torch's and numpy's global generators, from which Isaac Gym draws.
    """

    name = "Isaac Gym"

    def __init__(self, env_id: str, num_envs: int, seed: int, device="cpu"):
        try:
            import isaacgym  # noqa: F401  # before isaacgymenvs, and both before torch
            import isaacgymenvs
        except Exception as error:  # among others, of the wrong Python or numpy
            hint = ""
            if "PyTorch" in str(error):
                hint = " (its import must come before torch's)"
            raise SimulatorError(
                f"can't import Isaac Gym{hint}: {first_line(error)}"
            ) from error
        self.device = torch.device(device)
        seed_everything(seed)  # `make` takes a seed and ignores it
        try:
            self.env = isaacgymenvs.make(
                seed=seed,
                task=env_id,
                num_envs=num_envs,
                sim_device=str(device),
                rl_device=str(device),
                graphics_device_id=-1,
                headless=True,
                force_render=False,
            )
        except (Exception, SystemExit) as error:  # it quits where physics can't start
            raise SimulatorError(
                f"Isaac Gym can't make {env_id}: {first_line(error)}"
            ) from error
        self.num_envs = num_envs
        self.obs_dim, self.act_dim = self.env.num_obs, self.env.num_acts
        # A time-out comes at the end of step L - 1 of an episode. Tasks that reset
        # before physics take step 1 within the late reset; `reset` does that step
        # itself, so that L - 2 are left.
        self.max_steps = int(self.env.max_episode_length) - 2
        self.valid = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        # where the next step is spent on a reset
        self.late = torch.zeros_like(self.valid)

    def reset(self, seed: int | None = None) -> Tensor:
        """Isaac Gym's own `reset` resets nothing: its flags do, in a step."""
        if seed is not None:
            seed_everything(seed)
        self.env.reset_buf.fill_(1)
        zeros = torch.zeros(self.num_envs, self.act_dim, device=self.device)
        obs, _, done, _ = self.env.step(zeros)
        self.late = done.bool()  # an episode can fail within that step
        self.valid = torch.ones_like(self.valid)
        return obs["obs"].clone()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        observations, reward, done, extras = self.env.step(action.clamp(-1, 1))
        # All these are views of buffers that the next step overwrites.
        final_obs, done = observations["obs"].clone(), done.bool()
        if "time_outs" in extras:  # also where a fall coincides with the limit
            time_out = extras["time_outs"].bool()
        else:
            limit = self.env.max_episode_length - 1
            time_out = (self.env.progress_buf >= limit).to(self.device)
        self.valid = ~self.late
        self.late = done  # of a spurious row, too: then the next row is spurious again
        done = done & self.valid
        reward = torch.where(self.valid, reward, 0.0)
        return final_obs.clone(), reward, done & ~time_out, done & time_out, final_obs


def seed_everything(seed: int):
    torch.manual_seed(seed)
    np.random.seed(seed)
