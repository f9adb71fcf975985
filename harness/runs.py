"""A training run: its folder, log, evaluations, checkpoints; and a script's command line."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from harness.args import RunArgs, parse_args
from harness.envs import Evaluator
from harness.files import RunError, UsageError, describe_machine, load_file, save_file
from harness.functional import Hardware
from harness.logger import Logger


class Run(contextlib.ExitStack):
    """One training run, which a script drives: `start`, then `log` once for each of `steps`."""

    def __init__(
        self, args: RunArgs, program: str, command: str, checkpoint: dict | None
    ):
        super().__init__()
        self.args, self.program, self.checkpoint = args, program, checkpoint
        if checkpoint and "description" not in checkpoint:
            raise UsageError(
                f"--resume: {checkpoint['path']} holds a policy, not a checkpoint"
            )
        self.folder = checkpoint["path"].parent if checkpoint else run_folder(args)
        self.hardware = Hardware(args.cuda, args.torch_threads, args.compile)
        self.device = self.hardware.device
        run = dict(
            script=f"{program}.py", command=command, compiled=self.hardware.compiled
        )
        self.description = (
            run | {"args": dataclasses.asdict(args)} | describe_machine(self.device)
        )
        self.step, self.return_mean, self.received = 0, math.nan, None

    def start(self, env, evaluator: Evaluator | None, policy: dict, rng, **parts):
        """Opens folder and log; begins or restores what a checkpoint holds: env, rng and parts.

        policy: what a saved policy holds. Both, by name, have state_dict and load_state_dict.
        """
        self.env, self.evaluator, self.policy, self.rng = env, evaluator, policy, rng
        self.parts = {"env": env} | parts
        if self.checkpoint:
            self._check_resumed(self.checkpoint)
        self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
        (self.folder / "args.json").write_text(
            json.dumps(self.description, indent=2) + "\n"
        )
        logger = Logger(self.args, self.folder, self.description, self.checkpoint)
        self.logger = self.enter_context(contextlib.closing(logger))
        if self.checkpoint:
            self._restore(self.checkpoint)
            self.checkpoint.clear()  # it holds the replay buffer a second time
        else:
            env.reset()
        text = f"{self.args.env_id} on {self.description['device']}, files in {self.folder}"
        first = (
            "; compiling takes about a minute the first time" * self.hardware.compiled
        )
        print(text + first, file=sys.stderr)

    def _check_resumed(self, checkpoint: dict):
        """Raises: UsageError if there is nothing to do. Says where results may differ."""
        before, now, steps = (
            checkpoint["description"],
            self.description,
            self.args.total_timesteps,
        )
        if checkpoint["step"] >= steps:
            done = f"{self.folder} is already at step {checkpoint['step']}"
            raise UsageError(f"{done}: raise --total-timesteps to train it further")
        if changed := {k for k in before if before[k] != now.get(k)} - {
            "args",
            "command",
        }:
            text = f"other {', '.join(sorted(changed))} than before: not bit for bit the same run"
            print(f"warning: {text}", file=sys.stderr)
        more = (
            ""
            if steps == before["args"]["total_timesteps"]
            else f" --total-timesteps {steps}"
        )
        now["command"] = before["command"] + more

    def steps(self):
        """The numbers of the steps to take; `log` ends each. A signal ends the run after a step."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, signum, signal.signal(signum, self._receive))
        while self.step < self.args.total_timesteps:
            yield self.step

    def _receive(self, signum: int, _frame):
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)  # a second signal stops the run at once

    def log(self, metrics: dict[str, float]):
        """Ends a step: writes numbers, evaluates, shows progress, saves, stops after a signal."""
        self.step += 1
        args, step = self.args, self.step
        last = step == args.total_timesteps
        due = step % args.log_frequency == 0 or last
        if episodes := self.env.episode_metrics(due):
            self.logger.log(step, episodes)
        if due:
            speed = self.logger.speed(step)
            vector = (
                {"charts/env_SPS": speed * args.num_envs}
                if hasattr(args, "num_envs")
                else {}
            )
            self.logger.log(step, {"charts/SPS": speed, **vector, **metrics})
        if self.evaluator and (step % args.eval_frequency == 0 or last):
            self._evaluate(f"step-{step:09d}")
        self.logger.show(train=self.env.last_return, eval=self.return_mean)
        if last:
            self._save("policy_final.pt")
        if step % (args.checkpoint_frequency or math.inf) == 0 or last or self.received:
            self._save("checkpoint.pt", **self._state())
        if self.received and not last:
            again = shlex.join(
                ["python", f"{self.program}.py", "--resume", str(self.folder)]
            )
            print(f"stopped at step {step}; go on with: {again}", file=sys.stderr)
            raise SystemExit(128 + self.received)

    def _evaluate(self, name: str):
        returns, lengths = self.evaluator.run(
            self.step, self.folder / "videos" / f"{name}.mp4"
        )
        self.return_mean = float(np.mean(returns))
        means = {
            "eval/return_mean": self.return_mean,
            "eval/return_std": float(np.std(returns)),
        }
        means["eval/length_mean"] = float(np.mean(lengths))
        self.logger.log(
            self.step, means | {f"eval/return_{i}": x for i, x in enumerate(returns)}
        )
        if self.args.keep_policies:
            self._save(f"policies/{name}.pt")

    def _save(self, name: str, **more):
        """Saves the policy, and what a checkpoint holds beside it."""
        content = {
            "args": dataclasses.asdict(dataclasses.replace(self.args, resume=None))
        }
        content |= {name: part.state_dict() for name, part in self.policy.items()}
        save_file(
            self.folder / name, {**content, "step": self.step, **more}, self.program
        )

    def _state(self) -> dict:
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"description": self.description, "return_mean": self.return_mean}
        content |= {
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
        }
        return (
            content
            | self.logger.state_dict()
            | {"cuda_rng": torch.cuda.get_rng_state_all()}
        )

    def _restore(self, content: dict):
        self.step, self.return_mean = content["step"], content["return_mean"]
        self.rng.bit_generator.state = content["rng"]
        torch.set_rng_state(content["torch_rng"])
        if len(content["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["cuda_rng"])
        for (
            name,
            part,
        ) in self.parts.items():  # last: a part may go back to an earlier moment
            part.load_state_dict(content[name])


def run_folder(args: RunArgs) -> Path:
    """Env__experiment__seed__ and the time; with `--resume auto` a digest of what defines a run."""
    defining = json.dumps(args.fixed(args.resume_may_change)).encode()
    digest = hashlib.sha256(defining).hexdigest()[:10]
    tag = digest if args.resume == "auto" else int(time.time())
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{tag}"
    return Path(args.runs_dir, re.sub(r"[^\w.-]", "_", name))


def lock_run(folder: Path):
    """Waits until no other `--resume auto` trains this run; locks it while the file is open."""
    (folder.parent / ".locks").mkdir(parents=True, exist_ok=True)
    lock = open(folder.parent / ".locks" / folder.name, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another process that trains this run", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def evaluate_policy(args: RunArgs, saved: dict, load_evaluator):
    """`--evaluate PATH`: plays a saved policy on the CPU and prints the return of each episode."""
    file, step = saved["path"], saved["step"]
    video = file.parent / "videos" / f"evaluate-{file.stem}-seed{args.seed}.mp4"
    Hardware(cuda=False, torch_threads=args.torch_threads, compile=False)
    returns, lengths = load_evaluator(args, saved).run(step, video)
    for i, episodic_return in enumerate(returns):
        print(f"episode {i}: return {episodic_return:.2f}, length {lengths[i]}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    text = f"{len(returns)} {mode} episodes of {file} (step {step}) on {args.env_id}"
    print(f"{text}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    print(f"video of episode 0: {video}\n" * args.capture_video, end="")


def run_command(Args, train, load_evaluator, program: str, description: str, argv):
    """Carries out a command line: evaluates a policy, or trains."""
    args, saved = parse_args(Args, program, description, argv)
    if args.evaluate is not None:
        return evaluate_policy(args, saved, load_evaluator)
    if args.resume == "auto":
        folder = run_folder(args)
        lock = lock_run(folder)  # noqa: F841 (held until the process ends)
        final = folder / "policy_final.pt"
        if (
            final.exists()
            and load_file("--resume", final, program)["step"] >= args.total_timesteps
        ):
            print(f"{folder} is finished: {args.total_timesteps} steps")
            return
        if (
            final.exists() or (folder / "checkpoint.pt").exists()
        ):  # else it starts, anew or again
            saved = load_file("--resume", folder, program)
    words = sys.argv[1:] if argv is None else argv
    with Run(
        args, program, shlex.join(["python", f"{program}.py", *words]), saved
    ) as run:
        train(args, run)


def main(Args, train, load_evaluator, argv: list[str] | None = None) -> int:
    """A script: train(args, run), or load_evaluator(args, saved) -> Evaluator; the exit code."""
    module = sys.modules[train.__module__]
    program, description = (
        Path(module.__file__).stem,
        module.__doc__.split("\n\n    ")[0],
    )
    try:
        run_command(Args, train, load_evaluator, program, description, argv)
        print(end="", flush=True)  # so that a reader that stopped is noticed here
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (
        UsageError,
        RunError,
        FloatingPointError,
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        memory = "not enough memory: " * isinstance(error, MemoryError | RuntimeError)
        print(f"error: {memory}{error}".partition("\n")[0], file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
