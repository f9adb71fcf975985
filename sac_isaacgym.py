"""SAC on the Isaac Gym tasks: the baseline of meow_isaacgym.py, on the same simulators.

    python sac_isaacgym.py --env-id Ant                                  # MEow's budget of steps
    python sac_isaacgym.py --resume runs/<run_name>                      # go on exactly
    python sac_isaacgym.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905,
with the settings of the MEow paper's runs: hidden layers of 512 and 256 units, a temperature that
is fixed for each task, learning rates 3e-4. Sections, options, files and evaluation are those of
meow_isaacgym.py, so a diff of the two scripts is the algorithm; all counts of steps are vector
steps.

    pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2)                        policy
    y = r + gamma (1 - terminated) (min_k Q'_k(s',a') - alpha log pi(a'|s')),  a' ~ pi(.|s')
    J_Q = mean of sum_k (Q_k(s,a) - y)^2                                  critics
    J_pi = mean of alpha log pi(a|s) - min_k Q_k(s,a),  a ~ pi(.|s)       actor
    J_alpha = -alpha (mean of log pi(a|s) + target entropy)               temperature (--autotune)

Shapes: N environments, B batch, A action, S observation, P parameters, T vector steps.

S1 to S5 are explained in sac_continuous_action.py, D and I in meow_isaacgym.py. In one point this
SAC differs from the first: the actor is updated as often as the critics.
"""

# --- 1. Imports -----------------------------------------------------------------------------------
import argparse
import contextlib
import ctypes
import ctypes.util
import dataclasses
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

if importlib.util.find_spec("isaacgym"):
    import isaacgym  # noqa: F401 (it demands to come before torch)

import imageio
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from isaac_tasks import Simulator, SimulatorError, make_simulator

# --- 2. Settings ----------------------------------------------------------------------------------
# The paper's settings, the defaults for these tasks; others get those of `Args`.
PAPER_SETTINGS = {
    name: dict(total_timesteps=steps, num_envs=envs, batch_size=batch, tau=tau, alpha=alpha)
    for name, steps, envs, batch, tau, alpha in (
        ("Ant", 1_000_000, 128, 1024, 0.0025, 0.4),
        ("Humanoid", 1_000_000, 128, 1024, 0.0025, 0.025),
        ("Ingenuity", 500_000, 128, 1024, 0.0025, 0.1),
        ("Anymal", 1_000_000, 128, 1024, 0.0025, 0.01),
        ("AllegroHand", 1_000_000, 512, 256, 0.0025, 0.1),
        ("FrankaCabinet", 1_000_000, 512, 256, 0.025, 0.1),
    )
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
    env_id: str = "Ant"
    """Ant, Humanoid or Ingenuity (embedded); a task of isaacgymenvs; an Isaac Lab id"""
    exp_name: str = "sac_isaacgym"
    """name of the experiment, a part of the run name"""
    seed: int = 1
    """seed of networks, exploration, replay, training and evaluation episodes"""
    total_timesteps: int = 1_000_000
    """vector steps in all; each steps every environment once"""
    resume: str | None = None
    """run folder or checkpoint to continue exactly; its own settings become the defaults"""
    evaluate: str | None = None
    """run folder, checkpoint or policy to play instead of training; prints each return"""

    # Simulator
    simulator: Literal["auto", "isaacgym", "isaaclab", "mujoco"] = "auto"
    """auto: mujoco for the embedded tasks, isaaclab for ids Isaac-..., else isaacgym"""
    num_envs: int = 128
    """environments stepped together"""
    variant: Literal["oige", "ige"] = "oige"
    """embedded tasks: constants of OmniIsaacGymEnvs (the paper's) or of IsaacGymEnvs"""
    sim_threads: int = 1
    """embedded tasks on CPU: threads that step the environments; results don't depend on it"""

    # Algorithm
    policy_lr: float = 3e-4
    """Adam's step size for the actor"""
    q_lr: float = 3e-4
    """Adam's step size for the critics and the temperature"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.0025
    """Polyak averaging: theta' <- (1 - tau) theta' + tau theta after each update"""
    autotune: bool = False
    """learn the temperature; the target entropy is minus the number of action dimensions"""
    alpha: float = 0.2
    """temperature with --no-autotune: reward units per nat of entropy"""
    batch_size: int = 1024
    """transitions per update"""
    buffer_size: int = 15_000
    """vector steps kept in the replay buffer"""
    learning_starts: int = 100
    """vector steps with uniform random actions; after them updates begin"""
    updates_per_step: int = 1
    """updates per vector step"""
    policy_frequency: int = 1
    """the actor is updated every so many steps, then as many times"""

    # Ablation of the MEow paper
    reward_shifting: Literal["clipped", "none"] = "none"
    """clipped: each critic gets a learnable shift b_k(s) of MEow's form; none: plain SAC"""

    # Evaluation and logging
    eval_frequency: int = 10_000
    """vector steps between evaluations (the last step is always evaluated)"""
    eval_episodes: int = 10
    """episodes per evaluation, in separate environments, with fresh seeds derived from --seed"""
    deterministic_eval: bool = True
    """evaluate the action of latent z = 0; --no-deterministic-eval draws from the policy"""
    log_frequency: int = 1_000
    """vector steps between rows of returns, losses and speed in metrics.csv"""
    checkpoint_frequency: int = 50_000
    """vector steps between checkpoints (0: only when interrupted and at the end)"""
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
    """CPU threads of the networks; ones this small gain little from more than two"""
    compile: bool = True
    """compile acting and update (a minute, then cached; needs g++ on CPU); equal up to rounding"""

    def __post_init__(self):
        counts = "total_timesteps batch_size buffer_size learning_starts num_envs updates_per_step"
        counts += " sim_threads policy_frequency"
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
RESUME_MAY_CHANGE += " wandb_project_name wandb_entity cuda torch_threads sim_threads compile"
EVALUATE_MAY_CHANGE = "evaluate seed eval_episodes deterministic_eval capture_video torch_threads"
EVALUATE_MAY_CHANGE += " simulator sim_threads"


def default_args(env_id: str) -> Args:
    """The paper's settings for its tasks; general ones for any other."""
    return Args(env_id=env_id, **PAPER_SETTINGS.get(env_id, {}))


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


# --- 3. Environments ------------------------------------------------------------------------------
def derive_seed(*key: int) -> int:
    """One 32-bit seed from several numbers, e.g. the run's seed, the use and the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def make_envs(args: Args, num_envs: int, seed: int, device: torch.device) -> Simulator:
    """`num_envs` environments of the run's task. Raises: UsageError."""
    options = dict(device=device, threads=args.sim_threads, variant=args.variant)
    try:
        return make_simulator(args.simulator, args.env_id, num_envs, seed, **options)
    except SimulatorError as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from None


@contextlib.contextmanager
def simulator_errors():
    """As a decorator: the simulator's errors become ours."""
    try:
        yield
    except SimulatorError as error:
        raise RunError(f"the simulator failed: {error}; the last checkpoint is intact") from None


def check_finite(env_id: str, step: int, obs: Tensor, reward: Tensor):
    """Raises: RunError when an environment returned NaN or infinity."""
    bad = ~(obs.isfinite().all(-1) & reward.isfinite())
    if bad.any():
        i = int(bad.nonzero()[0])
        place = f"environment {i} of {len(bad)} of {env_id}"
        values = [f"observation[{j}] = {obs[i, j]}" for j in (~obs[i].isfinite()).nonzero()[:5, 0]]
        values += [] if reward[i].isfinite() else [f"reward = {reward[i]}"]
        raise RunError(f"{place} returned {', '.join(values)} at step {step}; it was not stored")


def check_action(action: Tensor, step: int) -> Tensor:
    """The actions themselves. Raises: FloatingPointError when the policy diverged.  # D5"""
    if not action.isfinite().all():
        hint = "try a smaller --learning-rate; the last checkpoint is intact"
        raise FloatingPointError(f"the policy's action at step {step} is not finite; {hint}")
    return action


class TrainingEnvs:
    """The training environments, their episodes' statistics and those of the observations."""

    def __init__(self, args: Args, device: torch.device):
        self.simulator = make_envs(args, args.num_envs, derive_seed(args.seed, 0), device)
        self.env_id, self.last_return = args.env_id, math.nan
        self.obs_dim, self.act_dim = self.simulator.obs_dim, self.simulator.act_dim
        self.norm = ObservationNorm(self.obs_dim, device)
        zeros = torch.zeros(args.num_envs, device=device)
        self.returns, self.lengths = zeros, zeros.clone()  # of the episodes under way
        self.ended = torch.zeros(3, device=device)  # number, sum of returns, sum of lengths

    @simulator_errors()
    def reset(self, step: int):
        """Starts new episodes everywhere; their first observations are `self.obs` (N, S)."""
        self.obs = self.simulator.reset()
        check_finite(self.env_id, step, self.obs, self.obs.new_zeros(len(self.obs)))
        self.norm.update(self.obs)

    @simulator_errors()
    def step(self, action: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One vector step: reward, terminated, truncated (N,) and final_obs (N, S)."""
        self.obs, reward, terminated, truncated, final_obs = self.simulator.step(action)
        check_finite(self.env_id, step, torch.cat([self.obs, final_obs], -1), reward)
        self.norm.update(self.obs)
        self.returns += reward
        self.lengths += 1 if self.simulator.valid is None else self.simulator.valid
        done = terminated | truncated
        self.ended += torch.stack([done.sum(), self.returns[done].sum(), self.lengths[done].sum()])
        self.returns.masked_fill_(done, 0)
        self.lengths.masked_fill_(done, 0)
        return reward, terminated, truncated, final_obs

    def episode_metrics(self) -> dict[str, float]:
        """Mean return and length of the episodes that ended since the last call."""
        number, returns, lengths = self.ended.tolist()
        self.ended.zero_()
        if not number:
            return {"charts/episodes": 0.0}
        self.last_return = returns / number
        metrics = {"charts/episodes": number, "charts/episodic_return": self.last_return}
        return metrics | {"charts/episodic_length": lengths / number}

    def state_dict(self) -> dict:
        tensors = {
            name: getattr(self, name).cpu() for name in ("obs", "returns", "lengths", "ended")
        }
        return tensors | {"simulator": self.simulator.state_dict(), "last_return": self.last_return}

    def load_state_dict(self, state: dict, norm: dict, step: int):
        self.last_return = state["last_return"]
        self.norm.load_state_dict(norm)
        if not self.simulator.exact_resume:
            text = "this simulator can't restore its environments: their episodes start anew"
            print(f"warning: {text}", file=sys.stderr)
            self.reset(step)
            return
        self.simulator.load_state_dict(state["simulator"])
        for name in ("returns", "lengths", "ended"):
            getattr(self, name).copy_(state[name])
        self.obs = state["obs"].to(self.returns.device)


class ObservationNorm:
    """Running mean and variance (S,) of all observations so far; each is counted once.  # I4"""

    def __init__(self, obs_dim: int, device: torch.device | str = "cpu"):
        zeros = torch.zeros(obs_dim, dtype=torch.float64, device=device)
        self.mean, self.var, self.count = zeros, zeros + 1, zeros[:1].clone()

    def update(self, obs: Tensor):
        """Adds observations (N, S) [Chan et al., parallel variance]."""
        n, obs = len(obs), obs.double()
        delta, total = obs.mean(0) - self.mean, self.count + n
        squares = self.count * self.var + n * obs.var(0, correction=0)
        squares += delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def __call__(self, obs: Tensor) -> Tensor:
        """obs (..., S) with mean 0 and variance 1, clipped to +-5 (as in the authors' runs)."""
        scaled = (obs - self.mean) / torch.sqrt(self.var + 1e-8)
        return scaled.clamp(-5, 5).to(obs.dtype)

    def state_dict(self) -> dict:
        return {name: value.cpu() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict):
        for name, value in vars(self).items():
            value.copy_(state[name])


# --- 4. Replay buffer -----------------------------------------------------------------------------
class ReplayBuffer:
    """The last T vector steps of N environments, on the simulator's device.

    Each observation is stored once: what follows step t is what precedes step t + 1. Only after a
    time-out does an update need more, the final observation of the old episode. An environment
    times out at most once in `max_steps` steps, so these fit into a ring with one row for as many.
    (After a termination the target doesn't look at the next observation.)
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_dim: int,
        act_dim: int,
        max_steps: int,
        device: torch.device | str = "cpu",
    ):
        self.splits = [obs_dim, act_dim, obs_dim, 1, 1]
        self.capacity, self.num_envs, self.max_steps, self.added = capacity, num_envs, max_steps, 0
        slots, blocks = capacity + 1, capacity // max_steps + 2
        need = 4 * num_envs * (slots * (obs_dim + act_dim + 3) + blocks * obs_dim)
        free = available_memory(torch.device(device))
        if need > free:
            gb = f"{need / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free"
            raise UsageError(f"--buffer-size {capacity}: the replay buffer needs {gb} on {device}")
        self.obs = torch.empty(slots, num_envs, obs_dim, device=device)
        # action | reward | terminated | truncated
        self.rows = torch.empty(slots, num_envs, act_dim + 3, device=device)
        self.final_obs = torch.zeros(blocks, num_envs, obs_dim, device=device)
        self.invalid = np.zeros((slots, num_envs), dtype=bool)  # on the host, where rows are drawn

    def __len__(self) -> int:
        """Transitions to draw from, the invalid ones included."""
        return min(self.added, self.capacity) * self.num_envs

    def start(self, obs: Tensor):
        """Stores first observations (N, S). After a reset the last step's outcome is unknown."""
        slot = self.added % len(self.obs)
        if not torch.equal(self.obs[slot], obs):
            self.invalid[slot - 1] = True
        self.obs[slot] = obs

    def add(
        self,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        final_obs: Tensor,
        obs: Tensor,
        valid: Tensor | None = None,
    ):
        """Stores a vector step: (N, A), (N,), (N,), (N,), (N, S), and the next step's obs (N, S).

        valid (N,) bool: the rows that may be drawn (None: all).
        """
        slot, block = self.added % len(self.obs), self.added // self.max_steps % len(self.final_obs)
        flags = torch.stack([reward, terminated.float(), truncated.float()], -1)
        self.rows[slot] = torch.cat([action, flags], -1)
        old = self.final_obs[block]
        self.final_obs[block] = torch.where(truncated[:, None], final_obs, old)  # I1
        self.invalid[slot] = False if valid is None else ~valid.cpu().numpy()  # I2
        self.added += 1
        self.obs[self.added % len(self.obs)] = obs

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Places (3, n) of n transitions, uniform over the valid ones: row, next, final_obs."""
        index = rng.integers(0, len(self), n)
        while True:  # a second time only where a simulator resets late
            step, env = np.divmod(index, self.num_envs)
            step += self.added - len(self) // self.num_envs
            slot = step % len(self.obs)
            if not (again := self.invalid[slot, env]).any():
                break
            index[again] = rng.integers(0, len(self), again.sum())
        block = step // self.max_steps % len(self.final_obs)
        places = np.stack([slot, (step + 1) % len(self.obs), block])
        return places * self.num_envs + env

    def gather(self, index: Tensor, out: Tensor):
        """Rows obs | action | next_obs | reward | terminated of transitions (3, B) into out."""
        obs, action, next_obs, reward, terminated = out.split(self.splits, dim=-1)
        all_obs, all_rows = self.obs.flatten(0, 1), self.rows.flatten(0, 1)
        row, following = all_rows[index[0]], all_obs[index[1]]
        truncated, final_obs = row[:, -1:] > 0, self.final_obs.flatten(0, 1)[index[2]]
        obs.copy_(all_obs[index[0]])
        action.copy_(row[:, :-3])
        next_obs.copy_(torch.where(truncated, final_obs, following))
        reward.copy_(row[:, -3:-2])
        terminated.copy_(row[:, -2:-1])

    def state_dict(self) -> dict:
        used = min(self.added + 1, len(self.obs))
        rings = {name: getattr(self, name)[:used] for name in ("obs", "rows")}
        # by way of NumPy, or torch saves all rows
        rings = {name: torch.from_numpy(ring.cpu().numpy()) for name, ring in rings.items()}
        rings["invalid"] = torch.from_numpy(self.invalid[:used])
        return rings | {"added": self.added, "final_obs": self.final_obs.cpu()}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.invalid[: len(state["invalid"])] = state["invalid"].numpy()
        for name in ("obs", "rows", "final_obs"):  # shorter ones after fewer --total-timesteps
            getattr(self, name)[: len(state[name])].copy_(state[name])


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


HIDDEN = [512, 256]  # units of the hidden layers


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
    """

    def __init__(
        self,
        actor: Actor,
        critics: Critics,
        replay: ReplayBuffer,
        norm: ObservationNorm,
        args: Args,
        compiled: bool,
    ):
        self.actor, self.replay, self.norm, self.compiled = actor, replay, norm, compiled
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
        self.index = torch.zeros(3, n, dtype=torch.int64, pin_memory=cuda)
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
        self.index.numpy()[:] = self.replay.draw(rng, self.index.shape[1])  # I5
        self.device_index.copy_(self.index, non_blocking=True)
        self.updates += 1
        delayed = self.policy_frequency if self.updates % self.policy_frequency == 0 else 0
        for step in (self._steps[0], *[self._steps[1]] * delayed):
            if self.device.type == "cpu":
                rng.standard_normal(out=self.noise.numpy(), dtype=np.float32)
            step()

    def _update_critics(self):
        self.replay.gather(self.device_index, self.batch)
        obs, _, next_obs, _, _ = self.batch.split(self.replay.splits, dim=-1)
        for part in (obs, next_obs):
            part.copy_(self.norm(part))
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
        """act(obs (n, S), z (n, A)) -> actions (n, A); z = 0 gives tanh(mu)."""
        splits = self.replay.splits[:2]
        inputs = torch.zeros(n, sum(splits), device=self.device)
        action = torch.zeros(n, splits[1], device=self.device)

        def to_action(phi, inputs):
            return call(self.actor, phi, "to_action", *inputs.split(splits, dim=-1))[0]

        to_action = self._prepare(to_action)

        def step():
            action.copy_(to_action(self.phi, inputs))

        graph = self._capture(step, []) if self.device.type == "cuda" else None

        @torch.no_grad()
        def act(obs: Tensor, z: Tensor) -> Tensor:
            torch.cat([self.norm(obs), z], -1, out=inputs)
            graph.replay() if graph else step()
            return action.clone()

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
        rngs = {"cpu_rng": torch.get_rng_state(), "cuda_rng": cuda_rng}
        return {"state": [t.cpu() for t in self.state], "updates": self.updates} | rngs

    def load_state_dict(self, state: dict):
        for tensor, value in zip(self.state, state["state"], strict=True):
            tensor.copy_(value)
        self.updates = state["updates"]
        torch.set_rng_state(state["cpu_rng"])
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
EVAL_STEP_LIMIT = 100_000  # of an evaluation episode in a simulator without a time limit


class Evaluator:
    """Plays n episodes at a time in environments of their own."""

    def __init__(self, args: Args, simulator: Simulator, act):
        self.args, self.simulator, self.act = args, simulator, act

    @simulator_errors()
    def run(self, step: int, video_path: Path) -> tuple[list[float], list[int]]:
        """Returns and lengths of n episodes; their seeds depend on --seed and `step`.  # D6

        With --capture-video the first episode goes to `video_path`.
        """
        args, n, device = self.args, self.simulator.num_envs, self.simulator.device
        generator = torch.Generator(device).manual_seed(derive_seed(args.seed, 2, step))
        obs = self.simulator.reset(seed=derive_seed(args.seed, 1, step))
        returns, lengths = torch.zeros(n, device=device), torch.zeros(n, device=device)
        alive = torch.ones(n, dtype=torch.bool, device=device)
        z = torch.zeros(n, self.simulator.act_dim, device=device)
        video = self.open_video(video_path) if args.capture_video else None
        while alive.any() and lengths.max() < EVAL_STEP_LIMIT:
            if video and alive[0]:
                video.append_data(self.render())
            if not args.deterministic_eval:
                z.normal_(generator=generator)
            action = check_action(self.act(obs, z), step)
            obs, reward, terminated, truncated, _ = self.simulator.step(action)
            check_finite(args.env_id, step, obs, reward)
            returns += reward * alive
            lengths += alive
            alive &= ~(terminated | truncated)
        if alive.any():
            print(f"warning: evaluation cut after {EVAL_STEP_LIMIT} steps", file=sys.stderr)
        if video:
            video.close()
        return returns.tolist(), lengths.int().tolist()

    def open_video(self, path: Path):
        """An mp4 writer. Raises: RunError if this machine can't render."""
        self.render()
        path.parent.mkdir(exist_ok=True)
        return imageio.get_writer(path, fps=self.simulator.fps, macro_block_size=1)

    def render(self) -> np.ndarray:
        try:
            return self.simulator.render()
        except SimulatorError as error:
            hint = "install libegl1 or libosmesa6 and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
            raise RunError(f"{self.args.env_id}: {error}; {hint}") from None


def evaluation_metrics(returns: list[float], lengths: list[int]) -> dict[str, float]:
    """Mean and standard deviation of the returns, mean length, and each return."""
    mean, std = float(np.mean(returns)), float(np.std(returns))
    summary = {"eval/return_mean": mean, "eval/return_std": std}
    summary["eval/length_mean"] = float(np.mean(lengths))
    return summary | {f"eval/return_{i}": value for i, value in enumerate(returns)}


def evaluate_file(args: Args, saved: dict) -> dict:
    """`--evaluate PATH`: plays a saved policy and prints the return of each episode."""
    device, _ = prepare_hardware(args)
    file = find_policy(args.evaluate)
    video_path = file.parent / "videos" / f"evaluate-{file.stem}-seed{args.seed}.mp4"
    envs = make_envs(args, args.eval_episodes, args.seed, device)
    actor = make_networks(args, envs.obs_dim, envs.act_dim)[0].to(device)
    actor.load_state_dict(saved["actor"])
    norm = ObservationNorm(envs.obs_dim, device)
    norm.load_state_dict(saved["norm"])

    def act(obs: Tensor, z: Tensor) -> Tensor:
        return actor.to_action(norm(obs), z)[0]

    returns, lengths = Evaluator(args, envs, act).run(saved["step"], video_path)
    for i, (episodic_return, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {episodic_return:.2f}, length {length}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    text = f"{len(returns)} {mode} episodes of {file} (step {saved['step']}) on {args.env_id}"
    print(f"{text}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    if args.capture_video:
        print(f"video of episode 0: {video_path}")
    return {"returns": returns, "lengths": lengths}


# --- 9. Files of a run ----------------------------------------------------------------------------
FORMAT = "sac_isaacgym/1"
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
def make_networks(args: Args, obs_dim: int, act_dim: int) -> tuple[Actor, Critics]:
    """Actor and critics; their parameters need no gradients outside the update."""
    actor = Actor(obs_dim, act_dim)
    critics = Critics(obs_dim, act_dim, shifting=args.reward_shifting != "none")
    return actor.requires_grad_(False), critics.requires_grad_(False)


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


def make_evaluator(args: Args, simulator: Simulator, learner: Learner) -> Evaluator | None:
    """Evaluation in environments beside the training ones, where the simulator allows them."""
    if simulator.one_per_process:
        text = "one simulation per process: no evaluation while training; --evaluate does it later"
        print(f"note: {text}", file=sys.stderr)
        return None
    envs = make_envs(args, args.eval_episodes, args.seed, simulator.device)
    return Evaluator(args, envs, learner.make_actor(args.eval_episodes))


def train(args: Args, checkpoint: dict | None = None) -> dict:
    """Trains, from a checkpoint's content if given (and empties it).

    Returns {"run_dir", "step", "return_mean"}: the last evaluation's mean return.
    """
    device, compiled = prepare_hardware(args)
    env = TrainingEnvs(args, device)
    torch.manual_seed(args.seed)  # networks and exploration, whatever the simulator has seeded
    rng = np.random.default_rng(args.seed)  # replay and dropout
    capacity, max_steps = min(args.buffer_size, args.total_timesteps), env.simulator.max_steps
    replay = ReplayBuffer(capacity, args.num_envs, env.obs_dim, env.act_dim, max_steps, device)
    actor, critics = (n.to(device) for n in make_networks(args, env.obs_dim, env.act_dim))
    learner = Learner(actor, critics, replay, env.norm, args, compiled)
    act = learner.make_actor(args.num_envs)
    evaluator = make_evaluator(args, env.simulator, learner)
    description = describe_run(args, device, compiled)
    run_dir = open_run(args, description, checkpoint)
    step, best, return_mean = 0, -math.inf, math.nan

    def policy() -> dict:
        settings = dataclasses.asdict(dataclasses.replace(args, resume=None))
        networks = {"actor": actor.state_dict(), "critics": critics.state_dict()}
        return {"args": settings, "step": step, "norm": env.norm.state_dict(), **networks}

    def save_checkpoint():
        content = policy() | logger.state_dict() | {"best": best, "return_mean": return_mean}
        content |= {"learner": learner.state_dict(), "replay": replay.state_dict()}
        content |= {"env": env.state_dict(), "rng": rng.bit_generator.state}
        save_file(run_dir / "checkpoint.pt", content | {"description": description})

    logger = Logger(args, run_dir, description, checkpoint)
    if checkpoint:
        step, best, return_mean = (checkpoint[k] for k in ("step", "best", "return_mean"))
        replay.load_state_dict(checkpoint["replay"])
        env.load_state_dict(checkpoint["env"], checkpoint["norm"], step)
        learner.load_state_dict(checkpoint["learner"])
        rng.bit_generator.state = checkpoint["rng"]
        checkpoint.clear()  # it holds the replay buffer a second time
    else:
        env.reset(step)
    replay.start(env.obs)
    first = "; compiling takes about a minute the first time" if compiled else ""
    print(f"{args.env_id} on {description['device']}, files in {run_dir}{first}", file=sys.stderr)
    if args.learning_starts >= args.total_timesteps:
        text = f"nothing is learned before --learning-starts {args.learning_starts}"
        print(f"warning: {text}", file=sys.stderr)

    with contextlib.closing(logger), StopSignals() as stop:
        while step < args.total_timesteps:
            learning = step >= args.learning_starts
            if learning:
                z = torch.randn(args.num_envs, env.act_dim, device=device)
                action = check_action(act(env.obs, z), step)  # a = tanh(mu + sigma z)
                for _ in range(args.updates_per_step):
                    learner.update(rng)  # D8
            else:
                action = 2 * torch.rand(args.num_envs, env.act_dim, device=device) - 1
            outcome = env.step(action, step)  # reward, terminated, truncated, final_obs
            replay.add(action, *outcome, env.obs, env.simulator.valid)
            metrics = learner.read_metrics(step) if learning else {}  # waits for the device
            step += 1
            last = step == args.total_timesteps

            if step % args.log_frequency == 0 or last:
                speed = logger.speed(step)
                metrics |= {"charts/SPS": speed, "charts/env_SPS": speed * args.num_envs}
                logger.log(step, env.episode_metrics() | metrics)
            if evaluator and (step % args.eval_frequency == 0 or last):
                returns, lengths = evaluator.run(step, run_dir / "videos" / f"step-{step:09d}.mp4")
                evaluation = evaluation_metrics(returns, lengths)
                logger.log(step, evaluation)
                return_mean = evaluation["eval/return_mean"]
                if return_mean > best:
                    best = return_mean
                    save_file(run_dir / "policy_best.pt", policy())
            if step % 10 == 0 or last:
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
