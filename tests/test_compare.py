"""compare.py: the statistics by hand, the table of synthetic runs, thinned runs, bad input."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")
stats = pytest.importorskip("scipy.stats")

import compare  # noqa: E402

MEOW, SAC = "meow_continuous_action", "sac_continuous_action"
FILES = ("comparison.md", "learning_curves.png", "learning_curves.svg", "iqm.png", "iqm.svg")


def write_run(root, exp_name=MEOW, seed=1, returns=(1, 2, 3), env="Hopper-v4", **changes):
    """A run with evaluations every 10 steps, 60 seconds each; `changes` of args.json's args."""
    time = changes.pop("time", 1)
    versions = {"mujoco": changes.pop("mujoco", "4.0.0"), "torch": "2.13.0"}
    frequency = changes.setdefault("eval_frequency", 10)
    args = dict(env_id=env, exp_name=exp_name, seed=seed, total_timesteps=frequency * len(returns))
    args |= (
        dict(
            alpha=0.2,
            eval_episodes=10,
            deterministic_eval=True,
            runs_dir=str(root),
            resume=str(root),
        )
        | changes
    )
    folder = root / f"{env}__{exp_name}__{seed}__{time}"
    folder.mkdir(parents=True)
    described = dict(args=args, git_commit="c0ffee", versions=versions, cpu="Z80", device="cpu")
    (folder / "args.json").write_text(json.dumps(described, indent=2) + "\n")
    lines = ["step,seconds,name,value"]
    for i, value in enumerate(returns, 1):
        step, seconds = i * frequency, f"{i * 60:.3f}"
        lines.append(f"{step - 1},{seconds},losses/loss,nan")
        lines.append(f"{step},{seconds},charts/SPS,100.0")
        lines.append(f"{step},{seconds},eval/return_mean,{float(value)!r}")
        lines += [f"{step},{seconds},eval/return_{k},{float(value)!r}" for k in range(2)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    """Only the test of the figures draws them."""
    if "bytes" not in request.node.name:
        for name in ("draw_curves", "draw_iqm", "save"):
            monkeypatch.setattr(compare, name, lambda *_: None)


def run_compare(capsys, *words):
    """Exit code, report (or "") and stderr of the command."""
    words = [str(word) for word in words]
    out = words[words.index("--out") + 1]
    code = compare.main(words)
    file = compare.Path(out) / "comparison.md"
    return code, file.read_text() if file.is_file() else "", capsys.readouterr().err


def cells(text):
    """The cells of each line of the report's first table, without the row's number."""
    lines = text.split("## ")[0].splitlines()
    return [line.split(" | ")[1:] for line in lines if re.match(r"\| \d+ ", line)]


def rows_of(*paths):
    return compare.make_rows(compare.find_runs(paths))


# --- Statistics -----------------------------------------------------------------------------------
def test_iqm():
    assert compare.iqm(np.array([9.0, 1.0, 2.0, 100.0])) == 5.5
    assert compare.iqm(np.array([1.0, 2.0, 30.0])) == 11  # nothing to trim: 3 // 4 = 0
    for n in (8, 12, 40):  # where n is a multiple of 4: the mean of the middle half
        x = np.sort(np.random.default_rng(n).normal(size=n))
        assert np.isclose(compare.iqm(x), x[n // 4 : n - n // 4].mean())


def test_iqm_interval_is_rliables():
    """The numbers are those of rliable 1.2.0 with 2,000 resamples, for 5 runs of 4 tasks."""
    x = np.array([1, 0.8, 1.3, 0.5]) + 0.2 * np.random.default_rng(3).standard_normal((5, 4))
    low, high = compare.bootstrap(list(x.T), compare.iqm)
    assert np.isclose(compare.iqm(x.ravel()), 0.83971319, atol=1e-8)
    assert np.allclose((low, high), (0.74436998, 1.0280164), atol=0.01)


def test_interval_covers_and_resamples_within_strata():
    x = np.random.default_rng(0).normal(5, 1, 40)
    low, high = compare.bootstrap([x])
    half = 1.96 * x.std() / math.sqrt(40)  # the normal approximation of the same resampling
    assert np.allclose((low, high), (x.mean() - half, x.mean() + half), atol=0.03)
    # Runs differ between environments but not within them: nothing to resample, no width.
    strata = [np.full(3, 1.0), np.full(3, 10.0)]
    assert compare.bootstrap(strata) == (5.5, 5.5)
    assert np.ptp(compare.bootstrap([np.concatenate(strata)])) > 1
    # Strata keep their sizes: two runs of 4 or 8, six of 0.
    low, high = compare.bootstrap([np.array([4.0, 8.0]), np.zeros(6)])
    assert (low, high) == (1, 2)
    assert compare.bootstrap([np.array([4.0, 8.0]), np.array([1.0])]) is None
    curves = np.random.default_rng(0).normal(size=(5, 3))
    low, high = compare.bootstrap([curves])
    assert np.allclose((low[1], high[1]), compare.bootstrap([curves[:, 1]]), atol=0.05)


def test_coverage():
    """95 % intervals of 40 seeds hold the true mean in about 95 of 100 cases; of 30, 25 or more."""
    rng = np.random.default_rng(1)
    intervals = [compare.bootstrap([rng.normal(size=40)]) for _ in range(30)]
    assert sum(low < 0 < high for low, high in intervals) >= 25


@pytest.mark.parametrize(
    ("steps", "total", "mean"),
    [
        (range(10_000, 300_001, 10_000), 300_000, 29.5),  # 285,000 < 290,000, 300,000
        (range(5_000, 300_001, 5_000), 300_000, 59),  # 285,000 itself is outside: 58, 59, 60
        ((100, 200, 210), 210, 2.5),  # 199.5 < 200, 210
        ((100, 200), 200, 2),
    ],
)
def test_final_return(steps, total, mean):
    steps = np.array(steps)
    assert compare.final_return(steps, np.arange(1.0, len(steps) + 1), total) == mean


def test_time_to_reach_and_smoothing(tmp_path):
    run = compare.read_run(write_run(tmp_path, returns=(1, 3, 2, 6)))
    assert compare.time_to_reach(run, 2.5) == (20, 120)
    assert compare.time_to_reach(run, 6) == (40, 240)
    assert compare.time_to_reach(run, 6.1) == (math.inf, math.inf)
    assert compare.curves([run], 1)[1].tolist() == [[1, 3, 2, 6]]
    assert compare.curves([run], 3)[1].tolist() == [[1, 2, 2, 11 / 3]]


def test_curves_of_other_evaluation_frequencies(tmp_path):
    a = write_run(tmp_path, returns=(1, 2, 3, 4))
    b = write_run(tmp_path, seed=2, returns=(6, 8), eval_frequency=20)
    (row,) = rows_of(a, b)
    steps, returns = compare.curves(row.runs, 1)
    assert (steps.tolist(), returns.tolist()) == ([20, 40], [[2, 4], [6, 8]])
    assert row.finals.tolist() == [4, 8]


# --- The table ------------------------------------------------------------------------------------
@pytest.fixture
def runs(tmp_path):
    """Two environments; SAC's mean final return is 100 on Hopper and 20 on Swimmer."""
    root = tmp_path / "runs"
    for seed, returns in enumerate([(50, 120, 130), (10, 20, 110), (10, 20, 30)], 1):
        write_run(root, seed=seed, returns=returns)
    for seed, returns in enumerate([(10, 80, 90), (10, 100, 110)], 1):
        write_run(root, SAC, seed, returns)
    for seed in (1, 2):
        write_run(root, SAC, seed, (0, 10 * seed, 20), env="Swimmer-v4")
        write_run(root, MEOW, seed, (0, 10, 30 * seed), env="Swimmer-v4")
    write_run(root, "sb3_td3", 4, (0, 10, 40))
    return root


def test_table(runs, tmp_path, capsys):
    code, text, _ = run_compare(capsys, runs, "--out", tmp_path / "out")
    assert code == 0
    mode = "deterministic, 10 episodes |"
    assert cells(text) == [
        ["Hopper-v4", "MEow", "30", "3 (1, 2, 3)", "90.0", "30.0 to 130.0",
         "30 (2 of 3 seeds)", "3.0 (2 of 3 seeds)", mode],
        ["Hopper-v4", "SAC", "30", "2 (1, 2)", "100.0", "90.0 to 110.0",
         "1 of 2 seeds", "1 of 2 seeds", mode],
        ["Hopper-v4", "TD3 (SB3)", "30", "1 (4)", "40.0", "-", "not reached", "not reached", mode],
        ["Swimmer-v4", "MEow", "30", "2 (1, 2)", "45.0", "30.0 to 60.0", "30", "3.0", mode],
        ["Swimmer-v4", "SAC", "30", "2 (1, 2)", "20.0", "20.0 to 20.0", "25", "2.5", mode],
        ["Swimmer-v4", "TD3 (SB3)", "-", "0", "not run", "-", "-", "-", "- |"],
    ]  # fmt: skip
    scores = [0.3, 1.1, 1.3, 1.5, 3.0]
    assert f"| MEow | 3 + 2 | {stats.trim_mean(scores, 0.25):.3f} |" in text
    assert "divided by SAC's mean final return: Hopper-v4 (30 steps) by 100.0, Swimmer" in text
    assert "| no finished run of 30 steps on Swimmer-v4 | - |" in text
    assert "fewer than 5 seeds are too narrow: all rows" in text
    assert "commit: c0ffee" in text
    assert "mujoco 4.0.0" in text
    assert "for seed in 1 2 3; do python meow_continuous_action.py --env-id Hopper-v4" in text


def test_normalised_by_the_paper_without_sac(tmp_path, capsys):
    write_run(tmp_path / "runs", returns=(0, 3332.99 / 2))
    write_run(tmp_path / "runs", env="Swimmer-v4")
    _, text, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path)
    assert "| MEow | 1 | 0.500 | - |" in text
    assert "divided by the paper's return of MEow: Hopper-v4 (20 steps) by 3333.0" in text
    assert "Left out, without a positive divisor: Swimmer-v4" in text


def test_what_differs_is_not_averaged(tmp_path, capsys):
    root = tmp_path / "runs"
    write_run(root, seed=1)
    write_run(root, seed=2, alpha=0.5)
    write_run(root, seed=3, returns=(1, 2, 3, 4))
    write_run(root, seed=4, deterministic_eval=False)
    write_run(root, seed=5, eval_episodes=3)
    write_run(root, seed=6, torch_threads=2, runs_dir="elsewhere")
    _, text, _ = run_compare(capsys, root, "--out", tmp_path)
    table = [line[1:4] + line[-1:] for line in cells(text)]
    assert table == [
        ["MEow, alpha=0.2", "30", "2 (1, 6)", "deterministic, 10 episodes |"],
        ["MEow, alpha=0.5", "30", "1 (2)", "deterministic, 10 episodes |"],
        ["MEow, alpha=0.2", "30", "1 (5)", "deterministic, 3 episodes |"],
        ["MEow, alpha=0.2", "30", "1 (4)", "stochastic, 10 episodes |"],
        ["MEow, alpha=0.2", "40", "1 (3)", "deterministic, 10 episodes |"],
    ]
    assert "for seed in 6; do" in text


def test_not_run_and_unfinished(tmp_path, capsys):
    root, out = tmp_path / "runs", tmp_path / "out"
    write_run(root)
    write_run(root, seed=2, total_timesteps=50)
    write_run(root, seed=3, returns=(1, math.nan, 3))
    empty = write_run(root, seed=4)
    (empty / "metrics.csv").write_text("step,seconds,name,value\n")
    torn = write_run(root, seed=5) / "metrics.csv"  # 3.0 becomes 3: still a number, but cut off
    torn.write_text(torn.read_text()[: torn.read_text().rindex("eval/return_mean") + 18])
    words = (root, "--out", out, "--envs", "Ant-v4", "--algos", "sac", "new")
    _, text, err = run_compare(capsys, *words)
    assert f"{torn}: its last line is incomplete" in err
    table = [line[:5] for line in cells(text)]
    assert table[:6] == [
        ["Hopper-v4", "MEow", "30", "1 (1)", "3.000"],
        ["Hopper-v4", "MEow", "30", "1 (3)", "return is not finite at step 20"],
        ["Hopper-v4", "MEow", "30", "1 (4)", "unfinished at step 0"],
        ["Hopper-v4", "MEow", "30", "1 (5)", "unfinished at step 20"],
        ["Hopper-v4", "MEow", "50", "1 (2)", "unfinished at step 30"],
        ["Hopper-v4", "SAC", "-", "0", "not run"],
    ]
    assert [line[:2] for line in table[-4:]] == [
        ["Hopper-v4", "new"], ["Ant-v4", "MEow"], ["Ant-v4", "SAC"], ["Ant-v4", "new"]
    ]  # fmt: skip
    assert "python compare.py RUNS --out OUT --envs Ant-v4 --algos sac new" in text


def test_nothing_finished(tmp_path, capsys):
    write_run(tmp_path / "runs", total_timesteps=50)
    code, text, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0
    assert ".png" not in text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["comparison.md"]


# --- Copies ---------------------------------------------------------------------------------------
def test_copies_give_the_same_bytes(runs, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    assert run_compare(capsys, *runs.iterdir(), "--out", out, "--copy", "--smooth", "2")[0] == 0
    assert run_compare(capsys, out, "--out", again, "--smooth", "2")[0] == 0
    for name in FILES:
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    copy = out / f"Hopper-v4__{MEOW}__1__1"
    assert (copy / "metrics.csv").read_text() == (
        "step,seconds,name,value\n"
        "10,60.000,charts/SPS,100.0\n10,60.000,eval/return_mean,50.0\n"
        "20,120.000,charts/SPS,100.0\n20,120.000,eval/return_mean,120.0\n"
        "30,180.000,charts/SPS,100.0\n30,180.000,eval/return_mean,130.0\n"
    )
    args = json.loads((copy / "args.json").read_text())["args"]
    assert (args["runs_dir"], args["resume"]) == ("runs", None)  # no path of this machine


def test_full_runs_and_their_copies_are_one_run_each(runs, tmp_path, capsys):
    out = tmp_path / "out"
    _, text, _ = run_compare(capsys, runs, "--out", out, "--copy")
    code, again, err = run_compare(capsys, runs, out, "--out", out, "--copy")
    assert (code, again) == (0, text)
    assert "copies of one run: counted once" in err


def test_the_committed_runs_give_the_committed_report(tmp_path, capsys):
    committed = ROOT / "results" / "comparison.md"
    if not committed.is_file():
        pytest.skip("no committed report")
    options = re.search(r"--out OUT(.*)`", committed.read_text())[1].split()
    _, text, _ = run_compare(capsys, ROOT / "results", "--out", tmp_path, *options)
    assert text == committed.read_text()


def test_a_copy_never_replaces_a_fuller_file(tmp_path, capsys):
    full = write_run(tmp_path / "full")
    before = (full / "metrics.csv").read_bytes()
    assert run_compare(capsys, full, "--out", tmp_path / "thin", "--copy")[0] == 0
    code, _, err = run_compare(capsys, tmp_path / "thin", "--out", full.parent, "--copy")
    assert code == 1
    assert "not overwritten" in err
    run_compare(capsys, full, "--out", full.parent, "--copy")  # onto itself
    assert (full / "metrics.csv").read_bytes() == before


# --- Bad input ------------------------------------------------------------------------------------
def damage(folder, how):
    """Damages a run; returns what the error must name."""
    file = folder / ("args.json" if "json" in how or "args" in how else "metrics.csv")
    text = file.read_text()
    changed = {
        "cut json": text[:40], "json list": "[1]", "args without seed": text.replace("seed", "s"),
        "args with text": text.replace('"seed": 1', '"seed": "1"'),
        "empty": "", "other csv": "a,b\n1,2\n", "short row": text + "30,1\n",
        "no step": text + "x,1,a,1\n", "no number": text + "40,1,eval/return_mean,x\n",
        "same step": text + "30,999.0,eval/return_mean,1.0\n",
        "past the end": text + "40,999.0,eval/return_mean,1.0\n",
    }  # fmt: skip
    if how in changed:
        file.write_text(changed[how])
    elif how == "binary":
        file.write_bytes(b"\xff\xfe\x00" * 9)
    else:
        file.unlink()
    return file.name


DAMAGES = "cut json,json list,args without seed,args with text,empty,other csv,short row,no step"
DAMAGES += ",no number,same step,past the end,binary,missing csv,missing json"


@pytest.mark.parametrize("how", DAMAGES.split(","))
def test_damaged_runs(tmp_path, capsys, how):
    write_run(tmp_path / "runs", seed=2)
    name = damage(write_run(tmp_path / "runs"), how)
    code, text, err = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert (code, text) == (1, "")
    assert re.fullmatch(r"error: .*\n", err)
    assert name in err


def test_runs_that_count_twice(tmp_path, capsys):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "a", returns=(4, 5, 6), time=2)
    c = write_run(tmp_path / "c", returns=(7, 8, 9))  # a's name
    for pair in ((a, b), (a, c)):
        code, _, err = run_compare(capsys, *pair, "--out", tmp_path / "out")
        assert code == 2
        assert all(str(folder) in err for folder in pair)
    code, text, _ = run_compare(capsys, a, a, a / ".." / a.name, "--out", tmp_path / "out")
    assert code == 0
    assert cells(text)[0][3] == "1 (1)"


def test_mujoco_versions_do_not_mix(tmp_path, capsys):
    write_run(tmp_path / "runs")
    write_run(tmp_path / "runs", seed=2, mujoco="3.1.0")
    words = (tmp_path / "runs", "--out", tmp_path / "out")
    code, text, err = run_compare(capsys, *words)
    assert (code, text) == (2, "")
    assert "4.0.0" in err
    assert "3.1.0" in err
    code, text, _ = run_compare(capsys, *words, "--allow-mixed-versions")
    assert code == 0
    assert "Mixed MuJoCo versions (3.1.0, 4.0.0)" in text


def test_usage_errors(tmp_path, capsys):
    run, file = write_run(tmp_path / "runs"), tmp_path / "file"
    file.write_text("")
    (tmp_path / "nothing").mkdir()
    out = ("--out", tmp_path / "out")
    for words in (out, ("nowhere", *out), (tmp_path / "nothing", *out), (file, *out)):
        code, _, err = run_compare(capsys, *words)
        assert code == 2, words
        assert "runs" in err or "nowhere" in err
    assert run_compare(capsys, run, *out, "--smooth", "0")[0] == 2
    assert run_compare(capsys, run, "--out", file)[0] == 1


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_missing_package(tmp_path, package):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(
        f"raise ModuleNotFoundError('no', name={package!r})"
    )
    shutil.copy(ROOT / "compare.py", tmp_path)
    words = [sys.executable, "compare.py", "runs"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    expected = f"error: {package} is missing: pip install -r requirements-benchmark.txt\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_steps_of_many_environments_are_environment_steps(tmp_path, capsys):
    for name, returns in (("meow_isaacgym", (1, 5, 9)), ("sac_isaacgym", (1, 2, 5))):
        for seed in (1, 2):
            write_run(tmp_path / "runs", name, seed, returns, env="Ant", num_envs=128)
    code, text, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0
    meow, sac = cells(text)
    assert meow[1:3] == ["MEow", "3,840"]
    assert sac[1:3] == ["SAC", "3,840"]
    assert meow[6] == "2,560"  # step 20 of 30 has SAC's final return, in each of 128 environments


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("meow_continuous_action", dict(coupling="additive")),
        ("sac_continuous_action", dict(autotune=True)),
        ("meow_isaacgym", dict(coupling="additive", num_envs=128)),
        ("sac_isaacgym", dict(autotune=False, num_envs=128)),
        ("SCRIPT", {}),
    ],
)
def test_script_of_an_experiment_with_its_own_name(script, options, tmp_path, capsys):
    write_run(tmp_path / "runs", "ablation", **options)
    run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert f"python {script}.py --env-id Hopper-v4 --exp-name ablation" in text
