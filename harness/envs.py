"""Gymnasium environments: made, checked, trained in and evaluated in."""

import ctypes.util
import functools
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.args import RunArgs
from harness.files import RunError, UsageError

EVAL_STEP_LIMIT = 100_000  # of an evaluation episode whose environment has no time limit of its own
Policy = Callable[[Tensor, Tensor], Tensor]
"""policy(obs (n, S), noise (n, A)) -> actions (n, A) in [-1, 1]; noise 0: the deterministic one"""


def derive_seed(*key: int) -> int:
    """One 32-bit seed from several numbers, e.g. the run's seed, the use and the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def choose_renderer():
    """MuJoCo chooses its renderer when it is imported: without a screen, an off-screen one."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        for renderer, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
            if ctypes.util.find_library(library):
                os.environ.setdefault("MUJOCO_GL", renderer)


@functools.cache
def show_once(text: str):
    """Prints a warning of MuJoCo's once; by default each of our environments repeats it."""
    print(f"MuJoCo: {text}", file=sys.stderr)


def make_env(env_id: str, render_mode: str | None = None):
    """The Gymnasium environment with its actions rescaled to [-1, 1].

    Raises: UsageError for an unknown id and where a policy can't act: it needs a flat Box
    observation and a bounded continuous action.
    """
    choose_renderer()
    import gymnasium as gym
    import mujoco

    if ":" in env_id and os.getcwd() not in sys.path:  # `module:Env-v0` may lie in this folder
        sys.path.append(os.getcwd())
    mujoco.set_mju_user_warning(show_once)
    problem = f"--env-id {env_id}:"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*")  # v4 is the paper's
            env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        reason = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
        raise UsageError(f"{problem} can't make this environment: {reason}") from None
    if render_mode and render_mode not in env.metadata.get("render_modes", []):
        raise UsageError(f"{problem} it can't render images: leave out --capture-video")
    obs, act = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1 or obs.shape[0] == 0:
        hint = "wrap the environment in gymnasium.wrappers.FlattenObservation"
        raise UsageError(f"{problem} the observation must be one flat vector, not {obs}; {hint}")
    if not isinstance(act, gym.spaces.Box) or not np.issubdtype(act.dtype, np.floating):
        raise UsageError(f"{problem} the actions must be continuous (a float Box), not {act}")
    if len(act.shape) != 1 or act.shape[0] == 0:
        raise UsageError(f"{problem} the action must be one flat vector, not of shape {act.shape}")
    if not (np.isfinite([act.low, act.high]).all() and (act.low < act.high).all()):
        raise UsageError(f"{problem} the action space must be bounded on both sides, not {act}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def check_finite(env_id: str, step: int, obs: Tensor, reward: Tensor):
    """Raises: RunError where one of the environments returned NaN or infinity. (N, S), (N,)."""
    finite = obs.isfinite().all(-1) & reward.isfinite()
    if not finite.all():
        i = int((~finite).nonzero()[0])
        place = f"environment {i} of {len(finite)} of {env_id}" if len(finite) > 1 else env_id
        bad = [f"observation[{j}] = {obs[i, j]}" for j in (~obs[i].isfinite()).nonzero()[:5, 0]]
        bad += [] if reward[i].isfinite() else [f"reward = {reward[i]}"]
        raise RunError(f"{place} returned {', '.join(bad)} at step {step}; it was not stored")


def check_action(action, step: int):
    """The action itself, array or tensor. Raises: FloatingPointError when the policy diverged."""
    if not torch.as_tensor(action).isfinite().all():
        hint = "try a smaller learning rate; the last checkpoint is intact"
        raise FloatingPointError(f"the policy's action at step {step} is not finite; {hint}")
    return action


class TrainingEnv:
    """The training environment, restorable exactly; starts its next episode by itself.

    Each episode starts from its own seed, so this seed and the actions since the reset determine
    the state of any deterministic environment: a checkpoint holds both, and loading it plays the
    actions again. `obs` (S,): the observation to act on.
    """

    def __init__(self, env_id: str, seed: int):
        self.env, self.env_id, self.seed = make_env(env_id), env_id, seed
        self.obs_dim = self.env.observation_space.shape[0]
        self.act_dim = self.env.action_space.shape[0]
        self.steps, self.episode, self.last_return, self.ended = 0, -1, math.nan, {}

    def reset(self):
        """Starts the next episode."""
        self.episode += 1
        self.actions, self.episodic_return = [], 0.0
        obs, _ = self.env.reset(seed=derive_seed(self.seed, 0, self.episode))
        self.obs = np.array(obs, dtype=np.float32)
        self._check(self.obs, 0.0)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]:
        """The transition obs (S,), action (A,), next_obs (S,), reward, terminated.

        next_obs is the true final observation, also where the episode ends; terminated is False
        at a time-out, through which a target bootstraps.
        """
        check_action(action, self.steps)
        obs, (next_obs, reward, terminated, truncated, _) = self.obs, self.env.step(action)
        next_obs = np.array(next_obs, dtype=np.float32)  # a copy: some environments reuse theirs
        reward = float(reward)
        self._check(next_obs, reward)
        self.steps += 1
        self.actions.append(action)
        self.episodic_return += reward
        self.obs = next_obs
        if terminated or truncated:
            self.last_return = self.episodic_return
            self.ended = {"charts/episodic_return": self.last_return}
            self.ended["charts/episodic_length"] = len(self.actions)
            self.reset()
        return obs, action, next_obs, reward, bool(terminated)

    def _check(self, obs: np.ndarray, reward: float):
        rows = torch.from_numpy(obs)[None], torch.tensor([reward], dtype=torch.float64)
        check_finite(self.env_id, self.steps, *rows)

    def episode_metrics(self, _due: bool) -> dict[str, float]:
        """Return and length of an episode that has ended since the last call; else empty."""
        ended, self.ended = self.ended, {}
        return ended

    def state_dict(self) -> dict:
        actions = np.array(self.actions, dtype=np.float32).reshape(-1, self.act_dim)
        numbers = {name: getattr(self, name) for name in ("steps", "episode", "last_return")}
        arrays = {"actions": torch.from_numpy(actions), "obs": torch.from_numpy(self.obs.copy())}
        return numbers | arrays

    def load_state_dict(self, state: dict):
        self.steps, self.episode = state["steps"] - len(state["actions"]), state["episode"] - 1
        self.reset()
        for action in state["actions"].numpy():
            self.step(action.copy())
        self.last_return, self.ended = state["last_return"], {}
        if self.episode != state["episode"] or not np.array_equal(self.obs, state["obs"].numpy()):
            problem = f"{self.env_id} did not replay its episode exactly"
            print(f"warning: {problem}; starting a new one", file=sys.stderr)
            self.episode, self.steps = state["episode"], state["steps"]
            self.reset()


class EvaluationEnvs:
    """Environments that are stepped together, for an evaluation; on tensors, like a simulator."""

    def __init__(self, args: RunArgs):
        self.env_id, self.num_envs = args.env_id, args.eval_episodes
        first = "rgb_array" if args.capture_video else None
        modes = [first] + [None] * (self.num_envs - 1)
        self.envs = [make_env(args.env_id, mode) for mode in modes]
        self.obs_dim = self.envs[0].observation_space.shape[0]
        self.act_dim = self.envs[0].action_space.shape[0]
        self.fps = self.envs[0].metadata.get("render_fps", 30)

    def reset(self, *key: int) -> Tensor:
        """First observations (n, S) of new episodes, whose seeds derive from `key`."""
        first = [env.reset(seed=derive_seed(*key, i))[0] for i, env in enumerate(self.envs)]
        self.obs, self.ended = np.stack(first).astype(np.float32), [False] * self.num_envs
        return torch.from_numpy(self.obs.copy())

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs (n, S), reward (n,) float64, ended (n,); an episode that has ended stands still."""
        reward = np.zeros(self.num_envs)
        for i, action in enumerate(actions.numpy()):
            if not self.ended[i]:
                self.obs[i], reward[i], terminated, truncated, _ = self.envs[i].step(action)
                self.ended[i] = terminated or truncated
        return torch.from_numpy(self.obs.copy()), torch.from_numpy(reward), torch.tensor(self.ended)

    def render(self) -> np.ndarray:
        """An image (H, W, 3) of environment 0. Raises: RunError if this machine can't render."""
        try:
            return self.envs[0].render()
        except Exception as error:  # whatever the graphics libraries raise
            raise RunError(no_rendering(self.env_id, error)) from None


def no_rendering(env_id: str, error: Exception) -> str:
    hint = "install libegl1 or libosmesa6 and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
    return f"{env_id} can't be rendered ({type(error).__name__}: {error}); {hint}"


class Evaluator:
    """Plays an episode in each of the environments, batched through the policy."""

    def __init__(self, args: RunArgs, envs, policy: Policy):
        self.args, self.envs, self.policy = args, envs, policy

    def run(self, step: int, video_path: Path) -> tuple[list[float], list[int]]:
        """Returns and lengths of the episodes; their seeds depend on --seed and `step`.

        With --capture-video the first episode goes to `video_path`.
        """
        args, envs = self.args, self.envs
        rng = np.random.default_rng(derive_seed(args.seed, 2, step))
        obs = envs.reset(args.seed, 1, step)
        noise = torch.zeros(len(obs), envs.act_dim)
        returns, lengths, played = 0.0, 0, 0
        alive = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
        video = video_writer(video_path, envs) if args.capture_video else None
        while alive.any() and played < EVAL_STEP_LIMIT:
            if video and alive[0]:
                video.append_data(envs.render())
            if not args.deterministic_eval:
                rng.standard_normal(out=noise.numpy(), dtype=np.float32)
            action = check_action(self.policy(obs, noise.to(obs.device)), step)
            obs, reward, ended = envs.step(action)
            check_finite(args.env_id, step, obs[alive], reward[alive])
            returns, lengths, played = returns + reward * alive, lengths + alive.int(), played + 1
            alive = alive & ~ended
        if alive.any():
            print(f"warning: evaluation cut after {EVAL_STEP_LIMIT} steps", file=sys.stderr)
        if video:
            video.close()
        return returns.tolist(), lengths.tolist()


def video_writer(path: Path, envs):
    """An mp4 writer with append_data(image (H, W, 3)) and close, once the machine can render."""
    import imageio

    envs.render()
    path.parent.mkdir(exist_ok=True)
    return imageio.get_writer(path, fps=envs.fps, macro_block_size=1)


def evaluation_metrics(returns: list[float], lengths: list[int]) -> dict[str, float]:
    """Mean and standard deviation of the returns, mean length, and each return."""
    mean, std = float(np.mean(returns)), float(np.std(returns))
    summary = {"eval/return_mean": mean, "eval/return_std": std}
    summary["eval/length_mean"] = float(np.mean(lengths))
    return summary | {f"eval/return_{i}": value for i, value in enumerate(returns)}
