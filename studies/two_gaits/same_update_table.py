"""Means of same_update.py's csv files over seeds, and tests beside the first arm.

    python studies/two_gaits/same_update_table.py studies/two_gaits/same_update.csv

p: Wilcoxon's signed-rank test over the seeds, two-sided.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from scipy.stats import wilcoxon

MEASURES = ["td_error", "unexplained", "log_sigma"]


@dataclass
class Options:
    file: Annotated[Path, tyro.conf.Positional]
    """csv file with the columns arm,seed,update and the three measures"""


def table(rows: pd.DataFrame) -> str:
    """Markdown: a row for each measure and number of updates."""
    first, *others = dict.fromkeys(rows.arm)
    names = [first, *(cell for arm in others for cell in (arm, "p"))]
    lines = [f"| measure | updates | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for measure in MEASURES:
        for updates, group in rows.groupby("update"):
            values = group.pivot(index="seed", columns="arm", values=measure)
            cells = [measure, f"{updates:,}", f"{values[first].mean():.3f}"]
            for arm in others:
                p = wilcoxon(values[arm], values[first]).pvalue
                cells += [f"{values[arm].mean():.3f}", f"{p:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("| -", "| \N{MINUS SIGN}")


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    print(table(pd.read_csv(options.file)))


if __name__ == "__main__":
    main()
