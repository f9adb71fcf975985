"""What a robot's trained policy does, beyond its return.

    python tools/robot_policy.py runs/RUN_NAME

Prints the mean return and length of deterministic episodes, and the mean over these episodes of
what the task is about:

- Ant, Humanoid: speed along +x, m/s.
- Ingenuity: distance to the target, m.
- Anymal: commanded and real horizontal speed, and the length of their difference, m/s.
- AllegroHand: angle between cube and goal, rad.
- FrankaCabinet: how far the drawer was opened at most, m.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness.args import parse_args
from harness.files import RunError, UsageError


def quantities(simulator) -> dict[str, torch.Tensor]:
    """By name: (N,), now."""
    task, state = simulator.task, simulator._state().clone()
    name = type(task).__name__
    if name in ("Ant", "Humanoid"):
        return {"forward speed": state.qvel[:, 0]}
    if name == "Ingenuity":
        return {"distance to the target": (state.memory - state.qpos[:, :3]).norm(dim=-1)}
    if name == "Anymal":
        velocity, command = task.velocities(state)[0][:, :2], state.memory[:, :2]
        lengths = (x.norm(dim=-1) for x in (command, velocity, command - velocity))
        return dict(zip(("commanded speed", "speed", "error"), lengths, strict=True))
    if name == "AllegroHand":
        return {"angle to the goal": task.angle_to_goal(state)}
    return {"most opening": state.qpos[:, 0]}


def play(module, file: Path, episodes: int) -> dict[str, float]:
    options = ["--evaluate", str(file), "--eval-episodes", str(episodes)]
    args, saved = parse_args(module.Args, module.__name__, "", options)
    evaluator = module.load_evaluator(args, saved)
    simulator, step, rows = evaluator.envs.simulator, evaluator.envs.step, []

    def recorded(action):
        rows.append(quantities(simulator))
        return step(action)

    evaluator.envs.step = recorded
    returns, lengths = evaluator.run(saved["step"], Path())
    alive = torch.arange(len(rows))[:, None] < torch.tensor(lengths)
    means = {"return": sum(returns) / episodes, "length": sum(lengths) / episodes}
    for name in rows[0]:
        values = torch.stack([row[name] for row in rows]).where(alive, 0.0)
        each = values.amax(0) if name.startswith("most") else values.sum(0) / alive.sum(0)
        means[name] = each.mean().item()
    return means


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run of meow_isaacgym.py or sac_isaacgym.py"""
    episodes: int = 32
    """episodes, one environment each"""


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        script = json.loads((options.run / "args.json").read_text())["script"]
        if not script.endswith("_isaacgym.py"):
            raise UsageError(f"{options.run} is a run of {script}, not of a robot")
        module = importlib.import_module(Path(script).stem)
        means = play(module, options.run / "policy_final.pt", options.episodes)
    except (UsageError, RunError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value:.3g}" for name, value in means.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
