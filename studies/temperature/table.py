"""The table of this study: a line per run in thinned/, with its returns on the way.

python studies/temperature/table.py
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

HERE = Path(__file__).parent
SAME = (
    "--exp-name --env-id --seed --total-timesteps --resume --runs-dir --torch-threads"
)
"""options of every run, which have their own columns or change no number"""

NAMES = {"meow_auto_continuous_action": "the script", "auto": "dual"}


@dataclass
class Options:
    folder: Path = HERE / "thinned"
    """folder of the runs"""

    steps: tuple[int, ...] = (20_000, 40_000, 60_000, 90_000)
    """steps of the evaluations to show"""


def own_options(command: str) -> str:
    """What a run's command asks for besides `SAME`."""
    words, kept = command.split()[2:], []
    while words:
        word = words.pop(0)
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if word not in SAME.split():
            kept += [word, *values]
    return " ".join(kept)


def line(run: Path, steps: tuple[int, ...]) -> str:
    """One run: task, arm, its own options, seed, commit, returns; "" without any."""
    task, arm, seed, _ = run.name.split("__")
    about = json.loads((run / "args.json").read_text())
    rows = pd.read_csv(run / "metrics.csv")
    returns = rows[rows.name == "eval/return_mean"].set_index("step").value
    shown = [f"{returns[step]:.0f}" if step in returns else "" for step in steps]
    if not any(shown):
        return ""
    arm = NAMES.get(arm, arm.removeprefix("auto_").replace("_", "+"))
    words = [arm, own_options(about["command"])]
    cells = [task, " ".join(words).strip(), seed, about["git_commit"][:7], *shown]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    header = ["task", "arm", "seed", "commit"]
    header += [f"{step:,}" for step in options.steps]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for run in sorted(options.folder.glob("*__*")):
        if text := line(run, options.steps):
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
