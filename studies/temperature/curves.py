"""The figure of this study: return, temperature and entropy, beside SAC's.

    python studies/temperature/curves.py

From the runs in results/ and in runs/ beside this file. The entropy is that of the one
action played at the step of an evaluation, so it scatters.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FOLDERS = HERE.parents[1] / "results", HERE / "runs"
TASKS = {"HalfCheetah": 6, "Hopper": 3, "Walker2d": 6, "Ant": 8, "Humanoid": 17}
"""with their numbers of action dimensions"""
SETTINGS = {  # experiment: label, colour, names of temperature and entropy
    "meow_auto_continuous_action": (
        "MEow without tuning",
        "tab:blue",
        "flow/alpha",
        "flow/entropy",
    ),
    "auto_fixed_alpha": ("alpha fixed at 0.1", "tab:green", "flow/alpha", None),
    "auto_near": ("near: far actions weigh less", "tab:purple", "flow/alpha", None),
    "sac_continuous_action": ("SAC", "tab:orange", "losses/alpha", "sac/entropy"),
}
STEPS = 90_000
ROWS = ("return", "temperature", "nats per action dimension")


@dataclass
class Options:
    out: Path = HERE / "curves.png"
    """picture to write"""


def runs(task: str, experiment: str) -> list[pd.DataFrame]:
    """Of each run: its numbers at its evaluations, a column each."""
    curves, pattern = [], f"{task}-v4__{experiment}__[0-9]*"
    for folder in (run for place in FOLDERS for run in sorted(place.glob(pattern))):
        rows = pd.read_csv(folder / "metrics.csv")
        curves.append(rows.pivot_table(index="step", columns="name", values="value"))
    return curves


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    figure, axes = plt.subplots(
        len(ROWS), len(TASKS), figsize=(13, 6.5), sharex=True, layout="constrained"
    )
    for (task, dimensions), column in zip(TASKS.items(), axes.T, strict=True):
        column[0].set_title(f"{task}-v4")
        for experiment, (label, colour, alpha, entropy) in SETTINGS.items():
            for curve in runs(task, experiment):
                curve = curve[curve.index <= STEPS]
                style = dict(color=colour, linewidth=1)
                column[0].plot(curve["eval/return_mean"], **style, label=label)
                if alpha in curve:
                    column[1].plot(curve[alpha], **style)
                if entropy in curve:
                    column[2].plot(curve[entropy] / dimensions, ".", color=colour)
        column[1].set_yscale("log")
        column[2].axhline(-0.65, color="tab:blue", linewidth=0.5)
        column[2].axhline(-1, color="tab:orange", linewidth=0.5)
        column[2].set_xlabel("steps")
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
