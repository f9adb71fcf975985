"""Compares runs: a table of final returns, learning curves, the interquartile mean.

    pip install ".[bench]"
    python tools/compare.py runs results               # yours and ours
    python tools/compare.py runs --add "CleanRL=their/metrics.csv,env=Ant-v4,seed=1"
    python tools/compare.py runs --out results --copy  # and thinned runs, to commit
    python tools/compare.py results --out results --panels  # from those: the same files

Writes OUT/comparison.md, learning_curves.png and .svg, iqm.png and .svg; with --panels
also a figure for each environment, e.g. learning_curves_Ant-v4.png.

- Final return: the mean of a run's evaluations in the last 5 % of its steps, each of
  the policy of that time (never the best one), then the mean over seeds.
- Intervals: 95 % percentile bootstrap over seeds, 10,000 resamples; with fewer than 5
  seeds they are too narrow. For the IQM (interquartile mean: the mean of the middle
  half of all normalised final returns) seeds are resampled within each environment and
  the divisors taken as exact (Agarwal et al. 2021, arXiv 2108.13264).
- Steps and minutes to SAC's return: until the first evaluation that is at least SAC's
  final return of the same environment, steps and evaluation mode; the median over
  seeds, where a seed that never got there counts as infinitely late. Minutes include
  evaluations and compare only on one machine, used alike; the last section names the
  machines.
- At the same steps: the mean of a run's evaluations in the last quarter of these steps,
  then the mean over seeds (their number). Of a seed's runs the longest counts, also if
  it was stopped later. The paper: its final return, 5 seeds. p beside SAC: two-sided
  Mann-Whitney test of the seeds, where both have three or more.
"""

import math
import os
import re
import shlex
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
    SAC,
    TASK,
    UsageError,
    copy_run,
    find_runs,
    label,
    number_rows,
)

OTHER_COLOURS = ("#1b1b1b", "#66a61e", "#b2182b", "#a6761d", "#4575b4", "#999900")
SHOWN = ("meow_continuous_action", "meow_auto_continuous_action", SAC[0])
"""compared at the same steps"""
AT = (90_000, 300_000, 1_000_000)
PAPER = {  # MEow's final returns and steps there
    "Hopper-v4": "3333 (1.5M)",
    "HalfCheetah-v4": "10981 (1.5M)",
    "Walker2d-v4": "5527 (4M)",
    "Ant-v4": "6586 (4M)",
    "Humanoid-v4": "6923 (5M)",
}
LINE_STYLES = ("-", "--", ":", "-.")  # of the rows of one algorithm in a panel
DRAWN = {  # of the published curves, in whose colour
    "MEow in the paper": "meow_continuous_action",
    "SAC published by SimbaV2": "sac_continuous_action",
}
CAVEAT = (
    "Published returns come from other code, another evaluation protocol and another "
    "MuJoCo: they show the scale, not who is ahead."
)
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
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders, or folders that contain some"""
    out: Path = Path("comparison")
    """folder for the table and the figures"""
    copy: bool = False
    """also copy each run to OUT, with the metrics of evaluation steps only"""
    panels: bool = False
    """also draw a figure for each environment"""
    add: tuple[str, ...] = ()
    """curves of other code, each as LABEL=PATH[,env=ID][,seed=N][,name=NAME]. PATH: a
    csv file with the columns step,seconds,name,value, or a folder: all csv files in it
    and its folders. Environment and seed are taken from each file's path (as in
    Ant-v4/seed_3.csv or Ant-v4__sac__3__1/metrics.csv) unless they are given; NAME: the
    rows to take (default: eval/return_mean)"""
    envs: tuple[str, ...] = ()
    """environments to list even if nothing was run there"""
    algos: tuple[str, ...] = ()
    """algorithms to list even if not run: exp_name or label, e.g. SAC"""
    allow_mixed_versions: bool = False
    """put runs of different MuJoCo versions into one table"""


# --- 1. Statistics --------------------------------------------------------------------
# without the n // 4 lowest and highest of n
iqm = partial(stats.trim_mean, proportiontocut=0.25)


def bootstrap(strata: list[np.ndarray], statistic=np.mean) -> tuple | None:
    """95 % percentile interval of statistic(all runs), resampled within each stratum.

    strata: arrays (n_i, ...). Returns (low, high), each (...), or None if a stratum
    holds one run, which says nothing about the spread.
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
    """The runs of the IQM, with their `score`: final return over SAC's, if positive.

    Of several tasks on an environment it takes the one of most algorithms, then of most
    steps.
    """
    scored = table[(table.status == "") & (table.target > 0)]
    tasks = scored.groupby(TASK).exp_name.nunique().reset_index()
    tasks = tasks.sort_values(["exp_name", *TASK]).drop_duplicates("env", keep="last")
    return scored.assign(score=scored.final / scored.target).merge(tasks[TASK])


@dataclass
class Aggregate:
    """The interquartile mean of one algorithm, over the environments of all others."""

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
                why = f"no finished run of {steps:,} steps"
                if len(own):
                    why = "several settings"
                missing.append(f"{why} on {env}")
        results.append(Aggregate(exp_name, scores, missing))
    return results


# --- 2. The report --------------------------------------------------------------------
def number(x: float) -> str:
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def span(interval: tuple | None) -> str:
    return f"{number(interval[0])} to {number(interval[1])}" if interval else "-"


def markdown(header: str, lines: list[list]) -> str:
    lines = [header.split(" | "), ["---"] * len(lines[0]), *lines]
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_text(times: pd.Series, form: str) -> str:
    """The median over seeds; one that never got there counts as infinitely late."""
    reached, median = np.isfinite(times).sum(), times.median()
    if not reached:
        return "not reached"
    some = "" if reached == len(times) else f"{reached} of {len(times)} seeds"
    text = format(median, form) if math.isfinite(median) else ""
    return f"{text} ({some})" if text and some else text or some


def returns_table(table: pd.DataFrame) -> str:
    header = "row | environment | algorithm | steps | seeds | final return"
    header += " | 95 % interval | each seed | steps to SAC's return | minutes to it"
    header += " | evaluation"
    lines = []
    for row, runs in table.groupby("row"):
        first, finals = runs.iloc[0], runs.final.to_numpy()
        results = [first.status, "-", "-", "-", "-"]
        if not first.status:
            results[:2] = number(finals.mean()), span(bootstrap([finals]))
            results[2] = ", ".join(map(number, finals))
        if not first.status and math.isfinite(first.target):
            least = first.target - 1e-9 * abs(first.target)  # rounding of the mean
            firsts = [evals[evals.value >= least].min() for evals in runs.evals]
            times = pd.DataFrame(firsts).fillna(math.inf)
            results[3] = median_text(times.step, ",.0f")
            results[4] = median_text(times.seconds / 60, ".1f")
        steps = f"{first.steps:,}" if first.steps else "-"
        seeds = f"{len(runs)} ({', '.join(map(str, runs.seed))})" if first.steps else 0
        lines.append(
            [row, first.env, first.label, steps, seeds, *results, first.evaluation]
        )
    return markdown(header, lines)


def returns_at(runs: pd.DataFrame, step: int) -> list[float]:
    """Of each seed's longest run the mean of its evaluations up to this step.

    Those of the last quarter of these steps; runs that didn't get there are left out.
    """
    means = []
    for _, own in runs.groupby("seed"):
        evals = max(own.evals, key=lambda evals: max(evals.step, default=0))
        late = (evals.step > 0.75 * step) & (evals.step <= step)
        if evals.step.max() >= step and late.any():
            means.append(evals.value[late].mean(skipna=False))
    return means


def same_steps(table: pd.DataFrame) -> str:
    """The section on returns at the steps of `AT`; empty if no run got to the least.

    A line for each of the paper's environments; then a table for each, with all seeds.
    """
    table = table[table.env.isin(PAPER) & (table.status != "not run")]
    if table.evaluation.nunique() > 1:  # never averaged
        table = table.assign(label=table.label + ", " + table.evaluation)
    returns = {}  # by step, label and environment: one for each seed
    for step in AT:
        for name, of_label in table.groupby("label", sort=False):
            for env, runs in of_label.groupby("env", sort=False):
                if values := returns_at(runs, step):
                    returns[step, name, env] = values
    if not returns:
        return ""
    shown = set(table.label[table.exp_name.isin(SHOWN)])
    parts = ["## At the same steps", one_line_each(returns, shown)]
    sac = set(table.label[table.exp_name.isin(SAC)])
    for env in PAPER:
        if own := {key[:2]: values for key, values in returns.items() if key[2] == env}:
            parts += [f"### {env}", seeds_table(own, sac)]
    return "\n\n".join(filter(None, parts))


def one_line_each(returns: dict[tuple, list[float]], shown: set[str]) -> str:
    """A line for each of the paper's environments: means of labels `shown`, if any."""
    columns = {}  # by step and label: cells of the environments
    for (step, name, env), values in returns.items():
        if name in shown:
            cells = columns.setdefault(f"{step // 1000}k {name}", {})
            cells[env] = f"{np.mean(values):.0f} ({len(values)})"
    if not columns:
        return ""
    columns["the paper"] = PAPER
    lines = [
        [env, *(cells.get(env, "") for cells in columns.values())] for env in PAPER
    ]
    return markdown(" | ".join(["task", *columns]), lines)


def seeds_table(returns: dict[tuple, list[float]], sac: set[str]) -> str:
    """One environment: a line for each step and label, beside the only label of SAC."""
    lines = []
    for (step, name), values in returns.items():
        theirs = [returns[step, other] for other in sac if (step, other) in returns]
        p = ""
        if name not in sac and len(theirs) == 1:
            if len(values) >= 3 and len(theirs[0]) >= 3:
                p = f"{stats.mannwhitneyu(values, theirs[0]).pvalue:.2f}"
        each = ", ".join(f"{value:.0f}" for value in values)
        lines.append([f"{step:,}", name, f"{np.mean(values):.0f}", each, p])
    return markdown("steps | algorithm | mean | each seed | p beside SAC", lines)


def iqm_table(
    table: pd.DataFrame, scored: pd.DataFrame, results: list[Aggregate]
) -> str:
    if scored.empty:
        reason = "is missing or not positive in every environment"
        return f"None: SAC's mean final return {reason}."
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


def published(env: str, last: float) -> pd.DataFrame:
    """Published returns on this environment up to step `last`."""
    known = pd.read_csv(Path(__file__).with_name("published_curves.csv"), comment="#")
    return known[(known.env == env) & (known.step <= last)]


def published_table(table: pd.DataFrame) -> str:
    """The last return of each source that our runs got as far as; "" without any."""
    lines = []
    for env in table.env.unique():
        finished = table[(table.env == env) & (table.status == "")]
        known = published(env, finished.steps.max())
        for source, rows in known.groupby("source", sort=False):
            last = rows.iloc[-1]
            spread = "-" if math.isnan(last.sd) else f"{last.sd:.0f}"
            value = f"{last.return_mean:.0f}"
            lines.append([env, source, f"{last.step:,}", last.seeds, value, spread])
    if not lines:
        return ""
    header = "environment | source | steps | seeds | return | s.d. over seeds"
    return f"## Published returns\n\n{markdown(header, lines)}\n\n{CAVEAT}"


def title(runs: pd.DataFrame) -> str:
    row, env, name, steps, mode = runs[
        ["row", "env", "label", "steps", "evaluation"]
    ].iloc[0]
    return f"### Row {row}: {env}, {name}, {steps:,} steps, {mode}\n"


def origin_of_added(runs: pd.DataFrame) -> str:
    files = ", ".join(f"`{name}`" for name in runs["name"])
    return f"{title(runs)}\n- files of other code: {files}"


def origin(runs: pd.DataFrame) -> str:
    """Commits, versions, machines, run folders and commands of a row."""
    if runs.about.isna().all():
        return origin_of_added(runs)
    lines = [title(runs)]
    for name in ("commit", "versions", "machine"):
        lines.append(f"- {name}: {'; '.join(runs[name].unique())}")
    lines += [f"- runs: {', '.join(f'`{name}`' for name in runs['name'])}\n"]
    commands = {}  # with any seed: the seeds
    for run in runs.itertuples():
        any_seed = f"{run.command} ".replace(f" --seed {run.seed} ", " --seed $seed ")
        commands.setdefault(any_seed.strip(), []).append(str(run.seed))
    loops = [f"for seed in {' '.join(s)}; do {c}; done" for c, s in commands.items()]
    return "\n".join([*lines, "```bash", *loops, "```"])


def report(
    table: pd.DataFrame, scored: pd.DataFrame, results: list[Aggregate], asked: str
) -> str:
    rows = table[table.status != "not run"].groupby("row")
    mixed = rows[["commit", "versions", "machine"]].nunique().max(axis=1)
    mixed = ", ".join(map(str, mixed.index[mixed > 1])) or "none"
    parts = [
        "# Comparison of runs",
        f"Written by `python tools/compare.py RUNS --out OUT{asked}`.",
        returns_table(table),
        same_steps(table),
        "![Learning curves](learning_curves.png)" if len(drawn(table)) else "",
        published_table(table),
        "## Interquartile mean over environments",
        iqm_table(table, scored, results),
        "![Interquartile means](iqm.png)" if len(scored) else "",
        "## Notes",
        __doc__.split("\n\n")[-1].strip()
        + "\n- Rows whose runs differ in commit, library versions or machine: "
        + f"{mixed}.",
        "## How each row was made",
        "At the row's commit (`git checkout COMMIT`):",
        *(origin(runs) for _, runs in rows),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- 3. Figures -----------------------------------------------------------------------
def colours(table: pd.DataFrame) -> dict[str, str]:
    """By exp_name: fixed for this repository's, then in the order of names."""
    others = sorted(set(table.exp_name) - set(ALGORITHMS))
    result = {exp_name: colour for exp_name, (_, colour) in ALGORITHMS.items()}
    for i, exp_name in enumerate(others):
        result[exp_name] = OTHER_COLOURS[i % len(OTHER_COLOURS)]
    return result


def drawn(table: pd.DataFrame) -> pd.DataFrame:
    """The finished runs, and of algorithms without one the stopped ones."""
    runs = table[table.status != "not run"]
    sound = [len(evals) > 0 and np.isfinite(evals.value).all() for evals in runs.evals]
    runs = runs[np.array(sound, bool)]
    finished = runs.groupby(["env", "exp_name"]).status.transform("min") == ""
    return runs[(runs.status == "") | ~finished]


def draw_curves(table: pd.DataFrame) -> Figure:
    """One panel per environment; one legend for all of them."""
    runs = drawn(table)
    panels = runs.groupby("env", sort=False)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = max(6.5, 3.6 * columns)  # the legend's two columns
    fig = Figure((width, 2.8 * lines + 1.2), layout="constrained")
    colour, shown = colours(table), {}
    for i, (env, own) in enumerate(panels, 1):
        ax = fig.add_subplot(lines, columns, i, title=env, xlabel="environment steps")
        draw_panel(ax, own, colour)
        shown |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    text = "Mean over seeds, 95 % bootstrap interval"
    if (runs.status != "").any():
        text += "; x: stopped there"
    if set(DRAWN) & set(shown):
        text += "; thin: published, another evaluation and MuJoCo"
    fig.suptitle(text, fontsize=9)
    fig.supylabel("return of an evaluation", fontsize=9)
    names = [name for name in shown if name not in DRAWN]
    names += [name for name in DRAWN if name in shown]
    handles = [shown[name] for name in names]
    fig.legend(handles, names, loc="outside lower center", ncols=2)
    return fig


def draw_panel(ax, own: pd.DataFrame, colour: dict[str, str]):
    """Mean and interval over seeds of each row, and the published curves."""
    drawn = []  # algorithms
    for _, runs in own.groupby("row"):
        first = runs.iloc[0]
        style = LINE_STYLES[drawn.count(first.exp_name) % len(LINE_STYLES)]
        drawn.append(first.exp_name)
        look = dict(color=colour[first.exp_name], linestyle=style)
        if first.status:
            look |= dict(marker="x", markevery=[-1])
        values = [evals.set_index("step").value for evals in runs.evals]
        curves = pd.concat(values, axis=1, join="inner")
        ax.plot(curves.index, curves.mean(axis=1), label=curve_name(runs, own), **look)
        if interval := bootstrap([curves.to_numpy().T]):
            area = dict(color=colour[first.exp_name], alpha=0.18, linewidth=0)
            ax.fill_between(curves.index, *interval, **area)
    known = published(own.env.iloc[0], ax.dataLim.xmax)
    for source, exp_name in DRAWN.items():
        rows = known[known.source == source]
        if len(rows):
            look = dict(color=colour[exp_name], linewidth=0.9, linestyle=":")
            ax.plot(rows.step, rows.return_mean, label=source, **look)
    ax.set_xlim(0, None)
    ax.xaxis.set_major_formatter(thousands)


def curve_name(runs: pd.DataFrame, own: pd.DataFrame) -> str:
    """The label of a row, with whatever else sets it apart from others in its panel."""
    first = runs.iloc[0]
    parts = [first.label]
    if first.status:
        parts.append("stopped")
    same = own[own.label == first.label]
    if same.steps.nunique() > 1:
        parts.append(f"{thousands(first.steps)} steps")
    if same.evaluation.nunique() > 1:
        parts.append(first.evaluation)
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return f"{', '.join(parts)} ({seeds})"


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


# --- 4. The command -------------------------------------------------------------------
def check_versions(runs: pd.DataFrame):
    """Raises: UsageError where runs of different MuJoCo versions share a table."""
    runs = runs[runs.about.notna()]  # not those of other code
    if runs.mujoco.nunique() > 1:
        examples = runs.drop_duplicates("mujoco").sort_values("mujoco").itertuples()
        listed = ", ".join(f"{run.mujoco} ({run.folder})" for run in examples)
        text = f"different MuJoCo versions: {listed}"
        raise UsageError(f"{text}; or --allow-mixed-versions")


def asked(options: Options) -> str:
    """The options that change the report."""
    words = ""
    for name in ("add", "envs", "algos"):
        if values := getattr(options, name):
            words += f" --{name} {shlex.join(values)}"
    if options.allow_mixed_versions:
        words += " --allow-mixed-versions"
    return words


def compare(options: Options):
    """Reads everything before it writes anything."""
    runs, out = find_runs(options.runs, options.add), options.out
    if not options.allow_mixed_versions:
        check_versions(runs)
    table = number_rows(runs, options.envs, options.algos)
    scored = normalise(table)
    results = aggregate(table, scored)
    text = report(table, scored, results, asked(options))
    out.mkdir(parents=True, exist_ok=True)
    if options.copy:
        for run in table[table.about.notna()].itertuples():
            copy_run(run, out)
    (out / "comparison.md").write_text(text)
    # whatever the user's own style is
    with matplotlib.style.context(["default", STYLE]):
        if len(drawn(table)):
            save(draw_curves(table), out / "learning_curves")
            if options.panels:
                for env, own in table.groupby("env", sort=False):
                    if len(drawn(own)):
                        name = re.sub(r"[^\w.-]", "_", env)  # of ns/Foo-v0 too
                        save(draw_curves(own), out / f"learning_curves_{name}")
        if len(scored):
            save(draw_iqm(scored, results, colours(table)), out / "iqm")
    print(f"{returns_table(table)}\n\nwritten: {out / 'comparison.md'}")


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code: 0, or 2 after one sentence on what is wrong."""
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
