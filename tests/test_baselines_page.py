"""docs/baselines.md: its returns are those of results/, of all seeds there."""

import csv
import re

import numpy as np
from conftest import ROOT

ROW = re.compile(r"\| `(\w+)` \| ([\d,]+) \| (.*) \| (\d+) \|")


def evaluations(name: str, step: int) -> dict[int, float]:
    """Returns at a step by seed, of all runs of HalfCheetah-v4 with this name."""
    returns = {}
    for file in (ROOT / "results").glob(f"HalfCheetah-v4__{name}__*/metrics.csv"):
        with open(file) as f:
            for row in csv.DictReader(f):
                if (row["step"], row["name"]) == (str(step), "eval/return_mean"):
                    seed = int(file.parent.name.split("__")[2])
                    returns[seed] = float(row["value"])
    return returns


def test_returns_of_sac():
    rows = ROW.findall((ROOT / "docs" / "baselines.md").read_text())
    assert len(rows) == 4
    for name, steps, seeds, mean in rows:
        returns = evaluations(name, int(steps.replace(",", "")))
        written = [cell.strip() for cell in seeds.split("|")]
        expected = [f"{returns[seed]:.0f}" for seed in sorted(returns)]
        assert [cell for cell in written if cell] == expected
        assert mean == f"{np.mean(list(returns.values())):.0f}"


def test_the_commands_are_where_the_page_says():
    report = (ROOT / "results" / "comparison.md").read_text()
    for name in ("SAC", "SAC (SB3)"):
        assert re.search(
            rf"^### Row \d+: HalfCheetah-v4, {re.escape(name)}, ", report, re.M
        )
