"""The figure of this study: return, temperature and entropy, beside SAC's.

    python studies/temperature/curves.py

From the runs in results/ and in thinned/ beside this file, and from entropy.csv, which
has each 1,000th step of MEow's runs. Entropies of MEow are means of 10 of its numbers,
each -log pi of one action; SAC's are means over a batch. Temperatures are in the
environment's own reward units.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

HERE = Path(__file__).parent
FOLDERS = HERE.parents[1] / "results", HERE / "thinned"
TASKS = {"HalfCheetah": 6, "Hopper": 3, "Walker2d": 6, "Ant": 8, "Humanoid": 17}
"""with their numbers of action dimensions"""
SETTINGS = {  # label: colour, experiments
    "MEow without tuning": ("tab:blue", ["meow_auto_continuous_action"]),
    "without recent transitions and average": ("tab:green", ["auto_uniform"]),
    "alpha moved by SAC's dual": ("tab:purple", ["auto_dual"]),
    "SAC": ("tab:orange", ["sac_continuous_action"]),
    "SAC, normalised": ("tab:brown", ["sac_normal_units_layers"]),
}
IN_UNITS = ["sac_normal_units_layers"]
"""whose temperature is in units of the rewards' deviation, and not drawn"""
TARGETS = {"tab:purple": -0.65, "tab:orange": -1.0}
"""of the entropy"""
STEPS = 90_000
ROWS = ("return", "temperature", "nats per action dimension")


@dataclass
class Options:
    out: Path = HERE / "curves.png"
    """picture to write"""


def runs(task: str, experiments: list[str]) -> list[pd.DataFrame]:
    """Of each run: its numbers at its evaluations, a column each."""
    patterns = [f"{task}-v4__{experiment}__[0-9]*" for experiment in experiments]
    found = [run for f in FOLDERS for pattern in patterns for run in f.glob(pattern)]
    curves = []
    for folder in sorted(found):
        rows = pd.read_csv(folder / "metrics.csv")
        curves.append(rows.pivot_table(index="step", columns="name", values="value"))
    return curves


def entropies(task: str, experiments: list[str]) -> list[pd.DataFrame]:
    """Of each run of MEow: alpha and entropy, of which 10 at a time are averaged."""
    rows = pd.read_csv(HERE / "entropy.csv")
    rows = rows[(rows.task == f"{task}-v4") & rows.experiment.isin(experiments)]
    runs = rows.set_index("step").groupby(["experiment", "seed"])
    return [run[["alpha", "entropy"]].rolling(10).mean() for _, run in runs]


def draw(column, task: str, dimensions: int):
    """One task: return, temperature, entropy."""
    column[0].set_title(f"{task}-v4")
    for label, (colour, experiments) in SETTINGS.items():
        style = dict(color=colour, linewidth=1)
        for curve in runs(task, experiments):
            curve = curve[curve.index <= STEPS]
            column[0].plot(curve["eval/return_mean"], **style, label=label)
            if "losses/alpha" in curve:
                if experiments != IN_UNITS:
                    column[1].plot(curve["losses/alpha"], **style)
                column[2].plot(curve["sac/entropy"] / dimensions, **style)
        for curve in entropies(task, experiments):
            column[1].plot(curve.alpha, **style)
            column[2].plot(curve.entropy / dimensions, **style)
    column[1].set_yscale("log")
    low, high = column[1].get_ylim()
    column[1].set_ylim(low / 2, 2 * high)  # room for a power of ten
    for colour, target in TARGETS.items():
        column[2].axhline(target, color=colour, linewidth=0.5, linestyle="--")
    column[2].set_xlabel("steps")
    column[2].xaxis.set_major_formatter(EngFormatter(sep=""))


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    figure, axes = plt.subplots(
        len(ROWS), len(TASKS), figsize=(12, 6.5), sharex=True, layout="constrained"
    )
    for (task, dimensions), column in zip(TASKS.items(), axes.T, strict=True):
        draw(column, task, dimensions)
    for ax, name in zip(axes[:, 0], ROWS, strict=True):
        ax.set_ylabel(name)
    named = {}
    for ax in axes[0]:
        handles, labels = ax.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    figure.savefig(options.out, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
