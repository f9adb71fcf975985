"""tools/benchmark.py, benchmark.sh: what runs, is repeated, is stopped; for real."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

BENCHMARK = ROOT / "tools" / "benchmark.py"
LIST = ROOT / "benchmark.sh"

# Trains nothing, but has the lock, the checkpoints, the signals and the exit codes of
# the scripts. After each 100 steps it waits for the file GATE, if given.
# SAVING: seconds to stop.
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path

words, options = sys.argv, dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed, total = options["--seed"], int(options.get("--total-timesteps", 300))
name = "__".join([options["--env-id"], Path(words[0]).stem, seed])
folder = Path(options["--runs-dir"], name)
stopped = 0

def record(event):
    row = [event, seed, os.environ.get("CUDA_VISIBLE_DEVICES"), words, os.getpid()]
    with open(os.environ["EVENTS"], "a") as f:
        f.write(json.dumps(row) + "\\n")

def stop(number, frame):
    global stopped
    stopped = number
    signal.signal(number, signal.SIG_DFL)

signal.signal(signal.SIGTERM, stop)
record("start")
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
file = folder / "steps"
steps = file.read_text().split() if file.exists() else []
print("45% | 135/300", end="\\r", flush=True)
if seed == os.environ.get("FAIL"):
    sys.exit("some text\\nerror: it fails on purpose\\nlast words")
if seed == os.environ.get("KILL"):
    os.kill(os.getpid(), signal.SIGKILL)
while len(steps) * 100 < total and not stopped:
    steps.append(str(len(steps) * 100 + 100))
    file.write_text(" ".join(steps))
    while not stopped and not os.path.exists(os.environ.get("GATE", "/")):
        time.sleep(0.01)
if len(steps) * 100 < total:
    time.sleep(float(os.environ.get("SAVING", 0)))
record("end")
sys.exit(128 + stopped if len(steps) * 100 < total else 0)
"""

WHOLE = "100 200 300"


class Bench:
    """The launcher in an empty folder, with a stand-in for a training script."""

    def __init__(self, folder):
        self.folder, self.out, self.gate = folder, folder / "runs", folder / "gate"
        self.processes = []
        self.script = self.program("stand_in.py", STAND_IN)
        self.one = (str(self.script), "--env-ids", "Hopper-v4")
        self.program("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CUDA", "SLURM"))
        }
        self.env["CUDA_VISIBLE_DEVICES"] = ""
        self.env["EVENTS"] = str(folder / "events")
        self.env["PATH"] = f"{folder}:{os.environ['PATH']}"

    def program(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)
        return self.folder / name

    def start(self, *words, program=(sys.executable, BENCHMARK), ignored=(), **env):
        """ignored: signals that are ignored from the start, as under nohup."""

        def signals():  # a job in the background ignores SIGINT
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        process = subprocess.Popen(
            [str(word) for word in (*program, *words)],
            cwd=self.folder,
            env=self.env | env,
            preexec_fn=signals,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def close(self):
        """Ends what a failed test left."""
        self.gate.touch()
        for process in self.processes:
            process.kill()

    def run(self, *words, code=0, **options):
        return output(self.start(*words, **options), code)

    def events(self, name="start"):
        """[seed, CUDA_VISIBLE_DEVICES, words, process] of each run that did this."""
        file = self.folder / "events"
        lines = file.read_text().splitlines() if file.exists() else []
        return [rest for event, *rest in map(json.loads, lines) if event == name]

    def commands(self):
        return [command for _, _, command, _ in self.events()]

    def steps(self):
        """The steps that each run has made, by seed."""
        return {f.parent.name[-1]: f.read_text() for f in self.out.glob("*/steps")}

    def gated(self, *words, runs, **options):
        """Started, once so many runs made their first 100 steps and wait for it."""
        process = self.start(*words, GATE=str(self.gate), **options)
        wait_for(lambda: list(self.steps().values()) == runs * ["100"], process)
        return process


def output(process, code=0):
    """All that it wrote, errors included."""
    text = process.communicate(timeout=100)[0]
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
    bench = Bench(tmp_path)
    yield bench
    bench.close()


# --- 1. What runs ---------------------------------------------------------------------
def test_list_of_experiments(bench):
    """Two algorithms, five tasks, five seeds: exactly these commands, and no file."""
    names = ("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid")
    expected = [
        f"{sys.executable} {ROOT}/{script}_continuous_action.py --env-id {name}-v4 "
        f"--seed {seed} --runs-dir runs --resume auto"
        for script in ("meow", "sac")
        for name in names
        for seed in (1, 2, 3, 4, 5)
    ]
    text = bench.run("--dry-run", program=[LIST])
    assert text.splitlines() == expected
    assert not bench.out.exists()


def test_list_of_experiments_passes_options_on(bench):
    words = "--seeds 1-3 --total-timesteps 300000 --env-ids A B --dry-run -- --tau 0.1"
    lines = bench.run(*words.split(), program=[LIST]).splitlines()
    runs = [shlex.split(line) for line in lines]
    assert len(runs) == 2 * 2 * 3
    assert {after(run, "--env-id") for run in runs} == {"A", "B"}
    assert {after(run, "--seed") for run in runs} == {"1", "2", "3"}
    end = ["--total-timesteps", "300000", "--tau", "0.1"]
    assert all(run[-4:] == end for run in runs)


def test_list_of_experiments_is_plain():
    """One screen of commands, which any bash can read."""
    assert subprocess.run(["bash", "-n", LIST]).returncode == 0
    text = LIST.read_text()
    assert not re.search(r"\b(getopts|case|while|setsid|nproc|realpath)\b", text)


@pytest.mark.slow
def test_every_experiment_of_the_list_is_a_command(bench):
    """Those that are commented out too: each script knows its options."""
    bench.program("tools", "").unlink()
    (bench.folder / "tools").symlink_to(ROOT / "tools")
    every = re.sub(r'^  # "', '  "', LIST.read_text(), flags=re.MULTILINE)
    script = bench.program("every.sh", every)
    lines = bench.run("--dry-run", "--seeds", "1", program=[script]).splitlines()
    assert len(lines) > 10
    for line in lines:
        _, script, *words = shlex.split(line)
        module = importlib.import_module(Path(script).stem)
        assert tyro.cli(module.Args, args=words).env_id == after(words, "--env-id")


def test_dry_run_prints_what_is_run(bench):
    """Its commands are those that run, options after -- included; each once."""
    other = bench.program("other.py", STAND_IN)
    words = [f"{bench.script} --algo sac", f"{other} --env_id=Own --tau '0 1'", other]
    words += ["--env-ids", "Hopper-v4", "a:B*", "--seeds", "08,1-2,1"]
    words += ["--total-timesteps", "100", "--out", "a b", "--workers", "6"]
    extra = ["--", "--gamma", "0.1 2"]
    text = bench.run(*words, "--dry-run", *extra)
    assert not (bench.folder / "a b").exists()
    runs = [shlex.split(line) for line in text.splitlines()]
    bench.run(*words, *extra)
    assert sorted(bench.commands()) == sorted(run[1:] for run in runs)
    assert {run[0] for run in runs} == {sys.executable}

    assert [run[1] for run in runs[::3]] == [
        str(script) for script in (bench.script, bench.script, other, other, other)
    ]
    envs = ["Hopper-v4", "a:B*", "Own", "Hopper-v4", "a:B*"]
    assert [after(run, "--env-id") for run in runs[::3]] == envs
    assert [after(run, "--seed") for run in runs] == 5 * ["8", "1", "2"]
    assert all(run[2:4] == ["--algo", "sac"] for run in runs[:6])
    assert all(run[2:4] == ["--tau", "0 1"] for run in runs[6:9])
    common = ["--runs-dir", "a b", "--resume", "auto", "--total-timesteps", "100"]
    assert all(run[-8:] == [*common, "--gamma", "0.1 2"] for run in runs)
    assert len(list((bench.folder / "a b" / "logs").iterdir())) == 15


def test_logs_have_names_of_their_own(bench):
    """Also where only the end of many options differs."""
    many = " ".join(f"--option-{i} {i}" for i in range(30))
    commands = [f"{bench.script} {many} --tau {tau}" for tau in (1, 2)]
    bench.run(*commands, *bench.one[1:], "--seeds", "1-2")
    logs = list((bench.out / "logs").iterdir())
    assert len(logs) == 4
    assert all(len(re.findall("^# ", log.read_text(), re.M)) == 1 for log in logs)


BAD = """meow_; meow_continuous_action.py --seed 1; sac_continuous_action.py --resume=x;
--env-ids ; meow_continuous_action.py '; --seeds one; --seeds 3-1; --seeds 1-;
--seeds ,; --workers 0; --total-timesteps 0; --out /dev/null; -- --seed 7;
-- --total_timesteps=7; -- --env-id A; -- --runs-dir x;
sql_continuous_action.py --env-id"""


@pytest.mark.parametrize("words", re.split(r";\s", BAD))
def test_bad_input_is_one_sentence(bench, words):
    if words.startswith("--"):
        given = [*bench.one, *words.split()]
    else:
        given = [words, "--env-ids", "A"]
    text = bench.run(*given, code=2)
    assert re.fullmatch("error: .*\n", text)
    assert words.split()[0] in text
    assert not bench.out.exists()


@pytest.mark.parametrize(
    "words", ["--sedes 1", "--workers two", "--total-timesteps 1e6", "--out"]
)
def test_bad_option_is_explained(bench, words):
    text = bench.run(*bench.one, *words.split(), code=2)
    assert "Traceback" not in text
    assert words.split()[0] in text
    assert not bench.out.exists()


def test_nothing_to_run(bench):
    assert "no command" in bench.run(code=2)


# --- 2. Repeating, failing, reporting -------------------------------------------------
def test_the_same_command_again(bench):
    """It starts every run; a run itself knows that it is finished, or goes on."""
    words = (*bench.one, "--seeds", "1-3", "--workers", "2", "--total-timesteps")
    for total, steps in (("200", "100 200"), ("200", "100 200"), ("300", WHOLE)):
        assert "3 runs are finished, 0 failed" in bench.run(*words, total)
        assert bench.steps() == dict.fromkeys("123", steps)
    assert len(bench.events()) == 9


def test_failures_are_named(bench):
    """One run fails, one is killed; the others finish. An earlier error is past."""
    words = (*bench.one, "--seeds", "1-4", "--workers", "2")
    log = "failed: runs/logs/Hopper-v4__stand_in__"
    failed = f"{log}2.log: exit code 1: error: it fails on purpose"
    killed = f"{log}3.log: exit code 137: 45% | 135/300"
    lines = bench.run(*words, code=1, FAIL="2", KILL="3").splitlines()
    assert lines[-4] == "2 runs are finished, 2 failed"
    assert sorted(lines[-3:-1]) == [failed, killed]
    lines = bench.run(*words, code=1, KILL="2").splitlines()
    assert lines[-2] == killed.replace("3.log", "2.log")
    assert "4 runs are finished, 0 failed" in bench.run(*words)


def test_run_that_cannot_start_is_a_failure(bench):
    """Here because the interpreter is gone."""
    python = bench.folder / "interpreter"
    python.symlink_to(sys.executable)
    process = bench.gated(
        *bench.one,
        *("--seeds", "1-2", "--workers", "1"),
        program=[python, BENCHMARK],
        runs=1,
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    python.unlink()
    bench.gate.touch()
    text = output(process, 1)
    assert "1 runs are finished, 1 failed" in text
    assert re.search("2.log: exit code 1: .*No such file .*interpreter", text)


def test_comparison_is_named(bench):
    """The last line is the command that compares the runs."""
    text = bench.run(*bench.one, "--seeds", "1", "--out", "a b")
    command = "python tools/compare.py 'a b'"
    assert text.splitlines()[-1] == f"compare them: {command}"


@pytest.mark.slow
def test_progress(bench):
    """Now and then the counts and the last line of each log."""
    words = (*bench.one, "--seeds", "1-3", "--workers", "2", "--progress-seconds", "1")
    process = bench.gated(*words, runs=2)
    lines = [process.stdout.readline() for _ in range(3)]
    bench.gate.touch()
    output(process)
    assert lines[0] == "0 finished, 0 failed, 1 waiting; running:\n"
    assert sorted(lines[1:]) == [
        f"  runs/logs/Hopper-v4__stand_in__{seed}.log: 45% | 135/300\n"
        for seed in (1, 2)
    ]


def test_logs_that_cannot_be_written(bench):
    """No log, a full disk under the launcher's own output: the runs train."""
    (bench.out / "logs" / "Hopper-v4__stand_in__1.log").mkdir(parents=True)
    process = bench.start(*bench.one, "--seeds", "1-2")
    assert "2 runs are finished" in output(process)
    words = shlex.join([sys.executable, str(BENCHMARK), *bench.one, "--seeds", "3"])
    bench.run("-c", f"{words} >/dev/full", program=["bash"])
    assert bench.steps() == dict.fromkeys("123", WHOLE)


# --- 3. Stopping ----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_checkpoints(bench, number, to_all):
    """Each run gets it once, even if it goes to all: a second one would end it."""
    words = (*bench.one, "--seeds", "1-3", "--workers", "2")
    process = bench.gated(*words, runs=2, SAVING="0.6")
    (os.killpg if to_all else os.kill)(process.pid, number)
    text = output(process, 128 + number)
    again = shlex.join([Path(sys.executable).name, str(BENCHMARK), *words])
    assert f"stopped; the same command goes on: {again}\n" in text
    assert "failed:" not in text
    assert len(bench.events("end")) == len(bench.events()) == 2
    bench.run(*words)
    assert bench.steps() == dict.fromkeys("123", WHOLE)


def test_list_of_experiments_stops_with_checkpoints(bench):
    """benchmark.sh is no process of its own that could stay behind."""
    (bench.folder / "tools").symlink_to(ROOT / "tools")
    text = LIST.read_text().replace('"meow_continuous_action.py"', str(bench.script))
    text = text.replace('  "sac_', '  # "sac_')
    script = bench.program("list.sh", text)
    words = ("--env-ids", "Hopper-v4", "--seeds", "1-2", "--workers", "2")
    process = bench.gated(*words, program=[script], runs=2, SAVING="0.3")
    process.terminate()
    output(process, 128 + signal.SIGTERM)
    assert len(bench.events("end")) == 2


def test_a_second_signal_stops_at_once(bench):
    process = bench.gated(*bench.one, "--seeds", "1-2", runs=2, SAVING="1000")
    process.terminate()
    assert "stopping" in process.stdout.readline()
    time.sleep(0.5)  # the first one has arrived at the runs
    process.terminate()
    output(process, 128 + signal.SIGTERM)
    assert not bench.events("end")


def test_under_nohup_a_closed_terminal_stops_nothing(bench):
    words = (*bench.one, "--seeds", "1")
    process = bench.gated(*words, runs=1, ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    bench.gate.touch()
    assert "1 runs are finished" in output(process)


def test_killed_alone_its_runs_live_on(bench):
    """No other begins; the same command waits for them and trains nothing twice."""
    words = (*bench.one, "--seeds", "1-3", "--workers", "2")
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


# --- 4. GPUs --------------------------------------------------------------------------
CORES = min(9, len(os.sched_getaffinity(0)))
GPUS = [  # CUDA_VISIBLE_DEVICES, --workers, what the runs get at first
    (None, "3", "0 1 2"),
    (None, "2", "0 1"),
    (None, "4", "0 0 1 2"),
    (None, "", "0 1 2"),
    ("2,GPU-1b", "", "2 GPU-1b"),
    ("", "2", " "),
    ("-1", "", " ".join(["-1"] * CORES)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "workers", "devices"), GPUS)
def test_each_run_has_its_gpu(bench, given, workers, devices):
    """Never more runs than workers, nor two on a GPU while there are enough."""
    listing = r"GPU %s: A\n  MIG 1g Device 0:\n"
    bench.program("nvidia-smi", f"#!/bin/sh\nprintf '{listing}' 0 1 2\n")
    bench.env.pop("CUDA_VISIBLE_DEVICES")
    env = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    devices, running = devices.split(" "), []
    words = [*bench.one, "--seeds", "1-9"]
    if workers:
        words += ["--workers", workers]
    process = bench.gated(*words, runs=len(devices), **env)
    assert sorted(device for _, device, *_ in bench.events()) == devices
    bench.gate.touch()
    output(process)
    for line in (bench.folder / "events").read_text().splitlines():
        event, _, device, *_ = json.loads(line)
        (running.append if event == "start" else running.remove)(device)
        assert all(running.count(d) <= devices.count(d) for d in running)


# --- 5. Slurm -------------------------------------------------------------------------
SBATCH = """#!/bin/sh
cp "$1" submitted
echo Submitted batch job 77
"""
SRUN = """#!/bin/sh
while [ "$1" != -u ]; do python=$1; shift; done
echo $$ >srun.pid
exec "$python" "$@"
"""


class FakeSlurm:
    """sbatch keeps the script, srun runs its command here, scontrol keeps its words."""

    def __init__(self, bench):
        self.bench = bench
        bench.program("sbatch", SBATCH)
        bench.program("srun", SRUN)
        bench.program("scontrol", "#!/bin/sh\n(echo $*; cat events) >requeued\n")

    def script(self):
        return (self.bench.folder / "submitted").read_text()

    def environment(self, index):
        return {
            "SLURM_JOB_ID": "79",
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_PROCID": "0",
        }


def test_slurm_array(bench):
    """One array; each element trains the run of its index."""
    slurm = FakeSlurm(bench)
    words = [bench.script, "--env-ids", "Hopper-v4", "Ant-v4", "--seeds", "1-2"]
    words += ["--workers", "3", "--slurm", "--slurm-options", "partition=gpu"]
    words += ["time=24:00:00", "exclusive", "--", "--tau", "0.1"]
    text = bench.run(*words)
    assert "submitted batch job 77: 4 runs" in text
    assert "python tools/compare.py runs" in text
    given = set(re.findall("^#SBATCH (.*)", slurm.script(), re.M))
    assert given >= {"--array=0-3%3", "--requeue", "--open-mode=append", "--exclusive"}
    assert given >= {"--signal=USR2@120", "--partition=gpu", "--time=24:00:00"}
    script = bench.folder / "submitted"
    for index in (0, 3):  # as Slurm runs it
        bench.run(program=["bash", script], **slurm.environment(index))
    runs = bench.commands()
    assert [after(run, "--env-id") for run in runs] == ["Hopper-v4", "Ant-v4"]
    assert [after(run, "--seed") for run in runs] == ["1", "2"]
    assert all(after(run, "--tau") == "0.1" for run in runs)


def test_slurm_failure(bench):
    """The element fails as its run does. All may train at a time, unless told."""
    slurm = FakeSlurm(bench)
    bench.run(*bench.one, "--slurm")
    assert "#SBATCH --array=0-4%5\n" in slurm.script()
    script = bench.folder / "submitted"
    environment = slurm.environment(2) | {"FAIL": "3"}
    bench.run(program=["bash", script], code=1, **environment)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_slurm_signals(bench, number):
    """Both go to all processes. The warning saves and requeues, SIGTERM only saves."""
    slurm = FakeSlurm(bench)
    bench.run(*bench.one, "--slurm")
    script = ["bash", bench.folder / "submitted"]
    environment = slurm.environment(2)
    process = bench.gated(program=script, runs=1, SAVING="0.5", **environment)
    ((*_, run),) = bench.events()
    launcher = int((bench.folder / "srun.pid").read_text())
    os.kill(run, number)
    os.kill(launcher, number)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert len(bench.events("end")) == 1
    assert bench.steps() == {"3": "100"}
    requeued = bench.folder / "requeued"
    if number == signal.SIGTERM:
        assert not requeued.exists()
    else:
        words, *before = requeued.read_text().splitlines()
        assert words == "requeue 77_2"
        assert len(before) == 2  # it began and ended
    bench.run(program=script, **environment)
    assert bench.steps() == {"3": WHOLE}


@pytest.mark.parametrize("missing", ["srun", "partition"])
def test_slurm_that_does_not_take_it(bench, missing):
    """One sentence at the end; sbatch's own words may come before."""
    FakeSlurm(bench)
    bench.program("sbatch", "#!/bin/sh\necho sbatch: no partition >&2\nexit 1\n")
    env = {}
    if missing == "srun":
        (bench.folder / "srun").unlink()
        env["PATH"] = str(bench.folder)
    text = bench.run(*bench.one, "--slurm", code=2, **env)
    assert "Traceback" not in text
    assert re.match(f"error: --slurm: .*{missing}", text.splitlines()[-1])


def ask(*command):
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return ""
    return answer.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    "UP" not in ask("scontrol", "ping"),
    reason="needs a Slurm cluster: tools/single_node_slurm.sh makes one",
)
def test_real_slurm_array_with_requeue(bench):
    """Slurm warns one element, another is requeued by hand; both save and go on."""
    text = bench.run(*bench.one, "--seeds", "1-3", "--slurm", GATE=str(bench.gate))
    job = re.search(r"submitted batch job (\d+)", text)[1]
    try:
        wait_for(lambda: "1" in bench.steps())
        ask("scancel", "--signal=USR2", f"{job}_0")
        wait_for(lambda: len(bench.events("end")) == 1)
        wait_for(lambda: "2" in bench.steps())
        ask("scontrol", "requeue", f"{job}_1")
        wait_for(lambda: len(bench.events("end")) == 2)
        assert bench.steps()["1"] == bench.steps()["2"] == "100"
        bench.gate.touch()
        wait_for(lambda: not ask("squeue", "--noheader", f"--jobs={job}"))
    finally:
        ask("scancel", job)
    assert bench.steps() == dict.fromkeys("123", WHOLE)
    assert len(bench.events()) == len(bench.events("end")) == 5


# --- 6. For real ----------------------------------------------------------------------
REAL = """--env-ids InvertedPendulum-v4 --seeds 2 --total-timesteps 200
-- --learning-starts 80 --batch-size 16 --eval-frequency 100 --eval-episodes 1
--log-frequency 20 --checkpoint-frequency 50 --no-compile"""


@pytest.mark.slow
def test_real_run_killed_out_of_space_and_started_again(bench):
    """SIGKILL, then a checkpoint that doesn't fit: in the end a whole run's numbers."""

    def rows(folder):
        files = bench.folder.glob(f"{folder}/Inverted*/metrics.csv")
        return [line.split(",") for f in files for line in f.read_text().splitlines()]

    def numbers(folder):
        return [(row[0], *row[2:]) for row in rows(folder) if row[2] != "charts/SPS"]

    def start(folder, *before):
        program = (*before, sys.executable, BENCHMARK, "meow_continuous_action.py")
        return bench.start("--out", folder, *REAL.split(), program=program)

    output(start("whole"))
    process = start("killed")
    wait_for(lambda: "120" in [row[0] for row in rows("killed")], process)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    (run,) = [int(child) for task in tasks for child in task.read_text().split()]
    process.kill()
    os.kill(run, signal.SIGKILL)
    process.communicate()
    assert int(rows("killed")[-1][0]) < 200
    full = start("killed", "prlimit", "--fsize=100000")  # as if the disk were full
    text = output(full, 1)
    assert re.search("failed: .*: exit code 1: error: can't write .* is intact", text)
    assert int(rows("killed")[-1][0]) < 200
    assert "1 runs are finished" in output(start("killed"))
    assert numbers("killed") == numbers("whole")
