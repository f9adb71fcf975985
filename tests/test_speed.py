"""tools/speed.py on scripts that write made-up speeds, and once on real ones."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SPEED = ROOT / "tools" / "speed.py"
FAKE = """
import json, pathlib, sys
if "--help" in sys.argv:
    sys.exit()
options = dict(zip(sys.argv[1:], sys.argv[2:]))
names = ("total-timesteps", "log-frequency", "learning-starts")
total, window, starts = (int(options[f"--{name}"]) for name in names)
folder = pathlib.Path(options["--runs-dir"], "run")
folder.mkdir()
about = {"cpu": "abacus", "device": "cpu", "git_commit": ""}
about["versions"] = {"torch": "1", "mujoco": "2"}
(folder / "args.json").write_text(json.dumps(about))
rows = ["step,seconds,name,value"]
for step in range(window, total + 1, window):
    learning, compiling = step > starts, starts < step <= starts + window
    speed = 1 if compiling else SPEED if learning else 10_000
    rows += [f"{step},0,charts/SPS,{speed}", f"{step},0,charts/env_SPS,{7 * speed}"]
    rows += [f"{step},0,losses/loss,1.0"] * learning
(folder / "metrics.csv").write_text("\\n".join(rows) + "\\n")
"""


def speed(*words):
    return subprocess.run(
        [sys.executable, str(SPEED), *words], capture_output=True, text=True
    )


@pytest.fixture
def trees(tmp_path):
    """Paths of two checkouts whose MEow makes 100 and 150 steps a second."""
    for name, value in (("old", "100"), ("new", "150")):
        for script in ("meow_continuous_action.py", "meow_isaacgym.py"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / script).write_text(FAKE.replace("SPEED", value))
    return [str(tmp_path / "old"), str(tmp_path / "new")]


def test_two_checkouts_side_by_side(trees):
    """In turns, without the windows before learning and of compilation."""
    done = speed("--tree", *trees, "--rounds", "2", "--threads", "1", "2")
    assert done.returncode == 0, done.stderr
    assert (
        re.findall(r"thread\(s\): (old|new)", done.stderr)
        == ["old", "new", "new", "old"] * 2
    )
    for row in ("round 1", "round 2", "all rounds"):
        text = f"| steps/s, {row} | 100 (100 to 100) | 150 (150 to 150) | 1.500 |"
        assert done.stdout.count(text) == 2
    assert "HalfCheetah-v4, meow_continuous_action.py" in done.stdout
    assert "abacus" in done.stdout
    start_up = (
        r"\| seconds of --help \| \d\.\d\d \(.*\) \| \d\.\d\d \(.*\) \| \d+\.\d{3} \|"
    )
    assert len(re.findall(start_up, done.stdout)) == 2


def test_robots_are_measured_in_environment_steps(trees):
    done = speed("--tree", *trees, "--env-id", "Ant", "--rounds", "1")
    assert "| 700 (700 to 700) | 1,050 (1,050 to 1,050) | 1.500 |" in done.stdout, (
        done.stderr
    )


def test_robots_are_those_of_the_package():
    """Named again, so that --help needs no torch."""
    from isaac_tasks import TASKS

    named = re.search(r"^ROBOTS = (\(.*\))$", SPEED.read_text(), re.MULTILINE)
    assert ast.literal_eval(named[1]) == tuple(TASKS)


def test_simulators_of_two_checkouts_side_by_side():
    words = ["--rounds", "1", "--steps", "20", "--window", "10", "--num-envs", "4"]
    done = speed(
        "--env-id", "Ingenuity", "--algo", "simulator", *words, "--tree", ROOT, ROOT
    )
    assert done.returncode == 0, done.stderr
    speeds = r"[\d,]+ \([\d,]+ to [\d,]+\)"
    row = rf"\| steps/s, all rounds \| {speeds} \| {speeds} \| \d+\.\d{{3}} \|"
    assert re.search(row, done.stdout)
    assert "seconds of --help" not in done.stdout
    assert len(re.findall(r"steps/s; commit \w+", done.stderr)) == 2


@pytest.mark.parametrize(
    ("env_id", "algo"), [("Ant", "sql"), ("HalfCheetah-v4", "simulator")]
)
def test_an_algorithm_that_an_environment_lacks_is_refused(env_id, algo, trees):
    for words in ([], ["--tree", *trees]):
        done = speed(*words, "--env-id", env_id, "--algo", algo)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"error: --algo {algo}: there is none for {env_id}"
        ]


def test_a_failed_run_is_one_sentence(trees):
    """With the run's own last words; so is one that is too short to be measured."""
    for script, words in (
        ("raise SystemExit('no oil')", "no oil"),
        (FAKE, "more --steps"),
    ):
        for tree in trees:
            with open(f"{tree}/meow_continuous_action.py", "w") as f:
                f.write(script.replace("SPEED", "5"))
        done = speed("--tree", *trees, "--steps", "0")
        assert done.returncode == 1
        error = done.stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert words in error


@pytest.mark.slow
def test_the_table_of_one_environment(tmp_path):
    """Every row beside Stable-Baselines3's SAC, which learns after 10,000 steps."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "speed.py").write_text(SPEED.read_text())
    speeds = {"meow": "150", "meow_auto": "125", "sac": "80", "sql": "60"}
    for name, value in speeds.items():
        script = FAKE.replace("SPEED", value)
        (tmp_path / f"{name}_continuous_action.py").write_text(script)
    script = FAKE.replace("SPEED", "50").replace("= dict(zip", "= {ZOO} | dict(zip")
    script = script.replace("ZOO", "'--learning-starts': 10_000")
    (tmp_path / "sb3_baselines.py").write_text(script)
    words = [sys.executable, "tools/speed.py", "--rounds", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"\| (.*) \| 1 \| .* \| ([\d.]+) \|", done.stdout))
    assert rows["SB3 SAC"] == "1.00"
    assert rows["MEow eager"] == rows["MEow compiled"] == "3.00"
    assert rows["MEow without tuning compiled"] == "2.50"
    assert (rows["SAC compiled"], rows["SQL compiled"]) == ("1.60", "1.20")


@pytest.mark.slow
def test_the_table_of_a_robot():
    """The simulator and the scripts themselves."""
    words = ["--rounds", "1", "--steps", "20", "--window", "10", "--num-envs", "4"]
    done = speed("--env-id", "Ingenuity", *words, "--flags=--no-compile")
    rows = re.findall(r"\| (.*) \| 1 \| [\d,]+ \([\d,]+ to [\d,]+\) \|", done.stdout)
    here = [row for row in rows if "GPU" not in row]
    robots = ["MEow training", "MEow without tuning, training", "SAC training"]
    assert here == ["simulator alone", *robots], done.stderr
    done = speed("--env-id", "Ingenuity", *words, "--algo", "simulator")
    rows = re.findall(r"\| (.*) \| 1 \| [\d,]+ \([\d,]+ to [\d,]+\) \|", done.stdout)
    assert [row for row in rows if "GPU" not in row] == ["simulator alone"], done.stderr
