"""The figure of this study: target y and return on Hopper, with remedies and without.

    python studies/hopper_divergence/curves.py

From out_of_reach.csv beside this file and the runs in results/.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
WORTH = 330  # reward units: about what y can be for a policy with a return of 3,300


@dataclass
class Options:
    out: Path = HERE / "curves.png"
    """picture to write"""


def committed_runs(exp_name: str) -> list[pd.DataFrame]:
    """Of each seed's run on Hopper in results/: step, return and target."""
    curves = []
    for file in sorted(RESULTS.glob(f"Hopper-v4__{exp_name}__[0-9]*/metrics.csv")):
        rows = pd.read_csv(file)
        curve = rows.pivot_table(index="step", columns="name", values="value")
        names = {"eval/return_mean": "return", "flow/target": "target"}
        curves.append(curve.reset_index().rename(columns=names))
    return curves


def studied_runs(name: str) -> list[pd.DataFrame]:
    rows = pd.read_csv(HERE / "out_of_reach.csv")
    return [run for _, run in rows[rows.run == name].groupby("seed")]


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    name = "alpha_0.1_reward_tau_0.01"
    paper = committed_runs("meow_continuous_action")
    diverging = studied_runs(f"meow_{name}")
    pre_tanh = committed_runs(f"meow_{name}_pre_tanh")
    bounded = studied_runs(f"bound1.5_{name}")
    groups = [
        ("the paper's settings", "tab:grey", paper),
        ("alpha 0.1, shifts in reward units, tau 0.01", "tab:red", diverging),
        ("the same, replay before tanh", "tab:blue", pre_tanh),
        ("the same, bounded couplings", "tab:green", bounded),
    ]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    for label, color, runs in groups:
        for number, run in enumerate(runs):
            style = dict(color=color, lw=1, label=label if number == 0 else None)
            above.plot(run.step / 1000, run.target, **style)
            below.plot(run.step / 1000, run["return"], **style)
    above.axhline(WORTH, color="black", lw=0.5, ls="--")
    above.set_yscale("log")
    above.set_ylabel("target y (batch mean)")
    above.legend(fontsize=8)
    below.set_ylabel("return")
    below.set_xlabel("thousand steps")
    figure.suptitle("Hopper-v4, one line per seed; dashed: worth of a return of 3,300")
    figure.tight_layout()
    figure.savefig(options.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
