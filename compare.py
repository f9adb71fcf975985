"""Compares runs: a table of final returns, learning curves and the interquartile mean.

    pip install -r requirements-benchmark.txt
    python compare.py runs --out results --copy     # table, figures and thinned runs, to commit
    python compare.py results --out results         # from the thinned runs: the same, byte for byte

Writes OUT/comparison.md, learning_curves.png and .svg, iqm.png and .svg. Statistics:

final return  the mean of a run's evaluations in the last 5 % of its steps (the policy of that time,
              never the best one), then the mean over seeds
95 % interval percentile bootstrap over seeds, 10,000 resamples; needs two seeds
IQM           the mean of the middle half of all normalised final returns; its interval resamples
              seeds within each environment (Agarwal et al. 2021, arXiv 2108.13264)
"""

import collections
import json
import math
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

try:
    import matplotlib.style
    import numpy as np
    import tyro
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    from scipy import stats
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {missing.name} is missing: pip install -r requirements-benchmark.txt")

PAPER = {  # final average return of MEow and steps, as the paper reports them
    "Hopper-v4": (3332.99, 1_500_000),
    "HalfCheetah-v4": (10981.47, 1_500_000),
    "Walker2d-v4": (5526.66, 4_000_000),
    "Ant-v4": (6586.33, 4_000_000),
    "Humanoid-v4": (6923.22, 5_000_000),
}
SAC = ("sac_continuous_action", "sac_isaacgym")
ALGORITHMS = {  # by --exp-name: label, colour, script, options that only it has together
    "meow_continuous_action": ("MEow", "#0072b2", "meow_continuous_action.py", "coupling"),
    "sac_continuous_action": ("SAC", "#d55e00", "sac_continuous_action.py", "autotune"),
    "sql_continuous_action": ("SQL", "#009e73", "sql_continuous_action.py", "kernel_particles"),
    "sb3_td3": ("TD3 (SB3)", "#cc79a7", "sb3_baselines.py", "algo"),
    "sb3_ddpg": ("DDPG (SB3)", "#56b4e9", "sb3_baselines.py", "algo"),
    "sb3_ppo": ("PPO (SB3)", "#e69f00", "sb3_baselines.py", "algo"),
    "sb3_sac": ("SAC (SB3)", "#8c510a", "sb3_baselines.py", "algo"),
    "meow_isaacgym": ("MEow", "#0072b2", "meow_isaacgym.py", "coupling num_envs"),
    "sac_isaacgym": ("SAC", "#d55e00", "sac_isaacgym.py", "autotune num_envs"),
}
HEADER = "step,seconds,name,value\n"
RUN_FILES = ("args.json", "metrics.csv")
OTHER_COLOURS = ("#666666", "#7b3294", "#1b1b1b", "#66a61e", "#e7298a", "#a6761d")

# Options that no result depends on; those with a column of their own in the table; and those that
# change rounding or how often a run is evaluated: none of them splits a row.
HOUSEKEEPING = "resume evaluate runs_dir checkpoint_frequency log_frequency capture_video track"
HOUSEKEEPING = {*HOUSEKEEPING.split(), "wandb_project_name", "wandb_entity"}
WHERE = {"runs_dir": "runs", "resume": None}  # where a run was on its machine: not copied
COLUMNS = {"env_id", "exp_name", "seed", "total_timesteps", "eval_episodes", "deterministic_eval"}
ROUNDING = {"cuda", "torch_threads", "torch_deterministic", "compile", "eval_frequency"}
ROUNDING |= {"sim_threads"}

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
LINES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)))
DASHED = dict(color="black", linestyle=(0, (4, 3)), linewidth=1)


class UsageError(Exception):
    """The command can't be carried out as given (exit code 2)."""


class RunError(Exception):
    """A file is damaged or would be lost (exit code 1)."""


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders, or folders that contain run folders"""
    out: Path = Path("results")
    """folder for the table and the figures"""
    copy: bool = False
    """also copy each run to OUT/<run name>/: args.json, and metrics.csv at evaluation steps only"""
    envs: tuple[str, ...] = ()
    """environments to list even if nothing was run there, e.g. Ant-v4 Humanoid-v4"""
    algos: tuple[str, ...] = ()
    """algorithms to list even if they were not run: exp_name or label, e.g. SAC sb3_td3"""
    smooth: int = 1
    """draw each point of a curve as the mean of so many evaluations (1: as measured)"""
    allow_mixed_versions: bool = False
    """put runs of different MuJoCo versions into one table"""


# --- 1. Reading runs ------------------------------------------------------------------------------
@dataclass
class Run:
    """What args.json and the evaluation rows of metrics.csv say. Arrays: (T,) evaluations.

    Steps are environment steps, also where the run counts steps of many environments at once.
    """

    folder: Path
    description: dict
    steps: np.ndarray
    seconds: np.ndarray
    returns: np.ndarray

    def __post_init__(self):
        self.name, self.args = self.folder.resolve().name, self.description["args"]
        self.env, self.exp_name = self.args["env_id"], self.args["exp_name"]
        self.seed, num_envs = self.args["seed"], self.args.get("num_envs", 1)
        self.steps, self.total = num_envs * self.steps, num_envs * self.args["total_timesteps"]
        settings = self.description.get("settings")  # what sb3_baselines.py looked up itself
        self.settings = {**(settings if isinstance(settings, dict) else {}), **self.args}
        modes = {True: "deterministic", False: "stochastic"}
        mode = modes.get(self.args.get("deterministic_eval"), "unknown mode")
        self.mode = f"{mode}, {self.args.get('eval_episodes', 'unknown number of')} episodes"

    def versions(self) -> dict[str, str]:
        recorded = self.description.get("versions", {})
        return {"python": self.description.get("python"), "mujoco": "unknown", **recorded}

    def problem(self) -> str:
        """Why the run has no final return; empty if it has one."""
        if (bad := ~np.isfinite(self.returns)).any():
            return f"return is not finite at step {self.steps[bad][0]:,}"
        last = self.steps[-1] if len(self.steps) else 0
        return "" if last == self.total else f"unfinished at step {last:,}"


def read_description(folder: Path) -> dict:
    """args.json, checked for what a comparison needs."""
    file = folder / "args.json"
    if not file.is_file():
        raise RunError(f"{folder} has no args.json")
    kinds = {"env_id": str, "exp_name": str, "seed": int, "total_timesteps": int}
    try:
        description = json.loads(file.read_text())
        args = description["args"]
        wrong = [name for name, kind in kinds.items() if type(args.get(name)) is not kind]
        description.get("versions", {}).items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{file} is damaged or not the description of a run") from None
    if wrong or args["total_timesteps"] < 1:
        raise RunError(f"{file}: {', '.join(wrong or ['total_timesteps'])} missing or invalid")
    return description


def read_metrics(folder: Path) -> list[list[str]]:
    """The rows [step, seconds, name, value] as written, without the header."""
    file = folder / "metrics.csv"
    if not file.is_file():
        raise RunError(f"{folder} has no metrics.csv")
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        raise RunError(f"{file} is damaged: not a text file") from None
    if not text.startswith(HEADER):
        raise RunError(f"{file} is empty or damaged: it must begin with {HEADER.strip()}")
    *lines, rest = text.removeprefix(HEADER).split("\n")
    if rest:  # the run was killed while it wrote, or is writing now
        warn(f"{file}: its last line is incomplete (no newline) and left out")
    rows = [line.split(",") for line in lines]
    for line, row in enumerate(rows, 2):
        if len(row) != 4 or not row[0].isdecimal():
            raise RunError(f"{file} is damaged in line {line}")
    return rows


def read_run(folder: Path) -> Run:
    description, file = read_description(folder), folder / "metrics.csv"
    rows = [row for row in read_metrics(folder) if row[2] == "eval/return_mean"]
    try:
        steps = np.array([int(row[0]) for row in rows])
        seconds, returns = (np.array([float(row[i]) for row in rows]) for i in (1, 3))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from None
    if not np.isfinite(seconds).all() or (np.diff(steps) <= 0).any():
        raise RunError(f"{file} is damaged: steps of evaluations must increase, seconds be finite")
    run = Run(folder, description, steps, seconds, returns)
    if len(steps) and run.steps[-1] > run.total:
        raise RunError(f"{file} goes on after the last step of args.json")
    return run


def find_runs(paths: tuple[Path, ...]) -> list[Run]:
    """Every run in the paths, once, sorted by seed. Raises: UsageError, RunError."""
    folders = {}  # by resolved path: a run may be given by itself and within its parent
    for path in paths:
        if path.is_file():  # results/* holds the figures too
            warn(f"{path} is not a folder: left out")
            continue
        files = [f for d in ("", "*/") for name in RUN_FILES for f in path.glob(d + name)]
        found = [file.parent for file in files]
        if not found:
            raise UsageError(f"no runs found in {path}" if path.exists() else f"there is no {path}")
        folders |= {folder.resolve(): folder for folder in found}
    if not folders:
        raise UsageError("no runs found: give run folders, or a folder that contains some")
    runs = {}
    for run in map(read_run, folders.values()):
        other = runs.setdefault(run.name, run)
        if other is not run:
            both = f"{other.folder} and {run.folder}"
            if not same_run(run, other):
                raise UsageError(f"{both} have the same name but differ: give one of them")
            warn(f"{both} are copies of one run: counted once")
    return sorted(runs.values(), key=lambda run: (run.seed, run.name))


def same_run(a: Run, b: Run) -> bool:
    arrays = all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=True)
                 for k in ("steps", "seconds", "returns"))  # fmt: skip
    return arrays and a.args | WHERE == b.args | WHERE


def thin(rows: list[list[str]]) -> str:
    """metrics.csv with the rows at evaluation steps only, without single episodes."""
    steps = {row[0] for row in rows if row[2] == "eval/return_mean"}
    kept = [row for row in rows if row[0] in steps and not re.match(r"eval/return_\d+$", row[2])]
    return HEADER + "".join(f"{','.join(row)}\n" for row in kept)


def copy_run(run: Run, out: Path):
    """Writes OUT/<run name>/. Raises: RunError where a fuller file would be lost."""
    target = out / run.name
    if target.resolve() == run.folder.resolve():
        return
    text, file = thin(read_metrics(run.folder)), target / "metrics.csv"
    if file.exists() and not text.encode().startswith(file.read_bytes()):
        raise RunError(f"{file} holds rows that a copy of {run.folder} lacks: not overwritten")
    target.mkdir(parents=True, exist_ok=True)
    described = run.description | {"args": run.args | WHERE}
    (target / "args.json").write_text(json.dumps(described, indent=2) + "\n")
    file.write_text(text)


# --- 2. Statistics --------------------------------------------------------------------------------
def final_return(steps: np.ndarray, returns: np.ndarray, total: int) -> float:
    """Mean of the evaluations (T,) in the last 5 % of the steps: 0.95 total < step <= total."""
    return float(returns[20 * steps > 19 * total].mean())


def iqm(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: the mean without the lowest and the highest n // 4 of n scores."""
    return stats.trim_mean(scores, 0.25, axis=axis)


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


def time_to_reach(run: Run, target: float) -> tuple[float, float]:
    """(steps, seconds) of the first evaluation of at least `target`; infinite if there is none."""
    reached = np.flatnonzero(run.returns >= target - 1e-9 * abs(target))  # rounding of the mean
    return (run.steps[reached[0]], run.seconds[reached[0]]) if len(reached) else (math.inf,) * 2


def curves(runs: list[Run], smooth: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) at which every run was evaluated, and the returns there (runs, T).

    smooth: each return becomes its mean with the run's `smooth - 1` evaluations before it.
    """
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in runs)))
    returns = [
        [
            run.returns[max(0, i + 1 - smooth) : i + 1].mean()
            for i in np.searchsorted(run.steps, steps)
        ]
        for run in runs
    ]
    return np.array(steps), np.array(returns)


# --- 3. Rows: which runs may be averaged ----------------------------------------------------------
@dataclass
class Row:
    """Finished runs alike but for their seeds; or one unfinished run; or "not run"."""

    env: str
    exp_name: str
    steps: int = 0
    mode: str = "-"
    settings: str = ""  # those in which the algorithm's runs on this environment differ
    status: str = "not run"  # empty: finished
    runs: list[Run] = field(default_factory=list)
    number: int = 0

    @property
    def task(self) -> tuple[str, int, str]:
        """Only rows of one task can be compared."""
        return self.env, self.steps, self.mode

    @property
    def finals(self) -> np.ndarray:
        """Final return of each run."""
        return np.array([final_return(run.steps, run.returns, run.total) for run in self.runs])

    def label(self) -> str:
        return label(self.exp_name) + (f", {self.settings}" if self.settings else "")


def label(exp_name: str) -> str:
    return ALGORITHMS[exp_name][0] if exp_name in ALGORITHMS else exp_name


def in_order(names: set[str], known: dict) -> list[str]:
    """The known names in their order, then the others by name."""
    return [name for name in known if name in names] + sorted(names - set(known))


def make_rows(
    runs: list[Run], envs: tuple[str, ...] = (), algos: tuple[str, ...] = ()
) -> list[Row]:
    """The rows of every pair of an environment and an algorithm."""
    exp_names = {label(e).lower(): e for e in reversed(ALGORITHMS)}  # of equals the first
    algos = {exp_names.get(a.lower(), a) for a in algos} | {run.exp_name for run in runs}
    rows = []
    for env in in_order({*envs, *(run.env for run in runs)}, PAPER):
        for exp_name in in_order(algos, ALGORITHMS):
            own = [run for run in runs if (run.env, run.exp_name) == (env, exp_name)]
            rows += group_runs(own) or [Row(env, exp_name)]
    for number, row in enumerate(rows, 1):
        row.number = number
    return rows


def group_runs(runs: list[Run]) -> list[Row]:
    """Rows of one algorithm on one environment, by steps, evaluation mode and settings.

    Raises: UsageError for two runs of one seed in one row.
    """
    names = {n for run in runs for n in run.settings} - HOUSEKEEPING - COLUMNS - ROUNDING
    differ = [n for n in sorted(names) if len({repr(run.settings.get(n, ...)) for run in runs}) > 1]
    groups = {}
    for run in runs:
        settings = ", ".join(f"{n}={run.settings.get(n, 'not recorded')}" for n in differ)
        unfinished = run.problem() and f"{run.problem()}, {run.name}"
        group = groups.setdefault((run.total, run.mode, settings, unfinished), [])
        if twin := next((other for other in group if other.seed == run.seed), None):
            both = f"{twin.folder} and {run.folder}"
            raise UsageError(f"{both} have the same settings and seed: give one of them")
        group.append(run)
    return [
        Row(group[0].env, group[0].exp_name, *key[:3], group[0].problem(), group)
        for key, group in sorted(groups.items())
    ]


def sac_return(task: tuple, rows: list[Row]) -> float:
    """SAC's mean final return; nan if no row of SAC is finished, or several with other settings."""
    found = [row for row in rows if not row.status and row.task == task and row.exp_name in SAC]
    return found[0].finals.mean() if len(found) == 1 else math.nan


def choose_divisors(rows: list[Row]) -> tuple[str, dict[tuple, float]]:
    """What final returns are divided by before they are averaged over environments: a name, and
    the number by task, one for each environment that has any.

    That is SAC's mean final return or, without any finished SAC, the paper's return of MEow. Of
    several tasks on an environment it takes the one of most algorithms, then of most steps.
    """
    finished = [row for row in rows if not row.status]
    by_sac = any(row.exp_name in SAC for row in finished)
    divisors = {}
    for env in dict.fromkeys(row.env for row in finished):
        tasks = [r.task for r in finished if r.env == env and (r.exp_name in SAC or not by_sac)]
        algorithms = {t: len({r.exp_name for r in finished if r.task == t}) for t in tasks}
        task = max(tasks, key=lambda t: (algorithms[t], t), default=None)
        divisor = sac_return(task, rows) if by_sac else PAPER.get(env, (math.nan,))[0]
        if divisor > 0:
            divisors[task] = divisor
    return "SAC's mean final return" if by_sac else "the paper's return of MEow", divisors


@dataclass
class Aggregate:
    """The interquartile mean of one algorithm."""

    exp_name: str
    scores: list[np.ndarray]  # normalised final returns, one array per environment
    missing: list[str]  # where there is not exactly one row, and why; if any, no IQM

    def __post_init__(self):
        complete = self.scores and not self.missing
        self.iqm = float(iqm(np.concatenate(self.scores))) if complete else math.nan
        self.interval = bootstrap(self.scores, iqm) if complete else None


def aggregate(rows: list[Row], divisors: dict[tuple, float]) -> list[Aggregate]:
    """The interquartile mean of every algorithm over the same environments."""
    results = []
    for exp_name in dict.fromkeys(row.exp_name for row in rows):
        scores, missing = [], []
        for task, divisor in divisors.items():
            found = [r for r in rows if not r.status and (r.task, r.exp_name) == (task, exp_name)]
            if len(found) == 1:
                scores.append(found[0].finals / divisor)
            else:
                why = "several settings" if found else f"no finished run of {task[1]:,} steps"
                missing.append(f"{why} on {task[0]}")
        results.append(Aggregate(exp_name, scores, missing))
    return results


# --- 4. The report --------------------------------------------------------------------------------
def number(x: float) -> str:
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def span(interval: tuple | None) -> str:
    return f"{number(interval[0])} to {number(interval[1])}" if interval else "-"


def table(header: str, rows: list[list]) -> str:
    """A Markdown table; header: the names, separated by bars."""
    lines = [header.split(" | "), ["---"] * len(header.split(" | "))]
    lines += [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_text(times: tuple[float, ...], unit: float, form: str) -> str:
    """The median over seeds, where a seed that never got there counts as infinitely late."""
    reached, median = int(np.isfinite(times).sum()), float(np.median(times))
    if not reached:
        return "not reached"
    some = "" if reached == len(times) else f"{reached} of {len(times)} seeds"
    text = format(median / unit, form) if math.isfinite(median) else ""
    return f"{text} ({some})" if text and some else text or some


def returns_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        steps = f"{row.steps:,}" if row.steps else "-"
        seeds = (
            f"{len(row.runs)} ({', '.join(str(run.seed) for run in row.runs)})" if row.runs else 0
        )
        results = [row.status, "-", "-", "-"]
        if not row.status:
            results = [number(row.finals.mean()), span(bootstrap([row.finals])), "-", "-"]
            if math.isfinite(target := sac_return(row.task, rows)):
                times, seconds = zip(*(time_to_reach(r, target) for r in row.runs), strict=True)
                results[2:] = median_text(times, 1, ",.0f"), median_text(seconds, 60, ".1f")
        lines.append([row.number, row.env, row.label(), steps, seeds, *results, row.mode])
    header = "row | environment | algorithm | steps | seeds | final return | 95 % interval"
    return table(f"{header} | steps to SAC's return | minutes to it | evaluation", lines)


def iqm_table(rows: list[Row], name: str, divisors: dict, results: list[Aggregate]) -> str:
    if not divisors:
        return f"None: {name} is missing or not positive in every environment."
    modes = "; ".join(dict.fromkeys(mode for _, _, mode in divisors))
    lines = []
    for result in results:
        runs = " + ".join(str(len(scores)) for scores in result.scores) or "0"
        value = "; ".join(result.missing) or number(result.iqm)
        lines.append([label(result.exp_name), runs, value, span(result.interval), modes])
    used = [f"{env} ({steps:,} steps) by {number(x)}" for (env, steps, _), x in divisors.items()]
    text = f"\n\nEach final return is divided by {name}: {', '.join(used)}."
    if not name.startswith("SAC"):
        text += " The paper's runs have other numbers of steps: see the notes."
    if others := {row.env for row in rows} - {env for env, _, _ in divisors}:
        text += f" Left out, without a positive divisor: {', '.join(sorted(others))}."
    return table("algorithm | seeds | IQM | 95 % interval | evaluation", lines) + text


def notes(rows: list[Row]) -> str:
    few = [str(row.number) for row in rows if not row.status and len(row.runs) < 5]
    in_rows = f"row{'s' * (len(few) > 1)} {', '.join(few)}"
    in_rows = "all rows" if len(few) == sum(not row.status for row in rows) else in_rows
    versions = sorted({run.versions()["mujoco"] for row in rows for run in row.runs})
    paper = [f"{env} {PAPER[env][0]:.2f} ({PAPER[env][1]:,} steps)" for env in PAPER]
    lines = [
        """Final return: the mean of a run's evaluations in the last 5 % of its steps, each of the
  policy of that time (never the best one), then the mean over seeds.
- Intervals: 95 % percentile bootstrap over seeds; for the IQM (interquartile mean) seeds are
  resampled within each environment and the divisors taken as exact.
- Steps and minutes to SAC's return: until the first evaluation that is at least SAC's final
  return of the same environment, steps and evaluation mode; the median over seeds, where a seed
  that never got there counts as infinitely late. Minutes include evaluations and compare only
  on one machine, used alike; the last section names the machines.""",
        f"- 95 % bootstrap intervals of fewer than 5 seeds are too narrow: {in_rows}."
        if few
        else "",
        f"- MEow's returns in the paper, 5 seeds: {', '.join(paper)}.",
        f"- Mixed MuJoCo versions ({', '.join(versions)}): rows may not be comparable."
        if len(versions) > 1
        else "",
    ]
    return "- " + "\n".join(filter(None, lines))


def command(run: Run) -> str:
    """The command of a run with any seed; every option is named, since defaults may change."""
    known = [(set(options.split()), script) for *_, script, options in ALGORITHMS.values()]
    fitting = [(len(options), script) for options, script in known if options <= run.args.keys()]
    guess = max(fitting, default=(0, "SCRIPT.py"))[1]
    words = ["python", ALGORITHMS.get(run.exp_name, (0, 0, guess))[2]]
    for name, value in run.args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            text = f"--{flag}" if value else f"--no-{flag}"
        else:
            values = value if isinstance(value, list) else [value]
            text = " ".join([f"--{flag}", *(shlex.quote(str(v)) for v in values)])
        if name not in HOUSEKEEPING:
            words.append("--seed $seed" if name == "seed" else text)
    return " ".join(words)


def machine(run: Run) -> str:
    told = {key: run.description.get(key, "unknown") for key in ("cpu", "device", "threads")}
    compiled = {True: ", compiled", False: ", not compiled"}.get(
        run.description.get("compiled"), ""
    )
    return f"{told['cpu']}, device {told['device']}, {told['threads']} thread(s){compiled}"


def origin(row: Row) -> str:
    """Commits, versions, machines, run folders and commands of a row."""
    versions = collections.defaultdict(dict)  # of dicts: sets that keep their order
    for run in row.runs:
        for package, version in run.versions().items():
            versions[package][str(version)] = None
    listed = ", ".join(f"{package} {' / '.join(versions[package])}" for package in versions)
    commits = dict.fromkeys(str(run.description.get("git_commit", "unknown")) for run in row.runs)
    seeds = collections.defaultdict(list)
    for run in row.runs:
        seeds[command(run)].append(str(run.seed))
    loops = [f"for seed in {' '.join(s)}; do {words}; done" for words, s in seeds.items()]
    return "\n".join(
        [
            f"### Row {row.number}: {row.env}, {row.label()}, {row.steps:,} steps, {row.mode}\n",
            f"- commit: {', '.join(commits)}",
            f"- versions: {listed}",
            f"- machine: {'; '.join(dict.fromkeys(map(machine, row.runs)))}",
            f"- runs: {', '.join(f'`{run.name}`' for run in row.runs)}\n",
            "```bash\n" + "\n".join(loops) + "\n```",
        ]
    )


def report(rows: list[Row], options: Options, name: str, divisors: dict, results: list) -> str:
    asked = [f"--envs {' '.join(options.envs)}"] * bool(options.envs)
    asked += [f"--algos {' '.join(options.algos)}"] * bool(options.algos)
    asked += [f"--smooth {options.smooth}"] * (options.smooth > 1)
    asked += ["--allow-mixed-versions"] * options.allow_mixed_versions
    finished = any(not row.status for row in rows)
    parts = [
        "# Comparison of runs",
        f"Written by `{' '.join(['python compare.py RUNS --out OUT', *asked])}`.",
        returns_table(rows),
        "![Learning curves](learning_curves.png)" if finished else "",
        "## Interquartile mean over environments",
        iqm_table(rows, name, divisors, results),
        "![Interquartile means](iqm.png)" if shown(results) else "",
        "## Notes",
        notes(rows),
        "## How each row was made",
        "At the row's commit (`git checkout COMMIT`):",
        *(origin(row) for row in rows if row.runs),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- 5. Figures -----------------------------------------------------------------------------------
def colour(exp_name: str, rows: list[Row]) -> str:
    """Fixed for the algorithms of this repository; others in the order of their names."""
    if exp_name in ALGORITHMS:
        return ALGORITHMS[exp_name][1]
    others = sorted({row.exp_name for row in rows} - set(ALGORITHMS))
    return OTHER_COLOURS[others.index(exp_name) % len(OTHER_COLOURS)]


def draw_curves(rows: list[Row], smooth: int) -> Figure:
    """One panel per environment, its legend below."""
    own = {row.env: [r for r in rows if r.env == row.env and not r.status] for row in rows}
    own = {env: finished for env, finished in own.items() if finished}
    names = {env: curve_names(finished) for env, finished in own.items()}
    columns = min(3, len(own))
    legend = max(1 + sum(name.count("\n") + 1 for name in panel) for panel in names.values())
    size = (4.3 * columns, (3.0 + 0.19 * legend) * math.ceil(len(own) / columns))
    fig = Figure(size, layout="constrained")
    for i, env in enumerate(own, 1):
        ax = fig.add_subplot(math.ceil(len(own) / columns), columns, i)
        draw_panel(ax, own[env], names[env], rows, smooth)
    averaged = f"; each point is the mean of {smooth} evaluations" if smooth > 1 else ""
    title = f"Mean over seeds, 95 % bootstrap interval{averaged}"
    fig.suptitle(textwrap.fill(title, 60 * columns), fontsize=9)
    fig.supylabel("return of an evaluation", fontsize=9)
    return fig


def curve_names(own: list[Row]) -> list[str]:
    """The rows of one panel in the legend, with what tells them apart."""
    names = []
    for row in own:
        text = [row.label()]
        text += [f"{thousands(row.steps)} steps"] * (len({r.steps for r in own}) > 1)
        text += [row.mode] * (len({r.mode for r in own}) > 1)
        text = f"{', '.join(text)} ({len(row.runs)} seed{'s' * (len(row.runs) > 1)})"
        names.append(textwrap.fill(text, 50))
    return names


def draw_panel(ax, own: list[Row], names: list[str], rows: list[Row], smooth: int):
    """Mean and interval over seeds by row, and what the paper reports for MEow: a line, with a star
    at its number of steps if the axis reaches so far."""
    styles, env = collections.Counter(), own[0].env
    for row, name in zip(own, names, strict=True):
        steps, returns = curves(row.runs, smooth)
        look = dict(color=colour(row.exp_name, rows), marker="o" if len(steps) == 1 else "")
        style = LINES[styles[row.exp_name] % len(LINES)]
        styles[row.exp_name] += 1
        ax.plot(steps, returns.mean(axis=0), linestyle=style, label=name, **look)
        if interval := bootstrap([returns]):
            ax.fill_between(steps, *interval, color=look["color"], alpha=0.18, linewidth=0)
    if env in PAPER:
        value, steps = PAPER[env]
        ax.axhline(value, label=f"MEow in the paper, {thousands(steps)} steps", **DASHED)
        if steps <= max(row.steps for row in own):
            ax.plot(steps, value, "*", color="black", markersize=9)
    ax.set(title=env, xlabel="environment steps", xlim=(0, None))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    short = max(map(len, names)) < 30
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2 if short else 1)


thousands = EngFormatter(sep="")  # 300k, 1.5M


def shown(results: list[Aggregate]) -> list[Aggregate]:
    return [result for result in results if math.isfinite(result.iqm)]


def draw_iqm(rows: list[Row], name: str, divisors: dict, results: list[Aggregate]) -> Figure:
    """A point and its interval for each algorithm."""
    results = shown(results)
    fig = Figure((5.5, 1.2 + 0.4 * len(results)), layout="constrained")
    ax = fig.subplots()
    for y, result in enumerate(results):
        look = colour(result.exp_name, rows)
        if result.interval:
            ax.plot(result.interval, (y, y), color=look, linewidth=5, alpha=0.35)
        ax.plot(result.iqm, y, "o", color=look)
    ax.axvline(1, **DASHED)
    runs = [sum(map(len, result.scores)) for result in results]
    names = [f"{label(r.exp_name)} ({n} runs)" for r, n in zip(results, runs, strict=True)]
    ax.set_yticks(range(len(results)), names)
    ax.set(ylim=(len(results) - 0.4, -0.6), xlabel=f"IQM of final return / {name}")
    over = f"{', '.join(env for env, _, _ in divisors)}; 95 % bootstrap interval"
    ax.set_title(textwrap.fill(over, 60), fontsize=9)
    ax.grid(axis="y", visible=False)
    return fig


def save(fig: Figure, path: Path):
    """PNG and SVG without date and version: the same numbers give the same bytes."""
    fig.savefig(f"{path}.png", dpi=120, metadata={"Software": None})
    fig.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})


# --- 6. The command -------------------------------------------------------------------------------
def warn(text: str):
    print(f"warning: {text}", file=sys.stderr)


def check_versions(runs: list[Run]):
    """Raises: UsageError where runs of different MuJoCo versions would share a table."""
    examples = {run.versions()["mujoco"]: run.folder for run in runs}
    if len(examples) > 1:
        listed = ", ".join(f"{version} ({run})" for version, run in sorted(examples.items()))
        hint = "give the runs of one, or --allow-mixed-versions"
        raise UsageError(f"different MuJoCo versions in one table: {listed}; {hint}")


def compare(options: Options):
    """Reads everything before it writes anything."""
    if options.smooth < 1:
        raise UsageError(f"--smooth {options.smooth}: must be at least 1")
    runs = find_runs(options.runs)
    if not options.allow_mixed_versions:
        check_versions(runs)
    rows = make_rows(runs, options.envs, options.algos)
    name, divisors = choose_divisors(rows)
    results = aggregate(rows, divisors)
    text = report(rows, options, name, divisors, results)
    options.out.mkdir(parents=True, exist_ok=True)
    for run in runs if options.copy else []:
        copy_run(run, options.out)
    (options.out / "comparison.md").write_text(text)
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's own style is
        if any(not row.status for row in rows):
            save(draw_curves(rows, options.smooth), options.out / "learning_curves")
        if shown(results):
            save(draw_iqm(rows, name, divisors, results), options.out / "iqm")
    print(f"{returns_table(rows)}\n\nwritten: {options.out / 'comparison.md'}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 (damaged files, disk) or 2 (usage)."""
    try:
        compare(tyro.cli(Options, description=__doc__.split("\n\n")[0], args=argv))
    except (UsageError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
