"""What a robot's trained policy does, beyond its return.

    python tools/robot_policy.py runs/RUN_NAME

Prints the mean return and length of deterministic episodes, and what the task is about
(such as the speed or the opening of the drawer: `measures` in isaac_tasks/): its mean
over an episode and its largest value, both as means of the episodes.
"""

import contextlib
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
from harness.errors import UsageError
from harness.machine import choose_device
from harness.runs import Session, explain


class RecordedSession(Session):
    """A session that keeps what the task is about, before each step it evaluates."""

    def __init__(self, args):
        super().__init__(args, choose_device(args.cuda))
        self.simulator, self.rows = None, []

    @contextlib.contextmanager
    def evaluation(self, fps: int = 30):  # noqa: ARG002 (a Session's)
        yield self

    def step(self, text: str):  # noqa: ARG002 (a Watch's)
        """Before each step."""
        if self.simulator:
            self.rows.append(self.simulator.measures())

    def film(self, simulator):
        """After `step` while the first episode goes on: tells what is simulated."""
        if self.simulator is None:
            if not hasattr(simulator, "measures"):
                text = "wasn't trained on one of the embedded robots"
                raise UsageError(f"{self.args.evaluate} {text}")
            self.simulator = simulator
            self.step("")


def play(run: Path, episodes: int) -> dict[str, float]:
    """Means over the episodes, by name. Raises: UsageError, RunError, OSError."""
    script = json.loads((run / "args.json").read_text())["script"]
    module = importlib.import_module(Path(script).stem)
    words = ["--evaluate", str(run), "--eval-episodes", str(episodes)]
    args, saved = parse_args(module.Args, module.__name__, "", words)
    with RecordedSession(args) as session:
        returns, lengths = module.evaluate_saved(args, saved, session)
    means = {"return": sum(returns) / episodes, "length": sum(lengths) / episodes}
    return means | means_of_measures(session.rows, lengths)


def means_of_measures(rows: list[dict], lengths: list[int]) -> dict[str, float]:
    """Over the episodes: each measure's mean and largest value while an episode lasts.

    rows: measures (n,) by name before each step; lengths: of the n episodes.
    """
    alive = torch.arange(len(rows))[:, None] < torch.tensor(lengths)
    means = {}
    for name in rows[0]:
        values = torch.stack([row[name].cpu() for row in rows])
        mean = values.where(alive, 0.0).sum(0) / alive.sum(0)
        means[name] = mean.mean().item()
        largest = values.where(alive, -torch.inf).amax(0)
        means[f"largest {name}"] = largest.mean().item()
    return means


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run of one of the scripts for robots"""
    episodes: int = 32
    """episodes, one environment each"""


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        means = play(options.run, options.episodes)
    except Exception as error:
        return explain(error)
    for name, value in means.items():
        print(f"{name}: {value:.5g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
