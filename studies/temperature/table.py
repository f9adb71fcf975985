"""The tables of this study, from the runs in results/ and in thinned/ beside this file.

    python studies/temperature/table.py

First the returns of each task's runs at --at steps, then a line per run of the study
with its returns on the way.
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

SCRIPT = "meow_auto_continuous_action"
NAMES = {SCRIPT: "the script"}
COLUMNS = {
    "the script": SCRIPT,
    "SAC": "sac_continuous_action",
    "MEow, the paper's settings": "meow_continuous_action",
}
TASKS = [f"{name}-v4" for name in "HalfCheetah Hopper Walker2d Ant Humanoid".split()]


@dataclass
class Options:
    results: Path = HERE.parents[1] / "results"
    """folder of runs, of which the script's belong to the study"""

    thinned: Path = HERE / "thinned"
    """folder of runs of the study alone"""

    at: int = 90_000
    """steps of the first table"""

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


def returns_of(run: Path) -> pd.Series:
    """A run's evaluations, by step."""
    rows = pd.read_csv(run / "metrics.csv")
    return rows[rows.name == "eval/return_mean"].set_index("step").value


def beside(results: Path, task: str, at: int) -> str:
    """One task: for each of `COLUMNS` the mean and each run's return at step `at`."""
    cells = [task]
    for experiment in COLUMNS.values():
        runs = map(returns_of, sorted(results.glob(f"{task}__{experiment}__[0-9]*")))
        values = [returns[at] for returns in runs if at in returns]
        each = ", ".join(f"{value:.0f}" for value in values)
        mean = sum(values) / max(len(values), 1)
        cells.append(f"{mean:.0f}: {each}" if len(values) > 1 else each)
    return "| " + " | ".join(cells) + " |"


def line(run: Path, steps: tuple[int, ...]) -> str:
    """One run: task, arm, its own options, seed, commit, returns; "" without any."""
    task, arm, seed, _ = run.name.split("__")
    about = json.loads((run / "args.json").read_text())
    returns = returns_of(run)
    shown = [f"{returns[step]:.0f}" if step in returns else "" for step in steps]
    if not any(shown):
        return ""
    arm = NAMES.get(arm, arm.removeprefix("auto_").replace("_", "+"))
    words = [arm, own_options(about["command"])]
    cells = [task, " ".join(words).strip(), seed, about["git_commit"][:7], *shown]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    print("| task | " + " | ".join(COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for task in TASKS:
        print(beside(options.results, task, options.at))
    print()
    header = ["task", "arm", "seed", "commit"]
    header += [f"{step:,}" for step in options.steps]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    runs = [*options.results.glob(f"*__{SCRIPT}__*"), *options.thinned.glob("*__*")]
    for run in sorted(runs, key=lambda run: run.name):
        if text := line(run, options.steps):
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
