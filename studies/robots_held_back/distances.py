"""What a robot's policy is paid for, and how far the data it learns from lie from it.

    python studies/robots_held_back/distances.py runs/RUN_NAME
    python studies/robots_held_back/distances.py policies/Humanoid.pt   # no data

64 robots act as in training, with noise, for 1,500 steps. Printed are rewards a step
and their terms, what an entropy of 1 nat in each dimension of the action is worth
beside them (alpha A), how the actions spread, and V(s) beside what came: the discounted
rewards and entropies, until the episode terminated or a time of which the rest weighs
under 2 %. Of a run of meow_auto_isaacgym.py also by how much the loss's dropout lowers
Q of the policy's own actions, d, the squared distance of the replay buffer's actions
from the policy by their age (about 1 for its own), and how many would weigh less than
0.1 for m in the script's loss, were they worth more than Q says.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import meow_auto_isaacgym
import meow_isaacgym
from harness.args import parse_args
from harness.errors import UsageError
from harness.files import load_network
from harness.runs import explain

SCRIPTS = {script.__name__: script for script in (meow_isaacgym, meow_auto_isaacgym)}
REST = 400
"""steps after which what came is known: with gamma 0.99 the rest weighs under 2 %"""
AGES = (0, 300, 1000, 3000, 6000, 12_000)
"""vector steps, from the newest one"""


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, or a file of policies/"""
    robots: int = 64
    """environments that are played side by side"""
    steps: int = 1500
    """vector steps, more than 400"""


def load(path: Path):
    """The script of a run or policy, its settings and the file's content.

    Raises: UsageError, RunError.
    """
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"there is no {file}")
    try:
        # mmap: without the replay buffer's numbers
        program = torch.load(file, "cpu", weights_only=True, mmap=True)["format"]
        script = SCRIPTS[program]
    except Exception:  # a damaged file can make the unpickler raise anything
        text = f"{file} is not of {' or '.join(SCRIPTS)}"
        raise UsageError(text) from None
    args, saved = parse_args(script.Args, program, "", ["--evaluate", str(file)])
    if script is meow_auto_isaacgym and "rewards" not in saved:
        raise UsageError(f"{file} has no reward unit: name the folder of its run")
    return script, args, saved


def record_terms(task) -> dict[str, list]:
    """From now on the means of the task's reward terms are kept, by name."""
    terms, of_step = defaultdict(list), task.reward_terms

    def recorded(*states_and_action):
        found = of_step(*states_and_action)
        for name, values in found.items():
            terms[name].append(values.mean().item())
        return found

    task.reward_terms = recorded
    return terms


@torch.no_grad()
def play(script, args, saved: dict, robots: int, steps: int):
    """Rows of (steps, robots) of a policy with noise, and the reward terms by name."""
    auto = script is meow_auto_isaacgym
    device = torch.device("cpu")
    envs = script.make_envs(args, robots, args.seed + 1, device)
    flow = script.make_flow(args, *saved["sizes"])
    load_network(flow, saved, "flow")
    if auto:  # the parameters that act, not their average
        torch.nn.utils.vector_to_parameters(saved["learner"][0], flow.parameters())
    norm = script.RunningMeanStd(envs.obs_dim, device)
    norm.load_state_dict(saved["norm"])
    torch.manual_seed(args.seed)
    terms, rows, obs = record_terms(envs.task), defaultdict(list), envs.reset()
    for _ in range(steps):
        seen = norm(obs)
        z = torch.randn(robots, flow.act_dim)
        action, log_prob = flow.sample(seen, z)
        values = flow.soft_values(seen)
        if auto:
            action = torch.tanh(action)
        else:
            values = values.amin(-1)
        sigma = flow.log_sigma(seen).exp()
        obs, reward, terminated, truncated, _ = envs.step(action)
        step = dict(value=values, reward=reward, log_prob=log_prob)
        step |= dict(terminated=terminated, truncated=truncated)
        step |= dict(size=action.abs().mean(-1), sigma=sigma.mean(-1))
        step |= dict(saturated=(action.abs() > 0.95).float().mean(-1))
        for name, numbers in step.items():
            rows[name].append(numbers)
    return flow, {name: torch.stack(r) for name, r in rows.items()}, terms


def came(rows: dict, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Discounted soft returns (steps, robots), and where they are known.

    V(s) is the mean of r - alpha log pi(a|s) + gamma V(s'), and so these are summed up,
    until the episode terminated or went on for `REST` steps.
    """
    soft = rows["reward"] - alpha * rows["log_prob"]
    total, left = torch.zeros_like(soft[0]), torch.full_like(soft[0], -REST)
    returns, known = torch.zeros_like(soft), torch.zeros_like(soft, dtype=torch.bool)
    for step in reversed(range(len(soft))):
        fell, ended = rows["terminated"][step], rows["truncated"][step]
        total = soft[step] + gamma * total.where(~(fell | ended), 0.0)
        # steps that are known to follow; a fall leaves nothing open
        left = torch.where(fell, 0.0, torch.where(ended, -REST, left)) + 1
        returns[step], known[step] = total, left >= 0
    return returns, known


def kept_actions(script, saved: dict, youngest: int, oldest: int):
    """Normalised observations (4096, S) and u (4096, A), `youngest` to `oldest` vector
    steps old."""
    kept, sizes = saved["replay"], saved["sizes"]
    norm = script.RunningMeanStd(sizes[0], "cpu")
    norm.load_state_dict(saved["norm"])
    slots, robots = kept["obs"].shape[:2]
    age = torch.randint(youngest, oldest, (4096,))
    robot = torch.randint(0, robots, (4096,))
    slot = (kept["added"] - 1 - age) % slots
    obs = norm(kept["obs"][slot, robot])
    return obs, kept["rows"][slot, robot][:, : sizes[1]]


@torch.no_grad()
def distances(script, flow, saved: dict) -> dict[str, Tensor]:
    """d (4096,) of kept actions, by their ages in vector steps."""
    kept = saved["replay"]
    filled = min(kept["added"], len(kept["obs"]) - 1)
    torch.manual_seed(0)
    spans = [(a, b) for a, b in pairwise(AGES) if b <= filled]
    found = {}
    for youngest, oldest in [*spans, (0, filled)]:
        obs, u = kept_actions(script, saved, youngest, oldest)
        found[f"{youngest:,} to {oldest:,}"] = flow.q_and_distance(obs, u)[1]
    return found


@torch.no_grad()
def lost_to_dropout(script, flow, saved: dict) -> float:
    """What dropout takes from Q of the policy's own actions in the newest states."""
    torch.manual_seed(0)
    newest = min(saved["replay"]["added"], AGES[1])
    obs, _ = kept_actions(script, saved, 0, newest)
    u, _ = flow.sample(obs)
    shape = (flow.n_couplings, 2, len(u), flow.hidden)
    kept = torch.rand(shape) >= flow.t[0].dropout
    dropped = flow.q_and_distance(obs, u, kept)[0]
    return (flow.q_values(obs, u) - dropped).mean().item()


def percent_light(script, flow, d: Tensor) -> float:
    """How many actions at d (N,) weigh less than 0.1 for m, in percent."""
    rho = flow.alpha * flow.act_dim
    weight = script.near_weight(0.5 * rho * d, rho)
    return 100 * (weight < 0.1).float().mean().item()


def unit_of(script, saved: dict) -> float:
    """The rewards that V and alpha are counted in."""
    if script is meow_isaacgym:
        return 1.0
    rewards = script.RunningMeanStd(1, "cpu")
    rewards.load_state_dict(saved["rewards"])
    return script.reward_unit(rewards).item()


def tell(options: Options):
    """Prints everything. Raises: UsageError, RunError."""
    if options.steps <= REST or options.robots < 1:
        raise UsageError(f"--steps must be above {REST}, --robots at least 1")
    script, args, saved = load(options.run)
    flow, rows, terms = play(script, args, saved, options.robots, options.steps)
    unit = unit_of(script, saved)
    alpha, actions = unit * flow.alpha.item(), flow.act_dim
    means = {name: numbers.float().mean().item() for name, numbers in rows.items()}
    print(f"reward a step {means['reward']:.3g}")
    for name, values in terms.items():
        print(f"  {name} {sum(values) / len(values):.3g}")
    print(f"a nat in each of {actions} dimensions is worth {alpha * actions:.3g}")
    print(f"terminations in 1,000 steps {1000 * means['terminated']:.3g}")
    entropy = -means["log_prob"] / actions
    print(f"entropy {entropy:.2f} nats a dimension, sigma {means['sigma']:.2f}")
    beyond = 100 * means["saturated"]
    print(f"mean |a| {means['size']:.2f}, beyond 0.95 {beyond:.0f} %")
    returns, known = came(rows, alpha, args.gamma)
    value = unit * rows["value"][known].mean()
    print(f"V {value:.3g}, what came {returns[known].mean():.3g}")
    if script is meow_auto_isaacgym:
        lost = unit * lost_to_dropout(script, flow, saved)
        print(f"dropout: Q less by {lost:.2g}")
        for ages, d in distances(script, flow, saved).items():
            light = percent_light(script, flow, d)
            text = f"median d {d.median():.1f}, weight below 0.1 for {light:.0f} %"
            print(f"actions of {ages} vector steps ago: {text}")


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        tell(options)
    except Exception as error:
        return explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
