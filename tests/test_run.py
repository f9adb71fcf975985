"""A script as a user runs it: files, logs, identical reruns, evaluation, bad input."""

import contextlib
import ctypes.util
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import imageio
import numpy as np
import pytest
import torch
from conftest import (
    SCRIPT,
    each_script,
    is_one_sentence,
    launch,
    metrics,
    only_run,
    quick,
    run,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import meow_continuous_action as meow
from harness.errors import RunError
from harness.runs import main
from harness.video import Video

LOSSES = {
    "meow_continuous_action": {"losses/loss", "losses/grad_norm", "flow/q"},
    "sac_continuous_action": {"losses/qf_loss", "losses/actor_loss"},
    "sql_continuous_action": {"losses/qf_loss"},
    "meow_auto_continuous_action": {"losses/loss", "flow/alpha", "flow/entropy"},
}


def by_name(folder):
    """{name: [(step, value), ...]} of metrics.csv."""
    found = defaultdict(list)
    for step, name, value in metrics(folder):
        found[name].append((int(step), float(value)))
    return found


# --- Files and logs -------------------------------------------------------------------
@each_script
def test_files_and_numbers_of_a_run(finished, script):
    folder, result = finished(script)
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert files == {"args.json", "metrics.csv", "checkpoint.pt", "policy_final.pt"}
    assert folder.name.startswith(f"InvertedPendulum-v4__{script.stem}__1__")
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,seconds,name,value"
    seconds = [float(line.split(",")[1]) for line in lines[1:]]
    assert seconds == sorted(seconds)
    rows = by_name(folder)
    assert rows.keys() >= LOSSES[script.stem] | {
        "charts/episodic_return",
        "charts/episodic_length",
    }
    assert [step for step, _ in rows["eval/return_mean"]] == [25, 50, 60]
    for name in LOSSES[script.stem]:  # every 10 steps once learning has begun
        assert [step for step, _ in rows[name]] == [40, 50, 60]
    for i in range(3):
        returns = [rows[f"eval/return_{k}"][i][1] for k in range(2)]
        assert rows["eval/return_mean"][i][1] == pytest.approx(np.mean(returns))
        assert rows["eval/return_std"][i][1] == pytest.approx(np.std(returns))
    assert f"files in runs/{folder.name}" in result.stderr
    assert "60/60" in result.stderr
    assert result.stdout == ""


def test_args_json_says_how_to_reproduce_a_run(finished):
    folder, _ = finished(SCRIPT)
    described = json.loads((folder / "args.json").read_text())
    settings = described["args"]
    assert (
        settings.items()
        >= {"env_id": "InvertedPendulum-v4", "tau": 0.005, "seed": 1}.items()
    )
    assert described["script"] == SCRIPT.name
    assert described["command"].startswith(
        f"python {SCRIPT.name} --env-id InvertedPendulum-v4 "
    )
    assert described["versions"]["torch"] == torch.__version__
    assert described["compiled"] is False
    assert described["threads"] == 1
    for name in ("git_commit", "device", "platform", "python", "cpu"):
        assert described[name], name


def test_tensorboard_has_the_same_numbers(finished):
    folder, _ = finished(SCRIPT)
    events = EventAccumulator(str(folder)).Reload()
    rows = by_name(folder)
    assert set(events.Tags()["scalars"]) == {*rows, "charts/SPS"}
    for name, values in rows.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [
            (step, pytest.approx(value, nan_ok=True)) for step, value in values
        ]


def test_speed_is_steps_per_second(tmp_path):
    """SPS is the number of steps over the time between two rows, evaluations
    included.
    """
    words = quick(total_timesteps=30, checkpoint_frequency=0)
    with mock.patch("time.perf_counter", side_effect=itertools.count(0, 0.5)):
        assert launch(SCRIPT, words, tmp_path).returncode == 0
    text = (only_run(tmp_path) / "metrics.csv").read_text()
    rows = [(float(s), float(v)) for s, v in re.findall(r",(.*),charts/SPS,(.*)", text)]
    assert len(rows) == 3
    for (before, _), (after, speed) in itertools.pairwise(rows):
        assert speed == pytest.approx(10 / (after - before))


@each_script
def test_another_seed_gives_another_run(finished, tmp_path, script):
    """Runs of one seed are equal: see test_resume.py."""
    assert launch(script, quick(seed=2), tmp_path).returncode == 0
    other, rows = by_name(only_run(tmp_path)), by_name(finished(script)[0])
    for name in LOSSES[script.stem] | {"charts/episodic_return", "eval/return_0"}:
        if name == "flow/alpha":
            continue  # at first it falls at its pace, whatever the returns
        assert other[name] != rows[name], name


def test_evaluations_do_not_disturb_training(finished, tmp_path):
    """More evaluations, of more episodes, drawn from the policy: the same losses and
    episodes.
    """
    changes = dict(
        eval_frequency=9, eval_episodes=3, deterministic_eval=False, log_frequency=5
    )
    assert (
        launch(SCRIPT, quick(**changes, keep_policies=True), tmp_path).returncode == 0
    )
    rows = by_name(only_run(tmp_path))
    for name, values in by_name(finished(SCRIPT)[0]).items():
        if not name.startswith("eval/"):
            assert set(values) <= set(rows[name]), name
    names = [f"step-{step:09d}.pt" for step in (9, 18, 27, 36, 45, 54, 60)]
    assert (
        sorted(path.name for path in (only_run(tmp_path) / "policies").iterdir())
        == names
    )


@pytest.mark.slow
def test_a_terminal_shows_a_bar(tmp_path):
    """With stderr a terminal there is a progress bar with returns, redrawn in place."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    words = [sys.executable, SCRIPT, *quick(total_timesteps=30)]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=child)
    os.close(child)
    text = b""
    with (
        open(parent, "rb", buffering=0) as shown,
        contextlib.suppress(OSError),
    ):  # the end
        while piece := shown.read(4096):
            text += piece
    assert process.wait() == 0
    for needle in (b"30/30", b"\r", b"train=", b"eval="):
        assert needle in text


# --- Weights & Biases -----------------------------------------------------------------
@pytest.mark.slow
def test_wandb_offline_gets_the_same_names(tmp_path):
    words = [sys.executable, SCRIPT, *quick(track=True)]
    result = run(words, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    (offline,) = only_run(tmp_path).glob("wandb/offline-run-*/*.wandb")
    content = offline.read_bytes()
    for name in [
        *by_name(only_run(tmp_path)),
        "charts/SPS",
        "git_commit",
        "learning_starts",
    ]:
        assert name.encode() in content, name


@pytest.mark.slow
def test_wandb_without_an_account_is_one_sentence(tmp_path):
    words = [sys.executable, SCRIPT, *quick(track=True)]
    none = dict(WANDB_API_KEY="", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    result = run(words, tmp_path, WANDB_MODE="online", **none)
    is_one_sentence(result, 2, "WANDB_MODE=offline")


def test_wandb_is_needed_with_track_only(tmp_path):
    with mock.patch.dict(sys.modules, wandb=None):  # as if it weren't installed
        assert launch(SCRIPT, quick(total_timesteps=5), tmp_path).returncode == 0


# --- Evaluation -----------------------------------------------------------------------
@each_script
def test_evaluate_plays_the_last_evaluation_again(finished, tmp_path, script):
    """A run, its policy and its checkpoint; other seeds and modes give other
    episodes.
    """
    folder, _ = finished(script)
    last = [by_name(folder)[f"eval/return_{i}"][-1][1] for i in range(2)]
    printed = []
    for path in (folder, folder / "policy_final.pt", folder / "checkpoint.pt"):
        result = launch(script, ["--evaluate", path], tmp_path)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert [float(line.split()[3].rstrip(",")) for line in lines[:2]] == last
        assert "2 deterministic episodes of " in lines[2]
        assert f" on InvertedPendulum-v4: return {np.mean(last):.2f} +- " in lines[2]
        printed.append(lines[:2])
    words = [
        "--evaluate",
        folder,
        "--seed",
        8,
        "--no-deterministic-eval",
        "--eval-episodes",
        5,
        "--no-cuda",
        "--compile",
    ]
    other = launch(script, words, tmp_path).stdout
    assert "5 stochastic episodes" in other
    assert other.splitlines()[:2] != printed[0]
    assert not list(tmp_path.iterdir())


renders = pytest.mark.skipif(
    not (ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa")),
    reason="needs an off-screen renderer: libegl1 or libosmesa6",
)


@renders
@pytest.mark.slow
def test_videos_are_named_by_step_and_show_the_robot(tmp_path):
    changes = dict(capture_video=True, total_timesteps=30, eval_episodes=1)
    result = run([sys.executable, SCRIPT, *quick(**changes)], tmp_path)
    assert result.returncode == 0, result.stderr
    folder = only_run(tmp_path)
    videos = {path.name for path in (folder / "videos").iterdir()}
    assert videos == {"step-000000025.mp4", "step-000000030.mp4"}
    words = [sys.executable, SCRIPT, "--evaluate", folder, "--capture-video"]
    result = run(words, tmp_path)
    path = folder / "videos" / "evaluate-policy_final-seed1.mp4"
    assert f"video of episode 0: {path}" in result.stdout
    length = int(result.stdout.split("length ")[1].split()[0])
    frames = [frame.astype(float) for frame in imageio.get_reader(path)]
    assert abs(len(frames) - length) <= 1
    assert all(frame.std() > 10 for frame in frames)
    assert np.abs(frames[-1] - frames[0]).max() > 50


def film(tmp_path, images):
    """The frames of a video of these images."""
    path = tmp_path / "film.mp4"
    with contextlib.closing(Video(path, 30)) as video:
        for image in images:
            video.film(SimpleNamespace(render=lambda image=image: image))
    return [frame for frame in imageio.get_reader(path)]


@pytest.mark.parametrize("shape", [(32, 48, 3), (33, 47, 3), (32, 48)])
def test_images_of_any_size_are_filmed(tmp_path, shape):
    images = 4 * [np.full(shape, 100, np.uint8)]
    frames = film(tmp_path, images)
    assert len(frames) == 4
    assert frames[0].shape == (32, shape[1] // 2 * 2, 3)
    assert abs(frames[0].mean() - 100) < 5


BAD_IMAGES = [
    (None, r"shape \(\)"),
    ([np.zeros((32, 48, 3), np.uint8)], r"shape \(1, 32, 48, 3\)"),
    (np.zeros((32, 50, 3), np.uint8), r"shape \(32, 50, 3\)"),
    (np.zeros((32, 48, 3)), "of float64"),
]


@pytest.mark.parametrize(("bad", "came"), BAD_IMAGES)
def test_what_is_no_image_is_not_filmed(tmp_path, bad, came):
    with pytest.raises(RunError, match=f"its render must return an image.*{came}"):
        film(tmp_path, [np.zeros((32, 48, 3), np.uint8), bad])


def test_an_image_of_seven_colours_is_not_filmed(tmp_path):
    with pytest.raises(RunError, match=r"its render must .*\(32, 48, 7\)"):
        film(tmp_path, [np.zeros((32, 48, 7), np.uint8)])


# --- Bad input ------------------------------------------------------------------------
BAD_RUNS = [
    (dict(env_id="Nope-v4"), 2, "Nope"),
    (dict(env_id="scripted_env:Scripted-v0", capture_video=True), 2, "--capture-video"),
    (dict(total_timesteps=10**11, buffer_size=10**11), 2, "replay buffer needs"),
    (dict(runs_dir="occupied"), 1, "occupied"),
    (dict(runs_dir="/proc/runs"), 1, "/proc/runs"),
    (dict(exp_name="x" * 300), 1, "File name too long"),
    (dict(evaluate=""), 2, "--evaluate : there is no"),
    (dict(batch_size=10**12), 1, "not enough memory"),
    (dict(alpha=1e300), 1, "the update at step 31 gave losses/loss = nan"),
    (
        dict(env_id="scripted_env:WrongShape-v0"),
        1,
        "an observation of shape (1,) at step 0",
    ),
    (dict(env_id="scripted_env:InfReward-v0"), 1, "reward = inf at step 24"),
]


@pytest.mark.parametrize(
    ("changes", "code", "needle"), BAD_RUNS, ids=lambda x: str(x)[:40]
)
def test_bad_input_is_one_sentence(tmp_path, changes, code, needle):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    is_one_sentence(launch(SCRIPT, quick(**changes), tmp_path), code, needle)
    assert (tmp_path / "occupied").read_text() == "a file where the folder should be"
    if code == 2:  # nothing has begun
        assert [path.name for path in tmp_path.iterdir()] == ["occupied"]


ODD = [
    dict(seed=0),
    dict(seed=2**32 - 1),
    dict(eval_episodes=1),
    dict(total_timesteps=1),
    dict(learning_starts=99),
    dict(batch_size=64, buffer_size=5),
    dict(log_frequency=10**9),
    dict(runs_dir="my runs/of mine"),
    dict(exp_name="../../a b"),
    dict(gamma=0.0, tau=1.0),
    dict(env_id="scripted_env:Float64-v0"),
]


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_odd_settings_are_fine(tmp_path, changes):
    """The run ends with its evaluation, and in one folder within --runs-dir."""
    settings = (
        dict(total_timesteps=14, learning_starts=10, checkpoint_frequency=0) | changes
    )
    result = launch(SCRIPT, quick(**settings), tmp_path)
    assert result.returncode == 0, result.stderr
    (top,) = tmp_path.iterdir()
    (folder,) = (tmp_path / settings.get("runs_dir", "runs")).iterdir()
    assert top in folder.parents
    assert by_name(folder)["eval/return_mean"][-1][0] == settings["total_timesteps"]
    untrained = settings["learning_starts"] >= settings["total_timesteps"]
    assert ("steps are random" in result.stderr) == untrained


@each_script
def test_bad_environments_and_divergence_stop_every_script(tmp_path, script):
    words = quick(env_id="CartPole-v1")
    is_one_sentence(
        launch(script, words, tmp_path), 2, "--env-id CartPole-v1", "continuous"
    )
    words = quick(env_id="scripted_env:NanObs-v0")
    is_one_sentence(
        launch(script, words, tmp_path), 1, "= nan at step 24", "checkpoint is intact"
    )
    saved = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 20
    assert torch.isfinite(saved["replay"]["rows"]).all()
    rate = dict(q_lr=1e30, policy_lr=1e30)
    if "meow" in script.stem:
        rate = dict(learning_rate=1e30)
    diverged = launch(script, quick(**rate, runs_dir="diverged"), tmp_path)
    is_one_sentence(diverged, 1, "nan", "at step ", "checkpoint is intact")


@pytest.mark.parametrize(
    "words", [["--resume"], ["--evaluate"], ["--tau"], ["--tau", "--seed"]]
)
def test_an_option_without_its_value_is_explained(tmp_path, words):
    result = launch(SCRIPT, words, tmp_path)
    assert result.returncode == 2
    assert words[0] in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_reader_that_stops_is_no_error(tmp_path):
    """`--help | head` ends quietly; `true` reads nothing at all."""
    words = f"set -o pipefail; {sys.executable} {SCRIPT} --help | true"
    result = run(["bash", "-c", words], tmp_path)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_closed_standard_output_is_no_error(finished):
    """As after `>&-`: Python then has no sys.stdout."""
    words = ["--evaluate", str(finished(SCRIPT)[0])]
    with mock.patch("sys.stdout", None):
        assert main(meow.Args, meow.train, meow.evaluate_saved, words) == 0


def test_without_git_and_cpuinfo_a_run_is_described(tmp_path):
    """No git, no /proc (macOS): empty entries instead of an error."""
    with mock.patch("shutil.which", return_value=None):
        assert launch(SCRIPT, quick(total_timesteps=10), tmp_path).returncode == 0
    described = json.loads((only_run(tmp_path) / "args.json").read_text())
    assert described["git_commit"] == ""
    assert described["cpu"]


# --- What the user sees ---------------------------------------------------------------
def test_the_last_line_says_what_can_be_done(finished):
    folder, result = finished(SCRIPT)
    last = [line for line in result.stderr.splitlines() if "finished: " in line]
    (line,) = last
    value = by_name(folder)["eval/return_mean"][-1][1]
    assert f"finished: 60 steps, last evaluation {value:.1f}; " in line
    assert f"python {SCRIPT.name} --evaluate runs/{folder.name} " in line
    assert "--capture-video" in line
    assert "tensorboard --logdir runs" in line


@each_script
def test_no_evaluation_if_none_is_wanted(tmp_path, script):
    """One environment is made: some allow no second."""
    words = quick(eval_episodes=0, env_id="scripted_env:Single-v0")
    with mock.patch("scripted_env.Single.made", 0):
        assert launch(script, words, tmp_path).returncode == 0
    rows = by_name(only_run(tmp_path))
    assert LOSSES[script.stem] <= set(rows)
    assert not [name for name in rows if name.startswith("eval/")]
    played = launch(script, ["--evaluate", only_run(tmp_path)], tmp_path)
    is_one_sentence(played, 2, "give --eval-episodes")


def test_fewer_evaluation_environments_change_no_number(finished, tmp_path):
    words = quick(eval_envs=1, checkpoint_frequency=20)
    assert launch(SCRIPT, words, tmp_path).returncode == 0
    assert metrics(only_run(tmp_path)) == metrics(finished(SCRIPT)[0])


@each_script
@pytest.mark.parametrize(("at", "kept"), [(15, None), (35, 20)])
def test_an_error_in_the_environment_is_framed(tmp_path, script, at, kept):
    """Its own traceback, then one sentence: environment, step, what is left."""
    kwargs = json.dumps({"at": at})
    words = quick(env_id="scripted_env:Raising-v0", env_kwargs=kwargs)
    result = launch(script, words, tmp_path)
    assert result.returncode == 1
    *shown, sentence = result.stderr.strip().splitlines()
    assert "Traceback (most recent call last):" in shown
    assert "ConnectionResetError: CUDA error: not enough memory" in shown
    place = "error: scripted_env:Raising-v0: its step raised ConnectionResetError"
    assert sentence.startswith(f"{place} at step {at - 1} (CUDA error: not enough")
    left = f"the last checkpoint is intact (step {kept}), go on with: python"
    assert (left if kept else "there is no checkpoint yet") in sentence


@each_script
@pytest.mark.parametrize(
    "how", ["end", "signal", "error", "evaluate", "terminated", "refused"]
)
def test_environments_are_closed_in_any_case(tmp_path, script, how):
    """All that were made; a worker process would otherwise live on."""
    env_id = "scripted_env:Closing-v0"
    words, signals = quick(env_id=env_id, resume="auto"), {}
    if how in ("evaluate", "terminated"):
        assert launch(script, words, tmp_path).returncode == 0
        words = ["--evaluate", only_run(tmp_path)]
        signals = {3: signal.SIGTERM} if how == "terminated" else {}
    elif how == "signal":
        signals = {33: signal.SIGINT}
    elif how == "error":
        words = quick(env_id=env_id, env_kwargs='{"at": 33}')
    elif how == "refused":
        words = quick(env_id=env_id, buffer_size=10**12, total_timesteps=10**12)
    with mock.patch("scripted_env.Closing.open", []) as still_open:
        result = launch(script, words, tmp_path, signals=signals)
    codes = {"end": 0, "signal": 130, "error": 1, "evaluate": 0, "refused": 2}
    codes["terminated"] = 143
    assert result.returncode == codes[how], result.stderr
    assert still_open == []


@pytest.mark.parametrize(
    ("method", "signals", "code", "needle"),
    [
        ("step close", {}, 1, "error: .*its step raised"),
        ("close", {}, 1, "error: .*its close raised"),
        ("close", {40: signal.SIGTERM}, 143, "stopped at step 40; go on with"),
    ],
)
def test_an_error_in_closing_hides_nothing(tmp_path, method, signals, code, needle):
    """What ended the run before is said, and keeps its exit code."""
    kwargs = json.dumps({"method": method, "at": 20})
    words = quick(env_id="scripted_env:Raising-v0", env_kwargs=kwargs)
    result = launch(SCRIPT, words, tmp_path, signals=signals)
    assert result.returncode == code
    assert re.search(needle, result.stderr)
    warnings = result.stderr.count("warning: scripted_env:Raising-v0: its close raised")
    assert warnings == (2 if method == "close" and not signals else 3)


def test_main_works_in_a_thread(finished, tmp_path):
    """As in a notebook's worker or a service: without signals, and it says so."""
    results = []

    def work():
        results.append(launch(SCRIPT, quick(), tmp_path))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].returncode == 0, results[0].stderr
    assert "note: not the main thread: " in results[0].stderr
    assert metrics(only_run(tmp_path)) == metrics(finished(SCRIPT)[0])


@pytest.mark.slow
def test_without_fcntl_the_scripts_run(tmp_path):
    """As on Windows."""
    code = "import sys; sys.modules['fcntl'] = None; import runpy; "
    code += f"sys.argv = ['x', *sys.argv[1:]]; runpy.run_path('{SCRIPT}', "
    code += "run_name='__main__')"
    words = [sys.executable, "-c", code, *quick(resume="auto", total_timesteps=12)]
    result = run(words, tmp_path, PYTHONPATH=f"{SCRIPT.parent}:{SCRIPT.parent}/tests")
    assert result.returncode == 0, result.stderr
