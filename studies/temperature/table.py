"""The tables of this study, from the runs in results/ and in thinned/ beside this file.

    python studies/temperature/table.py

1. Each task's runs beside SAC's and MEow's: a run's number is the mean of its
   evaluations at the steps of --late.
2. When these runs learned to walk.
3. Tasks on which no setting was chosen.
4. Changes of the script's batches, of what is evaluated and of the noise, as in 1.
5. Evaluations of theta and of its average in the same runs.
6. The rules that set alpha, today's and earlier ones, with mean temperatures early and
   late.
7. A line per run of the study, with its returns on the way.
"""

import functools
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
RETURN, AVERAGED = "eval/return_mean", "averaged/0.001"
"""evaluations of theta, and of its average, in runs that have both"""
NAMES = {
    SCRIPT: "the script",
    "sac_continuous_action": "SAC",
    "auto": "dual",
    "auto_uniform": "uniform",  # the script without recent transitions and average
    "auto_fixed": "base",  # with --temperature fixed
    "auto_tenth": "spread",  # with --return-ratio 0.1
    "auto_times100": "spread",  # with rewards a hundred times as large
    "auto_sure": "units",  # with --dropout 0
    "auto_more": "rho 0.72",
    "auto_latest": "recent",  # a change of `uniform`, not of `largest`
    "auto_latest_held": "recent+held",
}
"""of experiments, where the table calls the arm otherwise"""
COMPARED = {  # algorithm: its experiments
    "the script": [SCRIPT],
    "SAC": ["sac_continuous_action"],
    "SAC, averaged": ["sac_averages"],
    "SAC, normalised": ["sac_normal_units_layers"],
    "MEow, the paper's settings": ["meow_continuous_action"],
}
EVALUATED = {"SAC, averaged": AVERAGED}
"""what is evaluated, where it isn't `RETURN`"""
CHANGES = {
    "the script": [SCRIPT],
    "`uniform`": ["auto_uniform"],
    "`recent`": ["auto_latest"],
    "`held`": ["auto_held"],
    "`recent+held`": ["auto_latest_held"],
}
RULES = {  # what sets alpha: experiments
    "the script": [SCRIPT],
    "`uniform`": ["auto_uniform"],
    "`units`": ["auto_units"],
    "`spread`": ["auto_spread", "auto_averages_spread"],
    "`largest`": ["auto_largest"],
    "alpha stays 0.1": ["auto_fixed"],
}
ONE_ALPHA = "HalfCheetah-v4", "Walker2d-v4"
"""tasks of 6 action dimensions: the alpha of `uniform` is that of `units`, 0.48 / 6"""
SEEDS = [str(seed) for seed in range(1, 7)]
ALPHA_AT = 10_000, 90_000  # steps
SETTLED = 50_000
"""the step from which theta is compared with its average"""
ENOUGH = 2_000
"""a return of which a Hopper hops and a Walker2d walks"""
OTHERS = "InvertedDoublePendulum-v4", "Pusher-v5", "Reacher-v4"
"""tasks on which no setting was chosen"""
TASKS = [f"{name}-v4" for name in "HalfCheetah Hopper Walker2d Ant Humanoid".split()]


@dataclass
class Options:
    results: Path = HERE.parents[1] / "results"
    """folder of runs, of which the script's belong to the study"""

    thinned: Path = HERE / "thinned"
    """folder of runs of the study alone"""

    late: tuple[int, ...] = (70_000, 80_000, 90_000)
    """steps whose evaluations the first table averages"""

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


read_csv = functools.cache(pd.read_csv)  # several tables have the same runs


def returns_of(run: Path, name: str = RETURN) -> pd.Series:
    """A run's evaluations, by step."""
    rows = read_csv(run / "metrics.csv")
    return rows[rows.name == name].set_index("step").value


def experiments_of(task: str, name: str) -> list[str]:
    """Those of one name; on `ONE_ALPHA` `units` counts as `uniform`."""
    if task in ONE_ALPHA and name == "`uniform`":
        return RULES[name] + RULES["`units`"]
    if task in ONE_ALPHA and name == "`units`":
        return []
    return (COMPARED | CHANGES | RULES)[name]


def by_seed(folders: list[Path], task: str, name: str, late: tuple) -> dict:
    """Evaluations of the longest run of each seed, of one name: seed -> pd.Series.

    Runs without one at each of these steps are left out.
    """
    patterns = [f"{task}__{arm}__[0-9]*" for arm in experiments_of(task, name)]
    runs = [run for f in folders for pattern in patterns for run in f.glob(pattern)]
    longest = {}
    for run in sorted(runs, key=lambda run: run.name.split("__")[2:]):
        seed = run.name.split("__")[2]
        returns = returns_of(run, EVALUATED.get(name, RETURN))
        if len(returns) > len(longest.get(seed, ())):
            longest[seed] = returns
    return {s: run for s, run in longest.items() if set(late) <= set(run.index)}


def beside(folders: list[Path], task: str, late: tuple[int, ...], names) -> list[str]:
    """One task: the start of a line for each name that was run, mean and each seed."""
    lines = []
    for name in names:
        runs = by_seed(folders, task, name, late)
        values = pd.Series({s: run[list(late)].mean() for s, run in runs.items()})
        if len(values):
            each = [f"{values[s]:.0f}" if s in values else "" for s in SEEDS]
            cells = [task, name, f"{values.mean():.0f}", *each]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def first_above(runs: list[pd.Series], end: int) -> str:
    """Of each run: thousands of steps to the first evaluation above `ENOUGH`."""
    steps = [run.index[(run > ENOUGH) & (run.index <= end)] for run in runs]
    return ", ".join(f"{s[0] // 1000}" if len(s) else "never" for s in steps)


def arm_of(experiment: str) -> str:
    """What the tables call it."""
    plain = experiment.removeprefix("auto_").replace("_", "+")
    return NAMES.get(experiment, plain)


def line(run: Path, steps: tuple[int, ...]) -> str:
    """One run: task, arm, its own options, seed, commit, returns; "" without any."""
    task, arm, seed, _ = run.name.split("__")
    about = json.loads((run / "args.json").read_text())
    returns = returns_of(run)
    shown = [f"{returns[step]:.0f}" if step in returns else "" for step in steps]
    if not any(shown):
        return ""
    words = [arm_of(arm), own_options(about["command"])]
    cells = [task, " ".join(words).strip(), seed, about["git_commit"][:7], *shown]
    return "| " + " | ".join(cells) + " |"


def others(thinned: Path, task: str) -> list[str]:
    """Each run of a task of `OTHERS`: all its evaluations."""
    lines = []
    for run in sorted(thinned.glob(f"{task}__*")):
        arm = arm_of(run.name.split("__")[1])
        returns = ", ".join(f"{value:.4g}" for value in returns_of(run))
        lines.append(f"| {task} | {arm} | {returns} |")
    return lines


def averages(thinned: Path, end: int) -> list[str]:
    """Runs with both evaluations: means and lowest ones from `SETTLED` to `end`."""
    lines = []
    for run in sorted(thinned.glob("*__*")):
        task, arm, seed, _ = run.name.split("__")
        both = [returns_of(run, name) for name in (RETURN, AVERAGED)]
        if all(end in returns for returns in both):
            late = [r[(r.index >= SETTLED) & (r.index <= end)] for r in both]
            cells = [f"{x:.0f}" for r in late for x in (r.mean(), r.min())]
            lines.append("| " + " | ".join([task, arm_of(arm), seed, *cells]) + " |")
    return lines


def rules(folders: list[Path], task: str, late: tuple[int, ...]) -> list[str]:
    """The lines of `beside` for one task and `RULES`, and mean alphas at `ALPHA_AT`."""
    rows = read_csv(HERE / "entropy.csv")
    lines = []
    for text in beside(folders, task, late, RULES):
        experiments = experiments_of(task, text.split(" | ")[1])
        lines.append(f"{text} {temperatures(rows, experiments, task)} |")
    return lines


def temperatures(rows: pd.DataFrame, experiments: list[str], task: str) -> str:
    """The mean alpha of these runs of a task at `ALPHA_AT`; "" without any."""
    rows = rows[rows.experiment.isin(experiments) & (rows.task == task)]
    means = rows.groupby("step").alpha.mean().reindex(ALPHA_AT).dropna()
    return ", ".join(f"{mean:.3f}" for mean in means)


def print_table(header: list[str], lines: list[str]):
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    print("\n".join(lines) + "\n")


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    folders, late = [options.results, options.thinned], options.late

    seeds = [f"seed {seed}" for seed in SEEDS]
    header = ["task", "algorithm", "mean", *seeds]
    lines = [text for task in TASKS for text in beside(folders, task, late, COMPARED)]
    print_table(header, lines)

    header = [f"thousands of steps to a return above {ENOUGH:,}", "Hopper", "Walker2d"]
    lines = []
    for name in COMPARED:
        tasks = "Hopper-v4", "Walker2d-v4"
        runs = [by_seed(folders, task, name, late) for task in tasks]
        cells = [first_above(r.values(), late[-1]) for r in runs]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print_table(header, lines)

    header = ["no setting was chosen on", "algorithm", "returns on the way"]
    lines = [text for task in OTHERS for text in others(options.thinned, task)]
    print_table(header, lines)

    header = ["task", "arm", "mean", *seeds]
    lines = [text for task in TASKS for text in beside(folders, task, late, CHANGES)]
    print_table(header, lines)

    header = ["task", "arm", "seed", "theta: mean", "lowest", "average: mean", "lowest"]
    print_table(header, averages(options.thinned, late[-1]))

    early, end = ALPHA_AT
    header = ["task", "rule", "mean", *seeds, f"alpha at {early:,}, {end:,}"]
    lines = [text for task in TASKS for text in rules(folders, task, late)]
    print_table(header, lines)

    header = ["task", "arm", "seed", "commit", *(f"{n:,}" for n in options.steps)]
    runs = [*options.results.glob(f"*__{SCRIPT}__*"), *options.thinned.glob("*__*")]
    runs = sorted(runs, key=lambda run: run.name)
    lines = [line(r, options.steps) for r in runs if not r.name.startswith(OTHERS)]
    print_table(header, [text for text in lines if text])
    return 0


if __name__ == "__main__":
    sys.exit(main())
