"""One change to a script, or several: the arms of this study.

    python studies/temperature/arms.py base --env-id Ant-v4 --total-timesteps 90000
    python studies/temperature/arms.py evenly+scaled --env-id Ant-v4 --seed 2
    python studies/temperature/arms.py sac+normal --env-id Ant-v4      # the control

The words before the options are changes of `ARMS`, joined by +; with `sac` they change
sac_continuous_action.py instead of meow_auto_continuous_action.py, where only those of
`FOR_SAC` make sense; `normal` and `layers` are for SAC alone. All options are the
script's. The run is named after the arm (auto_evenly_scaled, sac_normal).
"""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from meow_auto_continuous_action import ObservationNorm

ROOT = Path(__file__).parents[2]


# --- For SAC, and for both ------------------------------------------------------------
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
            self.norm = ObservationNorm(obs_dim)

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


def scaled(script: ModuleType):
    """Rewards over max(std of the discounted return, largest |return| / 5).

    As FlashSAC does; gamma 0.99. alpha is then in these units.
    """

    class ReplayBuffer(script.ReplayBuffer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            # steps, discounted return, its mean, its sum of squares, largest |return|
            self.returns, self.last = np.zeros(5), None

        def add(self, obs, action, next_obs, reward, terminated):
            super().add(obs, action, next_obs, reward, terminated)
            if self.last is None or not np.array_equal(self.last, obs):
                self.returns[1] = 0.0  # an episode begins
            self.last = np.copy(next_obs)
            count, total, mean, squares, largest = self.returns
            count, total = count + 1, float(reward) + 0.99 * total
            before = total - mean
            mean += before / count
            squares += before * (total - mean)
            largest = max(largest, abs(total))
            self.returns[:] = count, total, mean, squares, largest

        def sample(self, rng):
            batch = super().sample(rng)
            count, _, _, squares, largest = self.returns
            batch[:, -2] /= max(np.sqrt(squares / count), largest / 5, 1e-3)
            return batch

        def state_dict(self) -> dict:
            more = {"returns": self.returns, "last": self.last}
            tensors = {name: torch.from_numpy(np.copy(v)) for name, v in more.items()}
            return super().state_dict() | tensors

        def load_state_dict(self, state: dict):
            super().load_state_dict(state)
            self.returns, self.last = state["returns"].numpy(), state["last"].numpy()

    script.ReplayBuffer = ReplayBuffer


def recent(script: ModuleType):
    """Half of each batch from the newest 10,000 transitions."""

    class ReplayBuffer(script.ReplayBuffer):
        def sample(self, rng):
            index = rng.integers(0, len(self), len(self.batch))
            half = len(index) // 2
            newest = min(len(self), 10_000)
            index[:half] = (self.added - 1 - index[:half] % newest) % self.capacity
            index = torch.from_numpy(index).to(self.rows.device)
            return torch.index_select(self.rows, 0, index, out=self.batch)

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


# --- MEow without tuning --------------------------------------------------------------
def plain(script: ModuleType):
    """m and h without LayerNorm."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for network in (*self.m, self.h):
                network.norms = nn.ModuleList(nn.Identity() for _ in network.norms)

    script.EnergyFlow = EnergyFlow


def bounded(script: ModuleType):
    """Translations of at most 2: t <- 2 tanh(t / 2)."""

    class EnergyFlow(script.EnergyFlow):
        def translation(self, i, x, obs, kept=None):
            return 2 * torch.tanh(super().translation(i, x, obs, kept) / 2)

    script.EnergyFlow = EnergyFlow


def trunk(script: ModuleType):
    """One network with two outputs, m_1 and m_2, which start a little apart."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__(obs_dim, act_dim, args)
            shared = script.MLP([obs_dim, 256, 256, 2])
            for parameter in shared.layers[-1].parameters():
                parameter.data *= 0.01
            self.m = nn.ModuleList([shared])

    script.EnergyFlow = EnergyFlow


def single(script: ModuleType):
    """m_1 alone: nothing to take the smaller of."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.m = self.m[:1]

    script.EnergyFlow = EnergyFlow


def batch(script: ModuleType):
    """BatchNorm for LayerNorm in m and h, s and s' in one pass, as CrossQ does.

    theta' is theta, whatever --tau. Acting takes running means of the statistics, which
    move by 0.01 a step and which a resumed run begins anew.
    """

    class BatchNorm(nn.Module):
        """x (B, D) less its mean, over its deviation, times weight, plus bias."""

        def __init__(self, dim: int):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))
            self.bias = nn.Parameter(torch.zeros(dim))
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("var", torch.ones(dim))

        def normal(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return (x - mean) * torch.rsqrt(var + 1e-5) * self.weight + self.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.normal(x, self.mean, self.var)

        def both(self, x: Tensor, next_x: Tensor, seen: list):
            both = torch.cat([x, next_x])
            mean, var = both.mean(0), both.var(0, correction=0)
            seen += [mean.detach(), var.detach()]
            return self.normal(x, mean, var), self.normal(next_x, mean, var).detach()

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for network in (*self.m, self.h):
                dims = [norm.normalized_shape[0] for norm in network.norms]
                network.norms = nn.ModuleList(BatchNorm(dim) for dim in dims)

        def running(self) -> list[Tensor]:
            norms = [norm for net in (*self.m, self.h) for norm in net.norms]
            return [tensor for norm in norms for tensor in (norm.mean, norm.var)]

        def q_and_distance_and_v(self, obs, u, next_obs, kept):
            """Q_k(s,a), d, V_k(s') without gradient, and the batch's statistics."""
            seen = []

            def both(network):
                x, next_x = obs, next_obs
                layers = zip(network.norms, network.swishes, strict=True)
                for i, (norm, swish) in enumerate(layers):
                    x, next_x = network.layers[i](x), network.layers[i](next_x)
                    x, next_x = norm.both(x, next_x.detach(), seen)
                    x, next_x = swish(x), swish(next_x)
                last = network.layers[-1]
                return last(x), last(next_x).detach()

            shifts = [both(network) for network in self.m]
            kappas = []
            for h in both(self.h):
                log_kappa = self.log_kappa_start + 10 * torch.tanh(h / 10)
                kappas.append(torch.exp(log_kappa) + self.alpha / self.sigma_max**2)
            m, next_m = (torch.cat(pair, dim=-1) for pair in zip(*shifts, strict=True))
            x = self.to_x(u, obs, kept)
            energy = 0.5 * (kappas[0] * x * x).sum(-1)
            squash = self.alpha * script.log_tanh_slope(u).sum(-1)
            q = m - (energy + squash)[:, None]
            log_z = 0.5 * torch.log(2 * math.pi * self.alpha / kappas[1]).sum(-1)
            v = next_m + self.alpha * log_z[:, None]
            return q, 2 * energy / (self.alpha * self.act_dim), v, seen

    def make_update(flow, args):
        forward = script.function_of_parameters(flow.q_and_distance_and_v)

        def loss_and_rest(theta, obs, u, next_obs, reward, terminated, kept):
            q, d, v_next, seen = forward(theta, obs, u, next_obs, kept)
            v_next = v_next.detach()
            target = script.soft_target(reward, terminated, v_next, args.gamma)
            weight = script.near_weight(d.detach())
            loss = script.meow_loss(q, target, weight)
            return loss, (q, v_next, target, seen)

        def update(theta, target_theta, m, v, decay, batch, kept=None):
            parts = script.split_batch(batch, flow.obs_dim, flow.act_dim)
            gradient = torch.func.grad_and_value(loss_and_rest, has_aux=True)
            obs, u, next_obs, reward, terminated = parts
            inputs = obs, u, next_obs, reward, terminated, kept
            grad, (loss, (q, v_next, target, seen)) = gradient(theta, *inputs)
            grad, grad_norm = script.clip_gradient(grad, args.max_grad_norm)
            moments = theta, m, v, decay
            new_theta, *new = script.adam(*moments, grad, args.learning_rate)
            new = (new_theta, new_theta, *new)
            old = (theta, target_theta, m, v, decay)
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(value)
            for tensor, value in zip(flow.running(), seen, strict=True):
                tensor.copy_(0.99 * tensor + 0.01 * value)
            shift_gap = (q[:, 0] - q[:, -1]).abs().mean()
            means = q.mean(), v_next.mean(), target.mean(), shift_gap
            return torch.stack([loss, grad_norm, *means])

        return update

    script.EnergyFlow, script.make_update = EnergyFlow, make_update


def conservative(script: ModuleType):
    """The loss and lambda (V - Q), that is -lambda alpha log pi(a|s), of the batch.

    lambda falls from 0.05 to 0 over the first 90,000 steps. flow/q and flow/shift_gap
    are not the script's here.
    """
    flows, loss_of_td = [], script.meow_loss

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("weight", torch.tensor(0.0))  # lambda
            flows.append(self)

        def q_and_distance(self, obs, u, kept=None):  # (B, K + 1), (B,)
            q, d = super().q_and_distance(obs, u, kept)
            gap = (self.soft_values(obs) - q)[:, :1]
            return torch.cat([q, self.weight * gap], dim=-1), d

    class ReplayBuffer(script.ReplayBuffer):
        def sample(self, rng):
            for flow in flows:
                flow.weight.fill_(0.05 * max(0.0, 1 - self.added / 90_000))
            return super().sample(rng)

    def meow_loss(q: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return loss_of_td(q[:, :-1], target, weight) + q[:, -1].mean()

    script.EnergyFlow, script.ReplayBuffer = EnergyFlow, ReplayBuffer
    script.meow_loss = meow_loss


def evenly(script: ModuleType):
    """All transitions weigh the same, however far their actions are."""
    script.near_weight = torch.ones_like


def floor(script: ModuleType):
    """Far transitions weigh 0.2 at least, not 0.02."""
    script.near_weight = lambda d: torch.exp((4 - d) / 2).clamp(0.2, 1)


def raw(script: ModuleType):
    """Observations as they are."""

    class ObservationNorm(script.ObservationNorm):
        def __call__(self, obs):
            return obs

    script.ObservationNorm = ObservationNorm


def held(script: ModuleType):
    """The noise of acting is held for k steps, k ~ Zeta(2).

    A resumed run draws other k.
    """
    make_policy = script.make_policy

    def make_held_policy(network, norm, theta, n, run, name):
        policy = make_policy(network, norm, theta, n, run, name)
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


FOR_SAC = ("normal", "scaled", "recent", "layers")
FOR_SAC_ALONE = ("normal", "layers")
ARMS = {
    function.__name__: function
    for function in (
        normal,
        scaled,
        recent,
        layers,
        plain,
        bounded,
        trunk,
        single,
        batch,
        conservative,
        evenly,
        floor,
        raw,
        held,
    )
}


def changed_script(arm: str) -> ModuleType:
    """A script of its own with these changes. Raises: SystemExit for a wrong word."""
    words = arm.split("+")
    sac = "sac" in words
    name = "sac_continuous_action" if sac else "meow_auto_continuous_action"
    spec = importlib.util.spec_from_file_location(f"arm_{arm}", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    changes = [word for word in words if word not in ("sac", "base")]
    for word in changes:
        if word not in ARMS:
            known = ", ".join(ARMS)
            sys.exit(f"error: {word} is not one of base, sac, {known}")
        if (word not in FOR_SAC) if sac else (word in FOR_SAC_ALONE):
            sys.exit(f"error: {word} is no change of {name}.py")
        ARMS[word](script)
    script.label = "_".join(["sac" if sac else "auto", *changes])
    return script


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, end="")
        return 2
    script = changed_script(argv[0])
    words = ["--exp-name", script.label, *argv[1:]]
    return script.main(script.Args, script.train, script.evaluate_saved, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
