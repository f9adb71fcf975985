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
"""SQL: soft Q-learning with amortised Stein variational gradients, for Gymnasium.

    python sql_continuous_action.py --env-id Ant-v4            # MEow's budget of steps
    python sql_continuous_action.py --resume runs/<run_name>   # go on
    python sql_continuous_action.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Reinforcement Learning with Deep Energy-Based Policies", ICML
2017, arXiv 1702.08165: MEow's energy-based ancestor. The temperature is 1; the reward
is scaled instead.

    V(s) = log int exp(Q(s,a)) da, estimated with M = 16 uniform actions in [-1, 1]^A:
    V(s) ~ log((1/M) sum_j exp Q'(s,a_j)) + A log 2               soft value
    y = scale r + gamma (1 - terminated) V(s')                    soft target
    J_Q = mean of (Q(s,a) - y)^2 / 2                              critic
    log p(a|s) = Q(s,a) + sum log(1 - a^2)                        target density
    D_j = mean_i [kappa(a_i,a_j) grad log p(a_i) + grad_{a_i} kappa(a_i,a_j)]
                                                                  Stein direction

The sampler a = f(xi; s), xi ~ N(0, I), follows D: its gradient is D times df/dphi. Of
16 actions per state half are fixed (i) and half are moved (j).

Symbols   code                  meaning
f         Sampler.sample        state and noise to action
Q         Critic.q_values       soft Q-function, scaled reward units; with --compose the
                                mean of two
kappa     kernel                Gaussian, its bandwidth from the median distance of each
                                state
theta     theta                 the critic's parameters in one vector; theta':
                                target_theta
phi       phi                   the sampler's parameters in one vector
y         target                soft target, scaled reward units
Shapes: B batch, M particles, F fixed and U updated ones, A action, S observation,
P parameters.

Differences from the authors' code (github.com/haarnoja/softqlearning), each with its
reason:
Q1  Batch 256 and Polyak averaging with tau = 0.005 as in the MEow paper's rerun;
    `--batch-size 128 --tau 1 --target-network-frequency 1000` gives the original.
Q2  Uniform actions for V are drawn for each state (theirs: the same 16 for the whole
    batch).
Q3  The bandwidth's median averages the two middle distances (theirs takes one of them).
Q4  The sampler's step uses the critic after its step (theirs runs both at once).
Q5  An update runs before the environment's step of its iteration, as in MEow's script:
    the newest transition can be drawn one update later.
Q6  A loss or action that is not finite stops the run and says where.
The bandwidth depends on the number of fixed particles, as in the paper, not on the
batch size.
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

from harness import environments
from harness.args import RunArgs
from harness.compiling import flatten_parameters, function_of_parameters
from harness.errors import UsageError
from harness.files import POLICY_FILES, load_file, load_network
from harness.machine import check_memory
from harness.runs import Run, Session, main

# --- Settings -------------------------------------------------------------------------
PAPER_SETTINGS = {  # the MEow paper's budgets; reward scales of the SQL paper's code
    "Hopper-v[45]": dict(total_timesteps=1_500_000, reward_scale=30.0),
    "HalfCheetah-v[45]": dict(total_timesteps=1_500_000, reward_scale=30.0),
    "Walker2d-v[45]": dict(total_timesteps=4_000_000, reward_scale=10.0),
    "Ant-v[45]": dict(total_timesteps=4_000_000, reward_scale=300.0),
    "Humanoid-v[45]": dict(total_timesteps=5_000_000, reward_scale=100.0),
    "multi_goal:MultiGoal.*": dict(
        total_timesteps=4_000,
        reward_scale=0.4,  # MEow's temperature is 2.5 = 1 / 0.4
        learning_starts=1_000,
        gamma=0.9,
        eval_frequency=500,
    ),
}


@dataclass
class Args(RunArgs):
    exp_name: str = "sql_continuous_action"  # name of the experiment

    # Environment and evaluation
    env_kwargs: str = "{}"  # arguments of its constructor, as a JSON object
    flatten: bool = False  # flatten dictionaries and images to one vector
    max_episode_steps: int | None = None  # cap (default: the environment's, or 100,000)
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    eval_envs: int = 10  # environments that play them at a time; returns are the same
    deterministic_eval: bool = True  # evaluate f(0; s), else draw from the policy

    # Algorithm
    policy_lr: float = 3e-4  # Adam's step size for the sampler
    q_lr: float = 3e-4  # Adam's step size for the critic
    gamma: float = 0.99  # discount factor
    reward_scale: float = 1.0  # factor of the rewards: the inverse of a temperature
    tau: float = 0.005  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    target_network_frequency: int = 1  # updates between two steps of the target network
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay buffer
    learning_starts: int = 5_000  # random steps before the first of one update per step
    value_particles: int = 16  # uniform actions per state that estimate V
    kernel_particles: int = 16  # actions per state in the Stein direction; half fixed
    compose: tuple[str, str] | None = None  # two runs: a sampler for their mean Q

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
        counts += " target_network_frequency value_particles"
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check("eval_episodes", lambda x: x >= 0, "at least 0")
        if self.max_episode_steps is not None:
            self.check("max_episode_steps", lambda x: x >= 1, "at least 1")
        positive = "policy_lr q_lr reward_scale"
        self.check(positive, lambda x: x > 0, "positive and finite")
        self.check("kernel_particles", lambda x: x >= 4, "at least 4")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
        if self.compose:
            self.compose = tuple(self.compose)  # files hold it as a list


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
class MLP(nn.Sequential):
    """in -> hidden ... -> out with ReLU between, PyTorch's default initialisation."""

    def __init__(self, *dims: int):
        layers = []
        for inputs, outputs in pairwise(dims):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class Sampler(nn.Module):
    """f(xi; s) = tanh(MLP(s, xi)): draws actions, has no tractable density."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.net = MLP(obs_dim + act_dim, 128, 128, act_dim)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, None]:
        """a = f(xi; s), and None for its density.

        obs (..., S), noise xi (..., A) ~ N(0, I) -> action (..., A) in [-1, 1].
        """
        return torch.tanh(self.net(torch.cat([obs, noise], dim=-1))), None


class Critic(nn.Module):
    """Q(s,a), or the mean of `members` Q-functions."""

    def __init__(self, obs_dim: int, act_dim: int, members: int = 1):
        super().__init__()
        self.q = nn.ModuleList(
            MLP(obs_dim + act_dim, 128, 128, 1) for _ in range(members)
        )

    def q_values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s,a), scaled reward units.

        obs (..., S), action (..., A) in [-1, 1] -> (..., 1).
        """
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([q(x) for q in self.q]).mean(0)


def make_networks(args: Args, obs_dim: int, act_dim: int) -> tuple[Sampler, Critic]:
    """Networks of these settings; no parameter needs a gradient outside the update."""
    torch.manual_seed(args.seed)
    critic = Critic(obs_dim, act_dim, members=2 if args.compose else 1)
    sampler = Sampler(obs_dim, act_dim)
    return sampler.requires_grad_(False), critic.requires_grad_(False)


def load_critics(
    critic: Critic, sampler: Sampler, paths: tuple[str, str], program: str
):
    """`--compose A B`: the Q-functions of two runs become the two members of `critic`.

    Raises: UsageError, RunError.
    """
    for path, member in zip(paths, critic.q, strict=True):
        saved = load_file("--compose", path, program, POLICY_FILES)
        own = (*sampler.parameters(), *member.parameters())
        theirs = (*saved["sampler"].values(), *saved["critic"].values())
        if [p.shape for p in own] != [p.shape for p in theirs]:
            reason = "its environment has other dimensions, or it is composed itself"
            text = f"--compose {path}: this Q-function does not fit"
            raise UsageError(f"{text}: {reason}")
        for p, value in zip(member.parameters(), saved["critic"].values(), strict=True):
            p.copy_(value)


def draw_normal(x: Tensor, rng: np.random.Generator):
    """Fills x with standard normal numbers; on a GPU they are torch's."""
    if x.is_cuda:
        x.normal_()
    else:
        rng.standard_normal(out=x.numpy(), dtype=np.float32)


def draw_uniform(x: Tensor, rng: np.random.Generator):
    """Fills x with uniform actions in [-1, 1]; on a GPU they are torch's."""
    if x.is_cuda:
        x.uniform_()
    else:
        rng.random(out=x.numpy(), dtype=np.float32)
    x.mul_(2).sub_(1)


# --- Target, losses, Stein direction and update ---------------------------------------
def soft_value(q: Tensor, act_dim: int) -> Tensor:
    """V(s) = log((1/M) sum_j exp Q(s,a_j)) + A log 2, a_j uniform. (B, M) -> (B,)."""
    return torch.logsumexp(q, dim=-1) - math.log(q.shape[-1]) + act_dim * math.log(2)


def soft_target(
    reward: Tensor,
    terminated: Tensor,
    v_next: Tensor,
    reward_scale: float,
    gamma: float,
) -> Tensor:
    """y = scale r + gamma (1 - terminated) V(s'). All (B,), scaled reward units."""
    return reward_scale * reward + gamma * (1 - terminated) * v_next


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of (Q - y)^2 / 2. (B,), (B,) -> ()."""
    return 0.5 * (q - target).square().mean()


def log_density(q: Tensor, action: Tensor) -> Tensor:
    """log p(a|s) = Q(s,a) + sum log(1 - a^2), up to a constant.

    q (..., 1), action (..., A) -> (...).
    """
    return q[..., 0] + torch.log(1 - action.square() + 1e-6).sum(-1)


def kernel(fixed: Tensor, updated: Tensor) -> tuple[Tensor, Tensor]:
    """kappa(a_i,a_j) = exp(-|a_i - a_j|^2 / h) and its gradient by the fixed a_i.

    fixed (B, F, A), updated (B, U, A) -> (B, F, U), (B, F, U, A). For each state
    h = median squared distance / log F, at least 1e-3.
    """
    difference = fixed[:, :, None] - updated[:, None]  # (B, F, U, A)
    squared = difference.square().sum(-1)
    ordered = squared.flatten(1).sort(dim=-1).values  # (B, F U)
    middle = ordered.shape[1] // 2
    median = 0.5 * (ordered[:, middle] + ordered[:, (ordered.shape[1] - 1) // 2])  # Q3
    h = (median / math.log(fixed.shape[1])).clamp(min=1e-3)[:, None, None]
    kappa = torch.exp(-squared / h)
    return kappa, -2 * difference / h[..., None] * kappa[..., None]


def stein_direction(score: Tensor, fixed: Tensor, updated: Tensor) -> Tensor:
    """D_j = mean_i [kappa(a_i,a_j) grad log p(a_i) + grad_{a_i} kappa(a_i,a_j)].

    score = grad log p(a_i) and fixed (B, F, A), updated (B, U, A) -> (B, U, A).
    """
    kappa, kappa_gradient = kernel(fixed, updated)
    return (kappa[..., None] * score[:, :, None] + kappa_gradient).mean(1)


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
    "losses/qf_loss",
    "losses/qf_values",
    "sql/target",
    "sql/v_next",
    "sql/stein_norm",
]


def make_update(sampler: Sampler, critic: Critic, args: Args):
    """update(theta, theta', m, v, decay, phi, its m, v, decay, batch, uniform, noise)
    -> METRICS (5,), a pure function but that it changes theta, phi and their moments in
    place; `train` moves theta'. uniform (B, M, A), noise (B, F + U, A)."""
    sample = function_of_parameters(sampler.sample)
    q_values = function_of_parameters(critic.q_values)
    n_fixed = args.kernel_particles - args.kernel_particles // 2

    def loss_and_q(theta, obs, action, target):
        q = q_values(theta, obs, action)[:, 0]  # Q(s,a)  (B,)
        return critic_loss(q, target), q

    def summed_log_density(action, theta, obs):
        return log_density(q_values(theta, obs, action), action).sum()

    def moved_along(phi, direction, obs, noise):
        action, _ = sample(phi, obs, noise)  # a_j = f(xi_j; s)  (B, U, A)
        return -(direction * action).sum(-1).mean()  # its gradient is -D df/dphi

    def update_critic(theta, target_theta, m, v, decay, parts, uniform):
        obs, action, next_obs, reward, terminated = parts
        repeated = next_obs[:, None].expand(-1, uniform.shape[1], -1)  # (B, M, S)
        q_next = q_values(target_theta, repeated, uniform)[..., 0]  # Q'(s',a_j)  (B, M)
        v_next = soft_value(q_next, sampler.act_dim)  # V(s'), theta'  (B,)
        target = soft_target(reward, terminated, v_next, args.reward_scale, args.gamma)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target)
        if not args.compose:
            theta, m, v, decay = adam(theta, m, v, decay, grad, args.q_lr)
        return (theta, m, v, decay), [loss, q.mean(), target.mean(), v_next.mean()]

    def update_sampler(phi, m, v, decay, theta, obs, noise):
        obs = obs[:, None].expand(-1, noise.shape[1], -1)  # (B, F + U, S)
        action, _ = sample(phi, obs, noise)  # (B, F + U, A)
        fixed, updated = action[:, :n_fixed], action[:, n_fixed:]
        score = torch.func.grad(summed_log_density)(fixed, theta, obs[:, :n_fixed])
        direction = stein_direction(score, fixed, updated)  # D  (B, U, A)
        gradient = torch.func.grad(moved_along)
        grad = gradient(phi, direction, obs[:, n_fixed:], noise[:, n_fixed:])
        new = adam(phi, m, v, decay, grad, args.policy_lr)
        return new, direction.square().sum(-1).sqrt().mean()

    def update(
        theta,
        target_theta,
        m,
        v,
        decay,
        phi,
        m_phi,
        v_phi,
        decay_phi,
        batch,
        uniform,
        noise,
    ):
        parts = split_batch(batch, sampler.obs_dim, sampler.act_dim)
        old = (theta, m, v, decay, phi, m_phi, v_phi, decay_phi)
        new_critic, means = update_critic(
            theta, target_theta, m, v, decay, parts, uniform
        )
        new_sampler, stein_norm = update_sampler(
            phi, m_phi, v_phi, decay_phi, new_critic[0], parts[0], noise
        )  # Q4
        for tensor, value in zip(old, new_critic + new_sampler, strict=True):
            tensor.copy_(value)
        return torch.stack([*means, stein_norm])

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
    """Trains sampler and critic, from the run's checkpoint if it has one."""
    rng = np.random.default_rng(args.seed)  # exploration, replay and particles
    env = run.closing(make_env(args))
    eval_envs = make_eval_envs(args, run)
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = ReplayBuffer(capacity, *env.sizes, args.batch_size, run.device)
    sampler, critic = make_networks(args, *env.sizes)
    sampler, critic = sampler.to(run.device), critic.to(run.device)
    if args.compose and not run.checkpoint:
        load_critics(critic, sampler, args.compose, run.program)
    theta, phi = flatten_parameters(critic), flatten_parameters(sampler)
    target_theta = theta.clone()
    learner = [theta, target_theta, *adam_moments(theta), phi, *adam_moments(phi)]
    shape = (args.batch_size, args.value_particles, sampler.act_dim)
    uniform = torch.zeros(shape, device=run.device)  # Q2
    shape = (args.batch_size, args.kernel_particles, sampler.act_dim)
    noise = torch.zeros(shape, device=run.device)
    update = make_update(sampler, critic, args)
    inputs = (*learner, replay.batch, uniform, noise)
    update = run.compile("the update", update, *inputs)
    act = make_policy(sampler, phi, 1, run, "acting")
    eval_policy = make_policy(sampler, phi, args.eval_episodes, run, "evaluation")
    parts = {"env": env, "learner": learner, "replay": replay}
    run.start({"sampler": sampler, "critic": critic}, rng, env.sizes, **parts)

    done = True
    for step in run.steps():
        if run.due(args.eval_frequency):
            run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))
        if done:  # a resumed run is brought back to where its episode was
            seed = episode_seed(args.seed, TRAINING, env.episode_count)
            obs, _ = env.reset(seed=seed)
        learning = step >= args.learning_starts
        if not learning:
            action = rng.uniform(-1, 1, sampler.act_dim).astype(np.float32)
        else:
            z = rng.standard_normal((1, sampler.act_dim), dtype=np.float32)
            action = act(obs[None], z)[0]  # a = f(z; s), z ~ N(0, I)
            replay.sample(rng)
            draw_uniform(uniform, rng)
            draw_normal(noise, rng)
            values = update()
            updates = step - args.learning_starts + 1
            if updates % args.target_network_frequency == 0:
                target_theta.lerp_(theta, args.tau)  # Polyak: new theta'
        next_obs, reward, terminated, truncated, info = env.step(action)  # Q5
        replay.add(obs, action, next_obs, reward, terminated)
        obs, done = next_obs, terminated or truncated
        if done:
            run.log_episode(info["episode"])
        metrics = dict(zip(METRICS, values.tolist(), strict=True)) if learning else {}
        run.log(metrics)  # Q6
        run.end_step()
    step = args.total_timesteps
    run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))


def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy, on the CPU."""
    envs = make_eval_envs(args, session)
    environments.check_sizes(saved, envs[0].sizes, args.env_id)
    sampler, _ = make_networks(args, *saved["sizes"])
    load_network(sampler, saved, "sampler")

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        return sampler.sample(torch.from_numpy(obs), torch.from_numpy(z))[0].numpy()

    return evaluate(args, envs, policy, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
