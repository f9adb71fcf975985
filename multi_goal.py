"""The multi-goal world of the soft Q-learning and MEow papers, and their figure of it.

    python meow_continuous_action.py --env-id multi_goal:MultiGoal-v0    # or sac_..., sql_...
    python multi_goal.py --run runs/RUN_A runs/RUN_B                     # draws the figure

Importing this module registers `MultiGoal-v0`, and two worlds with two of its goals each, whose
Q-functions `sql_continuous_action.py --compose` can join. Run as a script it draws, for one or
more finished runs side by side, the soft value V over the plane, trajectories from the origin and
the policy's density over actions at four states, and counts how often each of the four goals is
chosen: a maximum-entropy policy should choose all of them. Writes NAME.png, .svg and .md to --out.

V(s) = alpha log int exp(min_k Q_k(s,a) / alpha) da. MEow knows V exactly; for SAC and soft
Q-learning the integral is a midpoint sum over QUADRATURE x QUADRATURE cells of [-1, 1]^2.
Shapes: B batch or trajectories, T steps, K Q-functions.
"""

import argparse
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

# --- 1. The world ---------------------------------------------------------------------------------
GOALS = np.float32([(5, 0), (-5, 0), (0, 5), (0, -5)])
WALL = 7.0  # the world is [-WALL, WALL]^2
RADIUS = 1.0  # closer than this to a goal, the episode ends
# Steps. MEow's authors cut after 1000, softlearning after about 30. A learned policy takes 10 to
# 30; with 1000, one that is stuck spends a quarter of the 4,000 training steps in one place.
TIME_LIMIT = 100


def distances(position: np.ndarray, goals: np.ndarray = GOALS) -> np.ndarray:
    """Distance to each of the G goals (G, 2). (..., 2) -> (..., G)."""
    return np.linalg.norm(position[..., None, :] - goals.astype(np.float64), axis=-1)


def move(
    position: np.ndarray, action: np.ndarray, goals: np.ndarray = GOALS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step: the new position (..., 2) in float32, the reward (...) and whether it ends there.

    Actions are clipped to [-1, 1], positions to the walls. Reward: -30 |a|^2 - d^2, where d is the
    distance from the new position to the nearest goal, and 10 more on arrival (d < 1).
    """
    action = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
    position = np.clip(position + action, -WALL, WALL).astype(np.float32)
    nearest = distances(position, goals).min(-1)
    arrived = nearest < RADIUS
    effort = 30.0 * np.square(action, dtype=np.float64).sum(-1)
    return position, 10.0 * arrived - effort - nearest**2, arrived


class MultiGoalEnv(gym.Env):
    """A point that moves by its action (a velocity) to one of the goals; it observes `state`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-WALL, WALL, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None, goals: tuple[int, ...] = (0, 1, 2, 3)):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: only 'rgb_array' is supported")
        self.render_mode, self.state = render_mode, np.zeros(2, np.float32)
        self.goals = GOALS[list(goals)]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts at N(0, 0.1^2 I), or at the position `options["state"]`."""
        super().reset(seed=seed)
        start = (options or {}).get("state", 0.1 * self.np_random.standard_normal(2))
        self.state = np.clip(np.reshape(start, 2), -WALL, WALL).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action: np.ndarray):
        self.state, reward, arrived = move(self.state, np.reshape(action, 2), self.goals)
        return self.state.copy(), float(reward), bool(arrived), False, {}

    def render(self) -> np.ndarray | None:
        """(280, 280, 3), 20 pixels per unit, y upwards: goals with their radius, and the point."""
        if self.render_mode is None:
            return None
        axis = (np.arange(280) + 0.5) / 20 - WALL
        pixels = np.stack(np.meshgrid(axis, -axis), axis=-1)  # (280, 280, 2)
        nearest = distances(pixels, self.goals).min(-1)
        image = np.full((280, 280, 3), 255, np.uint8)
        image[nearest < RADIUS] = (255, 214, 214)
        image[nearest < 0.15] = (214, 39, 40)
        image[np.linalg.norm(pixels - self.state, axis=-1) < 0.25] = (31, 119, 180)
        return image


def register(name: str, goals: tuple[int, ...]):
    kwargs = {"goals": goals}
    gym.register(name, "multi_goal:MultiGoalEnv", max_episode_steps=TIME_LIMIT, kwargs=kwargs)


register("MultiGoal-v0", (0, 1, 2, 3))
register("MultiGoalNorthEast-v0", (0, 2))  # two tasks to compose: they share the goal in the east
register("MultiGoalSouthEast-v0", (0, 3))


# --- 2. Policies of finished runs -----------------------------------------------------------------
N_TRAJECTORIES = 200  # counted, of each policy; the first N_DRAWN of them are drawn
N_DRAWN = 60
QUADRATURE = 40  # cells along each action axis, for V of SAC and soft Q-learning
SUMMED = f"{QUADRATURE} x {QUADRATURE} quadrature"
BINS = 60  # cells along each action axis, for the densities
MAP_POINTS = 57  # along each axis of the plane: one every quarter
STATES = {"A": (0.0, 0.0), "B": (2.5, 2.5), "C": (-3.0, 0.0), "D": (0.0, -3.0)}  # of the densities


class UsageError(Exception):
    """The command can't be carried out as given (exit code 2)."""


class RunError(Exception):
    """A file can't be read or written (exit code 1)."""


@dataclass
class Policy:
    """What the figure needs of a run: functions of float32 tensors; actions in [-1, 1]."""

    name: str  # of the algorithm
    seed: int
    step: int  # environment steps that it was trained for
    method: str  # how soft_value knows V
    soft_value: Callable[[Tensor], Tensor]  # V(s), in reward units. obs (B, 2) -> (B,)
    act: Callable[[Tensor, Tensor], Tensor]  # obs (B, 2), noise (B, 2) ~ N(0, I) -> action (B, 2)
    log_prob: Callable[[Tensor, Tensor], Tensor] | None  # of actions (B, 2) -> (B,); SQL has none


def action_cells(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres of n x n equal cells of [-1, 1]^2, (n * n, 2); the first coordinate varies first."""
    axis = (torch.arange(n, dtype=dtype) + 0.5) * 2 / n - 1
    return torch.cartesian_prod(axis, axis).flip(-1)


@torch.no_grad()
def quadrature_value(q_values: Callable, obs: Tensor, alpha: float, n: int = QUADRATURE) -> Tensor:
    """V(s) = alpha log int exp(min_k Q_k(s,a) / alpha) da, midpoint rule with n x n cells.

    Shapes: obs (B, 2) -> (B,), in the units of q_values(obs, action) (B, K).
    """
    actions, log_area = action_cells(n, obs.dtype), 2 * math.log(2 / n)
    values = []
    for chunk in obs.split(max(1, 10_000 // len(actions))):  # bounds the memory
        pairs = chunk.repeat_interleave(len(actions), 0), actions.repeat(len(chunk), 1)
        q = q_values(*pairs).min(-1).values.view(len(chunk), -1)
        values.append(alpha * (torch.logsumexp(q / alpha, dim=-1) + log_area))
    return torch.cat(values)


def meow_policy(script, args, saved: dict) -> Policy:
    flow = script.make_flow(args, 2, 2)
    flow.load_state_dict(saved["flow"])

    def soft_value(obs):  # exact: no integral
        return flow.soft_values(obs).min(-1).values

    def act(obs, noise):
        return flow.to_action(obs, noise)[0]

    return Policy("MEow", args.seed, saved["step"], "exact", soft_value, act, flow.log_prob)


def sac_policy(script, args, saved: dict) -> Policy:
    actor, critics = script.make_networks(args, 2, 2)
    actor.load_state_dict(saved["actor"])
    critics.load_state_dict(saved["critics"])
    alpha = math.exp(float(saved["log_alpha"]))

    def soft_value(obs):
        return quadrature_value(critics.q_values, obs, alpha)

    def act(obs, noise):
        return actor.to_action(obs, noise)[0]

    return Policy("SAC", args.seed, saved["step"], SUMMED, soft_value, act, actor.log_prob)


def sql_policy(script, args, saved: dict) -> Policy:
    sampler, critic = script.make_networks(args, 2, 2)
    sampler.load_state_dict(saved["sampler"])
    critic.load_state_dict(saved["critic"])

    def soft_value(obs):  # its Q is in units of the scaled reward, with alpha = 1
        return quadrature_value(critic.q_values, obs, 1.0) / args.reward_scale

    name, act = "Soft Q-learning", sampler.to_action
    if args.compose:
        name = "mean of two soft Q"
    return Policy(name, args.seed, saved["step"], SUMMED, soft_value, act, log_prob=None)


SCRIPTS = {
    "meow_continuous_action": meow_policy,
    "sac_continuous_action": sac_policy,
    "sql_continuous_action": sql_policy,
}


def find_policy(run: str) -> Path:
    """The policy file of a run folder, or the file itself. Raises: UsageError."""
    names = ["policy_final.pt", "checkpoint.pt", "policy_best.pt"]
    files = [Path(run, name) for name in names] if Path(run).is_dir() else [Path(run)]
    for file in files:
        if file.is_file():
            return file
    raise UsageError(f"--run {run}: there is no {' or '.join(map(str, files))}")


def load_policy(run: str) -> Policy:
    """The policy of one run; its file says which script wrote it. Raises: UsageError, RunError."""
    file = find_policy(run)
    try:
        name = torch.load(file, map_location="cpu", weights_only=True)["format"].split("/")[0]
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{file} is damaged or not a policy ({type(error).__name__})") from None
    if name not in SCRIPTS:
        raise UsageError(f"--run {run}: written by {name!r}, not by one of {', '.join(SCRIPTS)}")
    try:
        script = importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"--run {run}: can't import {name}.py ({error})") from None
    try:
        saved = script.load_file(file)
        args = script.saved_args(saved, file)
        if not args.env_id.startswith("multi_goal:MultiGoal"):
            raise UsageError(f"--run {run}: a run of {args.env_id}, not of multi_goal:MultiGoal-v0")
        policy = SCRIPTS[name](script, args, saved)
        if world := args.env_id.removeprefix("multi_goal:MultiGoal").removesuffix("-v0"):
            policy.name += f" ({world})"
    except (script.UsageError, script.RunError) as error:
        raise RunError(error) from None
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(f"{file} holds networks that this version doesn't know ({reason})") from None
    return policy


# --- 3. What the figure shows ---------------------------------------------------------------------
@torch.no_grad()
def sample_trajectories(policy: Policy, n: int, seed: int = 0) -> list[np.ndarray]:
    """n trajectories of the stochastic policy from the origin, each (T + 1, 2), T <= TIME_LIMIT."""
    generator = torch.Generator().manual_seed(seed)
    position, length = np.zeros((n, 2), np.float32), np.full(n, TIME_LIMIT)
    positions, moving = [position], np.full(n, True)
    for t in range(TIME_LIMIT):
        noise = torch.randn(n, 2, generator=generator)
        action = policy.act(torch.from_numpy(position), noise).numpy()
        if not np.isfinite(action).all():
            raise RunError(f"{policy.name}, seed {policy.seed}: actions are not finite")
        position, _, arrived = move(position, action)
        length[moving & arrived], moving = t + 1, moving & ~arrived
        positions.append(position)
        if not moving.any():
            break
    stacked = np.stack(positions)  # (T + 1, n, 2); those that have arrived just move on in it
    return [stacked[: length[i] + 1, i] for i in range(n)]


def count_goals(trajectories: list[np.ndarray]) -> np.ndarray:
    """How many trajectories (T + 1, 2) arrive first at each of the GOALS, and at none: (5,)."""
    counts = np.zeros(len(GOALS) + 1, int)
    for trajectory in trajectories:
        arrivals = np.argwhere(distances(trajectory) < RADIUS)  # rows (time, goal), in time's order
        counts[arrivals[0, 1] if len(arrivals) else -1] += 1
    return counts


@torch.no_grad()
def action_density(policy: Policy, state: tuple[float, float]) -> np.ndarray:
    """Density over [-1, 1]^2 in BINS x BINS cells (second action, first action).

    Without log_prob: a histogram of 100,000 sampled actions.
    """
    if policy.log_prob:
        actions = action_cells(BINS)
        log_prob = policy.log_prob(torch.tensor(state).expand(len(actions), -1), actions)
        return log_prob.exp().view(BINS, BINS).numpy()
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    actions = policy.act(torch.tensor(state).expand(len(noise), -1), noise).numpy()
    edges = np.linspace(-1, 1, BINS + 1)
    return np.histogram2d(actions[:, 1], actions[:, 0], bins=(edges, edges), density=True)[0]


def markdown(policies: list[Policy], trajectories: list[list[np.ndarray]]) -> str:
    """The table of the goals chosen, with a sentence on how it was made."""
    goals = " | ".join(f"({x:g}, {y:g})" for x, y in GOALS)
    lines = [
        f"Goals chosen in {N_TRAJECTORIES} trajectories of each stochastic policy from the origin, "
        f"cut after {TIME_LIMIT} steps:",
        "",
        f"| method | seed | trained steps | {goals} | none | mean length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for policy, sampled in zip(policies, trajectories, strict=True):
        counts = " | ".join(map(str, count_goals(sampled)))
        length = np.mean([len(trajectory) - 1 for trajectory in sampled])
        row = f"{policy.name} | {policy.seed} | {policy.step} | {counts} | {length:.1f}"
        lines.append(f"| {row} |")
    lines += ["", f"Contours: V(s); MEow's is exact, SAC's and soft Q-learning's by {SUMMED}."]
    return "\n".join(lines) + "\n"


# --- 4. The figure --------------------------------------------------------------------------------
@torch.no_grad()
def draw_map(ax, policy: Policy, trajectories: list[np.ndarray]):
    """Contours of V, trajectories, and the goals with how often each was chosen."""
    axis = torch.linspace(-WALL, WALL, MAP_POINTS)
    value = policy.soft_value(torch.cartesian_prod(axis, axis).flip(-1))
    value = value.view(MAP_POINTS, MAP_POINTS).numpy()  # (y, x)
    if not np.isfinite(value).all():
        raise RunError(f"{policy.name}, seed {policy.seed}: the soft value is not finite")
    ax.contourf(axis, axis, value, levels=20, cmap="Blues_r", alpha=0.7)
    lines = ax.contour(axis, axis, value, levels=10, colors="0.4", linewidths=0.5, linestyles="-")
    ax.clabel(lines, fontsize=7, fmt="%g")
    for trajectory in trajectories[:N_DRAWN]:
        ax.plot(*trajectory.T, color="black", linewidth=0.6, alpha=0.3, rasterized=True)
    counts = count_goals(trajectories)
    angle = np.linspace(0, 2 * np.pi, 60)
    for goal, count in zip(GOALS, counts, strict=False):
        circle = goal[:, None] + RADIUS * np.stack([np.cos(angle), np.sin(angle)])
        ax.plot(*circle, color="tab:red", linewidth=1.2)
        style = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1.5)
        ax.text(*goal, count, weight="bold", ha="center", va="center", bbox=style)
    for letter, state in STATES.items():
        style = dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor="black")
        ax.text(*state, letter, fontsize=7, ha="center", va="center", bbox=style)
    ax.set(xlim=(-WALL, WALL), ylim=(-WALL, WALL), aspect="equal")
    ax.set_title(f"{policy.name}, seed {policy.seed}", weight="bold")
    ax.set_xlabel(f"V(s): {policy.method}; {counts[-1]} of {sum(counts)} reach no goal")


def draw_densities(axes, policy: Policy):
    """The density over actions at each of the STATES; its square root, or a peak hides the rest."""
    for ax, (letter, state) in zip(axes, STATES.items(), strict=True):
        density = action_density(policy, state)
        extent = (-1, 1, -1, 1)
        options = dict(cmap="magma_r", vmin=0, interpolation="none")
        ax.imshow(np.sqrt(density), origin="lower", extent=extent, **options)
        ax.axhline(0, color="0.7", linewidth=0.5)
        ax.axvline(0, color="0.7", linewidth=0.5)
        ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.tick_params(labelsize=7)
        at = f"s = ({state[0]:g}, {state[1]:g})"
        ax.set_title(f"{letter}: {at}, peak {density.max():.2g}", fontsize=8)


def draw(policies: list[Policy], trajectories: list[list[np.ndarray]]):
    """One column per policy: the map above, the four densities below. Returns the figure."""
    from matplotlib.figure import Figure  # only here: training needs no matplotlib

    figure = Figure(figsize=(4.4 * len(policies), 9.2), layout="constrained")
    columns = np.atleast_1d(figure.subfigures(1, len(policies)))
    for column, policy, sampled in zip(columns, policies, trajectories, strict=True):
        upper, lower = column.subfigures(2, 1, height_ratios=(1.06, 1))
        draw_map(upper.subplots(), policy, sampled)
        draw_densities(lower.subplots(2, 2).flat, policy)
        kind = "density" if policy.log_prob else "samples, no density"
        lower.suptitle(f"actions: {kind} (square-root colours)", fontsize=10)
    return figure


def save(figure, table: str, out: Path, name: str):
    """Writes OUT/NAME.png, .svg and .md. Raises: RunError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{name}.png", dpi=110)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        (out / f"{name}.md").write_text(table, encoding="utf-8")
    except OSError as error:
        raise RunError(f"can't write to {out}: {error.strerror}") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    def fail(message: str):
        raise UsageError(message)

    parser = argparse.ArgumentParser(description="Draws the multi-goal figure of finished runs.")
    parser.error = fail
    parser.add_argument(
        "--run", nargs="+", action="extend", required=True, help="run folders, one column each"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the figure")
    parser.add_argument("--name", default="multi_goal", help="name of its files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 (file) or 2 (usage)."""
    try:
        options = parse_args(argv)
        if not importlib.util.find_spec("matplotlib"):
            hint = "pip install -r requirements-benchmark.txt"
            raise UsageError(f"the figure needs matplotlib, which is not installed: {hint}")
        policies = [load_policy(run) for run in options.run]
        trajectories = [sample_trajectories(policy, N_TRAJECTORIES) for policy in policies]
        table = markdown(policies, trajectories)
        save(draw(policies, trajectories), table, options.out, options.name)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
