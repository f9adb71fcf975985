"""A training run: its folder, log, evaluations and checkpoints."""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from harness.args import RunArgs
from harness.envs import Evaluator
from harness.files import RunError, UsageError, describe_machine, save_file
from harness.functional import Hardware
from harness.logger import Logger


class Run(contextlib.ExitStack):
    """One training run, which a script drives: `start`, then `log` once for each of `steps`."""

    def __init__(self, args: RunArgs, program: str, command: str, checkpoint: dict | None = None):
        super().__init__()
        self.args, self.program, self.command, self.checkpoint = args, program, command, checkpoint
        if checkpoint and "description" not in checkpoint:
            raise UsageError(f"--resume {args.resume}: this file holds a policy, not a checkpoint")
        self.hardware = Hardware(args.cuda, args.torch_threads, args.compile)
        self.device = self.hardware.device
        self.step, self.return_mean, self.received = 0, math.nan, None

    def start(self, env, evaluator: Evaluator | None, policy: dict, rng, **parts):
        """Opens the run's folder and log, and begins or restores everything.

        policy: what a saved policy holds, by name; parts: what else a checkpoint does; both have
        state_dict and load_state_dict. rng: NumPy's generator, of everything random on the host.
        """
        self.env, self.evaluator, self.policy, self.rng = env, evaluator, policy, rng
        self.parts = parts | {"env": env}
        about = {"script": f"{self.program}.py", "command": self.command}
        about |= {"args": dataclasses.asdict(self.args), "compiled": self.hardware.compiled}
        self.description = about | describe_machine(self.device)
        self.folder = self._open_folder()
        logger = Logger(self.args, self.folder, self.description, self.checkpoint)
        self.logger = self.enter_context(contextlib.closing(logger))
        if self.checkpoint:
            self._restore(self.checkpoint)
            self.checkpoint.clear()  # it holds the replay buffer a second time
        else:
            env.reset()
        first = "; compiling takes about a minute the first time" * self.hardware.compiled
        where = f"{self.description['device']}, files in {self.folder}"
        print(f"{self.args.env_id} on {where}{first}", file=sys.stderr)

    def _open_folder(self) -> Path:
        """The run's folder, new or the checkpoint's; writes args.json."""
        args, checkpoint, folder = self.args, self.checkpoint, run_folder(self.args)
        if checkpoint:
            folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
            if checkpoint["step"] >= args.total_timesteps:
                done = f"{folder} is already at step {checkpoint['step']}"
                raise UsageError(f"{done}: raise --total-timesteps to train it further")
            before, now = checkpoint["description"], self.description
            now["command"] = before["command"]
            if changed := [k for k in before if k != "args" and before[k] != now.get(k)]:
                text = f"other {', '.join(changed)} than before: not bit for bit the same run"
                print(f"warning: {text}", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=bool(checkpoint))
            (folder / "args.json").write_text(json.dumps(self.description, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"can't write to the run folder {folder}: {error.strerror}") from None
        return folder

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
        """Ends a step: writes numbers, evaluates, saves checkpoints, shows progress.

        Raises: SystemExit after a stop signal, when the checkpoint is written.
        """
        self.step += 1
        args, step = self.args, self.step
        last = step == args.total_timesteps
        due = step % args.log_frequency == 0 or last
        if episodes := self.env.episode_metrics(due):
            self.logger.log(step, episodes)
        if due:
            speed = self.logger.speed(step)
            vector = {"charts/env_SPS": speed * args.num_envs} if hasattr(args, "num_envs") else {}
            self.logger.log(step, {"charts/SPS": speed, **vector, **metrics})
        if self.evaluator and (step % args.eval_frequency == 0 or last):
            self._evaluate(f"step-{step:09d}")
        self.logger.show(train=self.env.last_return, eval=self.return_mean)
        if last:
            self._save("policy_final.pt", self._policy_content())
        often = args.checkpoint_frequency
        if (often and step % often == 0) or last or self.received:
            self._save("checkpoint.pt", self._policy_content() | self._checkpoint_content())
        if self.received and not last:
            again = f"python {self.program}.py --resume {self.folder}"
            print(f"stopped at step {step}; go on with: {again}", file=sys.stderr)
            raise SystemExit(128 + self.received)

    def _evaluate(self, name: str):
        returns, lengths = self.evaluator.run(self.step, self.folder / "videos" / f"{name}.mp4")
        self.return_mean = float(np.mean(returns))
        evaluation = {
            "eval/return_mean": self.return_mean,
            "eval/return_std": float(np.std(returns)),
        }
        evaluation["eval/length_mean"] = float(np.mean(lengths))
        evaluation |= {f"eval/return_{i}": value for i, value in enumerate(returns)}
        self.logger.log(self.step, evaluation)
        if self.args.keep_policies:
            self._save(f"policies/{name}.pt", self._policy_content())

    def _save(self, name: str, content: dict):
        save_file(self.folder / name, content, self.program)

    def _policy_content(self) -> dict:
        settings = dataclasses.asdict(dataclasses.replace(self.args, resume=None))
        states = {name: part.state_dict() for name, part in self.policy.items()}
        return {"args": settings, "step": self.step, **states}

    def _checkpoint_content(self) -> dict:
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"description": self.description, "return_mean": self.return_mean}
        content |= {"rng": self.rng.bit_generator.state, "torch_rng": torch.get_rng_state()}
        content["cuda_rng"] = torch.cuda.get_rng_state_all()
        return content | self.logger.state_dict()

    def _restore(self, content: dict):
        self.step, self.return_mean = content["step"], content["return_mean"]
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        self.rng.bit_generator.state = content["rng"]
        torch.set_rng_state(content["torch_rng"])
        if len(content["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["cuda_rng"])


def run_folder(args: RunArgs) -> Path:
    """Env__experiment__seed__ and the time; with `--resume auto` a digest of what defines a run."""
    env_id, tag = re.sub(r"[^\w.-]", "_", args.env_id), int(time.time())
    if args.resume == "auto":
        defining = json.dumps(args.fixed(args.resume_may_change)).encode()
        tag = hashlib.sha256(defining).hexdigest()[:10]
    return Path(args.runs_dir, f"{env_id}__{args.exp_name}__{args.seed}__{tag}")
