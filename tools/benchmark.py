"""Trains commands x environments x seeds on this machine's cores or GPUs, or on Slurm.

Every run is `python SCRIPT ... --resume auto`: the same command again skips finished
runs, goes on with stopped ones and starts the others. Words after -- are options of all
runs. Ctrl-C stops with checkpoints, a second one at once.

    python tools/benchmark.py meow_continuous_action.py "sb3_baselines.py --algo td3" \\
        --env-ids Hopper-v4 Ant-v4 --seeds 1-3 --dry-run -- --eval-frequency 5000
"""

import argparse
import contextlib
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple, NoReturn

import tyro

ROOT = Path(__file__).resolve().parent.parent
# What a command must leave to the launcher.
DECIDED = {"--seed", "--runs-dir", "--resume", "--evaluate"}
# What the options of all runs must leave to the commands and the launcher.
NAMING = DECIDED | {"--env-id", "--algo", "--total-timesteps"}
TAIL = 100_000  # bytes of a log in which its last error is looked for


@dataclass
class Options:
    commands: tyro.conf.Positional[tuple[str, ...]] = ()
    """Scripts of this repository with their options, each quoted as one word."""
    env_ids: tuple[str, ...] = ()
    """Environments of each command that has no --env-id of its own."""
    seeds: str = "1-5"
    """Numbers and ranges, as in 1-3,8."""
    total_timesteps: int | None = None
    """Steps of each run (default: the command's, or the script's own)."""
    workers: int | None = None
    """Runs at a time (default: one per GPU of CUDA_VISIBLE_DEVICES or of the machine,
    without a GPU one per core; with --slurm all)."""
    out: Path = Path("runs")
    """Folder of the runs and their logs/."""
    dry_run: bool = False
    """Print the commands; do nothing."""
    progress_seconds: float = 30
    """Between two reports of what runs."""
    slurm: bool = False
    """Submit one job array. Before its time limit a run saves and is queued again."""
    slurm_options: tuple[str, ...] = ()
    """Options of sbatch without dashes, as in partition=gpu gres=gpu:1 time=24:00:00
    (default time limit: 4 hours)."""


class Run(NamedTuple):
    """One training run."""

    words: tuple[str, ...]  # its command
    log: Path


def fail(text: str) -> NoReturn:
    """Ends the launcher with one sentence on what is wrong; exit code 2."""
    say(f"error: {text}", to=2)
    sys.exit(2)


def say(*lines: str, to: int = 1):
    """Prints, though nobody may read: a closed terminal or a full disk is no error.

    to: file descriptor, 1 or 2
    """
    with contextlib.suppress(OSError):
        os.write(to, ("\n".join(lines) + "\n").encode())


# --- 1. From options to runs ---------------------------------------------------------
def read_seeds(text: str) -> list[int]:
    """The numbers in a text such as 1-3,8."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            fail(f"--seeds {text}: not as in 1-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            fail(f"--seeds {text}: {first} is more than {last}")
        seeds += range(first, last + 1)
    return seeds


def refuse(words: list[str], names: set[str], where: str):
    """Fails if one of the words is one of these options."""
    for word in words:
        if word.partition("=")[0].replace("_", "-") in names:
            fail(f"{where}: {word} would name other runs")


def read_command(command: str, env_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command without --env-id, and its environments."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        fail(f"{command}: {error}")
    if not words or not (ROOT / words[0]).is_file():
        fail(f"{command}: there is no such script in {ROOT}")
    refuse(words, DECIDED, command)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--env-id", "--env_id", nargs="?", const="")
    own, words = parser.parse_known_args(words)
    envs = list(env_ids) if own.env_id is None else [own.env_id]
    if not envs or "" in envs:
        fail(f"{command}: no environment; give --env-ids")
    return words, envs


def list_runs(options: Options, extra: list[str]) -> list[Run]:
    """Every run once, in the order of commands, environments and seeds."""
    if not options.commands:
        fail("no command to run; --help shows an example")
    for name in ("workers", "total_timesteps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 1")
    refuse(extra, NAMING, f"-- {shlex.join(extra)}")

    common = ["--runs-dir", str(options.out), "--resume", "auto"]
    if options.total_timesteps:
        common += ["--total-timesteps", str(options.total_timesteps)]
    seeds = read_seeds(options.seeds)
    runs = []
    for command in options.commands:
        (script, *own), envs = read_command(command, options.env_ids)
        for env, seed in product(envs, seeds):
            name = [f"{env}__{Path(script).stem}__{seed}", *own, *extra]
            log = options.out / "logs" / log_name(" ".join(name))
            words = [sys.executable, str(ROOT / script), *own, "--env-id", env]
            words += ["--seed", str(seed), *common, *extra]
            runs.append(Run(tuple(words), log))
    return list(dict.fromkeys(runs))


def log_name(text: str) -> str:
    """A file name of at most 200 characters; long ones differ where the texts do."""
    name = re.sub(r"[^\w.=-]+", "_", text)
    if len(name) > 190:
        name = f"{name[:180]}_{zlib.crc32(text.encode()):08x}"
    return f"{name}.log"


# --- 2. One run -----------------------------------------------------------------------
def start(run: Run, **options) -> subprocess.Popen:
    """Starts a run in a session of its own: the terminal's Ctrl-C doesn't reach it."""
    header = f"\n# {time.strftime('%FT%T')} {shlex.join(run.words)}\n"
    try:
        log = open(run.log, "ab", buffering=0)
    except OSError as error:
        say(f"no log: {error}")
        log = open(os.devnull, "ab", buffering=0)
    with log:
        with contextlib.suppress(OSError):  # a full disk
            log.write(header.encode())
        return subprocess.Popen(
            run.words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )


def exit_code(process: subprocess.Popen) -> int:
    """Waits for its end; as in a shell, 128 + n after signal n."""
    code = process.wait()
    return code if code >= 0 else 128 - code


def last_words(log: Path) -> str:
    """The error of the last attempt in a log, else what it wrote last."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            text = "\n" + file.read().decode(errors="replace")
    except OSError as error:
        return f"no log: {error}"
    attempt = re.split(r"\n# .*\n", text)[-1]
    lines = [line.strip() for line in attempt.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


# --- 3. On this machine ---------------------------------------------------------------
def find_gpus() -> list[str]:
    """Those of CUDA_VISIBLE_DEVICES (empty or -1: none), else all of the machine."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        gpus = given.replace(",", " ").split()
        return [] if given.startswith("-") else gpus
    command = ["nvidia-smi", "-L"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return []
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def count_cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Launcher:
    """Trains runs, each on a core or GPU, until they end or a signal comes."""

    def __init__(self, workers: int | None, progress_seconds: float):
        gpus = find_gpus()
        self.workers = workers or len(gpus) or count_cores()
        self.gpus = queue.SimpleQueue()  # what the next run gets; None: as it is
        for i in range(self.workers):
            self.gpus.put(gpus[i % len(gpus)] if gpus else None)
        self.progress_seconds = progress_seconds
        self.signals = []  # that came, the first one first
        self.stopping = False
        self.processes = {}  # of the runs that train now, with their logs
        self.lock = threading.Lock()  # of both: no run starts after the others stopped
        self.finished, self.failures = 0, []

    def train(self, run: Run) -> int | None:
        """In a thread: trains a run; its exit code, or None if it wasn't to start."""
        gpu = self.gpus.get()
        env = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        try:
            with self.lock:
                if self.stopping:
                    return None
                process = start(run, env=os.environ | env)
                self.processes[process] = run.log
            code = exit_code(process)
            with self.lock:
                del self.processes[process]
            return code
        finally:
            self.gpus.put(gpu)

    def stop(self):
        """Asks the runs to save and end; those that were asked before end at once."""
        with self.lock:
            self.stopping = True
            for process in self.processes:
                process.terminate()

    def run(self, runs: list[Run]):
        """Trains them all, reports, and stops after a signal."""
        for name in ("SIGHUP", "SIGINT", "SIGTERM"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda number, _: self.signals.append(number))
        answered, reported = 0, time.monotonic()
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self.train, run): run for run in runs}
            running = set(futures)
            while running:
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                for future in done:
                    self.record(futures[future], future)
                if len(self.signals) > answered:
                    answered = len(self.signals)
                    say("stopping: the runs save (a second signal ends them at once)")
                    self.stop()
                if time.monotonic() - reported > self.progress_seconds:
                    reported = time.monotonic()
                    self.report(len(running))

    def record(self, run: Run, future):
        """Counts a run that ended; a stop isn't a failure."""
        try:
            code = future.result()
        except OSError as error:  # no process could be started
            code, words = 1, str(error)
        else:
            words = last_words(run.log)
        if code is None:
            return
        if code == 0:
            self.finished += 1
            say(f"finished: {run.log}")
        elif code <= 128 or not self.stopping:
            self.failures.append(f"failed: {run.log}: exit code {code}: {words}")
            say(self.failures[-1])

    def report(self, left: int):
        with self.lock:
            logs = list(self.processes.values())
        counts = f"{self.finished} finished, {len(self.failures)} failed"
        say(f"{counts}, {left - len(logs)} waiting; running:")
        for log in logs:
            say(f"  {log}: {last_words(log)}")


def launch(runs: list[Run], options: Options) -> int:
    """Trains the runs on this machine; returns the exit code."""
    launcher = Launcher(options.workers, options.progress_seconds)
    launcher.run(runs)
    counts = f"{launcher.finished} runs are finished, {len(launcher.failures)} failed"
    say(counts, *launcher.failures)
    if launcher.signals:
        again = shlex.join([Path(sys.executable).name, *sys.argv])
        say(f"stopped; the same command goes on: {again}")
        return 128 + launcher.signals[0]
    say(f"compare them: {comparison(options)}")
    return 1 if launcher.failures else 0


def comparison(options: Options) -> str:
    """The command that compares the runs."""
    return shlex.join(["python", "tools/compare.py", str(options.out)])


# --- 4. On Slurm ----------------------------------------------------------------------
class SlurmRun:
    """A run as an element of a job array.

    Two minutes before its time limit Slurm sends SIGUSR2 to all processes of the job,
    whereupon submitit calls `checkpoint` and queues the element again. SIGTERM (of
    `scancel` or a preemption) goes to all of them too: submitit ignores it, the run
    saves and ends.
    """

    process = None

    def __call__(self, run: Run):
        def ignore_warning():
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)

        self.process = start(run, preexec_fn=ignore_warning)
        with ThreadPoolExecutor() as pool:  # so that `checkpoint` can wait meanwhile
            code = pool.submit(exit_code, self.process).result()
        if code:
            say(f"failed: {run.log}: exit code {code}: {last_words(run.log)}")
            sys.exit(code)
        say(f"finished: {run.log}")

    def checkpoint(self, run: Run):
        """Stops the run; returns what the element does when it starts again."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            self.process.terminate()
            self.process.wait()
        return DelayedSubmission(SlurmRun(), run)


def read_slurm_options(words: Sequence[str]) -> dict[str, str | bool]:
    """partition=gpu exclusive -> {"partition": "gpu", "exclusive": True}."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        options[name] = value if equals else True
    return options


def submit(runs: list[Run], options: Options) -> int:
    """Submits one job array; returns the exit code."""
    try:
        import submitit
    except ImportError:
        fail('--slurm needs submitit: pip install ".[bench]"')
    folder = options.out / "logs" / "slurm"
    more = {"requeue": True} | read_slurm_options(options.slurm_options)
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=10_000)
        executor.update_parameters(
            job_name="benchmark",
            time=4 * 60,
            signal_delay_s=120,
            array_parallelism=options.workers or len(runs),
            stderr_to_stdout=True,
            additional_parameters=more,
        )
        jobs = executor.map_array(SlurmRun(), runs)
    except (RuntimeError, OSError) as error:
        fail(f"--slurm: {str(error).strip().splitlines()[-1]}")
    job = jobs[0].job_id.partition("_")[0]
    say(f"submitted batch job {job}: {len(runs)} runs; logs in {options.out / 'logs'}")
    say(f"when they are finished, compare them: {comparison(options)}")
    return 0


# --- 5. The command -------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    options = tyro.cli(Options, description=__doc__, args=argv[:end])
    runs = list_runs(options, extra=argv[end + 1 :])
    if options.dry_run:
        say(*(shlex.join(run.words) for run in runs))
        return 0
    try:
        (options.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {options.out}: can't make folders there ({error.strerror})")
    if options.slurm:
        return submit(runs, options)
    return launch(runs, options)


if __name__ == "__main__":
    sys.exit(main())
