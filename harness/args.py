"""Options that all scripts have, and reading a command line."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from harness.files import UsageError, find_checkpoint, find_policy, load_file


@dataclass
class RunArgs:
    # Experiment
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id; flat observation, bounded continuous action; `module:Env-v0` imports module"""
    exp_name: str = "experiment"
    """name of the experiment, a part of the run name"""
    seed: int = 1
    """seed of networks, exploration, replay, training and evaluation episodes"""
    total_timesteps: int = 1_000_000
    """steps in all"""
    resume: str | None = None
    """run folder or checkpoint to continue exactly; its own settings become the defaults.
    auto: the run of these options, finished, continued or started as needed"""
    evaluate: str | None = None
    """run folder, checkpoint or policy to play instead of training; prints each return"""

    # Evaluation and logging
    eval_frequency: int = 10_000
    """steps between evaluations (the last step is always evaluated)"""
    eval_episodes: int = 10
    """episodes per evaluation, in separate environments, with fresh seeds derived from --seed"""
    deterministic_eval: bool = True
    """evaluate the deterministic action; --no-deterministic-eval draws from the policy"""
    log_frequency: int = 1_000
    """steps between rows of losses and speed in metrics.csv"""
    checkpoint_frequency: int = 50_000
    """steps between checkpoints (0: only when interrupted and at the end)"""
    keep_policies: bool = False
    """keep the policy of every evaluation in the run's policies/"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    capture_video: bool = False
    """write an mp4 of the first episode of each evaluation to the run's videos/"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "meow"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""

    # Hardware and speed
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads; networks this small gain little from a second and nothing from more"""
    compile: bool = True
    """compile acting and update (a minute, then cached; needs g++ on CPU); equal up to rounding"""

    settings: ClassVar[dict[str, dict]] = {}
    """defaults of these environments: a pattern of ids, then option and value"""
    resume_may_change: ClassVar[str] = (
        "resume total_timesteps checkpoint_frequency keep_policies capture_video track "
        "wandb_project_name wandb_entity runs_dir cuda torch_threads compile"
    )
    evaluate_may_change: ClassVar[str] = (
        "evaluate seed eval_episodes deterministic_eval capture_video runs_dir torch_threads"
    )

    def __post_init__(self):
        counts = "total_timesteps eval_frequency eval_episodes log_frequency torch_threads"
        self.check(counts, lambda x: x >= 1, "at least 1")
        self.check("seed checkpoint_frequency", lambda x: 0 <= x < 2**32, "from 0 to 2^32 - 1")
        if self.resume and self.evaluate:
            raise ValueError("--resume and --evaluate exclude each other")

    def check(self, names: str, valid, allowed: str):
        """Raises: ValueError for the first of these options whose value is not valid."""
        for name in names.split():
            value = getattr(self, name)
            if not (math.isfinite(value) and valid(value)):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {allowed}")

    @classmethod
    def for_env(cls, env_id: str):
        """The defaults of this environment."""
        known = (s for pattern, s in cls.settings.items() if re.fullmatch(pattern, env_id))
        return cls(env_id=env_id, **next(known, {}))

    def conflicts(self, saved: "RunArgs", may_change: str) -> list[str]:
        """What differs from saved settings though it may not, e.g. "--tau 0.01 (saved: 0.005)"."""
        asked, stored = dataclasses.asdict(self), dataclasses.asdict(saved)
        changed = [k for k in asked if asked[k] != stored[k] and k not in may_change.split()]
        return [f"--{k.replace('_', '-')} {asked[k]} (saved: {stored[k]})" for k in changed]


@dataclass
class Given:
    """The options that set the defaults of all others."""

    env_id: str | None = None
    resume: str | None = None
    evaluate: str | None = None


def parse_args(Args, program: str, description: str, argv=None) -> tuple[RunArgs, dict | None]:
    """The settings, and the content of the file that --resume or --evaluate names.

    Raises: UsageError, RunError; SystemExit after --help and where tyro explains a mistake.
    """
    try:
        peek = dict(args=argv, return_unknown_args=True, add_help=False, console_outputs=False)
        given = tyro.cli(Given, **peek)[0]
    except SystemExit:  # an option without its value: tyro explains it below
        given = Given()
    saved = content = None
    if given.evaluate or given.resume not in (None, "auto"):
        file = find_policy(given.evaluate) if given.evaluate else find_checkpoint(given.resume)
        content = load_file(file, program)
        saved = saved_args(Args, content["args"], file)
    try:
        default = saved or Args.for_env(given.env_id or Args.env_id)
        args = tyro.cli(Args, default=default, description=description, args=argv)
    except ValueError as error:
        raise UsageError(error) from None
    may_change = Args.evaluate_may_change if given.evaluate else Args.resume_may_change
    if saved and (conflicts := args.conflicts(saved, may_change)):
        text = f"{file} was made with other settings: {', '.join(conflicts)}"
        raise UsageError(f"{text}. Leave these options out.")
    return args, content


def saved_args(Args, settings: dict, path: Path) -> RunArgs:
    """The settings of a saved run. Raises: UsageError if this version doesn't know them."""
    try:
        return Args(**settings)
    except (TypeError, ValueError) as error:
        text = f"{path} holds settings that this version doesn't know: {error}"
        raise UsageError(text) from None
