"""MEow: maximum-entropy RL with an energy-based normalizing flow, on Gymnasium environments, in one file.

    python meow_continuous_action.py --env-id Ant-v4                      # the paper's experiment
    python meow_continuous_action.py --resume runs/<run_name>             # go on exactly where it stopped
    python meow_continuous_action.py --evaluate runs/<run_name> --capture-video

Method: Chao et al., "Maximum Entropy Reinforcement Learning via Energy-Based Normalizing Flow", NeurIPS 2024,
arXiv 2405.13629. One conditional flow z = g(a|s) is policy, soft Q and soft value at once. Its layers are split into
linear ones S_l (their Jacobian J does not depend on a) and the others S_n, and with p_z = N(0, I)

    Q(s,a)  = alpha * (log p_z(z) + sum_{S_n} log|det J| + b(s))      soft Q, from one pass through the flow
    V(s)    = alpha * (-log Z(s) + b(s)),  Z(s) = prod_{S_l} |det J|  soft value, exact and without the flow
    pi(a|s) = exp((Q(s,a) - V(s)) / alpha)                            the density of the flow itself

so that V(s) = alpha log int exp(Q(s,a)/alpha) da is an identity. (Mind the sign: with b = 0 the integral is 1/Z.)
One loss, sum_k (Q_k - y)^2 / 2 with y = r + gamma (1 - terminated) min_k V_k(s'), replaces actor and critic.

Symbols   code                  meaning
g(a|s)    EnergyFlow.to_latent  action to latent; `to_action` is its inverse
p_z       log_prior             standard normal
alpha     alpha                 temperature, reward units per nat
b_1, b_2  shifts                learnable reward shifts, in nats (they are multiplied by alpha, like the authors')
theta     theta                 all parameters of the flow in one vector; theta' is `target_theta`
y         target                soft target, reward units
Shapes: B batch, A action, S observation, K shifts (2; 1 in the ablations), P parameters.

Deviations from the authors' code (github.com/ChienFeng-hub/meow), each with its reason:
D1  The flow runs once per batch for both Q_k (theirs: twice, on a doubled batch): the twins share one dropout mask.
D2  V is computed without running the flow (theirs runs every coupling on zero actions): the same number, faster.
D3  log_prob is log p_z + all log-determinants; their `sample` has the sign of one wrong (it only fed `autotune`).
D4  No `autotune`: theirs changed a local variable that nothing read.
D5  No NaN masking: a loss or gradient that is not finite stops the run and says where.
D6  Fresh evaluation seeds each time (theirs: always the same ten), and the final policy is kept beside the best one.
D7  log(1 - a^2) is computed from atanh(a), 2 (log 2 - u - softplus(-2u)), which keeps its digits near |a| = 1.
D8  An update runs before the environment's step of the same iteration, so that a GPU works while the simulator
    does; the newest transition can be drawn one update later.
D9  On CPU the dropout probability is rounded to 1/65536 (16 random bits a unit; on CUDA it is exact).
D10 In float64 actions are clamped to 1 - 1e-12 instead of 1 - 1e-5, so that the identities hold to its precision.
"""

# --- 1. Imports ---------------------------------------------------------------------------------------------------
import argparse
import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" and "DISPLAY" not in os.environ else "glfw")

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import linear, softplus
from tqdm import tqdm

# --- 2. Settings --------------------------------------------------------------------------------------------------
# The paper's settings, the defaults of `--env-id NAME-v4` and `NAME-v5`. Other environments take those of `Args`.
PAPER_SETTINGS = {
    "Hopper": dict(total_timesteps=1_500_000, tau=0.005, alpha=0.25, learning_starts=5_000, log_sigma_max=-0.3),
    "HalfCheetah": dict(total_timesteps=1_500_000, tau=0.003, alpha=0.25, learning_starts=10_000, log_sigma_max=2.0),
    "Walker2d": dict(total_timesteps=4_000_000, tau=0.005, alpha=0.1, learning_starts=10_000, log_sigma_max=-0.3),
    "Ant": dict(total_timesteps=4_000_000, tau=0.0001, alpha=0.05, learning_starts=5_000, log_sigma_max=-0.3),
    "Humanoid": dict(total_timesteps=5_000_000, tau=0.0005, alpha=0.125, learning_starts=5_000, log_sigma_max=-0.3),
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
    """Gymnasium environment with a flat observation and a bounded continuous action; `module:Env-v0` imports module"""
    exp_name: str = "meow_continuous_action"
    """name of the experiment, a part of the run name"""
    seed: int = 1
    """seed of networks, exploration, replay, training and evaluation episodes"""
    total_timesteps: int = 1_000_000
    """environment steps in all"""
    resume: str | None = None
    """run folder or checkpoint to continue exactly; its own settings become the defaults"""
    evaluate: str | None = None
    """run folder, checkpoint or policy file to play instead of training: prints the return of each episode"""

    # Algorithm (paper, section 5 and appendix)
    learning_rate: float = 1e-3
    """Adam's step size"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak averaging: theta' <- (1 - tau) theta' + tau theta after each update"""
    alpha: float = 0.2
    """temperature: reward units per nat of entropy"""
    log_sigma_min: float = -5.0
    """lower bound of the LOG standard deviation of the linear layer"""
    log_sigma_max: float = -0.3
    """upper bound of the LOG standard deviation of the linear layer"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """transitions kept in the replay buffer"""
    learning_starts: int = 5_000
    """environment steps with uniform random actions before the first update; then one update per step"""
    max_grad_norm: float = 30.0
    """the gradient is scaled down to this norm"""
    dropout: float = 0.1
    """dropout probability in the couplings, in the Q pass of the update only"""

    # Ablations of the paper
    reward_shifting: Literal["clipped", "single", "none"] = "clipped"
    """clipped: two learnable shifts, the target takes the smaller value (paper); single: one shift; none: no shift"""
    coupling: Literal["additive", "affine"] = "additive"
    """additive: x + t (paper); affine: x exp(s) + t"""

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
    torch_threads: int = 0
    """CPU threads (0: OMP_NUM_THREADS if set, else at most 2: networks this small gain nothing from more)"""
    compile: bool = True
    """compile acting and update (about a minute, cached; the same numbers up to rounding); needs a C++ compiler on CPU"""
    bf16: bool = False
    """matrix products of the shift networks in bfloat16 (8 bits of precision instead of 24)"""

    def __post_init__(self):
        at_least_1 = "total_timesteps batch_size buffer_size learning_starts eval_frequency eval_episodes log_frequency"
        for name in at_least_1.split():
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "checkpoint_frequency", "torch_threads"):
            self._check(name, 0 <= getattr(self, name) < 2**32, "from 0 to 2^32 - 1")
        for name in ("learning_rate", "alpha", "max_grad_norm"):
            self._check(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self._check("gamma", 0 <= self.gamma <= 1, "from 0 to 1")
        self._check("tau", 0 < self.tau <= 1, "above 0 and at most 1")
        self._check("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        for name in ("log_sigma_min", "log_sigma_max"):
            self._check(name, -20 <= getattr(self, name) <= 20, "from -20 to 20 (the logarithm of sigma)")
        self._check("log_sigma_max", self.log_sigma_min < self.log_sigma_max, "above --log-sigma-min")
        if self.resume and self.evaluate:
            raise ValueError("--resume and --evaluate exclude each other")

    def _check(self, name: str, valid: bool, allowed: str):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")


# What may differ from the checkpoint when a run goes on, and when a policy is evaluated.
RESUME_MAY_CHANGE = {"resume", "total_timesteps", "checkpoint_frequency", "capture_video", "track", "wandb_project_name"}
RESUME_MAY_CHANGE |= {"wandb_entity", "cuda", "torch_threads", "compile", "runs_dir"}
EVALUATE_MAY_CHANGE = {"evaluate", "seed", "eval_episodes", "deterministic_eval", "capture_video", "cuda"}
EVALUATE_MAY_CHANGE |= {"torch_threads", "runs_dir"}


def default_args(env_id: str) -> Args:
    """The paper's settings for the five MuJoCo tasks, v4 and v5; general ones for any other environment."""
    name, _, version = env_id.rpartition("-v")
    return Args(env_id=env_id, **(PAPER_SETTINGS.get(name, {}) if version in ("4", "5") else {}))


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line to Args: `--env-id`, `--resume` and `--evaluate` are read first, because they set the defaults."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("env-id", "resume", "evaluate"):
        peek.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name.replace("-", "_"))
    try:
        given = peek.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # an option without its value: tyro explains it below
        given = argparse.Namespace(env_id=None, resume=None, evaluate=None)
    saved = None
    if given.resume or given.evaluate:
        file = find_checkpoint(given.resume) if given.resume else find_policy(given.evaluate)
        saved = saved_args(load_file(file), file)
    default = saved or default_args(given.env_id or Args.env_id)
    try:
        args = tyro.cli(Args, default=default, description=__doc__.split("\n\n    ")[0], args=argv)
    except ValueError as error:
        raise UsageError(error) from None
    if saved:
        may_change = RESUME_MAY_CHANGE if given.resume else EVALUATE_MAY_CHANGE
        asked, stored = dataclasses.asdict(args), dataclasses.asdict(saved)
        conflicts = [k for k in asked if asked[k] != stored[k] and k not in may_change]
        if conflicts:
            listed = ", ".join(f"--{k.replace('_', '-')} {asked[k]} (saved: {stored[k]})" for k in conflicts)
            raise UsageError(f"{file} was made with other settings: {listed}. Leave these options out.")
    return args


# --- 3. Environment -----------------------------------------------------------------------------------------------
def derive_seed(*key: int) -> int:
    """One 32-bit seed from several numbers, e.g. the run's seed, the use and the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.cache
def show_once(text: str):
    """Prints a warning of MuJoCo's the first time; by default each of our environments would repeat it."""
    print(f"MuJoCo: {text}", file=sys.stderr)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment with its actions rescaled to [-1, 1].

    Raises: UsageError where MEow can't act: no flat Box observation, no bounded continuous action, unknown id.
    """
    if ":" in env_id and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `module:Env-v0` finds modules beside the script and in the current folder
    mujoco.set_mju_user_warning(show_once)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*")  # v4 is the paper's, on purpose
            env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        reason = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
        raise UsageError(f"--env-id {env_id}: can't make this environment: {reason}") from None
    if render_mode and render_mode not in env.metadata.get("render_modes", []):
        raise UsageError(f"--env-id {env_id} can't render images ('{render_mode}'): leave out --capture-video")
    obs, act = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1 or obs.shape[0] == 0:
        hint = "wrap the environment in gymnasium.wrappers.FlattenObservation"
        raise UsageError(f"--env-id {env_id}: the observation must be one flat vector (Box), not {obs}; {hint}")
    if not isinstance(act, gym.spaces.Box) or not np.issubdtype(act.dtype, np.floating):
        raise UsageError(f"--env-id {env_id}: the actions must be continuous (a float Box), not {act}")
    if len(act.shape) != 1 or act.shape[0] == 0:
        raise UsageError(f"--env-id {env_id}: the action must be one flat vector, not of shape {act.shape}")
    if not (np.isfinite(act.low).all() and np.isfinite(act.high).all() and (act.low < act.high).all()):
        raise UsageError(f"--env-id {env_id}: the action space must be bounded on both sides, not {act}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def check_finite(env_id: str, step: int, obs: np.ndarray, reward: float = 0.0):
    """Raises: RunError when the environment returned NaN or infinity."""
    if not (np.isfinite(obs).all() and math.isfinite(reward)):
        bad = [f"observation[{i}] = {obs[i]}" for i in np.flatnonzero(~np.isfinite(obs))[:5]]
        bad += [] if math.isfinite(reward) else [f"reward = {reward}"]
        raise RunError(f"{env_id} returned {', '.join(bad)} at step {step}; nothing of this step was stored")


class TrainingEnv:
    """The training environment and its episode statistics, restorable for any deterministic environment.

    Each episode starts from its own seed, so the seed and the actions since the reset determine the state exactly;
    a checkpoint holds these, and loading it plays the actions again.
    """

    def __init__(self, env_id: str, seed: int):
        self.env, self.env_id, self.seed = make_env(env_id), env_id, seed
        self.obs_dim, self.act_dim = self.env.observation_space.shape[0], self.env.action_space.shape[0]
        self.episode, self.last_return = -1, math.nan

    def reset(self, step: int):
        """Starts the next episode; its first observation is `self.obs` (S,)."""
        self.episode += 1
        self.actions, self.episodic_return = [], 0.0
        obs, _ = self.env.reset(seed=derive_seed(self.seed, 0, self.episode))
        self.obs = np.asarray(obs, dtype=np.float32)
        check_finite(self.env_id, step, self.obs)

    def step(self, action: np.ndarray, step: int) -> tuple[np.ndarray, float, bool, bool]:
        """One step; next_obs (S,) is the episode's true final observation when the episode ends. Does not reset."""
        next_obs, reward, terminated, truncated, _ = self.env.step(action)
        next_obs, reward = np.asarray(next_obs, dtype=np.float32), float(reward)
        check_finite(self.env_id, step, next_obs, reward)
        self.actions.append(action)
        self.episodic_return += reward
        self.obs = next_obs
        return next_obs, reward, bool(terminated), bool(truncated)

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
            print(f"warning: {self.env_id} did not replay its episode exactly; starting a new one", file=sys.stderr)
            self.reset(step)


# --- 4. Replay buffer ---------------------------------------------------------------------------------------------
class ReplayBuffer:
    """Ring of transitions, one row [obs | action | next_obs | reward | terminated] each, on the training device.

    Time-outs are stored with terminated = 0: the target bootstraps through them.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device | str = "cpu"):
        self.splits = [obs_dim, act_dim, obs_dim, 1, 1]
        self.capacity, self.added = capacity, 0
        need, free = 4 * capacity * sum(self.splits), available_memory(torch.device(device))
        if need > free:
            gb = f"{need / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free"
            raise UsageError(f"--buffer-size {capacity}: the replay buffer needs {gb} on {device}")
        self.rows = torch.empty(capacity, sum(self.splits), device=device)  # the pages are touched as they fill
        self.row = torch.empty(sum(self.splits), pin_memory=self.rows.is_cuda)
        self.parts = np.split(self.row.numpy(), np.cumsum(self.splits)[:-1])

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *transition):
        """Stores obs (S,), action (A,), next_obs (S,), reward, terminated."""
        for part, value in zip(self.parts, transition, strict=True):
            part[:] = value
        self.rows[self.added % self.capacity].copy_(self.row, non_blocking=True)
        self.added += 1

    def state_dict(self) -> dict:
        rows = self.rows[: len(self)]
        rows = rows.cpu() if rows.is_cuda else torch.from_numpy(rows.numpy())  # the filled part alone, not copied
        return {"added": self.added, "rows": rows}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.rows[: len(self)].copy_(state["rows"])


def available_memory(device: torch.device) -> int:
    """Bytes free on the device; on CPU what the kernel can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- 5. Networks --------------------------------------------------------------------------------------------------
class Swish(nn.Module):
    """x sigmoid(beta x), one learnable beta per unit, initially 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class MLP(nn.Module):
    """in -> hidden -> hidden -> out: linear, LayerNorm if `norm`, swish, dropout if a mask is given.

    Weights start orthogonal or at zero, biases at PyTorch's default. `bf16` multiplies the hidden layers in bfloat16.
    """

    def __init__(self, dims: list[int], init: str, norm: bool = False, dropout: float = 0.0, bf16: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(d) if norm else nn.Identity() for d in dims[1:-1])
        self.swishes = nn.ModuleList(Swish(d) for d in dims[1:-1])
        self.dropout, self.bf16 = dropout, bf16
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight) if init == "orthogonal" else nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, in) -> (B, out). keep (2, B, hidden), bool: the units that dropout keeps; None: no dropout."""
        for i, (norm, swish) in enumerate(zip(self.norms, self.swishes, strict=True)):
            x = swish(norm(self.hidden(self.layers[i], x)))
            if keep is not None:
                x = torch.where(keep[i], x / (1 - self.dropout), 0.0)
        return self.layers[-1](x)

    def hidden(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if not self.bf16:
            return layer(x)
        return linear(x.bfloat16(), layer.weight.bfloat16()).to(x.dtype) + layer.bias


class EnergyFlow(nn.Module):
    """The conditional flow that is policy, soft Q and soft value at once [MEow, section 4].

    From action to latent: u = atanh(a), four couplings with alternating masks (non-linear layers), z = x / sigma(s)
    (the linear layer). Works in float32 and float64 and for any action dimension.
    """

    couplings = 4

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        alpha: float,
        log_sigma_min: float,
        log_sigma_max: float,
        dropout: float = 0.1,
        reward_shifting: str = "clipped",
        coupling: str = "additive",
        bf16: bool = False,
    ):
        super().__init__()
        self.affine, self.shifting = coupling == "affine", reward_shifting != "none"
        out = 2 * act_dim if self.affine else act_dim
        dims = [act_dim + obs_dim, 64, 64, out]
        self.t = nn.ModuleList(MLP(dims, "orthogonal", norm=True, dropout=dropout) for _ in range(self.couplings))
        self.h = MLP([obs_dim, 64, 64, act_dim], "zeros")
        n_shifts = {"clipped": 2, "single": 1, "none": 0}[reward_shifting]
        self.b = nn.ModuleList(MLP([obs_dim, 256, 256, 1], "zeros", bf16=bf16) for _ in range(n_shifts))
        self.log_sigma_min, self.log_sigma_max = log_sigma_min, log_sigma_max
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        mask = (torch.arange(act_dim) % 2 == 0).float()
        self.register_buffer("masks", torch.stack([mask, 1 - mask]))

    def forward(self, method: str, *inputs):
        """`flow.<method>(*inputs)`: torch.func.functional_call can only call `forward`."""
        return getattr(self, method)(*inputs)

    def log_sigma(self, obs: Tensor) -> Tensor:
        """log sigma(s) of the linear layer, between its bounds. obs (B, S) -> (B, A), nats."""
        half_range = 0.5 * (self.log_sigma_max - self.log_sigma_min)
        return self.log_sigma_min + half_range * (torch.tanh(self.h(obs)) + 1)

    def shifts(self, obs: Tensor) -> Tensor:
        """Learnable reward shifts b_k(s), in nats. obs (B, S) -> (B, K)."""
        return torch.cat([b(obs) for b in self.b], dim=-1) if self.shifting else torch.zeros_like(obs[:, :1])

    def to_latent(self, obs: Tensor, action: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z = g(a|s), and log|det dz/da| of the non-linear and of the linear layers.

        Shapes: obs (B, S), action (B, A) in [-1, 1], keep (4, 2, B, 64) -> z (B, A), (B,), (B,). Units: nats.
        """
        limit = 1 - (1e-12 if action.dtype == torch.float64 else 1e-5)  # D10
        x = torch.atanh(action.clamp(-limit, limit))
        log_det_nonlinear = -log_tanh_slope(x).sum(-1)
        for i in reversed(range(self.couplings)):
            scale, t = self.coupling(i, x, obs, keep)
            x = (x - t) * torch.exp(-scale)
            log_det_nonlinear = log_det_nonlinear - scale.sum(-1)
        log_sigma = self.log_sigma(obs)
        return x * torch.exp(-log_sigma), log_det_nonlinear, -log_sigma.sum(-1)

    def to_action(self, obs: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a = g^-1(z|s), and log|det da/dz| of the non-linear and of the linear layers.

        Shapes: obs (B, S), z (B, A) -> action (B, A), (B,), (B,). Units: nats.
        """
        log_sigma = self.log_sigma(obs)
        x, log_det_nonlinear = z * torch.exp(log_sigma), torch.zeros_like(z[:, 0])
        for i in range(self.couplings):
            scale, t = self.coupling(i, x, obs)
            x = x * torch.exp(scale) + t
            log_det_nonlinear = log_det_nonlinear + scale.sum(-1)
        return torch.tanh(x), log_det_nonlinear + log_tanh_slope(x).sum(-1), log_sigma.sum(-1)

    def coupling(self, i: int, x: Tensor, obs: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scale, t) of coupling i, both (B, A) and zero where its mask m is 1; they depend on m*x and s only."""
        m = self.masks[i % 2]
        out = self.t[i](torch.cat([m * x, obs], dim=-1), None if keep is None else keep[i]) * (1 - m).repeat(1 + self.affine)
        return out.chunk(2, dim=-1) if self.affine else (torch.zeros_like(out), out)

    def q_values(self, obs: Tensor, action: Tensor, keep: Tensor | None = None) -> Tensor:
        """Q_k(s,a) = alpha (log p_z(z) + log|det J_n| + b_k(s)), reward units; one flow pass. -> (B, K)  # D1"""
        z, log_det_nonlinear, _ = self.to_latent(obs, action, keep)
        return self.alpha * ((log_prior(z) + log_det_nonlinear)[:, None] + self.shifts(obs))

    def soft_values(self, obs: Tensor) -> Tensor:
        """V_k(s) = alpha (-log Z(s) + b_k(s)), reward units, exact and without the flow. obs (B, S) -> (B, K)  # D2

        Z is the product of the linear layers' |det J|, here of 1/sigma: int exp(Q/alpha) da is 1/Z (times exp(b)).
        """
        log_z = -self.log_sigma(obs).sum(-1)
        return self.alpha * (-log_z[:, None] + self.shifts(obs))

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a|s) = log p_z(z) + log|det J_n| + log|det J_l| = (Q - V) / alpha. -> (B,), nats  # D3"""
        z, log_det_nonlinear, log_det_linear = self.to_latent(obs, action)
        return log_prior(z) + log_det_nonlinear + log_det_linear

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """a ~ pi(.|s) and log pi(a|s). obs (B, S) -> (B, A), (B,)."""
        z = torch.randn(len(obs), self.masks.shape[1], dtype=obs.dtype, device=obs.device)
        action, log_det_nonlinear, log_det_linear = self.to_action(obs, z)
        return action, log_prior(z) - log_det_nonlinear - log_det_linear

    def mode_action(self, obs: Tensor) -> Tensor:
        """The action of latent 0: the mode of the density before tanh, not the argmax of Q. obs (B, S) -> (B, A)."""
        return self.to_action(obs, torch.zeros(len(obs), self.masks.shape[1], dtype=obs.dtype, device=obs.device))[0]


def log_prior(z: Tensor) -> Tensor:
    """log p_z(z) of the standard normal. z (B, A) -> (B,)."""
    return -0.5 * (z * z).sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def log_tanh_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2), elementwise and without cancellation.  # D7"""
    return 2 * (math.log(2) - u - softplus(-2 * u))


# --- 6. Target and loss -------------------------------------------------------------------------------------------
def soft_target(reward: Tensor, terminated: Tensor, v_next: Tensor, gamma: float) -> Tensor:
    """y = r + gamma (1 - terminated) min_k V_k(s'). reward (B,), terminated (B,), v_next (B, K) -> (B,)."""
    return reward + gamma * (1 - terminated) * v_next.min(-1).values


def meow_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of sum_k (Q_k - y)^2 / 2. q (B, K), target (B,) -> ()."""
    return 0.5 * (q - target[:, None]).square().sum(-1).mean()


def clip_gradient(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales grad (P,) to at most max_norm; also returns the norm before, ()."""
    norm = torch.linalg.vector_norm(grad)
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


def adam(theta: Tensor, m: Tensor, v: Tensor, decay: Tensor, grad: Tensor, lr: float) -> tuple[Tensor, ...]:
    """One step of Adam [Kingma and Ba, algorithm 1]; decay (2,) holds (beta1^t, beta2^t)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    decay = decay * torch.tensor([beta1, beta2], dtype=decay.dtype, device=decay.device)
    m_hat, v_hat = m / (1 - decay[0]).to(m.dtype), v / (1 - decay[1]).to(v.dtype)
    return theta - lr * m_hat / (torch.sqrt(v_hat) + eps), m, v, decay


# --- 7. Update ----------------------------------------------------------------------------------------------------
METRICS = ("losses/loss", "losses/grad_norm", "flow/q", "flow/v_next", "flow/target", "flow/shift_gap")


def split_parameters(flow: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """Views of the vector theta (P,) with the names and shapes of the flow's parameters."""
    parameters = dict(flow.named_parameters())
    parts = theta.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def flatten_parameters(flow: nn.Module) -> Tensor:
    """Moves the flow's parameters into one new vector theta (P,): changing theta changes the flow."""
    theta = torch.cat([p.detach().flatten() for p in flow.parameters()])
    for p, view in zip(flow.parameters(), split_parameters(flow, theta).values(), strict=True):
        p.data = view
    return theta


def call(flow: EnergyFlow, theta: Tensor, method: str, *inputs):
    """`flow.<method>(*inputs)` with the parameters theta (P,), as a pure function of them."""
    return torch.func.functional_call(flow, split_parameters(flow, theta), (method, *inputs))


def make_update(flow: EnergyFlow, splits: list[int], args: Args):
    """The whole update as one function of flat tensors, which it changes in place; returns the METRICS (6,)."""

    def loss_and_q(theta, obs, action, target, keep):
        q = call(flow, theta, "q_values", obs, action, keep)  # Q_k(s,a)  (B, K)
        return meow_loss(q, target), q

    def update(theta, target_theta, m, v, decay, batch, keep):
        obs, action, next_obs, reward, terminated = batch.split(splits, dim=-1)
        v_next = call(flow, target_theta, "soft_values", next_obs)  # V_k(s'), theta'  (B, K)
        target = soft_target(reward[:, 0], terminated[:, 0], v_next, args.gamma)  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target, keep)
        grad, grad_norm = clip_gradient(grad, args.max_grad_norm)
        new_theta, new_m, new_v, new_decay = adam(theta, m, v, decay, grad, args.learning_rate)
        new_target_theta = (1 - args.tau) * target_theta + args.tau * new_theta  # theta' <- (1-tau) theta' + tau theta
        new = (new_theta, new_target_theta, new_m, new_v, new_decay)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        shift_gap = (q[:, 0] - q[:, -1]).abs().mean()  # alpha |b_1 - b_2|
        return torch.stack([loss, grad_norm, q.mean(), v_next.mean(), target.mean(), shift_gap])

    return update


class Learner:
    """Parameters, target parameters and Adam's moments, with acting and updating compiled for the device.

    On CPU the update is one compiled function, on CUDA one graph that is replayed. Acting waits for the device;
    `update` does not, so the environment's step overlaps with it on CUDA.
    """

    def __init__(self, flow: EnergyFlow, replay: ReplayBuffer, args: Args, compiled: bool):
        self.flow, self.replay, self.compiled, self.dropout = flow, replay, compiled, args.dropout
        self.device = replay.rows.device
        theta = flatten_parameters(flow)
        decay = torch.ones(2, dtype=torch.float64, device=self.device)  # (beta1^0, beta2^0)
        self.state = [theta, theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta), decay]
        self.index = torch.zeros(args.batch_size, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.device_index = self.index.to(self.device)
        self.batch = torch.zeros(args.batch_size, sum(replay.splits), device=self.device)
        keep = torch.ones(flow.couplings, 2, args.batch_size, 64, dtype=torch.bool, device=self.device)
        self.keep = keep if args.dropout else None
        self.metrics = torch.zeros(len(METRICS), device=self.device)
        self._update = self._prepare(make_update(flow, replay.splits, args))
        self._graph = self._capture(self._update_in_place, self.state) if self.device.type == "cuda" else None

    def update(self, rng: np.random.Generator):
        """Draws a batch and a dropout mask and updates; leaves the METRICS on the device."""
        self.index.numpy()[:] = rng.integers(0, len(self.replay), len(self.index))
        self.device_index.copy_(self.index, non_blocking=True)
        if self._graph:
            self._graph.replay()
            return
        if self.keep is not None:  # 16 random bits a unit: many times faster than a float  # D9
            bits = rng.integers(0, 2**16, self.keep.shape, dtype=np.uint16)
            np.greater_equal(bits, round(self.dropout * 2**16), out=self.keep.numpy())
        self._update_in_place()

    def _update_in_place(self):
        torch.index_select(self.replay.rows, 0, self.device_index, out=self.batch)
        if self.keep is not None and self.keep.is_cuda:
            self.keep.bernoulli_(1 - self.dropout)
        self.metrics.copy_(self._update(*self.state, self.batch, self.keep))

    def make_actor(self, n: int):
        """act(obs (n, S), z (n, A)) -> actions (n, A), numpy; it waits for the device. z = 0 gives `mode_action`."""
        pinned = dict(pin_memory=self.device.type == "cuda")
        obs_dim, act_dim = self.replay.splits[:2]
        inputs = torch.zeros(n, obs_dim + act_dim, **pinned)
        action = torch.zeros(n, act_dim, **pinned)
        device_inputs, device_action = inputs.to(self.device), action.to(self.device)

        def to_action(theta, inputs):
            return call(self.flow, theta, "to_action", *inputs.split([obs_dim, act_dim], dim=-1))[0]

        to_action = self._prepare(to_action)

        def step():
            device_action.copy_(to_action(self.state[0], device_inputs))

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
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp_wrapper": self.device.type == "cpu"}
        compiled = torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True, options=options)
        return torch.no_grad()(compiled)

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
        """The last update's METRICS. Raises: FloatingPointError if one is not finite.  # D5"""
        values = dict(zip(METRICS, self.metrics.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
            raise FloatingPointError(f"the update at step {step} is not finite: {bad}; try a smaller --learning-rate")
        return values

    def state_dict(self) -> dict:
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"state": [t.cpu() for t in self.state], "metrics": self.metrics.cpu(), "cuda_rng": cuda_rng}

    def load_state_dict(self, state: dict):
        for tensor, value in zip([*self.state, self.metrics], [*state["state"], state["metrics"]], strict=True):
            tensor.copy_(value)
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def prepare_hardware(args: Args) -> tuple[torch.device, bool]:
    """Sets threads and floating-point modes; returns the device and whether to compile."""
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)  # zero-initialised networks are full of denormals, which are slow
    threads = args.torch_threads or int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count()))
    torch.set_num_threads(threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # keep freed memory: else the kernel zeroes 1,300 pages anew in each update
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**25)
        libc.mallopt(m_trim_threshold, 2**30)
    compiled = args.compile
    if compiled and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        print("no C++ compiler (g++): running uncompiled, at about half the speed", file=sys.stderr)
        compiled = False
    return device, compiled


# --- 8. Evaluation ------------------------------------------------------------------------------------------------
EVAL_STEP_LIMIT = 100_000  # of an evaluation episode whose environment has no time limit of its own


class Evaluator:
    """Plays n episodes at a time, each in its own environment, batched through the policy."""

    def __init__(self, args: Args, act, video_dir: Path | None):
        self.args, self.act, self.video_dir = args, act, video_dir
        modes = ["rgb_array" if video_dir and i == 0 else None for i in range(args.eval_episodes)]
        self.envs = [make_env(args.env_id, mode) for mode in modes]

    def run(self, step: int, video_name: str) -> tuple[list[float], list[int]]:
        """Returns and lengths of the episodes; their seeds depend on the run's seed and on `step` alone.  # D6"""
        args, n = self.args, len(self.envs)
        rng = np.random.Generator(np.random.SFC64(derive_seed(args.seed, 2, step)))
        seeds = [derive_seed(args.seed, 1, step, i) for i in range(n)]
        obs = np.stack([env.reset(seed=s)[0] for env, s in zip(self.envs, seeds, strict=True)]).astype(np.float32)
        returns, lengths, alive = [0.0] * n, [0] * n, list(range(n))
        z = np.zeros((n, self.envs[0].action_space.shape[0]), dtype=np.float32)
        video = self.open_video(video_name) if self.video_dir else None
        while alive:
            if not args.deterministic_eval:
                rng.standard_normal(out=z, dtype=np.float32)
            actions = self.act(obs, z)
            for i in alive.copy():
                next_obs, reward, terminated, truncated, _ = self.envs[i].step(actions[i])
                obs[i], returns[i], lengths[i] = next_obs, returns[i] + float(reward), lengths[i] + 1
                check_finite(args.env_id, step, obs[i], float(reward))
                if video and i == 0:
                    video.append_data(self.envs[0].render())
                if terminated or truncated or lengths[i] == EVAL_STEP_LIMIT:
                    alive.remove(i)
        if video:
            video.close()
        return returns, lengths

    def open_video(self, name: str):
        import imageio

        self.video_dir.mkdir(exist_ok=True)
        fps = self.envs[0].metadata.get("render_fps", 30)
        return imageio.get_writer(self.video_dir / f"{name}.mp4", fps=fps, macro_block_size=1)


def evaluate_file(args: Args) -> dict:
    """`--evaluate PATH`: plays a saved policy and prints the return of each episode."""
    file = find_policy(args.evaluate)
    saved = load_file(file)
    flow, replay = make_flow(args, TrainingEnv(args.env_id, args.seed), prepare_hardware(args)[0], rows=1)
    flow.load_state_dict(saved["flow"])
    learner = Learner(flow, replay, args, compiled=False)
    video_dir = file.parent / "videos" if args.capture_video else None
    evaluator = Evaluator(args, learner.make_actor(args.eval_episodes), video_dir)
    returns, lengths = evaluator.run(saved["step"], f"evaluate-{file.stem}-seed{args.seed}")
    for i, (ret, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {ret:.2f}, length {length}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    text = f"{len(returns)} {mode} episodes of {file} (step {saved['step']}) on {args.env_id}"
    print(f"{text}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    if video_dir:
        print(f"video: {video_dir / f'evaluate-{file.stem}-seed{args.seed}.mp4'}")
    return {"returns": returns, "lengths": lengths}


# --- 9. Files of a run --------------------------------------------------------------------------------------------
FORMAT = "meow_continuous_action/1"


def save_file(path: Path, content: dict):
    """Writes atomically: whatever happens meanwhile, `path` holds the old content or the new. Raises: RunError."""
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"can't read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path} was not written by this script ({FORMAT})")
    return content


def saved_args(content: dict, path: Path) -> Args:
    try:
        return Args(**content["args"])
    except (TypeError, ValueError) as error:
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
    return find_file(path, ["policy_final.pt", "checkpoint.pt", "policy_best.pt"], "--evaluate")


def describe_run(args: Args, device: torch.device, compiled: bool) -> dict:
    """What a reader needs to reproduce the run: settings, commit, versions and hardware."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    packages = ("torch", "gymnasium", "mujoco", "numpy", "tyro", "wandb")
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "args": dataclasses.asdict(args),
        "git_commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "") or None,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": compiled,
    }


class Logger:
    """metrics.csv (step,seconds,name,value), the progress bar and, with --track, Weights & Biases."""

    def __init__(self, args: Args, run_dir: Path, description: dict, resumed: dict | None):
        self.path, self.progress = run_dir / "metrics.csv", {}
        self.start = time.perf_counter() - (resumed["seconds"] if resumed else 0.0)
        self.file = open(self.path, "r+b" if resumed else "xb", buffering=0)
        if resumed:  # rows after the checkpoint are written again, with the same values
            self.file.truncate(resumed["csv_bytes"])
            self.file.seek(0, os.SEEK_END)
        else:
            self.file.write(b"step,seconds,name,value\n")
        step = resumed["step"] if resumed else 0
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not self.terminal, smoothing=0.05)
        self.total, self.last_line, self.last_speed = args.total_timesteps, 0.0, (step, self.seconds())
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=run_dir.name,
                id=re.sub(r"[^\w-]", "-", run_dir.name),
                resume="allow",
                config=description,
                dir=str(run_dir),
            )
            self.wandb.define_metric("*", step_metric="global_step")

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def log(self, step: int, values: dict[str, float]):
        seconds = self.seconds()
        rows = "".join(f"{step},{seconds:.3f},{name},{value!r}\n" for name, value in values.items())
        try:
            self.file.write(rows.encode())
        except OSError as error:
            raise RunError(f"can't write {self.path}: {error.strerror}") from None
        if self.wandb:
            self.wandb.log({"global_step": step, **values})

    def speed(self, step: int) -> float:
        """Steps per second since the last call."""
        (last_step, last_seconds), now = self.last_speed, self.seconds()
        self.last_speed = (step, now)
        return (step - last_step) / max(now - last_seconds, 1e-9)

    def show(self, step: int, **fields: str):
        """Progress: a bar on a terminal, else a line every 30 seconds and at the end."""
        self.progress |= fields
        now = self.seconds()
        if self.terminal:
            self.bar.set_postfix(self.progress, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_line > 30 or step == self.total:
            self.last_line = now
            eta = time.strftime("%H:%M:%S", time.gmtime((self.total - step) * now / max(step, 1)))
            text = ", ".join(f"{name} {value}" for name, value in self.progress.items())
            print(f"step {step}/{self.total}, ETA {eta}, {text}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict:
        os.fsync(self.file.fileno())
        return {"csv_bytes": self.file.tell(), "seconds": self.seconds()}

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class StopSignals:
    """Context in which the first SIGINT or SIGTERM only sets `received`; a second one stops at once."""

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


# --- 10. Training -------------------------------------------------------------------------------------------------
def make_flow(args: Args, env: TrainingEnv, device: torch.device, rows: int) -> tuple[EnergyFlow, ReplayBuffer]:
    """The flow and the replay buffer for the environment's dimensions, on the device."""
    replay = ReplayBuffer(rows, env.obs_dim, env.act_dim, device)
    flow = EnergyFlow(
        env.obs_dim,
        env.act_dim,
        args.alpha,
        args.log_sigma_min,
        args.log_sigma_max,
        dropout=args.dropout,
        reward_shifting=args.reward_shifting,
        coupling=args.coupling,
        bf16=args.bf16,
    )
    return flow.to(device).requires_grad_(False), replay


def open_run(args: Args, description: dict) -> tuple[Path, dict | None]:
    """The run folder and, with --resume, its checkpoint."""
    if args.resume:
        file = find_checkpoint(args.resume)
        return file.parent, load_file(file)
    name = re.sub(r"[^\w.-]", "_", args.env_id)
    run_dir = Path(args.runs_dir) / f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"can't make the run folder {run_dir}: {error.strerror}") from None
    return run_dir, None


def train(args: Args) -> dict:
    """Trains and returns {"run_dir", "step", "return_mean"}: the last evaluation's mean return."""
    device, compiled = prepare_hardware(args)
    torch.manual_seed(args.seed)
    rng = np.random.Generator(np.random.SFC64(args.seed))  # exploration, replay and dropout
    env = TrainingEnv(args.env_id, args.seed)
    flow, replay = make_flow(args, env, device, rows=min(args.buffer_size, args.total_timesteps))
    description = describe_run(args, device, compiled)
    run_dir, checkpoint = open_run(args, description)
    if checkpoint and checkpoint["step"] > args.total_timesteps:
        raise UsageError(f"{run_dir} is already at step {checkpoint['step']}: raise --total-timesteps to go on")
    learner = Learner(flow, replay, args, compiled)
    act = learner.make_actor(1)
    video_dir = run_dir / "videos" if args.capture_video else None
    evaluator = Evaluator(args, learner.make_actor(args.eval_episodes), video_dir)
    logger = Logger(args, run_dir, description, checkpoint)
    step, best, return_mean = 0, -math.inf, math.nan

    def policy() -> dict:
        return {"args": dataclasses.asdict(args), "step": step, "flow": flow.state_dict()}

    def save_checkpoint():
        parts = {"learner": learner.state_dict(), "replay": replay.state_dict(), "env": env.state_dict()}
        scores = {"best": best, "return_mean": return_mean, "rng": rng.bit_generator.state["state"]}
        save_file(run_dir / "checkpoint.pt", {**policy(), **parts, **scores, **logger.state_dict()})

    if checkpoint:
        step, best, return_mean = checkpoint["step"], checkpoint["best"], checkpoint["return_mean"]
        learner.load_state_dict(checkpoint["learner"])
        replay.load_state_dict(checkpoint["replay"])
        env.load_state_dict(checkpoint["env"], step)
        rng.bit_generator.state = {**rng.bit_generator.state, "state": checkpoint["rng"]}
    else:
        env.reset(step)
        print(f"{args.env_id} on {description['device']}, files in {run_dir}", file=sys.stderr)

    with StopSignals() as stop:
        while step < args.total_timesteps:
            if step < args.learning_starts:
                action = rng.uniform(-1, 1, env.act_dim).astype(np.float32)
            else:
                z = rng.standard_normal(env.act_dim, dtype=np.float32)
                action = act(env.obs, z)[0]  # a = g^-1(z|s), z ~ N(0, I); waits for the update before
                learner.update(rng)  # D8
            obs = env.obs
            next_obs, reward, terminated, truncated = env.step(action, step)
            replay.add(obs, action, next_obs, reward, terminated)
            step += 1

            if terminated or truncated:
                env.last_return = env.episodic_return
                length = len(env.actions)
                logger.log(step, {"charts/episodic_return": env.last_return, "charts/episodic_length": length})
                env.reset(step)
            if step > args.learning_starts:
                metrics = learner.read_metrics(step)
            if step % args.log_frequency == 0 or step == args.total_timesteps:
                speed = logger.speed(step)
                logger.log(step, {"charts/SPS": speed, **(metrics if step > args.learning_starts else {})})
                logger.show(step, SPS=f"{speed:.0f}", train=f"{env.last_return:.1f}", eval=f"{return_mean:.1f}")
            if step % args.eval_frequency == 0 or step == args.total_timesteps:
                returns, lengths = evaluator.run(step, f"step-{step:09d}")
                return_mean = float(np.mean(returns))
                each = {f"eval/return_{i}": value for i, value in enumerate(returns)}
                summary = {"eval/return_mean": return_mean, "eval/return_std": float(np.std(returns))}
                logger.log(step, {**summary, "eval/length_mean": float(np.mean(lengths)), **each})
                logger.show(step, eval=f"{return_mean:.1f}")
                if return_mean > best:
                    best = return_mean
                    save_file(run_dir / "policy_best.pt", policy())
            if step == args.total_timesteps:
                save_file(run_dir / "policy_final.pt", policy())
            due = args.checkpoint_frequency and step % args.checkpoint_frequency == 0
            if due or step == args.total_timesteps or stop.received:
                save_checkpoint()
            if stop.received and step < args.total_timesteps:
                logger.close()
                again = f"python {Path(sys.argv[0]).name} --resume {run_dir}"
                raise Interrupted(stop.received, f"stopped at step {step}; go on with: {again}")
    logger.close()
    return {"run_dir": str(run_dir), "step": step, "return_mean": return_mean}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 (run), 2 (usage) or 128 + signal."""
    try:
        args = parse_args(argv)
        evaluate_file(args) if args.evaluate else train(args)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except (UsageError, RunError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
