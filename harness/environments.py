"""The user's Gymnasium environment: made, checked, brought back when a run goes on."""

import contextlib
import ctypes.util
import functools
import importlib
import inspect
import json
import os
import re
import struct
import sys
import warnings
import zlib

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from harness.errors import RunError, UsageError, UserCodeError, check_finite, say

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    # MuJoCo chooses its renderer when it is imported: here one without a screen
    for renderer, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", renderer)


LARGEST = float(np.finfo(np.float32).max)
PLAIN = (
    bool,
    int,
    float,
    np.bool_,
    np.integer,
    np.floating,
)  # what is one number as it is
warn_once = functools.cache(warnings.warn)  # of each text, not once per environment


# --- Making one -----------------------------------------------------------------------
def import_module_of(env_id: str):
    """Imports the module of `module:Env-v0`, which may lie in the current folder."""
    if ":" not in env_id:
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    name = env_id.partition(":")[0]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            text = f"--env-id {env_id}: there is no module {error.name}"
            raise UsageError(f"{text} here or installed") from None
        raise UserCodeError(f"--env-id {env_id}: importing {name} failed") from error
    except Exception as error:
        raise UserCodeError(f"--env-id {env_id}: importing {name} failed") from error


def full_id(env_id: str) -> str:
    """The id with the version that Gymnasium takes where none is given."""
    registration = gym.envs.registration
    if re.search(r"-v\d+$", env_id):
        return env_id
    try:
        import_module_of(env_id)
        namespace, name, _ = registration.parse_env_id(env_id.rpartition(":")[2])
        version = registration.find_highest_version(namespace, name)
    except (UsageError, UserCodeError, gym.error.Error):  # explained when it is made
        return env_id
    return env_id if version is None else f"{env_id}-v{version}"


def make(env_id: str, options: dict, render: bool = False) -> gym.Env:
    """gym.make without the time limit, its results checked. Raises: UsageError.

    render: the environment can render images, else that isn't asked of it.
    """
    import_module_of(env_id)
    if render:
        options = options | {"render_mode": "rgb_array"}
    quiet_mujoco()
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            env = gym.make(
                env_id, max_episode_steps=-1, disable_env_checker=True, **options
            )
    except (gym.error.Error, ImportError) as error:
        hint = module_hint(env_id, error)
        raise UsageError(f"{cannot_make(env_id, error)}{hint}") from None
    except Exception as error:
        if render and "render_mode" in str(error):
            raise UsageError(no_video(env_id)) from None
        if isinstance(error, TypeError) and "argument" in str(error):
            raise UsageError(
                f"{cannot_make(env_id, error)}; see --env-kwargs"
            ) from None
        raise UserCodeError(cannot_make(env_id, error)) from error
    with closed_on_error(env):
        if render and "rgb_array" not in env.metadata.get("render_modes", []):
            raise UsageError(no_video(env_id))
        return CheckedEnv(env, env_id)


@contextlib.contextmanager
def closed_on_error(env: gym.Env):
    """Closes an environment that can't be used: its processes would live on."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            env.close()
        raise


def quiet_mujoco():
    """MuJoCo's warnings once each, not once per environment; where MuJoCo is."""
    try:
        import mujoco
    except ImportError:
        return
    mujoco.set_mju_user_warning(warn_once)


def cannot_make(env_id: str, error: Exception) -> str:
    """A sentence with the error's reason, in one line and without colours."""
    reason = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
    reason = reason or type(error).__name__
    return f"--env-id {env_id}: can't make this environment: {reason}"


def module_hint(env_id: str, error: Exception) -> str:
    """What may be meant by an id that isn't registered."""
    not_registered = gym.error.NameNotFound, gym.error.NamespaceNotFound
    if ":" in env_id or not isinstance(error, not_registered):
        return ""
    example = f"--env-id my_module:{env_id or 'Env-v0'}"
    return f"; one of your own or of a package needs its module: {example}"


def no_video(env_id: str) -> str:
    return f"--env-id {env_id}: it can't render images: leave out --capture-video"


def flatten(env: gym.Env, env_id: str) -> gym.Env:
    """Gymnasium's FlattenObservation. Raises: UsageError."""
    space = env.observation_space
    with closed_on_error(env):
        if not flat_size(space):
            text = f"--env-id {env_id}: --flatten can't make a vector of {space}"
            raise UsageError(text)
        return gym.wrappers.FlattenObservation(env)


def check_spaces(env: gym.Env, env_id: str) -> gym.Env:
    """The environment, if a flat vector goes in and out. Raises: UsageError."""
    obs, act, problem = env.observation_space, env.action_space, None
    if not isinstance(obs, spaces.Box) or len(obs.shape) != 1 or obs.shape[0] == 0:
        problem = f"the observation must be one flat vector, not {obs}{flat_hint(obs)}"
    elif (
        not isinstance(act, spaces.Box) or act.dtype.kind != "f" or len(act.shape) != 1
    ):
        kind = "continuous (a float Box) and one flat vector"
        problem = f"the action must be {kind}, not {act}"
    elif not act.shape[0] or not act.is_bounded() or (act.low >= act.high).any():
        problem = f"the action space must be bounded on both sides, not {act}"
    elif not np.isfinite(width(act)).all():
        text = "the action space is wider than its numbers can tell"
        problem = f"{text} ({act}): give it the bounds that are really used"
    with closed_on_error(env):
        if problem:
            raise UsageError(f"--env-id {env_id}: {problem}")
        return env


def width(space: spaces.Box) -> np.ndarray:
    """How far each action can go, infinite where its numbers can't hold it."""
    with np.errstate(over="ignore"):
        return space.high - space.low


def flat_size(space: spaces.Space) -> int:
    """Numbers in the vector that --flatten makes of an observation, 0 if it can't."""
    try:
        flat = spaces.flatten_space(space)
    except NotImplementedError:  # a kind of space that Gymnasium doesn't know
        return 0
    return flat.shape[0] if isinstance(flat, spaces.Box) else 0


def flat_hint(space: spaces.Space) -> str:
    """How an observation can be made a flat vector, if it can."""
    size = flat_size(space)
    return f"; --flatten makes it one ({size} numbers)" if size else ""


# --- What it returns ------------------------------------------------------------------
class CheckedEnv(gym.Wrapper):
    """The results of `reset` and `step` in plain types. Raises: RunError."""

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        self.env_id, self.steps = env_id, 0
        for name in ("observation_space", "action_space"):
            if not isinstance(getattr(env, name, None), spaces.Space):
                text = f"its {name} must be one of gymnasium.spaces, set in __init__"
                raise UsageError(f"--env-id {env_id}: {text}")
        parameters = inspect.signature(env.unwrapped.reset).parameters
        open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        missing = {"seed", "options"} - set(parameters)
        if missing and not open_ended:
            text = f"its reset takes no `{min(missing)}`, as Gymnasium's API has it"
            raise UsageError(
                f"--env-id {env_id}: {text}: reset(self, *, seed, options)"
            )

    def reset(self, *, seed=None, options=None):
        result = self._call("reset", self.env.reset, seed=seed, options=options)
        if not isinstance(result, tuple) or len(result) != 2:
            self._refuse("its reset must return (observation, info)", result)
        obs, info = result
        return obs, self._dict(info)

    def step(self, action):
        result = self._call("step", self.env.step, action)
        if not isinstance(result, tuple) or len(result) != 5:
            wanted = "(observation, reward, terminated, truncated, info)"
            self._refuse(f"its step must return {wanted}", result)
        obs, reward, terminated, truncated, info = result
        reward = float(self._number("reward", reward))
        if not abs(reward) <= LARGEST:
            text = f"reward = {reward} at step {self.steps}"
            raise RunError(f"{self.env_id}: {text}: not a finite 32-bit number")
        terminated = bool(self._number("terminated", terminated))
        truncated = bool(self._number("truncated", truncated))
        info = self._dict(info)
        self.steps += 1
        return obs, reward, terminated, truncated, info

    def close(self):
        self._call("close", self.env.close)

    def _call(self, name: str, method, *args, **kwargs):
        try:
            return method(*args, **kwargs)
        except Exception as error:
            kind = type(error).__name__
            text = f"{self.env_id}: its {name} raised {kind} at step {self.steps}"
            raise UserCodeError(f"{text} ({error})") from error

    def _number(self, name: str, value) -> np.generic:
        """The one number that this is, or is an array of."""
        if isinstance(value, PLAIN):
            return value
        array = np.asarray(value) if value is not None else np.empty(0)
        if array.size != 1 or array.dtype.kind not in "fiub":
            self._refuse(f"its {name} must be one number", value)
        return array.reshape(-1)[0]

    def _dict(self, info) -> dict:
        if info is not None and not isinstance(info, dict):
            self._refuse("its info must be a dict", info)
        return info or {}

    def _refuse(self, rule: str, value):
        if isinstance(value, tuple):
            came = f"{len(value)} values"
        else:
            came = f"{' '.join(repr(value).split())[:80]} ({type(value).__name__})"
        raise RunError(f"{self.env_id}: {rule}, not {came}, at step {self.steps}")


# --- Going on -------------------------------------------------------------------------
class Record:
    """An episode: its seed, its actions, and as checksums what came of these.

    The first checksum is the reset's; before the reset there is none.
    """

    def __init__(self, seed: int | None, first: int = 0):
        self.seed, self.first = seed, first
        self.actions: list[np.ndarray] = []
        self.checksums: list[int] = []

    def add(self, action: np.ndarray, obs: np.ndarray, reward: float, ended: bool):
        self.actions.append(action)
        self.checksums.append(checksum(obs, reward, ended))

    def state_dict(self) -> dict:
        return {
            "seed": self.seed,
            "first": self.first,
            "actions": torch.from_numpy(np.array(self.actions)),
            "checksums": list(self.checksums),
        }

    @classmethod
    def from_state(cls, state: dict) -> "Record":
        record = cls(state["seed"], state["first"])
        record.checksums = list(state["checksums"])
        record.actions = list(state["actions"].numpy().copy())
        return record


def checksum(obs: np.ndarray, reward: float = 0.0, ended: bool = False) -> int:
    return zlib.crc32(obs.tobytes() + struct.pack("d?", reward, ended))


class ReplayableEnv(gym.Wrapper):
    """An environment whose episodes can be played again, so that a run can go on.

    Observations are checked, float32 copies; `episode_count` counts ended episodes, and
    the last step's `info` has the episode's return and length, as Gymnasium's
    RecordEpisodeStatistics gives them. After `load_state_dict` the next `reset` plays
    the recorded actions again and returns the observation to go on from.
    """

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        self.env_id, self.steps, self.episode_count = env_id, 0, 0
        self.sizes = [*env.observation_space.shape, *env.action_space.shape]
        self.previous, self.current, self.saved = None, Record(None), None

    def reset(self, *, seed=None, options=None):
        if self.saved:
            return self._go_on(seed), {}
        obs = self._observation(
            self._call(self.env.reset, seed=seed, options=options)[0]
        )
        self.current, self.episodic_return = Record(seed, self.steps), 0.0
        self.current.checksums.append(checksum(obs))
        return obs, {}

    def step(self, action: np.ndarray):
        check_finite(self.env_id, self.steps, action=action)
        obs, reward, *ends, info = self._call(self.env.step, action)
        obs, ended = self._observation(obs), any(ends)
        self.current.add(action, obs, reward, ended)
        self.steps += 1
        self.episodic_return += reward
        if ended:
            length = len(self.current.actions)
            info = info | {"episode": {"r": self.episodic_return, "l": length}}
            self.episode_count += 1
            self.previous, self.current = self.current, Record(None)
        return obs, reward, *ends, info

    def _call(self, method, *args, **kwargs):
        """What a wrapper around the environment raises is the user's to see, too."""
        try:
            return method(*args, **kwargs)
        except (RunError, UsageError):
            raise
        except Exception as error:
            text = f"{self.env_id}: {type(error).__name__} at step {self.steps}"
            raise UserCodeError(f"{text} ({error})") from error

    def _observation(self, obs) -> np.ndarray:
        """A copy: some environments reuse their observations. Raises: RunError."""
        try:
            obs = np.array(obs, dtype=np.float32)
        except (TypeError, ValueError) as error:
            text = f"an observation that is no vector at step {self.steps} ({error})"
            raise RunError(f"{self.env_id}: {text}") from None
        if obs.shape != self.observation_space.shape:
            text = f"an observation of shape {obs.shape} at step {self.steps}"
            expected = f"unlike its space's {self.observation_space.shape}"
            raise RunError(f"{self.env_id}: {text}, {expected}")
        check_finite(self.env_id, self.steps, observation=obs)
        return obs

    # what a checkpoint holds
    def state_dict(self) -> dict:
        return {
            "episode_count": self.episode_count,
            "steps": self.steps,
            "previous": self.previous.state_dict() if self.previous else None,
            "current": self.current.state_dict(),
        }

    def load_state_dict(self, state: dict):
        self.saved = state
        self.episode_count, self.steps = state["episode_count"], state["steps"]

    def _go_on(self, seed: int) -> np.ndarray:
        """Plays the previous and the current episode again; the observation to act on.

        The previous one too, since it was played in a used environment and is now
        played in a new one: this shows whether the environment keeps anything.
        """
        saved, self.saved = self.saved, None
        if saved["previous"]:
            self._replay(Record.from_state(saved["previous"]))
        record = Record.from_state(saved["current"])
        record.seed = seed
        obs = self._replay(record)
        self.episode_count, self.steps = saved["episode_count"], saved["steps"]
        if obs is None:
            say(f"warning: {self.env_id} starts a new episode")
            return self.reset(seed=seed)[0]
        return obs

    def _replay(self, record: Record) -> np.ndarray | None:
        """An episode's last observation, played again; None if it went otherwise."""
        self.steps = record.first
        obs, _ = self.reset(seed=record.seed)
        played, expected = self.current, record.checksums
        for action, before in zip(record.actions, expected, strict=False):
            if played.checksums[-1] != before:
                break
            obs = self.step(action)[0]
        if not expected or played.checksums == expected:
            return obs
        text = f"did not replay its episode exactly (at step {self.steps})"
        reason = "it is random, or keeps something over reset(seed=...)"
        result = "this is not bit for bit the run without the stop"
        say(f"warning: {self.env_id} {text}: {reason}; {result}")
        return None


def check_sizes(saved: dict, sizes: list[int], env_id: str):
    """Raises: UsageError where the environment isn't the one of a saved run."""
    (obs, act), (obs_now, act_now) = saved["sizes"], sizes
    if [obs, act] != [obs_now, act_now]:
        made = f"{saved['path']} was made with {obs} observations and {act} actions"
        raise UsageError(f"{made}; {env_id} now has {obs_now} and {act_now}")


def json_object(name: str, text: str) -> dict:
    """An option's JSON object. Raises: ValueError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        example = """'{"continuous": true}'"""
        raise ValueError(f"{name} {text}: must be a JSON object, as in {example}")
    return value
