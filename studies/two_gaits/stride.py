"""Stride frequency of the policies of a HalfCheetah run.

    python meow_continuous_action.py --env-id HalfCheetah-v4 --keep-policies
    python studies/two_gaits/stride.py runs/RUN_NAME
    python studies/two_gaits/stride.py runs/RUN_NAME --thigh front

Prints a row for each kept policy: step,return,stride. The frequency is the largest
peak in the spectrum of a thigh's angle (back: observation 2, front: 5) over steps 200
to 1,000 of a deterministic episode; median of the episodes.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from harness.args import parse_args
from harness.errors import UsageError
from harness.machine import configure_process
from harness.runs import Session, explain

THIGHS = {"back": 2, "front": 5}  # observations
SECONDS_PER_STEP, FIRST, LAST = 0.05, 200, 1000


def stride_frequency(angles: np.ndarray) -> float:
    """Hz of the largest peak in the spectrum of the angles (T,), T >= 1,000."""
    x = angles[FIRST:LAST]
    power = np.abs(np.fft.rfft(x - x.mean())) ** 2
    return float(np.fft.rfftfreq(len(x), SECONDS_PER_STEP)[power.argmax()])


class RecordedEnv:
    """An environment that keeps one number of each observation, by episode."""

    def __init__(self, env, index: int):
        self.env, self.index, self.episodes = env, index, []

    def __getattr__(self, name: str):
        return getattr(self.env, name)

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.episodes.append([obs[self.index]])
        return obs, info

    def step(self, action):
        obs, *outcome = self.env.step(action)
        self.episodes[-1].append(obs[self.index])
        return obs, *outcome


class RecordedSession(Session):
    """A session whose environments are recorded."""

    def __init__(self, args, index: int):
        super().__init__(args, torch.device("cpu"))
        self.index, self.recorded = index, []

    def closing(self, env):
        self.recorded.append(RecordedEnv(super().closing(env), self.index))
        return self.recorded[-1]


def measure(file: Path, episodes: int, thigh: str = "back") -> tuple[int, float, float]:
    """Step, mean return and stride of a saved policy, in its own evaluation."""
    folder = file.parent.parent if file.parent.name == "policies" else file.parent
    script = json.loads((folder / "args.json").read_text())["script"]
    module = importlib.import_module(Path(script).stem)
    options = ["--evaluate", str(file), "--eval-episodes", str(episodes)]
    args, saved = parse_args(module.Args, module.__name__, "", options)
    if not args.env_id.startswith("HalfCheetah-"):
        text = f"{file} was trained on {args.env_id}: strides are HalfCheetah's"
        raise UsageError(text)
    configure_process(args.torch_threads)
    with RecordedSession(args, THIGHS[thigh]) as session:
        returns, _ = module.evaluate_saved(args, saved, session)
    angles = [
        np.array(angles, dtype=np.float64)
        for env in session.recorded
        for angles in env.episodes
    ]
    strides = [stride_frequency(episode) for episode in angles]
    return saved["step"], float(np.mean(returns)), float(np.median(strides))


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""
    episodes: int = 10
    """episodes per policy"""
    thigh: Literal["back", "front"] = "back"
    """whose frequency; in short strides the back one swings twice as often"""


def main() -> int:
    """The exit code; what is missing is one sentence."""
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    files = sorted((options.run / "policies").glob("*.pt"))
    files = files or [options.run / "policy_final.pt"]
    try:
        rows = (measure(file, options.episodes, options.thigh) for file in files)
        print("step,return,stride")
        for row in rows:
            print("{},{:.1f},{:.3f}".format(*row), flush=True)
    except Exception as error:
        return explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
