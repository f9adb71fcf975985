"""A training run: folder, log, checkpoints and signals; a script's command line."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from harness.args import RunArgs, parse_args
from harness.compiling import Compiler
from harness.environments import check_sizes
from harness.errors import RunError, UsageError, UserCodeError, is_memory_error, say
from harness.files import load_file, other_version, save_file
from harness.logger import Logger, SlowProgress
from harness.machine import choose_device, configure_process, describe_machine
from harness.video import Video

try:
    import fcntl
except ImportError:  # Windows: two processes with --resume auto aren't kept apart there
    fcntl = None


class Session(contextlib.ExitStack):
    """Where a script uses environments, which are closed however it ends."""

    def __init__(
        self,
        args: RunArgs,
        device: torch.device,
        compiled: bool = False,
        video_file: Path | None = None,
    ):
        super().__init__()
        self.args, self.device, self.video_file = args, device, video_file
        self.compile = Compiler(compiled, device, self.pause)

    def __enter__(self):
        """Until the session handles signals, SIGTERM ends it as Ctrl-C does."""
        if threading.current_thread() is threading.main_thread():
            self._on_signal(signal.SIGTERM, terminate)
        return super().__enter__()

    def _on_signal(self, signum: int, handler):
        """Handles a signal until the session ends. In the main thread alone."""
        self.callback(signal.signal, signum, signal.signal(signum, handler))

    def closing(self, thing):
        """The thing, whose `close` is called when the session ends, however it ends.

        What goes wrong there doesn't hide the error that ended the session.
        """

        def close(_type, ended_by, _traceback):
            try:
                thing.close()
            except Exception as error:
                if ended_by is None:
                    raise
                say(f"warning: {error}")

        self.push(close)
        return thing

    def pause(self, seconds: float):
        """Told of time that went into compiling."""

    def check_signal(self):
        """Ends the session if a signal asked for it."""

    def video_path(self) -> Path:
        """Where the video of an evaluation goes."""
        return self.video_file

    @contextlib.contextmanager
    def evaluation(self, fps: int = 30):
        """What an evaluation shows: gives a Watch. fps: of its video."""
        video = Video(self.video_path(), fps) if self.args.capture_video else None
        with contextlib.closing(Watch(self, video)) as watch:
            try:
                yield watch
            except RunError as error:
                raise type(error)(f"in an evaluation: {error}") from error.__cause__


def terminate(signum: int, _frame):
    """Ends a session so that its environments, with their processes, are closed."""
    raise SystemExit(128 + signum)


class Watch:
    """Sees each step of an evaluation: shows it, films it, and may end it."""

    def __init__(self, session: Session, video: Video | None):
        self.session, self.video, self.progress = session, video, SlowProgress()

    def step(self, text: str):
        """Before each step; text says how far the evaluation is."""
        self.session.check_signal()
        self.progress.show(text)

    def film(self, env):
        """Films an environment, with --capture-video."""
        if self.video:
            self.video.film(env)

    def close(self):
        if self.video:
            self.video.close()


class Run(Session):
    """One training run.

    A script calls `start`, goes over `steps` and ends each with `log` and `end_step`.
    program: the script's name; launcher, words: the command line and its options.
    """

    def __init__(
        self,
        args: RunArgs,
        program: str,
        launcher: list[str],
        words: list[str],
        checkpoint: dict | None,
    ):
        if checkpoint and "description" not in checkpoint:
            path = checkpoint["path"]
            raise UsageError(f"--resume: {path} holds a policy, not a checkpoint")
        super().__init__(args, choose_device(args.cuda), args.compile)
        self.program, self.launcher, self.checkpoint = program, launcher, checkpoint
        self.folder = checkpoint["path"].parent if checkpoint else run_folder(args)
        self.description = {
            "script": f"{program}.py",
            "command": shlex.join([*launcher, *words]),
            "compiled": self.compile.enabled,
            "args": dataclasses.asdict(args),
            **describe_machine(self.device),
        }
        self.step, self.evaluated_step, self.saved_step = 0, 0, None
        self.received = None  # a signal
        self.shown = {"train": math.nan, "eval": math.nan}
        self.logger = None

    # --- Beginning --------------------------------------------------------------------
    def start(self, policy: dict, rng: np.random.Generator, sizes: list[int], **parts):
        """Opens folder and log; restores the checkpoint, if there is one.

        policy: what a saved policy holds; parts: what a checkpoint holds besides. Both,
        by name, are lists of tensors or have state_dict and load_state_dict.
        sizes: of the environment, kept with each file.
        """
        self.policy, self.rng, self.sizes, self.parts = policy, rng, sizes, parts
        if self.checkpoint:
            self._check_resumed(self.checkpoint)
        self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
        about = self.folder / "args.json"
        self.closing(lock(about, wait=False))
        about.write_text(json.dumps(self.description, indent=2) + "\n")
        logger = Logger(self.args, self.folder, self.description, self.checkpoint)
        self.logger = self.closing(logger)
        if self.checkpoint:
            self._restore(self.checkpoint)
            self.saved_step = self.step
            self.checkpoint.clear()  # it holds all parts a second time
        place = f"{self.args.env_id} on {self.description['device']}"
        say(f"{place}, files in {self.folder}")
        starts = getattr(self.args, "learning_starts", 0)
        total = self.args.total_timesteps
        if starts >= total:
            say(f"warning: --learning-starts {starts}: all {total} steps are random")

    def _check_resumed(self, checkpoint: dict):
        """Raises: UsageError if nothing is to do, or for what another command began.

        Says where results may differ.
        """
        check_sizes(checkpoint, self.sizes, self.args.env_id)
        before, now = checkpoint["description"], self.description
        if shlex.split(before["command"])[: len(self.launcher)] != self.launcher:
            raise UsageError(f"{self.folder} was begun by: {before['command']}")
        steps = self.args.total_timesteps
        step = checkpoint["step"]
        if step > steps or (step == steps and checkpoint["finished"]):
            done = f"{self.folder} is already at step {step}"
            raise UsageError(f"{done}: raise --total-timesteps to train it further")
        changed = {name for name in before if before[name] != now.get(name)}
        if changed := changed - {"args", "command"}:
            names = ", ".join(sorted(changed))
            say(f"warning: other {names} than before: not bit for bit the same run")
        now["command"] = before["command"]
        if steps != before["args"]["total_timesteps"]:
            now["command"] += f" --total-timesteps {steps}"

    def _restore(self, content: dict):
        self.step, self.shown = content["step"], content["shown"]
        self.evaluated_step = content["evaluated_step"]
        self.rng.bit_generator.state = content["rng"]
        torch.set_rng_state(content["torch_rng"])
        if len(content["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["cuda_rng"])
        # last: a part may go back to an earlier moment
        for name, part in self.parts.items():
            if not fits(part, content[name]):
                raise other_version(content)
            set_state(part, content[name])

    # --- Each step --------------------------------------------------------------------
    def steps(self):
        """The numbers of the steps to take. A signal ends the run after a step."""
        self._receive_signals()
        while self.step < self.args.total_timesteps:
            yield self.step
        self.logger.refresh()

    def _receive_signals(self):
        if threading.current_thread() is not threading.main_thread():
            say("note: not the main thread: signals don't write a checkpoint")
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._on_signal(signum, self._receive)

    def _receive(self, signum: int, _frame):
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)  # a second signal stops the run at once

    def log_episodes(self, numbers: dict[str, float]):
        """Numbers of the training episodes that this step ended."""
        name = "charts/episodic_return"
        self.shown["train"] = numbers.get(name, self.shown["train"])
        self.logger.log(self.step + 1, numbers)

    def log_episode(self, episode: dict[str, float]):
        """The training episode that this step ended: Gymnasium's info["episode"]."""
        self.log_episodes(
            {
                "charts/episodic_return": episode["r"],
                "charts/episodic_length": episode["l"],
            }
        )

    def log(self, numbers: dict[str, float], num_envs: int | None = None):
        """Numbers of this step, all checked, written every --log-frequency steps.

        num_envs: environments that each step steps. Raises: RunError.
        """
        step = self.step + 1
        for name, value in numbers.items():
            if not math.isfinite(value):
                text = f"the update at step {self.step} gave {name} = {value}"
                raise RunError(f"{text}; try a smaller learning rate")
        if self.due_to_log():
            speed = {"charts/SPS": self.logger.speed(step)}
            if num_envs:
                speed["charts/env_SPS"] = speed["charts/SPS"] * num_envs
            self.logger.log(step, speed | numbers)

    def due_to_log(self) -> bool:
        """Whether this step's numbers are written."""
        step = self.step + 1
        return step % self.args.log_frequency == 0 or step == self.args.total_timesteps

    def end_step(self):
        """Shows progress, writes a checkpoint when it is due, ends after a signal."""
        self.step += 1
        self.logger.show(self.step, self.shown)
        frequency = self.args.checkpoint_frequency
        last = self.step == self.args.total_timesteps
        if frequency and self.step % frequency == 0 and not last:
            self._save_checkpoint()
        self.check_signal()

    def check_signal(self):
        if not self.received:
            return
        self._save_checkpoint()
        say(f"stopped at step {self.step}; go on with: {self.again('--resume')}")
        raise SystemExit(128 + self.received)

    def pause(self, seconds: float):
        if self.logger:
            self.logger.pause(seconds)

    # --- Evaluations ------------------------------------------------------------------
    def video_path(self) -> Path:
        return self.folder / "videos" / f"{self._moment()}.mp4"

    def due(self, frequency: int) -> bool:
        """Whether an evaluation is due before the coming step."""
        return self.step % frequency == 0 and self.step != self.evaluated_step

    def log_evaluation(self, returns: list[float], lengths: list[int]):
        """Writes the results of an evaluation, and with --keep-policies the policy."""
        self.evaluated_step = self.step
        if not returns:
            return
        self.shown["eval"] = float(np.mean(returns))
        numbers = {
            "eval/return_mean": self.shown["eval"],
            "eval/return_std": float(np.std(returns)),
            "eval/length_mean": float(np.mean(lengths)),
        }
        numbers |= {f"eval/return_{i}": value for i, value in enumerate(returns)}
        self.logger.log(self.step, numbers)
        if self.args.keep_policies:
            self._save(f"policies/{self._moment()}.pt")

    def _moment(self) -> str:
        return f"step-{self.step:09d}"

    # --- Saving -----------------------------------------------------------------------
    def finish(self):
        """Saves the result and says what can be done with it."""
        self._save("policy_final.pt")
        self._save_checkpoint(finished=True)
        self.logger.refresh()
        done = f"finished: {self.step} steps"
        if math.isfinite(self.shown["eval"]):
            done += f", last evaluation {self.shown['eval']:.1f}"
        curves = shlex.join(["tensorboard", "--logdir", str(self.folder.parent)])
        play = f"play it with {self.again('--evaluate')} (--capture-video films it)"
        say(f"{done}; {play}; curves: {curves}")

    def again(self, option: str) -> str:
        """The command that takes this run up."""
        return shlex.join([*self.launcher, option, str(self.folder)])

    def describe_checkpoint(self) -> str:
        """What is left of a run that failed."""
        if self.saved_step is None:
            return "there is no checkpoint yet"
        saved = f"the last checkpoint is intact (step {self.saved_step})"
        return f"{saved}, go on with: {self.again('--resume')}"

    def _save(self, name: str, **more):
        """Saves the policy, and what a checkpoint holds beside it."""
        args = dataclasses.asdict(dataclasses.replace(self.args, resume=None))
        content = {"args": args, "sizes": self.sizes, "step": self.step}
        content |= {name: get_state(part) for name, part in self.policy.items()}
        save_file(self.folder / name, content | more, self.program)

    def _save_checkpoint(self, finished: bool = False):
        parts = {name: get_state(part) for name, part in self.parts.items()}
        self._save(
            "checkpoint.pt",
            finished=finished,
            evaluated_step=self.evaluated_step,
            description=self.description,
            shown=self.shown,
            rng=self.rng.bit_generator.state,
            torch_rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state_all(),
            **self.logger.state_dict(),
            **parts,
        )
        self.saved_step = self.step


def get_state(part):
    """A part's state, or copies of a list of tensors."""
    if isinstance(part, list):
        return [tensor.cpu() for tensor in part]
    return part.state_dict()


def set_state(part, state):
    """The reverse of `get_state`."""
    if isinstance(part, list):
        for tensor, value in zip(part, state, strict=True):
            tensor.copy_(value)
    else:
        part.load_state_dict(state)


def fits(part, state) -> bool:
    """Whether a list of tensors has the shapes of the saved one."""
    if not isinstance(part, list):
        return True
    return [tensor.shape for tensor in part] == [value.shape for value in state]


# --- Folders and locks ----------------------------------------------------------------
def run_folder(args: RunArgs) -> Path:
    """Env__experiment__seed__time; `--resume auto`: a digest of what defines a run."""
    tag = str(int(time.time()))
    if args.resume == "auto":
        defining = json.dumps(args.fixed(args.resume_may_change)).encode()
        tag = hashlib.sha256(defining).hexdigest()[:10]
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{tag}"
    return Path(args.runs_dir, re.sub(r"[^\w.-]", "_", name))


def lock(file: Path, wait: bool):
    """Opens a file that no other process locks as long as it is open.

    Waits for another process that trains this run, or refuses. Raises: UsageError.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    locked = open(file, "a")
    if fcntl is None:
        return locked
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            locked.close()
            raise UsageError(f"another process trains {file.parent}") from None
        say("waiting for another process that trains this run")
        fcntl.flock(locked, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems lock nothing
        text = f"can't lock {file} ({error.strerror})"
        say(f"note: {text}: don't train this run in two processes at once")
    return locked


# --- The command line -----------------------------------------------------------------
def evaluate_policy(args: RunArgs, saved: dict, evaluate_saved):
    """`--evaluate PATH`: plays a saved policy and prints each episode's return."""
    if args.eval_episodes == 0:
        raise UsageError("--evaluate: no episode to play: give --eval-episodes")
    file, step = saved["path"], saved["step"]
    video = file.parent / "videos" / f"evaluate-{file.stem}-seed{args.seed}.mp4"
    with Session(args, choose_device(args.cuda), video_file=video) as session:
        returns, lengths = evaluate_saved(args, saved, session)
    for i, (total, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {total:.2f}, length {length}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    what = f"{len(returns)} {mode} episodes of {file} (step {step}) on {args.env_id}"
    print(f"{what}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    if args.capture_video:
        print(f"video of episode 0: {video}")


def train_run(run: Run, train):
    """Trains to the end. What fails is said together with what can be done then."""
    try:
        train(run.args, run)
        run.finish()
    except (RunError, OSError) as error:
        kind = type(error) if isinstance(error, RunError) else RunError
        text = f"{error}; {run.describe_checkpoint()}"
        raise kind(text) from error.__cause__


def run_command(Args, train, evaluate_saved, launcher: list[str] | None, argv):
    """Carries out a command line: evaluates a policy, or trains."""
    module = sys.modules[train.__module__]
    program = Path(module.__file__).stem
    description = module.__doc__.split("\n\n    ")[0]
    args, saved = parse_args(Args, program, description, argv)
    configure_process(args.torch_threads)
    if args.evaluate is not None:
        return evaluate_policy(args, saved, evaluate_saved)
    if args.resume == "auto":
        folder = run_folder(args)
        # held until the command ends
        waited = lock(folder.parent / ".locks" / folder.name, wait=True)  # noqa: F841
        final = folder / "policy_final.pt"
        if final.exists():
            step = load_file("--resume", final, program)["step"]
            if step >= args.total_timesteps:
                print(f"{folder} is finished: {args.total_timesteps} steps")
                return
        # a folder without either belongs to a run that starts, anew or again
        if final.exists() or (folder / "checkpoint.pt").exists():
            saved = load_file("--resume", folder, program)
    launcher = launcher or ["python", f"{program}.py"]
    words = sys.argv[1:] if argv is None else argv
    with Run(args, program, launcher, words, saved) as run:
        train_run(run, train)


def main(
    Args,
    train,
    evaluate_saved,
    argv: list[str] | None = None,
    launcher: list[str] | None = None,
) -> int:
    """A script's command line; the exit code.

    train(args, run) trains; evaluate_saved(args, saved, session) gives the returns
    and the lengths of episodes with a saved policy. launcher: how the command line
    begins, where that isn't `python SCRIPT.py`.
    """
    try:
        run_command(Args, train, evaluate_saved, launcher, argv)
        print(end="", flush=True)  # so that a reader that stopped is noticed here
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return explain(error)
    return 0


def explain(error: Exception) -> int:
    """One sentence about what went wrong; the exit code. Raises what isn't foreseen."""
    if isinstance(error, UserCodeError):
        traceback.print_exception(error.__cause__)
    if is_memory_error(error):
        error = RunError(f"not enough memory: {error}")
    if not isinstance(error, UsageError | RunError | OSError):
        raise error
    sentence = f"error: {error}".partition("\n")[0]
    print(sentence, file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
