"""MEow on thousands of robots at once: the Isaac Gym tasks, on MuJoCo or on NVIDIA's simulators.

    python meow_isaacgym.py --env-id Ant                                 # the paper's experiment
    python meow_isaacgym.py --resume runs/<run_name>                     # go on exactly
    python meow_isaacgym.py --evaluate runs/<run_name> --capture-video

The algorithm of meow_continuous_action.py (see there for the symbols), on many environments that
are stepped together. A vector step steps each of them once; all counts of steps are vector steps.
Every tensor stays on the simulator's device. --simulator mujoco: the paper's tasks re-created on
MuJoCo, which run anywhere (package isaac_tasks); isaacgym and isaaclab: NVIDIA's, where installed.

Method: Chao et al., "Maximum Entropy Reinforcement Learning via Energy-Based Normalizing Flow",
NeurIPS 2024, arXiv 2405.13629. One conditional flow z = g(a|s) is policy, soft Q and soft value:

    Q(s,a)  = alpha (log p_z(z) + sum_{S_n} log|det J| + b(s))       soft Q: one flow pass
    V(s)    = alpha (-log Z(s) + b(s)),  Z(s) = prod_{S_l} |det J|   soft value: no flow pass
    pi(a|s) = exp((Q(s,a) - V(s)) / alpha)                           policy: the flow's density

The loss is the batch mean of sum_k (Q_k - y)^2 / 2, y = r + gamma (1 - terminated) min_k V_k(s').
Shapes: N environments, B batch, A action, S observation, K shifts, P parameters, T vector steps.

Deviations from the authors' code for these tasks (github.com/ChienFeng-hub/meow, folder skrl); D1
to D10 are those of meow_continuous_action.py:
I1  Time-outs are bootstrapped (theirs treated them as terminations).
I2  The row that a late reset leaves behind is not learned from (theirs stored it).
I3  theta' starts as theta and follows it (theirs started from other weights and was never
    synchronised).
I4  Each observation enters the running mean and variance once (theirs counted an observation
    again each time it was drawn from the replay buffer).
I5  A batch is drawn over all environments and steps (theirs: whole vector steps).
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
from torch.nn.functional import linear, softplus

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
def paper(
    steps: int, num_envs: int, batch: int, tau: float, alpha: float, **more
) -> dict:
    sizes = dict(total_timesteps=steps, num_envs=num_envs, batch_size=batch)
    return sizes | dict(tau=tau, alpha=alpha, **more)


PAPER_SETTINGS = {  # the defaults of these tasks; all others get those of `Args`
    "Ant": paper(1_000_000, 128, 1024, 0.0005, 0.075, log_sigma_max=2.0),
    "Humanoid": paper(1_000_000, 128, 1024, 0.00025, 0.25),
    "Ingenuity": paper(500_000, 128, 1024, 0.0025, 0.025, log_sigma_min=-4.0),
    "Anymal": paper(1_000_000, 128, 1024, 0.025, 0.00075, log_sigma_max=-1.0),
    "AllegroHand": paper(1_000_000, 512, 256, 0.001, 0.1, log_sigma_min=-4.0),
    "FrankaCabinet": paper(1_000_000, 512, 256, 0.01, 0.075),
}


@dataclass
class Args(IsaacArgs):
    exp_name: str = "meow_isaacgym"  # name of the experiment, a part of the run name

    # Algorithm
    learning_rate: float = 1e-3  # Adam's step size
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging: theta' <- (1 - tau) theta' + tau theta after each update
    alpha: float = 0.2  # temperature: reward units per nat of entropy
    log_sigma_min: float = (
        -5.0
    )  # lower bound of the LOG standard deviation of the linear layer
    log_sigma_max: float = (
        -0.3
    )  # upper bound of the LOG standard deviation of the linear layer
    max_grad_norm: float = 30.0  # the gradient is scaled down to this norm
    dropout: float = (
        0.1  # dropout probability in the couplings, in the Q pass of the update only
    )
    reward_shifting: Literal["clipped", "single", "none"] = (
        "clipped"  # 2 shifts, 1 or none
    )
    shift_units: Literal["nats", "reward"] = (
        "nats"  # add alpha b_k (nats) or b_k to Q_k and V_k
    )
    coupling: Literal["additive", "affine"] = (
        "additive"  # x + t, or the ablation x exp(s) + t
    )
    replay_pre_tanh: bool = (
        False  # the replay buffer keeps u = atanh(a); a loses |u| above 6.1
    )
    bf16: bool = (
        False  # shift networks' products in bfloat16 (8 bits); slow on CPUs without AMX
    )

    settings = PAPER_SETTINGS

    def __post_init__(self):
        super().__post_init__()
        self.check(
            "learning_rate alpha max_grad_norm", lambda x: x > 0, "positive and finite"
        )
        self.check("gamma", lambda x: 0 <= x <= 1, "from 0 to 1")
        self.check("tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self.check("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1")
        self.check(
            "log_sigma_min log_sigma_max",
            lambda x: -20 <= x <= 20,
            "from -20 to 20 (log)",
        )
        self.check(
            "log_sigma_max", lambda x: x > self.log_sigma_min, "above --log-sigma-min"
        )


# --- Networks -------------------------------------------------------------------------------------
Triple = tuple[Tensor, Tensor, Tensor]


class Swish(nn.Module):
    """x sigmoid(beta x), one learnable beta per unit, initially 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class MLP(nn.Module):
    """in -> hidden -> hidden -> out; hidden: linear, LayerNorm (if `norm`), swish, dropout.

    Weights start orthogonal or at zero, biases at PyTorch's default. `bf16`: the hidden layers'
    products in bfloat16.
    """

    def __init__(
        self,
        dims: list[int],
        init: str,
        norm: bool = False,
        dropout: float = 0.0,
        bf16: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))
        self.norms = nn.ModuleList(
            nn.LayerNorm(d) if norm else nn.Identity() for d in dims[1:-1]
        )
        self.swishes = nn.ModuleList(Swish(d) for d in dims[1:-1])
        self.dropout, self.bf16 = dropout, bf16
        for layer in self.layers:
            {"orthogonal": nn.init.orthogonal_, "zeros": nn.init.zeros_}[init](
                layer.weight
            )

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, in) -> (B, out). keep (2, B, hidden): the units that dropout keeps; None: all."""
        for i, (norm, swish) in enumerate(zip(self.norms, self.swishes, strict=True)):
            x = swish(norm(self.hidden(self.layers[i], x)))
            if keep is not None:
                x = torch.where(keep[i], x / (1 - self.dropout), 0.0)
        return self.layers[-1](x)

    def hidden(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if not self.bf16:
            return layer(x)
        return linear(x.bfloat16(), layer.weight.bfloat16()).to(x.dtype) + layer.bias


class EnergyFlow(nn.Module):
    """The conditional flow that is policy, soft Q and soft value at once (MEow).

    From action to latent: u = atanh(a) and four couplings with alternating masks (the non-linear
    layers), then z = x / sigma(s) (the linear layer). For any action dimension and float dtype.
    `pre_tanh`: the methods take and give u in a's place, unbounded; all densities stay those of a.
    """

    couplings, hidden, pre_tanh = 4, 64, False

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        alpha: float,
        log_sigma_min: float,
        log_sigma_max: float,
        dropout: float = 0.1,
        reward_shifting: str = "clipped",
        shift_units: str = "nats",
        coupling: str = "additive",
        bf16: bool = False,
    ):
        super().__init__()
        self.reward_units = shift_units == "reward"
        self.affine, self.shifting = coupling == "affine", reward_shifting != "none"
        out = 2 * act_dim if self.affine else act_dim
        dims = [act_dim + obs_dim, self.hidden, self.hidden, out]
        t = [
            MLP(dims, "orthogonal", norm=True, dropout=dropout)
            for _ in range(self.couplings)
        ]
        n_shifts = {"clipped": 2, "single": 1, "none": 0}[reward_shifting]
        b = [MLP([obs_dim, 256, 256, 1], "zeros", bf16=bf16) for _ in range(n_shifts)]
        self.t, self.b = nn.ModuleList(t), nn.ModuleList(b)
        self.h = MLP([obs_dim, self.hidden, self.hidden, act_dim], "zeros")
        self.log_sigma_min, self.log_sigma_max = log_sigma_min, log_sigma_max
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        mask = (torch.arange(act_dim) % 2 == 0).float()
        self.register_buffer("masks", torch.stack([mask, 1 - mask]))

    def log_sigma(self, obs: Tensor) -> Tensor:
        """log sigma(s) of the linear layer, between its bounds. obs (B, S) -> (B, A), nats."""
        half_range = 0.5 * (self.log_sigma_max - self.log_sigma_min)
        return self.log_sigma_min + half_range * (torch.tanh(self.h(obs)) + 1)

    def shifts(self, obs: Tensor) -> Tensor:
        """Learnable reward shifts b_k(s), in nats. obs (B, S) -> (B, K).

        The networks give nats, as in the authors' code, where a small alpha makes V learn slowly,
        or reward units: Q_k = alpha (log p_z(z) + log|det J_n|) + b_k(s), V_k = -alpha log Z + b_k.
        """
        if not self.shifting:
            return torch.zeros_like(obs[:, :1])
        b = torch.cat([b(obs) for b in self.b], dim=-1)
        return b / self.alpha if self.reward_units else b

    def to_latent(
        self, obs: Tensor, action: Tensor, keep: Tensor | None = None
    ) -> Triple:
        """z = g(a|s), and log|det dz/da| of the non-linear and of the linear layers.

        Shapes: obs (B, S), action (B, A) in [-1, 1], keep (4, 2, B, 64) -> z (B, A), (B,), (B,).
        Units: nats.
        """
        limit = 1 - (1e-12 if action.dtype == torch.float64 else 1e-5)  # D10
        x = action if self.pre_tanh else torch.atanh(action.clamp(-limit, limit))
        log_det_nonlinear = -log_tanh_slope(x).sum(-1)
        for i in reversed(range(self.couplings)):
            scale, t = self.coupling(i, x, obs, keep)
            x = (x - t) * torch.exp(-scale)
            log_det_nonlinear = log_det_nonlinear - scale.sum(-1)
        log_sigma = self.log_sigma(obs)
        return x * torch.exp(-log_sigma), log_det_nonlinear, -log_sigma.sum(-1)

    def to_action(self, obs: Tensor, z: Tensor) -> Triple:
        """a = g^-1(z|s), and log|det da/dz| of the non-linear and of the linear layers.

        Shapes: obs (B, S), z (B, A) -> action (B, A), (B,), (B,). Units: nats.
        """
        log_sigma = self.log_sigma(obs)
        x, log_det_nonlinear = z * torch.exp(log_sigma), torch.zeros_like(z[:, 0])
        for i in range(self.couplings):
            scale, t = self.coupling(i, x, obs)
            x = x * torch.exp(scale) + t
            log_det_nonlinear = log_det_nonlinear + scale.sum(-1)
        log_det_nonlinear = log_det_nonlinear + log_tanh_slope(x).sum(-1)
        return (
            x if self.pre_tanh else torch.tanh(x),
            log_det_nonlinear,
            log_sigma.sum(-1),
        )

    def coupling(self, i: int, x: Tensor, obs: Tensor, keep: Tensor | None = None):
        """(scale, t) of coupling i, (B, A), zero where its mask m is 1; they read m*x and s."""
        m = self.masks[i % 2]
        out = self.t[i](
            torch.cat([m * x, obs], dim=-1), None if keep is None else keep[i]
        )
        scale, t = out.chunk(2, dim=-1) if self.affine else (torch.zeros_like(out), out)
        return (1 - m) * scale, (1 - m) * t

    def q_values(
        self, obs: Tensor, action: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Q_k(s,a) = alpha (log p_z(z) + log|det J_n| + b_k(s)). -> (B, K), reward units  # D1"""
        z, log_det_nonlinear, _ = self.to_latent(obs, action, keep)
        return self.alpha * (
            (log_prior(z) + log_det_nonlinear)[:, None] + self.shifts(obs)
        )

    def soft_values(self, obs: Tensor) -> Tensor:
        """V_k(s) = alpha (-log Z(s) + b_k(s)), exact. obs (B, S) -> (B, K), reward units  # D2

        Z = prod |det J_l| = prod 1/sigma_i, and int exp(Q_k/alpha) da = exp(b_k) / Z.
        """
        log_z = -self.log_sigma(obs).sum(-1)
        return self.alpha * (-log_z[:, None] + self.shifts(obs))

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a|s) = log p_z(z) + log|det J_n| + log|det J_l|. -> (B,), nats  # D3"""
        z, log_det_nonlinear, log_det_linear = self.to_latent(obs, action)
        return log_prior(z) + log_det_nonlinear + log_det_linear

    def sample(self, obs: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a = g^-1(z|s) ~ pi(.|s), z ~ N(0, I), and log pi(a|s). (B, S) -> (B, A), (B,), nats."""
        if z is None:
            z = obs.new_empty(len(obs), self.masks.shape[1]).normal_()
        action, log_det_nonlinear, log_det_linear = self.to_action(obs, z)
        return action, log_prior(z) - log_det_nonlinear - log_det_linear

    def mode_action(self, obs: Tensor) -> Tensor:
        """g^-1(0|s), the mode of the density before tanh, not argmax_a Q. (B, S) -> (B, A)."""
        return self.sample(obs, obs.new_zeros(len(obs), self.masks.shape[1]))[0]


def log_prior(z: Tensor) -> Tensor:
    """log p_z(z) of the standard normal. z (B, A) -> (B,)."""
    return -0.5 * (z * z).sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def log_tanh_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2), elementwise and without cancellation.  # D7"""
    return 2 * (math.log(2) - u - softplus(-2 * u))


class Keep:
    """Which units dropout keeps, bool; their number must be a multiple of 4."""

    def __init__(self, *shape: int, dropout: float, device="cpu"):
        self.tensor, self.dropout = (
            torch.ones(shape, dtype=torch.bool, device=device),
            dropout,
        )

    def fill(self, rng: np.random.Generator):
        """On CPU 16 random bits a unit: many times faster than a float, exact to 1/65536.  # D9"""
        if self.tensor.is_cuda:
            self.tensor.bernoulli_(1 - self.dropout)
            return
        bits = rng.integers(0, 2**64, self.tensor.numel() // 4, dtype=np.uint64).view(
            np.uint16
        )
        threshold = round(self.dropout * 2**16)
        np.greater_equal(
            bits.reshape(self.tensor.shape), threshold, out=self.tensor.numpy()
        )


# --- Target, loss and update ----------------------------------------------------------------------
def soft_target(
    reward: Tensor, terminated: Tensor, v_next: Tensor, gamma: float
) -> Tensor:
    """y = r + gamma (1 - terminated) min_k V_k(s'). (B,), (B,), (B, K) -> (B,), reward units."""
    return reward + gamma * (1 - terminated) * v_next.min(-1).values


def meow_loss(q: Tensor, target: Tensor) -> Tensor:
    """Batch mean of sum_k (Q_k - y)^2 / 2. q (B, K), target (B,) -> ()."""
    return 0.5 * (q - target[:, None]).square().sum(-1).mean()


def clip_gradient(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales grad (P,) to at most max_norm; also returns the norm before, ()."""
    norm = torch.linalg.vector_norm(grad)
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


METRICS = (
    "losses/loss losses/grad_norm flow/q flow/v_next flow/target flow/shift_gap".split()
)


def make_update(flow: EnergyFlow, obs_dim: int, act_dim: int, args: Args):
    """The whole update as one function of flat tensors, changed in place; returns METRICS (6,)."""
    q_values, soft_values = functional(flow.q_values), functional(flow.soft_values)

    def loss_and_q(theta, obs, action, target, keep):
        q = q_values(theta, obs, action, keep)  # Q_k(s,a)  (B, K)
        return meow_loss(q, target), q

    def update(theta, target_theta, m, v, decay, batch, keep=None):
        obs, action, next_obs, reward, terminated = split_batch(batch, obs_dim, act_dim)
        v_next = soft_values(target_theta, next_obs)  # V_k(s'), theta'  (B, K)
        target = soft_target(reward, terminated, v_next, args.gamma)  # y  (B,)
        gradient = torch.func.grad_and_value(loss_and_q, has_aux=True)
        grad, (loss, q) = gradient(theta, obs, action, target, keep)
        grad, grad_norm = clip_gradient(grad, args.max_grad_norm)
        new_theta, *moments = adam(theta, m, v, decay, grad, args.learning_rate)
        averaged = (
            1 - args.tau
        ) * target_theta + args.tau * new_theta  # Polyak: new theta'
        new = (new_theta, averaged, *moments)
        for tensor, value in zip((theta, target_theta, m, v, decay), new, strict=True):
            tensor.copy_(value)
        shift_gap = (q[:, 0] - q[:, -1]).abs().mean()  # alpha |b_1 - b_2|
        return torch.stack(
            [loss, grad_norm, q.mean(), v_next.mean(), target.mean(), shift_gap]
        )

    return update


def make_flow(args: Args, obs_dim: int, act_dim: int) -> EnergyFlow:
    """The flow of the run's settings; its parameters need no gradients outside the update."""
    torch.manual_seed(args.seed)
    flow = EnergyFlow(
        obs_dim,
        act_dim,
        args.alpha,
        args.log_sigma_min,
        args.log_sigma_max,
        dropout=args.dropout,
        reward_shifting=args.reward_shifting,
        shift_units=args.shift_units,
        coupling=args.coupling,
        bf16=args.bf16,
    )
    return flow.requires_grad_(False)


# --- Training -------------------------------------------------------------------------------------
def train(args: Args, run: Run):
    """Trains the flow, from the run's checkpoint if it has one."""
    hardware, device = run.hardware, run.device
    rng = np.random.default_rng(args.seed)  # replay and dropout
    env = TrainingEnvs(args, device)
    dims, norm = (env.obs_dim, env.act_dim), env.norm
    capacity, max_steps = (
        min(args.buffer_size, args.total_timesteps),
        env.simulator.max_steps,
    )
    replay = VectorReplayBuffer(
        capacity, args.num_envs, *dims, max_steps, args.batch_size, device
    )
    flow = make_flow(args, *dims).to(device)
    flow.pre_tanh = (
        args.replay_pre_tanh
    )  # then it gives u, and the environments get tanh(u)
    squash = torch.tanh if flow.pre_tanh else nn.Identity()
    theta = flatten_parameters(flow)
    state = [
        theta,
        theta.clone(),
        *adam_moments(theta),
    ]  # theta, theta', m, v, (beta1^t, beta2^t)
    shape = (
        flow.couplings,
        2,
        args.batch_size,
        flow.hidden,
    )  # two hidden layers in each coupling
    keep = [Keep(*shape, dropout=args.dropout, device=device)] if args.dropout else []
    update = make_update(flow, *dims, args)
    learner = Learner(update, state, [replay.batch], keep, METRICS, hardware)
    act = make_policy(flow, theta, *dims, args.num_envs, hardware)
    play = make_policy(flow, theta, *dims, args.eval_episodes, hardware)
    evaluator = make_evaluator(args, env, lambda obs, z: squash(play(norm(obs), z)))
    parts = dict(learner=learner, replay=replay, norm=norm)
    run.start(env, evaluator, {"flow": flow, "norm": norm}, rng, **parts)
    replay.start(env.obs)

    for step in run.steps():
        learning = step >= args.learning_starts
        if learning:
            z = torch.randn(args.num_envs, env.act_dim, device=device)
            action = act(norm(env.obs), z)  # a = g^-1(z|s), z ~ N(0, I)
            for _ in range(args.updates_per_step):
                norm.normalise(replay.sample(rng), *dims)
                learner.update(rng)  # D8
        else:
            action = 2 * torch.rand(args.num_envs, env.act_dim, device=device) - 1
            if flow.pre_tanh:  # rand may give 0, so the action -1
                action = torch.atanh(action.double().clamp_min(1e-7 - 1)).float()
        _, *outcome = env.step(squash(action))
        replay.add(action, *outcome)
        run.log(learner.read_metrics(step) if learning else {})


def load_evaluator(args: Args, saved: dict) -> Evaluator:
    """Evaluation of a saved policy."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = SimulatorEnvs(args, device)
    flow = make_flow(args, envs.obs_dim, envs.act_dim).to(device)
    flow.load_state_dict(saved["flow"])
    norm = ObservationNorm(envs.obs_dim, device)
    norm.load_state_dict(saved["norm"])
    return Evaluator(args, envs, lambda obs, z: flow.sample(norm(obs), z)[0])


if __name__ == "__main__":
    sys.exit(main(Args, train, load_evaluator))
