"""benchmark.sh: what it runs, repeats and stops, with a stand-in for Python and for real."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT

BENCHMARK = ROOT / "benchmark.sh"

# Trains nothing, but has the lock, the checkpoints, the signals and the exit codes of the scripts.
# After each 100 steps it waits for the file GATE, if given; SAVING: seconds to stop.
STAND_IN = f"""#!{sys.executable} -S
import fcntl, json, os, signal, sys, time
from pathlib import Path

words, options = sys.argv, dict(zip(sys.argv[2::2], sys.argv[3::2]))
seed, total, stopped = options["--seed"], int(options.get("--total-timesteps", 300)), 0
name = options["--env-id"] + "__" + Path(words[1]).stem + "__" + seed
folder = Path(options["--runs-dir"], name)

def record(event):
    with open(os.environ["EVENTS"], "a") as f:
        f.write(json.dumps([event, seed, os.environ.get("CUDA_VISIBLE_DEVICES"), words]) + "\\n")

def stop(number, frame):
    global stopped
    stopped = number
    signal.signal(number, signal.SIG_DFL)

signal.signal(signal.SIGTERM, stop)
record("start")
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
steps = (folder / "steps").read_text().split() if (folder / "steps").exists() else []
print("45% | 135/300", end="\\r", flush=True)
if seed == os.environ.get("FAIL"):
    sys.exit("some text\\nerror: it fails on purpose\\nlast words")
if seed == os.environ.get("KILL"):
    os.kill(os.getpid(), signal.SIGKILL)
while len(steps) * 100 < total and not stopped:
    steps.append(str(len(steps) * 100 + 100))
    (folder / "steps").write_text(" ".join(steps))
    while not stopped and not os.path.exists(os.environ.get("GATE", "/")):
        time.sleep(0.01)
if len(steps) * 100 < total:
    time.sleep(float(os.environ.get("SAVING", 0)))
record("end")
sys.exit(128 + stopped if len(steps) * 100 < total else 0)
"""

ONE = ("--algos", "meow", "--envs", "Hopper-v4")
WHOLE = "100 200 300"


class Bench:
    """benchmark.sh in an empty folder with the stand-in for Python."""

    def __init__(self, folder):
        self.folder, self.out, self.gate = folder, folder / "runs", folder / "gate"
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "SLURM"))
        }
        self.env |= {
            "PYTHON": str(self.program("stand-in", STAND_IN)),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.env |= {
            "EVENTS": str(folder / "events"),
            "PATH": f"{folder}:{os.environ['PATH']}",
        }

    def program(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)
        return self.folder / name

    def start(self, *words, script=BENCHMARK, **env):
        # a shell can't catch what was ignored when it began, as in jobs in the background
        options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        options |= {
            "cwd": self.folder,
            "env": self.env | env,
            "start_new_session": True,
        }
        options |= {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        return subprocess.Popen([str(script), *words], **options)

    def run(self, *words, code=0, **env):
        return output(self.start(*words, **env), code)

    def events(self, name="start"):
        """[seed, CUDA_VISIBLE_DEVICES, command words] of each run that started or ended."""
        file = self.folder / "events"
        lines = file.read_text().splitlines() if file.exists() else []
        return [rest for event, *rest in map(json.loads, lines) if event == name]

    def steps(self):
        """The steps that each run has made, by seed."""
        return {f.parent.name[-1]: f.read_text() for f in self.out.glob("*/steps")}

    def gated(self, *words, runs, **options):
        """Started, when so many runs have made their first 100 steps and wait for the gate."""
        process = self.start(*words, GATE=str(self.gate), **options)
        wait_for(lambda: list(self.steps().values()) == runs * ["100"], process)
        return process


def output(process, code=0):
    """All that it wrote, errors included."""
    text = process.communicate(timeout=200)[0]
    assert process.returncode == code, text
    return text


def wait_for(condition, process=None):
    deadline = time.monotonic() + 100
    while not condition():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it is stuck"
        time.sleep(0.02)


def after(words, option):
    return words[words.index(option) + 1]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_default_matrix(bench):
    """Two algorithms, five tasks, five seeds, each task with the script's own number of steps."""
    runs = [shlex.split(line) for line in bench.run("--dry-run").splitlines()]
    envs = [
        f"{name}-v4"
        for name in ("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid")
    ]
    scripts = [str(ROOT / f"{name}_continuous_action.py") for name in ("meow", "sac")]
    found = [
        (words[1], after(words, "--env-id"), after(words, "--seed")) for words in runs
    ]
    assert found == [
        (script, env, seed) for script in scripts for env in envs for seed in "12345"
    ]
    assert all(after(words, "--resume") == "auto" for words in runs)
    assert not any("--total-timesteps" in words for words in runs)
    assert not bench.out.exists()
    assert not bench.events()


def test_dry_run_prints_what_is_run(bench):
    """The commands of a dry run are those that run, options after -- included."""
    words = [
        "--algos",
        "sql,sb3-sac ppo",
        "--envs",
        "Hopper-v4 a:B*",
        "--seeds",
        "08,1-2",
    ]
    words += ["--total-timesteps", "100", "--out", "a b", "--workers", "6"]
    text = bench.run(*words, "--dry-run", "--", "--tau", "0.1 2")
    runs = [shlex.split(line) for line in text.splitlines()]
    bench.run(*words, "--", "--tau", "0.1 2")
    assert sorted(command for _, _, command in bench.events()) == sorted(runs)
    scripts = [Path(words[1]).name for words in runs[::6]]
    assert scripts == [
        "sql_continuous_action.py",
        "sb3_baselines.py",
        "sb3_baselines.py",
    ]
    assert [after(words, "--algo") for words in runs[6::6]] == ["sac", "ppo"]
    assert [after(words, "--env-id") for words in runs[::3]] == 3 * [
        "Hopper-v4",
        "a:B*",
    ]
    assert [after(words, "--seed") for words in runs] == 6 * ["8", "1", "2"]
    common = [
        "--runs-dir",
        "a b",
        "--resume",
        "auto",
        "--total-timesteps",
        "100",
        "--tau",
        "0.1 2",
    ]
    assert all(words[-8:] == common for words in runs)
    assert len(list((bench.folder / "a b" / "logs").iterdir())) == 18


BAD = """--algos meow,dqn; --seeds one; --seeds 3-1; --seeds 1-; --workers 0; --workers two; --out;
--total-timesteps 1e6; --total-timesteps; --out --dry-run; --out /dev/null; --envs ,; --sedes 1;
hopper; -- --seed 7; --seeds 1 -- --total_timesteps=7"""


@pytest.mark.parametrize("words", re.split(r";\s", BAD))
def test_bad_input_is_one_sentence(bench, words):
    text = bench.run(*words.split(" "), code=2)
    assert re.fullmatch("error: .*\n", text)
    assert words.removeprefix("--seeds 1 ").split(" ")[0] in text
    assert not bench.out.exists()


def test_help(bench):
    text = bench.run("--help")
    for name in "algos envs seeds workers total-timesteps out dry-run slurm slurm-options".split():
        assert f"--{name} " in text


def test_the_same_command_again(bench):
    """It starts every run again; a run itself knows that it is finished, or goes on."""
    words = (*ONE, "--seeds", "1-3", "--workers", "2", "--total-timesteps")
    for total, steps in (("200", "100 200"), ("200", "100 200"), ("300", WHOLE)):
        assert "3 runs are finished, 0 failed" in bench.run(*words, total)
        assert bench.steps() == dict.fromkeys("123", steps)
    assert len(bench.events()) == 9


def test_failures_are_named(bench):
    """One run fails and one is killed; the others finish. An error of an earlier time is past."""
    words = (*ONE, "--seeds", "1-4", "--workers", "2")
    log = "failed: runs/logs/Hopper-v4__meow__"
    lines = bench.run(*words, code=1, FAIL="2", KILL="3").splitlines()
    failed = f"{log}2.log: exit code 1: error: it fails on purpose"
    killed = f"{log}3.log: exit code 137: 45% | 135/300"
    assert lines[-3:] == ["2 runs are finished, 2 failed", failed, killed]
    lines = bench.run(*words, code=1, KILL="2").splitlines()
    assert lines[-1] == killed.replace("3.log", "2.log")
    assert "4 runs are finished, 0 failed" in bench.run(*words)
    text = bench.run(*ONE, "--seeds", "1", code=1, PYTHON="no-such-python")
    assert "no-such-python" in text.splitlines()[-1]


@pytest.mark.slow
def test_progress(bench):
    """Every 30 seconds (here after two) the counts and the last line of each log."""
    process = bench.gated(
        *ONE, "--seeds", "1-3", "--workers", "2", runs=2, SECONDS="28"
    )
    lines = [process.stdout.readline() for _ in range(3)]
    bench.gate.touch()
    output(process)
    assert lines[0] == "0 finished, 0 failed, 1 waiting; running:\n"
    assert lines[2] == "  runs/logs/Hopper-v4__meow__2.log: 45% | 135/300\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all"), [(2, False), (15, False), (2, True), (15, True)]
)
def test_a_signal_stops_with_checkpoints(bench, number, to_all):
    """Each run gets it once, even if it goes to all: a second one would end it before it saves."""
    words = (*ONE, "--seeds", "1-3", "--workers", "2")
    process = bench.gated(*words, runs=2, SAVING="0.6")
    (os.killpg if to_all else os.kill)(process.pid, number)
    text = output(process, 128 + number)
    assert (
        f"stopped; go on with the same command: {shlex.join([str(BENCHMARK), *words])}"
        in text
    )
    assert "failed:" not in text
    assert len(bench.events("end")) == len(bench.events()) == 2
    bench.run(*words)
    assert bench.steps() == dict.fromkeys("123", WHOLE)


def test_a_second_signal_stops_at_once(bench):
    process = bench.gated(*ONE, "--seeds", "1-2", runs=2, SAVING="1000")
    process.terminate()
    assert "stopping" in process.stdout.readline()
    time.sleep(0.5)  # the first one has arrived at the runs
    process.terminate()
    output(process, 128 + signal.SIGTERM)
    assert not bench.events("end")


def test_killed_alone_its_runs_live_on(bench):
    """They end, no other begins; the same command waits for them instead of training twice."""
    words = (*ONE, "--seeds", "1-3", "--workers", "2")
    process = bench.gated(*words, runs=2)
    process.kill()
    process.wait()
    again = bench.start(*words)
    wait_for(lambda: len(bench.events()) == 4, again)
    assert not bench.events("end")
    bench.gate.touch()
    assert "3 runs are finished" in output(again)
    assert bench.steps() == dict.fromkeys("123", WHOLE)
    assert len(bench.events()) == len(bench.events("end")) == 5


def test_edited_while_it_runs(bench):
    script = shutil.copy(BENCHMARK, bench.folder)
    (bench.folder / SCRIPT.name).touch()
    process = bench.gated(
        *ONE, "--seeds", "1-3", "--workers", "1", script=script, runs=1
    )
    Path(script).write_text("exit 77\n" * 1000)
    bench.gate.touch()
    assert "3 runs are finished" in output(process)


CORES = min(9, len(os.sched_getaffinity(0)))
GPUS = [
    (None, "3", "0 1 2"),
    (None, "2", "0 1"),
    (None, "4", "0 0 1 2"),
    (None, "", "0 1 2"),
]
GPUS += [
    ("2,GPU-1b", "", "2 GPU-1b"),
    ("", "2", " "),
    ("-1", "", " ".join(["-1"] * CORES)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "workers", "devices"), GPUS)
def test_each_run_has_its_gpu(bench, given, workers, devices):
    """At no time are there more runs than workers, nor two on a GPU while there are enough."""
    bench.program(
        "nvidia-smi", "#!/bin/sh\nprintf 'GPU %s: A\\n  MIG 1g Device 0:\\n' 0 1 2\n"
    )
    bench.env.pop("CUDA_VISIBLE_DEVICES")
    env = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    devices, running = devices.split(" "), []
    words = (*ONE, "--seeds", "1-9", *(["--workers", workers] if workers else []))
    process = bench.gated(*words, runs=len(devices), **env)
    assert sorted(device for _, device, _ in bench.events()) == devices
    bench.gate.touch()
    output(process)
    for line in (bench.folder / "events").read_text().splitlines():
        event, _, device, _ = json.loads(line)
        (running.append if event == "start" else running.remove)(device)
        assert all(running.count(d) <= devices.count(d) for d in running)


def test_slurm_script(bench):
    """One array; each element trains the run of its index."""
    words = (
        "--algos",
        "meow",
        "--envs",
        "Hopper-v4 Ant-v4",
        "--seeds",
        "1-2",
        "--workers",
        "3",
    )
    words += ("--slurm", "--slurm-options", "--partition=gpu --time=24:00:00")
    text = bench.run(*words, "--dry-run", "--", "--tau", "0.1")
    assert not bench.out.exists()
    bench.program("sbatch", "#!/bin/sh\ncat >submitted\n")
    bench.run(*words, "--", "--tau", "0.1")
    assert (bench.folder / "submitted").read_text() == text
    given = set(" ".join(re.findall("^#SBATCH (.*)", text, re.M)).split())
    assert given >= {"--array=0-3%3", "--requeue", "--partition=gpu", "--time=24:00:00"}
    script = bench.program("array", text)
    for index in ("0", "3"):  # as Slurm runs it
        output(bench.start(script=script, SLURM_ARRAY_TASK_ID=index))
    calls = [command for _, _, command in bench.events()]
    assert [after(c, "--env-id") + after(c, "--seed") for c in calls] == [
        "Hopper-v41",
        "Ant-v42",
    ]
    assert all(after(c, "--tau") == "0.1" for c in calls)


@pytest.mark.parametrize(
    ("number", "steps"), [(signal.SIGUSR1, "100"), (signal.SIGTERM, WHOLE)]
)
def test_slurm_signals(bench, number, steps):
    """The warning stops and requeues the run; SIGTERM isn't forwarded: Slurm sends it to all."""
    bench.program("scontrol", "#!/bin/sh\necho $* >requeued\n")
    script = bench.program("array", bench.run(*ONE, "--slurm", "--dry-run"))
    process = bench.gated(
        script=script, runs=1, SLURM_ARRAY_TASK_ID="2", SLURM_JOB_ID="77"
    )
    process.send_signal(number)
    assert "stopping" in process.stdout.readline()
    if number == signal.SIGTERM:
        time.sleep(0.3)  # one that was forwarded would have stopped the run by now
        bench.gate.touch()
    output(process, 128 + number)
    assert bench.steps() == {"3": steps}
    requeued = bench.folder / "requeued"
    assert requeued.exists() == (number == signal.SIGUSR1)
    assert not requeued.exists() or requeued.read_text() == "requeue 77\n"


def ask(*command):
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20
        ).stdout
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(
    "UP" not in ask("scontrol", "ping"),
    reason="needs a Slurm cluster: tools/single_node_slurm.sh makes one",
)
def test_real_slurm_array_with_requeue(bench):
    """One element is requeued while it trains and goes on from its checkpoint."""
    text = bench.run(*ONE, "--seeds", "1-3", "--slurm", GATE=str(bench.gate))
    job = re.search(r"Submitted batch job (\d+)", text)[1]
    try:
        wait_for(lambda: "1" in bench.steps())
        ask("scontrol", "requeue", f"{job}_0")
        wait_for(lambda: bench.events("end"))
        assert bench.steps()["1"] == "100"
        bench.gate.touch()
        wait_for(lambda: not ask("squeue", "--noheader", f"--jobs={job}"))
    finally:
        ask("scancel", job)
    assert bench.steps() == dict.fromkeys("123", WHOLE)
    assert len(bench.events()) == len(bench.events("end")) == 4


@pytest.mark.slow
def test_real_run_killed_out_of_space_and_started_again(bench):
    """SIGKILL, then a checkpoint that doesn't fit: in the end the numbers of a whole run."""
    words = "--algos meow --envs InvertedPendulum-v4 --seeds 2 --workers 1 --total-timesteps 200"
    words += " -- --learning-starts 80 --batch-size 16 --eval-frequency 100 --eval-episodes 1"
    words += " --log-frequency 20 --checkpoint-frequency 50 --no-compile"

    def rows(folder):
        files = bench.folder.glob(f"{folder}/Inverted*/metrics.csv")
        return [line.split(",") for f in files for line in f.read_text().splitlines()]

    def numbers(folder):
        return [(row[0], *row[2:]) for row in rows(folder) if row[2] != "charts/SPS"]

    def start(folder, *before):
        script, *given = [*before, BENCHMARK, "--out", folder, *words.split()]
        return bench.start(*map(str, given), script=script, PYTHON=sys.executable)

    output(start("whole"))
    process = start("killed")
    wait_for(lambda: "120" in [row[0] for row in rows("killed")], process)
    children = (
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    for pid in (process.pid, *children):
        with contextlib.suppress(
            ProcessLookupError
        ):  # a `sleep` that has ended by itself
            os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert int(rows("killed")[-1][0]) < 200
    text = output(
        start("killed", "prlimit", "--fsize=100000"), 1
    )  # as if the disk were full
    assert re.search(
        "failed: .*: exit code 1: error: can't write .*previous one is intact", text
    )
    assert int(rows("killed")[-1][0]) < 200
    assert "1 runs are finished" in output(start("killed"))
    assert numbers("killed") == numbers("whole")
