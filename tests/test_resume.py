"""A run that was stopped, killed or started twice goes on as if nothing had
happened.
"""

import fcntl
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from unittest import mock

import pytest
import torch
from conftest import (
    SCRIPT,
    SCRIPTS,
    each_script,
    is_one_sentence,
    launch,
    metrics,
    only_run,
    quick,
    run,
    start,
)

from harness.logger import Logger
from meow_continuous_action import Args

AUTO = quick(resume="auto")
LONGER = ["--total-timesteps", "70"]
KILLED = """
import sys
from importlib import import_module
from conftest import interrupting
interrupting({57: 9}).start()
script = import_module(sys.argv[1])
script.main(script.Args, script.train, script.evaluate_saved, sys.argv[2:])
"""


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("stopped")
    assert launch(SCRIPT, quick(), cwd, signals={47: signal.SIGTERM}).returncode == 143
    return only_run(cwd)


@pytest.fixture
def stopped(original, tmp_path):
    """The folder of a run that SIGTERM ended at step 47."""
    return shutil.copytree(original, tmp_path / "stopped")


# --- Going on -------------------------------------------------------------------------
@each_script
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, script):
    """Stopped by Ctrl-C, and again by SIGTERM: the numbers are those without a stop.

    At step 50 SAC's log repeats the actor's losses of step 49: a checkpoint holds them.
    """
    words = quick(checkpoint_frequency=0, runs_dir="my runs")
    stopped = launch(script, words, tmp_path, signals={49: signal.SIGINT})
    assert stopped.returncode == 128 + signal.SIGINT
    (folder,) = (tmp_path / "my runs").iterdir()
    assert read(folder / "checkpoint.pt")["step"] == 49
    hint = re.search(r"stopped at step 49; go on with: (.*)\n", stopped.stderr)[1]
    program, file, *words = shlex.split(hint)
    assert (program, file) == ("python", script.name)
    again = launch(script, words, tmp_path, signals={53: signal.SIGTERM})
    assert again.returncode == 128 + signal.SIGTERM
    assert read(folder / "checkpoint.pt")["step"] == 53
    fewer = launch(script, [*words, "--total-timesteps", 50], tmp_path)
    is_one_sentence(fewer, 2, "already at step 53: raise --total-timesteps")
    resumed = launch(script, words, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(folder) == metrics(finished(script)[0])
    final, expected = (
        read(f / "policy_final.pt") for f in (folder, finished(script)[0])
    )
    for name in expected.keys() - {"format", "args", "sizes", "step"}:
        for key, value in expected[name].items():
            assert torch.equal(value, final[name][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("script", [SCRIPT, SCRIPTS[1]])
def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path, script):
    """Power failure: rows written since the checkpoint are not there twice."""
    words = [sys.executable, "-c", KILLED, script.stem, *AUTO]
    killed = run(words, tmp_path)
    assert killed.returncode == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert read(folder / "checkpoint.pt")["step"] == 40
    assert int(metrics(folder)[-1][0]) > 40
    resumed = launch(script, AUTO, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(folder) == metrics(finished(script)[0])


@pytest.mark.parametrize(("steps", "besides"), [(45, {"45"}), (50, set())])
def test_more_steps_continue_a_finished_run(finished, tmp_path, steps, besides):
    """Then resumed to 60: the numbers of 60 at once, besides those of an end at 45.

    An evaluation that ended the run isn't played again, though it is due there.
    """
    assert launch(SCRIPT, quick(total_timesteps=steps), tmp_path).returncode == 0
    folder, expected = only_run(tmp_path), metrics(finished(SCRIPT)[0])
    longer = ["--resume", folder, "--total-timesteps", 60]
    assert launch(SCRIPT, longer, tmp_path).returncode == 0
    more = [row for row in metrics(folder) if row not in expected]
    assert {step for step, _, _ in more} == besides
    assert [row for row in metrics(folder) if row not in more] == expected
    done = launch(SCRIPT, ["--resume", folder], tmp_path)
    is_one_sentence(done, 2, "already at step 60: raise --total-timesteps")


def test_an_environment_that_does_not_replay_is_announced(tmp_path):
    """The run goes on with a new episode."""
    words = quick(env_id="scripted_env:Drifting-v0", total_timesteps=33)
    assert launch(SCRIPT, words, tmp_path).returncode == 0
    folder = only_run(tmp_path)
    resumed = launch(SCRIPT, ["--resume", folder, "--total-timesteps", 40], tmp_path)
    assert resumed.returncode == 0
    warning = "warning: scripted_env:Drifting-v0 did not replay its episode exactly"
    assert warning in resumed.stderr
    env = read(folder / "checkpoint.pt")["env"]
    assert (env["steps"], env["episode_count"]) == (40, 7)
    assert len(env["current"]["actions"]) == 2


@each_script
def test_a_signal_ends_an_evaluation_that_never_ends(tmp_path, script):
    """With a checkpoint of its beginning, from which the run goes on exactly."""
    settings = dict(env_id="scripted_env:Sleepless-v0", eval_episodes=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    with mock.patch("scripted_env.Sleepless.length", 90):
        assert launch(script, quick(**settings), whole).returncode == 0
    words = quick(**settings, resume="auto", checkpoint_frequency=0)
    # its 77th step is one of an evaluation: training has taken 25 by then
    stopped = launch(script, words, parts, signals={77: signal.SIGTERM})
    assert stopped.returncode == 143
    assert "stopped at step 25; " in stopped.stderr
    with mock.patch("scripted_env.Sleepless.length", 90):
        assert launch(script, words, parts).returncode == 0
    assert metrics(only_run(parts)) == metrics(only_run(whole))


@each_script
def test_another_size_than_when_saved_is_one_sentence(finished, tmp_path, script):
    """The user has edited the environment; both sizes are named."""
    folder = shutil.copytree(finished(script)[0], tmp_path / "run")
    for file in ("checkpoint.pt", "policy_final.pt"):
        content = read(folder / file)
        content["args"]["env_id"] = "Hopper-v4"
        torch.save(content, folder / file)
    named = ["4 observations and 1 actions; Hopper-v4 now has 11 and 3"]
    words = ["--resume", folder, "--total-timesteps", 90]
    is_one_sentence(launch(script, words, tmp_path), 2, *named)
    is_one_sentence(launch(script, ["--evaluate", folder], tmp_path), 2, *named)


def test_a_changed_machine_is_announced(stopped, tmp_path):
    content = read(stopped / "checkpoint.pt")
    content["description"]["cpu"] = "abacus"
    torch.save(content, stopped / "checkpoint.pt")
    resumed = launch(SCRIPT, ["--resume", stopped], tmp_path)
    assert resumed.returncode == 0
    assert (
        "warning: other cpu than before: not bit for bit the same run" in resumed.stderr
    )


# --- --resume auto --------------------------------------------------------------------
def test_auto_starts_goes_on_and_does_nothing(finished, tmp_path):
    """One command line, given again and again, makes one complete run."""
    assert (
        launch(SCRIPT, AUTO, tmp_path, signals={47: signal.SIGTERM}).returncode == 143
    )
    assert launch(SCRIPT, AUTO, tmp_path).returncode == 0
    assert metrics(only_run(tmp_path)) == metrics(finished(SCRIPT)[0])
    before = {path: path.read_bytes() for path in only_run(tmp_path).iterdir()}
    again = launch(SCRIPT, AUTO, tmp_path)
    assert again.returncode == 0
    assert again.stdout == f"runs/{only_run(tmp_path).name} is finished: 60 steps\n"
    assert again.stderr == ""
    assert {path: path.read_bytes() for path in only_run(tmp_path).iterdir()} == before


def test_auto_extends_a_run_and_tells_runs_apart(tmp_path):
    """Only what changes the numbers makes another run; more steps go on with the same
    one.
    """
    assert (
        launch(SCRIPT, quick(resume="auto", total_timesteps=32), tmp_path).returncode
        == 0
    )
    folder = only_run(tmp_path)
    words = quick(resume="auto", total_timesteps=34, keep_policies=True)
    assert launch(SCRIPT, words, tmp_path).returncode == 0
    assert read(only_run(tmp_path) / "checkpoint.pt")["step"] == 34
    for change in (dict(seed=2), dict(tau=0.5), dict(exp_name="other")):
        words = quick(resume="auto", total_timesteps=12, **change)
        assert launch(SCRIPT, words, tmp_path).returncode == 0
    runs = [path for path in (tmp_path / "runs").iterdir() if path.name != ".locks"]
    assert len(runs) == 4
    assert folder in runs


def test_auto_starts_again_without_a_checkpoint(tmp_path):
    """A run that never came to its first checkpoint; its rows are written again, once
    each.
    """
    assert (
        launch(SCRIPT, AUTO, tmp_path, signals={15: signal.SIGTERM}).returncode == 143
    )
    folder = only_run(tmp_path)
    before = metrics(folder)
    (folder / "checkpoint.pt").unlink()
    (folder / "notes.txt").write_text("mine")
    assert (
        launch(SCRIPT, AUTO, tmp_path, signals={15: signal.SIGTERM}).returncode == 143
    )
    assert only_run(tmp_path) == folder
    assert metrics(folder) == before
    assert (folder / "notes.txt").read_text() == "mine"
    assert read(folder / "checkpoint.pt")["step"] == 15


def test_auto_overwrites_no_finished_run_that_lost_its_checkpoint(tmp_path):
    """Raising --total-timesteps needs it: without it the run's files stay as they
    are.
    """
    assert launch(SCRIPT, AUTO, tmp_path).returncode == 0
    folder = only_run(tmp_path)
    (folder / "checkpoint.pt").unlink()
    before = (folder / "metrics.csv").read_bytes()
    longer = quick(resume="auto", total_timesteps=99, keep_policies=True)
    is_one_sentence(launch(SCRIPT, longer, tmp_path), 2, "checkpoint.pt")
    assert (folder / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_is_being_trained_is_refused(resume, tmp_path):
    """--resume with its folder, in another process; afterwards it goes on."""
    second = []

    def resume_it(*_):
        words = ["--resume", only_run(tmp_path), *LONGER]
        second.append(run([sys.executable, SCRIPT, *words], tmp_path))

    old = signal.signal(signal.SIGUSR1, resume_it)
    words = quick(checkpoint_frequency=20, resume=resume)
    first = launch(SCRIPT, words, tmp_path, signals={45: signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, old)
    assert first.returncode == 0
    folder = only_run(tmp_path)
    is_one_sentence(second[0], 2, f"another process trains {folder}")
    (tmp_path / "alone").mkdir()
    assert launch(SCRIPT, quick(), tmp_path / "alone").returncode == 0
    assert metrics(folder) == metrics(only_run(tmp_path / "alone"))
    assert launch(SCRIPT, ["--resume", folder, *LONGER], tmp_path).returncode == 0
    assert read(folder / "checkpoint.pt")["step"] == 70


@pytest.mark.slow
def test_a_second_process_waits_for_the_first(tmp_path):
    """While another process holds the run, --resume auto says so and waits."""
    assert launch(SCRIPT, AUTO, tmp_path).returncode == 0
    (lock,) = (tmp_path / "runs" / ".locks").iterdir()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start([sys.executable, SCRIPT, *AUTO], tmp_path)
        assert (
            process.stderr.readline()
            == "waiting for another process that trains this run\n"
        )
        assert process.poll() is None
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, "is finished" in out) == (0, True)


# --- Refused --------------------------------------------------------------------------
def test_other_settings_are_refused_and_named(stopped, tmp_path):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    words = [
        "--resume",
        stopped,
        "--tau",
        0.5,
        "--env-id",
        "Ant-v4",
        "--total-timesteps",
        90,
    ]
    named = ["--env-id InvertedPendulum-v4", "--tau 0.005"]
    is_one_sentence(launch(SCRIPT, words, tmp_path), 2, "other settings", *named)
    is_one_sentence(
        launch(SCRIPT, ["--evaluate", stopped, "--alpha", 3], tmp_path), 2, "--alpha"
    )
    assert before == {path: path.read_bytes() for path in stopped.iterdir()}


def test_a_policy_can_not_be_resumed(finished, tmp_path):
    words = [
        "--resume",
        finished(SCRIPT)[0] / "policy_final.pt",
        "--total-timesteps",
        90,
    ]
    is_one_sentence(launch(SCRIPT, words, tmp_path), 2, "a policy, not a checkpoint")


DAMAGED = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda c: (
        c[:900_000] + bytes([c[900_000] ^ 64]) + c[900_001:]
    ),  # one bit of theta
    "empty": lambda _: b"",
    "text": lambda _: b"hello, not a checkpoint\n" * 99,
}


@pytest.mark.parametrize("how", [*DAMAGED, "foreign", "code", "other networks"])
def test_damaged_checkpoints(stopped, tmp_path, how):
    path, message = tmp_path / "checkpoint.pt", "is damaged or not a checkpoint"
    if how == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
        message = "was not written by this version of meow_continuous_action.py"
    elif how == "code":  # unpickling it would run something
        torch.save({"format": SCRIPT.stem, "args": {}, "run": launch}, path)
    elif how == "other networks":  # as after a change of the script
        saved = torch.load(stopped / "checkpoint.pt", weights_only=True)
        saved["learner"] = [tensor[:-1] for tensor in saved["learner"]]
        saved["flow"].popitem()
        shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
        torch.save(saved, path)
        message = "was not written by this version of meow_continuous_action.py"
    else:
        path.write_bytes(DAMAGED[how]((stopped / "checkpoint.pt").read_bytes()))
    for option in ("--resume", "--evaluate"):
        result = launch(SCRIPT, [option, tmp_path], tmp_path)
        is_one_sentence(result, 1, f"checkpoint.pt {message}")


def test_missing_checkpoints_and_those_of_other_scripts(stopped, tmp_path):
    for option in ("--resume", "--evaluate"):
        for path in (tmp_path, tmp_path / "nothing"):
            is_one_sentence(
                launch(SCRIPT, [option, path], tmp_path), 2, f"{option} {path}"
            )
        other = launch(SCRIPTS[1], [option, stopped], tmp_path)
        is_one_sentence(other, 1, "was not written by", "sac_continuous_action.py")
        assert f"but by {SCRIPT.name}" in other.stderr


def test_settings_of_another_version_are_refused(stopped, tmp_path):
    content = read(stopped / "checkpoint.pt")
    content["args"]["autotune"] = True
    torch.save(content, stopped / "checkpoint.pt")
    result = launch(SCRIPT, ["--resume", stopped], tmp_path)
    is_one_sentence(result, 2, "another version", "autotune")


def test_a_run_begun_without_an_option_does_not_get_it(stopped, tmp_path):
    """Its numbers would be others from here on; its policy plays all the same."""
    content = read(stopped / "checkpoint.pt")
    del content["args"]["max_grad_norm"]
    torch.save(content, stopped / "checkpoint.pt")
    result = launch(SCRIPT, ["--resume", stopped], tmp_path)
    is_one_sentence(result, 2, "earlier version, without --max-grad-norm")
    assert launch(SCRIPT, ["--evaluate", stopped], tmp_path).returncode == 0


def test_a_shortened_log_is_refused(stopped, tmp_path):
    (stopped / "metrics.csv").write_text("step,seconds,name,value\n")
    is_one_sentence(
        launch(SCRIPT, ["--resume", stopped], tmp_path), 1, "metrics.csv is shorter"
    )


# --- A full disk ----------------------------------------------------------------------
def test_a_full_disk_keeps_the_previous_checkpoint(finished, stopped, tmp_path):
    """No file can grow as large as a checkpoint; later there is room and the run goes
    on.
    """
    before = (stopped / "checkpoint.pt").read_bytes()
    full = launch(SCRIPT, ["--resume", stopped], tmp_path, largest_file=300_000)
    is_one_sentence(
        full, 1, "can't write", "policy_final.pt", "there is no earlier one"
    )
    full = launch(SCRIPT, ["--resume", stopped], tmp_path, largest_file=1_000_000)
    is_one_sentence(
        full, 1, "can't write", "checkpoint.pt ([Errno 27]", "previous one is intact"
    )
    assert (stopped / "checkpoint.pt").read_bytes() == before
    assert not list(stopped.glob("*.tmp"))
    assert launch(SCRIPT, ["--resume", stopped], tmp_path).returncode == 0
    assert metrics(stopped) == metrics(finished(SCRIPT)[0])


def test_threads_of_the_environment_are_not_silenced(tmp_path):
    """While a log is open only TensorBoard's thread fails silently."""
    with mock.patch("threading.excepthook") as report:
        logger = Logger(Args(), tmp_path, {}, None)
        thread = threading.Thread(target=os.stat, args=["/nowhere"])
        thread.start()
        thread.join()
        logger.close()
        assert threading.excepthook is report
    assert report.call_args[0][0].exc_type is FileNotFoundError


def test_a_full_disk_stops_the_log_with_one_sentence(tmp_path):
    """Neither metrics.csv nor the event file can grow; nothing is printed but the
    error.
    """
    steps = dict(total_timesteps=400, learning_starts=400, checkpoint_frequency=0)
    words = quick(**steps, log_frequency=1, eval_frequency=400)
    full = launch(SCRIPT, words, tmp_path, largest_file=2_500)
    is_one_sentence(full, 1, "File too large")
