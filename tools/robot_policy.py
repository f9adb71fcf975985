"""What a robot's trained policy does, beyond its return.

    python tools/robot_policy.py runs/RUN_NAME

Prints the mean return and length of deterministic episodes, and what the task is about
(such as the speed or the opening of the drawer: `measures` in isaac_tasks/): its mean
over an episode and its largest value, both as means of the episodes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from saved_policy import UsageError, exit_code, load_evaluator


def play(file: Path, episodes: int) -> dict[str, float]:
    """Means over the episodes, by name. Raises: as `load_evaluator`."""
    evaluator, step = load_evaluator(file, episodes)
    simulator = getattr(evaluator.envs, "simulator", None)
    if not hasattr(simulator, "task"):
        raise UsageError(f"{file} wasn't trained on one of the embedded robots")
    policy, rows = evaluator.policy, []

    def recorded(obs, noise):
        rows.append(simulator.measures())
        return policy(obs, noise)

    evaluator.policy = recorded
    returns, lengths = evaluator.run(step, Path())
    alive = torch.arange(len(rows))[:, None] < torch.tensor(lengths)
    means = {"return": sum(returns) / episodes, "length": sum(lengths) / episodes}
    for name in rows[0]:
        values = torch.stack([row[name] for row in rows]).where(alive, 0.0)
        means[name] = (values.sum(0) / alive.sum(0)).mean().item()
        means[f"largest {name}"] = values.amax(0).mean().item()
    return means


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run of meow_isaacgym.py or sac_isaacgym.py"""
    episodes: int = 32
    """episodes, one environment each"""


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    for name, value in play(options.run / "policy_final.pt", options.episodes).items():
        print(f"{name}: {value:.5g}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
