"""A script's command line: train, go on, evaluate; every mistake is one sentence."""

import dataclasses
import fcntl
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from harness.args import RunArgs, parse_args
from harness.files import RunError, UsageError, find_policy, load_file
from harness.functional import Hardware
from harness.runs import Run, run_folder


def lock_run(folder: Path):
    """Waits until no other `--resume auto` trains this run; holds the lock while it is open."""
    (folder.parent / ".locks").mkdir(parents=True, exist_ok=True)
    lock = open(folder.parent / ".locks" / folder.name, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another process that trains this run", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def find_run(args: RunArgs, folder: Path, program: str) -> tuple[bool, dict | None]:
    """Whether the run in this folder is finished, and its checkpoint (None: it starts anew).

    A folder without a checkpoint moves to `abandoned/`.
    """
    final, checkpoint = folder / "policy_final.pt", folder / "checkpoint.pt"
    if final.exists() and load_file(final, program)["step"] >= args.total_timesteps:
        return True, None
    if checkpoint.exists():
        return False, load_file(checkpoint, program)
    if folder.exists():
        abandoned = folder.parent / "abandoned" / f"{folder.name}-{folder.stat().st_mtime_ns}"
        abandoned.parent.mkdir(exist_ok=True)
        shutil.move(folder, abandoned)
    return False, None


def evaluate_file(args: RunArgs, saved: dict, load_evaluator):
    """`--evaluate PATH`: plays a saved policy on the CPU and prints the return of each episode."""
    file = find_policy(args.evaluate)
    video = file.parent / "videos" / f"evaluate-{file.stem}-seed{args.seed}.mp4"
    Hardware(cuda=False, torch_threads=args.torch_threads, compile=False)
    returns, lengths = load_evaluator(args, saved).run(saved["step"], video)
    for i, (episodic_return, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {episodic_return:.2f}, length {length}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    text = f"{len(returns)} {mode} episodes of {file} (step {saved['step']}) on {args.env_id}"
    print(f"{text}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    if args.capture_video:
        print(f"video of episode 0: {video}")


def run_command(Args, train, load_evaluator, program: str, description: str, argv):
    """Carries out a command line: evaluates a policy, or trains."""
    args, saved = parse_args(Args, program, description, argv)
    if args.evaluate:
        evaluate_file(args, saved, load_evaluator)
        return
    if args.resume == "auto":
        folder = run_folder(args)
        lock = lock_run(folder)  # noqa: F841 (held until the process ends)
        finished, saved = find_run(args, folder, program)
        if finished:
            print(f"{folder} is finished: {args.total_timesteps} steps")
            return
        args = dataclasses.replace(args, resume=str(folder)) if saved else args
    words = sys.argv[1:] if argv is None else argv
    with Run(args, program, shlex.join(["python", f"{program}.py", *words]), saved) as run:
        train(args, run)


def main(Args, train, load_evaluator, argv: list[str] | None = None) -> int:
    """A script's command line; the exit code: 0, 1 (run), 2 (usage) or 128 + signal.

    train(args, run) trains; load_evaluator(args, saved) -> Evaluator of a saved policy.
    """
    module = sys.modules[train.__module__]
    program, description = Path(module.__file__).stem, module.__doc__.split("\n\n    ")[0]
    try:
        run_command(Args, train, load_evaluator, program, description, argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UsageError, RunError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
