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
"""SAC on the Isaac Gym tasks: the baseline of meow_isaacgym.py, on the same simulators.

    python sac_isaacgym.py --env-id Ant                   # MEow's budget of steps
    python sac_isaacgym.py --resume runs/<run_name>       # go on
    python sac_isaacgym.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv
1812.05905, with the settings of the MEow paper's runs: hidden layers of 512 and 256
units, a temperature that is fixed for each task, learning rates 3e-4. Options, files
and evaluation are those of meow_isaacgym.py, so a diff of the two scripts is the
algorithm; all counts of steps are vector steps.

    pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2)                    policy
    y = r + gamma (1 - terminated) (min_k Q'_k(s',a') - alpha log pi(a'|s'))
        with a' ~ pi(.|s')                                            soft target
    J_Q = mean of sum_k (Q_k(s,a) - y)^2                              critics
    J_pi = mean of alpha log pi(a|s) - min_k Q_k(s,a), a ~ pi(.|s)    actor
    J_alpha = -alpha (mean of log pi(a|s) + target entropy)           --autotune

Shapes: N environments, B batch, A action, S observation, P parameters, T vector steps.

S1 to S5 are explained in sac_continuous_action.py, D and I in meow_isaacgym.py. In one
point this SAC differs from the first: the actor is updated as often as the critics.
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
        alpha=0.4,
    ),
    "Humanoid": dict(
        total_timesteps=1_000_000,
        num_envs=128,
        batch_size=1024,
        alpha=0.025,
    ),
    "Ingenuity": dict(
        total_timesteps=500_000,
        num_envs=128,
        batch_size=1024,
        alpha=0.1,
    ),
    "Anymal": dict(
        total_timesteps=1_000_000,
        num_envs=128,
        batch_size=1024,
        alpha=0.01,
    ),
    "AllegroHand": dict(
        total_timesteps=1_000_000,
        num_envs=512,
        batch_size=256,
        alpha=0.1,
    ),
    "FrankaCabinet": dict(
        total_timesteps=1_000_000,
        num_envs=512,
        batch_size=256,
        alpha=0.1,
        tau=0.025,
    ),
}


@dataclass
class Args(RunArgs):
    env_id: str = "Ant"  # a task of isaac_tasks or isaacgymenvs; an Isaac Lab id
    exp_name: str = "sac_isaacgym"  # name of the experiment

    # Simulator and evaluation
    simulator: SimulatorName = "auto"  # auto: mujoco if it has the task, else NVIDIA's
    num_envs: int = 128  # environments stepped together
    variant: Literal["oige", "ige"] = "oige"  # constants of OmniIsaac- or IsaacGymEnvs
    sim_threads: int = 1  # CPU threads that step mujoco; results are the same
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    deterministic_eval: bool = True  # evaluate tanh(mu(s)), else draw from the policy

    # Algorithm
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics and the temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.0025  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    autotune: bool = False  # learn the temperature, for an entropy of -|A|
    alpha: float = 0.2  # with --no-autotune: reward units per nat of entropy
    batch_size: int = 1024  # transitions per update
    buffer_size: int = 15_000  # vector steps kept in the replay buffer
    learning_starts: int = 100  # random vector steps before the first update
    updates_per_step: int = 1  # updates per vector step
    policy_frequency: int = 1  # updates between the actor's; then it gets as many
    reward_shifting: Literal["clipped", "none"] = "none"  # or a shift of each critic

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
        counts += " updates_per_step eval_frequency policy_frequency"
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check("eval_episodes", lambda x: x >= 0, "at least 0")
        self.check("policy_lr q_lr alpha", lambda x: x > 0, "positive and finite")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")


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
HIDDEN = (512, 256)  # units of the hidden layers


class MLP(nn.Sequential):
    """in -> hidden ... -> out with ReLU between, PyTorch's default initialisation."""

    def __init__(self, *dims: int):
        layers = []
        for inputs, outputs in pairwise(dims):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class Actor(nn.Module):
    """pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2); and its temperature alpha.

    action_scale (A,): half the range of each of the environment's own actions. The
    density is per unit of these: log pi = log N(u) - sum log(action_scale (1 - a^2)).
    """

    log_std_min, log_std_max = -5.0, 2.0

    def __init__(self, obs_dim: int, act_dim: int, action_scale: Tensor, alpha: float):
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.net = MLP(obs_dim, *HIDDEN, 2 * act_dim)
        self.register_buffer("action_scale", action_scale.float())
        self.register_buffer("log_alpha", torch.tensor([math.log(alpha)]))

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """mu(s), and log sigma(s) in its bounds, of u. (B, S) -> (B, A), (B, A)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        half_range = 0.5 * (self.log_std_max - self.log_std_min)
        return mean, self.log_std_min + half_range * (torch.tanh(log_std) + 1)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """a = tanh(mu + sigma noise) and log pi(a|s), nats.

        obs (B, S), noise (B, A) ~ N(0, I) -> action (B, A) in [-1, 1], (B,).
        """
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
    """Two soft Q-functions; with `shifting` each has a reward shift b_k(s).  # S5"""

    def __init__(self, obs_dim: int, act_dim: int, shifting: bool = False):
        super().__init__()
        self.q = nn.ModuleList(MLP(obs_dim + act_dim, *HIDDEN, 1) for _ in range(2))
        n_shifts = 2 if shifting else 0
        self.b = nn.ModuleList(MLP(obs_dim, 256, 256, 1) for _ in range(n_shifts))
        for shift in self.b:  # no shift at the start
            nn.init.zeros_(shift[-1].weight)
            nn.init.zeros_(shift[-1].bias)

    def q_values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_k(s,a) + b_k(s), reward units.

        obs (B, S), action (B, A) in [-1, 1] -> (B, 2).
        """
        x = torch.cat([obs, action], dim=-1)
        q_values = torch.cat([q(x) for q in self.q], dim=-1)
        if self.b:
            q_values = q_values + torch.cat([b(obs) for b in self.b], dim=-1)
        return q_values


def log_normal(x: Tensor) -> Tensor:
    """log density of the standard normal. x (B, A) -> (B,)."""
    return -0.5 * (x * x).sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]


def log_tanh_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2), elementwise, no cancellation.  # S2"""
    return 2 * (math.log(2) - u - softplus(-2 * u))


def make_networks(
    args: Args, obs_dim: int, act_dim: int, action_scale: Tensor | None = None
) -> tuple[Actor, Critics]:
    """Networks of these settings; no parameter needs a gradient outside the updates."""
    torch.manual_seed(args.seed)
    if action_scale is None:
        action_scale = torch.ones(act_dim)
    alpha = 1.0 if args.autotune else args.alpha
    actor = Actor(obs_dim, act_dim, action_scale, alpha)
    critics = Critics(obs_dim, act_dim, shifting=args.reward_shifting == "clipped")
    return actor.requires_grad_(False), critics.requires_grad_(False)


def draw_normal(x: Tensor, rng: np.random.Generator):
    """Fills x with standard normal numbers; on a GPU they are torch's."""
    if x.is_cuda:
        x.normal_()
    else:
        rng.standard_normal(out=x.numpy(), dtype=np.float32)


# --- Target, losses and updates -------------------------------------------------------
def soft_target(
    reward: Tensor,
    terminated: Tensor,
    q_next: Tensor,
    log_prob: Tensor,
    alpha: Tensor,
    gamma: float,
) -> Tensor:
    """y = r + gamma (1 - terminated) (min_k Q'_k(s',a') - alpha log pi(a'|s')).

    reward, terminated, log_prob (B,), q_next (B, 2), alpha () or (1,) -> (B,).
    """
    v_next = q_next.min(-1).values - alpha * log_prob
    return reward + gamma * (1 - terminated) * v_next


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of sum_k (Q_k - y)^2. q (B, 2), target (B,) -> ()."""
    return (q - target[:, None]).square().sum(-1).mean()


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Batch mean of alpha log pi(a|s) - min_k Q_k(s,a).

    q (B, 2), log_prob (B,), alpha () or (1,) -> ().
    """
    return (alpha * log_prob - q.min(-1).values).mean()


def temperature_loss(
    log_alpha: Tensor, log_prob: Tensor, target_entropy: float
) -> Tensor:
    """-alpha (mean log pi + target entropy): a low entropy lets alpha grow.  # S1

    log_alpha (1,), log_prob (B,) -> ().
    """
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


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


CRITIC_METRICS = [
    "losses/qf_loss",
    "losses/qf1_values",
    "losses/qf2_values",
    "sac/target",
]
ACTOR_METRICS = [
    "losses/actor_loss",
    "losses/alpha_loss",
    "losses/alpha",
    "sac/entropy",
]


def make_critic_update(actor: Actor, critics: Critics, args: Args):
    """update(theta, theta', m, v, decay, phi, log_alpha, batch, noise (B, A)) ->
    CRITIC_METRICS (4,), a pure function but that it changes the first five in place."""
    sample = function_of_parameters(actor.sample)
    q_values = function_of_parameters(critics.q_values)

    def loss_and_q(theta, obs, action, target):
        q = q_values(theta, obs, action)  # Q_k(s,a)  (B, 2)
        return critic_loss(q, target), q

    def update(theta, target_theta, m, v, decay, phi, log_alpha, batch, noise):
        parts = split_batch(batch, actor.obs_dim, actor.act_dim)
        obs, action, next_obs, reward, terminated = parts
        next_action, log_prob = sample(phi, next_obs, noise)  # a' ~ pi(.|s')
        q_next = q_values(target_theta, next_obs, next_action)  # Q'_k(s',a')  (B, 2)
        alpha = log_alpha.exp()
        target = soft_target(reward, terminated, q_next, log_prob, alpha, args.gamma)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target)
        new_theta, *moments = adam(theta, m, v, decay, grad, args.q_lr)
        averaged = (1 - args.tau) * target_theta + args.tau * new_theta  # new theta'
        new = (new_theta, averaged, *moments)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        return torch.stack([loss, q[:, 0].mean(), q[:, 1].mean(), target.mean()])

    return update


def make_actor_update(actor: Actor, critics: Critics, args: Args):
    """update(phi, m, v, decay, log_alpha, its m, v, decay, theta, batch, noise (B, A))
    -> ACTOR_METRICS (4,), a pure function but that it changes phi, with --autotune
    log_alpha, and their moments in place."""
    sample = function_of_parameters(actor.sample)
    q_values = function_of_parameters(critics.q_values)
    target_entropy = -float(actor.act_dim)  # nats, over the environment's own actions

    def loss_and_log_prob(phi, log_alpha, theta, obs, noise):
        action, log_prob = sample(phi, obs, noise)  # a ~ pi(.|s)
        q = q_values(theta, obs, action)  # Q_k(s,a)  (B, 2)
        return actor_loss(q, log_prob, log_alpha.exp()), log_prob

    def update(
        phi, m, v, decay, log_alpha, m_alpha, v_alpha, decay_alpha, theta, batch, noise
    ):
        obs = split_batch(batch, actor.obs_dim, actor.act_dim)[0]
        gradient = torch.func.grad_and_value(loss_and_log_prob, has_aux=True)
        grad, (loss, log_prob) = gradient(phi, log_alpha, theta, obs, noise)
        old = (phi, m, v, decay)
        new = adam(*old, grad, args.policy_lr)
        gradient = torch.func.grad_and_value(temperature_loss)
        grad, alpha_loss = gradient(log_alpha, log_prob, target_entropy)
        if args.autotune:
            temperature = (log_alpha, m_alpha, v_alpha, decay_alpha)
            old += temperature
            new += adam(*temperature, grad, args.q_lr)
        for tensor, value in zip(old, new, strict=True):
            tensor.copy_(value)
        return torch.stack([loss, alpha_loss, log_alpha.exp()[0], -log_prob.mean()])

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
    """Trains actor, critics and temperature, from the checkpoint if there is one."""
    rng = np.random.default_rng(args.seed)  # replay and noise of the updates
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
    actor, critics = make_networks(args, *sizes)
    actor, critics = actor.to(run.device), critics.to(run.device)
    theta, phi = flatten_parameters(critics), flatten_parameters(actor)
    log_alpha = actor.log_alpha
    critic_state = [theta, theta.clone(), *adam_moments(theta)]
    actor_state = [phi, *adam_moments(phi), log_alpha, *adam_moments(log_alpha)]
    actor_metrics = torch.zeros(len(ACTOR_METRICS), device=run.device)  # the last ones
    learner = [*critic_state, *actor_state, actor_metrics]  # what a checkpoint keeps
    noise = torch.zeros(args.batch_size, actor.act_dim, device=run.device)
    update = make_critic_update(actor, critics, args)
    inputs = (*critic_state, phi, log_alpha, replay.batch, noise)
    update_critics = run.compile("the critics' update", update, *inputs)
    update = make_actor_update(actor, critics, args)
    inputs = (*actor_state, theta, replay.batch, noise)
    update_actor = run.compile("the actor's update", update, *inputs)
    act = make_policy(actor, phi, args.num_envs, run, "acting")
    eval_policy = make_policy(actor, phi, args.eval_episodes, run, "evaluation")
    parts = {"simulator": simulator, "norm": norm, "episodes": episodes}
    parts |= {"learner": learner, "replay": replay}
    policy = {"actor": actor, "critics": critics, "norm": norm}
    run.start(policy, rng, sizes, **parts)
    obs = first_observations(simulator, replay, norm, episodes)

    for step in run.steps():
        if run.due(args.eval_frequency):
            results = evaluate(args, eval_envs, eval_policy, norm, step, run)
            run.log_evaluation(*results)
        learning = step >= args.learning_starts
        metrics = {}
        if not learning:
            action = 2 * torch.rand(args.num_envs, actor.act_dim, device=run.device) - 1
        else:
            z = torch.randn(args.num_envs, actor.act_dim, device=run.device)
            action = act(norm(obs), z)  # a = tanh(mu + sigma z), z ~ N(0, I)
            critic_updates = (step - args.learning_starts) * args.updates_per_step
            for _ in range(args.updates_per_step):
                norm.normalise(replay.sample(rng), *sizes)
                draw_normal(noise, rng)
                critic_metrics = update_critics()
                critic_updates += 1
                if critic_updates % args.policy_frequency == 0:
                    for _ in range(args.policy_frequency):  # as many as the critics had
                        draw_normal(noise, rng)
                        actor_metrics.copy_(update_actor())
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
        if learning:
            metrics = dict(zip(CRITIC_METRICS, critic_metrics.tolist(), strict=True))
            metrics |= dict(zip(ACTOR_METRICS, actor_metrics.tolist(), strict=True))
        run.log(metrics, args.num_envs)
        run.end_step()
    step = args.total_timesteps
    run.log_evaluation(*evaluate(args, eval_envs, eval_policy, norm, step, run))


@simulator_errors()
def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy."""
    simulator = make_envs(args, args.eval_episodes, args.seed, session.device)
    check_sizes(saved, [simulator.obs_dim, simulator.act_dim], args.env_id)
    actor, _ = make_networks(args, *saved["sizes"])
    load_network(actor.to(session.device), saved, "actor")
    norm = RunningMeanStd(simulator.obs_dim, session.device)
    norm.load_state_dict(saved["norm"])

    def policy(obs: Tensor, z: Tensor) -> Tensor:
        return actor.sample(obs, z)[0]

    return evaluate(args, simulator, policy, norm, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
