# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium==1.4.0",
#   "mujoco==4.0.0",
#   "numpy>=2.0,<3",
#   "tyro>=1.0.17",
#   "wandb>=0.26",
#   "tqdm>=4.66",
#   "psutil>=5.9",
#   "tensorboard>=2.18",
#   "imageio[ffmpeg]>=2.34",
# ]
# ///
"""MEow: maximum-entropy RL with an energy-based normalizing flow, for Gymnasium.

    python meow_continuous_action.py --env-id Ant-v4            # the paper's experiment
    python meow_continuous_action.py --resume runs/<run_name>   # go on
    python meow_continuous_action.py --evaluate runs/<run_name> --capture-video

Method: Chao et al., "Maximum Entropy Reinforcement Learning via Energy-Based
Normalizing Flow", NeurIPS 2024, arXiv 2405.13629. One conditional flow z = g(a|s) is
policy, soft Q and soft value at once. Its layers are split into linear ones, S_l, whose
Jacobian J does not depend on a, and the others, S_n. With p_z = N(0, I):

    Q(s,a)  = alpha (log p_z(z) + sum_{S_n} log|det J| + b(s))     soft Q: one flow pass
    V(s)    = alpha (-log Z(s) + b(s)),  Z(s) = prod_{S_l} |det J| soft value: no pass
    pi(a|s) = exp((Q(s,a) - V(s)) / alpha)                         the flow's density

so V(s) = alpha log int exp(Q(s,a)/alpha) da is an identity. (Mind the sign: with b = 0
the integral is 1/Z.) One loss replaces actor and critic: the batch mean of
sum_k (Q_k - y)^2 / 2 with y = r + gamma (1 - terminated) min_k V_k(s'), where Q_k and
V_k hold the shifts b_1 and b_2.

Symbols   code                  meaning
g(a|s)    EnergyFlow.to_latent  action to latent; `to_action` is its inverse
p_z       log_prior             standard normal
alpha     alpha                 temperature, reward units per nat
b_1, b_2  shifts                learnable reward shifts, nats (inside alpha, as theirs)
theta     theta                 all parameters in one vector; theta': target_theta
y         target                soft target, reward units
Shapes: B batch, A action, S observation, K shifts (2; 1 in ablations), P parameters.

Deviations from the authors' code (reasons: docs/deviations.md):
D1  One flow pass gives both Q_k; the twins share one dropout mask.
D2  V is computed without the flow: the same number.
D3  log_prob is log p_z plus all log-determinants; in their `sample` one has the wrong
    sign.
D4  No `autotune`: theirs changed a local variable that nothing read.
D5  No NaN masking: a loss, gradient or action that is not finite stops the run.
D6  Fresh evaluation seeds each time; the final policy is the result, not the best one.
D7  log(1 - a^2) is computed from u = atanh(a), which keeps its digits near |a| = 1.
D8  An update runs before the environment's step of its iteration.
D9  On CPU the dropout probability is rounded to 1/65536.
D10 In float64 actions are clamped to 1 - 1e-12 instead of 1 - 1e-5.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from harness import environments
from harness.args import RunArgs
from harness.compiling import flatten_parameters, function_of_parameters
from harness.files import load_network
from harness.machine import check_memory
from harness.runs import Run, Session, main

# --- Settings -------------------------------------------------------------------------
PAPER_SETTINGS = {  # defaults of these environments; all others get those of `Args`
    "Hopper-v[45]": dict(
        total_timesteps=1_500_000,
        tau=0.005,
        alpha=0.25,
        learning_starts=5_000,
    ),
    "HalfCheetah-v[45]": dict(
        total_timesteps=1_500_000,
        tau=0.003,
        alpha=0.25,
        learning_starts=10_000,
        log_sigma_max=2.0,
    ),
    "Walker2d-v[45]": dict(
        total_timesteps=4_000_000,
        tau=0.005,
        alpha=0.1,
        learning_starts=10_000,
    ),
    "Ant-v[45]": dict(
        total_timesteps=4_000_000,
        tau=0.0001,
        alpha=0.05,
        learning_starts=5_000,
    ),
    "Humanoid-v[45]": dict(
        total_timesteps=5_000_000,
        tau=0.0005,
        alpha=0.125,
        learning_starts=5_000,
    ),
    "multi_goal:MultiGoal.*": dict(
        total_timesteps=4_000,
        tau=0.0005,
        alpha=2.5,
        learning_starts=1_000,
        log_sigma_min=-2.0,
        log_sigma_max=1.0,
        gamma=0.9,
        eval_frequency=500,
    ),
}


@dataclass
class Args(RunArgs):
    exp_name: str = "meow_continuous_action"  # name of the experiment

    # Environment and evaluation
    env_kwargs: str = "{}"  # arguments of its constructor, as a JSON object
    flatten: bool = False  # flatten dictionaries and images to one vector
    max_episode_steps: int | None = None  # cap (default: the environment's, or 100,000)
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    eval_envs: int = 10  # environments that play them at a time; returns are the same
    deterministic_eval: bool = True  # evaluate g^-1(0|s), else draw from the policy

    # Algorithm
    learning_rate: float = 1e-3  # Adam's step size
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    alpha: float = 0.2  # temperature: reward units per nat of entropy
    log_sigma_min: float = -5.0  # lower bound of log sigma(s) of the linear layer
    log_sigma_max: float = -0.3  # upper bound of log sigma(s) of the linear layer
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay buffer
    learning_starts: int = 5_000  # random steps before the first of one update per step
    max_grad_norm: float = 30.0  # the gradient is scaled down to this norm
    dropout: float = 0.1  # probability in the couplings, in the update's Q pass only
    reward_shifting: Literal["clipped", "single", "none"] = "clipped"  # 2, 1, 0 b_k
    coupling: Literal["additive", "affine"] = "additive"  # x + t, or x exp(s) + t

    settings = PAPER_SETTINGS
    resume_may_change = RunArgs.resume_may_change + " eval_envs"
    evaluate_may_change = (
        RunArgs.evaluate_may_change
        + " eval_episodes eval_envs deterministic_eval max_episode_steps"
    )

    def __post_init__(self):
        super().__post_init__()
        environments.json_object("--env-kwargs", self.env_kwargs)
        counts = "batch_size buffer_size learning_starts eval_frequency eval_envs"
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check("eval_episodes", lambda x: x >= 0, "at least 0")
        if self.max_episode_steps is not None:
            self.check("max_episode_steps", lambda x: x >= 1, "at least 1")
        positive = "learning_rate alpha max_grad_norm"
        self.check(positive, lambda x: x > 0, "positive and finite")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self.check("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1")
        bounds = "log_sigma_min log_sigma_max"
        self.check(bounds, lambda x: -20 <= x <= 20, "from -20 to 20 (a logarithm)")
        above = "above --log-sigma-min"
        self.check("log_sigma_max", lambda x: x > self.log_sigma_min, above)


# --- Environment and evaluation -------------------------------------------------------
TRAINING, EVALUATION, NOISE = 0, 1, 2  # what a seed is for


def episode_seed(*key: int) -> int:
    """A seed below 2^31 from several numbers: the run's seed, its use, the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) % 2**31


def make_env(args: Args, render: bool = False) -> environments.ReplayableEnv:
    """The environment with actions in [-1, 1] and a time limit. Raises: UsageError."""
    options = json.loads(args.env_kwargs)
    env = environments.make(args.env_id, options, render)  # gym.make
    if args.flatten:
        env = environments.flatten(env, args.env_id)  # Gymnasium's wrapper
    own_limit = gym.spec(args.env_id.rpartition(":")[2]).max_episode_steps
    limit = args.max_episode_steps or own_limit or 100_000
    env = gym.wrappers.TimeLimit(env, limit)
    env = environments.check_spaces(env, args.env_id)
    one = env.action_space.dtype.type(1)
    env = gym.wrappers.RescaleAction(env, -one, one)
    return environments.ReplayableEnv(env, args.env_id)


def make_eval_envs(args: Args, session: Session) -> list[environments.ReplayableEnv]:
    """The environments that play an evaluation; the first one can be filmed."""
    count = min(args.eval_envs, args.eval_episodes)
    renders = [args.capture_video and i == 0 for i in range(count)]
    return [session.closing(make_env(args, render)) for render in renders]


def evaluate(
    args: Args,
    envs: list[environments.ReplayableEnv],
    policy,
    step: int,
    session: Session,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of --eval-episodes new episodes: --seed and `step` seed them.

    policy(obs (n, S), z (n, A)) -> actions (n, A). Episode i is row i, whichever of
    `envs` plays it, so that the returns don't depend on their number.
    """
    n = args.eval_episodes
    returns, lengths = [0.0] * n, [0] * n
    if n == 0:
        return returns, lengths
    obs = np.zeros((n, *envs[0].observation_space.shape), np.float32)
    z = np.zeros((n, *envs[0].action_space.shape), np.float32)
    with session.evaluation(envs[0].metadata.get("render_fps", 30)) as watch:
        for first in range(0, n, len(envs)):
            rng = np.random.default_rng(episode_seed(args.seed, NOISE, step))
            playing = dict(zip(range(first, n), envs, strict=False))
            for i, env in playing.items():
                obs[i], _ = env.reset(seed=episode_seed(args.seed, EVALUATION, step, i))
            while playing:
                watch.step(f"evaluation: episodes of {lengths} steps so far")
                if 0 in playing:
                    watch.film(envs[0])
                if not args.deterministic_eval:
                    rng.standard_normal(out=z, dtype=np.float32)
                action = policy(obs, z)
                for i, env in list(playing.items()):
                    obs[i], reward, terminated, truncated, _ = env.step(action[i])
                    returns[i] += reward
                    lengths[i] += 1
                    if terminated or truncated:
                        del playing[i]
    return returns, lengths


# --- Replay buffer --------------------------------------------------------------------
class ReplayBuffer:
    """Ring of rows obs | action | next_obs | reward | terminated, on the device.

    Time-outs are stored with terminated = 0: the target bootstraps through them.
    `batch` (B, row) is the tensor that every sample fills.
    """

    def __init__(
        self, capacity: int, obs_dim: int, act_dim: int, batch_size: int, device
    ):
        widths = [obs_dim, act_dim, obs_dim, 1, 1]
        size = 4 * capacity * sum(widths)
        what = f"--buffer-size {capacity}: the replay buffer"
        check_memory(what, size, torch.device(device))
        self.capacity, self.added = capacity, 0
        self.rows = torch.empty(capacity, sum(widths), device=device)
        self.row = torch.empty(sum(widths), pin_memory=self.rows.is_cuda)
        self.parts = np.split(self.row.numpy(), np.cumsum(widths)[:-1])
        self.batch = torch.zeros(batch_size, sum(widths), device=device)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *transition):
        """Stores obs (S,), action (A,), next_obs (S,), reward, terminated."""
        for part, value in zip(self.parts, transition, strict=True):
            part[:] = value
        self.rows[self.added % self.capacity].copy_(self.row)
        self.added += 1

    def sample(self, rng: np.random.Generator) -> Tensor:
        """`batch` (B, row), filled with transitions drawn with replacement."""
        index = torch.from_numpy(rng.integers(0, len(self), len(self.batch)))
        index = index.to(self.rows.device)
        return torch.index_select(self.rows, 0, index, out=self.batch)

    def state_dict(self) -> dict:
        # by way of NumPy, or torch saves all rows
        filled = self.rows[: len(self)].cpu().numpy()
        return {"added": self.added, "rows": torch.from_numpy(filled)}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.rows[: len(self)].copy_(state["rows"])


def split_batch(batch: Tensor, obs_dim: int, act_dim: int) -> tuple[Tensor, ...]:
    """(B, row) -> obs, action, next_obs (B, ...), reward, terminated (B,)."""
    widths = [obs_dim, act_dim, obs_dim, 1, 1]
    obs, action, next_obs, reward, terminated = batch.split(widths, dim=-1)
    return obs, action, next_obs, reward[:, 0], terminated[:, 0]


# --- Networks -------------------------------------------------------------------------
Triple = tuple[Tensor, Tensor, Tensor]


class Swish(nn.Module):
    """x sigmoid(beta x), one learnable beta per unit, initially 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class MLP(nn.Module):
    """in -> hidden -> hidden -> out; hidden: linear, LayerNorm, swish, dropout.

    Weights start orthogonal or, with `zero`, at 0; biases at PyTorch's default.
    """

    def __init__(
        self,
        dims: list[int],
        zero: bool = False,
        norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = dims[1:-1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))
        self.norms = nn.ModuleList(
            nn.LayerNorm(d) if norm else nn.Identity() for d in hidden
        )
        self.swishes = nn.ModuleList(Swish(d) for d in hidden)
        self.dropout = dropout
        for layer in self.layers:
            if zero:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x (B, in) -> (B, out). kept (2, B, hidden) bool: not dropped (None: all)."""
        for i, (norm, swish) in enumerate(zip(self.norms, self.swishes, strict=True)):
            x = swish(norm(self.layers[i](x)))
            if kept is not None:
                x = torch.where(kept[i], x / (1 - self.dropout), 0.0)
        return self.layers[-1](x)


class EnergyFlow(nn.Module):
    """The conditional flow that is policy, soft Q and soft value at once (MEow).

    From action to latent: u = atanh(a) and four additive couplings with alternating
    masks (the non-linear layers), then z = x / sigma(s) (the linear layer). For any
    action dimension and float dtype.
    """

    n_couplings, hidden = 4, 64
    outputs = 1  # numbers per action that a coupling's network gives: t

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.log_sigma_min, self.log_sigma_max = args.log_sigma_min, args.log_sigma_max
        hidden = [self.hidden, self.hidden]
        dims = [act_dim + obs_dim, *hidden, self.outputs * act_dim]
        self.t = nn.ModuleList(
            MLP(dims, norm=True, dropout=args.dropout) for _ in range(self.n_couplings)
        )
        n_shifts = ("none", "single", "clipped").index(args.reward_shifting)
        self.b = nn.ModuleList(
            MLP([obs_dim, 256, 256, 1], zero=True) for _ in range(n_shifts)
        )
        self.h = MLP([obs_dim, *hidden, act_dim], zero=True)
        self.register_buffer("alpha", torch.tensor(float(args.alpha)))
        mask = (torch.arange(act_dim) % 2 == 0).float()
        self.register_buffer("masks", torch.stack([mask, 1 - mask]))

    # the layers
    def log_sigma(self, obs: Tensor) -> Tensor:
        """log sigma(s) of the linear layer, in its bounds. (B, S) -> (B, A), nats."""
        half_range = 0.5 * (self.log_sigma_max - self.log_sigma_min)
        return self.log_sigma_min + half_range * (torch.tanh(self.h(obs)) + 1)

    def coupling_output(self, i: int, x: Tensor, obs: Tensor, kept: Tensor | None):
        """What the network of coupling i makes of m*x and s. -> (B, outputs * A)."""
        inputs = torch.cat([self.masks[i % 2] * x, obs], dim=-1)
        return self.t[i](inputs, None if kept is None else kept[i])

    def translation(self, i: int, x: Tensor, obs: Tensor, kept: Tensor | None = None):
        """(1 - m) t_i(m*x, s) of coupling i: zero where its mask m is 1. -> (B, A)."""
        return (1 - self.masks[i % 2]) * self.coupling_output(i, x, obs, kept)

    def to_prior(
        self, u: Tensor, log_det: Tensor, obs: Tensor, kept: Tensor | None = None
    ):
        """The couplings from u to x, (B, A); adds log|det dx/du|, (B,), to log_det."""
        x = u
        for i in reversed(range(self.n_couplings)):
            x = x - self.translation(i, x, obs, kept)
            log_det = log_det - torch.zeros_like(x).sum(-1)  # 0: their volume is 1
        return x, log_det

    def from_prior(self, x: Tensor, log_det: Tensor, obs: Tensor):
        """The couplings from x to u, (B, A); adds log|det du/dx|, (B,), to log_det."""
        u = x
        for i in range(self.n_couplings):
            u = u + self.translation(i, u, obs)
            log_det = log_det + torch.zeros_like(u).sum(-1)  # 0: their volume is 1
        return u, log_det

    # the flow and its inverse
    def to_latent(
        self, obs: Tensor, action: Tensor, kept: Tensor | None = None
    ) -> Triple:
        """z = g(a|s), and log|det dz/da| of the non-linear and of the linear layers.

        obs (B, S), action (B, A) in [-1, 1], kept (4, 2, B, 64): the units that dropout
        keeps (None: all) -> z (B, A), (B,), (B,) in nats.
        """
        limit = 1 - (1e-12 if action.dtype == torch.float64 else 1e-5)  # D10
        u = torch.atanh(action.clamp(-limit, limit))
        log_det_nonlinear = -log_tanh_slope(u).sum(-1)
        x, log_det_nonlinear = self.to_prior(u, log_det_nonlinear, obs, kept)
        log_sigma = self.log_sigma(obs)
        z = x * torch.exp(-log_sigma)
        return z, log_det_nonlinear, -log_sigma.sum(-1)

    def to_action(self, obs: Tensor, z: Tensor) -> Triple:
        """a = g^-1(z|s), and log|det da/dz| of the non-linear and of the linear layers.

        obs (B, S), z (B, A) -> action (B, A), (B,), (B,) in nats.
        """
        log_sigma = self.log_sigma(obs)
        x = z * torch.exp(log_sigma)
        u, log_det_nonlinear = self.from_prior(x, torch.zeros_like(z[:, 0]), obs)
        log_det_nonlinear = log_det_nonlinear + log_tanh_slope(u).sum(-1)
        return torch.tanh(u), log_det_nonlinear, log_sigma.sum(-1)

    # soft Q, soft value and policy
    def shifts(self, obs: Tensor) -> Tensor:
        """Learnable reward shifts b_k(s). obs (B, S) -> (B, K), nats."""
        if len(self.b) == 0:
            return torch.zeros_like(obs[:, :1])
        return torch.cat([b(obs) for b in self.b], dim=-1)

    def q_values(
        self, obs: Tensor, action: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Q_k(s,a) = alpha (log p_z(z) + log|det J_n| + b_k(s)). -> (B, K)  # D1"""
        z, log_det_nonlinear, _ = self.to_latent(obs, action, kept)
        return self.alpha * (
            (log_prior(z) + log_det_nonlinear)[:, None] + self.shifts(obs)
        )

    def soft_values(self, obs: Tensor) -> Tensor:
        """V_k(s) = alpha (-log Z(s) + b_k(s)). obs (B, S) -> (B, K), reward units  # D2

        Z = prod |det J_l| = prod 1/sigma_i, and int exp(Q_k/alpha) da = exp(b_k) / Z.
        """
        log_z = -self.log_sigma(obs).sum(-1)
        return self.alpha * (-log_z[:, None] + self.shifts(obs))

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a|s) = log p_z(z) + log|det J_n| + log|det J_l|. -> (B,)  # D3"""
        z, log_det_nonlinear, log_det_linear = self.to_latent(obs, action)
        return log_prior(z) + log_det_nonlinear + log_det_linear

    def sample(self, obs: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a = g^-1(z|s) ~ pi(.|s), z ~ N(0, I), and log pi(a|s). -> (B, A), (B,)."""
        if z is None:
            z = obs.new_empty(len(obs), self.act_dim).normal_()
        action, log_det_nonlinear, log_det_linear = self.to_action(obs, z)
        return action, log_prior(z) - log_det_nonlinear - log_det_linear

    def mode_action(self, obs: Tensor) -> Tensor:
        """g^-1(0|s), the mode of the density before tanh, not argmax_a Q. -> (B, A)."""
        return self.sample(obs, obs.new_zeros(len(obs), self.act_dim))[0]


class AffineEnergyFlow(EnergyFlow):
    """The paper's ablation: affine couplings x exp(s) + t, of volume exp(sum s)."""

    outputs = 2  # s and t

    def scale_and_translation(
        self, i: int, x: Tensor, obs: Tensor, kept: Tensor | None = None
    ):
        """s and t of coupling i, (B, A) each: zero where its mask is 1."""
        scale, t = self.coupling_output(i, x, obs, kept).chunk(2, dim=-1)
        free = 1 - self.masks[i % 2]
        return free * scale, free * t

    def to_prior(
        self, u: Tensor, log_det: Tensor, obs: Tensor, kept: Tensor | None = None
    ):
        """The couplings from u to x; adds log|det dx/du| = -sum s to log_det."""
        x = u
        for i in reversed(range(self.n_couplings)):
            scale, t = self.scale_and_translation(i, x, obs, kept)
            x = (x - t) * torch.exp(-scale)
            log_det = log_det - scale.sum(-1)
        return x, log_det

    def from_prior(self, x: Tensor, log_det: Tensor, obs: Tensor):
        """The couplings from x to u; adds log|det du/dx| = sum s to log_det."""
        u = x
        for i in range(self.n_couplings):
            scale, t = self.scale_and_translation(i, u, obs)
            u = u * torch.exp(scale) + t
            log_det = log_det + scale.sum(-1)
        return u, log_det


def log_prior(z: Tensor) -> Tensor:
    """log p_z(z) of the standard normal. z (B, A) -> (B,)."""
    return -0.5 * (z * z).sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def log_tanh_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2), elementwise, no cancellation.  # D7"""
    return 2 * (math.log(2) - u - softplus(-2 * u))


def make_flow(args: Args, obs_dim: int, act_dim: int) -> EnergyFlow:
    """The flow of these settings; no parameter needs a gradient outside the update."""
    torch.manual_seed(args.seed)
    kind = AffineEnergyFlow if args.coupling == "affine" else EnergyFlow
    return kind(obs_dim, act_dim, args).requires_grad_(False)


def draw_dropout(kept: Tensor, dropout: float, rng: np.random.Generator):
    """Draws which units dropout keeps. kept (...) bool; a multiple of 4 units.

    On CPU 16 random bits a unit: many times faster than a float, to 1/65536.  # D9
    """
    if dropout == 0:
        return
    if kept.is_cuda:
        kept.bernoulli_(1 - dropout)
        return
    bits = rng.integers(0, 2**64, kept.numel() // 4, dtype=np.uint64).view(np.uint16)
    threshold = round(dropout * 2**16)
    np.greater_equal(bits.reshape(kept.shape), threshold, out=kept.numpy())


# --- Target, loss and update ----------------------------------------------------------
def soft_target(
    reward: Tensor, terminated: Tensor, v_next: Tensor, gamma: float
) -> Tensor:
    """y = r + gamma (1 - terminated) min_k V_k(s'). (B,), (B,), (B, K) -> (B,)."""
    return reward + gamma * (1 - terminated) * v_next.min(-1).values


def meow_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of sum_k (Q_k - y)^2 / 2. q (B, K), target (B,) -> ()."""
    return 0.5 * (q - target[:, None]).square().sum(-1).mean()


def clip_gradient(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales grad (P,) to at most max_norm; also returns the norm before, ()."""
    norm = torch.linalg.vector_norm(grad)
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


def adam_moments(theta: Tensor) -> list[Tensor]:
    """m (P,), v (P,) and (beta1^0, beta2^0) before the first step of Adam."""
    zeros = torch.zeros_like(theta)
    return [zeros, zeros.clone(), theta.new_ones(2, dtype=torch.float64)]


def adam(
    theta: Tensor, m: Tensor, v: Tensor, decay: Tensor, grad: Tensor, lr: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of Adam (Kingma and Ba, algorithm 1); decay (2,): beta1^t, beta2^t."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    decay = torch.stack([beta1 * decay[0], beta2 * decay[1]])
    m_hat = m / (1 - decay[0]).to(m.dtype)
    v_hat = v / (1 - decay[1]).to(v.dtype)
    return theta - lr * m_hat / (torch.sqrt(v_hat) + eps), m, v, decay


METRICS = [
    "losses/loss",
    "losses/grad_norm",
    "flow/q",
    "flow/v_next",
    "flow/target",
    "flow/shift_gap",
]


def make_update(flow: EnergyFlow, args: Args):
    """update(theta, theta', m, v, decay, batch, kept) -> METRICS (6,), a pure function
    but that it changes the first five in place; it is compiled as a whole."""
    q_values = function_of_parameters(flow.q_values)
    soft_values = function_of_parameters(flow.soft_values)

    def loss_and_q(theta, obs, action, target, kept):
        q = q_values(theta, obs, action, kept)  # Q_k(s,a)  (B, K)
        return meow_loss(q, target), q

    def update(theta, target_theta, m, v, decay, batch, kept=None):
        parts = split_batch(batch, flow.obs_dim, flow.act_dim)
        obs, action, next_obs, reward, terminated = parts
        v_next = soft_values(target_theta, next_obs)  # V_k(s'), theta'  (B, K)
        target = soft_target(reward, terminated, v_next, args.gamma)  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target, kept)
        grad, grad_norm = clip_gradient(grad, args.max_grad_norm)
        new_theta, *moments = adam(theta, m, v, decay, grad, args.learning_rate)
        averaged = (1 - args.tau) * target_theta + args.tau * new_theta  # new theta'
        new = (new_theta, averaged, *moments)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        shift_gap = (q[:, 0] - q[:, -1]).abs().mean()  # alpha |b_1 - b_2|
        means = q.mean(), v_next.mean(), target.mean(), shift_gap
        return torch.stack([loss, grad_norm, *means])

    return update


# --- Training -------------------------------------------------------------------------
def make_policy(network, theta: Tensor, n: int, run: Run, name: str):
    """policy(obs (n, S), z (n, A)) -> actions (n, A): `network.sample`, compiled."""
    widths = [network.obs_dim, network.act_dim]
    inputs = torch.zeros(n, sum(widths), device=run.device)
    obs_in, z_in = inputs.split(widths, dim=-1)
    sample = function_of_parameters(network.sample)
    draw = run.compile(name, lambda *x: sample(*x)[0], theta, obs_in, z_in)

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        obs_in.copy_(torch.from_numpy(obs))
        z_in.copy_(torch.from_numpy(z))
        return draw().cpu().numpy()

    return policy


def train(args: Args, run: Run):
    """Trains the flow, from the run's checkpoint if it has one."""
    rng = np.random.default_rng(args.seed)  # exploration, replay and dropout
    env = run.closing(make_env(args))
    eval_envs = make_eval_envs(args, run)
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = ReplayBuffer(capacity, *env.sizes, args.batch_size, run.device)
    flow = make_flow(args, *env.sizes).to(run.device)
    theta = flatten_parameters(flow)  # the flow's parameters are views of it
    learner = [theta, theta.clone(), *adam_moments(theta)]  # theta, theta', m, v, decay
    shape = (flow.n_couplings, 2, args.batch_size, flow.hidden)  # 2 hidden layers each
    kept = torch.ones(shape, dtype=torch.bool, device=run.device)
    update = make_update(flow, args)
    update = run.compile("the update", update, *learner, replay.batch, kept)
    act = make_policy(flow, theta, 1, run, "acting")
    eval_policy = make_policy(flow, theta, args.eval_episodes, run, "evaluation")
    parts = {"env": env, "learner": learner, "replay": replay}
    run.start({"flow": flow}, rng, env.sizes, **parts)

    done = True
    for step in run.steps():
        if run.due(args.eval_frequency):
            run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))
        if done:  # a resumed run is brought back to where its episode was
            seed = episode_seed(args.seed, TRAINING, env.episode_count)
            obs, _ = env.reset(seed=seed)
        learning = step >= args.learning_starts
        if not learning:
            action = rng.uniform(-1, 1, flow.act_dim).astype(np.float32)
        else:
            z = rng.standard_normal((1, flow.act_dim), dtype=np.float32)
            action = act(obs[None], z)[0]  # a = g^-1(z|s), z ~ N(0, I)
            replay.sample(rng)
            draw_dropout(kept, args.dropout, rng)
            values = update()  # D8: on a GPU it runs beside the environment's step
        next_obs, reward, terminated, truncated, info = env.step(action)
        replay.add(obs, action, next_obs, reward, terminated)
        obs, done = next_obs, terminated or truncated
        if done:
            run.log_episode(info["episode"])
        run.log(dict(zip(METRICS, values.tolist(), strict=True)) if learning else {})
        run.end_step()
    step = args.total_timesteps
    run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))


def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy, on the CPU."""
    envs = make_eval_envs(args, session)
    environments.check_sizes(saved, envs[0].sizes, args.env_id)
    flow = make_flow(args, *saved["sizes"])
    load_network(flow, saved, "flow")

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        return flow.sample(torch.from_numpy(obs), torch.from_numpy(z))[0].numpy()

    return evaluate(args, envs, policy, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
