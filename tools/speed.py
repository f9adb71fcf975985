"""Steps per second of whole training runs: our scripts, SB3's SAC, and two checkouts.

    python tools/speed.py --env-id HalfCheetah-v4               # and SB3's SAC
    python tools/speed.py --env-id Ant --steps 300 --window 50  # robots, simulator
    python tools/speed.py --env-id Humanoid-v4 --tree OLD NEW   # two checkouts
    python tools/speed.py --env-id Ant --algo simulator --steps 300 --window 50

Every number comes from a real run (environment, acting, replay buffer, update,
logging): a script is started as a user would, and its speed read from its metrics.csv
(charts/SPS; for robots charts/env_SPS, environment steps). The window of steps in which
learning begins, with whatever is compiled then, and all before it don't count; neither
does the last evaluation. Runs take turns, round by round, so that a slow minute of the
machine hits all alike. Medians over the windows of all rounds; a ratio is one of the
medians of the same round. Don't run anything beside it.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROBOTS = ("Ant", "Humanoid", "Ingenuity", "Anymal", "AllegroHand", "FrankaCabinet")
SCRIPTS = {"meow": "meow_continuous_action.py", "sac": "sac_continuous_action.py"}
SCRIPTS |= {"sql": "sql_continuous_action.py", "sb3": "sb3_baselines.py"}
SCRIPTS |= {"auto": "meow_auto_continuous_action.py"}
ROBOT_SCRIPTS = {"meow": "meow_isaacgym.py", "sac": "sac_isaacgym.py"}
ROBOT_SCRIPTS |= {"auto": "meow_auto_isaacgym.py"}
SB3 = "SB3 SAC"
CPU_ROWS = {
    "MEow eager": "meow --no-cuda --no-compile",
    "MEow compiled": "meow --no-cuda",
    "MEow without tuning compiled": "auto --no-cuda",
    "SAC compiled": "sac --no-cuda",
    "SQL compiled": "sql --no-cuda",
    SB3: "sb3 --algo sac --no-cuda",
}
GPU_ROWS = {
    "MEow compiled, GPU": "meow",
    "MEow without tuning compiled, GPU": "auto",
    "SAC compiled, GPU": "sac",
    "SQL compiled, GPU": "sql",
}
ROBOT_CPU_ROWS = {
    "MEow training": "meow --no-cuda",
    "MEow without tuning, training": "auto --no-cuda",
    "SAC training": "sac --no-cuda",
}
ROBOT_GPU_ROWS = {
    "MEow training, GPU": "meow",
    "MEow without tuning, training, GPU": "auto",
    "SAC training, GPU": "sac",
}
SB3_LEARNING_STARTS = 10_000  # the Zoo's, not an option there
LEARNING_STARTS = 1_000  # of our scripts: steps with random actions
ROBOT_LEARNING_STARTS = 100  # vector steps


class SpeedError(Exception):
    """A run failed, or was too short to be measured."""


@dataclass
class Options:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium environment, or a robot of isaac_tasks"""
    tree: tuple[Path, Path] | None = None
    """two checkouts, old and new, to compare instead of the table"""
    algo: Literal["meow", "auto", "sac", "sql", "simulator"] = "meow"
    """whose script --tree compares; simulator: a robot's alone, with --tree or not"""
    flags: str = ""
    """more options for our scripts, in one word, e.g. --flags=--no-compile"""
    rounds: int = 3
    """how often each row is measured"""
    threads: tuple[int, ...] = (1,)
    """CPU threads; one row for each"""
    steps: int = 2_000
    """measured steps per run (robots: vector steps)"""
    window: int = 250
    """steps per window"""
    num_envs: int = 128
    """environments of a robot task"""

    @property
    def robot(self) -> bool:
        return self.env_id in ROBOTS


def read_windows(metrics: Path, name: str) -> list[float]:
    """The speeds in metrics.csv after the window in which learning began."""
    with open(metrics) as f:
        rows = [(int(r["step"]), r["name"], r["value"]) for r in csv.DictReader(f)]
    began = min(
        (step for step, key, _ in rows if key.startswith("losses/")), default=None
    )
    if began is None:
        return []
    return [float(value) for step, key, value in rows if key == name and step > began]


def run(words: list[str], threads: int, cwd: str) -> str:
    """Runs a command; returns what it prints. Raises: SpeedError with its last line."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=cwd)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SpeedError(f"{' '.join(words[1:])}: {last}")
    return done.stdout


def measure(
    tree: Path, row: str, threads: int, options: Options
) -> tuple[list[float], dict]:
    """Steps per second in each window of one run, and its args.json.

    row: a name of SCRIPTS and options.
    """
    name, *flags = row.split()
    if name == "simulator":
        return measure_simulator(tree, threads, options, *flags)
    script = (ROBOT_SCRIPTS if options.robot else SCRIPTS)[name]
    if name == "sb3":
        starts = SB3_LEARNING_STARTS
    elif options.robot:
        starts = ROBOT_LEARNING_STARTS
    else:
        starts = LEARNING_STARTS
    total = starts + options.window + options.steps
    words = f"--env-id {options.env_id} --torch-threads {threads}"
    words += f" --total-timesteps {total} --log-frequency {options.window}"
    words += f" --eval-episodes 1 --eval-frequency {total} --checkpoint-frequency 0"
    if name != "sb3":
        words += f" --learning-starts {starts} {options.flags}"
    if options.robot:
        words += f" --num-envs {options.num_envs} --sim-threads {threads}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(tree / script), *words.split(), *flags]
        run([*command, "--runs-dir", folder], threads, folder)
        (metrics,) = Path(folder).glob("*/metrics.csv")
        speed = "charts/env_SPS" if options.robot else "charts/SPS"
        speeds = read_windows(metrics, speed)
        about = json.loads(metrics.with_name("args.json").read_text())
    if not speeds:
        text = "no window after learning began: more --steps are needed"
        raise SpeedError(f"{script}: {text}")
    return speeds, about


def start_up(tree: Path, script: str) -> float:
    """Seconds until --help is printed."""
    start = time.perf_counter()
    run([sys.executable, str(tree / script), "--help"], 1, str(tree))
    return time.perf_counter() - start


SIMULATE = """
import json, sys, time
env_id, device, n, threads, steps, window = *sys.argv[1:3], *map(int, sys.argv[3:])
import torch
try:
    from harness.machine import describe_machine
except ImportError:  # older checkouts
    from harness.files import describe_machine
from isaac_tasks import make_simulator
torch.set_num_threads(threads)
simulator = make_simulator("mujoco", env_id, n, 1, device, threads)
simulator.reset()
speeds = []
for _ in range(1 + steps // window):
    start = time.perf_counter()
    for _ in range(window):
        result = simulator.step(2 * torch.rand(n, simulator.act_dim, device=device) - 1)
    result[1].tolist()  # waits for a GPU
    speeds.append(window * n / (time.perf_counter() - start))
about = describe_machine(torch.device(device))
print(json.dumps([speeds[1:], about]))  # the first one warms up
"""


def measure_simulator(
    tree: Path, threads: int, options: Options, device: str = "cpu"
) -> tuple[list[float], dict]:
    """The same for a robot's simulator alone, with random actions, in one process."""
    numbers = options.num_envs, threads, options.steps, options.window
    words = [sys.executable, "-c", SIMULATE, options.env_id, device, *map(str, numbers)]
    speeds, about = json.loads(run(words, threads, str(tree)))
    return speeds, about


def span(values: list[float], digits: int = 0) -> str:
    """median (min to max)"""
    texts = [f"{f(values):,.{digits}f}" for f in (statistics.median, min, max)]
    return "{} ({} to {})".format(*texts)


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def machine(about: dict) -> str:
    """What the numbers hold for, from a run's args.json."""
    versions = ", ".join(f"{k} {about['versions'][k]}" for k in ("torch", "mujoco"))
    gpu = "" if about["device"] == "cpu" else f", {about['device']}"
    return f"{about['cpu']}, {os.cpu_count()} cores{gpu}, {versions}"


def compare_trees(options: Options):
    """Prints speeds and start-up times of both checkouts and the ratios new to old."""
    for threads in options.threads:
        compare_trees_on(threads, options)


def compare_trees_on(threads: int, options: Options):
    """The same on so many threads."""
    old, new = (path.resolve() for path in options.tree)
    scripts = ROBOT_SCRIPTS if options.robot else SCRIPTS
    script = scripts.get(options.algo)  # None: a simulator
    speeds, seconds = {old: [], new: []}, {old: [], new: []}
    names = {old: "old", new: "new"}
    for i in range(options.rounds):
        for tree in (old, new) if i % 2 == 0 else (new, old):
            say(f"round {i + 1}/{options.rounds}, {threads} thread(s): {names[tree]}")
            measured, about = measure(tree, options.algo, threads, options)
            speeds[tree].append(measured)
            if script:
                seconds[tree].append(start_up(tree, script))
            commit = about["git_commit"] or "unknown"
            say(f"  {span(measured)} steps/s; commit {commit}")
    what = f"{script or options.algo} {options.flags}"
    print(f"\n{options.env_id}, {what}, threads: {threads}\n{machine(about)}\n")
    print("| | old | new | new / old |\n|---|---|---|---|")
    ratios = []
    for i, (a, b) in enumerate(zip(speeds[old], speeds[new], strict=True), 1):
        ratios.append(statistics.median(b) / statistics.median(a))
        print(f"| steps/s, round {i} | {span(a)} | {span(b)} | {ratios[-1]:.3f} |")
    a, b = span([*chain(*speeds[old])]), span([*chain(*speeds[new])])
    print(f"| steps/s, all rounds | {a} | {b} | {statistics.median(ratios):.3f} |")
    if script:
        ratio = statistics.median(seconds[new]) / statistics.median(seconds[old])
        a, b = span(seconds[old], 2), span(seconds[new], 2)
        print(f"| seconds of --help | {a} | {b} | {ratio:.3f} |")


def table_rows(options: Options) -> list[tuple[str, str, int]]:
    """Label, name with options, and threads of each row."""
    import torch

    if not options.robot:
        cpu_rows, gpu_rows = CPU_ROWS, GPU_ROWS
    else:
        cpu_rows = {"simulator alone": "simulator"}
        gpu_rows = {"simulator alone, GPU": "simulator cuda"}
        if options.algo != "simulator":
            cpu_rows |= ROBOT_CPU_ROWS
            gpu_rows |= ROBOT_GPU_ROWS
    rows = []
    for threads in options.threads:
        rows += [(label, row, threads) for label, row in cpu_rows.items()]
    if torch.cuda.is_available():
        rows += [(label, row, options.threads[0]) for label, row in gpu_rows.items()]
    return rows


def make_table(options: Options):
    """Prints the table of all rows of one environment."""
    rows = table_rows(options)
    speeds = {(label, threads): [] for label, _, threads in rows}
    for i in range(options.rounds):
        for label, row, threads in rows:
            say(f"round {i + 1}/{options.rounds}: {label}, threads: {threads}")
            measured, about = measure(ROOT, row, threads, options)
            speeds[label, threads] += measured
    print(f"\n{options.env_id}; {options.rounds} rounds of {options.steps} steps")
    print(f"{machine(about)}\n")
    if options.robot:
        unit = f"environment steps/s, {options.num_envs} environments"
        print(f"| | threads | {unit} (min to max) |\n|---|---|---|")
    else:
        print("| | threads | steps/s (min to max) | x SB3 SAC |\n|---|---|---|---|")
    for (label, threads), values in speeds.items():
        line = f"| {label} | {threads} | {span(values)} |"
        if not options.robot:
            theirs = statistics.median(speeds[SB3, threads])
            line += f" {statistics.median(values) / theirs:.2f} |"
        print(line)


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    algos = {*ROBOT_SCRIPTS, "simulator"} if options.robot else SCRIPTS
    try:
        if options.algo not in algos:
            text = f"there is none for {options.env_id}"
            raise SpeedError(f"--algo {options.algo}: {text}")
        if options.tree:
            compare_trees(options)
        else:
            make_table(options)
    except SpeedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
