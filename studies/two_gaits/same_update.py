"""Does the MEow authors' update fit the same transitions as ours does?

    git clone https://github.com/ChienFeng-hub/meow && git -C meow checkout b786d27
    python meow_continuous_action.py --env-id HalfCheetah-v4 --total-timesteps 90000
    python studies/two_gaits/same_update.py runs/RUN_NAME --repository meow > new.csv

The arms learn from the first 50,000 transitions of the run's replay buffer, in the
same batches: their update, ours (one dropout mask for both Q_k: D1) and ours with a
mask for each. A row is a measurement without dropout on the next 10,000 transitions:
the squared TD error of Q_1 and Q_2, its share of the variance of y - min_k V_k(s),
which the action has to explain, and the mean log sigma.

Needs the extras bench and dev of this project; their script imports stable-baselines3
and tensorboard.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import meow_continuous_action as ours
from harness.args import parse_args
from harness.compiling import Compiler, flatten_parameters
from harness.errors import UsageError
from harness.runs import explain

DIMS = (17, 6)  # of HalfCheetah's observation and action
ROW = 17 + 6 + 17 + 2  # a transition
TRAIN = 50_000  # transitions to learn from
UNSEEN = 10_000  # the next ones, to measure on


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a HalfCheetah-v4 run with a checkpoint after step 60,000"""
    repository: Path | None = None
    """clone of github.com/ChienFeng-hub/meow, for their arm"""
    arms: list[Literal["theirs", "ours", "two masks"]] = field(
        default_factory=lambda: ["theirs", "ours", "two masks"]
    )
    """the updates to compare"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """of the weights, the batches and the dropout masks"""
    updates: list[int] = field(default_factory=lambda: [1000, 2000, 4000, 8000])
    """numbers of updates after which to measure"""


class Theirs:
    """Their update, compiled as authors_code.py --compile does."""

    def __init__(self, args: ours.Args, script):
        torch.manual_seed(args.seed)
        bounds = dict(sigma_min=args.log_sigma_min, sigma_max=args.log_sigma_max)
        sizes = dict(action_sizes=DIMS[1], state_sizes=DIMS[0], device="cpu")
        self.policy = script.FlowPolicy(alpha=args.alpha, **bounds, **sizes)
        self.target = script.FlowPolicy(alpha=args.alpha, **bounds, **sizes)
        self.target.load_state_dict(self.policy.state_dict())
        self.target.eval()
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), args.learning_rate, fused=True
        )
        self.qv = torch.compile(self.policy.get_qv)
        self.v = torch.compile(self.target.get_v)
        self.args = args

    @staticmethod
    def twice(function, *inputs: Tensor) -> Tensor:
        """The values of both twins (B, 2): theirs come from a doubled batch."""
        return function(*(x.repeat(2, 1) for x in inputs)).view(2, -1).T

    def update(self, batch: Tensor):
        obs, action, next_obs, reward, terminated = ours.split_batch(batch, *DIMS)
        with torch.no_grad():
            v_next = self.twice(self.v, next_obs)
            target = reward + (1 - terminated) * self.args.gamma * v_next.min(-1).values
        self.policy.train()
        q = self.twice(lambda *x: self.qv(*x)[0], obs, action)
        loss = torch.nn.functional.mse_loss(q, target[:, None].expand_as(q))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.args.max_grad_norm
        )
        self.optimizer.step()
        tau = self.args.tau
        for new, old in zip(
            self.policy.parameters(), self.target.parameters(), strict=True
        ):
            old.data.copy_(tau * new.data + (1 - tau) * old.data)

    def q_v_next(
        self, obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> tuple[Tensor, ...]:
        self.policy.eval()
        q = self.twice(lambda *x: self.policy.get_qv(*x)[0], obs, action)
        v = self.twice(self.policy.get_v, obs)
        v_next = self.twice(self.target.get_v, next_obs)
        _, sigma = self.policy.prior.get_mean_std(action, obs)
        return q, v, v_next, sigma.log()


class TwoMasks(ours.EnergyFlow):
    """Q_1 and Q_2 with a dropout mask each, as the authors' doubled batch has them."""

    def q_values(
        self, obs: Tensor, action: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        if kept is None:
            return super().q_values(obs, action)
        first, second = kept.chunk(2, dim=2)
        q1 = super().q_values(obs, action, first)[:, 0]
        q2 = super().q_values(obs, action, second)[:, 1]
        return torch.stack([q1, q2], -1)


class Ours:
    """Our update, as the script makes it."""

    def __init__(self, args: ours.Args, masks: int, compiled: bool):
        self.rng, self.dropout = np.random.default_rng(args.seed), args.dropout
        self.flow = ours.make_flow(args, *DIMS)
        self.target = ours.make_flow(args, *DIMS)
        if masks == 2:
            self.flow.__class__ = TwoMasks
        theta = flatten_parameters(self.flow)
        target_theta = flatten_parameters(self.target)
        learner = [theta, target_theta, *ours.adam_moments(theta)]
        shape = self.flow.n_couplings, 2, masks * args.batch_size, self.flow.hidden
        self.kept = torch.ones(shape, dtype=torch.bool)
        self.batch = torch.zeros(args.batch_size, ROW)
        compiler = Compiler(compiled, torch.device("cpu"), lambda _: None)
        update = ours.make_update(self.flow, args)
        tensors = *learner, self.batch, self.kept
        self.make_step = compiler("the update", update, *tensors)

    def update(self, batch: Tensor):
        self.batch.copy_(batch)
        ours.draw_dropout(self.kept, self.dropout, self.rng)
        self.make_step()

    def q_v_next(
        self, obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> tuple[Tensor, ...]:
        q, v = self.flow.q_values(obs, action), self.flow.soft_values(obs)
        return q, v, self.target.soft_values(next_obs), self.flow.log_sigma(obs)


def make_arm(name: str, args: ours.Args, script, compiled=True) -> Theirs | Ours:
    if name == "theirs":
        return Theirs(args, script)
    return Ours(args, masks=2 if name == "two masks" else 1, compiled=compiled)


@torch.no_grad()
def measure(arm: Theirs | Ours, rows: Tensor, gamma: float) -> tuple[float, ...]:
    """Squared TD error, its share of the variance of y - V, and mean log sigma."""
    obs, action, next_obs, reward, terminated = ours.split_batch(rows, *DIMS)
    q, v, v_next, log_sigma = arm.q_v_next(obs, action, next_obs)
    target = ours.soft_target(reward, terminated, v_next, gamma)
    error = (q - target[:, None]).square().mean()
    share = error / (target - v.min(-1).values).var()
    return error.item(), share.item(), log_sigma.mean().item()


def load_script(repository: Path | None):
    """The authors' script as a module beside ours, which has the same name."""
    if repository is None:
        raise UsageError(
            "the arm theirs needs --repository, a clone of the authors' code"
        )
    file = repository / "cleanrl" / "cleanrl" / "meow_continuous_action.py"
    if not file.exists():
        raise UsageError(
            f"{file} not found: --repository must be a clone of the authors' code"
        )
    sys.path.append(str(file.parent))  # their script imports its package nf
    spec = importlib.util.spec_from_file_location("authors_script", file)
    sys.modules["authors_script"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """The exit code; what is missing is one sentence."""
    try:
        compare()
    except Exception as error:
        return explain(error)
    return 0


def compare():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    script = load_script(options.repository) if "theirs" in options.arms else None
    torch._inductor.config.fallback_random = True  # for theirs: eager dropout masks
    checkpoint = torch.load(options.run / "checkpoint.pt", weights_only=False)
    rows = checkpoint["replay"]["rows"]
    if len(rows) < TRAIN + UNSEEN or rows.shape[1] != ROW:
        raise UsageError(
            f"{options.run} holds no {TRAIN + UNSEEN} transitions of HalfCheetah"
        )
    print("arm,seed,update,td_error,unexplained,log_sigma")
    for seed in options.seeds:
        paper = ["--env-id", "HalfCheetah-v4", "--seed", str(seed)]
        args, _ = parse_args(ours.Args, "meow_continuous_action.py", "", paper)
        for name in options.arms:
            arm = make_arm(name, args, script)
            rng = np.random.default_rng(1000 + seed)  # the same batches for every arm
            for n in range(1, max(options.updates) + 1):
                arm.update(rows[rng.integers(0, TRAIN, args.batch_size)])
                if n in options.updates:
                    values = measure(arm, rows[TRAIN : TRAIN + UNSEEN], args.gamma)
                    cells = [name, seed, n, *(f"{x:.3f}" for x in values)]
                    print(*cells, sep=",", flush=True)


if __name__ == "__main__":
    sys.exit(main())
