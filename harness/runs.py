"""A training run: its folder, log, evaluations and checkpoints."""

import contextlib
import dataclasses
import json
import math
import re
import signal
import sys
import time
from pathlib import Path

import torch

from harness.args import RunArgs
from harness.envs import Evaluator, evaluation_metrics
from harness.files import RunError, UsageError, describe_machine, find_checkpoint, save_file
from harness.functional import Hardware
from harness.logger import Logger


class Interrupted(Exception):
    """SIGINT or SIGTERM, after the checkpoint has been written (exit code 128 + signal number)."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def stop_signals():
    """A list that the first SIGINT or SIGTERM joins; a second one stops at once."""
    received = []

    def handle(signum, _frame):
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Run:
    """One training run, which a script drives: `start`, then `log` once for each of `steps`.

    A context, which closes the log and gives the signals back.
    """

    def __init__(self, args: RunArgs, program: str, command: str, checkpoint: dict | None = None):
        self.args, self.program, self.checkpoint = args, program, checkpoint
        if checkpoint and "description" not in checkpoint:
            raise UsageError(f"--resume {args.resume}: this file holds a policy, not a checkpoint")
        self.command = checkpoint["description"]["command"] if checkpoint else command
        self.hardware = Hardware(args.cuda, args.torch_threads, args.compile)
        self.device = self.hardware.device
        self.step, self.best, self.return_mean = 0, -math.inf, math.nan

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def start(self, env, evaluator: Evaluator | None, policy: dict, rng, **parts):
        """Opens the run's folder and log, and begins or restores everything.

        policy: what a saved policy holds, by name; parts: what else a checkpoint does; both have
        state_dict and load_state_dict. rng: NumPy's generator, of everything random on the host.
        """
        self.env, self.evaluator, self.policy, self.rng = env, evaluator, policy, rng
        self.parts = parts
        self.description = {"script": f"{self.program}.py", "command": self.command}
        self.description["args"] = dataclasses.asdict(self.args)
        self.description |= describe_machine(self.device, self.hardware.compiled)
        self.folder = self._open_folder()
        logger = Logger(self.args, self.folder, self.description, self.checkpoint)
        self.logger = self.stack.enter_context(contextlib.closing(logger))
        if self.checkpoint:
            self._restore(self.checkpoint)
            self.checkpoint.clear()  # it holds the replay buffer a second time
        else:
            env.reset()
        if getattr(self.args, "learning_starts", 0) >= self.args.total_timesteps:
            text = f"nothing is learned before --learning-starts {self.args.learning_starts}"
            print(f"warning: {text}", file=sys.stderr)
        first = "; compiling takes about a minute the first time" * self.hardware.compiled
        where = f"{self.description['device']}, files in {self.folder}"
        print(f"{self.args.env_id} on {where}{first}", file=sys.stderr)

    def steps(self):
        """The numbers of the steps to take; `log` ends each. A signal ends the run after a step."""
        self.received = self.stack.enter_context(stop_signals())
        while self.step < self.args.total_timesteps:
            yield self.step

    def log(self, metrics: dict[str, float]):
        """Ends a step: writes numbers, evaluates, saves checkpoints, shows progress.

        Raises: Interrupted after a stop signal, when the checkpoint is written.
        """
        self.step += 1
        args, step = self.args, self.step
        last = step == args.total_timesteps
        due = step % args.log_frequency == 0 or last
        if episodes := self.env.episode_metrics(due):
            self.logger.log(step, episodes)
        if due:
            speed = {"charts/SPS": self.logger.speed(step)}
            if hasattr(args, "num_envs"):
                speed["charts/env_SPS"] = speed["charts/SPS"] * args.num_envs
            self.logger.log(step, speed | metrics)
        if self.evaluator and (step % args.eval_frequency == 0 or last):
            self._evaluate()
        self.logger.show(train=self.env.last_return, eval=self.return_mean)
        if last:
            self._save_policy("policy_final.pt")
        often = args.checkpoint_frequency
        if (often and step % often == 0) or last or self.received:
            self._save_checkpoint()
        if self.received and not last:
            again = f"python {self.program}.py --resume {self.folder}"
            raise Interrupted(self.received[0], f"stopped at step {step}; go on with: {again}")

    def _evaluate(self):
        name = f"step-{self.step:09d}"
        played = self.evaluator.run(self.step, self.folder / "videos" / f"{name}.mp4")
        evaluation = evaluation_metrics(*played)
        self.logger.log(self.step, evaluation)
        self.return_mean = evaluation["eval/return_mean"]
        if self.return_mean > self.best:
            self.best = self.return_mean
            self._save_policy("policy_best.pt")
        if self.args.keep_policies:
            self._save_policy(f"policies/{name}.pt")

    def _policy_content(self) -> dict:
        settings = dataclasses.asdict(dataclasses.replace(self.args, resume=None))
        states = {name: part.state_dict() for name, part in self.policy.items()}
        return {"args": settings, "step": self.step, **states}

    def _save_policy(self, name: str):
        save_file(self.folder / name, self._policy_content(), self.program)

    def _save_checkpoint(self):
        content = self._policy_content() | self.logger.state_dict()
        content |= {"best": self.best, "return_mean": self.return_mean}
        content |= {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"env": self.env.state_dict(), "rng": self.rng.bit_generator.state}
        content |= {"torch_rng": torch.get_rng_state(), "description": self.description}
        content["cuda_rng"] = torch.cuda.get_rng_state() if self.hardware.cuda else None
        save_file(self.folder / "checkpoint.pt", content, self.program)

    def _restore(self, content: dict):
        self.step, self.best = content["step"], content["best"]
        self.return_mean = content["return_mean"]
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        self.env.load_state_dict(content["env"])
        self.rng.bit_generator.state = content["rng"]
        torch.set_rng_state(content["torch_rng"])
        if self.hardware.cuda and content["cuda_rng"] is not None:
            torch.cuda.set_rng_state(content["cuda_rng"])

    def _open_folder(self) -> Path:
        """The run's folder, new or the checkpoint's; writes args.json."""
        args, checkpoint = self.args, self.checkpoint
        if checkpoint:
            file = find_checkpoint(args.resume)
            folder = file.parent
            if checkpoint["step"] >= args.total_timesteps:
                done = f"{folder} is already at step {checkpoint['step']}"
                raise UsageError(f"{done}: raise --total-timesteps to train it further")
            before, now = checkpoint["description"], self.description
            changed = [k for k in before if k not in ("args", "command") and before[k] != now[k]]
            if changed:
                text = f"other {', '.join(changed)} than before: not bit for bit the same run"
                print(f"warning: {text}", file=sys.stderr)
        else:
            folder = Path(args.runs_dir, f"{run_prefix(args)}{int(time.time())}")
        try:
            folder.mkdir(parents=True, exist_ok=bool(checkpoint))
            (folder / "args.json").write_text(json.dumps(self.description, indent=2) + "\n")
        except OSError as error:
            text = f"can't write to the run folder {folder}: {error.strerror}"
            raise RunError(text) from None
        return folder


def run_prefix(args: RunArgs) -> str:
    """The name of a run's folder up to its time."""
    env_id = re.sub(r"[^\w.-]", "_", args.env_id)
    return f"{env_id}__{args.exp_name}__{args.seed}__"
