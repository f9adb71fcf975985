"""Options that all scripts have, and reading a command line."""

import contextlib
import dataclasses
import io
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import tyro

from harness.files import POLICY_FILES, UsageError, load_file


@dataclass
class RunArgs:
    # Experiment
    env_id: str = (
        "HalfCheetah-v4"  # Gymnasium id; `module:Env-v0` imports the module first
    )
    exp_name: str = "experiment"  # name of the experiment, a part of the run's name
    seed: int = 1  # of networks, exploration, replay, training and evaluation episodes
    total_timesteps: int = 1_000_000  # steps in all
    resume: str | None = (
        None  # run to continue exactly; auto: go on, start or do nothing as needed
    )
    evaluate: str | None = (
        None  # run or policy to play instead of training; prints each return
    )

    # Evaluation and logging
    eval_frequency: int = (
        10_000  # steps between evaluations (the last step is always evaluated)
    )
    eval_episodes: int = (
        10  # per evaluation, in separate environments, each time with fresh seeds
    )
    deterministic_eval: bool = (
        True  # evaluate the deterministic action, else draw from the policy
    )
    log_frequency: int = 1_000  # steps between rows of losses and speed in metrics.csv
    checkpoint_frequency: int = (
        50_000  # steps between checkpoints (0: only at a stop and the end)
    )
    keep_policies: bool = (
        False  # keep the policy of every evaluation in the run's policies/
    )
    runs_dir: str = "runs"  # folder that holds the run folders
    capture_video: bool = (
        False  # mp4 of each evaluation's first episode in the run's videos/
    )
    track: bool = (
        False  # log to Weights & Biases too (WANDB_MODE=offline needs no network)
    )
    wandb_project_name: str = "meow"  # W&B project
    wandb_entity: str | None = None  # W&B team or user

    # Hardware and speed
    cuda: bool = True  # use the GPU if there is one
    torch_threads: int = 1  # CPU threads; networks this small gain little from a second
    compile: bool = (
        True  # compile acting and update (a minute, then cached); equal up to rounding
    )

    settings: ClassVar[
        dict[str, dict]
    ] = {}  # defaults of environments, by a pattern of ids
    resume_may_change: ClassVar[str] = (  # what may differ from a saved run's
        "resume total_timesteps checkpoint_frequency keep_policies capture_video track "
        "wandb_project_name wandb_entity runs_dir cuda torch_threads compile"
    )
    evaluate_may_change: ClassVar[str] = (
        "evaluate seed eval_episodes deterministic_eval capture_video runs_dir torch_threads"
    )

    def __post_init__(self):
        counts = (
            "total_timesteps eval_frequency eval_episodes log_frequency torch_threads"
        )
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check(
            "seed checkpoint_frequency", lambda x: 0 <= x < 2**32, "from 0 to 2^32 - 1"
        )
        if self.resume and self.evaluate:
            raise ValueError("--resume and --evaluate exclude each other")

    def check(self, names: str, valid, allowed: str):
        """Raises: ValueError for the first of these options whose value is not valid."""
        for name in names.split():
            value = getattr(self, name)
            if not (math.isfinite(value) and valid(value)):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: must be {allowed}"
                )

    @classmethod
    def for_env(cls, env_id: str):
        """The defaults of this environment."""
        known = (
            s for pattern, s in cls.settings.items() if re.fullmatch(pattern, env_id)
        )
        return cls(env_id=env_id, **next(known, {}))

    def fixed(self, may_change: str) -> dict:
        """The options without those that may change."""
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k not in may_change.split()
        }


def parse_args(
    Args, program: str, description: str, argv=None
) -> tuple[RunArgs, dict | None]:
    """The settings, and the file that --resume or --evaluate named. Raises UsageError, RunError."""
    saved, given = (
        None,
        RunArgs(env_id=Args.env_id),
    )  # given: what decides the other defaults
    peek = dict(
        args=argv, return_unknown_args=True, add_help=False, console_outputs=False
    )
    try:
        # a mistake is explained below, by the parser of all options
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            given = tyro.cli(RunArgs, default=given, **peek)[0]
        if given.evaluate is not None:
            saved = load_file("--evaluate", given.evaluate, program, POLICY_FILES)
        elif given.resume not in (None, "auto"):
            saved = load_file("--resume", given.resume, program)
        default = Args(**saved["args"]) if saved else Args.for_env(given.env_id)
        args = tyro.cli(Args, default=default, description=description, args=argv)
    except TypeError as error:
        raise UsageError(f"{saved['path']} is of another version: {error}") from None
    except ValueError as error:
        raise UsageError(error) from None
    may_change = Args.evaluate_may_change if given.evaluate else Args.resume_may_change
    asked, made = args.fixed(may_change), default.fixed(may_change)
    if saved and asked != made:
        other = [
            f"--{k.replace('_', '-')} {made[k]}" for k in asked if asked[k] != made[k]
        ]
        raise UsageError(
            f"{saved['path']} was made with other settings: {' '.join(other)}"
        )
    return args, saved
