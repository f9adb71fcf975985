"""Shared set-up: the scripts are importable, and can be run as a user does, in this
process.
"""

import contextlib
import csv
import functools
import importlib
import io
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# it chooses MuJoCo's renderer, before MuJoCo is imported
import harness.environments  # noqa: E402

NAMES = ("meow", "sac", "sql", "meow_auto")
SCRIPTS = [ROOT / f"{name}_continuous_action.py" for name in NAMES]
SCRIPT = SCRIPTS[0]
ISAAC_SCRIPTS = [ROOT / f"{name}_isaacgym.py" for name in ("meow", "meow_auto", "sac")]
QUICK = dict(
    env_id="InvertedPendulum-v4",
    total_timesteps=60,
    learning_starts=31,
    batch_size=8,
    eval_frequency=25,
    eval_episodes=2,
    log_frequency=10,
    checkpoint_frequency=20,
    compile=False,
)
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
torch.set_num_threads(1)

ReplayableEnv = harness.environments.ReplayableEnv


def options(**values) -> list[str]:
    """The command line of these options; the value of a switch is True or False."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def quick(**changes) -> list[str]:
    """The command line of a run of 60 steps; None leaves an option out."""
    return options(**{k: v for k, v in (QUICK | changes).items() if v is not None})


def interrupting(signals: dict[int, int]):
    """A patch: this process gets signals[n] while an environment takes its step n.

    Steps are counted from 1. (Evaluations are shorter than that, in `quick` runs.)
    """
    step = ReplayableEnv.step

    def interrupted(env, action):
        if signum := signals.get(env.steps + 1):
            os.kill(os.getpid(), signum)
        return step(env, action)

    return mock.patch.object(ReplayableEnv, "step", interrupted)


def launch(script, words, cwd, signals=None, largest_file=None):
    """Carries out a command line in `cwd`, in this process; a result like subprocess's.

    signals: see `interrupting`; largest_file: bytes of a file, as on a full disk.
    """
    module, limit = (
        importlib.import_module(script.stem),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    out, err, argv = io.StringIO(), io.StringIO(), [str(word) for word in words]
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        interrupting(signals or {}),
        mock.patch("threading.excepthook", threading.__excepthook__),  # not pytest's
    ):
        try:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (largest_file or limit[0], limit[1])
            )
            code = module.main(module.Args, module.train, module.evaluate_saved, argv)
        except SystemExit as stopped:
            code = stopped.code
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return SimpleNamespace(
        returncode=code, stdout=out.getvalue(), stderr=err.getvalue()
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(script): the folder and the result of its uninterrupted run; not to be
    changed.
    """

    @functools.cache
    def finished(script):
        cwd = tmp_path_factory.mktemp(script.stem)
        result = launch(script, quick(), cwd)
        assert result.returncode == 0, result.stderr
        return only_run(cwd), result

    return finished


def start(words, cwd, **env):
    """Starts a command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **env}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, words)), cwd=cwd, env=env, **pipes)


def run(words, cwd, **env):
    """Runs a command in a process of its own."""
    process = start(words, cwd, **env)
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def only_run(cwd):
    """The run folder in cwd/runs."""
    (folder,) = (path for path in (cwd / "runs").iterdir() if path.name[0] != ".")
    return folder


def metrics(folder):
    """The rows (step, name, value) of metrics.csv without times and speeds."""
    with open(folder / "metrics.csv") as f:
        rows = [(r["step"], r["name"], r["value"]) for r in csv.DictReader(f)]
    return [row for row in rows if "SPS" not in row[1]]


def is_one_sentence(result, code, *needles):
    """The error is one line, the last one on stderr, that says what was wrong; no
    traceback.
    """
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.rstrip().endswith(errors[0])
    for needle in needles:
        assert str(needle) in errors[0]


@pytest.fixture
def make_random_flow():
    """make(obs_dim, act_dim, ...): a float64 flow whose every parameter is random."""
    from meow_continuous_action import Args, make_flow

    def make(obs_dim, act_dim, alpha=0.25, low=-3.0, high=-0.3, seed=0, **options):
        bounds = dict(log_sigma_min=low, log_sigma_max=high)
        args = Args(alpha=alpha, seed=seed, **bounds, **options)
        flow = make_flow(args, obs_dim, act_dim).double().requires_grad_(True)
        for p in flow.parameters():  # zeros would hide the dependence on the state
            p.data += 0.1 * torch.randn_like(p)
        if flow.outputs == 2:  # moderate scales, so that a grid resolves the density
            for mlp in flow.t:
                mlp.layers[-1].weight.data *= 0.2
        return flow

    return make
