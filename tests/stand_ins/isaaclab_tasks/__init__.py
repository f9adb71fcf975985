"""Stand-in for Isaac Lab's tasks: a scheduled task with resets inside the step.

Observation "policy" (4): number of the environment, of its episode, of the step in the
episode, all / 64; a random number drawn at the reset, with noise. Action (2). The
reward is 1 - |action - 0.5|^2.
"""

from types import SimpleNamespace

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from isaaclab import app

NEVER = 10**6
FALLS = (3, NEVER, 6, 7, 1)
"""step at which an episode fails; index: environment + episode, modulo 5"""
POLICY, ACTION = Box(-np.inf, np.inf, (4,)), Box(-np.inf, np.inf, (2,))


class EnvCfg:
    def __init__(self):
        self.seed = None
        self.sim = SimpleNamespace(device="cuda:0")
        self.scene = SimpleNamespace(num_envs=4096)
        self.compute_final_obs = False


class Scheduled(gymnasium.Env):
    max_episode_length = 8

    def __init__(self, cfg, render_mode=None, policy=POLICY, action=ACTION, **kwargs):  # noqa: ARG002
        if not app.running:
            raise RuntimeError("the simulation is not running")
        self.cfg, n = cfg, cfg.scene.num_envs
        torch.manual_seed(cfg.seed)
        self.num_envs, self.device = n, cfg.sim.device
        self.single_observation_space = Dict(policy=policy)
        self.single_action_space = action
        self.falls, self.index = torch.tensor(FALLS), torch.arange(n)
        self.episode, self.episode_length_buf = torch.zeros(2, n, dtype=torch.long)
        self.start, self.reward_buf = torch.zeros(2, n)
        self.reset_terminated, self.reset_time_outs = torch.zeros(
            2, n, dtype=torch.bool
        )
        self.obs_buf, self.final_obs_buf = torch.zeros(2, n, 4)
        self.extras = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self._reset_idx(self.index)
        return self._observe(self.obs_buf), self.extras

    def step(self, action):
        if not app.running:
            raise RuntimeError("the simulation was closed")
        self.episode_length_buf += 1
        fall = self.falls[(self.index + self.episode) % len(self.falls)]
        self.reset_terminated[:] = self.episode_length_buf >= fall
        self.reset_time_outs[:] = self.episode_length_buf >= self.max_episode_length - 1
        self.reward_buf[:] = 1 - (action - 0.5).square().sum(-1)
        done = (self.reset_terminated | self.reset_time_outs).nonzero()[:, 0]
        if len(done):
            if self.cfg.compute_final_obs:  # stays in extras after the following steps
                self.extras["final_obs"] = self._observe(self.final_obs_buf)
            self._reset_idx(done)
        obs = self._observe(self.obs_buf)
        return (
            obs,
            self.reward_buf,
            self.reset_terminated,
            self.reset_time_outs,
            self.extras,
        )

    def _reset_idx(self, where):
        self.episode[where] += 1
        self.episode_length_buf[where] = 0
        self.start[where] = torch.rand(len(where))

    def _observe(self, buffer):
        numbers = [self.index, self.episode, self.episode_length_buf]
        noisy = self.start + 0.01 * torch.rand(self.num_envs)
        buffer[:] = torch.stack([*(n / 64 for n in numbers), noisy], -1)
        return {"policy": buffer}


def register(name, **kwargs):
    kwargs = dict(env_cfg_entry_point=EnvCfg, **kwargs)
    gymnasium.register(name, Scheduled, disable_env_checker=True, kwargs=kwargs)


register("Isaac-Ant-Direct-v0")
register("Isaac-Humanoid-Direct")  # as in 3.0
register("Isaac-Terms-v0", policy=Dict(joints=POLICY))
register("Isaac-Image-v0", policy=Box(0, 1, (8, 8, 3)))
register("Isaac-Discrete-v0", action=Discrete(2))
