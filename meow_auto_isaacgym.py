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
"""MEow without tuning on thousands of robots at once: one setting for every task.

    python meow_auto_isaacgym.py --env-id Ant             # any task
    python meow_auto_isaacgym.py --resume runs/<run_name> # go on
    python meow_auto_isaacgym.py --evaluate runs/<run_name> --capture-video

The algorithm of meow_auto_continuous_action.py (see there for its form and symbols), on
the simulators and with the replay buffer of meow_isaacgym.py: blocks are copies. A
vector step steps each of N environments once; all counts of steps are vector steps.
With u = atanh(a), x = g(u|s):

    Q(s,a) = m(s) - 1/2 sum_i kappa_i(s) x_i^2 - alpha sum_i log(1 - tanh(u_i)^2)
    V(s)   = m(s) + alpha/2 sum_i log(2 pi alpha / kappa_i(s))
    policy:  u = g^-1(sigma z|s), z ~ N(0, I), sigma_i(s) = sqrt(alpha / kappa_i(s))
    r <- r / max(std(r), |mean(r)| / 10),   alpha = rho / A

with the mean and the standard deviation of all rewards so far, of all environments. Q
takes the energy e = 1/2 sum_i kappa_i x_i^2 = rho d / 2 from an action, on average
rho / 2 from the policy's own. With y = r + gamma (1 - terminated) V(s') the loss is the
sum of two batch means,

    w (Q - y)^2 / 2, of m alone,   w = exp(rho - e) where y > Q, at most 1; else 1
    (Q - y)^2 / 2,   of kappa and g alone

So m, and V with it, is fitted to the policy's own actions. Far ones are mostly worth
more than Q, a parabola, says: fitted to these too, V would rise above what the policy
gets. kappa and g learn from all, so that the policy stays near the kept actions. The
other script has one loss, in which far actions weigh little, and dropout: with these a
Humanoid and Ingenuity forgot what they had learned. On MuJoCo the split loss learned
Hopper and Humanoid-v4 more slowly, in one stopped run each (studies/robots_held_back).

Tasks differ only in their numbers of steps, environments and transitions per update,
which are the paper's. Two things of the other script are off unless asked for: half of
each batch from the newest vector steps (--recent-size), and an average of theta that is
evaluated and saved (--policy-average b),

    theta_bar <- (1 - b) theta_bar + b theta

Shapes: N environments, B batch, A action, S observation, P parameters, T vector steps.
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
SIZES = {  # of the paper's runs of these tasks; all else is the same for all
    "Ant": dict(total_timesteps=1_000_000, num_envs=128, batch_size=1024),
    "Humanoid": dict(total_timesteps=1_000_000, num_envs=128, batch_size=1024),
    "Ingenuity": dict(total_timesteps=500_000, num_envs=128, batch_size=1024),
    "Anymal": dict(total_timesteps=1_000_000, num_envs=128, batch_size=1024),
    "AllegroHand": dict(total_timesteps=1_000_000, num_envs=512, batch_size=256),
    "FrankaCabinet": dict(total_timesteps=1_000_000, num_envs=512, batch_size=256),
}


@dataclass
class Args(RunArgs):
    env_id: str = "Ant"  # a task of isaac_tasks or isaacgymenvs; an Isaac Lab id
    exp_name: str = "meow_auto_isaacgym"  # name of the experiment

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
    tau: float = 0.01  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    temperature: float = 1.5  # rho = alpha A, A action dimensions; units per nat
    autotune: bool = False  # move alpha, for the entropy below
    target_entropy: float = -0.65  # with --autotune: nats per action dimension
    alpha_lr: float = 1e-3  # with --autotune: eta, the largest step of log alpha
    sigma_start: float = 0.22  # standard deviation of u at the start
    sigma_max: float = 0.4  # upper bound of sigma(s), the standard deviation of x
    batch_size: int = 1024  # transitions per update
    buffer_size: int = 15_000  # vector steps kept in the replay buffer
    recent_size: int = 0  # half of a batch is of this many newest (0: none)
    learning_starts: int = 100  # random vector steps before the first update
    updates_per_step: int = 1  # updates per vector step
    max_grad_norm: float = 30.0  # the gradient is scaled down to this norm
    dropout: float = 0.0  # probability in the couplings, in the update's Q pass only
    policy_average: float = 1.0  # b: an average over about 1 / b steps is evaluated

    settings = SIZES
    settings_name = "the sizes of the paper's runs"
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
        # fewer may all be invalid after a resume
        self.check("recent_size", lambda x: x == 0 or x >= 10, "0 or at least 10")
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
        self.final_obs[block] = torch.where(truncated[:, None], final_obs, old)
        self.invalid[slot] = False if valid is None else ~valid.cpu().numpy()
        self.added += 1
        self.obs[self.added % len(self.obs)] = next_obs

    def sample(self, rng: np.random.Generator) -> Tensor:
        """`batch` (B, row), drawn over all environments and steps."""
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


class RecentVectorReplayBuffer(VectorReplayBuffer):
    """Half of each batch is of the newest vector steps, if `recent_size` isn't 0."""

    def __init__(self, recent_size: int, *sizes):
        super().__init__(*sizes)
        self.recent_size = recent_size

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Places (3, n), half of them in the newest `recent_size` vector steps."""
        if self.recent_size == 0:
            return super().draw(rng, n)
        oldest = max(len(self) - self.recent_size * self.num_envs, 0)
        newest = super().draw(rng, n // 2, oldest)
        return np.concatenate([newest, super().draw(rng, n - n // 2)], axis=1)


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


def near_weight(energy: Tensor, rho: Tensor) -> Tensor:
    """w = exp(rho - e), at most 1. energy (B,), rho () -> (B,)."""
    return torch.exp(rho - energy).clamp(max=1)


def meow_loss(q: Tensor, d: Tensor, target: Tensor, rho: Tensor) -> Tensor:
    """Batch means of w (Q - y)^2 / 2, of m alone, and (Q - y)^2 / 2, of kappa and g.

    w = 1 where y <= Q. q, d, target (B,), rho () -> ().
    """
    energy = 0.5 * rho * d  # 1/2 sum_i kappa_i x_i^2
    q_of_m = q + energy - energy.detach()  # Q, with the gradient of m alone
    q_of_flow = q.detach() + energy.detach() - energy  # with that of kappa and g
    w = torch.where(target > q, near_weight(energy, rho), 1.0).detach()
    loss_of_m = 0.5 * (w * (q_of_m - target).square()).mean()
    return loss_of_m + 0.5 * (q_of_flow - target).square().mean()


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
        rho = flow.alpha * flow.act_dim
        return meow_loss(q, d, target, rho), (q, d)

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
def make_policy(network, theta: Tensor, n: int, run: Run, name: str):
    """policy(obs (n, S), z (n, A)) -> u (n, A), log pi (n,): compiled `sample`."""
    widths = [network.obs_dim, network.act_dim]
    inputs = torch.zeros(n, sum(widths), device=run.device)
    obs_in, z_in = inputs.split(widths, dim=-1)
    sample = function_of_parameters(network.sample)
    draw = run.compile(name, sample, theta, obs_in, z_in)

    def policy(obs: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        obs_in.copy_(obs)
        z_in.copy_(z)
        u, log_prob = draw()
        return u.clone(), log_prob.clone()

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
    rewards = RunningMeanStd(1, run.device)
    replay = RecentVectorReplayBuffer(
        args.recent_size,
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
    average = make_flow(args, *sizes).to(run.device)  # is evaluated and saved
    average.alpha = flow.alpha  # the same tensor
    theta_bar = flatten_parameters(average)
    shape = (flow.n_couplings, 2, args.batch_size, flow.hidden)  # 2 hidden layers each
    kept = torch.ones(shape, dtype=torch.bool, device=run.device)
    update = make_update(flow, args)
    update = run.compile("the update", update, *learner, replay.batch, kept)
    act = make_policy(flow, theta, args.num_envs, run, "acting")
    play = make_policy(average, theta_bar, args.eval_episodes, run, "evaluation")
    parts = {"simulator": simulator, "norm": norm, "episodes": episodes}
    parts |= {"flow": average, "learner": learner, "replay": replay}
    parts |= {"rewards": rewards, "alpha": [flow.alpha]}
    run.start({"flow": average, "norm": norm}, rng, sizes, **parts)
    obs = first_observations(simulator, replay, norm, episodes)

    def eval_policy(obs: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(play(obs, z)[0])

    for step in run.steps():
        if run.due(args.eval_frequency):
            results = evaluate(args, eval_envs, eval_policy, norm, step, run)
            run.log_evaluation(*results)
        learning = step >= args.learning_starts
        shape = (args.num_envs, flow.act_dim)
        if not learning:
            uniform = torch.rand(shape, dtype=torch.float64, device=run.device)
            u = torch.atanh(2 * uniform - 1).float()
        else:
            z = torch.randn(shape, device=run.device)
            u, log_prob = act(norm(obs), z)  # u = g^-1(sigma z|s), z ~ N(0, I)
            unit = reward_unit(rewards)
            for _ in range(args.updates_per_step):
                batch = replay.sample(rng)
                norm.normalise(batch, *sizes)
                split_batch(batch, *sizes)[3].div_(unit)  # r <- r / unit
                draw_dropout(kept, args.dropout, rng)
                values = update()
                theta_bar.lerp_(theta, args.policy_average)  # += b (theta - theta_bar)
                if args.autotune:
                    density = float(log_prob.mean()) / flow.act_dim
                    follow_entropy(flow.alpha, density, args)
        action = torch.tanh(u)
        check_finite(args.env_id, step, action=action)
        next_obs, reward, terminated, truncated, final_obs = simulator.step(action)
        seen = {"observation": next_obs, "final_observation": final_obs}
        check_finite(args.env_id, step, **seen, reward=reward)
        norm.update(next_obs)
        valid = simulator.valid
        replay.add(u, reward, terminated, truncated, final_obs, next_obs, valid)
        done = terminated | truncated
        episodes.add(simulator, reward, done)
        real = reward if valid is None else reward[valid]
        if len(real):
            rewards.update(real[:, None])
        obs = next_obs
        if run.due_to_log():
            run.log_episodes(episodes.take())
        metrics = {}
        if learning:
            metrics = dict(zip(METRICS, values.tolist(), strict=True))
            metrics["flow/alpha"] = flow.alpha.item()
            metrics["flow/reward_unit"] = unit.item()
            metrics["flow/entropy"] = -float(log_prob.mean())
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
        return torch.tanh(flow.sample(obs, z)[0])

    return evaluate(args, simulator, policy, norm, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
