"""What training on many environments at once needs: options, environments, replay, evaluation."""

import contextlib
import math
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness.args import RunArgs
from harness.envs import Evaluator, check_finite, derive_seed
from harness.files import RunError, UsageError
from harness.replay import check_memory, split_batch
from isaac_tasks.interface import Simulator, SimulatorError
from isaac_tasks.make import make_simulator

Simulators = Literal["auto", "isaacgym", "isaaclab", "mujoco"]


@dataclass
class IsaacArgs(RunArgs):
    """Steps are vector steps, which step every environment once."""

    env_id: str = (
        "Ant"  # Ant, Humanoid, Ingenuity; a task of isaacgymenvs; an Isaac Lab id
    )

    # Simulator
    simulator: Simulators = "auto"  # auto: mujoco where it has the task, else NVIDIA's
    num_envs: int = 128  # environments stepped together
    variant: Literal["oige", "ige"] = (
        "oige"  # constants of OmniIsaacGymEnvs or of IsaacGymEnvs
    )
    sim_threads: int = (
        1  # CPU threads that step the environments of mujoco; results are the same
    )
    batch_size: int = 1024  # transitions per update
    buffer_size: int = 15_000  # vector steps kept in the replay buffer
    learning_starts: int = (
        100  # vector steps with uniform random actions; after them updates begin
    )
    updates_per_step: int = 1  # updates per vector step

    resume_may_change = RunArgs.resume_may_change + " sim_threads"
    evaluate_may_change = RunArgs.evaluate_may_change + " simulator sim_threads"

    def __post_init__(self):
        super().__post_init__()
        counts = "num_envs sim_threads batch_size buffer_size learning_starts updates_per_step"
        self.check(counts, lambda x: x >= 1, "at least 1")


def make_envs(
    args: IsaacArgs, num_envs: int, seed: int, device: torch.device
) -> Simulator:
    """`num_envs` environments of the run's task. Raises: UsageError."""
    options = dict(device=device, threads=args.sim_threads, variant=args.variant)
    try:
        return make_simulator(args.simulator, args.env_id, num_envs, seed, **options)
    except SimulatorError as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from None


@contextlib.contextmanager
def simulator_errors():
    """As a decorator: the simulator's errors become ours."""
    try:
        yield
    except SimulatorError as error:
        raise RunError(
            f"the simulator failed: {error}; the last checkpoint is intact"
        ) from None


class ObservationNorm:
    """Running mean and variance (S,) of all observations so far; each is counted once.  # I4"""

    def __init__(self, obs_dim: int, device: torch.device | str = "cpu"):
        zeros = torch.zeros(obs_dim, dtype=torch.float64, device=device)
        self.mean, self.var, self.count = zeros, zeros + 1, zeros[:1].clone()

    def update(self, obs: Tensor):
        """Adds observations (N, S) [Chan et al., parallel variance]."""
        n, obs = len(obs), obs.double()
        delta, total = obs.mean(0) - self.mean, self.count + n
        squares = self.count * self.var + n * obs.var(0, correction=0)
        squares += delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def __call__(self, obs: Tensor) -> Tensor:
        """obs (..., S) with mean 0 and variance 1, clipped to +-5 (as in the authors' runs)."""
        scaled = (obs - self.mean) / torch.sqrt(self.var + 1e-8)
        return scaled.clamp(-5, 5).to(obs.dtype)

    def normalise(self, batch: Tensor, obs_dim: int, act_dim: int):
        """Normalises the observations of a replay batch (B, row) in place."""
        obs, _, next_obs, _, _ = split_batch(batch, obs_dim, act_dim)
        for part in (obs, next_obs):
            part.copy_(self(part))

    def state_dict(self) -> dict:
        return {name: value.cpu() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict):
        for name, value in vars(self).items():
            value.copy_(state[name])


class TrainingEnvs:
    """The training environments, their episodes' statistics and those of the observations.

    `obs` (N, S): the observations to act on.
    """

    def __init__(self, args: IsaacArgs, device: torch.device):
        self.simulator = make_envs(
            args, args.num_envs, derive_seed(args.seed, 0), device
        )
        self.env_id, self.num_envs = args.env_id, args.num_envs
        self.steps, self.last_return, self.diverged = 0, math.nan, 0
        self.obs_dim, self.act_dim = self.simulator.obs_dim, self.simulator.act_dim
        self.norm = ObservationNorm(self.obs_dim, device)
        zeros = torch.zeros(args.num_envs, device=device)
        self.returns, self.lengths = zeros, zeros.clone()  # of the episodes under way
        self.ended = torch.zeros(
            3, device=device
        )  # number, sum of returns, sum of lengths

    @simulator_errors()
    def reset(self):
        """Starts new episodes everywhere."""
        self.obs = self.simulator.reset()
        check_finite(self.env_id, self.steps, observation=self.obs)
        self.norm.update(self.obs)

    @simulator_errors()
    def step(self, action: Tensor) -> tuple[Tensor, ...]:
        """One vector step, as `VectorReplayBuffer.add` takes it: action (N, A), reward,
        terminated, truncated (N,), final_obs (N, S), the next obs (N, S), valid (N,) or None."""
        check_finite(self.env_id, self.steps, action=action)
        self.obs, reward, terminated, truncated, final_obs = self.simulator.step(action)
        values = dict(observation=self.obs, final_observation=final_obs, reward=reward)
        check_finite(self.env_id, self.steps, **values)
        self.steps += 1
        self.norm.update(self.obs)
        valid = self.simulator.valid
        self.returns += reward
        self.lengths += 1
        done = terminated | truncated
        self.diverged += self.simulator.diverged
        self.ended += torch.stack(
            [done.sum(), self.returns[done].sum(), self.lengths[done].sum()]
        )
        new = done if valid is None else done | ~valid
        self.returns.masked_fill_(new, 0)
        self.lengths.masked_fill_(new, 0)
        return action, reward, terminated, truncated, final_obs, self.obs, valid

    def episode_metrics(self, due: bool) -> dict[str, float]:
        """When due, mean return and length of the episodes that ended since it last was.

        charts/diverged: environments whose physics broke down since the run began.
        """
        if not due:
            return {}
        number, returns, lengths = self.ended.tolist()
        self.ended.zero_()
        metrics = {"charts/diverged": float(self.diverged), "charts/episodes": number}
        if not number:
            return metrics
        self.last_return = returns / number
        metrics["charts/episodic_return"] = self.last_return
        return metrics | {"charts/episodic_length": lengths / number}

    def state_dict(self) -> dict:
        tensors = {
            name: getattr(self, name).cpu()
            for name in ("obs", "returns", "lengths", "ended")
        }
        numbers = {
            name: getattr(self, name) for name in ("steps", "last_return", "diverged")
        }
        return tensors | numbers | {"simulator": self.simulator.state_dict()}

    def load_state_dict(self, state: dict):
        for name in ("steps", "last_return", "diverged"):
            setattr(self, name, state[name])
        if not state["simulator"]:
            text = "this simulator can't restore its environments: their episodes start anew"
            print(f"warning: {text}", file=sys.stderr)
            self.reset()
            return
        if not self.simulator.exact_resume:
            print(
                "note: on a GPU a resumed run goes on, but not bit for bit",
                file=sys.stderr,
            )
        self.simulator.load_state_dict(state["simulator"])
        for name in ("returns", "lengths", "ended"):
            getattr(self, name).copy_(state[name])
        self.obs = state["obs"].to(self.returns.device)


class VectorReplayBuffer:
    """The last T vector steps of N environments, on the simulator's device.

    Each observation is stored once: what follows step t is what precedes step t + 1. Only after a
    time-out does an update need more, the final observation of the old episode. An environment
    times out at most once in `max_steps` steps, so these fit into a ring with one row for as many.
    (After a termination the target doesn't look at the next observation.)
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
        self.widths = [obs_dim, act_dim, obs_dim, 1, 1]
        self.capacity, self.num_envs, self.max_steps, self.added = (
            capacity,
            num_envs,
            max_steps,
            0,
        )
        slots, blocks = capacity + 1, capacity // max_steps + 2
        need = 4 * num_envs * (slots * (obs_dim + act_dim + 3) + blocks * obs_dim)
        try:
            check_memory(capacity, need, device)
        except UsageError as error:
            raise UsageError(f"--num-envs {num_envs}, {error}") from None
        self.obs = torch.empty(slots, num_envs, obs_dim, device=device)
        # action | reward | terminated | truncated
        self.rows = torch.empty(slots, num_envs, act_dim + 3, device=device)
        self.final_obs = torch.zeros(blocks, num_envs, obs_dim, device=device)
        self.invalid = np.zeros(
            (slots, num_envs), dtype=bool
        )  # on the host, where rows are drawn
        self.batch = torch.zeros(batch_size, sum(self.widths), device=device)
        self.index = torch.zeros(
            3, batch_size, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self.device_index = self.index.to(device)

    def __len__(self) -> int:
        """Transitions to draw from, the invalid ones included."""
        return min(self.added, self.capacity) * self.num_envs

    def start(self, obs: Tensor):
        """Stores first observations (N, S). After a reset the last step's outcome is unknown."""
        slot = self.added % len(self.obs)
        if not torch.equal(self.obs[slot], obs):
            self.invalid[slot - 1] = True
        self.obs[slot] = obs

    def add(
        self,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        final_obs: Tensor,
        obs: Tensor,
        valid: Tensor | None = None,
    ):
        """Stores a vector step: (N, A), (N,), (N,), (N,), (N, S), and the next step's obs (N, S).

        valid (N,) bool: the rows that may be drawn (None: all).
        """
        slot, block = (
            self.added % len(self.obs),
            self.added // self.max_steps % len(self.final_obs),
        )
        flags = torch.stack([reward, terminated.float(), truncated.float()], -1)
        self.rows[slot] = torch.cat([action, flags], -1)
        old = self.final_obs[block]
        self.final_obs[block] = torch.where(truncated[:, None], final_obs, old)  # I1
        self.invalid[slot] = False if valid is None else ~valid.cpu().numpy()  # I2
        self.added += 1
        self.obs[self.added % len(self.obs)] = obs

    def sample(self, rng: np.random.Generator) -> Tensor:
        """`batch` (B, row), filled with transitions of all environments and steps.  # I5"""
        self.index.numpy()[:] = self.draw(rng, self.index.shape[1])
        self.device_index.copy_(self.index, non_blocking=True)
        return self.gather(self.device_index)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Places (3, n) of n transitions, uniform over the valid ones: row, next, final_obs."""
        index = rng.integers(0, len(self), n)
        while True:  # a second time only where a simulator resets late
            step, env = np.divmod(index, self.num_envs)
            step += self.added - len(self) // self.num_envs
            slot = step % len(self.obs)
            if not (again := self.invalid[slot, env]).any():
                break
            index[again] = rng.integers(0, len(self), again.sum())
        block = step // self.max_steps % len(self.final_obs)
        places = np.stack([slot, (step + 1) % len(self.obs), block])
        return places * self.num_envs + env

    def gather(self, index: Tensor) -> Tensor:
        """Rows obs | action | next_obs | reward | terminated of transitions (3, B), in `batch`."""
        obs, action, next_obs, reward, terminated = self.batch.split(
            self.widths, dim=-1
        )
        all_obs, all_rows = self.obs.flatten(0, 1), self.rows.flatten(0, 1)
        row, following = all_rows[index[0]], all_obs[index[1]]
        truncated, final_obs = row[:, -1:] > 0, self.final_obs.flatten(0, 1)[index[2]]
        obs.copy_(all_obs[index[0]])
        action.copy_(row[:, :-3])
        next_obs.copy_(torch.where(truncated, final_obs, following))
        reward.copy_(row[:, -3:-2])
        terminated.copy_(row[:, -2:-1])
        return self.batch

    def state_dict(self) -> dict:
        used = min(self.added + 1, len(self.obs))
        rings = {name: getattr(self, name)[:used] for name in ("obs", "rows")}
        # by way of NumPy, or torch saves all rows
        rings = {
            name: torch.from_numpy(ring.cpu().numpy()) for name, ring in rings.items()
        }
        rings["invalid"] = torch.from_numpy(self.invalid[:used])
        return rings | {"added": self.added, "final_obs": self.final_obs.cpu()}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.invalid[: len(state["invalid"])] = state["invalid"].numpy()
        for name in (
            "obs",
            "rows",
            "final_obs",
        ):  # shorter ones after fewer --total-timesteps
            getattr(self, name)[: len(state[name])].copy_(state[name])


class SimulatorEnvs:
    """A simulator's environments for an evaluation."""

    def __init__(self, args: IsaacArgs, device: torch.device):
        self.simulator = make_envs(args, args.eval_episodes, args.seed, device)
        self.env_id, self.fps = args.env_id, self.simulator.fps
        self.obs_dim, self.act_dim = self.simulator.obs_dim, self.simulator.act_dim

    @simulator_errors()
    def reset(self, *key: int) -> Tensor:
        """First observations (n, S) of new episodes, whose seed derives from `key`."""
        return self.simulator.reset(seed=derive_seed(*key))

    @simulator_errors()
    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs (n, S), reward (n,), ended (n,); what follows an end is another episode's.

        An episode whose physics breaks down ends there.
        """
        obs, reward, terminated, truncated, _ = self.simulator.step(action)
        ended, valid = terminated | truncated, self.simulator.valid
        return obs, reward, ended if valid is None else ended | ~valid

    def render(self) -> np.ndarray:
        """An image (H, W, 3) of environment 0."""
        return self.simulator.render()


def make_evaluator(args: IsaacArgs, env: TrainingEnvs, policy) -> Evaluator | None:
    """Evaluation in environments beside the training ones, where the simulator allows them."""
    if env.simulator.one_per_process:
        text = "one simulation per process: no evaluation while training; --evaluate does it later"
        print(f"note: {text}", file=sys.stderr)
        return None
    return Evaluator(args, SimulatorEnvs(args, env.simulator.device), policy)
