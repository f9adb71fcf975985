"""Run folders (args.json, metrics.csv) as a table: a line per run, and which may be averaged."""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness.files import UsageError

ENVS = (
    "Hopper-v4",
    "HalfCheetah-v4",
    "Walker2d-v4",
    "Ant-v4",
    "Humanoid-v4",
)  # they come first
ALGORITHMS = {  # by exp_name: label and colour
    "meow_continuous_action": ("MEow", "#0072b2"),
    "meow_alpha_0.1_reward_tau_0.01": ("MEow, alpha 0.1", "#56b4e9"),
    "meow_alpha_0.1_reward_tau_0.01_pre_tanh": ("MEow, alpha 0.1, pre-tanh", "#009e73"),
    "sac_continuous_action": ("SAC", "#d55e00"),
    "sql_continuous_action": ("SQL", "#009e73"),
    "sb3_td3": ("TD3 (SB3)", "#cc79a7"),
    "sb3_ddpg": ("DDPG (SB3)", "#56b4e9"),
    "sb3_ppo": ("PPO (SB3)", "#e69f00"),
    "sb3_sac": ("SAC (SB3)", "#8c510a"),
    "meow_isaacgym": ("MEow", "#0072b2"),
    "meow_isaacgym_larger_tau": ("MEow, larger tau", "#56b4e9"),
    "sac_isaacgym": ("SAC", "#d55e00"),
}
SAC = ("sac_continuous_action", "sac_isaacgym")  # what all are compared with
TASK = ["env", "steps", "evaluation"]  # only runs that agree in these are compared
ROW = [
    *TASK,
    "exp_name",
    "settings",
    "status",
    "alone",
]  # only runs that agree are averaged
NEEDED = {
    "script",
    "command",
    "git_commit",
    "versions",
    "cpu",
    "device",
    "threads",
    "compiled",
}
NEEDED |= {
    "env_id",
    "exp_name",
    "seed",
    "total_timesteps",
    "eval_episodes",
    "deterministic_eval",
}
# Options that split no row: no result depends on them, they have a column of their own, or they
# change only rounding or how often a run is evaluated.
NEUTRAL = set(
    "resume evaluate runs_dir checkpoint_frequency keep_policies log_frequency capture_video track "
    "wandb_project_name wandb_entity env_id exp_name seed total_timesteps eval_episodes compile "
    "deterministic_eval cuda torch_threads torch_deterministic eval_frequency sim_threads".split()
)
# Options that older runs don't record, with the value they had:
ADDED = {"shift_units": "nats", "replay_pre_tanh": False}
WHERE = {
    "runs_dir": "runs",
    "resume": None,
}  # where a run was on its machine: not copied


def warn(text: str):
    print(f"warning: {text}", file=sys.stderr)


# --- 1. Reading runs ------------------------------------------------------------------------------
def read_about(file: Path) -> dict:
    """args.json. Raises: ValueError, TypeError or AttributeError if it is damaged."""
    about = json.loads(file.read_text())
    args = about.get("args", {})
    if lacking := NEEDED - (about.keys() | args.keys()):
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    for name, least in {"seed": 0, "total_timesteps": 1}.items():
        if type(args[name]) is not int or args[name] < least:
            raise ValueError(f"{name} is not a whole number of at least {least}")
    return about


def read_log(file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """metrics.csv as written, and step, seconds and value of the evaluations as numbers.

    Raises: ValueError if it is damaged.
    """
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the run was killed while it wrote, or is writing now
        warn(f"{file}: its last line is incomplete (no newline) and left out")
    log = pd.read_csv(io.StringIO(whole), dtype=str, na_filter=False)
    if list(log) != ["step", "seconds", "name", "value"]:
        raise ValueError("it must begin with step,seconds,name,value")
    if (bad := ~log.step.str.isdecimal() | (log.value == "")).any():
        raise ValueError(f"line {np.argmax(bad) + 2} is not step,seconds,name,value")
    evals = log[log.name == "eval/return_mean"].drop(columns="name")
    evals = evals.astype({"step": int, "seconds": float, "value": float})
    if not np.isfinite(evals.seconds).all() or (np.diff(evals.step) <= 0).any():
        raise ValueError("steps of evaluations must increase, seconds be finite")
    return log, evals.reset_index(drop=True)


def read_run(folder: Path) -> dict:
    """A line of the table. Steps: of the environment, also if there are many at once.

    Raises: UsageError if the folder is damaged.
    """
    file = folder / "args.json"
    try:
        about = read_about(file)
        args = about["args"]
        settings = {
            "script": about["script"],
            **ADDED,
            **about.get("settings", {}),
            **args,
        }
        versions = {
            "python": about.get("python"),
            "mujoco": "unknown",
            **about["versions"],
        }
        file = folder / "metrics.csv"
        log, evals = read_log(file)
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {file.name}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is damaged: {str(error).strip()}") from None
    evals["step"] *= args.get("num_envs", 1)
    total = args["total_timesteps"] * args.get("num_envs", 1)
    if (last := max(evals.step, default=0)) > total:
        raise UsageError(f"{file} goes on after the last step of args.json")
    status = "" if last == total else f"unfinished at step {last:,}"
    if len(infinite := evals.step[~np.isfinite(evals.value)]):
        status = f"return is not finite at step {infinite.iloc[0]:,}"
    mode = "deterministic" if args["deterministic_eval"] else "stochastic"
    machine = f"{about['cpu']}, device {about['device']}, {about['threads']} thread(s)"
    return {
        "env": args["env_id"],
        "exp_name": args["exp_name"],
        "seed": args["seed"],
        "steps": total,
        "evaluation": f"{mode}, {args['eval_episodes']} episodes",
        "settings": {k: str(v) for k, v in settings.items() if k not in NEUTRAL},
        "status": status,  # empty: finished
        "final": evals.value[
            20 * evals.step > 19 * total
        ].mean(),  # of the last 5 % of the steps
        "commit": about["git_commit"],
        "mujoco": versions["mujoco"],
        "versions": ", ".join(
            f"{package} {version}" for package, version in versions.items()
        ),
        "machine": machine + (", compiled" if about["compiled"] else ", not compiled"),
        "command": without_folders(about["command"]),
        "name": folder.resolve().name,
        "folder": folder,
        "about": about,
        "log": log,
        "evals": evals,
    }


def without_folders(command: str) -> str:
    """A command without the folders of its machine."""
    return re.sub(r" --(runs[-_]dir|resume)[ =]('[^']*'|\S+)", "", command)


def find_runs(paths: tuple[Path, ...]) -> pd.DataFrame:
    """The table of all runs in the paths, each once. Raises: UsageError."""
    folders = {}  # by resolved path: a run may be given by itself and within its parent
    for path in paths:
        names = [
            depth + name
            for depth in ("", "*/")
            for name in ("args.json", "metrics.csv")
        ]
        found = [file.parent for name in names for file in path.glob(name)]
        if path.is_file():  # results/* holds the figures too
            warn(f"{path} is not a folder: left out")
        elif not found:
            raise UsageError(
                f"no runs found in {path}" if path.exists() else f"there is no {path}"
            )
        folders |= {folder.resolve(): folder for folder in found}
    if not folders:
        raise UsageError(
            "no runs found: give run folders, or a folder that contains some"
        )
    runs = {}
    for run in map(read_run, folders.values()):
        other = runs.setdefault(run["name"], run)
        if other is not run:
            both = f"{other['folder']} and {run['folder']}"
            args, others = (each["about"]["args"] | WHERE for each in (run, other))
            if args != others or not run["evals"].equals(other["evals"]):
                raise UsageError(
                    f"{both} have the same name but differ: give one of them"
                )
            warn(f"{both} are copies of one run: counted once")
    return pd.DataFrame(list(runs.values()))


def copy_run(run, out: Path):
    """Writes OUT/<run name>/: the metrics of evaluation steps, without single episodes.

    Raises: UsageError where a fuller file would be lost.
    """
    folder, file = out / run.name, out / run.name / "metrics.csv"
    if folder.resolve() == run.folder.resolve():
        return
    log = run.log[run.log.step.isin(run.log.step[run.log.name == "eval/return_mean"])]
    text = log[~log.name.str.fullmatch(r"eval/return_\d+")].to_csv(index=False)
    if file.exists() and not text.startswith(file.read_text()):
        raise UsageError(
            f"{file} holds rows that a copy of {run.folder} lacks: not overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    about = run.about | {"command": run.command, "args": run.about["args"] | WHERE}
    (folder / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    file.write_text(text)


# --- 2. Rows: which runs may be averaged ----------------------------------------------------------
def label(exp_name: str) -> str:
    return ALGORITHMS.get(exp_name, [exp_name])[0]


def in_order(names: set[str], known) -> list[str]:
    """The known names in their order, then the others by name."""
    return [name for name in known if name in names] + sorted(names - set(known))


def differing(settings: pd.Series) -> list[str]:
    """Of each run's settings (dict) those in which the runs differ, as text."""
    table = pd.DataFrame(settings.tolist()).fillna("not recorded")
    table = table[sorted(table.columns[table.nunique() > 1])]
    return [
        "".join(f", {k}={v}" for k, v in run.items()) for _, run in table.iterrows()
    ]


def number_rows(
    runs: pd.DataFrame, envs: tuple[str, ...], algos: tuple[str, ...]
) -> pd.DataFrame:
    """The runs, a line for each pair of environment and algorithm without any, and two columns.

    row: number of the row; its runs are alike but for their seeds, or it is one unfinished run.
    target: SAC's mean final return of the same task, nan without exactly one row of SAC.
    Raises: UsageError for two runs of one seed in a row.
    """
    table = runs.assign(alone=runs.name.where(runs.status != "", ""))
    for _, own in table.groupby(["env", "exp_name"]):
        table.loc[own.index, "settings"] = differing(own.settings)
    for _, own in table.groupby([*ROW, "seed"]):
        if len(own) > 1:
            both = " and ".join(map(str, own.folder[:2]))
            raise UsageError(
                f"{both} have the same settings and seed: give one of them"
            )
    exp_names = {
        label(e).lower(): e for e in reversed(ALGORITHMS)
    }  # of equals the first
    algos = {exp_names.get(a.lower(), a) for a in algos} | set(table.exp_name)
    pairs = itertools.product(
        in_order({*envs, *table.env}, ENVS), in_order(algos, ALGORITHMS)
    )
    pairs = pd.DataFrame(pairs, columns=["env", "exp_name"])
    table = pairs.merge(table.sort_values([*ROW, "seed"]), how="left")
    missing = {
        "steps": 0,
        "evaluation": "-",
        "settings": "",
        "status": "not run",
        "alone": "",
    }
    table = table.fillna(missing).astype({"steps": int, "seed": "Int64"})
    table["row"] = table.groupby(ROW, sort=False).ngroup() + 1
    table["label"] = table.exp_name.map(label) + table.settings
    sac = table[(table.status == "") & table.exp_name.isin(SAC)].groupby(TASK)
    target = sac.final.mean().where(sac.row.nunique() == 1)
    return table.merge(target.rename("target").reset_index(), how="left", on=TASK)
