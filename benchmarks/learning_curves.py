"""Thins finished runs for the repository and draws their learning curves.

    pip install -r requirements-benchmark.txt
    python benchmarks/learning_curves.py runs/* --out results

Copies each run's args.json and, of metrics.csv, the rows at evaluation steps (without the single
episodes) to OUT/<run_name>/, and draws OUT/learning_curves.png and .svg from what it copied there.
"""

import csv
import dataclasses
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import tyro

PAPER = {  # final average return and steps that the paper reports
    "Hopper-v4": (3332.99, 1_500_000),
    "HalfCheetah-v4": (10981.47, 1_500_000),
    "Walker2d-v4": (5526.66, 4_000_000),
    "Ant-v4": (6586.33, 4_000_000),
    "Humanoid-v4": (6923.22, 5_000_000),
}

SINGLE_EPISODE = re.compile(r"eval/return_\d+$")


@dataclasses.dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders to add to OUT"""
    out: Path = Path("results")
    """folder of the thinned runs and the figure"""


def thin(run: Path, out: Path) -> None:
    """Keeps the rows at evaluation steps, without single episodes."""
    with open(run / "metrics.csv") as f:
        rows = list(csv.DictReader(f))
    steps = {r["step"] for r in rows if r["name"] == "eval/return_mean"}
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    description = json.loads((run / "args.json").read_text())
    description["args"]["runs_dir"] = "runs"  # where it was on the machine tells nobody anything
    (folder / "args.json").write_text(json.dumps(description, indent=2) + "\n")
    with open(folder / "metrics.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            r for r in rows if r["step"] in steps and not SINGLE_EPISODE.match(r["name"])
        )


def draw(out: Path) -> None:
    """One panel per environment, one line per seed, the paper's final return as a dashed line."""
    runs = defaultdict(list)
    for file in sorted(out.glob("*/args.json")):
        args = json.loads(file.read_text())["args"]
        with open(file.with_name("metrics.csv")) as f:
            rows = [r for r in csv.DictReader(f) if r["name"] == "eval/return_mean"]
        curve = [(int(r["step"]) / 1000, float(r["value"])) for r in rows]
        runs[args["env_id"]].append((args["seed"], curve))
    _, axes = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.4), squeeze=False)
    for ax, (env_id, curves) in zip(axes[0], sorted(runs.items()), strict=True):
        for seed, curve in sorted(curves):
            ax.plot(*zip(*curve, strict=True), label=f"seed {seed}")
            print(f"{env_id} seed {seed}: {curve[-1][1]:.0f} after {curve[-1][0]:g}k steps")
        paper_return, paper_steps = PAPER[env_id]
        label = f"paper, after {paper_steps / 1e6:g}M steps"
        ax.axhline(paper_return, color="black", linestyle="--", label=label)
        ax.set(title=env_id, xlabel="thousand environment steps", ylim=(0, None))
        ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("mean return of 10 episodes")
    plt.tight_layout()
    for suffix in ("png", "svg"):
        plt.savefig(out / f"learning_curves.{suffix}", dpi=110)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    for run in options.runs:
        thin(run, options.out)
    draw(options.out)
