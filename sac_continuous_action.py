"""SAC: soft actor-critic with a learned temperature, for Gymnasium environments.

    python sac_continuous_action.py --env-id Ant-v4                      # MEow's budget of steps
    python sac_continuous_action.py --resume runs/<run_name>             # go on exactly
    python sac_continuous_action.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905,
with the settings of CleanRL's sac_continuous_action.py. The baseline of meow_continuous_action.py:
same sections, options, files and evaluation, so a diff of the two scripts is the algorithm.

    pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2)                        policy
    y = r + gamma (1 - terminated) (min_k Q'_k(s',a') - alpha log pi(a'|s')),  a' ~ pi(.|s')
    J_Q = mean of sum_k (Q_k(s,a) - y)^2                                  critics
    J_pi = mean of alpha log pi(a|s) - min_k Q_k(s,a),  a ~ pi(.|s)       actor
    J_alpha = -alpha (mean of log pi(a|s) + target entropy)               temperature

Symbols   code                  meaning
pi        Actor                 squashed Gaussian; its density is per unit of the ENVIRONMENT's
                                actions, so the target entropy -|A| means what it does in CleanRL
Q_k       Critics.q_values      two soft Q-functions, reward units
alpha     exp(log_alpha)        temperature: learned from 1 on, or fixed by --no-autotune
theta     theta                 parameters of the critics in one vector; theta': target_theta
phi       phi                   parameters of the actor in one vector
y         target                soft target, reward units
Shapes: B batch, A action, S observation, P parameters.

Differences from CleanRL's script, each with its reason:
S1  The temperature's step uses the log pi of the actor's own sample (theirs draws again): one pass
    of the actor less, and the form of the paper.
S2  log(1 - a^2) is computed from u as 2 (log 2 - u - softplus(-2u)); theirs adds 1e-6 inside.
S3  An update runs before the environment's step of its iteration, so that a GPU works while the
    simulator does: the newest transition can be drawn one update later.
S4  A loss that is not finite stops the run and says where.
S5  --reward-shifting clipped adds the MEow paper's learnable reward shifts: Q_k(s,a) + b_k(s).
"""

# --- 1. Imports -----------------------------------------------------------------------------------
import argparse
import contextlib
import ctypes
import ctypes.util
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

# MuJoCo chooses its renderer when it is imported: without a screen, an off-screen one.
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    for renderer, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", renderer)

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

# --- 2. Settings ----------------------------------------------------------------------------------
# The budgets of the MEow paper, the defaults for these (MuJoCo: v4 and v5); others get `Args`.
PAPER_SETTINGS = {
    "Hopper": dict(total_timesteps=1_500_000),
    "HalfCheetah": dict(total_timesteps=1_500_000),
    "Walker2d": dict(total_timesteps=4_000_000),
    "Ant": dict(total_timesteps=4_000_000),
    "Humanoid": dict(total_timesteps=5_000_000),
    "multi_goal:MultiGoal": dict(  # MEow's temperature and discount there
        total_timesteps=4_000,
        learning_starts=1_000,
        gamma=0.9,
        alpha=2.5,
        autotune=False,
        eval_frequency=500,
    ),
}


class UsageError(Exception):
    """The command can't be carried out as given (exit code 2)."""


class RunError(Exception):
    """The run can't go on (exit code 1)."""


class Interrupted(Exception):
    """SIGINT or SIGTERM, after the checkpoint has been written (exit code 128 + signal number)."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@dataclass
class Args:
    # Experiment
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id; flat observation, bounded continuous action; `module:Env-v0` imports module"""
    exp_name: str = "sac_continuous_action"
    """name of the experiment, a part of the run name"""
    seed: int = 1
    """seed of networks, exploration, replay, training and evaluation episodes"""
    total_timesteps: int = 1_000_000
    """environment steps in all"""
    resume: str | None = None
    """run folder or checkpoint to continue exactly; its own settings become the defaults"""
    evaluate: str | None = None
    """run folder, checkpoint or policy to play instead of training; prints each return"""

    # Algorithm
    policy_lr: float = 3e-4
    """Adam's step size for the actor"""
    q_lr: float = 1e-3
    """Adam's step size for the critics and the temperature"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak averaging: theta' <- (1 - tau) theta' + tau theta after each update"""
    autotune: bool = True
    """learn the temperature; the target entropy is minus the number of action dimensions"""
    alpha: float = 0.2
    """temperature with --no-autotune: reward units per nat of entropy"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """transitions kept in the replay buffer"""
    learning_starts: int = 5_000
    """environment steps with uniform random actions; after them one update per step"""
    policy_frequency: int = 2
    """the actor is updated every so many steps, then as many times"""

    # Ablation of the MEow paper
    reward_shifting: Literal["clipped", "none"] = "none"
    """clipped: each critic gets a learnable shift b_k(s) of MEow's form; none: plain SAC"""

    # Evaluation and logging
    eval_frequency: int = 10_000
    """environment steps between evaluations (the last step is always evaluated)"""
    eval_episodes: int = 10
    """episodes per evaluation, in separate environments, with fresh seeds derived from --seed"""
    deterministic_eval: bool = True
    """evaluate the action of latent z = 0; --no-deterministic-eval draws from the policy"""
    log_frequency: int = 1_000
    """environment steps between rows of losses and speed in metrics.csv"""
    checkpoint_frequency: int = 50_000
    """environment steps between checkpoints (0: only when interrupted and at the end)"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    capture_video: bool = False
    """write an mp4 of the first episode of each evaluation to the run's videos/"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "meow"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""

    # Hardware and speed
    cuda: bool = True
    """use the GPU if there is one"""
    torch_deterministic: bool = True
    """choose deterministic cuDNN algorithms"""
    torch_threads: int = 1
    """CPU threads; networks this small gain little from a second and nothing from more"""
    compile: bool = True
    """compile acting and update (a minute, then cached; needs g++ on CPU); equal up to rounding"""

    def __post_init__(self):
        counts = "total_timesteps batch_size buffer_size learning_starts policy_frequency"
        for name in f"{counts} eval_frequency eval_episodes log_frequency torch_threads".split():
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "checkpoint_frequency"):
            self._check(name, 0 <= getattr(self, name) < 2**32, "from 0 to 2^32 - 1")
        for name in ("policy_lr", "q_lr", "alpha"):
            self._check(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self._check("gamma", 0 <= self.gamma <= 1, "from 0 to 1")
        self._check("tau", 0 < self.tau <= 1, "above 0 and at most 1")
        if self.resume and self.evaluate:
            raise ValueError("--resume and --evaluate exclude each other")

    def _check(self, name: str, valid: bool, allowed: str):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")


# What may differ from the checkpoint when a run goes on, and when a policy is evaluated.
RESUME_MAY_CHANGE = "resume total_timesteps checkpoint_frequency capture_video track"
RESUME_MAY_CHANGE += " wandb_project_name wandb_entity cuda torch_threads compile"
EVALUATE_MAY_CHANGE = "evaluate seed eval_episodes deterministic_eval capture_video torch_threads"


def default_args(env_id: str) -> Args:
    """The paper's settings for its tasks (MuJoCo: v4 and v5); general ones for any other."""
    name, _, version = env_id.rpartition("-v")
    versions = ("4", "5")
    if name.startswith("multi_goal:"):  # its worlds share their settings
        name, versions = "multi_goal:MultiGoal", ("0",)
    return Args(env_id=env_id, **(PAPER_SETTINGS.get(name, {}) if version in versions else {}))


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """Args of the command line, and the content of the file given to --resume or --evaluate.

    `--env-id`, `--resume` and `--evaluate` are read first: they set the other defaults.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("env-id", "resume", "evaluate"):
        peek.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name.replace("-", "_"))
    try:
        given = peek.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # an option without its value: tyro explains it below
        given = argparse.Namespace(env_id=None, resume=None, evaluate=None)
    saved = content = None
    if given.resume or given.evaluate:
        file = find_checkpoint(given.resume) if given.resume else find_policy(given.evaluate)
        content = load_file(file)
        saved = saved_args(content, file)
    default = saved or default_args(given.env_id or Args.env_id)
    try:
        args = tyro.cli(Args, default=default, description=__doc__.split("\n\n    ")[0], args=argv)
    except ValueError as error:
        raise UsageError(error) from None
    if saved:
        may_change = (RESUME_MAY_CHANGE if given.resume else EVALUATE_MAY_CHANGE).split()
        asked, stored = dataclasses.asdict(args), dataclasses.asdict(saved)
        conflicts = [k for k in asked if asked[k] != stored[k] and k not in may_change]
        if conflicts:
            named = [f"--{k.replace('_', '-')} {asked[k]} (saved: {stored[k]})" for k in conflicts]
            text = f"{file} was made with other settings: {', '.join(named)}"
            raise UsageError(f"{text}. Leave these options out.")
    return args, content


# --- 3. Environment -------------------------------------------------------------------------------
def derive_seed(*key: int) -> int:
    """One 32-bit seed from several numbers, e.g. the run's seed, the use and the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.cache
def show_once(text: str):
    """Prints a warning of MuJoCo's once; by default each of our environments repeats it."""
    print(f"MuJoCo: {text}", file=sys.stderr)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment with its actions rescaled to [-1, 1].

    Raises: UsageError for an unknown id and where the policy can't act: it needs a flat Box
    observation and a bounded continuous action.
    """
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


def check_finite(env_id: str, step: int, obs: np.ndarray, reward: float = 0.0):
    """Raises: RunError when the environment returned NaN or infinity."""
    if not (np.isfinite(obs).all() and math.isfinite(reward)):
        bad = [f"observation[{i}] = {obs[i]}" for i in np.flatnonzero(~np.isfinite(obs))[:5]]
        bad += [] if math.isfinite(reward) else [f"reward = {reward}"]
        raise RunError(f"{env_id} returned {', '.join(bad)} at step {step}; it was not stored")


def check_action(action: np.ndarray, step: int) -> np.ndarray:
    """The action itself. Raises: FloatingPointError when the policy diverged.  # S4"""
    if not np.isfinite(action).all():
        hint = "try a smaller --learning-rate; the last checkpoint is intact"
        raise FloatingPointError(f"the policy's action at step {step} is not finite; {hint}")
    return action


class TrainingEnv:
    """The training environment and its episode statistics, restorable exactly.

    Each episode starts from its own seed, so this seed and the actions since the reset determine
    the state of any deterministic environment: a checkpoint holds both, and loading it plays the
    actions again.
    """

    def __init__(self, env_id: str, seed: int):
        self.env, self.env_id, self.seed = make_env(env_id), env_id, seed
        self.obs_dim = self.env.observation_space.shape[0]
        self.act_dim = self.env.action_space.shape[0]
        self.episode, self.last_return = -1, math.nan

    def reset(self, step: int):
        """Starts the next episode; its first observation is `self.obs` (S,)."""
        self.episode += 1
        self.actions, self.episodic_return = [], 0.0
        obs, _ = self.env.reset(seed=derive_seed(self.seed, 0, self.episode))
        self.obs = np.array(obs, dtype=np.float32)
        check_finite(self.env_id, step, self.obs)

    def step(self, action: np.ndarray, step: int) -> tuple[np.ndarray, float, bool, bool]:
        """One step, without reset: at the end next_obs (S,) is the true final observation."""
        next_obs, reward, terminated, truncated, _ = self.env.step(action)
        next_obs = np.array(next_obs, dtype=np.float32)  # a copy: some environments reuse theirs
        reward = float(reward)
        check_finite(self.env_id, step, next_obs, reward)
        self.actions.append(action)
        self.episodic_return += reward
        self.obs = next_obs
        return next_obs, reward, bool(terminated), bool(truncated)

    def episode_metrics(self) -> dict[str, float]:
        """Return and length of the episode that has just ended."""
        self.last_return = self.episodic_return
        length = len(self.actions)
        return {"charts/episodic_return": self.last_return, "charts/episodic_length": length}

    def state_dict(self) -> dict:
        actions = np.array(self.actions, dtype=np.float32).reshape(-1, self.act_dim)
        return {
            "episode": self.episode,
            "actions": torch.from_numpy(actions),
            "obs": torch.from_numpy(self.obs.copy()),
            "last_return": self.last_return,
        }

    def load_state_dict(self, state: dict, step: int):
        self.episode, self.last_return = state["episode"] - 1, state["last_return"]
        self.reset(step)
        for action in state["actions"].numpy():
            self.step(action.copy(), step)
        if not np.array_equal(self.obs, state["obs"].numpy()):
            problem = f"{self.env_id} did not replay its episode exactly"
            print(f"warning: {problem}; starting a new one", file=sys.stderr)
            self.reset(step)


# --- 4. Replay buffer -----------------------------------------------------------------------------
class ReplayBuffer:
    """Ring of rows [obs | action | next_obs | reward | terminated] on the training device.

    Time-outs are stored with terminated = 0: the target bootstraps through them.
    """

    def __init__(
        self, capacity: int, obs_dim: int, act_dim: int, device: torch.device | str = "cpu"
    ):
        self.splits = [obs_dim, act_dim, obs_dim, 1, 1]
        self.capacity, self.added = capacity, 0
        need, free = 4 * capacity * sum(self.splits), available_memory(torch.device(device))
        if need > free:
            gb = f"{need / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free"
            raise UsageError(f"--buffer-size {capacity}: the replay buffer needs {gb} on {device}")
        self.rows = torch.empty(capacity, sum(self.splits), device=device)
        self.row = torch.empty(sum(self.splits), pin_memory=self.rows.is_cuda)
        self.parts = np.split(self.row.numpy(), np.cumsum(self.splits)[:-1])

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *transition):
        """Stores obs (S,), action (A,), next_obs (S,), reward, terminated."""
        for part, value in zip(self.parts, transition, strict=True):
            part[:] = value
        self.rows[self.added % self.capacity].copy_(self.row)
        self.added += 1

    def state_dict(self) -> dict:
        filled = self.rows[: len(self)].cpu().numpy()  # by way of NumPy, or torch saves all rows
        return {"added": self.added, "rows": torch.from_numpy(filled)}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.rows[: len(self)].copy_(state["rows"])


def available_memory(device: torch.device) -> int:
    """Bytes free on the device; on CPU what the kernel can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- 5. Networks ----------------------------------------------------------------------------------
class MLP(nn.Module):
    """in -> hidden -> hidden -> out with ReLU, PyTorch's default initialisation."""

    def __init__(self, dims: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in) -> (B, out)."""
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


HIDDEN = [256, 256]  # units of the hidden layers


class Actor(nn.Module):
    """pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2), log sigma between -5 and 2.

    `action_scale` (A,): half the range of each of the environment's own actions; log-probabilities
    are densities over these, log pi = log N(u) - sum log(action_scale (1 - a^2)).
    """

    log_std_min, log_std_max = -5.0, 2.0

    def __init__(self, obs_dim: int, act_dim: int, action_scale: Tensor | None = None):
        super().__init__()
        self.net = MLP([obs_dim, *HIDDEN, 2 * act_dim])
        scale = torch.ones(act_dim) if action_scale is None else action_scale
        self.register_buffer("action_scale", scale.float())

    def forward(self, method: str, *inputs):
        """`actor.<method>(*inputs)`: torch.func.functional_call can only call `forward`."""
        return getattr(self, method)(*inputs)

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """mu(s) and log sigma(s) of u. obs (B, S) -> (B, A), (B, A)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        half_range = 0.5 * (self.log_std_max - self.log_std_min)
        return mean, self.log_std_min + half_range * (torch.tanh(log_std) + 1)

    def to_action(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """a = tanh(mu + sigma noise) and log pi(a|s). (B, S), (B, A) -> (B, A), (B,) in nats."""
        mean, log_std = self.gaussian(obs)
        u = mean + torch.exp(log_std) * noise
        log_prob = log_normal(noise) - (log_std + log_tanh_slope(u)).sum(-1)
        return torch.tanh(u), log_prob - torch.log(self.action_scale).sum()

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a|s) of actions in [-1, 1]. (B, S), (B, A) -> (B,), nats."""
        mean, log_std = self.gaussian(obs)
        u = torch.atanh(action)
        log_prob = log_normal((u - mean) * torch.exp(-log_std))
        log_prob = log_prob - (log_std + log_tanh_slope(u)).sum(-1)
        return log_prob - torch.log(self.action_scale).sum()


class Critics(nn.Module):
    """Two soft Q-functions; with `shifting` each has a learnable reward shift b_k(s).  # S5"""

    def __init__(self, obs_dim: int, act_dim: int, shifting: bool = False):
        super().__init__()
        self.q = nn.ModuleList(MLP([obs_dim + act_dim, *HIDDEN, 1]) for _ in range(2))
        self.b = nn.ModuleList(MLP([obs_dim, 256, 256, 1]) for _ in range(2 if shifting else 0))
        for shift in self.b:  # no shift at the start
            nn.init.zeros_(shift.layers[-1].weight)
            nn.init.zeros_(shift.layers[-1].bias)

    def forward(self, method: str, *inputs):
        """`critics.<method>(*inputs)`: torch.func.functional_call can only call `forward`."""
        return getattr(self, method)(*inputs)

    def q_values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_k(s,a) + b_k(s). obs (B, S), action (B, A) in [-1, 1] -> (B, 2), reward units."""
        x = torch.cat([obs, action], dim=-1)
        q = torch.cat([q(x) for q in self.q], dim=-1)
        return q + torch.cat([b(obs) for b in self.b], dim=-1) if self.b else q


def log_normal(x: Tensor) -> Tensor:
    """log density of the standard normal. x (B, A) -> (B,)."""
    return -0.5 * (x * x).sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]


def log_tanh_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2), elementwise and without cancellation.  # S2"""
    return 2 * (math.log(2) - u - softplus(-2 * u))


# --- 6. Targets and losses ------------------------------------------------------------------------
def soft_target(
    reward: Tensor,
    terminated: Tensor,
    q_next: Tensor,
    log_prob: Tensor,
    alpha: Tensor,
    gamma: float,
) -> Tensor:
    """y = r + gamma (1 - terminated) (min_k Q'_k(s',a') - alpha log pi(a'|s')), reward units.

    Shapes: reward, terminated, log_prob (B,), q_next (B, 2), alpha () -> (B,).
    """
    return reward + gamma * (1 - terminated) * (q_next.min(-1).values - alpha * log_prob)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of sum_k (Q_k - y)^2. q (B, 2), target (B,) -> ()."""
    return (q - target[:, None]).square().sum(-1).mean()


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Batch mean of alpha log pi(a|s) - min_k Q_k(s,a). q (B, 2), log_prob (B,), alpha () -> ()."""
    return (alpha * log_prob - q.min(-1).values).mean()


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-alpha (mean log pi + target entropy): alpha grows while entropy is below its target.  # S1

    Shapes: log_alpha (1,), log_prob (B,) -> ().
    """
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


def adam(theta: Tensor, m: Tensor, v: Tensor, decay: Tensor, grad: Tensor, lr: float):
    """One step of Adam [Kingma and Ba, algorithm 1]; decay (2,) holds (beta1^t, beta2^t)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    decay = torch.stack([beta1 * decay[0], beta2 * decay[1]])
    m_hat, v_hat = m / (1 - decay[0]).to(m.dtype), v / (1 - decay[1]).to(v.dtype)
    return theta - lr * m_hat / (torch.sqrt(v_hat) + eps), m, v, decay


# --- 7. Updates -----------------------------------------------------------------------------------
CRITIC_METRICS = "losses/qf_loss losses/qf1_values losses/qf2_values sac/target".split()
ACTOR_METRICS = "losses/actor_loss losses/alpha_loss losses/alpha sac/entropy".split()
METRICS = CRITIC_METRICS + ACTOR_METRICS


def split_parameters(network: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """Views of the vector theta (P,) with the names and shapes of the network's parameters."""
    parameters = dict(network.named_parameters())
    parts = zip(
        theta.split([p.numel() for p in parameters.values()]), parameters.items(), strict=True
    )
    return {name: part.view(p.shape) for part, (name, p) in parts}


def flatten_parameters(network: nn.Module) -> Tensor:
    """Moves a network's parameters into one vector theta (P,): changing it changes the network."""
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])
    views = split_parameters(network, theta).values()
    for p, view in zip(network.parameters(), views, strict=True):
        p.data = view
    return theta


def call(network: nn.Module, theta: Tensor, method: str, *inputs):
    """`network.<method>(*inputs)` with the parameters theta (P,), as a pure function of them."""
    return torch.func.functional_call(network, split_parameters(network, theta), (method, *inputs))


def make_critic_update(actor: Actor, critics: Critics, splits: list[int], args: Args):
    """The critics' update of flat tensors, changed in place; returns CRITIC_METRICS (4,)."""

    def loss_and_q(theta, obs, action, target):
        q = call(critics, theta, "q_values", obs, action)  # Q_k(s,a)  (B, 2)
        return critic_loss(q, target), q

    def update(theta, target_theta, m, v, decay, phi, log_alpha, batch, noise):
        obs, action, next_obs, reward, terminated = batch.split(splits, dim=-1)
        next_action, log_prob = call(actor, phi, "to_action", next_obs, noise)  # a' ~ pi(.|s')
        q_next = call(critics, target_theta, "q_values", next_obs, next_action)  # Q'_k, theta'
        bellman = (reward[:, 0], terminated[:, 0], q_next, log_prob, log_alpha.exp(), args.gamma)
        target = soft_target(*bellman)  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target)
        new_theta, new_m, new_v, new_decay = adam(theta, m, v, decay, grad, args.q_lr)
        averaged = (1 - args.tau) * target_theta + args.tau * new_theta  # Polyak: new theta'
        new = (new_theta, averaged, new_m, new_v, new_decay)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        return torch.stack([loss, q[:, 0].mean(), q[:, 1].mean(), target.mean()])

    return update


def make_actor_update(actor: Actor, critics: Critics, splits: list[int], args: Args):
    """The update of actor and temperature, changed in place; returns ACTOR_METRICS (4,)."""
    target_entropy = -float(splits[1])  # nats, over the environment's own actions

    def loss_and_log_prob(phi, log_alpha, theta, obs, noise):
        action, log_prob = call(actor, phi, "to_action", obs, noise)  # a ~ pi(.|s)
        q = call(critics, theta, "q_values", obs, action)  # Q_k(s,a)  (B, 2)
        return actor_loss(q, log_prob, log_alpha.exp()), log_prob

    def update(phi, m, v, decay, log_alpha, m_alpha, v_alpha, decay_alpha, theta, batch, noise):
        obs = batch.split(splits, dim=-1)[0]
        gradient = torch.func.grad_and_value(loss_and_log_prob, has_aux=True)
        grad, (loss, log_prob) = gradient(phi, log_alpha, theta, obs, noise)
        new = adam(phi, m, v, decay, grad, args.policy_lr)
        gradient = torch.func.grad_and_value(temperature_loss)
        grad, alpha_loss = gradient(log_alpha, log_prob, target_entropy)
        old = (phi, m, v, decay)
        if args.autotune:
            old += (log_alpha, m_alpha, v_alpha, decay_alpha)
            new += adam(log_alpha, m_alpha, v_alpha, decay_alpha, grad, args.q_lr)
        for tensor, value in zip(old, new, strict=True):
            tensor.copy_(value)
        return torch.stack([loss, alpha_loss, log_alpha.exp()[0], -log_prob.mean()])

    return update


class Learner:
    """theta, theta', phi, log alpha and Adam's moments; acting and updating, compiled.

    On CPU each of the two updates is one compiled function, on CUDA one graph that is replayed.
    Acting and reading metrics wait for the device, `update` does not.
    """

    def __init__(
        self, actor: Actor, critics: Critics, replay: ReplayBuffer, args: Args, compiled: bool
    ):
        self.actor, self.replay, self.compiled = actor, replay, compiled
        self.policy_frequency, self.updates = args.policy_frequency, 0
        self.device = replay.rows.device
        cuda, n = self.device.type == "cuda", args.batch_size
        theta, phi = flatten_parameters(critics), flatten_parameters(actor)
        start = 0.0 if args.autotune else math.log(args.alpha)
        log_alpha = torch.full((1,), start, dtype=theta.dtype, device=self.device)
        self.critic_state = [theta, theta.clone(), *self._moments(theta)]
        self.actor_state = [phi, *self._moments(phi), log_alpha, *self._moments(log_alpha)]
        self.state = self.critic_state + self.actor_state
        self.theta, self.phi, self.log_alpha = theta, phi, log_alpha
        self.index = torch.zeros(n, dtype=torch.int64, pin_memory=cuda)
        self.device_index = self.index.to(self.device)
        self.batch = torch.zeros(n, sum(replay.splits), device=self.device)
        self.noise = torch.zeros(n, replay.splits[1], device=self.device)
        self.metrics = torch.zeros(len(METRICS), device=self.device)
        self._critic = self._prepare(make_critic_update(actor, critics, replay.splits, args))
        self._actor = self._prepare(make_actor_update(actor, critics, replay.splits, args))
        steps = (self._update_critics, self._update_actor)
        self._steps = [self._capture(s, self.state).replay for s in steps] if cuda else steps

    def _moments(self, theta: Tensor) -> list[Tensor]:
        """Adam's m, v and (beta1^0, beta2^0)."""
        decay = torch.ones(2, dtype=torch.float64, device=self.device)
        return [torch.zeros_like(theta), torch.zeros_like(theta), decay]

    def update(self, rng: np.random.Generator):
        """Draws a batch and updates; leaves the METRICS on the device."""
        self.index.numpy()[:] = rng.integers(0, len(self.replay), len(self.index))
        self.device_index.copy_(self.index, non_blocking=True)
        self.updates += 1
        delayed = self.policy_frequency if self.updates % self.policy_frequency == 0 else 0
        for step in (self._steps[0], *[self._steps[1]] * delayed):
            if self.device.type == "cpu":
                rng.standard_normal(out=self.noise.numpy(), dtype=np.float32)
            step()

    def _update_critics(self):
        torch.index_select(self.replay.rows, 0, self.device_index, out=self.batch)
        if self.noise.is_cuda:
            self.noise.normal_()
        metrics = self._critic(*self.critic_state, self.phi, self.log_alpha, self.batch, self.noise)
        self.metrics[: len(CRITIC_METRICS)].copy_(metrics)

    def _update_actor(self):
        if self.noise.is_cuda:
            self.noise.normal_()
        metrics = self._actor(*self.actor_state, self.theta, self.batch, self.noise)
        self.metrics[len(CRITIC_METRICS) :].copy_(metrics)

    def make_actor(self, n: int):
        """act(obs (n, S), noise (n, A)) -> actions (n, A), in numpy; 0 gives tanh(mu)."""
        pinned = dict(pin_memory=self.device.type == "cuda")
        obs_dim, act_dim = self.replay.splits[:2]
        inputs = torch.zeros(n, obs_dim + act_dim, **pinned)
        action = torch.zeros(n, act_dim, **pinned)
        device_inputs, device_action = inputs.to(self.device), action.to(self.device)

        def to_action(phi, inputs):
            return call(self.actor, phi, "to_action", *inputs.split([obs_dim, act_dim], dim=-1))[0]

        to_action = self._prepare(to_action)

        def step():
            device_action.copy_(to_action(self.phi, device_inputs))

        graph = self._capture(step, []) if self.device.type == "cuda" else None

        @torch.no_grad()
        def act(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
            inputs.numpy()[:, :obs_dim], inputs.numpy()[:, obs_dim:] = obs, z
            device_inputs.copy_(inputs, non_blocking=True)
            graph.replay() if graph else step()
            action.copy_(device_action, non_blocking=True)
            if graph:
                torch.cuda.synchronize()
            return action.numpy().copy()

        return act

    def _prepare(self, function):
        """The function compiled for its one set of shapes, or as it is."""
        if not self.compiled:
            return torch.no_grad()(function)
        one = dict(fullgraph=True, dynamic=False, isolate_recompiles=True)  # hence no guards needed
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options["cpp_wrapper"] = self.device.type == "cpu"  # less Python between the kernels
        return torch.no_grad()(torch.compile(function, **one, options=options))

    def _capture(self, function, state: list[Tensor]) -> "torch.cuda.CUDAGraph":
        """A CUDA graph of function(); the state and the random generator are left as they were."""
        saved, rng_state = [t.clone() for t in state], torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile and let the libraries allocate before the capture
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        torch.cuda.set_rng_state(rng_state, self.device)
        return graph

    def read_metrics(self, step: int) -> dict[str, float]:
        """The last update's METRICS. Raises: FloatingPointError if one is not finite.  # S4"""
        values = dict(zip(METRICS, self.metrics.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            bad = ", ".join(f"{k} = {x}" for k, x in values.items() if not math.isfinite(x))
            hint = "try a smaller --learning-rate; the last checkpoint is intact"
            raise FloatingPointError(f"the update at step {step} is not finite: {bad}; {hint}")
        return values

    def state_dict(self) -> dict:
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = [t.cpu() for t in self.state]
        return {"state": state, "updates": self.updates, "cuda_rng": cuda_rng}

    def load_state_dict(self, state: dict):
        for tensor, value in zip(self.state, state["state"], strict=True):
            tensor.copy_(value)
        self.updates = state["updates"]
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def prepare_hardware(args: Args) -> tuple[torch.device, bool]:
    """Sets threads and floating-point modes; returns the device and whether to compile."""
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)  # denormals are slow; zero-initialised networks are full of them
    torch.set_num_threads(args.torch_threads)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # keep freed memory: else each update faults 1,300 pages in again
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**25)
        libc.mallopt(m_trim_threshold, 2**30)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    compiled = args.compile and (device.type == "cuda" or bool(compiler and headers))
    if args.compile and not compiled:
        missing = "Python's headers (python3-dev)" if compiler else "a C++ compiler (g++)"
        print(f"warning: {missing} not found: running uncompiled, much slower", file=sys.stderr)
    return device, compiled


# --- 8. Evaluation --------------------------------------------------------------------------------
EVAL_STEP_LIMIT = 100_000  # of an evaluation episode whose environment has no time limit of its own


class Evaluator:
    """Plays n episodes at a time, each in its own environment, batched through the policy."""

    def __init__(self, args: Args, act):
        self.args, self.act = args, act
        first = "rgb_array" if args.capture_video else None
        modes = [first] + [None] * (args.eval_episodes - 1)
        self.envs = [make_env(args.env_id, mode) for mode in modes]

    def run(self, step: int, video_path: Path) -> tuple[list[float], list[int]]:
        """Returns and lengths of n episodes; their seeds depend on --seed and `step`.

        With --capture-video the first episode goes to `video_path`.
        """
        args, n = self.args, len(self.envs)
        rng = np.random.default_rng(derive_seed(args.seed, 2, step))
        seeds = [derive_seed(args.seed, 1, step, i) for i in range(n)]
        first = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)]
        obs = np.stack(first).astype(np.float32)
        returns, lengths, alive = [0.0] * n, [0] * n, list(range(n))
        z = np.zeros((n, self.envs[0].action_space.shape[0]), dtype=np.float32)
        video = self.open_video(video_path) if args.capture_video else None
        while alive:
            if not args.deterministic_eval:
                rng.standard_normal(out=z, dtype=np.float32)
            actions = check_action(self.act(obs, z), step)
            for i in alive.copy():
                next_obs, reward, terminated, truncated, _ = self.envs[i].step(actions[i])
                obs[i], reward = next_obs, float(reward)
                check_finite(args.env_id, step, obs[i], reward)
                returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
                if video and i == 0:
                    video.append_data(self.envs[0].render())
                if lengths[i] == EVAL_STEP_LIMIT:
                    print(f"warning: evaluation cut after {lengths[i]} steps", file=sys.stderr)
                if terminated or truncated or lengths[i] == EVAL_STEP_LIMIT:
                    alive.remove(i)
        if video:
            video.close()
        return returns, lengths

    def open_video(self, path: Path):
        """An mp4 writer. Raises: RunError if this machine can't render."""
        env = self.envs[0]
        try:
            env.render()
        except Exception as error:  # whatever the graphics libraries raise
            hint = "install libegl1 or libosmesa6 and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"{self.args.env_id} can't be rendered ({reason}); {hint}") from None
        path.parent.mkdir(exist_ok=True)
        return imageio.get_writer(path, fps=env.metadata.get("render_fps", 30), macro_block_size=1)


def evaluation_metrics(returns: list[float], lengths: list[int]) -> dict[str, float]:
    """Mean and standard deviation of the returns, mean length, and each return."""
    mean, std = float(np.mean(returns)), float(np.std(returns))
    summary = {"eval/return_mean": mean, "eval/return_std": std}
    summary["eval/length_mean"] = float(np.mean(lengths))
    return summary | {f"eval/return_{i}": value for i, value in enumerate(returns)}


def evaluate_file(args: Args, saved: dict) -> dict:
    """`--evaluate PATH`: plays a saved policy on the CPU and prints the return of each episode."""
    prepare_hardware(args)
    file = find_policy(args.evaluate)
    video_path = file.parent / "videos" / f"evaluate-{file.stem}-seed{args.seed}.mp4"

    def act(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        return actor.to_action(torch.from_numpy(obs), torch.from_numpy(z))[0].numpy()

    evaluator = Evaluator(args, act)
    spaces = evaluator.envs[0].observation_space, evaluator.envs[0].action_space
    actor, _ = make_networks(args, *(space.shape[0] for space in spaces))
    actor.load_state_dict(saved["actor"])
    returns, lengths = evaluator.run(saved["step"], video_path)
    for i, (episodic_return, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {episodic_return:.2f}, length {length}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    text = f"{len(returns)} {mode} episodes of {file} (step {saved['step']}) on {args.env_id}"
    print(f"{text}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    if args.capture_video:
        print(f"video of episode 0: {video_path}")
    return {"returns": returns, "lengths": lengths}


# --- 9. Files of a run ----------------------------------------------------------------------------
FORMAT = "sac_continuous_action/1"
POLICY_FILES = ["policy_final.pt", "checkpoint.pt", "policy_best.pt"]  # the first there is


def save_file(path: Path, content: dict):
    """Writes atomically: `path` holds the old content or the new. Raises: RunError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = "the previous one is intact" if path.exists() else "there is no earlier one"
        raise RunError(f"can't write {path} ({error}); {kept}") from None


def load_file(path: Path) -> dict:
    """Reads a checkpoint or a policy. Raises: RunError if it is damaged or of another program."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise RunError(f"can't read {path}: {error.strerror}") from None
    try:
        with file, zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch.load itself doesn't compare the checksums
                raise zipfile.BadZipFile(damaged)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path} was not written by this script ({FORMAT})")
    return content


def saved_args(content: dict, path: Path) -> Args:
    try:
        return Args(**content["args"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} holds settings that this version doesn't know: {error}") from None


def find_file(path: str, names: list[str], option: str) -> Path:
    folder = Path(path)
    candidates = [folder / name for name in names] if folder.is_dir() else [folder]
    for file in candidates:
        if file.is_file():
            return file
    listed = " or ".join(map(str, candidates))
    raise UsageError(f"{option} {path}: there is no {listed}")


def find_checkpoint(path: str) -> Path:
    return find_file(path, ["checkpoint.pt"], "--resume")


def find_policy(path: str) -> Path:
    return find_file(path, POLICY_FILES, "--evaluate")


def git(*words: str) -> str:
    """What git says of the script's repository; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe_run(args: Args, device: torch.device, compiled: bool) -> dict:
    """What a reader needs to reproduce the run: settings, commit, versions and hardware."""
    changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    packages = filter(importlib.util.find_spec, "torch gymnasium mujoco numpy tyro wandb".split())
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "args": dataclasses.asdict(args),
        "git_commit": git("rev-parse", "HEAD") + changes,
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": compiled,
    }


class Logger:
    """metrics.csv (step,seconds,name,value), the progress bar and Weights & Biases (--track)."""

    def __init__(self, args: Args, run_dir: Path, description: dict, resumed: dict | None):
        self.path, self.total = run_dir / "metrics.csv", args.total_timesteps
        step, seconds = (resumed["step"], resumed["seconds"]) if resumed else (0, 0.0)
        self.start = time.perf_counter() - seconds
        self.file = open(self.path, "r+b" if resumed else "xb", buffering=0)
        if resumed:  # rows after the checkpoint are written again, with the same values
            if self.path.stat().st_size < resumed["csv_bytes"]:
                raise RunError(f"{self.path} is shorter than when the checkpoint was written")
            self.file.truncate(resumed["csv_bytes"])
            self.file.seek(0, os.SEEK_END)
        else:
            self.file.write(b"step,seconds,name,value\n")
        self.progress = {"train": "-", "eval": "-"}
        self.last_speed, self.last_line = (step, seconds), (step, seconds)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=self.total, initial=step, unit="step", disable=not terminal)
        self.wandb = start_wandb(args, run_dir, description) if args.track else None

    def seconds(self) -> float:
        """Training time so far, over all sessions of a resumed run."""
        return time.perf_counter() - self.start

    def log(self, step: int, values: dict[str, float]):
        seconds = self.seconds()
        rows = "".join(f"{step},{seconds:.3f},{name},{value!r}\n" for name, value in values.items())
        try:
            complete = self.file.write(rows.encode()) == len(rows)
        except OSError as error:
            raise RunError(f"can't write {self.path}: {error.strerror}") from None
        if not complete:
            raise RunError(f"can't write {self.path}: the disk is full")
        if self.wandb:
            self.wandb.log({"global_step": step, **values})

    def speed(self, step: int) -> float:
        """Steps per second since the last call, evaluations included."""
        (last_step, last_seconds), now = self.last_speed, self.seconds()
        self.last_speed = (step, now)
        return (step - last_step) / max(now - last_seconds, 1e-9)

    def show(self, step: int, **fields: float):
        """Progress: a bar on a terminal, else a line every 30 seconds and at the end."""
        self.progress |= {name: f"{value:.1f}" for name, value in fields.items()}
        if not self.bar.disable:
            self.bar.set_postfix(self.progress, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        (last_step, last_seconds), now = self.last_line, self.seconds()
        if now - last_seconds > 30 or (step == self.total and step > last_step):
            rate = (step - last_step) / (now - last_seconds)
            eta = tqdm.format_interval((self.total - step) / rate)
            text = ", ".join(f"{name} return {value}" for name, value in self.progress.items())
            text = f"ETA {eta}, {rate:.0f} steps/s, {text}"
            print(f"step {step}/{self.total}, {text}", file=sys.stderr)
            self.last_line = (step, now)

    def state_dict(self) -> dict:
        os.fsync(self.file.fileno())
        return {"csv_bytes": self.file.tell(), "seconds": self.seconds()}

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(args: Args, run_dir: Path, description: dict):
    """The Weights & Biases run; a resumed run goes on in the same one. Raises: UsageError."""
    import wandb  # only here: training needs neither the package nor an account

    try:
        run = wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_dir.name,
            id=re.sub(r"[^\w-]", "-", run_dir.name),
            resume="allow",
            config=description | description["args"],
            dir=str(run_dir),
        )
    except wandb.Error as error:
        hint = "run `wandb login`, set WANDB_MODE=offline or leave out --track"
        raise UsageError(f"Weights & Biases can't start ({error}): {hint}") from None
    run.define_metric("*", step_metric="global_step")
    return run


class StopSignals:
    """Context in which the first SIGINT or SIGTERM sets `received`; a second one stops at once."""

    def __enter__(self):
        self.received = None
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum, _frame):
        self.received = signum
        signal.signal(signum, self.previous[signum])

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


# --- 10. Training ---------------------------------------------------------------------------------
def make_networks(
    args: Args, obs_dim: int, act_dim: int, action_scale: Tensor | None = None
) -> tuple[Actor, Critics]:
    """Actor and critics of the run's settings; they need no gradients outside the updates."""
    actor = Actor(obs_dim, act_dim, action_scale)
    critics = Critics(obs_dim, act_dim, shifting=args.reward_shifting == "clipped")
    return actor.requires_grad_(False), critics.requires_grad_(False)


def half_range(env: gym.Env) -> Tensor:
    """Half the range of the environment's own actions, (A,); `make_env` has rescaled them."""
    space = env.env.action_space
    return torch.from_numpy(0.5 * (space.high - space.low))


def open_run(args: Args, description: dict, checkpoint: dict | None) -> Path:
    """The run folder, new or the checkpoint's; writes args.json."""
    if checkpoint:
        file = find_checkpoint(args.resume)
        run_dir = file.parent
        if "learner" not in checkpoint:
            raise UsageError(f"--resume {file}: this file holds a policy alone, not a checkpoint")
        if checkpoint["step"] >= args.total_timesteps:
            done = f"{run_dir} is already at step {checkpoint['step']}"
            raise UsageError(f"{done}: raise --total-timesteps to train it further")
        before = checkpoint["description"]
        changed = [k for k in before if k != "args" and before[k] != description.get(k)]
        if changed:
            text = f"other {', '.join(changed)} than before: not bit for bit the same run"
            print(f"warning: {text}", file=sys.stderr)
    else:
        name = re.sub(r"[^\w.-]", "_", args.env_id)
        run_dir = Path(args.runs_dir) / f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(checkpoint))
        (run_dir / "args.json").write_text(json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"can't write to the run folder {run_dir}: {error.strerror}") from None
    return run_dir


def train(args: Args, checkpoint: dict | None = None) -> dict:
    """Trains, from a checkpoint's content if given (and empties it).

    Returns {"run_dir", "step", "return_mean"}: the last evaluation's mean return.
    """
    device, compiled = prepare_hardware(args)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)  # exploration, replay and noise
    env = TrainingEnv(args.env_id, args.seed)
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = ReplayBuffer(capacity, env.obs_dim, env.act_dim, device)
    actor, critics = make_networks(args, env.obs_dim, env.act_dim, half_range(env.env))
    learner = Learner(actor.to(device), critics.to(device), replay, args, compiled)
    act = learner.make_actor(1)
    evaluator = Evaluator(args, learner.make_actor(args.eval_episodes))
    description = describe_run(args, device, compiled)
    run_dir = open_run(args, description, checkpoint)
    step, best, return_mean = 0, -math.inf, math.nan

    def policy() -> dict:
        settings = dataclasses.asdict(dataclasses.replace(args, resume=None))
        networks = {"actor": actor.state_dict(), "critics": critics.state_dict()}
        return {"args": settings, "step": step, **networks, "log_alpha": learner.log_alpha.item()}

    def save_checkpoint():
        content = policy() | logger.state_dict() | {"best": best, "return_mean": return_mean}
        content |= {"learner": learner.state_dict(), "replay": replay.state_dict()}
        content |= {"env": env.state_dict(), "rng": rng.bit_generator.state}
        save_file(run_dir / "checkpoint.pt", content | {"description": description})

    logger = Logger(args, run_dir, description, checkpoint)
    if checkpoint:
        step, best, return_mean = (checkpoint[k] for k in ("step", "best", "return_mean"))
        learner.load_state_dict(checkpoint["learner"])
        replay.load_state_dict(checkpoint["replay"])
        env.load_state_dict(checkpoint["env"], step)
        rng.bit_generator.state = checkpoint["rng"]
        checkpoint.clear()  # it holds the replay buffer a second time
    else:
        env.reset(step)
    first = "; compiling takes about a minute the first time" if compiled else ""
    print(f"{args.env_id} on {description['device']}, files in {run_dir}{first}", file=sys.stderr)
    if args.learning_starts >= args.total_timesteps:
        text = f"nothing is learned before --learning-starts {args.learning_starts}"
        print(f"warning: {text}", file=sys.stderr)

    with contextlib.closing(logger), StopSignals() as stop:
        while step < args.total_timesteps:
            if step < args.learning_starts:
                action = rng.uniform(-1, 1, env.act_dim).astype(np.float32)
            else:
                z = rng.standard_normal(env.act_dim, dtype=np.float32)
                action = check_action(act(env.obs, z), step)[0]  # a = tanh(mu + sigma z)
                learner.update(rng)  # S3
            obs = env.obs
            next_obs, reward, terminated, truncated = env.step(action, step)
            replay.add(obs, action, next_obs, reward, terminated)
            learning = step >= args.learning_starts
            metrics = learner.read_metrics(step) if learning else {}  # waits for the device
            step += 1
            last = step == args.total_timesteps

            if terminated or truncated:
                logger.log(step, env.episode_metrics())
                env.reset(step)
            if step % args.log_frequency == 0 or last:
                logger.log(step, {"charts/SPS": logger.speed(step), **metrics})
            if step % args.eval_frequency == 0 or last:
                returns, lengths = evaluator.run(step, run_dir / "videos" / f"step-{step:09d}.mp4")
                evaluation = evaluation_metrics(returns, lengths)
                logger.log(step, evaluation)
                return_mean = evaluation["eval/return_mean"]
                if return_mean > best:
                    best = return_mean
                    save_file(run_dir / "policy_best.pt", policy())
            if step % 100 == 0 or last:
                logger.show(step, train=env.last_return, eval=return_mean)
            if last:
                save_file(run_dir / "policy_final.pt", policy())
            due = args.checkpoint_frequency and step % args.checkpoint_frequency == 0
            if due or last or stop.received:
                save_checkpoint()
            if stop.received and not last:
                again = f"python {Path(sys.argv[0]).name} --resume {run_dir}"
                raise Interrupted(stop.received, f"stopped at step {step}; go on with: {again}")
    return {"run_dir": str(run_dir), "step": step, "return_mean": return_mean}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 (run), 2 (usage) or 128 + signal."""
    try:
        args, saved = parse_args(argv)
        evaluate_file(args, saved) if args.evaluate else train(args, saved)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UsageError, RunError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
