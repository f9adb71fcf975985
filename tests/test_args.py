"""Options: defaults per environment, checks, help, and that each one is documented and read."""

import ast
import dataclasses
import importlib
import re
from itertools import pairwise

import pytest
from conftest import ROOT, SCRIPTS

from meow_continuous_action import PAPER_SETTINGS, Args, UsageError, main, parse_args

PAPER_TABLE = {  # steps, tau, alpha, learning starts, log sigma max, log sigma min
    "Hopper": (1_500_000, 0.005, 0.25, 5_000, -0.3, -5),
    "HalfCheetah": (1_500_000, 0.003, 0.25, 10_000, 2.0, -5),
    "Walker2d": (4_000_000, 0.005, 0.1, 10_000, -0.3, -5),
    "Ant": (4_000_000, 0.0001, 0.05, 5_000, -0.3, -5),
    "Humanoid": (5_000_000, 0.0005, 0.125, 5_000, -0.3, -5),
}
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("name", PAPER_TABLE)
def test_paper_settings_are_the_defaults(name, version):
    args, _ = parse_args(["--env-id", f"{name}-{version}"])
    columns = "total_timesteps tau alpha learning_starts log_sigma_max log_sigma_min".split()
    assert tuple(getattr(args, c) for c in columns) == PAPER_TABLE[name]
    common = (args.learning_rate, args.max_grad_norm, args.batch_size, args.buffer_size, args.gamma)
    assert common == (1e-3, 30, 256, 1_000_000, 0.99)


@pytest.mark.parametrize(
    "spelling", [["--env-id", "Ant-v4"], ["--env-id=Ant-v4"], ["--env_id", "Ant-v4"]]
)
def test_flags_override_the_papers_settings(spelling):
    args, _ = parse_args([*spelling, "--tau", "0.5", "--seed", "7"])
    assert (args.env_id, args.tau, args.seed, args.alpha) == ("Ant-v4", 0.5, 7, 0.05)


def test_other_environments_get_general_defaults():
    args, _ = parse_args(["--env-id", "Pendulum-v1"])
    assert args == Args(env_id="Pendulum-v1")
    assert parse_args(["--env-id", "my/Ant-v4"])[0].tau == Args().tau
    assert set(PAPER_SETTINGS) == {*PAPER_TABLE, "multi_goal:MultiGoal"}


@each_script
def test_all_scripts_train_as_long_as_meow(script):
    """The papers' budgets and the multi-goal world's settings are the baselines' defaults too."""
    module = importlib.import_module(script.stem)
    for name, (steps, *_) in PAPER_TABLE.items():
        for version in ("v4", "v5"):
            args, _ = module.parse_args(["--env-id", f"{name}-{version}"])
            assert (args.total_timesteps, args.eval_frequency) == (steps, 10_000)
    args, _ = module.parse_args(["--env-id", "multi_goal:MultiGoal-v0"])
    assert (args.total_timesteps, args.learning_starts, args.gamma) == (4_000, 1_000, 0.9)


def test_cleanrls_settings_are_sacs_defaults():
    from sac_continuous_action import Args

    args = Args()
    assert (args.policy_lr, args.q_lr, args.tau, args.gamma) == (3e-4, 1e-3, 0.005, 0.99)
    assert (args.batch_size, args.buffer_size, args.learning_starts) == (256, 1_000_000, 5_000)
    assert (args.policy_frequency, args.autotune, args.reward_shifting) == (2, True, "none")


def test_help_shows_the_environments_values(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--env-id", "Ant-v4", "--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert stopped.value.code == 0
    assert re.search(r"--tau FLOAT .{0,120}\(default: 0\.0001\)", text)
    assert re.search(r"--total-timesteps INT .{0,120}\(default: 4000000\)", text)


IMPOSSIBLE = [
    ("total-timesteps", "0"), ("total-timesteps", "-5"), ("batch-size", "0"), ("buffer-size", "-1"),
    ("learning-starts", "0"), ("eval-frequency", "0"), ("eval-episodes", "0"),
    ("log-frequency", "0"),
    ("checkpoint-frequency", "-1"), ("seed", "-1"), ("torch-threads", "0"), ("learning-rate", "0"),
    ("learning-rate", "inf"), ("alpha", "0"), ("alpha", "nan"), ("gamma", "1.5"), ("gamma", "nan"),
    ("tau", "0"), ("tau", "2"), ("dropout", "1"), ("dropout", "-0.1"), ("max-grad-norm", "-30"),
    ("log-sigma-min", "3"), ("log-sigma-max", "-9"), ("log-sigma-max", "nan"),
    ("log-sigma-max", "99"),
    ("total-timesteps", "1e6"), ("seed", "one"), ("coupling", "cubic"),
    ("reward-shifting", "triple"),
    ("unknown-option", "1"),
]  # fmt: skip


IMPOSSIBLE = [(main, *row) for row in IMPOSSIBLE]
IMPOSSIBLE += [
    (importlib.import_module("sac_continuous_action").main, *row)
    for row in [
        ("policy-lr", "0"), ("q-lr", "-1"), ("alpha", "-1"), ("tau", "0"), ("gamma", "2"),
        ("policy-frequency", "0"), ("reward-shifting", "single"), ("log-sigma-min", "1"),
    ]
]  # fmt: skip
IMPOSSIBLE += [
    (importlib.import_module("sql_continuous_action").main, *row)
    for row in [
        ("policy-lr", "nan"), ("q-lr", "0"), ("tau", "1.1"), ("reward-scale", "0"),
        ("value-particles", "0"), ("kernel-particles", "3"), ("target-network-frequency", "0"),
        ("compose", "one"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("main", "option", "value"), IMPOSSIBLE)
def test_impossible_values_exit_with_2_and_name_the_option(main, option, value, capsys):
    try:
        code = main([f"--{option}", value])
    except SystemExit as stopped:
        code = stopped.code
    text = capsys.readouterr()
    assert code == 2
    assert option.removeprefix("log-") in text.err + text.out
    assert "Traceback" not in text.err


def test_resume_and_evaluate_exclude_each_other():
    with pytest.raises((UsageError, SystemExit)):
        parse_args(["--resume", "a", "--evaluate", "b"])


@each_script
def test_every_option_is_documented_and_read(script):
    """A docstring below each field, and each field read somewhere in the script."""
    source, options = script.read_text(), importlib.import_module(script.stem).Args
    body = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args").body
    for field, doc in pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(doc, ast.Expr), f"{field.target.id} has no docstring"
    for field in dataclasses.fields(options):
        assert re.search(rf"args\.{field.name}\b|given\.{field.name}\b", source), field.name


@each_script
def test_deviations_are_listed(script):
    """D1..Dn (SAC: S, SQL: Q): the docstring lists each tag of the code; the README MEow's."""
    source, readme = script.read_text(), (ROOT / "README.md").read_text()
    doc = ast.get_docstring(ast.parse(source))
    listed = re.findall(r"^([DSQ]\d+) ", doc, flags=re.M)
    letter = {"meow": "D", "sac_": "S", "sql_": "Q"}[script.stem[:4]]
    assert listed == [f"{letter}{i}" for i in range(1, len(listed) + 1)]
    assert re.findall(rf"^\| ({letter}\d+) \|", readme, flags=re.M) == (
        listed if letter == "D" else []
    )
    tags = set(re.findall(r"# ([DSQ]\d+)\b", source.replace(doc, "")))
    assert tags
    assert tags <= set(listed)


@each_script
def test_readme_commands_parse(script):
    """Each command of the README that runs the script has valid options."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(rf"^(?:\w+=\S+ )?python {script.name} (.*)$", readme, re.M)
    assert commands
    for command in commands:
        words = command.split("#")[0].split()
        if "--resume" in words or "--evaluate" in words:
            at = next(i for i, w in enumerate(words) if w in ("--resume", "--evaluate"))
            del words[at : at + 2]  # the run doesn't exist
        if "--help" not in words:
            importlib.import_module(script.stem).parse_args(words)


@each_script
def test_importing_has_no_side_effect(script):
    """No module-level code besides definitions and the choice of MuJoCo's renderer."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AugAssign,
        ast.Expr,
    )
    rest = [n for n in ast.parse(script.read_text()).body if not isinstance(n, allowed)]
    assert len(rest) == 2
    assert all(isinstance(n, ast.If) for n in rest)
