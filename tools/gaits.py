"""Which gait each run of results/learning fell into: the tables and the figure of docs/learning.md.

    python tools/gaits.py results/learning

An arm is a file {arm}.csv with the columns seed,step,return,stride (tools/stride.py prints such
rows of one run; a seed may have letters, as in 5x). A run has long strides if its stride at 90,000
steps is below 3.85 Hz, between the two groups. Share of long strides with the exact
(Clopper-Pearson) 95 % interval; p, two-sided, compares with the arm `--base`: the share by Fisher's
exact test, the return by Mann and Whitney's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import pandas as pd
import tyro
from scipy.stats import binomtest, fisher_exact, mannwhitneyu

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LONG = 3.85  # Hz


@dataclass
class Options:
    folder: Annotated[Path, tyro.conf.Positional]
    """folder of the arms' csv files; gaits.md and gaits.png are written there"""
    base: str = "ours"
    """arm that the others are compared with"""
    step: int = 90_000
    """environment steps at which runs are compared"""


def probability(p: float) -> str:
    return f"{p:.2f}" if p >= 0.01 else "< 0.01"


def table_of_arms(ends: pd.DataFrame, base: str) -> str:
    """Markdown: an arm's share of long strides and mean return, compared with those of `base`."""
    rows = ["| arm | seeds | long strides | 95 % interval | p | mean return | p |"]
    rows += ["|---|---|---|---|---|---|---|"]
    first = ends[ends.arm == base]
    for arm, runs in ends.groupby("arm", sort=False):
        n, k = len(runs), int(runs.long.sum())
        low, high = binomtest(k, n).proportion_ci(method="exact")
        share = f"{k} of {n} | {low:.0%} to {high:.0%}".replace("%", " %")
        other = [[k, n - k], [int(first.long.sum()), int((~first.long).sum())]]
        fisher, ranks = (
            fisher_exact(other)[1],
            mannwhitneyu(runs["return"], first["return"])[1],
        )
        p = ("", "") if arm == base else (probability(fisher), probability(ranks))
        rows.append(
            f"| {arm} | {n} | {share} | {p[0]} | {runs['return'].mean():.0f} | {p[1]} |"
        )
    return "\n".join(rows)


def table_of_runs(ends: pd.DataFrame) -> str:
    """Markdown: return and stride of each run."""
    arms = list(dict.fromkeys(ends.arm))
    rows = [f"| seed | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    found = {
        (r.seed, r.arm): f"{r['return']:.0f}, {r.stride:.2f} Hz"
        for _, r in ends.iterrows()
    }
    for seed in sorted(set(ends.seed), key=lambda seed: (len(seed), seed)):
        rows.append(
            f"| {seed} | {' | '.join(found.get((seed, arm), '') for arm in arms)} |"
        )
    return "\n".join(rows)


def draw(curves: pd.DataFrame, ends: pd.DataFrame, path: Path):
    """Return and stride of every run: one row of panels per quantity, one column per arm."""
    arms = list(dict.fromkeys(ends.arm))
    size = dict(
        figsize=(2.6 * len(arms), 4.8), sharex=True, sharey="row", squeeze=False
    )
    figure, axes = plt.subplots(2, len(arms), **size)
    long = ends.set_index(["arm", "seed"]).long
    for column, arm in enumerate(arms):
        axes[0, column].set_title(arm, fontsize=9)
        for seed, run in curves[curves.arm == arm].groupby("seed"):
            if (arm, seed) not in long:
                continue
            color = "tab:blue" if long[arm, seed] else "tab:orange"
            walking = run[run["return"] > 1000]  # before that a stride means nothing
            axes[0, column].plot(run.step / 1000, run["return"], color=color, lw=1)
            axes[1, column].plot(walking.step / 1000, walking.stride, color=color, lw=1)
        axes[1, column].axhline(LONG, color="grey", lw=0.5)
        axes[1, column].set_xlabel("thousand steps")
    axes[0, 0].set_ylabel("return")
    axes[1, 0].set_ylabel("stride, Hz")
    axes[1, 0].set_ylim(2, 6)
    figure.suptitle(
        "HalfCheetah-v4: blue ends in long strides, orange in short ones", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    files = sorted(
        options.folder.glob("*.csv"), key=lambda file: (file.stem != options.base, file)
    )
    if not files or files[0].stem != options.base:
        print(
            f"error: there is no {options.folder / options.base}.csv", file=sys.stderr
        )
        return 2
    curves = pd.concat(
        [pd.read_csv(f, dtype={"seed": str}).assign(arm=f.stem) for f in files]
    )
    ends = curves[curves.step == options.step].copy()
    ends["long"] = ends.stride < LONG
    text = f"{table_of_arms(ends, options.base)}\n\n{table_of_runs(ends)}\n"
    (options.folder / "gaits.md").write_text(text)
    draw(curves, ends, options.folder / "gaits.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
