"""Which gait each run of HalfCheetah fell into: the table and the figure of a study.

    python studies/two_gaits/gaits.py ARM.csv OTHER_ARM.csv ... --out FOLDER

An arm is a csv file with the columns seed,step,return,stride (stride.py prints such
rows of one run; a seed may have letters, as in 5x). The others are compared with the
first arm.

A run has long strides if its stride at 90,000 steps is below 3.85 Hz, between the two
groups, and is fast if its return is above 5,700. Intervals are 95 %: of a share the
exact one (Clopper-Pearson), of a difference of mean returns Welch's. Each p is
two-sided: of shares by Fisher's exact test, of returns by Mann and Whitney's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import pandas as pd
import tyro
from scipy.stats import binomtest, fisher_exact, mannwhitneyu, ttest_ind

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LONG = 3.85  # Hz
FAST = 5700  # return
COMPARED = "arm,seeds,long strides,95 %,p,return,range,difference,p,fast,p".split(",")


@dataclass
class Options:
    arms: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """csv files of the arms; the others are compared with the first"""
    out: Path
    """folder in which gaits.md and gaits.png are written"""
    step: int = 90_000
    """environment steps at which runs are compared"""


def probability(p: float) -> str:
    """A p-value with two decimals, or with three if it is below 0.1."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def share(runs: pd.Series) -> str:
    return f"{runs.sum()} of {len(runs)}"


def interval_of_share(runs: pd.Series) -> str:
    low, high = binomtest(int(runs.sum()), len(runs)).proportion_ci(method="exact")
    return f"{100 * low:.0f} to {100 * high:.0f}"


def p_of_shares(runs: pd.Series, others: pd.Series) -> str:
    table = [[int(group.sum()), int((~group).sum())] for group in (runs, others)]
    return probability(fisher_exact(table).pvalue)


def difference_of_means(runs: pd.Series, others: pd.Series) -> str:
    """With its interval, which needs two runs in each arm."""
    difference = f"{runs.mean() - others.mean():+.0f}"
    if min(len(runs), len(others)) > 1:
        test = ttest_ind(runs, others, equal_var=False)
        low, high = test.confidence_interval()
        difference += f" ({low:.0f} to {high:.0f})"
    return difference.replace("-", "\N{MINUS SIGN}")


def column_of_arm(arm: str, runs: pd.DataFrame, base: pd.DataFrame | None) -> list[str]:
    """A cell for each of COMPARED; without `base` those that compare stay empty."""
    returns = runs["return"]
    cells = [
        arm,
        str(len(runs)),
        share(runs.long),
        interval_of_share(runs.long),
        "",
        f"{returns.mean():.0f}",
        f"{returns.min():.0f} to {returns.max():.0f}",
        "",
        "",
        share(runs.fast),
        "",
    ]
    if base is not None:
        cells[4] = p_of_shares(runs.long, base.long)
        cells[7] = difference_of_means(returns, base["return"])
        cells[8] = probability(mannwhitneyu(returns, base["return"]).pvalue)
        cells[10] = p_of_shares(runs.fast, base.fast)
    return cells


def table_of_arms(ends: pd.DataFrame) -> str:
    """Markdown: strides and returns, a column per arm, beside the first arm's."""
    columns, base = [COMPARED], None
    for arm, runs in ends.groupby("arm", sort=False):
        columns.append(column_of_arm(arm, runs, base))
        if base is None:
            base = runs
    rows = [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]
    rows.insert(1, "|---" * len(columns) + "|")
    return "\n".join(rows)


def table_of_runs(ends: pd.DataFrame) -> str:
    """Markdown: return and stride of each run."""
    arms = list(dict.fromkeys(ends.arm))
    rows = [f"| seed | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    found = {
        (run.seed, run.arm): f"{run['return']:.0f}, {run.stride:.2f} Hz"
        for _, run in ends.iterrows()
    }
    for seed in sorted(set(ends.seed), key=lambda seed: (len(seed), seed)):
        cells = [found.get((seed, arm), "") for arm in arms]
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(curves: pd.DataFrame, ends: pd.DataFrame, path: Path):
    """Returns (above) and strides (below) of every run, one column per arm."""
    arms = list(dict.fromkeys(ends.arm))
    figure, axes = plt.subplots(
        2,
        len(arms),
        figsize=(2.6 * len(arms), 4.8),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    long = ends.set_index(["arm", "seed"]).long
    for column, arm in enumerate(arms):
        axes[0, column].set_title(arm, fontsize=7)
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
    figure.suptitle("Runs that end in long strides (blue), in short ones (orange)")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    missing = [file for file in options.arms if not file.is_file()]
    if not options.arms or missing:
        print("error: there is no", *(missing or ["arm"]), file=sys.stderr)
        return 2
    if not options.out.is_dir():
        print(f"error: {options.out} is no folder", file=sys.stderr)
        return 2
    curves = pd.concat(
        pd.read_csv(file, dtype={"seed": str}).assign(arm=file.stem)
        for file in options.arms
    )
    ends = curves[curves.step == options.step].copy()
    if ends.arm.nunique() < len(options.arms):
        print(f"error: an arm has no run of {options.step} steps", file=sys.stderr)
        return 2
    ends["long"] = ends.stride < LONG
    ends["fast"] = ends["return"] > FAST
    text = f"{table_of_arms(ends)}\n\n{table_of_runs(ends)}\n"
    (options.out / "gaits.md").write_text(text)
    draw(curves, ends, options.out / "gaits.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
