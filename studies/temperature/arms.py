"""One change to a script, or several: the arms of this study.

    python studies/temperature/arms.py base --env-id Ant-v4 --total-timesteps 90000
    python studies/temperature/arms.py normal+scaled --env-id Ant-v4 --seed 2
    python studies/temperature/arms.py sac+normal --env-id Ant-v4      # the control

The words before the options are changes of `ARMS`, joined by +; with `sac` they change
sac_continuous_action.py instead of meow_auto_continuous_action.py, where only those of
`FOR_SAC` make sense; `layers` is for SAC alone. All options are the script's. The run
is named after the arm (auto_normal_scaled, sac_normal).
"""

import importlib.util
import inspect
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


# --- Normalisation: for MEow without tuning and for SAC -------------------------------
def normal(script: ModuleType):
    """Observations less their running mean, over their standard deviation, cut at 10.

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
            return ((obs - self.mean) * self.scale).clamp(-10, 10)

    class ReplayBuffer(script.ReplayBuffer):
        def __init__(self, capacity: int, obs_dim: int, *rest):
            super().__init__(capacity, obs_dim, *rest)
            self.count, self.moments = 0, np.zeros((2, obs_dim))

        def add(self, obs: np.ndarray, *rest):
            super().add(obs, *rest)
            self.count += 1
            before = obs - self.moments[0]  # Welford's mean and sum of squares
            self.moments[0] += before / self.count
            self.moments[1] += before * (obs - self.moments[0])
            self.tell()

        def tell(self):
            mean, squares = torch.from_numpy(self.moments)
            scale = 1 / torch.sqrt(squares / self.count + 1e-8)
            for network in networks:
                network.mean.copy_(mean)
                network.scale.copy_(scale)

        def state_dict(self) -> dict:
            moments = torch.from_numpy(self.moments.copy())
            return super().state_dict() | {"count": self.count, "moments": moments}

        def load_state_dict(self, state: dict):
            super().load_state_dict(state)
            self.count, self.moments = state["count"], state["moments"].numpy()
            self.tell()

    script.ReplayBuffer = ReplayBuffer
    if not hasattr(script, "EnergyFlow"):

        class Actor(Normalising, script.Actor):
            def gaussian(self, obs):
                return super().gaussian(self.normal(obs))

        class Critics(Normalising, script.Critics):
            def q_values(self, obs, action):
                return super().q_values(self.normal(obs), action)

        script.Actor, script.Critics = Actor, Critics
        return

    class EnergyFlow(Normalising, script.EnergyFlow):
        def kappa(self, obs):
            return super().kappa(self.normal(obs))

        def translation(self, i, x, obs, kept=None):
            return super().translation(i, x, self.normal(obs), kept)

        def shifts(self, obs):
            return super().shifts(self.normal(obs))

    script.EnergyFlow = EnergyFlow


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


def straight(script: ModuleType):
    """Couplings that see the state alone: u = x + mu(s), a Gaussian policy."""

    class EnergyFlow(script.EnergyFlow):
        def translation(self, i, x, obs, kept=None):
            return super().translation(i, 0 * x, obs, kept)

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

        def q_values(self, obs, u, kept=None):  # (B, K + 1)
            q = super().q_values(obs, u, kept)
            gap = (self.soft_values(obs) - q)[:, :1]
            return torch.cat([q, self.weight * gap], dim=-1)

    class ReplayBuffer(script.ReplayBuffer):
        def sample(self, rng):
            for flow in flows:
                flow.weight.fill_(0.05 * max(0.0, 1 - self.added / 90_000))
            return super().sample(rng)

    def meow_loss(q: Tensor, target: Tensor) -> Tensor:
        return loss_of_td(q[:, :-1], target) + q[:, -1].mean()

    script.EnergyFlow, script.ReplayBuffer = EnergyFlow, ReplayBuffer
    script.meow_loss = meow_loss


def near(script: ModuleType):
    """Squared errors weigh less, the farther the action is from the policy.

    With d = |z|^2 / A, the mean square of the latent (1 for the policy's own actions),
    the weight is 1 up to d = 4 and falls as exp((4 - d) / 2) to 0.02. Q is quadratic in
    the latent, and no quadratic fits near and far actions together. flow/q and
    flow/shift_gap are not the script's here.
    """

    class EnergyFlow(script.EnergyFlow):
        def q_values(self, obs, u, kept=None):  # (B, K + 1)
            q = super().q_values(obs, u, kept)
            squash = self.alpha * script.log_tanh_slope(u).sum(-1)
            energy = self.shifts(obs)[:, 0] - q[:, 0] - squash
            d = 2 * energy / (self.alpha * self.act_dim)
            return torch.cat([q, d.detach()[:, None]], dim=-1)

    def meow_loss(q: Tensor, target: Tensor) -> Tensor:
        weight = torch.exp((4 - q[:, -1]).clamp(max=0) / 2).clamp(min=0.02)
        errors = (q[:, :-1] - target[:, None]).square().sum(-1)
        return 0.5 * (weight * errors).mean()

    script.EnergyFlow, script.meow_loss = EnergyFlow, meow_loss


def student(script: ModuleType):
    """Q falls with the logarithm of the distance: a policy of Student's t.

        Q_k  = m_k - c log(1 + sum_i kappa_i x_i^2 / (2 c)) - alpha sum log(1 - a^2)
        V_k  = m_k + alpha (1/2 sum_i log(2 pi c / kappa_i) + log Gamma(c/alpha - A/2)
               - log Gamma(c/alpha))
        x_i  = z_i sqrt(2 c / (kappa_i chi2)),  chi2 of 2 c / alpha - A degrees

    again exact at every alpha; c -> infinity is the script's form. c, in reward units,
    is learned, and above alpha A. A resumed run draws other chi2.
    """

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__(obs_dim, act_dim, args)
            self.log_c = nn.Parameter(torch.tensor([math.log(args.alpha * act_dim)]))

        def c(self) -> Tensor:  # (1,)
            return torch.exp(self.log_c) + self.alpha * self.act_dim

        def fall(self, obs, x):
            squares = (self.kappa(obs) * x * x).sum(-1)
            return self.c() * torch.log1p(squares / (2 * self.c()))

        def q_values(self, obs, u, kept=None):
            energy = self.fall(obs, self.to_x(u, obs, kept))
            squash = self.alpha * script.log_tanh_slope(u).sum(-1)
            return self.shifts(obs) - (energy + squash)[:, None]

        def log_z(self, obs):
            c = self.c().double()
            p = c / self.alpha
            gammas = torch.lgamma(p - self.act_dim / 2) - torch.lgamma(p)
            halves = 0.5 * torch.log(2 * math.pi * self.c() / self.kappa(obs)).sum(-1)
            return halves + gammas.float()

        def soft_values(self, obs):
            return self.shifts(obs) + self.alpha * self.log_z(obs)[:, None]

        def log_prob_of_x(self, obs, x, u):
            inside = -self.fall(obs, x) / self.alpha - self.log_z(obs)
            return inside - script.log_tanh_slope(u).sum(-1)

        def log_prob(self, obs, u):
            return self.log_prob_of_x(obs, self.to_x(u, obs), u)

        def sample(self, obs, z):
            x = z * torch.rsqrt(self.kappa(obs))  # z: already sqrt(2 c / chi2) wide
            u = self.to_u(x, obs)
            return u, self.log_prob_of_x(obs, x, u)

    make_policy = script.make_policy

    def make_student_policy(network, theta, n, run, name):
        policy = make_policy(network, theta, n, run, name)
        rng = np.random.default_rng(run.args.seed)

        def wide(obs, z):
            c = float(network.c())
            degrees = 2 * c / float(network.alpha) - network.act_dim
            chi2 = rng.chisquare(degrees, (len(z), 1))
            return policy(obs, z * np.sqrt(2 * c / chi2, dtype=np.float32))

        return wide

    script.EnergyFlow, script.make_policy = EnergyFlow, make_student_policy


def averaged(script: ModuleType):
    """Acts and is evaluated with theta', the running average, instead of theta."""
    make_policy = script.make_policy

    def make_averaged_policy(network, _, *rest):
        target_theta = locals_of_train()["learner"][1]
        return make_policy(network, target_theta, *rest)

    script.make_policy = make_averaged_policy


def locals_of_train() -> dict:
    """The variables of the running `train`, by name."""
    frame = inspect.currentframe()
    while "learner" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals


def move(alpha: Tensor, wanted: float):
    """Moves alpha towards `wanted`, by at most a thousandth, in place."""
    log_step = math.log(wanted / alpha)
    alpha.mul_(math.exp(min(max(log_step, -1e-3), 1e-3)))


def with_memory(script: ModuleType, size: int):
    """Gives the flow `memory` (size,), zeros at first, kept in checkpoints."""

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("memory", torch.zeros(size, dtype=torch.float64))

    script.EnergyFlow = EnergyFlow


def noise(script: ModuleType):
    """alpha is 0.05 of the TD error's root mean square, of about 1,000 updates.

    No target of the entropy: a temperature far below the errors of Q follows noise.
    """
    with_memory(script, 1)  # the mean square

    def tune(alpha, *_):
        now = locals_of_train()
        loss, memory = now["values"][0], now["flow"].memory
        memory += (loss - memory) * (1e-3 if memory else 1.0)
        move(alpha, 0.05 * math.sqrt(memory))

    script.tune = tune


def errors(script: ModuleType):
    """alpha is 0.1 of the mean size of the TD error of the actions just played.

    delta = r + gamma V(s') - V(s) - alpha log pi(a|s), V = min_k V_k, of theta: Q is
    V + alpha log pi. These actions lie near the policy. A mean of about 1,000 steps.
    """
    with_memory(script, 3)  # the mean, Q of the last action, whether there is one

    def tune(alpha, log_prob, args):
        now = locals_of_train()
        flow = now["flow"]
        mean, q, started = flow.memory.tolist()
        v = float(flow.soft_values(torch.from_numpy(now["obs"])[None]).min())
        if started and not now["truncated"]:
            v_next = 0.0 if now["terminated"] else v
            size = abs(now["reward"] + args.gamma * v_next - q)
            mean += (size - mean) * (1e-3 if mean else 1.0)
            move(alpha, 0.1 * mean)
        q = v + float(alpha) * log_prob * flow.act_dim
        flow.memory.copy_(torch.tensor([mean, q, 1.0]))

    script.tune = tune


def returns(script: ModuleType):
    """alpha is 0.0005 of the largest size of a discounted return so far.

    The sum of the rewards of the episode so far, each times gamma for each step since.
    """
    with_memory(script, 2)  # the sum, its largest size

    def tune(alpha, _, args):
        now = locals_of_train()  # with the last transition
        total, largest = now["flow"].memory.tolist()
        total = now["reward"] + args.gamma * total
        largest = max(largest, abs(total))
        move(alpha, 0.0005 * largest)
        if now["terminated"] or now["truncated"]:
            total = 0.0
        now["flow"].memory.copy_(torch.tensor([total, largest]))

    script.tune = tune


def bound(script: ModuleType):
    """After `noise`, `errors` or `returns`: the entropy's target moves sigma_max.

    log sigma_max <- log sigma_max + eta (H + log pi(a|s)), from 0.02 to 7.4.
    """
    tune_alpha = script.tune

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__(obs_dim, act_dim, args)
            del self.sigma_max
            self.register_buffer("sigma_max", torch.tensor(float(args.sigma_max)))

    def tune(alpha, log_prob, args):
        flow = locals_of_train()["flow"]
        error = min(max(args.target_entropy + log_prob, -1.0), 1.0)
        flow.sigma_max.mul_(math.exp(args.alpha_lr * error)).clamp_(0.02, 7.4)
        tune_alpha(alpha, log_prob, args)

    script.EnergyFlow, script.tune = EnergyFlow, tune


def held(script: ModuleType):
    """The noise of acting is held for k steps, k ~ Zeta(2).

    A resumed run draws other k.
    """
    make_policy = script.make_policy

    def make_held_policy(network, theta, n, run, name):
        policy = make_policy(network, theta, n, run, name)
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
        conservative,
        near,
        student,
        straight,
        averaged,
        noise,
        errors,
        returns,
        bound,
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
        if sac != (word in FOR_SAC) and (sac or word == "layers"):
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
