"""SAC on the Isaac Gym tasks: the baseline of meow_isaacgym.py, on the same simulators.

    python sac_isaacgym.py --env-id Ant                                  # MEow's budget of steps
    python sac_isaacgym.py --resume runs/<run_name>                      # go on exactly
    python sac_isaacgym.py --evaluate runs/<run_name> --capture-video

Method: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905,
with the settings of the MEow paper's runs: hidden layers of 512 and 256 units, a temperature that
is fixed for each task, learning rates 3e-4. Options, files and evaluation are those of
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

from harness.envs import Evaluator
from harness.functional import (
    Learner,
    adam,
    adam_moments,
    flatten_parameters,
    functional,
    make_policy,
)
from harness.replay import split_batch
from harness.runs import Run, main
from isaac_tasks.training import (
    IsaacArgs,
    ObservationNorm,
    SimulatorEnvs,
    TrainingEnvs,
    VectorReplayBuffer,
    make_evaluator,
)


# --- Settings -------------------------------------------------------------------------------------
def paper(steps: int, num_envs: int, batch: int, alpha: float, **more) -> dict:
    return dict(
        total_timesteps=steps, num_envs=num_envs, batch_size=batch, alpha=alpha, **more
    )


PAPER_SETTINGS = {  # the defaults of these tasks; all others get those of `Args`
    "Ant": paper(1_000_000, 128, 1024, 0.4),
    "Humanoid": paper(1_000_000, 128, 1024, 0.025),
    "Ingenuity": paper(500_000, 128, 1024, 0.1),
    "Anymal": paper(1_000_000, 128, 1024, 0.01),
    "AllegroHand": paper(1_000_000, 512, 256, 0.1),
    "FrankaCabinet": paper(1_000_000, 512, 256, 0.1, tau=0.025),
}


@dataclass
class Args(IsaacArgs):
    exp_name: str = "sac_isaacgym"  # name of the experiment, a part of the run name

    # Algorithm
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics and the temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.0025  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta
    autotune: bool = (
        False  # learn the temperature, for an entropy of minus the action dimensions
    )
    alpha: float = (
        0.2  # temperature with --no-autotune: reward units per nat of entropy
    )
    policy_frequency: int = (
        1  # the actor is updated every so many steps, then as many times
    )
    reward_shifting: Literal["clipped", "none"] = (
        "none"  # or a shift b_k(s) for each critic
    )

    settings = PAPER_SETTINGS

    def __post_init__(self):
        super().__post_init__()
        self.check("policy_frequency", lambda x: x >= 1, "at least 1")
        self.check("policy_lr q_lr alpha", lambda x: x > 0, "positive and finite")
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")


# --- Networks -------------------------------------------------------------------------------------
HIDDEN = (512, 256)  # units of the hidden layers


class MLP(nn.Sequential):
    """in -> hidden ... -> out with ReLU between, PyTorch's default initialisation."""

    def __init__(self, *dims: int):
        layers = [x for i, o in pairwise(dims) for x in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(*layers[:-1])


class Actor(nn.Module):
    """pi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s)^2), log sigma between -5 and 2; its temperature.

    `action_scale` (A,): half the range of each of the environment's own actions; log-probabilities
    are densities over these, log pi = log N(u) - sum log(action_scale (1 - a^2)).
    """

    log_std_min, log_std_max = -5.0, 2.0

    def __init__(self, obs_dim: int, act_dim: int, action_scale: Tensor, alpha: float):
        super().__init__()
        self.net = MLP(obs_dim, *HIDDEN, 2 * act_dim)
        self.register_buffer("action_scale", action_scale.float())
        self.register_buffer("log_alpha", torch.tensor([math.log(alpha)]))

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """mu(s) and log sigma(s) of u. obs (B, S) -> (B, A), (B, A)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        half_range = 0.5 * (self.log_std_max - self.log_std_min)
        return mean, self.log_std_min + half_range * (torch.tanh(log_std) + 1)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
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
        self.q = nn.ModuleList(MLP(obs_dim + act_dim, *HIDDEN, 1) for _ in range(2))
        self.b = nn.ModuleList(
            MLP(obs_dim, 256, 256, 1) for _ in range(2 if shifting else 0)
        )
        for shift in self.b:  # no shift at the start
            nn.init.zeros_(shift[-1].weight)
            nn.init.zeros_(shift[-1].bias)

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


class Normal:
    """Standard normal numbers of an update: NumPy's, on CUDA torch's, within the graph."""

    def __init__(self, *shape: int, device="cpu"):
        self.tensor = torch.zeros(shape, device=device)

    def fill(self, rng: np.random.Generator):
        if self.tensor.is_cuda:
            self.tensor.normal_()
        else:
            rng.standard_normal(out=self.tensor.numpy(), dtype=np.float32)


# --- Target, losses and updates -------------------------------------------------------------------
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
    return reward + gamma * (1 - terminated) * (
        q_next.min(-1).values - alpha * log_prob
    )


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of sum_k (Q_k - y)^2. q (B, 2), target (B,) -> ()."""
    return (q - target[:, None]).square().sum(-1).mean()


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Batch mean of alpha log pi(a|s) - min_k Q_k(s,a). q (B, 2), log_prob (B,), alpha () -> ()."""
    return (alpha * log_prob - q.min(-1).values).mean()


def temperature_loss(
    log_alpha: Tensor, log_prob: Tensor, target_entropy: float
) -> Tensor:
    """-alpha (mean log pi + target entropy): alpha grows while entropy is below its target.  # S1

    Shapes: log_alpha (1,), log_prob (B,) -> ().
    """
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


CRITIC_METRICS = "losses/qf_loss losses/qf1_values losses/qf2_values sac/target".split()
ACTOR_METRICS = "losses/actor_loss losses/alpha_loss losses/alpha sac/entropy".split()


def make_critic_update(
    actor: Actor, critics: Critics, obs_dim: int, act_dim: int, args: Args
):
    """The critics' update of flat tensors, changed in place; returns CRITIC_METRICS (4,)."""
    sample, q_values = functional(actor.sample), functional(critics.q_values)

    def loss_and_q(theta, obs, action, target):
        q = q_values(theta, obs, action)  # Q_k(s,a)  (B, 2)
        return critic_loss(q, target), q

    def update(theta, target_theta, m, v, decay, phi, log_alpha, batch, noise):
        obs, action, next_obs, reward, terminated = split_batch(batch, obs_dim, act_dim)
        next_action, log_prob = sample(phi, next_obs, noise)  # a' ~ pi(.|s')
        q_next = q_values(
            target_theta, next_obs, next_action
        )  # Q'_k(s',a'), theta'  (B, 2)
        alpha = log_alpha.exp()
        target = soft_target(
            reward, terminated, q_next, log_prob, alpha, args.gamma
        )  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target)
        new_theta, *moments = adam(theta, m, v, decay, grad, args.q_lr)
        averaged = (
            1 - args.tau
        ) * target_theta + args.tau * new_theta  # Polyak: new theta'
        new = (new_theta, averaged, *moments)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        return torch.stack([loss, q[:, 0].mean(), q[:, 1].mean(), target.mean()])

    return update


def make_actor_update(
    actor: Actor, critics: Critics, obs_dim: int, act_dim: int, args: Args
):
    """The update of actor and temperature, changed in place; returns ACTOR_METRICS (4,)."""
    sample, q_values = functional(actor.sample), functional(critics.q_values)
    target_entropy = -float(act_dim)  # nats, over the environment's own actions

    def loss_and_log_prob(phi, log_alpha, theta, obs, noise):
        action, log_prob = sample(phi, obs, noise)  # a ~ pi(.|s)
        q = q_values(theta, obs, action)  # Q_k(s,a)  (B, 2)
        return actor_loss(q, log_prob, log_alpha.exp()), log_prob

    def update(
        phi, m, v, decay, log_alpha, m_alpha, v_alpha, decay_alpha, theta, batch, noise
    ):
        obs, *_ = split_batch(batch, obs_dim, act_dim)
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


def make_networks(
    args: Args, obs_dim: int, act_dim: int, action_scale: Tensor | None = None
) -> tuple[Actor, Critics]:
    """Actor and critics of the run's settings; they need no gradients outside the updates."""
    torch.manual_seed(args.seed)
    scale = torch.ones(act_dim) if action_scale is None else action_scale
    actor = Actor(obs_dim, act_dim, scale, alpha=1.0 if args.autotune else args.alpha)
    critics = Critics(obs_dim, act_dim, shifting=args.reward_shifting == "clipped")
    return actor.requires_grad_(False), critics.requires_grad_(False)


# --- Training -------------------------------------------------------------------------------------
def train(args: Args, run: Run):
    """Trains actor, critics and temperature, from the run's checkpoint if it has one."""
    hardware, device = run.hardware, run.device
    rng = np.random.default_rng(args.seed)  # replay and noise of the updates
    env = TrainingEnvs(args, device)
    dims, norm = (env.obs_dim, env.act_dim), env.norm
    capacity, max_steps = (
        min(args.buffer_size, args.total_timesteps),
        env.simulator.max_steps,
    )
    replay = VectorReplayBuffer(
        capacity, args.num_envs, *dims, max_steps, args.batch_size, device
    )
    actor, critics = (net.to(device) for net in make_networks(args, *dims))
    theta, phi, log_alpha = (
        flatten_parameters(critics),
        flatten_parameters(actor),
        actor.log_alpha,
    )
    noise = [Normal(args.batch_size, env.act_dim, device=device)]
    state = [
        theta,
        theta.clone(),
        *adam_moments(theta),
    ]  # theta, theta', m, v, (beta1^t, beta2^t)
    update, inputs = (
        make_critic_update(actor, critics, *dims, args),
        [phi, log_alpha, replay.batch],
    )
    critic_learner = Learner(update, state, inputs, noise, CRITIC_METRICS, hardware)
    state = [phi, *adam_moments(phi), log_alpha, *adam_moments(log_alpha)]
    update, inputs = (
        make_actor_update(actor, critics, *dims, args),
        [theta, replay.batch],
    )
    actor_learner = Learner(update, state, inputs, noise, ACTOR_METRICS, hardware)
    act = make_policy(actor, phi, *dims, args.num_envs, hardware)
    play = make_policy(actor, phi, *dims, args.eval_episodes, hardware)
    evaluator = make_evaluator(args, env, lambda obs, z: play(norm(obs), z))
    policy = {"actor": actor, "critics": critics, "norm": norm}
    learners = {"critic_learner": critic_learner, "actor_learner": actor_learner}
    run.start(env, evaluator, policy, rng, **learners, replay=replay, norm=norm)
    replay.start(env.obs)

    for step in run.steps():
        learning = step >= args.learning_starts
        if learning:
            z = torch.randn(args.num_envs, env.act_dim, device=device)
            action = act(norm(env.obs), z)  # a = tanh(mu + sigma z), z ~ N(0, I)
            updates = (step - args.learning_starts) * args.updates_per_step
            for update in range(updates + 1, updates + args.updates_per_step + 1):
                norm.normalise(replay.sample(rng), *dims)
                critic_learner.update(rng)  # S3
                if update % args.policy_frequency == 0:
                    for _ in range(args.policy_frequency):
                        actor_learner.update(rng)
        else:
            action = 2 * torch.rand(args.num_envs, env.act_dim, device=device) - 1
        replay.add(*env.step(action))
        metrics = critic_learner.read_metrics(step) | actor_learner.read_metrics(
            step
        )  # S4
        run.log(metrics if learning else {})


def load_evaluator(args: Args, saved: dict) -> Evaluator:
    """Evaluation of a saved policy."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = SimulatorEnvs(args, device)
    actor, _ = make_networks(args, envs.obs_dim, envs.act_dim)
    actor.to(device).load_state_dict(saved["actor"])
    norm = ObservationNorm(envs.obs_dim, device)
    norm.load_state_dict(saved["norm"])
    return Evaluator(args, envs, lambda obs, z: actor.sample(norm(obs), z)[0])


if __name__ == "__main__":
    sys.exit(main(Args, train, load_evaluator))
