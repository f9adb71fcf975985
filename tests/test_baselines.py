"""SAC and soft Q-learning as a user runs them. Their harness is a copy of the MEow script's
(test_parity.py), which test_run.py tries in full; here is what their own state could break."""

import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import SCRIPTS
from test_run import command, environment, is_one_sentence, metrics, only_run, run, wait_for

BASELINES = SCRIPTS[1:]
SHORT = {"total_timesteps": 450, "eval_frequency": 200}


@pytest.fixture(scope="module", params=BASELINES, ids=lambda path: path.stem)
def finished(request, tmp_path_factory):
    """A script and the folder of an uninterrupted quick run of it."""
    cwd = tmp_path_factory.mktemp(request.param.stem)
    result = run(command(script=request.param, **SHORT), cwd)
    assert result.returncode == 0, result.stderr
    return request.param, only_run(cwd)


def test_files_of_a_run(finished):
    script, folder = finished
    files = {"args.json", "metrics.csv", "checkpoint.pt", "policy_best.pt", "policy_final.pt"}
    assert {f.name for f in folder.iterdir()} == files
    assert folder.name.startswith(f"Hopper-v4__{script.stem}__1__")
    names = {name for _, name, _ in metrics(folder)}
    assert names >= {"charts/episodic_return", "losses/qf_loss", "eval/return_mean"}
    assert [s for s, name, _ in metrics(folder) if name == "eval/return_mean"] == [
        "200", "400", "450"
    ]  # fmt: skip


def test_killed_and_resumed_run_is_the_uninterrupted_one(finished, tmp_path):
    """SIGKILL between two checkpoints (at an odd number of updates), then --resume."""
    script, folder = finished
    words = command(script=script, **SHORT | {"checkpoint_frequency": 237})
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 237
    assert saved["learner"]["updates"] == 37
    result = run([sys.executable, str(script), "--resume", str(only_run(tmp_path))], tmp_path)
    assert result.returncode == 0, result.stderr
    assert metrics(only_run(tmp_path)) == metrics(folder)


def test_evaluation_repeats_the_runs_last_one(finished, tmp_path):
    script, folder = finished
    result = run([sys.executable, str(script), "--evaluate", str(folder)], tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [v for s, n, v in metrics(folder) if s == "450" and n.startswith("eval/return_")]
    printed = [float(x.split("return ")[1].split(",")[0]) for x in result.stdout.splitlines()[:2]]
    assert printed == pytest.approx(list(map(float, rows[2:])), abs=0.02, rel=1e-3)
    words = [sys.executable, str(script), "--evaluate", str(folder), "--no-deterministic-eval"]
    assert "2 stochastic episodes" in run(words, tmp_path).stdout


def test_files_of_other_scripts_and_bad_input_are_refused(finished, tmp_path):
    script, folder = finished
    (other,) = set(BASELINES) - {script}
    result = run([sys.executable, str(other), "--resume", str(folder)], tmp_path)
    is_one_sentence(result, 1, f"was not written by this script ({other.stem}/1)")
    for env_id, needle in (("CartPole-v1", "continuous"), ("scripted_env:Unbounded-v0", "bounded")):
        is_one_sentence(run(command(script=script, env_id=env_id), tmp_path), 2, needle)
    nan = run(command(script=script, env_id="scripted_env:NanObs-v0"), tmp_path)
    is_one_sentence(nan, 1, "observation[0] = nan", "at step 249")
    diverged = run(command(script=script, q_lr=1e30, policy_lr=1e30), tmp_path)
    is_one_sentence(diverged, 1, "is not finite")


@pytest.mark.parametrize("script", BASELINES, ids=lambda path: path.stem)
def test_pendulum_is_learned(script, tmp_path):
    """From about -1200 (random actions) to above -400; the best policies get about -150."""
    total = 3_000 if script.stem.startswith("sac") else 4_500
    options = dict(env_id="Pendulum-v1", total_timesteps=total, learning_starts=500, tau=0.02)
    options |= dict(batch_size=128, eval_frequency=500, eval_episodes=5, policy_lr=1e-3, q_lr=1e-3)
    words = command("--compile", script=script, **options, checkpoint_frequency=0)
    result = run(words, tmp_path)
    assert result.returncode == 0, result.stderr
    returns = [float(v) for _, name, v in metrics(only_run(tmp_path)) if name == "eval/return_mean"]
    assert statistics.median(returns[-3:]) > -400, returns
