"""The script as a user runs it: files, identical reruns, kill and resume, bad input, W&B, video."""

import csv
import ctypes.util
import json
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import termios
import time

import imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT

QUICK = {
    "--env-id": "Hopper-v4", "--total-timesteps": "700", "--learning-starts": "200",
    "--batch-size": "32", "--eval-frequency": "300", "--eval-episodes": "2",
    "--log-frequency": "50", "--checkpoint-frequency": "100",
}  # fmt: skip


def command(*flags, script=SCRIPT, **options):
    """The command line of a quick run; keyword a_b replaces option --a-b."""
    merged = QUICK | {f"--{k.replace('_', '-')}": str(v) for k, v in options.items()}
    words = [word for pair in merged.items() for word in pair]
    return [sys.executable, str(script), *words, "--no-compile", *flags]


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **extra}


def run(words, cwd, env=None, **kwargs):
    return subprocess.run(
        words,
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def only_run(cwd):
    (folder,) = (cwd / "runs").iterdir()
    return folder


def metrics(folder):
    """metrics.csv without times and speeds."""
    with open(folder / "metrics.csv") as f:
        return [
            (r["step"], r["name"], r["value"])
            for r in csv.DictReader(f)
            if r["name"] != "charts/SPS"
        ]


def wait_for(condition, process):
    """Polls until the condition holds; fails if the process ends first or a minute passes."""
    deadline = time.time() + 60
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.time() < deadline, "the run is stuck"
        time.sleep(0.02)


def script(*words):
    return [sys.executable, str(SCRIPT), *map(str, words)]


def is_one_sentence(result, code, *needles):
    """The error is one line on stderr that says what was wrong, not a traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.rstrip().endswith(errors[0])
    for needle in needles:
        assert str(needle) in errors[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted quick run."""
    cwd = tmp_path_factory.mktemp("finished")
    result = run(command(), cwd)
    assert result.returncode == 0, result.stderr
    return only_run(cwd), result


def test_files_of_a_run(finished):
    folder, result = finished
    files = {"args.json", "metrics.csv", "checkpoint.pt", "policy_best.pt", "policy_final.pt"}
    assert {f.name for f in folder.iterdir()} == files
    assert folder.name.startswith("Hopper-v4__meow_continuous_action__1__")
    described = json.loads((folder / "args.json").read_text())
    assert described["args"]["total_timesteps"] == 700
    assert described["args"]["tau"] == 0.005
    assert described["versions"]["torch"] == torch.__version__
    assert {"git_commit", "device", "threads", "platform", "cpu"} <= set(described)
    assert (folder / "metrics.csv").read_text().startswith("step,seconds,name,value\n")
    names = {name for _, name, _ in metrics(folder)}
    expected = "charts/episodic_return charts/episodic_length losses/loss losses/grad_norm flow/q"
    assert names >= {*expected.split(), "eval/return_mean", "eval/return_std", "eval/return_1"}
    evaluated = [step for step, name, _ in metrics(folder) if name == "eval/return_mean"]
    assert evaluated == ["300", "600", "700"]
    each = [
        float(v)
        for s, n, v in metrics(folder)
        if s == "300" and n in ("eval/return_0", "eval/return_1")
    ]
    mean = next(float(v) for s, n, v in metrics(folder) if s == "300" and n == "eval/return_mean")
    assert mean == pytest.approx(np.mean(each))
    assert "step 700/700, ETA 00:00" in result.stderr
    assert "Traceback" not in result.stderr


def test_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    for seed, equal in ((1, True), (2, False)):
        cwd = tmp_path / str(seed)
        cwd.mkdir()
        assert run(command(seed=seed), cwd).returncode == 0
        assert (metrics(only_run(cwd)) == metrics(finished[0])) is equal


def test_killed_and_resumed_run_is_the_uninterrupted_one(finished, tmp_path):
    """SIGKILL at three random moments after the first checkpoint changes nothing."""
    rng = random.Random()
    words, killed = command(), 0
    while killed < 3:
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
        )
        wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
        moment = time.time() + rng.uniform(0, 6)
        while process.poll() is None and time.time() < moment:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        words = script("--resume", only_run(tmp_path))
    assert killed
    if process.returncode != 0:
        result = run(words, tmp_path)
        # A kill can come after the last checkpoint, when only the exit was left to do.
        done = result.returncode == 2 and "is already at step" in result.stderr
        assert result.returncode == 0 or done, result.stderr
    assert metrics(only_run(tmp_path)) == metrics(finished[0])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_write_a_checkpoint(finished, tmp_path, signum):
    """The run stops with 128 + signal, says how to go on, and goes on to the same metrics."""
    process = subprocess.Popen(
        command(checkpoint_frequency=0),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    files = tmp_path.glob
    wait_for(lambda: any("losses/" in f.read_text() for f in files("runs/*/metrics.csv")), process)
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "go on with: python meow_continuous_action.py --resume runs/" in err
    result = run(script("--resume", only_run(tmp_path)), tmp_path)
    assert result.returncode == 0, result.stderr
    assert metrics(only_run(tmp_path)) == metrics(finished[0])


def test_a_longer_total_continues_a_finished_run(tmp_path):
    """500 steps, then resumed to 700, gives the training metrics of 700 at once."""
    assert run(command(total_timesteps=500), tmp_path).returncode == 0
    result = run(script("--resume", only_run(tmp_path), "--total-timesteps", 700), tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "whole").mkdir()
    assert run(command(), tmp_path / "whole").returncode == 0
    resumed, whole = (
        dict(((s, n), v) for s, n, v in metrics(only_run(p)))
        for p in (tmp_path, tmp_path / "whole")
    )
    assert {k: resumed[k] for k in whole} == whole
    is_one_sentence(run(script("--resume", only_run(tmp_path)), tmp_path), 2, "already at step 700")


def test_conflicting_options_are_named(finished, tmp_path):
    folder = finished[0]
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    words = script("--resume", folder, "--tau", 0.5, "--env-id", "Ant-v4", "--total-timesteps", 900)
    is_one_sentence(
        run(words, tmp_path), 2, "--tau 0.5 (saved: 0.005)", "--env-id Ant-v4 (saved: Hopper-v4)"
    )
    is_one_sentence(
        run(script("--resume", folder / "policy_final.pt"), tmp_path), 2, "a policy alone"
    )
    words = script("--evaluate", folder, "--alpha", 3)
    is_one_sentence(run(words, tmp_path), 2, "--alpha 3.0 (saved: 0.25)")
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}


def damage(content: bytes, how: str) -> bytes:
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "flipped":  # one bit in the middle of the parameters
        at = len(content) // 3
        return content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]
    return {"empty": b"", "text": b"hello, not a checkpoint\n" * 99}[how]


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", "empty", "text", "foreign", "code", "missing"]
)
def test_damaged_checkpoints(finished, tmp_path, how):
    path = tmp_path / "checkpoint.pt"
    if how == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif how == "code":
        torch.save({"format": "meow_continuous_action/1", "run": os.system}, path)
    elif how != "missing":
        path.write_bytes(damage((finished[0] / "checkpoint.pt").read_bytes(), how))
    for option in ("--resume", "--evaluate"):
        result = run(script(option, tmp_path), tmp_path)
        is_one_sentence(result, 2 if how == "missing" else 1, "checkpoint.pt")


BAD_RUNS = [
    (["--env-id", "Nope-v4"], 2, "Nope"),
    (["--env-id", "CartPole-v1"], 2, "continuous"),
    (["--env-id", "scripted_env:Unbounded-v0"], 2, "bounded"),
    (["--env-id", "scripted_env:DictObs-v0"], 2, "flat vector"),
    (
        ["--total-timesteps", "99999999999", "--buffer-size", "99999999999"],
        2,
        "replay buffer needs",
    ),
    (["--runs-dir", "occupied"], 1, "run folder"),
    (["--env-id", "scripted_env:Scripted-v0", "--capture-video"], 2, "--capture-video"),
]


@pytest.mark.parametrize(("words", "code", "needle"), BAD_RUNS, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_sentence(tmp_path, words, code, needle):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    is_one_sentence(run(command(*words), tmp_path), code, needle)
    assert (tmp_path / "occupied").read_text() == "a file where the folder should be"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "needle"), [("NanObs", "observation[0] = nan"), ("InfReward", "reward = inf")]
)
def test_non_finite_environments_stop_the_run(tmp_path, name, needle):
    result = run(command(env_id=f"scripted_env:{name}-v0"), tmp_path)
    is_one_sentence(result, 1, needle, "at step 249")
    saved = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 200
    assert torch.isfinite(saved["replay"]["rows"]).all()


def test_a_diverging_update_stops_the_run(tmp_path):
    result = run(command(learning_rate=1e30), tmp_path)
    is_one_sentence(result, 1, "at step 201 is not finite")


def test_full_disk_keeps_the_previous_checkpoint(finished, tmp_path):
    """With files limited to 1 MB the run stops with one sentence, and can be resumed later."""
    process = subprocess.Popen(
        command(), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    folder = only_run(tmp_path)
    before = (folder / "checkpoint.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    result = run(script("--resume", folder), tmp_path, preexec_fn=limit)
    is_one_sentence(result, 1, "can't write", "checkpoint.pt", "the previous one is intact")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("*.tmp"))
    assert run(script("--resume", folder), tmp_path).returncode == 0
    assert metrics(folder) == metrics(finished[0])


def test_wandb_offline_gets_the_same_names(tmp_path):
    env = environment(WANDB_MODE="offline", WANDB_SILENT="true")
    result = run(command("--track", total_timesteps=400), tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    folder = only_run(tmp_path)
    (offline,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = offline.read_bytes()
    for name in {name for _, name, _ in metrics(folder)} | {"charts/SPS"}:
        assert name.encode() in content, name


def test_wandb_without_an_account_is_one_sentence(tmp_path):
    env = environment(WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    env.pop("WANDB_API_KEY", None)
    result = run(command("--track", total_timesteps=400), tmp_path, env=env)
    is_one_sentence(result, 2, "WANDB_MODE=offline")


def test_wandb_is_imported_with_track_only(tmp_path):
    code = f"import sys; sys.modules['wandb'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import meow_continuous_action as m; sys.exit(m.main(sys.argv[1:]))"
    words = command(total_timesteps=250)
    result = run([sys.executable, "-c", code, *words[2:]], tmp_path)
    assert result.returncode == 0, result.stderr


def test_evaluate_prints_returns(finished, tmp_path):
    folder = finished[0]
    results = [
        run(script("--evaluate", path, "--eval-episodes", 3), tmp_path)
        for path in (folder, folder / "policy_final.pt", folder / "checkpoint.pt")
    ]
    for result in results:
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert [line.split(":")[0] for line in lines[:3]] == ["episode 0", "episode 1", "episode 2"]
        assert "3 deterministic episodes" in lines[3]
    assert results[0].stdout == results[1].stdout
    assert results[0].stdout.splitlines()[:3] == results[2].stdout.splitlines()[:3]
    stochastic = run(script("--evaluate", folder, "--no-deterministic-eval"), tmp_path)
    assert "2 stochastic episodes" in stochastic.stdout


def test_evaluation_repeats_the_runs_last_one(finished, tmp_path):
    """--evaluate with the run's seed plays the episodes of the final evaluation again."""
    result = run(script("--evaluate", finished[0]), tmp_path)
    last = [
        float(v)
        for s, n, v in metrics(finished[0])
        if s == "700" and n in ("eval/return_0", "eval/return_1")
    ]
    printed = [
        float(line.split("return ")[1].split(",")[0]) for line in result.stdout.splitlines()[:2]
    ]
    assert printed == pytest.approx(last, abs=0.02, rel=1e-3)


renders = pytest.mark.skipif(
    not (ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa")),
    reason="needs an off-screen renderer: libegl1 or libosmesa6",
)


def shows_the_robot(result, folder):
    """The mp4 of an evaluation has one frame per step, and the robot moves in it."""
    assert result.returncode == 0, result.stderr
    (path,) = (folder / "videos").glob("*.mp4")
    assert f"video of episode 0: {path}" in result.stdout
    length = int(result.stdout.split("length ")[1].split()[0])
    frames = [frame.astype(float) for frame in imageio.get_reader(path)]
    assert abs(len(frames) - length) <= 1
    assert all(frame.std() > 10 for frame in frames)
    assert np.abs(frames[-1] - frames[0]).max() > 50


@renders
def test_video_shows_the_robot(finished, tmp_path):
    folder = finished[0]
    shows_the_robot(run(script("--evaluate", folder, "--capture-video"), tmp_path), folder)


@renders
def test_videos_of_evaluations(tmp_path):
    result = run(command("--capture-video", total_timesteps=300), tmp_path)
    assert result.returncode == 0, result.stderr
    assert [f.name for f in (only_run(tmp_path) / "videos").iterdir()] == ["step-000000300.mp4"]


def test_a_terminal_shows_a_bar(tmp_path):
    """With stderr a terminal there is a progress bar with returns, redrawn in place."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    process = subprocess.Popen(
        command(), cwd=tmp_path, env=environment(), stderr=child, stdout=child
    )
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    assert b"700/700" in shown
    assert b"\r" in shown
    assert b"train=" in shown
    assert b"eval=" in shown
