"""Gymnasium environments: made, checked, trained in and evaluated in."""

import ctypes.util
import functools
import math
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.args import RunArgs
from harness.files import RunError, UsageError

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    # MuJoCo chooses its renderer when it is imported: without a screen, an off-screen one
    for renderer, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", renderer)
warn_once = functools.cache(warnings.warn)  # of each text, not once per environment


def derive_seed(*key: int) -> int:
    """One 32-bit seed from several numbers, e.g. the run's seed, the use and the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def make_env(env_id: str, render_mode: str | None = None):
    """The Gymnasium environment with its actions rescaled to [-1, 1]. Raises: UsageError."""
    import gymnasium as gym
    import mujoco

    if (
        ":" in env_id and os.getcwd() not in sys.path
    ):  # `module:Env-v0` may lie in this folder
        sys.path.append(os.getcwd())
    mujoco.set_mju_user_warning(warn_once)
    try:
        with warnings.catch_warnings(
            action="ignore", category=DeprecationWarning
        ):  # of v4
            env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        reason = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
        raise UsageError(
            f"--env-id {env_id}: can't make this environment: {reason}"
        ) from None
    obs, act, problem = env.observation_space, env.action_space, None
    if render_mode and render_mode not in env.metadata.get("render_modes", []):
        problem = "it can't render images: leave out --capture-video"
    elif (
        not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1 or obs.shape[0] == 0
    ):
        hint = "wrap the environment in gymnasium.wrappers.FlattenObservation"
        problem = f"the observation must be one flat vector, not {obs}; {hint}"
    elif (
        not isinstance(act, gym.spaces.Box)
        or act.dtype.kind != "f"
        or len(act.shape) != 1
    ):
        problem = f"the action must be continuous (a float Box) and one flat vector, not {act}"
    elif not (
        act.shape[0] and all(0 < width < math.inf for width in act.high - act.low)
    ):
        problem = f"the action space must be bounded on both sides, not {act}"
    if problem:
        raise UsageError(f"--env-id {env_id}: {problem}")
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 100_000)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def check_finite(env_id: str, step: int, **values: Tensor | np.ndarray | float):
    """Raises: RunError for the first of these values that is NaN or infinite."""
    for name, value in values.items():
        library = (
            torch if isinstance(value, Tensor) else np
        )  # on small arrays NumPy is faster
        if not library.isfinite(value).all():
            value = np.asarray(torch.as_tensor(value).cpu())
            index = np.argwhere(~np.isfinite(value))[0].tolist()
            bad = f"{name}{index if index else ''} = {value[tuple(index)]}"
            raise RunError(
                f"{env_id}: {bad} at step {step}; the last checkpoint is intact"
            )


class TrainingEnv:
    """The training environment; starts its next episode by itself. `obs` (S,): to act on.

    A checkpoint holds the episode's number (it gives the seed) and its actions, to play them again.
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
        self.obs = self._check(
            self.env.reset(seed=derive_seed(self.seed, 0, self.episode))[0]
        )

    def _check(self, obs, **reward: float) -> np.ndarray:
        """A copy of an observation (some environments reuse theirs). Raises: RunError."""
        obs = np.array(obs, dtype=np.float32)
        if obs.shape != (self.obs_dim,):
            raise RunError(
                f"{self.env_id}: an observation of shape {obs.shape}, unlike its space"
            )
        check_finite(self.env_id, self.steps, observation=obs, **reward)
        return obs

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]:
        """The transition obs (S,), action (A,), next_obs (S,), reward, terminated.

        next_obs is the true final one where an episode ends; a time-out is not a termination.
        """
        check_finite(self.env_id, self.steps, action=action)
        obs, (next_obs, reward, terminated, truncated, _) = (
            self.obs,
            self.env.step(action),
        )
        reward = float(reward)
        self.obs = next_obs = self._check(next_obs, reward=reward)
        self.steps += 1
        self.actions.append(action)
        self.episodic_return += reward
        if terminated or truncated:
            self.last_return = self.ended["charts/episodic_return"] = (
                self.episodic_return
            )
            self.ended["charts/episodic_length"] = len(self.actions)
            self.reset()
        return obs, action, next_obs, reward, bool(terminated)

    def episode_metrics(self, _due: bool) -> dict[str, float]:
        """Return and length of an episode that has ended since the last call; else empty."""
        ended, self.ended = self.ended, {}
        return ended

    def state_dict(self) -> dict:
        actions = np.array(self.actions, dtype=np.float32).reshape(-1, self.act_dim)
        arrays = {
            "actions": torch.from_numpy(actions),
            "obs": torch.from_numpy(self.obs.copy()),
        }
        return {"steps": self.steps, "episode": self.episode} | arrays

    def load_state_dict(self, state: dict):
        self.steps, self.episode = (
            state["steps"] - len(state["actions"]),
            state["episode"] - 1,
        )
        self.reset()
        for action in state["actions"].numpy():
            self.step(action.copy())
        self.ended = {}
        if self.episode != state["episode"] or not np.array_equal(
            self.obs, state["obs"].numpy()
        ):
            text = "did not replay its episode exactly; starting a new one"
            print(f"warning: {self.env_id} {text}", file=sys.stderr)
            self.episode, self.steps = state["episode"], state["steps"]
            self.reset()


class EvaluationEnvs:
    """Environments that are stepped together, for an evaluation; on tensors, like a simulator."""

    def __init__(self, args: RunArgs):
        from gymnasium.vector import SyncVectorEnv

        modes = ["rgb_array" if args.capture_video else None] + [None] * (
            args.eval_episodes - 1
        )
        self.envs = SyncVectorEnv([lambda m=m: make_env(args.env_id, m) for m in modes])
        self.obs_dim = self.envs.single_observation_space.shape[0]
        self.act_dim = self.envs.single_action_space.shape[0]
        self.fps, self.render = (
            self.envs.metadata.get("render_fps", 30),
            self.envs.envs[0].render,
        )

    def reset(self, *key: int) -> Tensor:
        """First observations (n, S) of new episodes, whose seeds derive from `key`."""
        seeds = [derive_seed(*key, i) for i in range(self.envs.num_envs)]
        return torch.from_numpy(self.envs.reset(seed=seeds)[0].astype(np.float32))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs (n, S), reward (n,) float64, ended (n,); what follows an end is another episode's."""
        obs, reward, terminated, truncated, _ = self.envs.step(actions.numpy())
        ended = torch.from_numpy(terminated | truncated)
        return torch.from_numpy(obs.astype(np.float32)), torch.from_numpy(reward), ended


class Evaluator:
    """Plays an episode in each env; policy(obs (n, S), noise (n, A) or 0s) -> actions (n, A)."""

    def __init__(self, args: RunArgs, envs, policy):
        self.args, self.envs, self.policy = args, envs, policy

    def run(self, step: int, video_path: Path) -> tuple[list[float], list[int]]:
        """Returns and lengths of the episodes that --seed and `step` define; films the first."""
        args, envs, video = self.args, self.envs, None
        rng = np.random.default_rng(derive_seed(args.seed, 2, step))
        obs = envs.reset(args.seed, 1, step)
        noise = torch.zeros(len(obs), envs.act_dim)
        returns, lengths = 0.0, 0
        alive = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
        if args.capture_video:
            import imageio

            video_path.parent.mkdir(exist_ok=True)
            video = imageio.get_writer(video_path, fps=envs.fps, macro_block_size=1)
        while alive.any():
            if video and alive[0]:
                video.append_data(self._render())
            if not args.deterministic_eval:
                rng.standard_normal(out=noise.numpy(), dtype=np.float32)
            action = self.policy(obs, noise.to(obs.device))
            check_finite(args.env_id, step, action=action)
            obs, reward, ended = envs.step(action)
            check_finite(
                args.env_id, step, observation=obs[alive], reward=reward[alive]
            )
            returns = returns + torch.where(alive, reward, 0.0)
            lengths, alive = lengths + alive.int(), alive & ~ended
        if video:
            video.close()
        return returns.tolist(), lengths.tolist()

    def _render(self) -> np.ndarray:
        try:
            return self.envs.render()
        except Exception as error:  # whatever the graphics libraries raise
            reason = (
                f"can't render {self.args.env_id} ({type(error).__name__}: {error})"
            )
            hint = "install libegl1 or libosmesa6 and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
            raise RunError(f"{reason}; {hint}") from None
