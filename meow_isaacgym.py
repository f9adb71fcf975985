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
"""MEow on thousands of robots at once: the Isaac Gym tasks, on MuJoCo or NVIDIA's.

    python meow_isaacgym.py --env-id Ant                  # the paper's experiment
    python meow_isaacgym.py --resume runs/<run_name>      # go on
    python meow_isaacgym.py --evaluate runs/<run_name> --capture-video

The algorithm of meow_continuous_action.py (see there for the symbols), on many
environments that are stepped together. A vector step steps each of them once; all
counts of steps are vector steps. Every tensor stays on the simulator's device.
--simulator mujoco: the paper's tasks re-created on MuJoCo, which run anywhere (package
isaac_tasks); isaacgym and isaaclab: NVIDIA's, where installed.

Method: Chao et al., "Maximum Entropy Reinforcement Learning via Energy-Based
Normalizing Flow", NeurIPS 2024, arXiv 2405.13629. One conditional flow z = g(a|s) is
policy, soft Q and soft value at once:

    Q(s,a)  = alpha (log p_z(z) + sum_{S_n} log|det J| + b(s))     soft Q: one flow pass
    V(s)    = alpha (-log Z(s) + b(s)),  Z(s) = prod_{S_l} |det J| soft value: no pass
    pi(a|s) = exp((Q(s,a) - V(s)) / alpha)                         the flow's density

The loss is the batch mean of sum_k (Q_k - y)^2 / 2 with
y = r + gamma (1 - terminated) min_k V_k(s').
Shapes: N environments, B batch, A action, S observation, K shifts, P parameters,
T vector steps.

Deviations from the authors' code for these tasks (github.com/ChienFeng-hub/meow, folder
skrl); D1 to D10 are those of meow_continuous_action.py:
I1  Time-outs are bootstrapped (theirs treated them as terminations).
I2  The row that a late reset leaves behind is not learned from (theirs stored it).
I3  theta' starts as theta and follows it (theirs started from other weights and was
    never synchronised).
I4  Each observation enters the running mean and variance once (theirs counted an
    observation again each time it was drawn from the replay buffer).
I5  A batch is drawn over all environments and steps (theirs: whole vector steps).
"""

import contextlib
import importlib.util
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

if importlib.util.find_spec("isaacgym"):
    import isaacgym  # noqa: F401 (it demands to come before torch)

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from harness.args import RunArgs
from harness.compiling import flatten_parameters, function_of_parameters
from harness.environments import check_sizes
from harness.errors import RunError, UsageError, check_finite, say
from harness.files import load_network
from harness.machine import check_memory
from harness.runs import Run, Session, main
from isaac_tasks import Simulator, SimulatorError, make_simulator
from isaac_tasks.interface import SimulatorName

# --- Settings -------------------------------------------------------------------------
PAPER_SETTINGS = {  # the defaults of these tasks; all others get those of `Args`
    "Ant": dict(
        total_timesteps=1_000_000,
        num_envs=128,
        batch_size=1024,
        tau=0.0005,
        alpha=0.075,
        log_sigma_max=2.0,
    ),
    "Humanoid": dict(
        total_timesteps=1_000_000,
        num_envs=128,
        batch_size=1024,
        tau=0.00025,
        alpha=0.25,
    ),
    "Ingenuity": dict(
        total_timesteps=500_000,
        num_envs=128,
        batch_size=1024,
        tau=0.0025,
        alpha=0.025,
        log_sigma_min=-4.0,
    ),
    "Anymal": dict(
        total_timesteps=1_000_000,
        num_envs=128,
        batch_size=1024,
        tau=0.025,
        alpha=0.00075,
        log_sigma_max=-1.0,
    ),
    "AllegroHand": dict(
        total_timesteps=1_000_000,
        num_envs=512,
        batch_size=256,
        tau=0.001,
        alpha=0.1,
        log_sigma_min=-4.0,
    ),
    "FrankaCabinet": dict(
        total_timesteps=1_000_000,
        num_envs=512,
        batch_size=256,
        tau=0.01,
        alpha=0.075,
    ),
}


@dataclass
class Args(RunArgs):
    env_id: str = "Ant"  # a task of isaac_tasks or isaacgymenvs; an Isaac Lab id
    exp_name: str = "meow_isaacgym"  # name of the experiment

    # Simulator and evaluation
    simulator: SimulatorName = "auto"  # auto: mujoco if it has the task, else NVIDIA's
    num_envs: int = 128  # environments stepped together
    variant: Literal["oige", "ige"] = "oige"  # constants of OmniIsaac- or IsaacGymEnvs
    sim_threads: int = 1  # CPU threads that step mujoco; results are the same
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    deterministic_eval: bool = True  # evaluate g^-1(0|s), else draw from the policy

    # Algorithm
    learning_rate: float = 1e-3  # Adam's step size
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    alpha: float = 0.2  # temperature: reward units per nat of entropy
    log_sigma_min: float = -5.0  # lower bound of log sigma(s) of the linear layer
    log_sigma_max: float = -0.3  # upper bound of log sigma(s) of the linear layer
    batch_size: int = 1024  # transitions per update
    buffer_size: int = 15_000  # vector steps kept in the replay buffer
    learning_starts: int = 100  # random vector steps before the first update
    updates_per_step: int = 1  # updates per vector step
    max_grad_norm: float = 30.0  # the gradient is scaled down to this norm
    dropout: float = 0.1  # probability in the couplings, in the update's Q pass only
    reward_shifting: Literal["clipped", "single", "none"] = "clipped"  # 2, 1, 0 b_k
    coupling: Literal["additive", "affine"] = "additive"  # x + t, or x exp(s) + t

    settings = PAPER_SETTINGS
    gymnasium_ids = False
    resume_may_change = RunArgs.resume_may_change + " sim_threads"
    evaluate_may_change = (
        RunArgs.evaluate_may_change
        + " simulator sim_threads eval_episodes deterministic_eval"
    )

    def __post_init__(self):
        super().__post_init__()
        counts = "num_envs sim_threads batch_size buffer_size learning_starts"
        counts += " updates_per_step eval_frequency"
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check("eval_episodes", lambda x: x >= 0, "at least 0")
        positive = "learning_rate alpha max_grad_norm"
        self.check(positive, lambda x: x > 0, "positive and finite")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self.check("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1")
        bounds = "log_sigma_min log_sigma_max"
        self.check(bounds, lambda x: -20 <= x <= 20, "from -20 to 20 (a logarithm)")
        above = "above --log-sigma-min"
        self.check("log_sigma_max", lambda x: x > self.log_sigma_min, above)


# --- Simulator and evaluation ---------------------------------------------------------
TRAINING, EVALUATION, NOISE = 0, 1, 2  # what a seed is for


def episode_seed(*key: int) -> int:
    """A seed below 2^31 from several numbers: the run's seed, its use, the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) % 2**31


@contextlib.contextmanager
def simulator_errors():
    """As a decorator: a failing simulator ends the run. Raises: RunError."""
    try:
        yield
    except SimulatorError as error:
        raise RunError(f"the simulator failed: {error}") from None


def make_envs(args: Args, num_envs: int, seed: int, device: torch.device) -> Simulator:
    """`num_envs` environments of the task, stepped together. Raises: UsageError."""
    options = dict(device=device, threads=args.sim_threads, variant=args.variant)
    try:
        return make_simulator(args.simulator, args.env_id, num_envs, seed, **options)
    except SimulatorError as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from None


def make_eval_envs(args: Args, training: Simulator) -> Simulator | None:
    """Environments for evaluations beside the training ones; None: no evaluation."""
    if args.eval_episodes == 0:
        return None
    if training.one_per_process:
        text = "one simulation per process: no evaluation while training"
        say(f"note: {text}; --evaluate does it later")
        return None
    return make_envs(args, args.eval_episodes, args.seed, training.device)


class RunningMeanStd:
    """Running mean and variance (D,) of vectors, each counted once.  # I4"""

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


class EpisodeStatistics:
    """Return and length (N,) of the episodes under way, and sums over those that ended.

    `diverged` (): environments whose physics broke down since the run began.
    """

    def __init__(self, num_envs: int, device: torch.device | str = "cpu"):
        self.returns = torch.zeros(num_envs, device=device)
        self.lengths = torch.zeros(num_envs, device=device)
        self.ended = torch.zeros(3, device=device)  # number, sums of both
        self.diverged = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, simulator: Simulator, reward: Tensor, done: Tensor):
        """Adds a vector step: reward (N,); done (N,): the episodes that it ended."""
        self.returns += reward
        self.lengths += 1
        sums = done.sum(), self.returns[done].sum(), self.lengths[done].sum()
        self.ended += torch.stack(sums)
        self.diverged += simulator.diverged
        valid = simulator.valid
        new = done if valid is None else done | ~valid
        self.returns.masked_fill_(new, 0)
        self.lengths.masked_fill_(new, 0)

    def take(self) -> dict[str, float]:
        """What to log: means over the episodes that ended since the last call."""
        number, returns, lengths = self.ended.tolist()
        self.ended.zero_()
        means = {"charts/diverged": float(self.diverged), "charts/episodes": number}
        if number:
            means["charts/episodic_return"] = returns / number
            means["charts/episodic_length"] = lengths / number
        return means

    def state_dict(self) -> dict:
        return {name: value.cpu() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict):
        for name, value in vars(self).items():
            value.copy_(state[name])


def evaluate(
    args: Args,
    simulator: Simulator | None,
    policy,
    norm: RunningMeanStd,
    step: int,
    session: Session,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of --eval-episodes new episodes: --seed and `step` seed them.

    policy(normalised obs (n, S), z (n, A)) -> actions (n, A). Environment i plays
    episode i; an episode whose physics breaks down ends there. None: no episodes.
    """
    if simulator is None:
        return [], []
    n, device = args.eval_episodes, simulator.device
    rng = np.random.default_rng(episode_seed(args.seed, NOISE, step))
    z = torch.zeros(n, simulator.act_dim)
    returns = torch.zeros(n, device=device)
    lengths = torch.zeros(n, dtype=torch.int64, device=device)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    with session.evaluation(simulator.fps) as watch:
        obs = simulator.reset(seed=episode_seed(args.seed, EVALUATION, step))
        while alive.any():
            watch.step(f"evaluation: {int(lengths.max())} steps so far")
            if alive[0]:
                watch.film(simulator)
            if not args.deterministic_eval:
                rng.standard_normal(out=z.numpy(), dtype=np.float32)
            action = policy(norm(obs), z.to(device))
            check_finite(args.env_id, step, action=action)
            obs, reward, terminated, truncated, _ = simulator.step(action)
            played = {"observation": obs[alive], "reward": reward[alive]}
            check_finite(args.env_id, step, **played)
            returns += torch.where(alive, reward, 0.0)
            lengths += alive
            alive &= ~(terminated | truncated)
            if simulator.valid is not None:
                alive &= simulator.valid
    return returns.tolist(), lengths.tolist()


# --- Replay buffer --------------------------------------------------------------------
class VectorReplayBuffer:
    """The last T vector steps of N environments, on the simulator's device.

    Each observation is stored once: what follows step t is what precedes step t + 1.
    Only after a time-out does an update need more, the final observation of the old
    episode. An environment times out at most once in `max_steps` steps, so these fit
    into a ring with one row for as many. (After a termination the target doesn't look
    at the next observation.)
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_dim: int,
        act_dim: int,
        max_steps: int,
        batch_size: int,
        device="cpu",
    ):
        device = torch.device(device)
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.capacity, self.num_envs = capacity, num_envs
        self.max_steps, self.added = max_steps, 0
        slots, blocks = capacity + 1, capacity // max_steps + 2
        size = 4 * num_envs * (slots * (obs_dim + act_dim + 3) + blocks * obs_dim)
        what = f"--num-envs {num_envs}, --buffer-size {capacity}: the replay buffer"
        check_memory(what, size, device)
        self.obs = torch.empty(slots, num_envs, obs_dim, device=device)
        # action | reward | terminated | truncated
        self.rows = torch.empty(slots, num_envs, act_dim + 3, device=device)
        self.final_obs = torch.zeros(blocks, num_envs, obs_dim, device=device)
        # on the host, where rows are drawn
        self.invalid = np.zeros((slots, num_envs), dtype=bool)
        self.batch = torch.zeros(batch_size, 2 * obs_dim + act_dim + 2, device=device)
        self.index = torch.zeros(
            3, batch_size, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self.device_index = self.index.to(device)

    def __len__(self) -> int:
        """Transitions to draw from, the invalid ones included."""
        return min(self.added, self.capacity) * self.num_envs

    def last_obs(self) -> Tensor:
        """What the last step's actions led to, (N, S): the observations to act on."""
        return self.obs[self.added % len(self.obs)].clone()

    def start(self, obs: Tensor):
        """Stores first observations (N, S); what the step before led to is unknown."""
        slot = self.added % len(self.obs)
        self.obs[slot] = obs
        self.invalid[slot - 1] = True

    def add(
        self,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        final_obs: Tensor,
        next_obs: Tensor,
        valid: Tensor | None = None,
    ):
        """Stores a vector step: (N, A), (N,), (N,), (N,), (N, S), (N, S).

        final_obs: what the actions led to; next_obs: what the next ones start from.
        valid (N,) bool: the rows that may be drawn (None: all).
        """
        slot = self.added % len(self.obs)
        flags = torch.stack([reward, terminated.float(), truncated.float()], -1)
        self.rows[slot] = torch.cat([action, flags], -1)
        block = self.added // self.max_steps % len(self.final_obs)
        old = self.final_obs[block]
        self.final_obs[block] = torch.where(truncated[:, None], final_obs, old)  # I1
        self.invalid[slot] = False if valid is None else ~valid.cpu().numpy()  # I2
        self.added += 1
        self.obs[self.added % len(self.obs)] = next_obs

    def sample(self, rng: np.random.Generator) -> Tensor:
        """`batch` (B, row), drawn over all environments and steps.  # I5"""
        self.index.numpy()[:] = self.draw(rng, self.index.shape[1])
        self.device_index.copy_(self.index)
        return self.gather(self.device_index)

    def draw(self, rng: np.random.Generator, n: int, oldest: int = 0) -> np.ndarray:
        """Places (3, n) of n transitions, uniform over the valid ones from `oldest` on.

        They are those of row, next observation and final observation.
        """
        index = rng.integers(oldest, len(self), n)
        while True:  # a second time only where a simulator resets late
            step, env = np.divmod(index, self.num_envs)
            step += self.added - len(self) // self.num_envs
            slot = step % len(self.obs)
            again = self.invalid[slot, env]
            if not again.any():
                break
            index[again] = rng.integers(oldest, len(self), again.sum())
        block = step // self.max_steps % len(self.final_obs)
        places = np.stack([slot, (step + 1) % len(self.obs), block])
        return places * self.num_envs + env

    def gather(self, index: Tensor) -> Tensor:
        """Transitions (3, B) as rows obs | action | next_obs | reward | terminated."""
        parts = split_batch(self.batch, self.obs_dim, self.act_dim)
        obs, action, next_obs, reward, terminated = parts
        all_obs, all_rows = self.obs.flatten(0, 1), self.rows.flatten(0, 1)
        row, following = all_rows[index[0]], all_obs[index[1]]
        final_obs = self.final_obs.flatten(0, 1)[index[2]]
        truncated = row[:, -1:] > 0
        obs.copy_(all_obs[index[0]])
        action.copy_(row[:, :-3])
        next_obs.copy_(torch.where(truncated, final_obs, following))
        reward.copy_(row[:, -3])
        terminated.copy_(row[:, -2])
        return self.batch

    def state_dict(self) -> dict:
        used = min(self.added + 1, len(self.obs))
        return {
            "added": self.added,
            # by way of NumPy, or torch saves all rows
            "obs": torch.from_numpy(self.obs[:used].cpu().numpy()),
            "rows": torch.from_numpy(self.rows[:used].cpu().numpy()),
            "invalid": torch.from_numpy(self.invalid[:used]),
            "final_obs": self.final_obs.cpu(),
        }

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.invalid[: len(state["invalid"])] = state["invalid"].numpy()
        for name in ("obs", "rows", "final_obs"):
            # shorter ones after fewer --total-timesteps
            getattr(self, name)[: len(state[name])].copy_(state[name])


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

    def policy(obs: Tensor, z: Tensor) -> Tensor:
        obs_in.copy_(obs)
        z_in.copy_(z)
        return draw().clone()

    return policy


def first_observations(
    simulator: Simulator,
    replay: VectorReplayBuffer,
    norm: RunningMeanStd,
    episodes: EpisodeStatistics,
) -> Tensor:
    """Observations (N, S) to act on: of new episodes, or the last ones where a resumed
    run goes on in its episodes."""
    resumed = len(replay) > 0
    if resumed and simulator.state_dict():
        if not simulator.exact_resume:
            say("note: on a GPU a resumed run goes on, but not bit for bit")
        return replay.last_obs()
    if resumed:
        text = "this simulator can't restore its environments"
        say(f"warning: {text}: their episodes start anew")
        episodes.returns.zero_()
        episodes.lengths.zero_()
    obs = simulator.reset()
    norm.update(obs)
    replay.start(obs)
    return obs


@simulator_errors()
def train(args: Args, run: Run):
    """Trains the flow, from the run's checkpoint if it has one."""
    rng = np.random.default_rng(args.seed)  # replay and dropout
    seed = episode_seed(args.seed, TRAINING)
    simulator = make_envs(args, args.num_envs, seed, run.device)
    eval_envs = make_eval_envs(args, simulator)
    sizes = [simulator.obs_dim, simulator.act_dim]
    norm = RunningMeanStd(simulator.obs_dim, run.device)
    episodes = EpisodeStatistics(args.num_envs, run.device)
    replay = VectorReplayBuffer(
        min(args.buffer_size, args.total_timesteps),
        args.num_envs,
        *sizes,
        simulator.max_steps,
        args.batch_size,
        run.device,
    )
    flow = make_flow(args, *sizes).to(run.device)
    theta = flatten_parameters(flow)  # the flow's parameters are views of it
    learner = [theta, theta.clone(), *adam_moments(theta)]  # theta, theta', m, v, decay
    shape = (flow.n_couplings, 2, args.batch_size, flow.hidden)  # 2 hidden layers each
    kept = torch.ones(shape, dtype=torch.bool, device=run.device)
    update = make_update(flow, args)
    update = run.compile("the update", update, *learner, replay.batch, kept)
    act = make_policy(flow, theta, args.num_envs, run, "acting")
    eval_policy = make_policy(flow, theta, args.eval_episodes, run, "evaluation")
    parts = {"simulator": simulator, "norm": norm, "episodes": episodes}
    parts |= {"learner": learner, "replay": replay}
    run.start({"flow": flow, "norm": norm}, rng, sizes, **parts)
    obs = first_observations(simulator, replay, norm, episodes)

    for step in run.steps():
        if run.due(args.eval_frequency):
            results = evaluate(args, eval_envs, eval_policy, norm, step, run)
            run.log_evaluation(*results)
        learning = step >= args.learning_starts
        if not learning:
            action = 2 * torch.rand(args.num_envs, flow.act_dim, device=run.device) - 1
        else:
            z = torch.randn(args.num_envs, flow.act_dim, device=run.device)
            action = act(norm(obs), z)  # a = g^-1(z|s), z ~ N(0, I)
            for _ in range(args.updates_per_step):
                norm.normalise(replay.sample(rng), *sizes)
                draw_dropout(kept, args.dropout, rng)
                values = update()  # D8
        check_finite(args.env_id, step, action=action)
        next_obs, reward, terminated, truncated, final_obs = simulator.step(action)
        seen = {"observation": next_obs, "final_observation": final_obs}
        check_finite(args.env_id, step, **seen, reward=reward)
        norm.update(next_obs)
        valid = simulator.valid
        replay.add(action, reward, terminated, truncated, final_obs, next_obs, valid)
        episodes.add(simulator, reward, done=terminated | truncated)
        obs = next_obs
        if run.due_to_log():
            run.log_episodes(episodes.take())
        metrics = dict(zip(METRICS, values.tolist(), strict=True)) if learning else {}
        run.log(metrics, args.num_envs)
        run.end_step()
    step = args.total_timesteps
    run.log_evaluation(*evaluate(args, eval_envs, eval_policy, norm, step, run))


@simulator_errors()
def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy."""
    simulator = make_envs(args, args.eval_episodes, args.seed, session.device)
    check_sizes(saved, [simulator.obs_dim, simulator.act_dim], args.env_id)
    flow = make_flow(args, *saved["sizes"]).to(session.device)
    load_network(flow, saved, "flow")
    norm = RunningMeanStd(simulator.obs_dim, session.device)
    norm.load_state_dict(saved["norm"])

    def policy(obs: Tensor, z: Tensor) -> Tensor:
        return flow.sample(obs, z)[0]

    return evaluate(args, simulator, policy, norm, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
