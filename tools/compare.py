"""Compares runs: a table of final returns, learning curves and the interquartile mean.

    pip install ".[bench]"
    python tools/compare.py runs --out results --copy   # table, figures and thinned runs, to commit
    python tools/compare.py results --out results       # from the thinned runs: the same files

Writes OUT/comparison.md, learning_curves.png and .svg, iqm.png and .svg.

- Final return: the mean of a run's evaluations in the last 5 % of its steps, each of the
  policy of that time (never the best one), then the mean over seeds.
- Intervals: 95 % percentile bootstrap over seeds, 10,000 resamples; with fewer than 5 seeds they
  are too narrow. For the IQM (interquartile mean: the mean of the middle half of all normalised
  final returns) seeds are resampled within each environment and the divisors taken as exact
  (Agarwal et al. 2021, arXiv 2108.13264).
- Steps and minutes to SAC's return: until the first evaluation that is at least SAC's final
  return of the same environment, steps and evaluation mode; the median over seeds, where a seed
  that never got there counts as infinitely late. Minutes include evaluations and compare only
  on one machine, used alike; the last section names the machines.
- MEow's returns in the paper, 5 seeds: Hopper-v4 3332.99 and HalfCheetah-v4 10981.47 (1,500,000
  steps), Walker2d-v4 5526.66 and Ant-v4 6586.33 (4,000,000), Humanoid-v4 6923.22 (5,000,000).
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import matplotlib.style
    import numpy as np
    import pandas as pd
    import tyro
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    from scipy import stats
except ImportError as missing:
    sys.exit(f"error: {missing.name} is missing: pip install '.[bench]'")

from run_table import (
    ALGORITHMS,
    TASK,
    UsageError,
    copy_run,
    find_runs,
    label,
    number_rows,
)

OTHER_COLOURS = ("#666666", "#7b3294", "#1b1b1b", "#66a61e", "#e7298a", "#a6761d")
STYLE = {
    "svg.hashsalt": "compare.py",  # the same ids in the file each time
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
thousands = EngFormatter(sep="")  # 300k, 1.5M


@dataclass
class Options:
    runs: tyro.conf.Positional[
        tuple[Path, ...]
    ] = ()  # run folders, or folders that contain some
    out: Path = Path("results")  # folder for the table and the figures
    copy: bool = (
        False  # also copy each run to OUT, with the metrics of evaluation steps only
    )
    envs: tuple[str, ...] = ()  # environments to list even if nothing was run there
    algos: tuple[
        str, ...
    ] = ()  # algorithms to list even if not run: exp_name or label, e.g. SAC
    allow_mixed_versions: bool = (
        False  # put runs of different MuJoCo versions into one table
    )


# --- 1. Statistics --------------------------------------------------------------------------------
iqm = partial(
    stats.trim_mean, proportiontocut=0.25
)  # without the n // 4 lowest and highest of n


def bootstrap(strata: list[np.ndarray], statistic=np.mean) -> tuple | None:
    """95 % percentile interval of statistic(all runs), resampling runs within each stratum.

    strata: arrays (n_i, ...). Returns (low, high), each (...), or None if a stratum holds one run,
    which says nothing about the spread.
    """
    if min(map(len, strata)) < 2:
        return None
    result = stats.bootstrap(
        strata,
        lambda *samples, axis: statistic(np.concatenate(samples, axis), axis=axis),
        n_resamples=10_000,
        batch=500,  # memory
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),  # the same interval each time
    )
    return tuple(result.confidence_interval)


def normalise(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that the IQM takes, with their `score`: final return over SAC's, where positive.

    Of several tasks on an environment it takes the one of most algorithms, then of most steps.
    """
    scored = table[(table.status == "") & (table.target > 0)]
    tasks = scored.groupby(TASK).exp_name.nunique().reset_index()
    tasks = tasks.sort_values(["exp_name", *TASK]).drop_duplicates("env", keep="last")
    return scored.assign(score=scored.final / scored.target).merge(tasks[TASK])


@dataclass
class Aggregate:
    """The interquartile mean of one algorithm over the same environments as all others'."""

    exp_name: str
    scores: list[np.ndarray]  # one array per environment
    missing: list[str]  # tasks without exactly one finished row; if any, no IQM

    def __post_init__(self):
        complete = self.scores and not self.missing
        self.iqm = float(iqm(np.concatenate(self.scores))) if complete else math.nan
        self.interval = bootstrap(self.scores, iqm) if complete else None


def aggregate(table: pd.DataFrame, scored: pd.DataFrame) -> list[Aggregate]:
    results = []
    for exp_name in table.exp_name.unique():
        scores, missing = [], []
        for (env, steps, _), runs in scored.groupby(TASK, sort=False):
            own = runs[runs.exp_name == exp_name]
            if own.row.nunique() == 1:
                scores.append(own.score.to_numpy())
            else:
                why = (
                    "several settings"
                    if len(own)
                    else f"no finished run of {steps:,} steps"
                )
                missing.append(f"{why} on {env}")
        results.append(Aggregate(exp_name, scores, missing))
    return results


# --- 2. The report --------------------------------------------------------------------------------
def number(x: float) -> str:
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def span(interval: tuple | None) -> str:
    return f"{number(interval[0])} to {number(interval[1])}" if interval else "-"


def markdown(header: str, lines: list[list]) -> str:
    lines = [header.split(" | "), ["---"] * len(lines[0]), *lines]
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_text(times: pd.Series, form: str) -> str:
    """The median over seeds, where a seed that never got there counts as infinitely late."""
    reached, median = np.isfinite(times).sum(), times.median()
    if not reached:
        return "not reached"
    some = "" if reached == len(times) else f"{reached} of {len(times)} seeds"
    text = format(median, form) if math.isfinite(median) else ""
    return f"{text} ({some})" if text and some else text or some


def returns_table(table: pd.DataFrame) -> str:
    header = (
        "row | environment | algorithm | steps | seeds | final return | 95 % interval"
    )
    header += " | each seed | steps to SAC's return | minutes to it | evaluation"
    lines = []
    for row, runs in table.groupby("row"):
        first, finals = runs.iloc[0], runs.final.to_numpy()
        results = [first.status, "-", "-", "-", "-"]
        if not first.status:
            results[:2] = number(finals.mean()), span(bootstrap([finals]))
            results[2] = ", ".join(map(number, finals))
        if not first.status and math.isfinite(first.target):
            least = first.target - 1e-9 * abs(first.target)  # rounding of the mean
            times = pd.DataFrame(
                [e[e.value >= least].min() for e in runs.evals]
            ).fillna(math.inf)
            results[3:] = (
                median_text(times.step, ",.0f"),
                median_text(times.seconds / 60, ".1f"),
            )
        steps = f"{first.steps:,}" if first.steps else "-"
        seeds = f"{len(runs)} ({', '.join(map(str, runs.seed))})" if first.steps else 0
        lines.append(
            [row, first.env, first.label, steps, seeds, *results, first.evaluation]
        )
    return markdown(header, lines)


def iqm_table(
    table: pd.DataFrame, scored: pd.DataFrame, results: list[Aggregate]
) -> str:
    if scored.empty:
        return "None: SAC's mean final return is missing or not positive in every environment."
    lines = []
    for result in results:
        seeds = " + ".join(str(len(scores)) for scores in result.scores) or "0"
        value = "; ".join(result.missing) or number(result.iqm)
        lines.append([label(result.exp_name), seeds, value, span(result.interval)])
    tasks = scored.drop_duplicates("env").itertuples()
    used = [
        f"{t.env} ({t.steps:,} steps, {t.evaluation}) by {number(t.target)}"
        for t in tasks
    ]
    text = (
        f"Each final return is divided by SAC's mean final return: {', '.join(used)}."
    )
    if others := set(table.env[table.status == ""]) - set(scored.env):
        text += f" Left out, without a positive divisor: {', '.join(sorted(others))}."
    return f"{markdown('algorithm | seeds | IQM | 95 % interval', lines)}\n\n{text}"


def origin(runs: pd.DataFrame) -> str:
    """Commits, versions, machines, run folders and commands of a row."""
    row, env, name, steps, mode = runs[
        ["row", "env", "label", "steps", "evaluation"]
    ].iloc[0]
    lines = [f"### Row {row}: {env}, {name}, {steps:,} steps, {mode}\n"]
    lines += [
        f"- {x}: {'; '.join(runs[x].unique())}"
        for x in ("commit", "versions", "machine")
    ]
    lines += [f"- runs: {', '.join(f'`{name}`' for name in runs['name'])}\n"]
    commands = {}  # with any seed: the seeds
    for run in runs.itertuples():
        command = f"{run.command} ".replace(
            f" --seed {run.seed} ", " --seed $seed "
        ).strip()
        commands.setdefault(command, []).append(str(run.seed))
    loops = [f"for seed in {' '.join(s)}; do {c}; done" for c, s in commands.items()]
    return "\n".join([*lines, "```bash", *loops, "```"])


def report(
    table: pd.DataFrame, scored: pd.DataFrame, results: list[Aggregate], asked: str
) -> str:
    rows = table[table.status != "not run"].groupby("row")
    mixed = rows[["versions", "machine"]].nunique().max(axis=1)
    mixed = ", ".join(map(str, mixed.index[mixed > 1])) or "none"
    parts = [
        "# Comparison of runs",
        f"Written by `python tools/compare.py RUNS --out OUT{asked}`.",
        returns_table(table),
        "![Learning curves](learning_curves.png)" if (table.status == "").any() else "",
        "## Interquartile mean over environments",
        iqm_table(table, scored, results),
        "![Interquartile means](iqm.png)" if len(scored) else "",
        "## Notes",
        __doc__.split("\n\n")[-1].strip()
        + f"\n- Rows whose runs differ in library versions or machine: {mixed}.",
        "## How each row was made",
        "At the row's commit (`git checkout COMMIT`):",
        *(origin(runs) for _, runs in rows),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- 3. Figures -----------------------------------------------------------------------------------
def colours(table: pd.DataFrame) -> dict[str, str]:
    """By exp_name: fixed for the algorithms of this repository, then in the order of names."""
    others = sorted(set(table.exp_name) - set(ALGORITHMS))
    known = {exp_name: colour for exp_name, (_, colour) in ALGORITHMS.items()}
    return known | {
        e: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, e in enumerate(others)
    }


def draw_curves(table: pd.DataFrame) -> Figure:
    """One panel per environment, its legend below."""
    panels = table[table.status == ""].groupby("env", sort=False)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    legend = 1 + panels.row.nunique().max()
    fig = Figure((4.3 * columns, (3.0 + 0.19 * legend) * lines), layout="constrained")
    for i, (env, own) in enumerate(panels, 1):
        ax = fig.add_subplot(lines, columns, i, title=env, xlabel="environment steps")
        draw_panel(ax, own, colours(table))
    fig.suptitle("Mean over seeds, 95 % bootstrap interval", fontsize=9)
    fig.supylabel("return of an evaluation", fontsize=9)
    return fig


def draw_panel(ax, own: pd.DataFrame, colour: dict[str, str]):
    """Mean and interval over seeds by row, and MEow's curve in the paper."""
    for _, runs in own.groupby("row"):
        first = runs.iloc[0]
        name = [first.label, f"{thousands(first.steps)} steps"]
        name += [first.evaluation] * (own.evaluation.nunique() > 1)
        name = f"{', '.join(name)} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        again = first.exp_name in set(own.exp_name[own.row < first.row])
        look = dict(color=colour[first.exp_name], linestyle="--" if again else "-")
        curves = pd.concat(
            [e.set_index("step").value for e in runs.evals], axis=1, join="inner"
        )
        ax.plot(curves.index, curves.mean(axis=1), label=name, **look)
        if interval := bootstrap([curves.to_numpy().T]):
            area = dict(color=colour[first.exp_name], alpha=0.18, linewidth=0)
            ax.fill_between(curves.index, *interval, **area)
    ax.set_xlim(0, None)
    end = ax.get_xlim()[1]
    paper = pd.read_csv(Path(__file__).with_name("paper_curves.csv"), comment="#")
    paper = paper[paper.env == own.env.iloc[0]]
    if (paper.step < end).any():
        steps = np.append(paper.step[paper.step < end], end)
        returns = np.interp(steps, paper.step, paper.return_mean, right=math.nan)
        ax.plot(steps, returns, color="0.6", linewidth=0.8, label="MEow in the paper")
    ax.xaxis.set_major_formatter(thousands)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def draw_iqm(
    scored: pd.DataFrame, results: list[Aggregate], colour: dict[str, str]
) -> Figure:
    """A point and its interval for each algorithm."""
    results = [result for result in results if math.isfinite(result.iqm)]
    fig = Figure((5.5, 1.2 + 0.4 * len(results)), layout="constrained")
    ax = fig.subplots()
    for y, result in enumerate(results):
        look = dict(color=colour[result.exp_name])
        if result.interval:
            ax.plot(result.interval, (y, y), linewidth=5, alpha=0.35, **look)
        ax.plot(result.iqm, y, "o", **look)
    ax.axvline(1, color="black", linestyle=(0, (4, 3)), linewidth=1)
    names = [f"{label(r.exp_name)} ({sum(map(len, r.scores))} runs)" for r in results]
    ax.set_yticks(range(len(results)), names)
    ax.set(
        ylim=(len(results) - 0.4, -0.6),
        xlabel="IQM of final return / SAC's mean final return",
    )
    ax.set_title(
        f"{', '.join(scored.env.unique())}; 95 % bootstrap interval", fontsize=9
    )
    ax.grid(axis="y", visible=False)
    return fig


def save(fig: Figure, path: Path):
    """PNG and SVG without date and version: the same numbers give the same bytes."""
    fig.savefig(f"{path}.png", dpi=120, metadata={"Software": None})
    fig.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})


# --- 4. The command -------------------------------------------------------------------------------
def check_versions(runs: pd.DataFrame):
    """Raises: UsageError where runs of different MuJoCo versions would share a table."""
    if runs.mujoco.nunique() > 1:
        examples = runs.drop_duplicates("mujoco").sort_values("mujoco")
        listed = ", ".join(
            f"{run.mujoco} ({run.folder})" for run in examples.itertuples()
        )
        raise UsageError(
            f"different MuJoCo versions: {listed}; or --allow-mixed-versions"
        )


def compare(options: Options):
    """Reads everything before it writes anything."""
    runs, out = find_runs(options.runs), options.out
    if not options.allow_mixed_versions:
        check_versions(runs)
    table = number_rows(runs, options.envs, options.algos)
    scored = normalise(table)
    results = aggregate(table, scored)
    asked = f" --envs {' '.join(options.envs)}" if options.envs else ""
    asked += f" --algos {' '.join(options.algos)}" if options.algos else ""
    asked += " --allow-mixed-versions" if options.allow_mixed_versions else ""
    text = report(table, scored, results, asked)
    out.mkdir(parents=True, exist_ok=True)
    for run in runs.itertuples() if options.copy else ():
        copy_run(run, out)
    (out / "comparison.md").write_text(text)
    with matplotlib.style.context(
        ["default", STYLE]
    ):  # whatever the user's own style is
        if (table.status == "").any():
            save(draw_curves(table), out / "learning_curves")
        if len(scored):
            save(draw_iqm(scored, results, colours(table)), out / "iqm")
    print(f"{returns_table(table)}\n\nwritten: {out / 'comparison.md'}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one sentence on what is wrong."""
    try:
        compare(tyro.cli(Options, description=__doc__.split("\n\n")[0], args=argv))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
