"""What a run's policy becomes if it learns on from what it has seen, and plays nothing.

    python studies/temperature/settle.py runs/RUN_NAME --learning-rates 1e-3 3e-4

Returns of the checkpoint's policy, and of those after more updates from its replay
buffer with each of these step sizes: of the last parameters, and of their average over
about the last 2,000 updates. If they differ much, the run's returns are those of a
moment.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from slopes import parts_of

import meow_auto_continuous_action as script
from harness.compiling import Compiler, flatten_parameters
from harness.files import load_file
from harness.runs import Session, explain


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""

    learning_rates: tuple[float, ...] = (1e-3, 3e-4)
    """Adam's step sizes"""

    updates: int = 4_000
    """updates with each"""

    average: float = 5e-4
    """an update's part in the average"""


def settle(saved: dict, learning_rate: float, updates: int, average: float):
    """The flow, its parameters theta (P,) after the updates, and their average (P,)."""
    flow, norm, args = parts_of(saved)
    args = dataclasses.replace(args, learning_rate=learning_rate)
    learner = [flatten_parameters(flow)]
    learner += [part.clone() for part in saved["learner"][1:]]
    rng, sizes = np.random.default_rng(0), saved["sizes"]
    rows = saved["replay"]["rows"]
    replay = script.ReplayBuffer(len(rows), *sizes, args.batch_size, "cpu")
    replay.load_state_dict(saved["replay"])
    shape = (flow.n_couplings, 2, args.batch_size, flow.hidden)
    kept = torch.ones(shape, dtype=torch.bool)
    compiler = Compiler(args.compile, torch.device("cpu"), lambda _: None)
    update = script.make_update(flow, args)
    update = compiler("the update", update, *learner, replay.batch, kept)
    theta = learner[0]
    mean = theta.clone()
    for _ in range(updates):
        norm.normalise(replay.sample(rng), *sizes)
        script.draw_dropout(kept, args.dropout, rng)
        update()
        mean.lerp_(theta, average)
    return flow, theta, mean


def returns(saved: dict, flow, parameters: Tensor) -> str:
    """Mean and deviation of the returns with these parameters (P,)."""
    args = script.Args(**saved["args"])
    torch.nn.utils.vector_to_parameters(parameters, flow.parameters())
    played = saved | {"flow": flow.state_dict()}
    with Session(args, torch.device("cpu")) as session:
        episodes, _ = script.evaluate_saved(args, played, session)
    return f"{np.mean(episodes):.0f} +- {np.std(episodes):.0f}"


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        saved = load_file("run", options.run, script.__name__)
        flow, _, _ = parts_of(saved)
        theta = torch.nn.utils.parameters_to_vector(flow.parameters())
        print(f"checkpoint: {returns(saved, flow, theta)}")
        for lr in options.learning_rates:
            flow, theta, mean = settle(saved, lr, options.updates, options.average)
            last, averaged = returns(saved, flow, theta), returns(saved, flow, mean)
            print(f"{lr:g}: {last}, averaged: {averaged}", flush=True)
    except Exception as error:
        return explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
