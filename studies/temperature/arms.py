"""One change to a script, or several: the arms of this study.

    python studies/temperature/arms.py base --env-id Ant-v4 --total-timesteps 90000
    python studies/temperature/arms.py near+two --env-id Ant-v4 --seed 2
    python studies/temperature/arms.py sac+normal+units+layers --env-id Ant-v4

The words before the options are changes of `ARMS`, joined by +; with `sac` they change
sac_continuous_action.py instead of meow_auto_continuous_action.py, where only those of
`FOR_SAC` make sense. All of these but `held` are for SAC alone: they give it what the
script without tuning has. All options are the script's. The run is named after the arm:
auto_near_two, sac_normal.
"""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import meow_auto_isaacgym
from meow_auto_continuous_action import (
    RecentReplayBuffer,
    RunningMeanStd,
    reward_unit,
)

ROOT = Path(__file__).parents[2]


# --- For SAC, and for both ------------------------------------------------------------
def recent(script: ModuleType):
    """SAC: half of each batch from the newest 10,000, as with --recent-size."""

    class ReplayBuffer(RecentReplayBuffer):
        def __init__(self, *sizes):
            super().__init__(10_000, *sizes)

    script.ReplayBuffer = ReplayBuffer


def normal(script: ModuleType):
    """SAC: observations less their running mean, over their deviation, cut at 5.

    The statistics are of every transition so far, in float64.
    """
    networks = []  # whose observations are normalised

    class Normalising(nn.Module):
        """Has mean and scale (S,) of observations."""

        def __init__(self, obs_dim: int, *rest, **options):
            super().__init__(obs_dim, *rest, **options)
            self.register_buffer("mean", torch.zeros(obs_dim))
            self.register_buffer("scale", torch.ones(obs_dim))
            networks.append(self)

        def normal(self, obs: Tensor) -> Tensor:
            return ((obs - self.mean) * self.scale).clamp(-5, 5)

    class ReplayBuffer(script.ReplayBuffer):
        def __init__(self, capacity: int, obs_dim: int, *rest):
            super().__init__(capacity, obs_dim, *rest)
            self.norm = RunningMeanStd(obs_dim)

        def add(self, obs: np.ndarray, *rest):
            super().add(obs, *rest)
            self.norm.update(torch.from_numpy(obs[None]))
            self.tell()

        def tell(self):
            scale = torch.rsqrt(self.norm.var + 1e-8)
            for network in networks:
                network.mean.copy_(self.norm.mean)
                network.scale.copy_(scale)

        def state_dict(self) -> dict:
            return super().state_dict() | {"norm": self.norm.state_dict()}

        def load_state_dict(self, state: dict):
            super().load_state_dict(state)
            self.norm.load_state_dict(state["norm"])
            self.tell()

    script.ReplayBuffer = ReplayBuffer

    class Actor(Normalising, script.Actor):
        def gaussian(self, obs):
            return super().gaussian(self.normal(obs))

    class Critics(Normalising, script.Critics):
        def q_values(self, obs, action):
            return super().q_values(self.normal(obs), action)

    script.Actor, script.Critics = Actor, Critics


def units(script: ModuleType):
    """SAC: rewards in units of their deviation, as in the script without tuning."""

    class ReplayBuffer(script.ReplayBuffer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.rewards = RunningMeanStd(1)

        def add(self, obs, action, next_obs, reward, terminated):
            super().add(obs, action, next_obs, reward, terminated)
            self.rewards.update(torch.tensor([[reward]], dtype=torch.float64))

        def sample(self, rng):
            batch = super().sample(rng)
            batch[:, -2].div_(reward_unit(self.rewards))
            return batch

        def state_dict(self) -> dict:
            return super().state_dict() | {"rewards": self.rewards.state_dict()}

        def load_state_dict(self, state: dict):
            super().load_state_dict(state)
            self.rewards.load_state_dict(state["rewards"])

    script.ReplayBuffer = ReplayBuffer


def layers(script: ModuleType):
    """SAC: LayerNorm before each ReLU, of actor and critics."""

    class MLP(nn.Sequential):
        def __init__(self, *dims: int):
            parts = []
            for inputs, outputs in pairwise(dims):
                parts += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
            super().__init__(*parts[:-2])

    script.MLP = MLP


def averages(script: ModuleType):
    """SAC: averages of the actor's parameters are evaluated too; all else stays.

    Over about the last 1,000, 2,000 and 5,000 steps: averaged/0.001 and so on. When a
    run is resumed, they begin anew.
    """
    make_policy, evaluate = script.make_policy, script.evaluate
    acting_theta, means = [], {}

    def make_watched_policy(*inputs):  # ..., theta, n, run, name
        policy, theta, name = make_policy(*inputs), inputs[-4], inputs[-1]
        if name != "acting":
            return policy
        acting_theta.append(theta)

        def acting(obs, z):
            for rate in (1e-3, 5e-4, 2e-4):
                means.setdefault(rate, theta.clone()).lerp_(theta, rate)
            return policy(obs, z)

        return acting

    def evaluate_all(args, envs, policy, step, session):
        result = evaluate(args, envs, policy, step, session)
        for rate, mean in means.items():
            theta = acting_theta[0]
            now = theta.clone()
            theta.copy_(mean)
            returns, _ = evaluate(args, envs, policy, step, session)
            theta.copy_(now)
            session.logger.log(step, {f"averaged/{rate}": float(np.mean(returns))})
        return result

    script.make_policy, script.evaluate = make_watched_policy, evaluate_all


def held(script: ModuleType):
    """The noise of acting is held for k steps, k ~ Zeta(2).

    A resumed run draws other k.
    """
    make_policy = script.make_policy

    def make_held_policy(*inputs):  # ..., run, name
        policy, run, name = make_policy(*inputs), inputs[-2], inputs[-1]
        if name != "acting":
            return policy
        rng, left, kept = np.random.default_rng(run.args.seed), 0, None

        def acting(obs, z):
            nonlocal left, kept
            if left == 0:
                left, kept = rng.zipf(2), z
            left -= 1
            return policy(obs, kept)

        return acting

    script.make_policy = make_held_policy


# --- MEow without tuning --------------------------------------------------------------
def plain(script: ModuleType):
    """m and h without LayerNorm."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for network in (self.m, self.h):
                network.norms = nn.ModuleList(nn.Identity() for _ in network.norms)

    script.EnergyFlow = EnergyFlow


def bounded(script: ModuleType):
    """Translations of at most 2: t <- 2 tanh(t / 2)."""

    class EnergyFlow(script.EnergyFlow):
        def translation(self, i, x, obs, kept=None):
            return 2 * torch.tanh(super().translation(i, x, obs, kept) / 2)

    script.EnergyFlow = EnergyFlow


def random(script: ModuleType):
    """Couplings whose last layers start orthogonal too: a random mode."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for network in self.t:
                last = network.layers[-1]
                nn.init.orthogonal_(last.weight)
                nn.init.uniform_(last.bias, -1 / 8, 1 / 8)  # PyTorch's, 64 inputs

    script.EnergyFlow = EnergyFlow


def evenly(script: ModuleType):
    """Every transition weighs 1."""
    script.far_weight = torch.ones_like


def heavy(script: ModuleType):
    """A far transition that is worth more than Q says weighs 0.2 at least."""
    script.far_weight = lambda d: torch.exp((4 - d) / 2).clamp(0.2, 1)


def huber(script: ModuleType):
    """Errors beyond 10 alpha count linearly.

    flow/q is not the script's here.
    """

    class EnergyFlow(script.EnergyFlow):
        def q_and_distance(self, obs, u, kept=None):  # (B, 2), (B,)
            q, d = super().q_and_distance(obs, u, kept)
            return torch.stack([q, self.alpha.expand_as(q)], dim=-1), d

    def meow_loss(q: Tensor, d: Tensor, target: Tensor) -> Tensor:
        q, alpha = q.unbind(-1)
        w = torch.where(target > q, script.far_weight(d), 1.0).detach()
        error, most = (q - target).abs(), 10 * alpha
        near = error.clamp(max=most)
        return (w * near * (error - near / 2)).mean()

    script.EnergyFlow, script.meow_loss = EnergyFlow, meow_loss


def near(script: ModuleType):
    """A far transition weighs less also where it is worth less than Q says."""

    def meow_loss(q: Tensor, d: Tensor, target: Tensor) -> Tensor:
        w = script.far_weight(d).detach()
        return 0.5 * (w * (q - target).square()).mean()

    script.meow_loss = meow_loss


def two(script: ModuleType):
    """Two networks m_k, and so two Q_k and V_k, of which the smaller one counts."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__(obs_dim, act_dim, args)
            self.m_2 = script.MLP([obs_dim, 256, 256, 1])

        def with_second(self, first: Tensor, obs: Tensor) -> Tensor:  # (B,) -> (B, 2)
            difference = (self.m_2(obs) - self.m(obs))[:, 0]
            return torch.stack([first, first + difference], dim=-1)

        def q_and_distance(self, obs, u, kept=None):
            q, d = super().q_and_distance(obs, u, kept)
            return self.with_second(q, obs), d

        def soft_values(self, obs):
            return self.with_second(super().soft_values(obs), obs)

    target_of_one, loss_of_one = script.soft_target, script.meow_loss

    def soft_target(reward, terminated, v_next, gamma):
        return target_of_one(reward, terminated, v_next.min(-1).values, gamma)

    def meow_loss(q, d, target):
        return sum(loss_of_one(q[:, k], d, target) for k in range(2))

    script.EnergyFlow = EnergyFlow
    script.soft_target, script.meow_loss = soft_target, meow_loss


def split(script: ModuleType):
    """The loss of meow_auto_isaacgym.py: m learns from near actions, g and kappa from
    all."""
    rho = []  # of the newest flow

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__(obs_dim, act_dim, args)
            rho[:] = [args.temperature]

    def meow_loss(q: Tensor, d: Tensor, target: Tensor) -> Tensor:
        return meow_auto_isaacgym.meow_loss(q, d, target, rho[0])

    script.EnergyFlow, script.meow_loss = EnergyFlow, meow_loss


def conservative(script: ModuleType):
    """The loss and lambda (V - Q), that is -lambda alpha log pi(a|s), of the batch.

    lambda falls from 0.05 to 0 over the first 90,000 steps. flow/q is not the script's
    here.
    """
    flows, loss_of_td = [], script.meow_loss

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("weight", torch.tensor(0.0))  # lambda
            flows.append(self)

        def q_and_distance(self, obs, u, kept=None):  # (B, 2), (B,)
            q, d = super().q_and_distance(obs, u, kept)
            gap = self.soft_values(obs) - q
            return torch.stack([q, self.weight * gap], dim=-1), d

    class RecentReplayBuffer(script.RecentReplayBuffer):
        def sample(self, rng):
            for flow in flows:
                flow.weight.fill_(0.05 * max(0.0, 1 - self.added / 90_000))
            return super().sample(rng)

    def meow_loss(q: Tensor, d: Tensor, target: Tensor) -> Tensor:
        return loss_of_td(q[:, 0], d, target) + q[:, 1].mean()

    script.EnergyFlow, script.RecentReplayBuffer = EnergyFlow, RecentReplayBuffer
    script.meow_loss = meow_loss


def raw(script: ModuleType):
    """Observations as they are."""

    class RunningMeanStd(script.RunningMeanStd):
        def __call__(self, obs):
            return obs

    script.RunningMeanStd = RunningMeanStd


FOR_SAC_ALONE = ("recent", "normal", "units", "layers", "averages")
FOR_SAC = (*FOR_SAC_ALONE, "held")
LOSSES = ("near", "huber", "two", "split", "conservative")
JOINED = (["near", "two"], ["near", "conservative"])
"""those of them that go together"""
ARMS = {  # in the order in which they are applied
    function.__name__: function
    for function in (
        recent,
        normal,
        units,
        layers,
        averages,
        held,
        plain,
        bounded,
        random,
        evenly,
        heavy,
        huber,
        near,
        two,
        split,
        conservative,
        raw,
    )
}
SCRIPTS = {  # by the word that chooses it, with its arms
    "base": ("meow_auto_continuous_action", ARMS.keys() - FOR_SAC_ALONE),
    "sac": ("sac_continuous_action", FOR_SAC),
}


def changed_script(arm: str) -> ModuleType:
    """A script of its own with these changes. Raises: SystemExit for a wrong word."""
    words = set(arm.split("+"))
    kind = "sac" if "sac" in words else "base"
    name, possible = SCRIPTS[kind]
    spec = importlib.util.spec_from_file_location(f"arm_{arm}", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    if unknown := words - {*SCRIPTS, *ARMS}:
        known = ", ".join([*SCRIPTS, *ARMS])
        sys.exit(f"error: {min(unknown)} is not one of {known}")
    changes = [word for word in ARMS if word in words]
    of_the_loss = [word for word in changes if word in LOSSES]
    if of_the_loss[1:] and of_the_loss not in JOINED:
        sys.exit(f"error: {'+'.join(of_the_loss)} can't be joined")
    for word in changes:
        if word not in possible:
            sys.exit(f"error: {word} is no change of {name}.py")
        ARMS[word](script)
    script.label = "_".join(["auto" if kind == "base" else kind, *changes])
    return script


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, end="")
        return 2
    script = changed_script(argv[0])
    launcher = ["python", "studies/temperature/arms.py", argv[0]]
    words = ["--exp-name", script.label, *argv[1:]]
    train, evaluate_saved = script.train, script.evaluate_saved
    return script.main(script.Args, train, evaluate_saved, words, launcher)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
