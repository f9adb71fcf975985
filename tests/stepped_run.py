"""Drives a script's `train` without files, and looks at its state in between.

The world, Noise-v0, has five observations, three actions whose own ranges are SCALE,
normal rewards and a termination every fourth step.
"""

import contextlib
import copy

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from harness.compiling import Compiler
from harness.machine import choose_device, configure_process
from harness.runs import Watch, get_state, set_state

SCALE = torch.tensor([0.4, 1.0, 3.0], dtype=torch.float64)
RANDOM_STEPS = 64
DEFAULTS = dict(env_id="Noise-v0", learning_starts=RANDOM_STEPS, batch_size=32, tau=0.1)


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


gym.register("Noise-v0", entry_point=Noise)


class SteppedRun:
    """Stands in for harness.runs.Run; calls after(self) at the end of each step."""

    program, checkpoint = "stepped", None

    def __init__(self, args, compiled=False, cuda=False, after=None, restored=None):
        self.args, self.after, self.restored = args, after, restored
        self.metrics = []  # of each step
        self.evaluations = []  # (step, returns)
        configure_process(torch_threads=1)
        self.device = choose_device(cuda)
        self.compiler = Compiler(compiled, self.device, lambda _: None)
        self.functions, self.tensors = {}, {}  # what `compile` gave and got, by name

    def closing(self, thing):
        return thing

    def compile(self, name, function, *tensors):
        self.functions[name] = self.compiler(name, function, *tensors)
        self.tensors[name] = tensors
        return self.functions[name]

    def start(self, policy, rng, sizes, **parts):
        self.policy, self.rng, self.sizes, self.parts = policy, rng, sizes, parts
        self.env, self.replay = parts.get("env"), parts["replay"]
        self.step = 0
        if self.restored:
            self.step = self.restored["step"]
            rng.bit_generator.state = self.restored["rng"]
            for name, part in parts.items():
                set_state(part, self.restored[name])

    def steps(self):
        while self.step < self.args.total_timesteps:
            yield self.step

    def due(self, frequency):
        return self.step > 0 and self.step % frequency == 0

    def due_to_log(self):
        return True

    @contextlib.contextmanager
    def evaluation(self, _fps):
        yield Watch(self, video=None)

    def check_signal(self):
        """There are none."""

    def log_evaluation(self, returns, _lengths):
        self.evaluations.append((self.step, returns))

    def log_episode(self, episode):
        """Nothing to write."""

    log_episodes = log_episode

    def log(self, metrics, _num_envs=None):
        self.metrics.append(metrics)

    def end_step(self):
        self.step += 1
        if self.after:
            self.after(self)

    def checkpointed(self):
        """What a checkpoint of this moment holds."""
        states = {name: get_state(part) for name, part in self.parts.items()}
        rng = self.rng.bit_generator.state
        return copy.deepcopy(states | {"step": self.step, "rng": rng})


def trained(
    script, updates=0, compiled=False, cuda=False, after=None, restored=None, **settings
):
    """A run of `train`: 64 random transitions, then by default so many updates."""
    rates = {name: 1e-2 for name in ("learning_rate", "q_lr", "policy_lr")}
    defaults = DEFAULTS | {k: v for k, v in rates.items() if hasattr(script.Args, k)}
    total = RANDOM_STEPS + updates
    args = script.Args(
        **defaults | dict(total_timesteps=total, eval_episodes=2) | settings
    )
    run = SteppedRun(args, compiled, cuda, after, restored)
    script.train(args, run)
    return run


def check_average(run, thetas: list, first: int):
    """With --policy-average 0.25 theta_bar <- 3/4 theta_bar + 1/4 theta, from thetas
    (after each step) at `first` on, is evaluated and saved; theta acts."""
    theta_bar = thetas[first]
    for theta in thetas[first + 1 :]:
        theta_bar = 0.75 * theta_bar + 0.25 * theta
    saved = torch.nn.utils.parameters_to_vector(run.policy["flow"].parameters())
    evaluated, acting = (run.tensors[name][0] for name in ("evaluation", "acting"))
    for vector in (saved, evaluated):
        torch.testing.assert_close(vector, theta_bar)
        assert (vector - thetas[-1]).abs().max() > 1e-3
    assert torch.equal(acting, thetas[-1])


def random_batch(n=32, dtype=torch.float64):
    """Rows obs | action | next_obs | reward | terminated; a quarter is terminated."""
    action = 2 * torch.rand(n, 3, dtype=dtype) - 1
    obs, next_obs, reward = (torch.randn(n, d, dtype=dtype) for d in (5, 5, 1))
    terminated = (torch.arange(n)[:, None] % 4 == 0).to(dtype)
    return torch.cat([obs, action, next_obs, reward, terminated], -1)


def adam_steps(decay):
    """How many steps of Adam (beta1^t, beta2^t) stands for."""
    t1, t2 = (np.log(decay.tolist()) / np.log([0.9, 0.999])).tolist()
    assert abs(t1 - t2) < 1e-6
    return round(t2)
