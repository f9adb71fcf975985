"""Small environments with known behaviour, used as `scripted_env:NAME-v0`."""

import itertools
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch  # noqa: F401 (for the text of `change`)
from gymnasium import spaces

BOX = spaces.Box(-1, 1, (2,), np.float32)


class Scripted(gym.Env):
    """In turn: termination after 3 steps, truncation after 4, both after 5.

    Observation (episode + 1, steps so far); reward of step t: 10 (episode + 1) + t.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(np.float32([-0.4, 2.0]), np.float32([0.4, 3.0]))
    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode, self.episode, self.received = render_mode, 0, []
        self.buffer = np.zeros(2, np.float32)  # reused, as some simulators do

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.episode, self.t = self.episode + 1, 0
        self.buffer[:] = self.episode, 0
        return self.buffer, {}

    def step(self, action):
        self.received.append(action)
        self.t += 1
        kind = (self.episode - 1) % 3
        end = self.t == 3 + kind
        self.buffer[:] = self.episode, self.t
        return (
            self.buffer,
            10.0 * self.episode + self.t,
            end and kind != 1,
            end and kind != 0,
            {},
        )


class OneState(gym.Env):
    """One state, reward 1, a time-out every 5 steps."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.t = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, _action):
        self.t += 1
        return np.zeros(1, np.float32), 1.0, False, self.t == 5, {}


class Drifting(OneState):
    """Not deterministic: its observations count all steps that this process ever took
    in it.
    """

    clock = itertools.count()

    def step(self, action):
        _, *rest = super().step(action)
        return np.full(1, next(self.clock) / 1e6, np.float32), *rest


class Broken(OneState):
    """At step `at` the observation or the reward is not finite."""

    def __init__(self, render_mode=None, at=25, obs=0.0, reward=1.0):
        super().__init__(render_mode)
        self.at, self.bad_obs, self.bad_reward, self.steps = at, obs, reward, 0

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = super().step(action)
        if self.steps == self.at:
            obs, reward = np.full(1, self.bad_obs, np.float32), self.bad_reward
        return obs, reward, *rest


class Spaces(OneState):
    """OneState with other spaces than it really has; `natural`: what it returns
    fits.
    """

    natural = False

    def __init__(self, render_mode=None, obs=None, act=None):
        super().__init__(render_mode)
        self.observation_space = obs or OneState.observation_space
        self.action_space = act or BOX

    def reset(self, **options):
        obs, info = super().reset(**options)
        return self.observation_space.sample() if self.natural else obs, info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.observation_space.sample() if self.natural else obs, *rest


class Plain(OneState):
    """Its constructor has no render_mode, as gym.make doesn't ask for one."""

    def __init__(self):
        super().__init__()


def function():
    return Plain()


class Endless(OneState):
    """No episode ends by itself."""

    def step(self, _action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Sleepless(OneState):
    """A training episode, the first instance's, is short; the others' are `length`."""

    length, made = 10**9, 0

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        Sleepless.made += 1
        self.number = Sleepless.made

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.number % 2 == 0:
            truncated = self.t == self.length
        return obs, reward, terminated, truncated, info


class Scaled(OneState):
    """The reward is `scale`."""

    def __init__(self, render_mode=None, scale=1.0):
        super().__init__(render_mode)
        self.scale = float(scale)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.scale, *rest


class Leaking(OneState):
    """Keeps something over reset(seed): steps count on, from episode to episode."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.total = 0

    def step(self, action):
        self.total += 1
        _, *rest = super().step(action)
        return np.full(1, self.total / 1e6, np.float32), *rest


class LeakingReset(Leaking):
    """Only a reset's observation shows it."""

    def reset(self, **options):
        obs, info = super().reset(**options)
        return obs + np.float32(self.total / 1e6), info

    def step(self, action):
        obs, *rest = super().step(action)
        return 0 * obs, *rest


class LeakingReward(Leaking):
    """The observations don't show it."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return 0 * obs, float(self.total), *rest


class Returning(Endless):
    """From step 3 on its step returns one thing more or less: change = "name=value"."""

    def __init__(self, render_mode=None, change="reward=1.0"):
        super().__init__(render_mode)
        name, _, value = change.partition("=")
        self.change, self.steps = {name: eval(value)}, 0

    def step(self, action):
        names = ("obs", "reward", "terminated", "truncated", "info")
        result = dict(zip(names, super().step(action), strict=True))
        self.steps += 1
        return tuple((result | self.change if self.steps > 3 else result).values())


class OldStep(OneState):
    """The step of the old Gym API: (observation, reward, done, info)."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, {}


class OldReset(OneState):
    """The reset of the old Gym API: the observation alone."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options=options)[0]


class Seedless(OneState):
    """A reset without `seed`, as in the old Gym API."""

    def reset(self):
        return super().reset()


class Actionless(OneState):
    """It was forgotten to set `action_space`."""

    action_space = None


class Raising(OneState):
    """Each method named in `method` raises, the step from the `at`th on."""

    def __init__(self, render_mode=None, method="step", at=2):
        super().__init__(render_mode)
        self.method, self.at, self.steps = method, at, 0

    def fail(self, method):
        if method in self.method.split():
            raise ConnectionResetError("CUDA error: not enough memory")

    def reset(self, **options):
        self.fail("reset")
        return super().reset(**options)

    def step(self, action):
        self.steps += 1
        if self.steps >= self.at:
            self.fail("step")
        return super().step(action)

    def close(self):
        self.fail("close")


class Single(OneState):
    """A second one can't be made."""

    made = 0

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        type(self).made += 1
        if self.made > 1:
            raise RuntimeError("only one at a time")


class Closing(OneState):
    """Knows which instances are open; its step raises at step `at`."""

    open: ClassVar[list] = []

    def __init__(self, render_mode=None, at=0):
        super().__init__(render_mode)
        self.at, self.steps = at, 0
        self.open.append(self)

    def step(self, action):
        self.steps += 1
        if self.steps == self.at:
            raise ValueError("it fails")
        return super().step(action)

    def close(self):
        if self in self.open:
            self.open.remove(self)


class OwnSpace(spaces.Space):
    """A kind of space that Gymnasium doesn't know."""


def register(name, entry_point, **kwargs):
    gym.register(f"{name}-v0", entry_point=entry_point, kwargs=kwargs)


WIDE = np.float32([3e38, 3e38])
register("Scripted", Scripted)
register("OneState", OneState)
register("Drifting", Drifting)
register("Leaking", Leaking)
register("LeakingReset", LeakingReset)
register("LeakingReward", LeakingReward)
register("Plain", Plain)
register("Function", function)
register("Endless", Endless)
register("Sleepless", Sleepless)
register("Scaled", Scaled)
register("Returning", Returning)
register("OldStep", OldStep)
register("OldReset", OldReset)
register("Seedless", Seedless)
register("Actionless", Actionless)
register("Raising", Raising)
register("Single", Single)
register("Closing", Closing)
register("NanObs", Broken, obs=np.nan)
register("InfReward", Broken, reward=np.inf)
register("ForeignObs", Spaces, obs="Box(2,)")
register("DictObs", Spaces, obs=spaces.Dict(a=BOX))
register("OwnObs", Spaces, obs=OwnSpace())
register("SequenceObs", Spaces, obs=spaces.Sequence(BOX))
register("WrongShape", Spaces, obs=BOX)
register("ImageObs", Spaces, obs=spaces.Box(0, 255, (8, 8, 3), np.uint8))
register("DiscreteObs", Spaces, obs=spaces.Discrete(3))
register("Unbounded", Spaces, act=spaces.Box(-np.inf, np.inf, (2,), np.float32))
register("HalfBounded", Spaces, act=spaces.Box(0, np.inf, (2,), np.float32))
register("TooWide", Spaces, act=spaces.Box(-WIDE, WIDE))
register("IntegerBox", Spaces, act=spaces.Box(0, 3, (2,), np.int64))
register("MultiDiscrete", Spaces, act=spaces.MultiDiscrete([2, 2]))
register("MatrixAction", Spaces, act=spaces.Box(-1, 1, (2, 2), np.float32))
register("Float64", Spaces, act=spaces.Box(-2, 2, (2,), np.float64))
register("EmptyRange", Spaces, act=spaces.Box(1, 1, (2,), np.float32))
