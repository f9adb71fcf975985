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
"""MEow without tuning: rewards in their own unit, one setting for every task.

    python meow_auto_continuous_action.py --env-id Ant-v4            # any environment
    python meow_auto_continuous_action.py --resume runs/<run_name>   # go on
    python meow_auto_continuous_action.py --evaluate runs/<run_name> --capture-video

In MEow (meow_continuous_action.py; Chao et al., NeurIPS 2024) alpha multiplies the
flow's whole log-density: whoever moves alpha moves Q. Here Q is written without it.
For u = atanh(a), additive couplings x = g(u|s), of volume 1, and networks m(s),
kappa(s) > 0:

    Q(s,a) = m(s) - 1/2 sum_i kappa_i(s) x_i^2 - alpha sum_i log(1 - tanh(u_i)^2)
    V(s)   = m(s) + alpha/2 sum_i log(2 pi alpha / kappa_i(s))
    policy:  u = g^-1(sigma z|s), z ~ N(0, I), sigma_i(s) = sqrt(alpha / kappa_i(s))

Since da = prod_i (1 - tanh(u_i)^2) du and du = dx, the last term of Q cancels in

    alpha log int exp(Q/alpha) da = m + alpha log int exp(-kappa x^2 / (2 alpha)) dx

which is a Gaussian integral: V is the soft value of Q, exactly, at EVERY alpha, and
pi(a|s) = exp((Q - V)/alpha) is the density of tanh(u). (In MEow a network gives sigma,
and kappa = alpha/sigma^2 follows; here it is the other way round.) When alpha moves, m
and g stay, kappa but for its floor; the policy widens or narrows. So alpha may move at
any time. SAC's rule (--autotune) holds the entropy at a target H; where it was tried Q
then knew little of actions, mostly at a small alpha (studies/temperature/details.md):

    log alpha <- log alpha + eta e,   e = H + log pi(a|s) / A, within +-1

Alpha needn't move where rewards are measured in a unit of their own: with the mean and
the standard deviation of all rewards so far, and A action dimensions,

    r <- r / max(std(r), |mean(r)| / 10),   alpha = rho / A

Then the policy's noise costs Q sum_i kappa_i sigma_i^2 / 2 = rho / 2 of this unit, on
average, in each state of every task (less where the tanh term gives some back). One
loss trains everything, the batch mean of

    w (Q - y)^2 / 2,   y = r + gamma (1 - terminated) V(s')
    w = 1 where y <= Q, else exp((4 - d) / 2) from 0.02 to 1,   d = |x / sigma|^2 / A

Q is quadratic: far from the policy it falls faster than actions lose their worth.
Fitted there, it would lift V(s) above what the policy gets. So a far action that is
worth more than Q says weighs little, one that is worth less in full. The loss's Q has
dropout in g, which lowers it by about 1/2 sum_i kappa_i Var(x_i) and raises d; V and
the policy are computed without. An Ant learned little without the weights, and little
without dropout (studies/temperature).

Far actions hardly pull the policy toward what is better, and many that are kept are
far: half of each batch is of the newest transitions. Adam's steps move the mode in and
out of its gait: theta chooses the actions of training, its average is evaluated and
saved,

    theta_bar <- (1 - b) theta_bar + b theta

Symbols   code               meaning
g(u|s)    EnergyFlow.to_x    u to x by four couplings; `to_u` is its inverse
r         reward             in units of `reward_unit`, as all that follows
m         EnergyFlow.m       Q of the mode x = 0, but for its tanh term
kappa     EnergyFlow.kappa   curvature: kappa_0 exp(10 tanh(h/10)) + alpha / sigma_max^2
alpha     EnergyFlow.alpha   temperature, units per nat; rho: args.temperature
H, eta    follow_entropy     with --autotune: target of the entropy, step of log alpha
d         q_and_distance     squared distance: about 1 for the policy's own actions
w         far_weight         weight of a transition; gets no gradient
theta     theta              all parameters in one vector; theta': target_theta
          theta_bar          average of theta at rate b: the policy evaluated and saved
y         target             soft target, with theta'
Shapes: B batch, A action, S observation, P parameters.

What differs from meow_continuous_action.py besides: one m, where MEow takes the smaller
of two V_k; observations are normalised; m and h have LayerNorm and orthogonal hidden
layers too; the couplings' last layers start at zero, so that g is the identity; the
replay buffer keeps u, of which nothing is cut off; tau is 0.01, sigma at most 0.4.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise

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
BUDGETS = {  # the paper's numbers of steps; all else is the same for these five tasks
    "Hopper-v[45]": dict(total_timesteps=1_500_000),
    "HalfCheetah-v[45]": dict(total_timesteps=1_500_000),
    "Walker2d-v[45]": dict(total_timesteps=4_000_000),
    "Ant-v[45]": dict(total_timesteps=4_000_000),
    "Humanoid-v[45]": dict(total_timesteps=5_000_000),
    "multi_goal:MultiGoal.*": dict(
        total_timesteps=4_000,
        learning_starts=1_000,
        gamma=0.9,
        eval_frequency=500,
    ),
}


@dataclass
class Args(RunArgs):
    exp_name: str = "meow_auto_continuous_action"  # name of the experiment

    # Environment and evaluation
    env_kwargs: str = "{}"  # arguments of its constructor, as a JSON object
    flatten: bool = False  # flatten dictionaries and images to one vector
    max_episode_steps: int | None = None  # cap (default: the environment's, or 100,000)
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    eval_envs: int = 10  # environments that play them at a time; returns are the same
    deterministic_eval: bool = True  # play tanh g^-1(0|s), else draw from the policy

    # Algorithm
    learning_rate: float = 1e-3  # Adam's step size
    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    temperature: float = 0.48  # rho = alpha A, A action dimensions; units per nat
    autotune: bool = False  # move alpha, for the entropy below
    target_entropy: float = -0.65  # with --autotune: nats per action dimension
    alpha_lr: float = 1e-3  # with --autotune: eta, the largest step of log alpha
    sigma_start: float = 0.22  # standard deviation of u at the start
    sigma_max: float = 0.4  # upper bound of sigma(s), the standard deviation of x
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay buffer
    recent_size: int = 10_000  # half of a batch is of this many newest (0: none)
    learning_starts: int = 5_000  # random steps before the first of one update per step
    max_grad_norm: float = 30.0  # the gradient is scaled down to this norm
    dropout: float = 0.1  # probability in the couplings, in the update's Q pass only
    policy_average: float = 1e-3  # b: an average over about 1 / b steps is evaluated

    settings = BUDGETS
    settings_name = "the paper's number of steps"
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
        self.check("eval_episodes recent_size", lambda x: x >= 0, "at least 0")
        if self.max_episode_steps is not None:
            self.check("max_episode_steps", lambda x: x >= 1, "at least 1")
        positive = "learning_rate max_grad_norm"
        self.check(positive, lambda x: x > 0, "positive and finite")
        sizes = "temperature sigma_start sigma_max"
        self.check(sizes, lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6")
        self.check("alpha_lr", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        averages = "tau policy_average"
        self.check(averages, lambda x: 0 < x <= 1, "above 0 and at most 1")
        self.check("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1")
        self.check("target_entropy", lambda x: -100 <= x <= 0, "from -100 to 0")
        below = f"below --sigma-max, {self.sigma_max}"
        self.check("sigma_start", lambda x: x < self.sigma_max, below)


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


class RunningMeanStd:
    """Running mean and variance (D,) of vectors, each counted once."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        zeros = torch.zeros(dim, dtype=torch.float64, device=device)
        self.mean, self.var, self.count = zeros, zeros + 1, zeros[:1].clone()

    def update(self, x: Tensor):
        """Adds vectors (N, D) (Chan et al., parallel variance)."""
        n, x = len(x), x.double()
        delta, total = x.mean(0) - self.mean, self.count + n
        squares = self.count * self.var + n * x.var(0, correction=0)
        squares += delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., D) with mean 0, variance 1, clipped to +-5 as MEow's authors do."""
        scaled = (x - self.mean) / torch.sqrt(self.var + 1e-8)
        return scaled.clamp(-5, 5).to(x.dtype)

    def normalise(self, batch: Tensor, obs_dim: int, act_dim: int):
        """Normalises both observations of each row of a batch (B, row), in place."""
        obs, _, next_obs, _, _ = split_batch(batch, obs_dim, act_dim)
        obs.copy_(self(obs))
        next_obs.copy_(self(next_obs))

    def state_dict(self) -> dict:
        return {name: value.cpu() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict):
        for name, value in vars(self).items():
            value.copy_(state[name])


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


class RecentReplayBuffer(ReplayBuffer):
    """Half of each batch is of the newest transitions, whose actions Q must know best.

    Compare Wang and Ross, "Boosting Soft Actor-Critic: Emphasizing Recent Experience
    without Forgetting the Past" (2019).
    """

    def __init__(self, recent_size: int, *sizes):
        super().__init__(*sizes)
        self.recent_size = recent_size

    def sample(self, rng: np.random.Generator) -> Tensor:
        """`batch` (B, row): half of it drawn from the newest `recent_size` ones."""
        if self.recent_size == 0:
            return super().sample(rng)
        newest = np.full(len(self.batch), len(self))  # how many each is drawn from
        newest[: len(newest) // 2] = min(self.recent_size, len(self))
        age = rng.integers(0, newest)
        index = torch.from_numpy((self.added - 1 - age) % self.capacity)
        index = index.to(self.rows.device)
        return torch.index_select(self.rows, 0, index, out=self.batch)


def split_batch(batch: Tensor, obs_dim: int, act_dim: int) -> tuple[Tensor, ...]:
    """(B, row) -> obs, action, next_obs (B, ...), reward, terminated (B,)."""
    widths = [obs_dim, act_dim, obs_dim, 1, 1]
    obs, action, next_obs, reward, terminated = batch.split(widths, dim=-1)
    return obs, action, next_obs, reward[:, 0], terminated[:, 0]


# --- Networks -------------------------------------------------------------------------
class Swish(nn.Module):
    """x sigmoid(beta x), one learnable beta per unit, initially 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class MLP(nn.Module):
    """in -> hidden -> hidden -> out; hidden: linear, LayerNorm, swish, dropout.

    Hidden weights start orthogonal, their biases at PyTorch's default, the last layer
    at 0, and so does the output.
    """

    def __init__(self, dims: list[int], dropout: float = 0.0):
        super().__init__()
        hidden = dims[1:-1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in hidden)
        self.swishes = nn.ModuleList(Swish(d) for d in hidden)
        self.dropout = dropout
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x (B, in) -> (B, out). kept (2, B, hidden) bool: not dropped (None: all)."""
        for i, (norm, swish) in enumerate(zip(self.norms, self.swishes, strict=True)):
            x = swish(norm(self.layers[i](x)))
            if kept is not None:
                x = torch.where(kept[i], x / (1 - self.dropout), 0.0)
        return self.layers[-1](x)


class EnergyFlow(nn.Module):
    """The conditional flow that is policy, soft Q and soft value at any temperature.

    Actions are given and returned before tanh, as u; densities are those of tanh(u).
    """

    n_couplings, hidden = 4, 64

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim
        hidden = [self.hidden, self.hidden]
        dims = [act_dim + obs_dim, *hidden, act_dim]
        self.t = nn.ModuleList(
            MLP(dims, dropout=args.dropout) for _ in range(self.n_couplings)
        )
        self.m = MLP([obs_dim, 256, 256, 1])
        self.h = MLP([obs_dim, *hidden, act_dim])
        self.sigma_max = args.sigma_max
        alpha = args.temperature / act_dim
        # kappa at the start, so that sigma = sqrt(alpha / kappa) is --sigma-start
        kappa = alpha / args.sigma_start**2 - alpha / args.sigma_max**2
        self.log_kappa_start = math.log(kappa)
        self.register_buffer("alpha", torch.tensor(alpha))
        mask = (torch.arange(act_dim) % 2 == 0).float()
        self.register_buffer("masks", torch.stack([mask, 1 - mask]))

    # the layers
    def kappa(self, obs: Tensor) -> Tensor:
        """kappa_0 exp(10 tanh(h(s) / 10)) + alpha / sigma_max^2. (B, S) -> (B, A).

        The first term stays within e^-10 and e^10 times kappa_0, its start; the second
        one keeps sigma <= sigma_max.
        """
        log_kappa = self.log_kappa_start + 10 * torch.tanh(self.h(obs) / 10)
        return torch.exp(log_kappa) + self.alpha / self.sigma_max**2

    def translation(self, i: int, x: Tensor, obs: Tensor, kept: Tensor | None = None):
        """(1 - mask) t_i(mask*x, s) of coupling i: zero where mask is 1. -> (B, A)."""
        mask = self.masks[i % 2]
        inputs = torch.cat([mask * x, obs], dim=-1)
        return (1 - mask) * self.t[i](inputs, None if kept is None else kept[i])

    def to_x(self, u: Tensor, obs: Tensor, kept: Tensor | None = None) -> Tensor:
        """x = g(u|s), of volume 1. kept (4, 2, B, 64): not dropped. -> (B, A)."""
        x = u
        for i in reversed(range(self.n_couplings)):
            x = x - self.translation(i, x, obs, kept)
        return x

    def to_u(self, x: Tensor, obs: Tensor) -> Tensor:
        """u = g^-1(x|s), of volume 1. -> (B, A)."""
        u = x
        for i in range(self.n_couplings):
            u = u + self.translation(i, u, obs)
        return u

    # soft Q, soft value and policy
    def q_values(self, obs: Tensor, u: Tensor) -> Tensor:
        """Q = m - 1/2 sum kappa x^2 - alpha sum log(1 - tanh(u)^2). -> (B,)."""
        return self.q_and_distance(obs, u)[0]

    def q_and_distance(self, obs: Tensor, u: Tensor, kept: Tensor | None = None):
        """Q(s,a), and d = |x / sigma|^2 / A of the action. -> (B,), (B,)."""
        x = self.to_x(u, obs, kept)
        energy = 0.5 * (self.kappa(obs) * x * x).sum(-1)
        squash = self.alpha * log_tanh_slope(u).sum(-1)
        q = self.m(obs)[:, 0] - energy - squash
        return q, 2 * energy / (self.alpha * self.act_dim)

    def soft_values(self, obs: Tensor) -> Tensor:
        """V(s) = m(s) + alpha/2 sum_i log(2 pi alpha / kappa_i(s)). -> (B,)."""
        log_z = 0.5 * torch.log(2 * math.pi * self.alpha / self.kappa(obs)).sum(-1)
        return self.m(obs)[:, 0] + self.alpha * log_z

    def log_sigma(self, obs: Tensor) -> Tensor:
        """Of sigma_i(s) = sqrt(alpha / kappa_i(s)). -> (B, A)."""
        return 0.5 * torch.log(self.alpha / self.kappa(obs))

    def log_prob(self, obs: Tensor, u: Tensor) -> Tensor:
        """log pi(a|s) = log N(x; 0, sigma^2) - sum log(1 - tanh(u)^2). -> (B,)."""
        log_sigma = self.log_sigma(obs)
        z = self.to_x(u, obs) * torch.exp(-log_sigma)
        return log_prior(z) - log_sigma.sum(-1) - log_tanh_slope(u).sum(-1)

    def sample(self, obs: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u = g^-1(sigma z|s), z ~ N(0, I), and log pi(tanh u|s). -> (B, A), (B,)."""
        if z is None:
            z = obs.new_empty(len(obs), self.act_dim).normal_()
        log_sigma = self.log_sigma(obs)
        u = self.to_u(z * torch.exp(log_sigma), obs)
        return u, log_prior(z) - log_sigma.sum(-1) - log_tanh_slope(u).sum(-1)

    def mode_action(self, obs: Tensor) -> Tensor:
        """tanh g^-1(0|s), the mode of the density before tanh. -> (B, A)."""
        return torch.tanh(self.sample(obs, obs.new_zeros(len(obs), self.act_dim))[0])


def log_prior(z: Tensor) -> Tensor:
    """log p_z(z) of the standard normal. z (B, A) -> (B,)."""
    return -0.5 * (z * z).sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def log_tanh_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2), elementwise, no cancellation."""
    return 2 * (math.log(2) - u - softplus(-2 * u))


def make_flow(args: Args, obs_dim: int, act_dim: int) -> EnergyFlow:
    """The flow of these settings; no parameter needs a gradient outside the update."""
    torch.manual_seed(args.seed)
    return EnergyFlow(obs_dim, act_dim, args).requires_grad_(False)


def draw_dropout(kept: Tensor, dropout: float, rng: np.random.Generator):
    """Draws which units dropout keeps. kept (...) bool; a multiple of 4 units.

    On CPU 16 random bits a unit: many times faster than a float, to 1/65536.
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
def reward_unit(rewards: RunningMeanStd) -> Tensor:
    """max(std(r), |mean(r)| / 10) of all rewards so far, 1 if all were 0. -> (1,).

    With a reward that is the same at each step, the discounted return stays below
    10 / (1 - gamma).
    """
    unit = torch.maximum(torch.sqrt(rewards.var), rewards.mean.abs() / 10)
    return torch.where(unit > 0, unit, 1.0)


def soft_target(
    reward: Tensor, terminated: Tensor, v_next: Tensor, gamma: float
) -> Tensor:
    """y = r + gamma (1 - terminated) V(s'). (B,), (B,), (B,) -> (B,)."""
    return reward + gamma * (1 - terminated) * v_next


def far_weight(d: Tensor) -> Tensor:
    """1 up to d = 4, then exp((4 - d) / 2), at least 0.02. d (B,) -> (B,)."""
    return torch.exp((4 - d) / 2).clamp(0.02, 1)


def meow_loss(q: Tensor, d: Tensor, target: Tensor) -> Tensor:
    """Batch mean of w (Q - y)^2 / 2; w = 1 where y <= Q. q, d, target (B,) -> ()."""
    w = torch.where(target > q, far_weight(d), 1.0).detach()
    return 0.5 * (w * (q - target).square()).mean()


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


def follow_entropy(alpha: Tensor, log_prob: float, args: Args):
    """log alpha <- log alpha + eta (H + log pi(a|s)): alpha (), moved in place.

    log_prob and the target H in nats per action dimension. alpha grows where the policy
    is narrower than the target; the error is clipped to +-1.
    """
    error = min(max(args.target_entropy + log_prob, -1.0), 1.0)
    log_alpha = math.log(alpha) + args.alpha_lr * error
    alpha.fill_(max(math.exp(log_alpha), 1e-6))


METRICS = [
    "losses/loss",
    "losses/grad_norm",
    "flow/q",
    "flow/v_next",
    "flow/target",
    "flow/distance",
]


def make_update(flow: EnergyFlow, args: Args):
    """update(theta, theta', m, v, decay, batch, kept) -> METRICS (6,), a pure function
    but that it changes the first five in place; it is compiled as a whole."""
    q_and_distance = function_of_parameters(flow.q_and_distance)
    soft_values = function_of_parameters(flow.soft_values)

    def loss_and_aux(theta, obs, u, target, kept):
        q, d = q_and_distance(theta, obs, u, kept)  # Q(s,a)  (B,)
        return meow_loss(q, d, target), (q, d)

    def update(theta, target_theta, m, v, decay, batch, kept=None):
        parts = split_batch(batch, flow.obs_dim, flow.act_dim)
        obs, u, next_obs, reward, terminated = parts
        v_next = soft_values(target_theta, next_obs)  # V(s'), theta'  (B,)
        target = soft_target(reward, terminated, v_next, args.gamma)  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_aux, has_aux=True)
        grad, (loss, (q, d)) = gradient(theta, obs, u, target, kept)
        grad, grad_norm = clip_gradient(grad, args.max_grad_norm)
        new_theta, *moments = adam(theta, m, v, decay, grad, args.learning_rate)
        averaged = (1 - args.tau) * target_theta + args.tau * new_theta  # new theta'
        new = (new_theta, averaged, *moments)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        means = q.mean(), v_next.mean(), target.mean()
        return torch.stack([loss, grad_norm, *means, d.median()])

    return update


# --- Training -------------------------------------------------------------------------
def make_policy(network, norm, theta: Tensor, n: int, run: Run, name: str):
    """policy(obs (n, S), z (n, A)) -> u (n, A), log pi (n,): compiled `sample`.

    It normalises the observations by `norm`.
    """
    widths = [network.obs_dim, network.act_dim]
    inputs = torch.zeros(n, sum(widths), device=run.device)
    obs_in, z_in = inputs.split(widths, dim=-1)
    sample = function_of_parameters(network.sample)
    draw = run.compile(name, sample, theta, obs_in, z_in)

    def policy(obs: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        obs_in.copy_(norm(torch.from_numpy(obs).to(run.device)))
        z_in.copy_(torch.from_numpy(z))
        u, log_prob = draw()
        return u.cpu().numpy(), log_prob.cpu().numpy()

    return policy


def train(args: Args, run: Run):
    """Trains the flow, from the run's checkpoint if it has one."""
    rng = np.random.default_rng(args.seed)  # exploration, replay and dropout
    env = run.closing(make_env(args))
    eval_envs = make_eval_envs(args, run)
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = RecentReplayBuffer(
        args.recent_size, capacity, *env.sizes, args.batch_size, run.device
    )
    norm = RunningMeanStd(env.sizes[0], run.device)
    rewards = RunningMeanStd(1, run.device)
    flow = make_flow(args, *env.sizes).to(run.device)
    theta = flatten_parameters(flow)  # the flow's parameters are views of it
    learner = [theta, theta.clone(), *adam_moments(theta)]  # theta, theta', m, v, decay
    average = make_flow(args, *env.sizes).to(run.device)  # is evaluated and saved
    average.alpha = flow.alpha  # the same tensor
    theta_bar = flatten_parameters(average)
    shape = (flow.n_couplings, 2, args.batch_size, flow.hidden)  # 2 hidden layers each
    kept = torch.ones(shape, dtype=torch.bool, device=run.device)
    update = make_update(flow, args)
    update = run.compile("the update", update, *learner, replay.batch, kept)
    act = make_policy(flow, norm, theta, 1, run, "acting")
    play = make_policy(average, norm, theta_bar, args.eval_episodes, run, "evaluation")
    parts = {"env": env, "learner": learner, "replay": replay}
    parts |= {"flow": average, "norm": norm, "rewards": rewards, "alpha": [flow.alpha]}
    run.start({"flow": average, "norm": norm}, rng, env.sizes, **parts)

    def eval_policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.tanh(play(obs, z)[0])

    done = True
    for step in run.steps():
        if run.due(args.eval_frequency):
            run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))
        if done:  # a resumed run is brought back to where its episode was
            seed = episode_seed(args.seed, TRAINING, env.episode_count)
            obs, _ = env.reset(seed=seed)
        norm.update(torch.from_numpy(obs[None]).to(run.device))
        learning = step >= args.learning_starts
        if not learning:
            u = np.arctanh(rng.uniform(-1, 1, flow.act_dim)).astype(np.float32)
        else:
            z = rng.standard_normal((1, flow.act_dim), dtype=np.float32)
            (u,), (log_prob,) = act(obs[None], z)  # u = g^-1(sigma z|s), z ~ N(0, I)
            unit = reward_unit(rewards)
            batch = replay.sample(rng)
            norm.normalise(batch, *env.sizes)
            split_batch(batch, *env.sizes)[3].div_(unit)  # r <- r / unit
            draw_dropout(kept, args.dropout, rng)
            values = update()
            theta_bar.lerp_(theta, args.policy_average)  # += b (theta - theta_bar)
            if args.autotune:
                follow_entropy(flow.alpha, float(log_prob) / flow.act_dim, args)
        next_obs, reward, terminated, truncated, info = env.step(np.tanh(u))
        replay.add(obs, u, next_obs, reward, terminated)
        obs, done = next_obs, terminated or truncated
        rewards.update(torch.tensor([[reward]], dtype=torch.float64, device=run.device))
        if done:
            run.log_episode(info["episode"])
        metrics = {}
        if learning:
            metrics = dict(zip(METRICS, values.tolist(), strict=True))
            metrics["flow/alpha"] = flow.alpha.item()
            metrics["flow/reward_unit"] = unit.item()
            metrics["flow/entropy"] = -float(log_prob)
        run.log(metrics)
        run.end_step()
    step = args.total_timesteps
    run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))


def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy, on the CPU."""
    envs = make_eval_envs(args, session)
    environments.check_sizes(saved, envs[0].sizes, args.env_id)
    flow = make_flow(args, *saved["sizes"])
    load_network(flow, saved, "flow")
    norm = RunningMeanStd(envs[0].sizes[0])
    norm.load_state_dict(saved["norm"])

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        u, _ = flow.sample(norm(torch.from_numpy(obs)), torch.from_numpy(z))
        return np.tanh(u.numpy())

    return evaluate(args, envs, policy, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
