"""benchmark.sh: what it runs, skips, resumes and reports, with a fake interpreter and for real."""

import csv
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPT

BENCHMARK = ROOT / "benchmark.sh"

# Stands for PYTHON: trains nothing, but has the files, signals and exit codes of the scripts.
FAKE = f"""#!{sys.executable} -S
import json, os, re, signal, sys, time
from pathlib import Path

words = sys.argv[2:]
options = dict(zip(words[::2], words[1::2]))
stopped = False

def stop(number, frame):
    global stopped
    stopped = True
    signal.signal(number, signal.SIG_DFL)

signal.signal(signal.SIGTERM, stop)

def record(event):
    device = os.environ.get("CUDA_VISIBLE_DEVICES")
    line = [event, os.getpid(), options.get("--seed"), device, sys.argv[1:]]
    with open(os.environ["CALLS"], "a") as f:
        f.write(json.dumps(line) + "\\n")

if "--resume" in options:
    folder = Path(options["--resume"])
    try:
        saved = json.loads((folder / "checkpoint.pt").read_text())
    except ValueError:
        sys.exit("error: the checkpoint is damaged")
    args = saved["args"]
else:
    exp_name = {{"sb3_baselines.py": "sb3_" + options.get("--algo", "")}}.get(
        Path(sys.argv[1]).name, Path(sys.argv[1]).stem)
    args = {{"env_id": options["--env-id"], "exp_name": exp_name, "seed": int(options["--seed"])}}
    args["total_timesteps"] = 300
    name = re.sub(r"[^\\w.-]", "_", args["env_id"])
    name += f"__{{exp_name}}__{{args['seed']}}__{{int(time.time())}}"
    folder = Path(options["--runs-dir"]) / name
    folder.mkdir(parents=True)
    saved = {{"step": 0, "bytes": 0}}
total = args["total_timesteps"] = int(options.get("--total-timesteps", args["total_timesteps"]))
record("start")
(folder / "args.json").write_text(json.dumps({{"args": args}}))
metrics = open(folder / "metrics.csv", "a")
metrics.truncate(saved["bytes"])
if not saved["bytes"]:
    print("step,seconds,name,value", file=metrics)
if str(args["seed"]) in os.environ.get("FAIL", "").split():
    print("some text\\nerror: it fails on purpose\\nlast words", file=sys.stderr)
    sys.exit(1)
for step in range(saved["step"] + 100, total + 1, 100):
    time.sleep(float(os.environ.get("PACE", 0)))
    print(f"{{step}},{{step}}.0,charts/SPS,50.0", file=metrics)
    print(f"{{step}},{{step}}.0,eval/return_mean,{{args['seed'] * 1000 + step}}", file=metrics)
    metrics.flush()
    content = {{"step": step, "bytes": os.path.getsize(metrics.name), "args": args}}
    temporary = folder / "checkpoint.pt.tmp"
    temporary.write_text(json.dumps(content))
    temporary.replace(folder / "checkpoint.pt")
    if stopped and step < total:
        record("end")
        sys.exit(143)
record("end")
sys.exit("FAIL_LATE" in os.environ)
"""


class Bench:
    """benchmark.sh in an empty folder with the fake interpreter."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "runs"
        fake = folder / "bin" / "fake-python"
        fake.parent.mkdir()
        fake.write_text(FAKE)
        fake.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "PACE")}
        self.env = kept | {"PYTHON": str(fake), "CALLS": str(folder / "calls")}
        self.env["PATH"] = f"{fake.parent}:{os.environ['PATH']}"

    def start(self, *words, **env):
        return subprocess.Popen(
            [str(BENCHMARK), *words],
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a shell can't catch what was ignored when it began, as in jobs in the background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *words, code=0, **env):
        """The output, errors included."""
        process = self.start(*words, **env)
        text = process.communicate(timeout=200)[0]
        assert process.returncode == code, text
        return text

    def calls(self, event="start"):
        file = self.folder / "calls"
        lines = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [line for line in lines if line[0] == event]

    def make(self, seed=1, step=300, total=300, time=100, checkpoint=True, env="Hopper-v4"):
        """A run folder as the script leaves it after so many steps."""
        name = f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', env)}__meow_continuous_action__{seed}__{time}"
        folder = self.out / name
        folder.mkdir(parents=True)
        args = {"env_id": env, "seed": seed, "total_timesteps": total}
        (folder / "args.json").write_text(json.dumps({"args": args}))
        rows = [f"{s},1.0,eval/return_mean,{s}.5\n" for s in range(100, step + 1, 100)]
        (folder / "metrics.csv").write_text("step,seconds,name,value\n" + "".join(rows))
        if checkpoint:
            content = {"args": args, "step": step, "bytes": (folder / "metrics.csv").stat().st_size}
            (folder / "checkpoint.pt").write_text(json.dumps(content))
        return folder


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


ONE = ("--algos", "meow", "--envs", "Hopper-v4")


def wait_for(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline, "it is stuck"
        time.sleep(0.02)


def planned(text):
    """(comment, command words) of each run of a dry run; no words for one that is skipped."""
    runs = []
    for line in text.splitlines():
        runs.append((line, [])) if line.startswith("# ") else runs[-1][1].extend(shlex.split(line))
    return runs


def after(words, option):
    return words[words.index(option) + 1]


def metrics(folder):
    """metrics.csv without times and speeds."""
    with open(folder / "metrics.csv") as f:
        rows = [(r["step"], r["name"], r["value"]) for r in csv.DictReader(f)]
    return [row for row in rows if row[1] != "charts/SPS"]


def by_seed(out):
    """{(env, exp_name, seed): metrics} of all runs; fails if a run has two folders."""
    folders = [f for f in out.iterdir() if (f / "args.json").exists()]
    found = {tuple(f.name.split("__")[:3]): metrics(f) for f in folders}
    assert len(found) == len(folders)
    return found


def test_default_matrix(bench):
    """Two algorithms, five tasks, five seeds, each task with the script's own number of steps."""
    runs = planned(bench.run("--dry-run"))
    pairs = {(words[3].rpartition("/")[2], after(words, "--env-id")) for _, words in runs}
    assert len(runs) == 50
    assert {env for _, env in pairs} == {
        f"{name}-v4" for name in "Hopper HalfCheetah Walker2d Ant Humanoid".split()
    }
    assert {script for script, _ in pairs} == {SCRIPT.name, "sac_continuous_action.py"}
    assert {after(words, "--seed") for _, words in runs} == set("12345")
    assert not any("--total-timesteps" in words for _, words in runs)
    assert not bench.out.exists()
    assert not bench.calls()


def test_dry_run_prints_what_is_run(bench):
    """The commands of a dry run are those that a run then receives, options after -- included."""
    words = ("--algos", "meow,sb3-sac", "--envs", "Hopper-v4 a:B-v0", "--seeds", "3,1-2,2")
    words += ("--total-timesteps", "200", "--out", "a b", "--workers", "1")
    runs = planned(bench.run(*words, "--dry-run", "--", "--tau", "0.1"))
    bench.run(*words, "--", "--tau", "0.1")
    assert [c[4] for c in bench.calls()] == [words[3:] for _, words in runs]
    assert len(runs) == 12
    for comment, command in runs:
        assert comment.startswith("# new ")
        assert command[-2:] == ["--tau", "0.1"]
        threads = str(len(os.sched_getaffinity(0)))
        assert command[:2] == ["env", f"OMP_NUM_THREADS={threads}"]
        assert after(command, "--torch-threads") == threads
    sb3 = [c[4] for c in bench.calls() if c[4][0].endswith("sb3_baselines.py")]
    assert len(sb3) == 6
    assert sb3[0][1:3] == ["--algo", "sac"]
    assert len(by_seed(bench.folder / "a b")) == 12


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ("--algos meow,dqn", "dqn"),
        ("--seeds one", "one"),
        ("--seeds 3-1", "3-1"),
        ("--seeds 1-", "1-"),
        ("--workers 0", "--workers 0"),
        ("--workers two", "two"),
        ("--total-timesteps 1e6", "1e6"),
        ("--total-timesteps", "--total-timesteps needs a value"),
        ("--out --dry-run", "--out needs a value"),
        ("--envs ,", "--envs"),
        ("--sedes 1", "--sedes"),
        ("hopper", "hopper"),
        ("-- --seed 7", "--seed"),
        ("--seeds 1 -- --total_timesteps=7", "--total_timesteps"),
    ],
)
def test_bad_input_is_one_sentence(bench, words, needle):
    text = bench.run(*words.split(" "), code=2)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert needle in text
    assert not bench.out.exists()


def test_help(bench):
    text = bench.run("--help")
    for option in "algos envs seeds workers total-timesteps out dry-run slurm".split():
        assert f"--{option} " in text


def test_finished_runs_are_skipped(bench):
    words = (*ONE, "--seeds", "1-3", "--workers", "2", "--total-timesteps", "300")
    text = bench.run(*words)
    assert "3 of 3 runs are finished" in text
    before = {f: f.stat().st_mtime_ns for f in bench.out.glob("*__*/*")}
    assert len(bench.calls()) == 3
    assert "3 finished before" in bench.run(*words)
    assert len(bench.calls()) == 3
    assert {f: f.stat().st_mtime_ns for f in bench.out.glob("*__*/*")} == before
    assert all(c.startswith("# skip") for c, _ in planned(bench.run(*words, "--dry-run")))


def test_more_steps_resume(bench):
    """A larger total goes on in the same folder; options after -- are for new runs only."""
    bench.run(*ONE, "--seeds", "1", "--total-timesteps", "200")
    text = bench.run(*ONE, "--seeds", "1", "--total-timesteps", "500", "--", "--tau", "1")
    assert "1 of 1 runs are finished" in text
    command = bench.calls()[1][4]
    assert after(command, "--total-timesteps") == "500"
    assert after(command, "--resume") == f"runs/{next(bench.out.glob('*__*')).name}"
    assert "--tau" not in command
    assert [
        row[0] for row in metrics(next(bench.out.glob("*__*")))
    ] == "100 200 300 400 500".split()


def test_thinned_results_are_finished(bench):
    """The committed runs, without checkpoints, count as finished at their own number of steps."""
    words = (*ONE, "--seeds", "1-3", "--out", str(ROOT / "results"), "--dry-run")
    for more in ((), ("--total-timesteps", "300000")):
        assert all(c.startswith("# skip") for c, _ in planned(bench.run(*words, *more)))
    further = planned(bench.run(*words, "--total-timesteps", "400000"))
    assert all(c.startswith("# new") and "abandoned" not in c for c, _ in further)


def state(bench, *words):
    ((comment, command),) = planned(bench.run(*ONE, "--seeds", "1", "--dry-run", *words))
    return comment.split()[1], command


def test_the_furthest_folder_is_taken(bench):
    bench.make(step=100, time=3)
    furthest = bench.make(step=200, time=1)
    bench.make(step=200, seed=11, time=4)
    bench.make(step=250, time=5, checkpoint=False)
    kind, command = state(bench)
    assert kind == "resume"
    assert after(command, "--resume") == f"runs/{furthest.name}"
    assert after(command, "--total-timesteps") == "300"
    bench.make(step=300, time=2, checkpoint=False)
    assert state(bench)[0] == "skip"
    assert state(bench, "--total-timesteps", "400")[0] == "resume"


def test_another_total_is_another_run(bench):
    """A run beyond the total asked for is neither finished nor to be resumed; it stays."""
    folder = bench.make(step=500, total=500)
    assert state(bench, "--total-timesteps", "300")[0] == "new"
    bench.run(*ONE, "--seeds", "1", "--total-timesteps", "300")
    assert folder.exists()
    assert state(bench, "--total-timesteps", "300")[0] == "skip"
    assert state(bench)[0] == "skip"


def test_last_step_without_evaluation_is_resumed(bench):
    folder = bench.make(step=200)
    with open(folder / "metrics.csv", "a") as f:
        f.write("300,1.0,charts/SPS,5.0\n300,1.0,eval/return_mean,12")  # cut off
    assert state(bench)[0] == "resume"


def test_half_written_args(bench):
    folder = bench.make(step=200)
    (folder / "args.json").write_text('{"args": {"env')
    kind, command = state(bench)
    assert kind == "resume"
    assert "--total-timesteps" not in command
    (folder / "checkpoint.pt").unlink()
    assert state(bench)[0] == "new"


def test_runs_without_checkpoint_are_moved(bench):
    first = bench.make(step=200, checkpoint=False)
    text = bench.run(*ONE, "--seeds", "1", "--dry-run")
    assert first.name in text
    assert first.exists()
    bench.run(*ONE, "--seeds", "1")
    assert not first.exists()
    assert (bench.out / "abandoned" / first.name / "metrics.csv").exists()
    shutil.rmtree(next(bench.out.glob("Hopper*")))
    bench.make(step=100, checkpoint=False)  # the same name again
    bench.run(*ONE, "--seeds", "1")
    assert len(list((bench.out / "abandoned").iterdir())) == 2
    assert len(list(bench.out.glob("Hopper*"))) == 1


def test_failures_are_listed(bench):
    """One run fails, one has a damaged checkpoint: the others finish, nothing is deleted."""
    damaged = bench.make(seed=3, step=200)
    (damaged / "checkpoint.pt").write_text("{")
    before = (damaged / "metrics.csv").read_bytes()
    text = bench.run(*ONE, "--seeds", "1-4", "--workers", "2", code=1, FAIL="2")
    assert "2 of 4 runs are finished" in text
    listed = text[text.index("runs are finished") :]
    assert (
        "runs/logs/Hopper-v4__meow_continuous_action__2.log: error: it fails on purpose" in listed
    )
    assert "__3.log: error: the checkpoint is damaged" in listed
    assert (damaged / "metrics.csv").read_bytes() == before
    bench.run(*ONE, "--seeds", "1-2", "--workers", "2")  # and again without the cause


def test_own_threads_are_kept(bench):
    """--torch-threads after -- holds for a resumed run too: it stays bit for bit the same."""
    words = ("--", "--torch-threads", "3")
    bench.run(*ONE, "--seeds", "1", *words)
    bench.run(*ONE, "--seeds", "1", "--total-timesteps", "400", *words)
    new, resumed = (c[4] for c in bench.calls())
    assert after(new, "--torch-threads") == "3"
    assert "--torch-threads" not in resumed  # the checkpoint's


def test_an_exit_without_result_is_a_failure(bench):
    text = bench.run(*ONE, "--seeds", "1", code=1, PYTHON="true")
    assert "without its last evaluation" in text
    text = bench.run(*ONE, "--seeds", "1", code=1, FAIL_LATE="1")
    assert "exit code 1" in text
    text = bench.run(*ONE, "--seeds", "2", code=2, PYTHON="no-such-python")
    assert "no-such-python" in text


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_a_signal_stops_with_checkpoints(bench, number, group):
    """Also when the runs receive it too: a second SIGTERM would stop them before the checkpoint."""
    words = (*ONE, "--seeds", "1-3", "--workers", "2", "--total-timesteps", "1000")
    process = bench.start(*words, PACE="2" if group else "0.5")
    wait_for(lambda: len(list(bench.out.glob("*/checkpoint.pt"))) == 2, process)
    (os.killpg if group else os.kill)(process.pid, number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "the same command" in text
    assert f"{BENCHMARK} --algos meow --envs Hopper-v4" in text
    assert len(bench.calls("end")) == 2  # they left in order
    assert "3 of 3 runs are finished" in bench.run(*words)
    assert [c[4][1] for c in bench.calls()].count("--resume") == 2
    evaluations = [str(step) for step in range(100, 1001, 100)]
    for rows in by_seed(bench.out).values():
        assert [row[0] for row in rows] == evaluations


def test_killed_alone_its_runs_live_on(bench):
    """The same command waits for a training that outlived a killed benchmark.sh."""
    words = (*ONE, "--seeds", "1", "--total-timesteps", "500")
    process = bench.start(*words, PACE="0.6")
    wait_for(lambda: list(bench.out.glob("*/checkpoint.pt")), process)
    process.kill()
    process.wait()
    assert "1 of 1 runs are finished" in bench.run(*words)
    assert len(bench.calls("start")) == len(bench.calls("end")) == 1
    assert "waits for another process" in next(bench.out.glob("logs/*.log")).read_text()
    ((rows),) = by_seed(bench.out).values()
    assert len(rows) == 5


def test_killed_with_its_runs(bench):
    words = (*ONE, "--seeds", "1-3", "--workers", "2", "--total-timesteps", "1000")
    process = bench.start(*words, PACE="0.5")
    wait_for(lambda: len(list(bench.out.glob("*/checkpoint.pt"))) == 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "3 of 3 runs are finished" in bench.run(*words)
    evaluations = [str(step) for step in range(100, 1001, 100)]
    for rows in by_seed(bench.out).values():
        assert [row[0] for row in rows] == evaluations


def test_gpus_in_turn(bench):
    smi = bench.folder / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 0 1 2; do echo 'GPU '$i': H (UUID: GPU)'; done\n")
    smi.chmod(0o755)

    def devices(*words, **env):
        runs = planned(bench.run(*ONE, "--dry-run", *words, **env))
        found = [re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", " ".join(words)) for _, words in runs]
        return [f[0] if f else None for f in found]

    assert devices() == ["0", "1", "2", "0", "1"]
    assert devices("--workers", "4") == ["0", "1", "2", "0", "0"]  # the fifth: the first slot again
    assert devices(CUDA_VISIBLE_DEVICES="2,1") == ["2", "1", "2", "1", "2"]
    assert devices(CUDA_VISIBLE_DEVICES="") == [None] * 5
    bench.run(*ONE, "--seeds", "1-3", PACE="0.2")
    assert sorted(c[3] for c in bench.calls()) == ["0", "1", "2"]


def test_overview_on_a_terminal(bench):
    """It is redrawn in place, with step, speed, return and what is left."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [str(BENCHMARK), *ONE, "--seeds", "1-2", "--workers", "2", "--total-timesteps", "1000"],
        cwd=bench.folder,
        env=bench.env | {"PACE": "0.5"},
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
    os.close(parent)
    assert process.wait() == 0
    assert re.search(rb"Hopper-v4 seed 1: step \d+/1000, 50.0 steps/s, return 1\d00.0", shown)
    assert re.search(rb"\x1b\[3A\x1b\[J", shown)  # three lines up
    assert re.search(rb"0/2 finished, 2 running, 0 failed, 0 waiting, ETA 0:00:", shown)


def test_slurm_script(bench):
    """One array; each element trains the run of its index, or skips it when it is finished."""
    words = ("--algos", "meow", "--envs", "Hopper-v4 Ant-v4", "--seeds", "1-2", "--workers", "3")
    options = ("--slurm", "--slurm-options", "--partition=gpu --time=24:00:00")
    text = bench.run(*words, *options, "--dry-run", "--", "--tau", "0.1")
    assert not bench.out.exists()
    for line in (
        "#SBATCH --array=0-3%3",
        "#SBATCH --requeue --open-mode=append --signal=B:TERM@120",
        "#SBATCH --partition=gpu --time=24:00:00",
    ):
        assert f"{line}\n" in text
    for index in (0, 3, 3):  # as Slurm runs it
        env = bench.env | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_ON_NODE": "7"}
        subprocess.run(["bash"], input=text, env=env, text=True, check=True, capture_output=True)
    calls = [c[4] for c in bench.calls()]
    assert [(after(c, "--env-id"), after(c, "--seed")) for c in calls] == [
        ("Hopper-v4", "1"),
        ("Ant-v4", "2"),
    ]
    assert all(after(c, "--tau") == "0.1" and after(c, "--torch-threads") == "7" for c in calls)


def slurm_answers():
    try:
        command = ["scontrol", "ping"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(shutil.which("sbatch")) and "UP" in result.stdout


@pytest.mark.skipif(not slurm_answers(), reason="no sbatch with a controller that answers")
def test_slurm_array_with_requeue(bench):
    """A real array; one element is requeued while it trains and goes on from its checkpoint."""
    words = (*ONE, "--seeds", "1-3", "--total-timesteps", "1000", "--out", "runs", "--slurm")
    text = bench.run(*words, PACE="0.5")
    job = re.search(r"Submitted batch job (\d+)", text)[1]

    def ask(*command):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    try:
        deadline = time.time() + 120
        while not list(bench.out.glob("*__1__*/checkpoint.pt")):
            assert time.time() < deadline, ask("squeue")
            time.sleep(0.1)
        ask("scontrol", "requeue", f"{job}_0")
        while ask("squeue", "--noheader", f"--jobs={job}"):
            assert time.time() < deadline, ask("squeue")
            time.sleep(0.5)
    finally:
        ask("scancel", job)
    first = [c[4][1] for c in bench.calls() if "__1__" in str(c[4]) or c[2] == "1"]
    assert first == ["--env-id", "--resume"]
    evaluations = [str(step) for step in range(100, 1001, 100)]
    found = by_seed(bench.out)
    assert len(found) == 3
    for rows in found.values():
        assert [row[0] for row in rows] == evaluations


def test_real_run_killed_and_started_again(tmp_path):
    """Killed with SIGKILL, the same command completes; metrics equal those of a whole run."""
    words = [str(BENCHMARK), "--algos", "meow", "--envs", "InvertedPendulum-v4", "--workers", "1"]
    words += "--total-timesteps 160 --seeds SEEDS -- --learning-starts 80 --batch-size 16".split()
    words += "--eval-frequency 100 --eval-episodes 1 --checkpoint-frequency 30".split()
    words += "--no-compile --torch-threads 1".split()
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    options = {"env": kept | {"PYTHON": sys.executable}, "stdout": subprocess.PIPE, "text": True}

    def start(folder, seeds):
        given = [word.replace("SEEDS", seeds) for word in words]
        (tmp_path / folder).mkdir(exist_ok=True)
        return subprocess.Popen(given, cwd=tmp_path / folder, start_new_session=True, **options)

    assert start("whole", "2").wait() == 0
    process, out = start("killed", "1-2"), tmp_path / "killed" / "runs"
    wait_for(lambda: list(out.glob("*__2__*/checkpoint.pt")), process, 400)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (first,), (second,) = out.glob("*__1__*"), out.glob("*__2__*")
    before = {f: f.stat().st_mtime_ns for f in first.iterdir()}
    text, _ = (process := start("killed", "1-2")).communicate()
    assert process.returncode == 0
    assert "1 finished before" in text
    assert {f: f.stat().st_mtime_ns for f in first.iterdir()} == before
    assert sorted(out.glob("Inverted*")) == [first, second]
    (whole,) = (tmp_path / "whole" / "runs").glob("*__2__*")
    assert metrics(second) == metrics(whole)
    assert "resume" in (out / "logs" / f"{second.name.rpartition('__')[0]}.log").read_text()
