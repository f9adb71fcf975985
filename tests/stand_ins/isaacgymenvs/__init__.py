"""Stand-in for IsaacGymEnvs: a scheduled task with its interface and late resets.

Observation (5): number of the environment, of its episode, of the step in the episode,
and of the episode in the last physics step, all / 64; a random number drawn at the
reset. Action (2). The reward is 1 - |action - 0.5|^2, and 100 in the step of a reset.
"""

import gymnasium
import numpy as np
import torch

NEVER = 10**6
FALLS = (3, NEVER, 6, 7, 1)
"""step at which an episode fails; index: environment + episode, modulo 5"""

TASKS = {
    "Ant": {},
    "Ingenuity": dict(reset_before_physics=True),
    # Contacts stay those of the dead state until the next physics step.
    "Anymal": dict(stale_contacts=True, falls=FALLS[:4]),
    # The worst that old or foreign tasks do: no time-outs in extras, no clipping,
    # aliased buffers.
    "OldAnt": dict(old=True),
    "OldIngenuity": dict(old=True, reset_before_physics=True),
}


def make(
    seed,  # noqa: ARG001  # not used by the real one, either
    task,
    num_envs,
    sim_device,
    rl_device,
    graphics_device_id=-1,
    headless=False,
    multi_gpu=False,  # noqa: ARG001
    virtual_screen_capture=False,  # noqa: ARG001
    force_render=True,
    cfg=None,  # noqa: ARG001
):
    if task not in TASKS:
        known = "\n\t".join(TASKS)
        raise LookupError(
            f"In 'config': Could not find 'task/{task}'\n\nAvailable:\n\t{known}"
        )
    if not headless or force_render or graphics_device_id != -1:
        print("*** Failed to create sim")
        quit()
    return Scheduled(num_envs, sim_device, rl_device, **TASKS[task])


class Scheduled:
    num_obs, num_acts, num_states = 5, 2, 0
    max_episode_length = 8
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (5,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(
        self,
        num_envs,
        sim_device,
        rl_device,
        reset_before_physics=False,
        stale_contacts=False,
        old=False,
        falls=FALLS,
    ):
        self.num_envs, self.device, self.rl_device = num_envs, sim_device, rl_device
        self.reset_before_physics = reset_before_physics
        self.stale_contacts = stale_contacts
        self.old, self.falls = old, torch.tensor(falls)
        self.index = torch.arange(num_envs)
        self.episode = torch.zeros(num_envs, dtype=torch.long)
        self.clock, self.episode_in_physics = self.episode.clone(), self.episode.clone()
        self.progress_buf = self.episode.clone()
        self.reset_buf = torch.ones_like(self.episode)
        self.contact = torch.zeros(num_envs, dtype=torch.bool)
        self.start = torch.zeros(num_envs)
        self.obs_buf, self.rew_buf = torch.zeros(num_envs, 5), torch.zeros(num_envs)
        self.terrain = np.random.rand()
        self.obs_dict, self.extras = {}, {}

    def reset(self):
        """Resets nothing, computes nothing: zeros before the first step."""
        return self._observations()

    def step(self, actions):
        if not self.old:
            actions = actions.clamp(-1, 1)
        pending = self.reset_buf != 0
        if self.reset_before_physics:
            self._reset(pending)
        self.clock += 1
        self.episode_in_physics.copy_(self.episode)
        fall = self.falls[(self.index + self.episode) % len(self.falls)]
        self.contact = self.clock >= fall
        self.progress_buf += 1
        if not self.reset_before_physics:
            self._reset(pending)
        numbers = [self.index, self.episode, self.clock, self.episode_in_physics]
        self.obs_buf[:] = torch.stack([*(n / 64 for n in numbers), self.start], -1)
        self.rew_buf[:] = torch.where(
            pending, 100.0, 1 - (actions - 0.5).square().sum(-1)
        )
        over = self.progress_buf >= self.max_episode_length - 1
        self.reset_buf[:] = over | self.contact
        if not self.old:
            self.extras["time_outs"] = over & (self.reset_buf != 0)
        return self._observations(), self.rew_buf, self.reset_buf, self.extras

    def _observations(self):
        """The same dictionary each time; a new tensor, as it is clipped."""
        self.obs_dict["obs"] = self.obs_buf
        if not self.old:
            self.obs_dict["obs"] = self.obs_buf.clamp(-np.inf, np.inf)
        return self.obs_dict

    def _reset(self, where):
        self.episode[where] += 1
        self.clock[where] = self.progress_buf[where] = 0
        self.start[where] = torch.rand(self.num_envs)[where] + self.terrain
        if not self.stale_contacts:
            self.contact[where] = False
