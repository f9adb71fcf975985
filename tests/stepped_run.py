"""Drives a script's `train` without files or evaluations, and looks at its state in between.

`noise_env:Noise-v0`-like worlds are registered here: five observations, three actions whose own
ranges are SCALE, normal rewards, a termination every fourth step.
"""

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from harness.functional import Hardware

SCALE = torch.tensor([0.4, 1.0, 3.0], dtype=torch.float64)
ENV_ID = "Noise-v0"


class Noise(gym.Env):
    """Observations and rewards are independent standard normal numbers."""

    observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float32)
    action_space = spaces.Box(-SCALE.float().numpy(), SCALE.float().numpy())

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        return self.np_random.standard_normal(5, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.t = 0
        return self.observe(), {}

    def step(self, _action):
        self.t += 1
        return self.observe(), self.np_random.normal(), self.t == 4, False, {}


gym.register(ENV_ID, entry_point=Noise)


class SteppedRun:
    """Stands in for harness.runs.Run: `total` steps, and `after(self)` at the end of each."""

    program = "stepped"
    checkpoint = None

    def __init__(self, total, compiled=False, cuda=False, after=None):
        self.total, self.after, self.metrics = total, after, []
        self.hardware = Hardware(cuda=cuda, torch_threads=1, compile=compiled)
        self.device = self.hardware.device

    def start(self, env, evaluator, policy, rng, **parts):
        self.env, self.evaluator, self.policy, self.rng, self.parts = (
            env,
            evaluator,
            policy,
            rng,
            parts,
        )
        env.reset()

    def steps(self):
        yield from range(self.total)

    def log(self, metrics):
        self.metrics.append(metrics)
        if self.after:
            self.after(self)


def adam_steps(decay):
    """How many steps of Adam (beta1^t, beta2^t) stands for."""
    t1, t2 = (np.log(decay.tolist()) / np.log([0.9, 0.999])).tolist()
    assert abs(t1 - t2) < 1e-6
    return round(t2)
