"""Runs (args.json, metrics.csv) as a table: a line per run; which may be averaged."""

import io
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness.errors import UsageError

# they come first
ENVS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4")
ALGORITHMS = {  # by exp_name: label and colour
    "meow_continuous_action": ("MEow", "#0072b2"),
    "meow_auto_continuous_action": ("MEow without tuning", "#e7298a"),
    "meow_alpha_0.1_reward_tau_0.01": ("MEow, alpha 0.1", "#56b4e9"),
    "meow_alpha_0.1_reward_tau_0.01_pre_tanh": ("MEow, alpha 0.1, pre-tanh", "#009e73"),
    "sac_continuous_action": ("SAC", "#d55e00"),
    "sql_continuous_action": ("SQL", "#7b3294"),
    "sb3_td3": ("TD3 (SB3)", "#cc79a7"),
    "sb3_ddpg": ("DDPG (SB3)", "#117a8b"),
    "sb3_ppo": ("PPO (SB3)", "#e69f00"),
    "sb3_sac": ("SAC (SB3)", "#8c510a"),
    "meow_isaacgym": ("MEow", "#0072b2"),
    "meow_isaacgym_larger_tau": ("MEow, larger tau", "#56b4e9"),
    "meow_auto_isaacgym": ("MEow without tuning", "#e7298a"),
    "sac_isaacgym": ("SAC", "#d55e00"),
}
SAC = ("sac_continuous_action", "sac_isaacgym")  # what all are compared with
TASK = ["env", "steps", "evaluation"]  # only runs that agree in these are compared
# only runs that agree in these are averaged
ROW = [*TASK, "exp_name", "settings", "status", "alone"]
NEEDED = set(
    "script command git_commit versions cpu device threads compiled env_id exp_name "
    "seed total_timesteps eval_episodes deterministic_eval".split()
)
# Options that split no row: no result depends on them, they have a column of their own,
# or they change only rounding or how often a run is evaluated.
NEUTRAL = set(
    "resume evaluate runs_dir checkpoint_frequency keep_policies log_frequency "
    "capture_video track wandb_project_name wandb_entity env_id exp_name seed "
    "total_timesteps eval_episodes eval_envs deterministic_eval eval_frequency compile "
    "cuda torch_threads torch_deterministic sim_threads".split()
)
# Options that not every version has, with the value that runs without them had:
DEFAULTS = {
    "env_kwargs": "{}",
    "flatten": False,
    "max_episode_steps": None,
    "shift_units": "nats",
    "replay_pre_tanh": False,
    "bf16": False,
    "recent_size": 0,
    "policy_average": 1.0,
}
# where a run was on its machine: not copied
WHERE = {"runs_dir": "runs", "resume": None}
COLUMNS = ["step", "seconds", "name", "value"]
RETURN = "eval/return_mean"


def warn(text: str):
    print(f"warning: {text}", file=sys.stderr)


# --- 1. Reading runs ------------------------------------------------------------------
def read_about(file: Path) -> dict:
    """args.json. Raises: ValueError, TypeError or AttributeError if it is damaged."""
    about = json.loads(file.read_text())
    args = about.get("args", {})
    if lacking := NEEDED - (about.keys() | args.keys()):
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    least_of = {"seed": 0, "total_timesteps": 1, "eval_episodes": 0, "num_envs": 1}
    for name, least in least_of.items():
        number = args.get(name, 1)  # num_envs: of robots alone
        if type(number) is not int or number < least:
            raise ValueError(f"{name} is not a whole number of at least {least}")
    texts = {name: about[name] for name in ("script", "command", "git_commit", "cpu")}
    for name, text in (texts | {"env_id": args["env_id"]}).items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is not a text")
    return about


def read_log(file: Path, name: str = RETURN) -> tuple[pd.DataFrame, pd.DataFrame]:
    """metrics.csv as written; step, seconds and value of the rows of this name.

    Raises: ValueError if it is damaged.
    """
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the run was killed while it wrote, or is writing now
        warn(f"{file}: its last line is incomplete (no newline) and left out")
    log = pd.read_csv(io.StringIO(whole), dtype=str, na_filter=False)
    if list(log) != COLUMNS:
        raise ValueError(f"it must begin with {','.join(COLUMNS)}")
    if (bad := ~log.step.str.isdecimal() | (log.value == "")).any():
        raise ValueError(f"line {np.argmax(bad) + 2} is not {','.join(COLUMNS)}")
    log["step"] = log.step.astype(int)
    evals = log[log.name == name].drop(columns="name")
    evals = evals.astype({"seconds": float, "value": float})
    if not np.isfinite(evals.seconds).all() or (np.diff(evals.step) <= 0).any():
        raise ValueError("steps of evaluations must increase, seconds be finite")
    return log, evals.reset_index(drop=True)


def last_step(folder: Path, about: dict, log: pd.DataFrame) -> int:
    """The step that an unfinished run reached, as far as its files tell."""
    steps = [about.get("last_step", 0), log.step.max() if len(log) else 0]
    try:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True, mmap=True)
        steps.append(saved["step"])
    except Exception:  # there is none, or whatever a damaged one makes torch raise
        steps.append(0)
    return int(max(steps))


def final_return(evals: pd.DataFrame, total: int) -> float:
    """The mean of the evaluations in the last 5 % of the steps."""
    return evals.value[20 * evals.step > 19 * total].mean()


def not_finite(evals: pd.DataFrame) -> str:
    """Says where a return isn't finite; empty if all are."""
    infinite = evals.step[~np.isfinite(evals.value)]
    return f"return is not finite at step {infinite.iloc[0]:,}" if len(infinite) else ""


def started(folder: Path) -> float:
    """Seconds since 1970, from the folder's name or else the time of its log."""
    tag = folder.resolve().name.rpartition("__")[2]
    if tag.isdecimal() and int(tag) < time.time():  # else it is a digest
        return int(tag)
    return (folder / "metrics.csv").stat().st_mtime


def read_run(folder: Path) -> dict:
    """A line of the table. Steps: of the environment, also if there are many at once.

    Raises: UsageError if the folder is damaged.
    """
    file = folder / "args.json"
    try:
        about = read_about(file)
        args, versions = about["args"], about["versions"]
        versions = {"python": about.get("python"), "mujoco": "unknown", **versions}
        settings = {**DEFAULTS, **about.get("settings", {}), **args}
        file = folder / "metrics.csv"
        log, evals = read_log(file)
    except FileNotFoundError:
        hint = ""
        if file.name == "args.json":
            hint = f" (a run of other code: --add LABEL={folder})"
        raise UsageError(f"{folder} has no {file.name}{hint}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is damaged: {str(error).strip()}") from None
    num_envs = args.get("num_envs", 1)
    evals["step"] *= num_envs
    total = args["total_timesteps"] * num_envs
    if (last := max(evals.step, default=0)) > total:
        raise UsageError(f"{file} goes on after the last step of args.json")
    status, reached = not_finite(evals), total
    if args["eval_episodes"] == 0:
        status = "not evaluated"
    elif last < total:
        reached = last_step(folder, about, log)
        status = status or f"stopped at step {reached * num_envs:,}"
    settings = {"script": about["script"], **settings}
    mode = "deterministic" if args["deterministic_eval"] else "stochastic"
    compiled = "compiled" if about["compiled"] else "not compiled"
    threads = f"{about['threads']} thread(s)"
    return {
        "env": args["env_id"],
        "exp_name": args["exp_name"],
        "seed": args["seed"],
        "steps": total,
        "evaluation": f"{mode}, {args['eval_episodes']} episodes",
        "settings": {k: str(v) for k, v in settings.items() if k not in NEUTRAL},
        "status": status,  # empty: finished
        "reached": reached,
        "final": final_return(evals, total),
        "commit": about["git_commit"],
        "mujoco": versions["mujoco"],
        "versions": ", ".join(f"{package} {v}" for package, v in versions.items()),
        "machine": f"{about['cpu']}, device {about['device']}, {threads}, {compiled}",
        "command": without_folders(about["command"]),
        "name": folder.resolve().name,
        "folder": folder,
        "started": started(folder),
        "about": about,
        "log": log,
        "evals": evals,
    }


def without_folders(command: str) -> str:
    """A command without the folders of its machine."""
    return re.sub(r" --(runs[-_]dir|resume)[ =]('[^']*'|\S+)", "", command)


# --- 2. Curves of other code ----------------------------------------------------------
@dataclass
class Added:
    """What --add names: LABEL=PATH[,env=ID][,seed=N][,name=NAME]."""

    label: str
    path: Path
    env: str | None = None
    seed: int | None = None
    name: str = RETURN


def parse_added(text: str) -> Added:
    """Raises: UsageError."""
    form = "LABEL=PATH[,env=ID][,seed=N][,name=NAME]"
    label, _, rest = text.partition("=")
    path, *pairs = rest.split(",")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    seed = options.get("seed", "0")
    known = options.keys() <= {"env", "seed", "name"} and "" not in options.values()
    if not (label and path and known and seed.isdecimal()):
        raise UsageError(f"--add {text}: it must look like {form}")
    if "seed" in options:
        options["seed"] = int(seed)
    return Added(label, Path(path), **options)


def added_files(path: Path) -> list[Path]:
    """The file, or the csv files in a folder and its folders. Raises: UsageError."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.csv"))
    if not files:
        where = "there is no csv file in" if path.exists() else "there is no"
        raise UsageError(f"--add: {where} {path}")
    return files


def read_added(added: Added) -> list[dict]:
    """Lines of the table, one for each file. Raises: UsageError."""
    return [read_added_file(added, file) for file in added_files(added.path)]


def read_added_file(added: Added, file: Path) -> dict:
    """A line of the table: a finished run, as long as its curve, not one of ours."""
    env, seed = added.env or env_of(file), added.seed
    if seed is None:
        seed = seed_of(file)
    try:
        log, evals = read_log(file, added.name)
        if evals.empty:
            names = ", ".join(sorted(set(log.name))) or "nothing"
            text = f"it has no {added.name}, but {names}: give one with ,name=NAME"
            raise UsageError(f"--add: {file}: {text}")
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"--add: {file}: {str(error).strip()}") from None
    total = int(evals.step.max())
    return {
        "env": env,
        "exp_name": f"{added.label} (added)",
        "seed": seed,
        "steps": total,
        "evaluation": "of other code",
        "settings": {"name": added.name},
        "status": not_finite(evals),
        "reached": total,
        "final": final_return(evals, total),
        **dict.fromkeys(("commit", "mujoco", "versions", "machine", "command"), "-"),
        "name": str(file),
        "folder": file,
        "started": file.stat().st_mtime,
        "about": None,
        "log": log,
        "evals": evals,
    }


def env_of(file: Path) -> str:
    """The environment in a path, the last one. Raises: UsageError."""
    found = re.findall(r"[A-Za-z][A-Za-z0-9]*-v\d+", str(file))
    if not found:
        text = "no environment such as Ant-v4 in its path: give it with ,env=ID"
        raise UsageError(f"--add: {file}: {text}")
    return found[-1]


def seed_of(file: Path) -> int:
    """The seed in a path: seed3, seed_3, __3__ or s3. Raises: UsageError."""
    for pattern in (r"seed[-_=]?(\d+)", r"__(\d+)__", r"(?:^|[-_/])s(\d+)(?=[-_/.])"):
        if found := re.findall(pattern, str(file)):
            return int(found[-1])
    text = "no seed such as seed_3 in its path: give it with ,seed=N"
    raise UsageError(f"--add: {file}: {text}")


# --- 3. All runs ----------------------------------------------------------------------
def find_folders(paths: tuple[Path, ...]) -> list[Path]:
    """The run folders in the paths, each once. Raises: UsageError."""
    folders = {}  # by resolved path: a run may be given by itself and within its parent
    for path in paths:
        if path.is_file():  # results/* holds the figures too
            warn(f"{path} is not a folder: left out")
            continue
        found = []
        for depth in ("", "*/"):
            for name in ("args.json", "metrics.csv"):
                found += [file.parent for file in path.glob(depth + name)]
        if not found:
            where = "no runs found in" if path.exists() else "there is no"
            raise UsageError(f"{where} {path}")
        folders |= {folder.resolve(): folder for folder in found}
    return list(folders.values())


def find_runs(paths: tuple[Path, ...], added: tuple[str, ...] = ()) -> pd.DataFrame:
    """The table of all runs in the paths and of --add. Raises: UsageError."""
    runs = {}
    for run in map(read_run, find_folders(paths)):
        other = runs.setdefault(run["name"], run)
        if other is run:
            continue
        both = f"{other['folder']} and {run['folder']}"
        args, others = (each["about"]["args"] | WHERE for each in (run, other))
        if args != others or not run["evals"].equals(other["evals"]):
            raise UsageError(f"{both} have the same name but differ: give one of them")
        warn(f"{both} are copies of one run: counted once")
    lines = list(runs.values())
    for each in map(parse_added, added):
        lines += read_added(each)
    if not lines:
        text = "give run folders, or a folder that contains some"
        raise UsageError(f"no runs found: {text}")
    return pd.DataFrame(lines)


def copy_run(run, out: Path):
    """Writes OUT/<run name>/: the metrics of evaluation steps, without single episodes.

    Raises: UsageError where a fuller file would be lost.
    """
    folder, file = out / run.name, out / run.name / "metrics.csv"
    if folder.resolve() == run.folder.resolve():
        return
    log = run.log[run.log.step.isin(run.log.step[run.log.name == RETURN])]
    text = log[~log.name.str.fullmatch(r"eval/return_\d+")].to_csv(index=False)
    if file.exists() and not text.startswith(file.read_text()):
        held = f"{file} holds rows that a copy of {run.folder} lacks"
        raise UsageError(f"{held}: not overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    about = run.about | {"command": run.command, "args": run.about["args"] | WHERE}
    if run.status:
        about["last_step"] = run.reached
    (folder / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    file.write_text(text)


# --- 4. Rows: which runs may be averaged ----------------------------------------------
def label(exp_name: str) -> str:
    return ALGORITHMS.get(exp_name, [exp_name])[0]


def in_order(names: set[str], known) -> list[str]:
    """The known names in their order, then the others by name."""
    return [name for name in known if name in names] + sorted(names - set(known))


def differing(settings: pd.Series) -> list[str]:
    """Of each run's settings (dict) those in which the runs differ, as text."""
    table = pd.DataFrame(settings.tolist()).fillna("not recorded")
    table = table[sorted(table.columns[table.nunique() > 1])]
    texts = []
    for _, run in table.iterrows():
        texts.append("".join(f", {name}={value}" for name, value in run.items()))
    return texts


def newest(table: pd.DataFrame) -> pd.DataFrame:
    """Without the older ones of runs that have the same settings and seed."""
    table = table.sort_values("started", kind="stable")
    for _, own in table.groupby([*ROW, "seed"]):
        for folder in own.folder[:-1]:
            both = f"{folder} and {own.folder.iloc[-1]}"
            which = "the second, newer one counts"
            warn(f"{both} have the same settings and seed: {which}")
    return table.drop_duplicates([*ROW, "seed"], keep="last")


def asked_pairs(table: pd.DataFrame, envs, algos) -> pd.DataFrame:
    """The pairs env, exp_name of the table, and those that --envs and --algos ask for.

    Each environment asked for has all algorithms, each such algorithm all environments.
    """
    exp_names = {label(e).lower(): e for e in reversed(ALGORITHMS)}  # of equals: first
    algos = {exp_names.get(algo.lower(), algo) for algo in algos}
    pairs = []
    present = set(zip(table.env, table.exp_name, strict=True))
    for env in in_order({*envs, *table.env}, ENVS):
        for exp_name in in_order({*algos, *table.exp_name}, ALGORITHMS):
            asked = env in envs or exp_name in algos
            if asked or (env, exp_name) in present:
                pairs.append((env, exp_name))
    return pd.DataFrame(pairs, columns=["env", "exp_name"])


def number_rows(
    runs: pd.DataFrame, envs: tuple[str, ...] = (), algos: tuple[str, ...] = ()
) -> pd.DataFrame:
    """The runs, lines for what was asked for but not run, and three columns.

    row: number of the row; its runs are alike but for their seeds, or it is one
    unfinished run. label: its name, another one for other settings. target: SAC's mean
    final return of the same task, nan without exactly one row of SAC.
    """
    table = runs.assign(alone=runs.name.where(runs.status != "", ""))
    for _, own in table.groupby(["env", "exp_name"]):
        table.loc[own.index, "settings"] = differing(own.settings)
    table = newest(table).sort_values([*ROW, "seed"])
    table = asked_pairs(table, envs, algos).merge(table, how="left")
    missing = {"steps": 0, "evaluation": "-", "settings": "", "alone": ""}
    missing["status"] = "not run"
    table = table.fillna(missing).astype({"steps": int, "seed": "Int64"})
    table["row"] = table.groupby(ROW, sort=False).ngroup() + 1
    table["label"] = table.exp_name.map(label)
    same = table.groupby(["env", "label"]).exp_name.transform("nunique") > 1
    table.loc[same, "label"] += " (" + table.exp_name[same] + ")"
    table["label"] += table.settings
    sac = table[(table.status == "") & table.exp_name.isin(SAC)].groupby(TASK)
    target = sac.final.mean().where(sac.row.nunique() == 1)
    return table.merge(target.rename("target").reset_index(), how="left", on=TASK)
