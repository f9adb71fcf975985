"""Steps per second of the whole training loop: MEow, our SAC and SQL, and SB3's SAC.

    pip install -r requirements-benchmark.txt
    python benchmarks/speed.py --env-id HalfCheetah-v4
    python benchmarks/speed.py --env-id Ant            # an Isaac Gym task: another table, see below

Every row is a process of its own that trains for real (environment, acting, replay buffer, update,
logging); the rows take turns, round by round, so that a slow minute of the machine hits all alike.
With a GPU there are rows for it too. Reported is the median over windows of 250 steps after warm-up
and compilation. The floor is the time that the update's matrix products alone would take: FLOPs
counted by PyTorch in one update of MEow, over the rate of a 256 x 256 x 256 fp32 product measured
in the same round on as many threads.

For the embedded Isaac Gym tasks: environment steps per second (vector steps times environments) of
the simulator alone with random actions, and of training MEow and SAC.
"""

import csv
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import mujoco
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
# Steps; learning starts after the warm-up, compilation falls into window 1.
WINDOW, WARM_UP = 250, 1_000
CPU = {
    "MEow eager": "meow --no-cuda --no-compile",
    "MEow compiled": "meow --no-cuda",
    "MEow compiled, bf16": "meow --no-cuda --bf16",
    "SAC eager": "sac --no-cuda --no-compile",
    "SAC compiled": "sac --no-cuda",
    "SQL compiled": "sql --no-cuda",
}
GPU = {
    "MEow compiled, GPU": "meow",
    "MEow compiled, bf16, GPU": "meow --bf16",
    "SAC compiled, GPU": "sac",
    "SQL compiled, GPU": "sql",
}
SB3 = "SB3 SAC"
ISAAC_WINDOW = 50  # vector steps


@dataclasses.dataclass
class Options:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium environment"""
    steps: int = 2_000
    """measured steps per row and round"""
    rounds: int = 3
    """rounds; the table shows the median over all windows of all rounds"""
    threads: tuple[int, ...] = (1, 2)
    """thread counts on the CPU"""
    num_envs: int = 128
    """environments of an Isaac Gym task"""


def script_windows(options: Options, row: str, threads: int) -> list[float]:
    """Steps per second in each window of one real run; row: a script's name and its options."""
    name, *flags = row.split()
    script = ROOT / f"{name}_continuous_action.py"
    total = WARM_UP + WINDOW + options.steps
    words = f"--env-id {options.env_id} --torch-threads {threads} --total-timesteps {total}"
    words += f" --learning-starts {WARM_UP} --log-frequency {WINDOW} --eval-episodes 1"
    words += f" --eval-frequency {total} --checkpoint-frequency 0"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), *words.split(), *flags, "--runs-dir", folder]
        subprocess.run(command, check=True, capture_output=True, env=one_pool(threads))
        (file,) = Path(folder).glob("*/metrics.csv")
        with open(file) as f:
            rows = [r for r in csv.DictReader(f) if r["name"] == "charts/SPS"]
    return [float(r["value"]) for r in rows if int(r["step"]) > WARM_UP + WINDOW]


def sb3_windows(options: Options, threads: int) -> list[float]:
    """The same for Stable-Baselines3's SAC with its default settings (also one update per step)."""
    words = [sys.executable, __file__, "sb3", options.env_id, str(options.steps), str(threads)]
    out = subprocess.run(words, check=True, capture_output=True, text=True, env=one_pool(threads))
    return json.loads(out.stdout.splitlines()[-1])


def run_sb3(env_id: str, steps: int, threads: int) -> None:
    """In its own process: prints the windows' steps per second as JSON."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        times: list[float] = []  # noqa: RUF012

        def _on_step(self) -> bool:
            if self.n_calls >= WARM_UP + WINDOW and self.n_calls % WINDOW == 0:
                self.times.append(time.perf_counter())
            return True

    torch.set_num_threads(threads)
    clock = Clock()
    model = SAC("MlpPolicy", gym.make(env_id), learning_starts=WARM_UP, device="cpu")
    model.learn(WARM_UP + WINDOW + steps, callback=clock)
    times = clock.times
    print(json.dumps([WINDOW / (b - a) for a, b in pairwise(times)]))


def isaac_windows(options: Options, row: str, threads: int) -> list[float]:
    """Environment steps per second in each window of one real run; row: "script options"."""
    name, *flags = row.split()
    total = 100 + ISAAC_WINDOW + options.steps
    words = f"--env-id {options.env_id} --torch-threads {threads} --sim-threads {threads}"
    words += f" --num-envs {options.num_envs} --total-timesteps {total} --checkpoint-frequency 0"
    words += f" --log-frequency {ISAAC_WINDOW} --eval-frequency {total} --eval-episodes 1"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{name}_isaacgym.py"), *words.split(), *flags]
        command += ["--runs-dir", folder]
        subprocess.run(command, check=True, capture_output=True, env=one_pool(threads))
        (file,) = Path(folder).glob("*/metrics.csv")
        with open(file) as f:
            rows = [r for r in csv.DictReader(f) if r["name"] == "charts/env_SPS"]
    return [float(r["value"]) for r in rows if int(r["step"]) > 100 + ISAAC_WINDOW]


def simulator_windows(options: Options, device: str, threads: int) -> list[float]:
    """The same for the simulator alone, with random actions."""
    from isaac_tasks import make_simulator

    torch.set_num_threads(threads)
    envs = make_simulator("mujoco", options.env_id, options.num_envs, 1, device, threads)
    envs.reset()
    shape, speeds = (options.num_envs, envs.act_dim), []
    for i in range(1 + options.steps // ISAAC_WINDOW):
        start = time.perf_counter()
        for _ in range(ISAAC_WINDOW):
            envs.step(2 * torch.rand(shape, device=device) - 1)
        if device == "cuda":
            torch.cuda.synchronize()
        if i:  # the first one warms up
            speeds.append(ISAAC_WINDOW * options.num_envs / (time.perf_counter() - start))
    return speeds


def measure_isaac(options: Options) -> None:
    """The table of an Isaac Gym task."""
    devices = [("cpu", "--no-cuda", threads) for threads in options.threads]
    devices += [("cuda", "", 1)] * torch.cuda.is_available()
    windows = {}
    for i in range(options.rounds):
        for device, flag, threads in devices:
            place = "GPU" if device == "cuda" else threads
            print(f"round {i + 1}/{options.rounds}, CPU threads or GPU: {place}", file=sys.stderr)
            speeds = {f"{options.env_id} alone": simulator_windows(options, device, threads)}
            for label, name in (("MEow training", "meow"), ("SAC training", "sac")):
                speeds[label] = isaac_windows(options, f"{name} {flag}", threads)
            for label, values in speeds.items():
                windows.setdefault((label, place), []).extend(values)
    print(f"\n{options.env_id}, {options.num_envs} environments, one update per vector step;")
    print(f"{options.rounds} rounds of {options.steps} vector steps; torch {torch.__version__},")
    print(f"mujoco {mujoco.__version__}, {os.cpu_count()} cores\n")
    print("| | CPU threads | environment steps/s (min to max window) |\n|---|---|---|")
    for (label, place), speeds in windows.items():
        span = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
        print(f"| {label} | {place} | {span} |")


def one_pool(threads: int) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def product_rate(threads: int) -> float:
    """FLOP/s of a 256 x 256 x 256 fp32 product, median of 20 timings."""
    torch.set_num_threads(threads)
    a, b, rates = torch.randn(256, 256), torch.randn(256, 256), []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            a @ b
        rates.append(50 * 2 * 256**3 / (time.perf_counter() - start))
    return statistics.median(rates)


def update_flops(env_id: str) -> int:
    """FLOPs of the matrix products in one update, counted by PyTorch on the eager one."""
    import meow_continuous_action as meow

    args = meow.default_args(env_id)
    env = meow.TrainingEnv(env_id, seed=1)
    replay = meow.ReplayBuffer(args.batch_size, env.obs_dim, env.act_dim)
    replay.rows.uniform_(-0.5, 0.5)
    replay.added = args.batch_size
    learner = meow.Learner(meow.make_flow(args, env.obs_dim, env.act_dim), replay, args, False)
    with FlopCounterMode(display=False) as counter:
        learner._update(*learner.state, learner.batch, learner.keep)
    return counter.get_total_flops()


def main() -> None:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    sys.path.insert(0, str(ROOT))
    from isaac_tasks import TASKS

    if options.env_id in TASKS:
        measure_isaac(options)
        return
    flops = update_flops(options.env_id)
    rows = [(name, threads) for threads in options.threads for name in (*CPU, SB3)]
    rows += [(name, options.threads[0]) for name in GPU if torch.cuda.is_available()]
    windows, rates = {row: [] for row in rows}, {threads: [] for threads in options.threads}
    for i in range(options.rounds):
        for name, threads in rows:
            print(f"round {i + 1}/{options.rounds}: {name}, threads: {threads}", file=sys.stderr)
            rates[threads].append(product_rate(threads))
            measured = (
                sb3_windows(options, threads)
                if name == SB3
                else script_windows(options, (CPU | GPU)[name], threads)
            )
            windows[name, threads] += measured
    print(f"\n{options.env_id}: {flops / 1e6:.0f} MFLOP of matrix products per update; one update")
    print(f"per step; {options.rounds} rounds of {options.steps} steps; torch {torch.__version__},")
    print(
        f"mujoco {mujoco.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores\n"
    )
    print("| | threads | steps/s (min to max window) | x SB3 SAC | % of the fp32 floor |")
    print("|---|---|---|---|---|")
    for name, threads in rows:
        speed = statistics.median(windows[name, threads])
        low, high = min(windows[name, threads]), max(windows[name, threads])
        ratio = speed / statistics.median(windows[SB3, threads])
        floor = statistics.median(rates[threads]) / flops  # updates/s of the products alone
        on_fp32_cpu = name in ("MEow eager", "MEow compiled")
        percent = f"{100 * speed / floor:.0f} %" if on_fp32_cpu else ""
        span = f"{speed:.0f} ({low:.0f} to {high:.0f})"
        print(f"| {name} | {threads} | {span} | {ratio:.2f} | {percent} |")
    listed = ", ".join(f"{t}: {statistics.median(r) / 1e9:.0f} GFLOP/s" for t, r in rates.items())
    print(f"\nfp32 product rate by threads: {listed}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["sb3"]:
        run_sb3(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
