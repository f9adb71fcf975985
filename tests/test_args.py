"""Options: defaults per environment, checks, help, and the pages' commands."""

import argparse
import dataclasses
import importlib
import io
import itertools
import math
import re
import runpy
import shlex
import sys
import typing
from contextlib import redirect_stdout
from unittest import mock

import pytest
import tyro
from conftest import ISAAC_SCRIPTS, ROOT, SCRIPT, SCRIPTS, each_script

from harness.args import parse_args
from harness.errors import UsageError
from meow_continuous_action import Args

PAPER_TABLE = {  # steps, tau, alpha, learning starts, log sigma max, log sigma min
    "Hopper": (1_500_000, 0.005, 0.25, 5_000, -0.3, -5),
    "HalfCheetah": (1_500_000, 0.003, 0.25, 10_000, 2.0, -5),
    "Walker2d": (4_000_000, 0.005, 0.1, 10_000, -0.3, -5),
    "Ant": (4_000_000, 0.0001, 0.05, 5_000, -0.3, -5),
    "Humanoid": (5_000_000, 0.0005, 0.125, 5_000, -0.3, -5),
}
ALL_SCRIPTS = SCRIPTS + ISAAC_SCRIPTS
each = pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda path: path.stem)
BELOW_ZERO = {"log_sigma_min", "log_sigma_max", "target_entropy"}
ZERO = {
    "seed",
    "eval_episodes",
    "recent_size",
    "target_entropy",
    "checkpoint_frequency",
    "gamma",
    "dropout",
    "log_sigma_min",
    "log_sigma_max",
}


def options_of(script):
    return importlib.import_module(script.stem).Args


def parse(*words, script=SCRIPT):
    return parse_args(
        options_of(script), script.stem, "", [str(word) for word in words]
    )[0]


# --- Defaults -----------------------------------------------------------------------
@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("name", PAPER_TABLE)
def test_paper_settings_are_the_defaults(name, version):
    args = parse("--env-id", f"{name}-{version}")
    columns = (
        "total_timesteps tau alpha learning_starts log_sigma_max log_sigma_min".split()
    )
    assert tuple(getattr(args, c) for c in columns) == PAPER_TABLE[name]
    common = (
        args.learning_rate,
        args.max_grad_norm,
        args.batch_size,
        args.buffer_size,
        args.gamma,
    )
    assert common == (1e-3, 30, 256, 1_000_000, 0.99)
    for script in SCRIPTS[1:]:  # the baselines train as long
        baseline = parse("--env-id", f"{name}-{version}", script=script)
        assert baseline.total_timesteps == PAPER_TABLE[name][0]


@each_script
def test_multi_goal_settings_are_the_defaults(script):
    args = parse("--env-id", "multi_goal:MultiGoal-v0", script=script)
    assert (args.total_timesteps, args.learning_starts, args.gamma) == (
        4_000,
        1_000,
        0.9,
    )


@pytest.mark.parametrize(
    "spelling", [["--env-id", "Ant-v4"], ["--env-id=Ant-v4"], ["--env_id", "Ant-v4"]]
)
def test_options_override_the_papers_settings(spelling):
    for words in (
        [*spelling, "--tau", 0.5, "--seed", 7],
        ["--tau=0.5", "--seed", 7, *spelling],
    ):
        args = parse(*words)
        assert (args.env_id, args.tau, args.seed, args.alpha) == (
            "Ant-v4",
            0.5,
            7,
            0.05,
        )


def test_an_id_without_version_gets_the_settings_of_the_newest(capsys):
    args = parse("--env-id", "HalfCheetah")
    assert args == parse("--env-id", "HalfCheetah-v5")
    assert args.tau == 0.003
    note = "note: --env-id HalfCheetah is taken as HalfCheetah-v5, with the paper's s"
    assert note in capsys.readouterr().err
    assert parse("--env-id", "Pusher", "--tau", 0.5).env_id == "Pusher-v5"
    assert "Pusher-v5, with the default settings" in capsys.readouterr().err


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "my/Ant-v4", "Ant-v40", "Ant-v3"])
def test_other_environments_get_general_defaults(env_id):
    assert parse("--env-id", env_id) == Args(env_id=env_id)


def test_cleanrls_settings_are_sacs_defaults():
    args = options_of(SCRIPTS[1])()
    assert (args.policy_lr, args.q_lr, args.tau, args.gamma) == (
        3e-4,
        1e-3,
        0.005,
        0.99,
    )
    assert (args.batch_size, args.buffer_size, args.learning_starts) == (
        256,
        1_000_000,
        5_000,
    )
    assert (args.policy_frequency, args.autotune, args.reward_shifting) == (
        2,
        True,
        "none",
    )


# --- Help ---------------------------------------------------------------------------
def test_help_shows_the_environments_values():
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
        parse("--env-id", "Ant-v4", "--help")
    text = re.sub(r"[\s│]+", " ", out.getvalue())
    assert stopped.value.code == 0
    assert re.search(r"--tau FLOAT .{0,120}\(default: 0\.0001\)", text)
    assert re.search(r"--total-timesteps INT .{0,120}\(default: 4000000\)", text)


@each
def test_help_gives_every_option_its_type_text_and_default(script):
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        parse("--help", script=script)
    text = re.sub(r"[\s│]+", " ", out.getvalue())
    types = typing.get_type_hints(options_of(script))
    for field in dataclasses.fields(options_of(script)):
        flag = "--" + field.name.replace("_", "-")
        shown = {int: " INT", float: " FLOAT", str: " STR", bool: f", --no-{flag[2:]}"}
        shown |= {str | None: r" {None}|STR", int | None: r" {None}|INT"}
        kind = types[field.name]
        suffix = re.escape(shown[kind]) if kind in shown else r" \{.+?\}"
        assert re.search(rf"{flag}{suffix} [^(-].{{5,}}\(default: ", text), flag


# --- Impossible values --------------------------------------------------------------
def numbers_of(script):
    types = typing.get_type_hints(options_of(script))
    return [
        f.name
        for f in dataclasses.fields(options_of(script))
        if types[f.name] in (int, float)
    ]


@each
def test_numbers_that_make_no_sense_are_refused(script):
    """NaN, infinite, negative and zero; the sentence names the option."""
    defaults = options_of(script)()
    for name, value in itertools.product(
        numbers_of(script), (math.nan, math.inf, -1, 0)
    ):
        if (value == -1 and name in BELOW_ZERO) or (value == 0 and name in ZERO):
            continue
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=rf"^{flag} {value}: must be \w+"):
            dataclasses.replace(defaults, **{name: value})


IMPOSSIBLE = [
    ("meow", "gamma", "1.5"), ("meow", "tau", "2"), ("meow", "dropout", "1"),
    ("meow", "log-sigma-min", "3"), ("meow", "log-sigma-max", "-9"),
    ("meow", "log-sigma-max", "99"), ("meow", "coupling", "cubic"),
    ("meow", "reward-shifting", "triple"), ("meow", "seed", "4294967296"),
    ("meow", "seed", "one"), ("meow", "total-timesteps", "1e6"),
    ("meow", "unknown-option", "1"), ("sac", "gamma", "2"),
    ("sac", "reward-shifting", "single"), ("sac", "log-sigma-min", "1"),
    ("sql", "tau", "1.1"), ("sql", "kernel-particles", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), IMPOSSIBLE)
def test_values_out_of_range_are_refused(name, option, value, capsys):
    script = ROOT / f"{name}_continuous_action.py"
    with pytest.raises((UsageError, SystemExit)) as refused:
        parse(f"--{option}", value, script=script)
    text = capsys.readouterr()
    assert option in f"{refused.value}{text.err}{text.out}"
    assert refused.type is UsageError or refused.value.code == 2


def test_resume_and_evaluate_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        parse("--resume", "a", "--evaluate", "b")
    assert "--resume and --evaluate exclude each other" in capsys.readouterr().err


# --- Pages and scripts --------------------------------------------------------------
def commands():
    """Each `python FILE.py ...` in a bash block of a page: (file name, its words).

    Files are named from here or from the page's folder. Blocks that begin with
    `git worktree` are of an earlier commit.
    """
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "studies").rglob("*.md")),
    ]
    found = []
    for page in filter(lambda page: page.is_file(), pages):
        folder = page.parent.relative_to(ROOT)
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
        for language, block in blocks:
            if language not in ("", "bash") or block.startswith("git worktree"):
                continue
            lines = re.sub(
                r"\\\n", " ", re.sub(r"\$\{?algo\}?", "meow", block)
            ).splitlines()
            for line in lines:
                for part in re.split(r"&&|\|\||[;|>]", re.sub(r"(^|\s)#.*", "", line)):
                    if match := re.search(r"\bpython3? (\S+\.py)\b(.*)", part):
                        words = re.sub(r"\$\{?\w+\}?|\{\d?\}", "1", match[2])
                        here = (ROOT / match[1]).is_file()
                        file = match[1] if here else str(folder / match[1])
                        found.append((file, shlex.split(words)))
    return found


class Parsed(BaseException):
    """A command line has been read without a complaint."""


def parses(file, words):
    """Runs a script up to the moment when its options are read."""

    def once(parser, allowed=lambda _: True):
        def parse_and_stop(*args, **kwargs):
            value = parser(*args, **kwargs)
            if allowed(kwargs):
                raise Parsed
            return value

        return parse_and_stop

    cli = once(tyro.cli, lambda kwargs: "return_unknown_args" not in kwargs)
    argument_parser = once(argparse.ArgumentParser.parse_args)
    with (
        mock.patch("sys.argv", [file, *words]),
        mock.patch("sys.path", [str((ROOT / file).parent), *sys.path]),
        mock.patch("tyro.cli", cli),
        mock.patch("argparse.ArgumentParser.parse_args", argument_parser),
        pytest.raises(Parsed),
    ):
        runpy.run_path(str(ROOT / file), run_name="__main__")


def test_commands_of_the_pages_parse():
    """The options in the pages exist and their values are allowed."""
    found = commands()
    assert {file for file, _ in found} >= {
        "meow_continuous_action.py",
        "meow_isaacgym.py",
        "studies/two_gaits/gaits.py",
    }
    for file, words in found:
        for option in {"--resume", "--evaluate"} & set(words):  # that run doesn't exist
            at = words.index(option)
            del words[at : at + 2]
        if "--help" not in words:
            parses(file, words)


def test_settings_name_options():
    """What may change on resuming and evaluating, and every setting, are options."""
    for script in ALL_SCRIPTS:
        names = {field.name for field in dataclasses.fields(options_of(script))}
        args = options_of(script)
        may_change = f"{args.resume_may_change} {args.evaluate_may_change}"
        assert set(may_change.split()) <= names
        for settings in options_of(script).settings.values():
            assert set(settings) <= names
