"""The multi-goal figure of finished runs: what they know, which goals they choose.

    python -m multi_goal.figure --run runs/RUN_A runs/RUN_B --out results

One column per run: the soft value V over the plane with trajectories from the origin,
the policy's density over actions at four states, and how often each of the four goals
is chosen: a maximum-entropy policy should choose all of them. Writes NAME.png, .svg and
.md to --out.

V(s) = alpha log int exp(min_k Q_k(s,a) / alpha) da. MEow knows V exactly; for SAC and
soft Q-learning the integral is a midpoint sum over QUADRATURE x QUADRATURE cells of
[-1, 1]^2.
Shapes: B batch or trajectories, T steps, K Q-functions.
"""

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from harness.errors import RunError, UsageError
from harness.files import POLICY_FILES, load_file
from multi_goal import GOALS, RADIUS, TIME_LIMIT, WALL, distances, move

N_TRAJECTORIES = 200  # counted, of each policy; the first N_DRAWN of them are drawn
N_DRAWN = 60
QUADRATURE = 40  # cells along each action axis, for V of SAC and soft Q-learning
SUMMED = f"{QUADRATURE} x {QUADRATURE} quadrature"
BINS = 60  # cells along each action axis, for the densities
MAP_POINTS = 57  # along each axis of the plane: one every quarter
STATES = {  # of the densities
    "A": (0.0, 0.0),
    "B": (2.5, 2.5),
    "C": (-3.0, 0.0),
    "D": (0.0, -3.0),
}


# --- Policies of finished runs --------------------------------------------------------
@dataclass
class Policy:
    """What the figure needs of a run: functions of float32 tensors.

    soft_value(obs (B, 2)) -> V(s) (B,), reward units.
    sample(obs, noise (B, 2) ~ N(0, I)) -> action (B, 2) in [-1, 1], something else.
    log_prob(obs, action) -> (B,), or None where there is no density.
    """

    name: str  # of the algorithm
    method: str  # how soft_value knows V
    soft_value: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Tensor], tuple]
    log_prob: Callable[[Tensor, Tensor], Tensor] | None
    seed: int = 0
    step: int = 0  # environment steps that it was trained for


def action_cells(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres of n x n equal cells of [-1, 1]^2, (n * n, 2), row by row."""
    axis = (torch.arange(n, dtype=dtype) + 0.5) * 2 / n - 1
    return torch.cartesian_prod(axis, axis).flip(-1)


@torch.no_grad()
def quadrature_value(
    q_values: Callable, obs: Tensor, alpha: float, n: int = QUADRATURE
) -> Tensor:
    """V(s) = alpha log int exp(min_k Q_k(s,a) / alpha) da, midpoint rule, n x n cells.

    obs (B, 2) -> (B,), in the units of q_values(obs, action) (B, K).
    """
    actions, log_area = action_cells(n, obs.dtype), 2 * math.log(2 / n)
    values = []
    for chunk in obs.split(max(1, 10_000 // len(actions))):  # bounds the memory
        pairs = chunk.repeat_interleave(len(actions), 0), actions.repeat(len(chunk), 1)
        q = q_values(*pairs).min(-1).values.view(len(chunk), -1)
        values.append(alpha * (torch.logsumexp(q / alpha, dim=-1) + log_area))
    return torch.cat(values)


def restored(network: nn.Module, state: dict) -> nn.Module:
    network.load_state_dict(state)
    return network


def meow_policy(script, args, saved: dict) -> Policy:
    flow = restored(script.make_flow(args, 2, 2), saved["flow"])

    def soft_value(obs):  # no integral
        return flow.soft_values(obs).min(-1).values

    return Policy("MEow", "exact", soft_value, flow.sample, flow.log_prob)


def sac_policy(script, args, saved: dict) -> Policy:
    actor, critics = script.make_networks(args, 2, 2)
    actor = restored(actor, saved["actor"])
    critics = restored(critics, saved["critics"])

    def soft_value(obs):
        return quadrature_value(critics.q_values, obs, float(actor.log_alpha.exp()))

    return Policy("SAC", SUMMED, soft_value, actor.sample, actor.log_prob)


def sql_policy(script, args, saved: dict) -> Policy:
    sampler, critic = script.make_networks(args, 2, 2)
    sampler = restored(sampler, saved["sampler"])
    critic = restored(critic, saved["critic"])

    def soft_value(obs):  # its Q is in units of the scaled reward, with alpha = 1
        return quadrature_value(critic.q_values, obs, 1.0) / args.reward_scale

    name = "mean of two soft Q" if args.compose else "Soft Q-learning"
    return Policy(name, SUMMED, soft_value, sampler.sample, None)


MEOW, SAC = "meow_continuous_action", "sac_continuous_action"
SCRIPTS = (MEOW, SAC, "sql_continuous_action")


def load_policy(run: str) -> Policy:
    """The policy of one run, whose args.json names its script.

    Raises: UsageError, RunError.
    """
    about = (Path(run) if Path(run).is_dir() else Path(run).parent) / "args.json"
    try:
        name = Path(json.loads(about.read_text())["script"]).stem
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"--run {run}: {about} doesn't name a run's script ({error!r})"
        raise UsageError(text) from None
    if name not in SCRIPTS:
        known = ", ".join(SCRIPTS)
        raise UsageError(f"--run {run}: a run of {name}.py, not of one of {known}")
    saved = load_file("--run", run, name, POLICY_FILES)
    script = importlib.import_module(name)
    try:
        args = script.Args(**saved["args"])
        if not args.env_id.startswith("multi_goal:MultiGoal"):
            text = f"a run of {args.env_id}, not of multi_goal:MultiGoal-v0"
            raise UsageError(f"--run {run}: {text}")
        if name == MEOW:
            policy = meow_policy(script, args, saved)
        elif name == SAC:
            policy = sac_policy(script, args, saved)
        else:
            policy = sql_policy(script, args, saved)
    except (KeyError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(f"{saved['path']} is of another version ({reason})") from None
    policy.seed, policy.step = args.seed, saved["step"]
    if world := args.env_id.removeprefix("multi_goal:MultiGoal").removesuffix("-v0"):
        policy.name += f" ({world})"
    return policy


# --- What the figure shows ------------------------------------------------------------
@torch.no_grad()
def sample_trajectories(policy: Policy, n: int, seed: int = 0) -> list[np.ndarray]:
    """n trajectories of the stochastic policy from the origin.

    Each is (T + 1, 2) with T at most TIME_LIMIT.
    """
    generator = torch.Generator().manual_seed(seed)
    position = np.zeros((n, 2), np.float32)
    length, moving = np.full(n, TIME_LIMIT), np.full(n, True)
    positions = [position]
    for t in range(TIME_LIMIT):
        noise = torch.randn(n, 2, generator=generator)
        action = policy.sample(torch.from_numpy(position), noise)[0].numpy()
        if not np.isfinite(action).all():
            raise RunError(f"{policy.name}, seed {policy.seed}: actions are not finite")
        position, _, arrived = move(position, action)
        length[moving & arrived], moving = t + 1, moving & ~arrived
        positions.append(position)
        if not moving.any():
            break
    stacked = np.stack(positions)  # (T + 1, n, 2); who has arrived moves on in it
    return [stacked[: length[i] + 1, i] for i in range(n)]


def count_goals(trajectories: list[np.ndarray]) -> np.ndarray:
    """How many trajectories (T + 1, 2) arrive first at each goal, and at none: (5,)."""
    counts = np.zeros(len(GOALS) + 1, int)
    for trajectory in trajectories:
        # rows (time, goal), in time's order
        arrivals = np.argwhere(distances(trajectory) < RADIUS)
        counts[arrivals[0, 1] if len(arrivals) else -1] += 1
    return counts


@torch.no_grad()
def action_density(policy: Policy, state: tuple[float, float]) -> np.ndarray:
    """Density over [-1, 1]^2 in BINS x BINS cells (second action, first action).

    Without log_prob: a histogram of 100,000 sampled actions.
    """
    if policy.log_prob:
        actions = action_cells(BINS)
        obs = torch.tensor(state).expand(len(actions), -1)
        return policy.log_prob(obs, actions).exp().view(BINS, BINS).numpy()
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    obs = torch.tensor(state).expand(len(noise), -1)
    actions = policy.sample(obs, noise)[0].numpy()
    edges = np.linspace(-1, 1, BINS + 1)
    first, second = actions.T
    return np.histogram2d(second, first, bins=(edges, edges), density=True)[0]


def markdown(policies: list[Policy], trajectories: list[list[np.ndarray]]) -> str:
    """The table of the goals chosen, with a sentence on how it was made."""
    goals = " | ".join(f"({x:g}, {y:g})" for x, y in GOALS)
    lines = [
        f"Goals chosen in {N_TRAJECTORIES} trajectories of each stochastic policy "
        f"from the origin, cut after {TIME_LIMIT} steps:",
        "",
        f"| method | seed | trained steps | {goals} | none | mean length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for policy, sampled in zip(policies, trajectories, strict=True):
        counts = " | ".join(map(str, count_goals(sampled)))
        length = np.mean([len(trajectory) - 1 for trajectory in sampled])
        row = f"{policy.name} | {policy.seed} | {policy.step} | {counts} | {length:.1f}"
        lines.append(f"| {row} |")
    lines += [
        "",
        f"Contours: V(s); MEow's is exact, SAC's and soft Q-learning's by {SUMMED}.",
    ]
    return "\n".join(lines) + "\n"


# --- The figure -----------------------------------------------------------------------
@torch.no_grad()
def draw_map(ax, policy: Policy, trajectories: list[np.ndarray]):
    """Contours of V, trajectories, and the goals with how often each was chosen."""
    axis = torch.linspace(-WALL, WALL, MAP_POINTS)
    value = policy.soft_value(torch.cartesian_prod(axis, axis).flip(-1))
    value = value.view(MAP_POINTS, MAP_POINTS).numpy()  # (y, x)
    if not np.isfinite(value).all():
        name = f"{policy.name}, seed {policy.seed}"
        raise RunError(f"{name}: the soft value is not finite")
    ax.contourf(axis, axis, value, levels=20, cmap="Blues_r", alpha=0.7)
    style = dict(colors="0.4", linewidths=0.5, linestyles="-")
    lines = ax.contour(axis, axis, value, levels=10, **style)
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
    """The density at each of the STATES; its square root, or a peak hides the rest."""
    for ax, (letter, state) in zip(axes, STATES.items(), strict=True):
        density = action_density(policy, state)
        options = dict(cmap="magma_r", vmin=0, interpolation="none")
        ax.imshow(np.sqrt(density), origin="lower", extent=(-1, 1, -1, 1), **options)
        ax.axhline(0, color="0.7", linewidth=0.5)
        ax.axvline(0, color="0.7", linewidth=0.5)
        ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.tick_params(labelsize=7)
        at = f"s = ({state[0]:g}, {state[1]:g})"
        ax.set_title(f"{letter}: {at}, peak {density.max():.2g}", fontsize=8)


def draw(policies: list[Policy], trajectories: list[list[np.ndarray]]):
    """The figure: one column per policy, the map above, the four densities below."""
    from matplotlib.figure import Figure  # only here: the table needs no matplotlib

    figure = Figure(figsize=(4.4 * len(policies), 9.2), layout="constrained")
    columns = np.atleast_1d(figure.subfigures(1, len(policies)))
    for column, policy, sampled in zip(columns, policies, trajectories, strict=True):
        upper, lower = column.subfigures(2, 1, height_ratios=(1.06, 1))
        draw_map(upper.subplots(), policy, sampled)
        draw_densities(lower.subplots(2, 2).flat, policy)
        kind = "density" if policy.log_prob else "samples, no density"
        lower.suptitle(f"actions: {kind} (square-root colours)", fontsize=10)
    return figure


@dataclass
class Options:
    run: tuple[str, ...]
    """run folders, one column each"""
    out: Path = Path("results")
    """folder of the figure"""
    name: str = "multi_goal"
    """name of its files"""


def make_figure(options: Options) -> str:
    """Writes OUT/NAME.png, .svg and .md; returns the table.

    Raises: UsageError, RunError.
    """
    if not options.run:
        raise UsageError("--run needs at least one run folder")
    if not importlib.util.find_spec("matplotlib"):
        raise UsageError("the figure needs matplotlib: pip install matplotlib")
    policies = [load_policy(run) for run in options.run]
    trajectories = [sample_trajectories(policy, N_TRAJECTORIES) for policy in policies]
    table, figure = markdown(policies, trajectories), draw(policies, trajectories)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out / f"{options.name}.png", dpi=110)
        figure.savefig(options.out / f"{options.name}.svg", metadata={"Date": None})
        (options.out / f"{options.name}.md").write_text(table, encoding="utf-8")
    except OSError as error:
        raise RunError(f"can't write to {options.out}: {error.strerror}") from None
    return table


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 (file) or 2 (usage)."""
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0], args=argv)
    try:
        print(make_figure(options), end="")
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
