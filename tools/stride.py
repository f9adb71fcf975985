"""Stride frequency of HalfCheetah policies: with long strides runs learn on, with short ones not.

    python meow_continuous_action.py --env-id HalfCheetah-v4 --keep-policies --total-timesteps 90000
    python tools/stride.py runs/RUN_NAME            # a row for each kept policy: step,return,stride

The frequency is the largest peak in the spectrum of observation 2, the angle of the back thigh,
over steps 200 to 1,000 of a deterministic episode; median of the episodes.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness.args import parse_args
from harness.files import RunError, UsageError

BACK_THIGH, SECONDS_PER_STEP, FIRST, LAST = 2, 0.05, 200, 1000


def stride_frequency(angles: np.ndarray) -> float:
    """Hz of the largest peak in the spectrum of the angles (T,) of one episode, T >= 1,000."""
    x = angles[FIRST:LAST]
    power = np.abs(np.fft.rfft(x - x.mean())) ** 2
    return float(np.fft.rfftfreq(len(x), SECONDS_PER_STEP)[power.argmax()])


def measure(module, file: Path, episodes: int) -> tuple[int, float, float]:
    """Step, mean return and stride of a saved policy, over the episodes of its own evaluation."""
    options = ["--evaluate", str(file), "--eval-episodes", str(episodes)]
    args, saved = parse_args(module.Args, module.__name__, "", options)
    if not args.env_id.startswith("HalfCheetah-"):
        raise UsageError(f"{file} was trained on {args.env_id}: strides are HalfCheetah's")
    evaluator = module.load_evaluator(args, saved)
    angles, play = [], evaluator.policy

    def recorded(obs, noise):
        angles.append(obs[:, BACK_THIGH].numpy().copy())
        return play(obs, noise)

    evaluator.policy = recorded
    returns, _ = evaluator.run(saved["step"], Path())
    strides = [stride_frequency(episode) for episode in np.array(angles, dtype=np.float64).T]
    return saved["step"], float(np.mean(returns)), float(np.median(strides))


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""
    episodes: int = 10
    """episodes per policy"""


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        script = json.loads((options.run / "args.json").read_text())["script"]
        module = importlib.import_module(Path(script).stem)
        files = sorted((options.run / "policies").glob("*.pt")) or [options.run / "policy_final.pt"]
        print("step,return,stride")
        for file in files:
            print("{},{:.1f},{:.3f}".format(*measure(module, file, options.episodes)), flush=True)
    except (UsageError, RunError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
