"""SQL: soft Q-learning with amortised Stein variational gradients, for Gymnasium environments.

    python sql_continuous_action.py --env-id Ant-v4                      # MEow's budget of steps
    python sql_continuous_action.py --resume runs/<run_name>             # go on exactly
    python sql_continuous_action.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Reinforcement Learning with Deep Energy-Based Policies", ICML 2017, arXiv
1702.08165: MEow's energy-based ancestor. The temperature is 1; the reward is scaled instead.

    V(s) = log int exp(Q(s,a)) da, estimated with M = 16 uniform actions in [-1, 1]^A:
    V(s) ~ log((1/M) sum_j exp Q'(s,a_j)) + A log 2                       soft value
    y = scale r + gamma (1 - terminated) V(s')                            soft target
    J_Q = mean of (Q(s,a) - y)^2 / 2                                      critic
    log p(a|s) = Q(s,a) + sum log(1 - a^2)                                target density
    D_j = mean_i [kappa(a_i,a_j) grad log p(a_i) + grad_{a_i} kappa(a_i,a_j)]   Stein direction

The sampler a = f(xi; s), xi ~ N(0, I), follows D: its gradient is D times df/dphi. Of 16 actions
per state half are fixed (i) and half are moved (j).

Symbols   code                  meaning
f         Sampler.sample        state and noise to action
Q         Critic.q_values       soft Q-function, scaled reward units; --compose: the mean of two
kappa     kernel                Gaussian, its bandwidth from the median distance of each state
theta     theta                 parameters of the critic in one vector; theta': target_theta
phi       phi                   parameters of the sampler in one vector
y         target                soft target, scaled reward units
Shapes: B batch, M particles, F fixed and U updated ones, A action, S observation, P parameters.

Differences from the authors' code (github.com/haarnoja/softqlearning), each with its reason:
Q1  Batch 256 and Polyak averaging with tau = 0.005 as in the MEow paper's rerun; `--batch-size 128
    --tau 1 --target-network-frequency 1000` gives the original.
Q2  Uniform actions for V are drawn for each state (theirs: the same 16 for the whole batch).
Q3  The bandwidth's median averages the two middle distances (theirs takes one of them).
Q4  The sampler's step uses the critic after its step (theirs runs both at once).
Q5  An update runs before the environment's step of its iteration, so that a GPU works while the
    simulator does: the newest transition can be drawn one update later.
Q6  A loss or action that is not finite stops the run and says where.
The bandwidth depends on the number of fixed particles, as in the paper, not on the batch size.
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from harness.args import RunArgs
from harness.envs import EvaluationEnvs, Evaluator, TrainingEnv
from harness.files import POLICY_FILES, UsageError, load_file
from harness.functional import (
    Learner,
    adam,
    adam_moments,
    flatten_parameters,
    functional,
    make_policy,
)
from harness.replay import ReplayBuffer, split_batch
from harness.runs import Run, main

# --- Settings -------------------------------------------------------------------------------------
MULTI_GOAL = dict(total_timesteps=4_000, learning_starts=1_000, eval_frequency=500)
PAPER_SETTINGS = {  # budgets of the MEow paper, reward scales of the SQL paper's code; else `Args`
    "Hopper-v[45]": dict(total_timesteps=1_500_000, reward_scale=30.0),
    "HalfCheetah-v[45]": dict(total_timesteps=1_500_000, reward_scale=30.0),
    "Walker2d-v[45]": dict(total_timesteps=4_000_000, reward_scale=10.0),
    "Ant-v[45]": dict(total_timesteps=4_000_000, reward_scale=300.0),
    "Humanoid-v[45]": dict(total_timesteps=5_000_000, reward_scale=100.0),
    # MEow's temperature (2.5 = 1 / 0.4) and discount there
    "multi_goal:MultiGoal.*": dict(gamma=0.9, reward_scale=0.4, **MULTI_GOAL),
}


@dataclass
class Args(RunArgs):
    exp_name: str = (
        "sql_continuous_action"  # name of the experiment, a part of the run name
    )

    # Algorithm
    policy_lr: float = 3e-4  # Adam's step size for the sampler
    q_lr: float = 3e-4  # Adam's step size for the critic
    gamma: float = 0.99  # discount factor
    reward_scale: float = (
        1.0  # rewards are multiplied by this: the inverse of a temperature
    )
    tau: float = 0.005  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    target_network_frequency: int = 1  # updates between two steps of the target network
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay buffer
    learning_starts: int = (
        5_000  # steps with uniform random actions; then one update per step
    )
    value_particles: int = 16  # uniform actions per state that estimate V
    kernel_particles: int = (
        16  # actions per state in the Stein direction; half of them fixed
    )
    compose: tuple[str, str] | None = (
        None  # two runs: train a sampler for their mean Q-function
    )

    settings = PAPER_SETTINGS

    def __post_init__(self):
        super().__post_init__()
        counts = "batch_size buffer_size learning_starts target_network_frequency value_particles"
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check(
            "policy_lr q_lr reward_scale", lambda x: x > 0, "positive and finite"
        )
        self.check("kernel_particles", lambda x: x >= 4, "at least 4")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self.compose = self.compose and tuple(
            self.compose
        )  # args.json holds it as a list


# --- Networks -------------------------------------------------------------------------------------
class MLP(nn.Sequential):
    """in -> hidden ... -> out with ReLU between, PyTorch's default initialisation."""

    def __init__(self, *dims: int):
        layers = [x for i, o in pairwise(dims) for x in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(*layers[:-1])


class Sampler(nn.Module):
    """f(xi; s) = tanh(MLP(s, xi)): draws actions, has no tractable density."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.net = MLP(obs_dim + act_dim, 128, 128, act_dim)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, None]:
        """a = f(xi; s), and None for its density. (..., S), (..., A) -> (..., A) in (-1, 1)."""
        return torch.tanh(self.net(torch.cat([obs, noise], dim=-1))), None


class Critic(nn.Module):
    """Q(s,a), or the mean of `members` Q-functions."""

    def __init__(self, obs_dim: int, act_dim: int, members: int = 1):
        super().__init__()
        self.q = nn.ModuleList(
            MLP(obs_dim + act_dim, 128, 128, 1) for _ in range(members)
        )

    def q_values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s,a). obs (..., S), action (..., A) in [-1, 1] -> (..., 1), scaled reward units."""
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([q(x) for q in self.q]).mean(0)


class Normal:
    """Standard normal numbers of an update: NumPy's, on CUDA torch's, within the graph."""

    def __init__(self, *shape: int, device="cpu"):
        self.tensor = torch.zeros(shape, device=device)

    def fill(self, rng: np.random.Generator):
        if self.tensor.is_cuda:
            self.tensor.normal_()
        else:
            rng.standard_normal(out=self.tensor.numpy(), dtype=np.float32)


class Uniform(Normal):
    """Uniform actions in [-1, 1]."""

    def fill(self, rng: np.random.Generator):
        if self.tensor.is_cuda:
            self.tensor.uniform_()
        else:
            rng.random(out=self.tensor.numpy(), dtype=np.float32)
        self.tensor.mul_(2).sub_(1)


# --- Target, losses, Stein direction and update ---------------------------------------------------
def soft_value(q: Tensor, act_dim: int) -> Tensor:
    """V(s) = log((1/M) sum_j exp Q(s,a_j)) + A log 2, a_j uniform in [-1, 1]^A. (B, M) -> (B,)."""
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
    """log p(a|s) = Q(s,a) + sum log(1 - a^2), up to a constant. (..., 1), (..., A) -> (...)."""
    return q[..., 0] + torch.log(1 - action.square() + 1e-6).sum(-1)


def kernel(fixed: Tensor, updated: Tensor) -> tuple[Tensor, Tensor]:
    """kappa(a_i,a_j) = exp(-|a_i - a_j|^2 / h) and its gradient by the fixed a_i, per state.

    Shapes: fixed (B, F, A), updated (B, U, A) -> (B, F, U), (B, F, U, A).
    h = median squared distance / log F, at least 1e-3: F is the number of fixed particles.
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

    Shapes: score and fixed (B, F, A), updated (B, U, A) -> (B, U, A).
    """
    kappa, kappa_gradient = kernel(fixed, updated)
    return (kappa[..., None] * score[:, :, None] + kappa_gradient).mean(1)


METRICS = "losses/qf_loss losses/qf_values sql/target sql/v_next sql/stein_norm".split()


def make_update(
    sampler: Sampler, critic: Critic, obs_dim: int, act_dim: int, args: Args
):
    """The update as one function of flat tensors, changed in place; returns METRICS (5,).

    theta' is left to `train`, which moves it every --target-network-frequency updates.
    """
    sample, q_values = functional(sampler.sample), functional(critic.q_values)
    n_fixed = args.kernel_particles - args.kernel_particles // 2

    def loss_and_q(theta, obs, action, target):
        q = q_values(theta, obs, action)[:, 0]  # Q(s,a)  (B,)
        return critic_loss(q, target), q

    def summed_log_density(action, theta, obs):
        return log_density(q_values(theta, obs, action), action).sum()

    def moved_along(phi, direction, obs, noise):
        action, _ = sample(phi, obs, noise)  # a_j = f(xi_j; s)  (B, U, A)
        return -(direction * action).sum(-1).mean()  # its gradient is -D df/dphi

    def update_critic(theta, target_theta, m, v, decay, batch, uniform):
        obs, action, next_obs, reward, terminated = split_batch(batch, obs_dim, act_dim)
        repeated = next_obs[:, None].expand(-1, uniform.shape[1], -1)  # (B, M, S)
        q_next = q_values(target_theta, repeated, uniform)[..., 0]  # Q'(s',a_j)  (B, M)
        v_next = soft_value(q_next, act_dim)  # V(s'), theta'  (B,)
        target = soft_target(
            reward, terminated, v_next, args.reward_scale, args.gamma
        )  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target)
        if not args.compose:
            theta, m, v, decay = adam(theta, m, v, decay, grad, args.q_lr)
        return (theta, m, v, decay), [loss, q.mean(), target.mean(), v_next.mean()]

    def update_sampler(phi, m, v, decay, theta, batch, noise):
        obs = split_batch(batch, obs_dim, act_dim)[0]
        obs = obs[:, None].expand(-1, noise.shape[1], -1)  # (B, M, S)
        action, _ = sample(phi, obs, noise)  # (B, M, A)
        fixed, updated = action[:, :n_fixed], action[:, n_fixed:]
        score = torch.func.grad(summed_log_density)(fixed, theta, obs[:, :n_fixed])
        direction = stein_direction(score, fixed, updated)  # D  (B, U, A)
        moved = (phi, direction, obs[:, n_fixed:], noise[:, n_fixed:])
        new = adam(
            phi, m, v, decay, torch.func.grad(moved_along)(*moved), args.policy_lr
        )
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
        critic_inputs = (theta, target_theta, m, v, decay, batch, uniform)
        new_critic, metrics = update_critic(*critic_inputs)
        sampler_state = (phi, m_phi, v_phi, decay_phi)
        new_sampler, norm = update_sampler(
            *sampler_state, new_critic[0], batch, noise
        )  # Q4
        old = (theta, m, v, decay, *sampler_state)
        for tensor, value in zip(old, new_critic + new_sampler, strict=True):
            tensor.copy_(value)
        return torch.stack([*metrics, norm])

    return update


def make_networks(args: Args, obs_dim: int, act_dim: int) -> tuple[Sampler, Critic]:
    """Sampler and critic of the run's settings; they need no gradients outside the update."""
    torch.manual_seed(args.seed)
    critic = Critic(obs_dim, act_dim, members=2 if args.compose else 1)
    return Sampler(obs_dim, act_dim).requires_grad_(False), critic.requires_grad_(False)


def load_critics(
    critic: Critic, sampler: Sampler, paths: tuple[str, str], program: str
):
    """`--compose A B`: the Q-functions of two runs become the two members of `critic`."""
    for path, member in zip(paths, critic.q, strict=True):
        saved = load_file("--compose", path, program, POLICY_FILES)
        own = (*sampler.parameters(), *member.parameters())
        theirs = (*saved["sampler"].values(), *saved["critic"].values())
        if [p.shape for p in own] != [p.shape for p in theirs]:
            reason = (
                "its environment has other dimensions, or it is a composed run itself"
            )
            raise UsageError(
                f"--compose {path}: this Q-function does not fit: {reason}"
            )
        for p, value in zip(member.parameters(), saved["critic"].values(), strict=True):
            p.copy_(value)


# --- Training -------------------------------------------------------------------------------------
def train(args: Args, run: Run):
    """Trains sampler and critic, from the run's checkpoint if it has one."""
    hardware, device = run.hardware, run.device
    rng = np.random.default_rng(args.seed)  # exploration, replay and particles
    env = TrainingEnv(args.env_id, args.seed)
    dims = env.obs_dim, env.act_dim
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = ReplayBuffer(capacity, *dims, args.batch_size, device)
    sampler, critic = (net.to(device) for net in make_networks(args, *dims))
    if args.compose and not run.checkpoint:
        load_critics(critic, sampler, args.compose, run.program)
    theta, phi = flatten_parameters(critic), flatten_parameters(sampler)
    target_theta = theta.clone()
    state = [theta, target_theta, *adam_moments(theta), phi, *adam_moments(phi)]
    uniform = Uniform(
        args.batch_size, args.value_particles, env.act_dim, device=device
    )  # Q2
    noise = Normal(args.batch_size, args.kernel_particles, env.act_dim, device=device)
    update = make_update(sampler, critic, *dims, args)
    learner = Learner(
        update, state, [replay.batch], [uniform, noise], METRICS, hardware
    )
    act = make_policy(sampler, phi, *dims, 1, hardware)
    play = make_policy(sampler, phi, *dims, args.eval_episodes, hardware)
    evaluator = Evaluator(args, EvaluationEnvs(args), play)
    policy = {"sampler": sampler, "critic": critic}
    run.start(env, evaluator, policy, rng, learner=learner, replay=replay)

    for step in run.steps():
        updates = step - args.learning_starts + 1  # after this step
        if updates > 0:
            z = rng.standard_normal((1, env.act_dim), dtype=np.float32)
            action = act(env.obs[None], z)[0].numpy()  # a = f(z; s), z ~ N(0, I)
            replay.sample(rng)
            learner.update(rng)  # Q5
            if updates % args.target_network_frequency == 0:
                target_theta.lerp_(theta, args.tau)  # Polyak: theta'
        else:
            action = rng.uniform(-1, 1, env.act_dim).astype(np.float32)
        replay.add(*env.step(action))
        run.log(learner.read_metrics(step) if updates > 0 else {})  # Q6


def load_evaluator(args: Args, saved: dict) -> Evaluator:
    """Evaluation of a saved policy."""
    envs = EvaluationEnvs(args)
    sampler, _ = make_networks(args, envs.obs_dim, envs.act_dim)
    sampler.load_state_dict(saved["sampler"])
    return Evaluator(args, envs, lambda obs, z: sampler.sample(obs, z)[0])


if __name__ == "__main__":
    sys.exit(main(Args, train, load_evaluator))
