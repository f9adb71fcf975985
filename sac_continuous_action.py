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
"""SAC: soft actor-critic with a learned temperature, for Gymnasium.

    python sac_continuous_action.py --env-id Ant-v4            # MEow's budget of steps
    python sac_continuous_action.py --resume runs/<run_name>   # go on
    python sac_continuous_action.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv
1812.05905, with the settings of CleanRL's sac_continuous_action.py. The baseline of
meow_continuous_action.py: same order, options, files and evaluation, so a diff of the
two scripts is the algorithm.

    pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2)                    policy
    y = r + gamma (1 - terminated) (min_k Q'_k(s',a') - alpha log pi(a'|s'))
        with a' ~ pi(.|s')                                            soft target
    J_Q = mean of sum_k (Q_k(s,a) - y)^2                              critics
    J_pi = mean of alpha log pi(a|s) - min_k Q_k(s,a), a ~ pi(.|s)    actor
    J_alpha = -alpha (mean of log pi(a|s) + target entropy)           temperature

Symbols   code                  meaning
pi        Actor                 squashed Gaussian; its density is per unit of the
                                ENVIRONMENT's actions, so that the target entropy -|A|
                                means what it does in CleanRL
Q_k       Critics.q_values      two soft Q-functions, reward units
alpha     exp(log_alpha)        temperature: learned, from 1 on, or --no-autotune
theta     theta                 the critics' parameters in one vector; theta':
                                target_theta
phi       phi                   the actor's parameters in one vector
y         target                soft target, reward units
Shapes: B batch, A action, S observation, P parameters.

Differences from CleanRL's script, each with its reason:
S1  The temperature's step uses the log pi of the actor's own sample (theirs draws
    again): one pass of the actor less, and the form of the paper.
S2  log(1 - a^2) is computed from u, which keeps its digits; theirs adds 1e-6 inside.
S3  An update runs before the environment's step of its iteration, as in MEow's script:
    the newest transition can be drawn one update later.
S4  A loss or action that is not finite stops the run and says where.
S5  --reward-shifting clipped adds the MEow paper's learnable reward shifts:
    Q_k(s,a) + b_k(s).
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
PAPER_SETTINGS = {  # the MEow paper's budgets; all other environments get `Args`
    "Hopper-v[45]": dict(total_timesteps=1_500_000),
    "HalfCheetah-v[45]": dict(total_timesteps=1_500_000),
    "Walker2d-v[45]": dict(total_timesteps=4_000_000),
    "Ant-v[45]": dict(total_timesteps=4_000_000),
    "Humanoid-v[45]": dict(total_timesteps=5_000_000),
    "multi_goal:MultiGoal.*": dict(
        total_timesteps=4_000,
        alpha=2.5,
        autotune=False,
        learning_starts=1_000,
        gamma=0.9,
        eval_frequency=500,
    ),
}


@dataclass
class Args(RunArgs):
    exp_name: str = "sac_continuous_action"  # name of the experiment

    # Environment and evaluation
    env_kwargs: str = "{}"  # arguments of its constructor, as a JSON object
    flatten: bool = False  # flatten dictionaries and images to one vector
    max_episode_steps: int | None = None  # cap (default: the environment's, or 100,000)
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    eval_envs: int = 10  # environments that play them at a time; returns are the same
    deterministic_eval: bool = True  # evaluate tanh(mu(s)), else draw from the policy

    # Algorithm
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 1e-3  # Adam's step size for the critics and the temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    autotune: bool = True  # learn the temperature, for an entropy of -|A|
    alpha: float = 0.2  # with --no-autotune: reward units per nat of entropy
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay buffer
    learning_starts: int = 5_000  # random steps before the first of one update per step
    policy_frequency: int = 2  # steps between actor updates; then it gets as many
    reward_shifting: Literal["clipped", "none"] = "none"  # or a shift of each critic

    settings = PAPER_SETTINGS
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
        self.check(counts + " policy_frequency", lambda x: x >= 1, "at least 1")
        self.check("eval_episodes", lambda x: x >= 0, "at least 0")
        if self.max_episode_steps is not None:
            self.check("max_episode_steps", lambda x: x >= 1, "at least 1")
        self.check("policy_lr q_lr alpha", lambda x: x > 0, "positive and finite")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")


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
HIDDEN = (256, 256)  # units of the hidden layers


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


def half_range(env: environments.ReplayableEnv) -> Tensor:
    """Half the range of the environment's own actions, (A,), before the rescaling."""
    space = env.env.env.action_space  # below ReplayableEnv and RescaleAction
    return torch.from_numpy(0.5 * (space.high - space.low))


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

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        obs_in.copy_(torch.from_numpy(obs))
        z_in.copy_(torch.from_numpy(z))
        return draw().cpu().numpy()

    return policy


def train(args: Args, run: Run):
    """Trains actor, critics and temperature, from the checkpoint if there is one."""
    rng = np.random.default_rng(args.seed)  # exploration, replay and noise
    env = run.closing(make_env(args))
    eval_envs = make_eval_envs(args, run)
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = ReplayBuffer(capacity, *env.sizes, args.batch_size, run.device)
    actor, critics = make_networks(args, *env.sizes, half_range(env))
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
    act = make_policy(actor, phi, 1, run, "acting")
    eval_policy = make_policy(actor, phi, args.eval_episodes, run, "evaluation")
    parts = {"env": env, "learner": learner, "replay": replay}
    run.start({"actor": actor, "critics": critics}, rng, env.sizes, **parts)

    done = True
    for step in run.steps():
        if run.due(args.eval_frequency):
            run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))
        if done:  # a resumed run is brought back to where its episode was
            seed = episode_seed(args.seed, TRAINING, env.episode_count)
            obs, _ = env.reset(seed=seed)
        learning = step >= args.learning_starts
        metrics = {}
        if not learning:
            action = rng.uniform(-1, 1, actor.act_dim).astype(np.float32)
        else:
            z = rng.standard_normal((1, actor.act_dim), dtype=np.float32)
            action = act(obs[None], z)[0]  # a = tanh(mu + sigma z), z ~ N(0, I)
            replay.sample(rng)
            draw_normal(noise, rng)
            critic_metrics = update_critics()
            critic_updates = step - args.learning_starts + 1
            if critic_updates % args.policy_frequency == 0:
                for _ in range(args.policy_frequency):  # as many as the critics had
                    draw_normal(noise, rng)
                    actor_metrics.copy_(update_actor())
        next_obs, reward, terminated, truncated, info = env.step(action)  # S3
        replay.add(obs, action, next_obs, reward, terminated)
        obs, done = next_obs, terminated or truncated
        if done:
            run.log_episode(info["episode"])
        if learning:
            metrics = dict(zip(CRITIC_METRICS, critic_metrics.tolist(), strict=True))
            metrics |= dict(zip(ACTOR_METRICS, actor_metrics.tolist(), strict=True))
        run.log(metrics)  # S4
        run.end_step()
    step = args.total_timesteps
    run.log_evaluation(*evaluate(args, eval_envs, eval_policy, step, run))


def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy, on the CPU."""
    envs = make_eval_envs(args, session)
    environments.check_sizes(saved, envs[0].sizes, args.env_id)
    actor, _ = make_networks(args, *saved["sizes"])
    load_network(actor, saved, "actor")

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        return actor.sample(torch.from_numpy(obs), torch.from_numpy(z))[0].numpy()

    return evaluate(args, envs, policy, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
