"""Stride frequency of the policies of a HalfCheetah run.

    python meow_continuous_action.py --env-id HalfCheetah-v4 --keep-policies
    python studies/two_gaits/stride.py runs/RUN_NAME
    python studies/two_gaits/stride.py runs/RUN_NAME --thigh front

Prints a row for each kept policy: step,return,stride. The frequency is the largest
peak in the spectrum of a thigh's angle (back: observation 2, front: 5) over steps 200
to 1,000 of a deterministic episode; median of the episodes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from saved_policy import UsageError, exit_code, load_evaluator

THIGHS = {"back": 2, "front": 5}  # observations
SECONDS_PER_STEP, FIRST, LAST = 0.05, 200, 1000


def stride_frequency(angles: np.ndarray) -> float:
    """Hz of the largest peak in the spectrum of the angles (T,), T >= 1,000."""
    x = angles[FIRST:LAST]
    power = np.abs(np.fft.rfft(x - x.mean())) ** 2
    return float(np.fft.rfftfreq(len(x), SECONDS_PER_STEP)[power.argmax()])


def measure(file: Path, episodes: int, thigh: str = "back") -> tuple[int, float, float]:
    """Step, mean return and stride of a saved policy, in its own evaluation."""
    evaluator, step = load_evaluator(file, episodes)
    env_id = evaluator.args.env_id
    if not env_id.startswith("HalfCheetah-"):
        raise UsageError(f"{file} was trained on {env_id}: strides are HalfCheetah's")
    angles, play = [], evaluator.policy

    def recorded(obs, noise):
        angles.append(obs[:, THIGHS[thigh]].numpy().copy())
        return play(obs, noise)

    evaluator.policy = recorded
    returns, _ = evaluator.run(step, Path())
    strides = [
        stride_frequency(episode) for episode in np.array(angles, dtype=np.float64).T
    ]
    return step, float(np.mean(returns)), float(np.median(strides))


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""
    episodes: int = 10
    """episodes per policy"""
    thigh: Literal["back", "front"] = "back"
    """whose frequency; in short strides the back one swings twice as often"""


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    files = sorted((options.run / "policies").glob("*.pt")) or [
        options.run / "policy_final.pt"
    ]
    rows = (measure(file, options.episodes, options.thigh) for file in files)
    print("step,return,stride")
    for row in rows:
        print("{},{:.1f},{:.3f}".format(*row), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
