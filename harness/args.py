"""The options of every run, and reading a command line."""

import contextlib
import dataclasses
import io
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import tyro

from harness.environments import full_id
from harness.errors import UsageError, say
from harness.files import POLICY_FILES, load_file


@dataclass
class RunArgs:
    # Experiment
    env_id: str = "HalfCheetah-v4"  # Gymnasium id; `module:Env-v0` imports the module
    exp_name: str = "experiment"  # name of the experiment, a part of the run's name
    seed: int = 1  # of all random numbers: networks, exploration, episodes
    total_timesteps: int = 1_000_000  # steps in all
    resume: str | None = None  # run to go on with; auto: start, go on, or do nothing
    evaluate: str | None = None  # run or policy to play instead of training

    # Files and log
    log_frequency: int = 1_000  # steps between rows of losses and speed in metrics.csv
    checkpoint_frequency: int = 50_000  # steps between checkpoints (0: only at the end)
    keep_policies: bool = False  # keep each evaluation's policy in the run's policies/
    runs_dir: str = "runs"  # folder that holds the run folders
    capture_video: bool = False  # mp4 of each evaluation's first episode, in videos/
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline: no network)
    wandb_project_name: str = "meow"  # W&B project
    wandb_entity: str | None = None  # W&B team or user

    # Hardware and speed
    cuda: bool = True  # use the GPU if there is one
    torch_threads: int = 1  # CPU threads; networks this small gain little from a second
    compile: bool = True  # compile acting and update (a minute, then cached)

    settings: ClassVar[dict[str, dict]] = {}
    """defaults of environments, by a pattern of ids"""
    settings_name: ClassVar[str] = "the paper's settings"
    """what these are"""
    gymnasium_ids: ClassVar[bool] = True
    """--env-id names an environment of Gymnasium's registry"""
    resume_may_change: ClassVar[str] = (
        "resume total_timesteps checkpoint_frequency keep_policies capture_video track "
        "wandb_project_name wandb_entity runs_dir cuda torch_threads compile"
    )
    evaluate_may_change: ClassVar[str] = (
        "evaluate seed capture_video runs_dir cuda torch_threads compile"
    )

    def __post_init__(self):
        counts = "total_timesteps log_frequency torch_threads"
        self.check(counts, lambda x: x >= 1, "at least 1")
        numbers = "seed checkpoint_frequency"
        self.check(numbers, lambda x: 0 <= x < 2**32, "from 0 to 2^32 - 1")
        if self.resume and self.evaluate:
            raise ValueError("--resume and --evaluate exclude each other")

    def check(self, names: str, valid, allowed: str):
        """Raises: ValueError for the first of these options whose value isn't valid."""
        for name in names.split():
            value = getattr(self, name)
            if not (math.isfinite(value) and valid(value)):
                raise ValueError(f"{option(name)} {value}: must be {allowed}")

    @classmethod
    def own_settings(cls, env_id: str) -> dict:
        """The settings of this environment; empty if it has none."""
        known = (
            s for pattern, s in cls.settings.items() if re.fullmatch(pattern, env_id)
        )
        return next(known, {})

    @classmethod
    def for_env(cls, env_id: str):
        """The defaults of this environment."""
        return cls(env_id=env_id, **cls.own_settings(env_id))

    def fixed(self, may_change: str) -> dict:
        """The options without those that may change."""
        options = dataclasses.asdict(self).items()
        return {
            name: value for name, value in options if name not in may_change.split()
        }


def option(name: str) -> str:
    """The command line's name of an option."""
    return "--" + name.replace("_", "-")


def words(name: str, value) -> str:
    """An option with its value, as the command line has it."""
    if isinstance(value, bool):
        return option(name if value else f"no_{name}")
    return f"{option(name)} {value}"


def parse_args(Args, program: str, description: str, argv=None):
    """The settings (Args), and the file that --resume or --evaluate named, if any.

    Raises: UsageError, RunError.
    """
    try:
        given = peek(Args, argv)
        saved = load_named_file(given, program)
        if saved:
            if given.resume:
                check_options(Args, saved)
            default = Args(**saved["args"])
        else:
            default = Args.for_env(given.env_id)
        args = tyro.cli(Args, default=default, description=description, args=argv)
    except TypeError as error:
        raise UsageError(f"{saved['path']} is of another version: {error}") from None
    except ValueError as error:
        raise UsageError(error) from None
    if saved:
        may_change = (
            Args.evaluate_may_change if given.evaluate else Args.resume_may_change
        )
        check_unchanged(args, default, may_change, saved["path"])
    else:
        args.env_id = given.env_id
    return args, saved


def peek(Args, argv) -> RunArgs:
    """The options that decide the others' defaults: --env-id, --resume, --evaluate.

    A mistake in the command line is left to the parser of all options.
    """
    given = RunArgs(env_id=Args.env_id)
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        given, _ = tyro.cli(
            RunArgs,
            default=given,
            args=argv,
            return_unknown_args=True,
            add_help=False,
            console_outputs=False,
        )
    if Args.gymnasium_ids and (full := full_id(given.env_id)) != given.env_id:
        kind = "the default settings"
        if Args.own_settings(full):
            kind = Args.settings_name
        say(f"note: --env-id {given.env_id} is taken as {full}, with {kind}")
        given.env_id = full
    return given


def load_named_file(given: RunArgs, program: str) -> dict | None:
    """The file that --evaluate or --resume names."""
    if given.evaluate is not None:
        return load_file("--evaluate", given.evaluate, program, POLICY_FILES)
    if given.resume not in (None, "auto"):
        return load_file("--resume", given.resume, program)
    return None


def check_options(Args, saved: dict):
    """Raises: UsageError if a run to go on with was begun without some option."""
    names = {field.name for field in dataclasses.fields(Args)}
    if lacking := sorted(names - saved["args"].keys()):
        lacks = " ".join(option(name) for name in lacking)
        begun = f"{saved['path']} was begun by an earlier version, without {lacks}"
        raise UsageError(f"{begun}: go on with that commit, which its args.json names")


def check_unchanged(args: RunArgs, made: RunArgs, may_change: str, path):
    """Raises: UsageError if the command asks for other settings than the file's."""
    asked, made = args.fixed(may_change), made.fixed(may_change)
    other = [words(k, made[k]) for k in asked if asked[k] != made[k]]
    if other:
        raise UsageError(f"{path} was made with other settings: {' '.join(other)}")
