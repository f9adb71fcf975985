"""tools/compare.py: statistics, the table of synthetic runs, copies, bad input."""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("matplotlib")
stats = pytest.importorskip("scipy.stats")
sys.path.insert(0, str(ROOT / "tools"))

import compare  # noqa: E402
import run_table  # noqa: E402

MEOW, SAC = "meow_continuous_action", "sac_continuous_action"
MODE = "deterministic, 10 episodes"


def write_run(
    root, exp_name=MEOW, seed=1, returns=(1, 2, 3), env="Hopper-v4", time=1, **changes
):
    """A run with evaluations every 10 steps, 60 seconds each; changes: of its args."""
    about = {
        "script": f"{exp_name}.py",
        "git_commit": "c0ffee",
        "cpu": "Z80",
        "device": "cpu",
    }
    about |= {
        "threads": 1,
        "compiled": True,
        "versions": {"mujoco": changes.pop("mujoco", "4.0")},
    }
    about |= {name: changes.pop(name) for name in ("script", "cpu") if name in changes}
    folders = f"--runs-dir '{root}/a b' --resume auto"
    about["command"] = (
        f"python {about['script']} --env-id {env} --seed {seed} {folders}"
    )
    frequency = changes.setdefault("eval_frequency", 10)
    args = dict(
        env_id=env,
        exp_name=exp_name,
        seed=seed,
        total_timesteps=frequency * len(returns),
    )
    args |= dict(
        alpha=0.2, eval_episodes=10, deterministic_eval=True, runs_dir=str(root)
    )
    about["args"] = args | changes
    folder = root / f"{env}__{exp_name}__{seed}__{time}"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    lines = ["step,seconds,name,value"]
    for i, value in enumerate(returns, 1):
        step, seconds = i * frequency, f"{i * 60:.3f}"
        lines += [
            f"{step - 1},{seconds},losses/loss,nan",
            f"{step},{seconds},charts/SPS,100.0",
        ]
        names = ("eval/return_mean", "eval/return_0", "eval/return_1")
        lines += [f"{step},{seconds},{name},{float(value)!r}" for name in names]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    """Only tests of the figures draw them."""
    if "figures" not in request.node.name:
        monkeypatch.setattr(compare, "draw_curves", lambda *_: None)
        monkeypatch.setattr(compare, "draw_iqm", lambda *_: None)
        monkeypatch.setattr(compare, "save", lambda *_: None)


@pytest.fixture
def run_compare(tmp_path, capsys):
    """run_compare(words): exit code, report (or "") and stderr of the command."""

    def run(*words, out=tmp_path / "out"):
        code = compare.main([*map(str, words), "--out", str(out)])
        file = out / "comparison.md"
        return code, file.read_text() if file.is_file() else "", capsys.readouterr().err

    return run


def cells(text):
    """The cells of each line of the report's first table, without the row's number."""
    lines = text.split("## ")[0].splitlines()
    return [
        line.strip("| ").split(" | ")[1:]
        for line in lines
        if re.match(r"\| \d+ ", line)
    ]


# --- Statistics -----------------------------------------------------------------------
def test_iqm():
    assert compare.iqm(np.array([9.0, 1.0, 2.0, 100.0])) == 5.5
    assert compare.iqm(np.array([1.0, 2.0, 30.0])) == 11  # nothing to trim: 3 // 4 = 0
    x = np.sort(np.random.default_rng(0).normal(size=12))
    assert np.isclose(compare.iqm(x), x[3:9].mean())


def test_iqm_interval_is_rliables():
    """Of 5 runs of 4 tasks; the numbers are rliable 1.2.0's, with 2,000 resamples."""
    x = np.array([1, 0.8, 1.3, 0.5]) + 0.2 * np.random.default_rng(3).standard_normal(
        (5, 4)
    )
    low, high = compare.bootstrap(list(x.T), compare.iqm)
    assert np.isclose(compare.iqm(x.ravel()), 0.83971319, atol=1e-8)
    assert np.allclose((low, high), (0.74436998, 1.0280164), atol=0.01)


def test_interval_of_a_mean():
    """As in the normal approximation; it holds the true mean about 95 times in 100."""
    x = np.random.default_rng(0).normal(5, 1, 40)
    half = 1.96 * x.std() / math.sqrt(40)
    assert np.allclose(
        compare.bootstrap([x]), (x.mean() - half, x.mean() + half), atol=0.03
    )
    assert compare.bootstrap([x]) == compare.bootstrap([x])  # the same each time
    rng = np.random.default_rng(1)
    intervals = [compare.bootstrap([rng.normal(size=40)]) for _ in range(30)]
    assert 25 <= sum(low < 0 < high for low, high in intervals) <= 29


def test_interval_resamples_within_strata():
    strata = [
        np.full(3, 1.0),
        np.full(3, 10.0),
    ]  # runs differ between environments only
    assert compare.bootstrap(strata) == (5.5, 5.5)
    assert compare.bootstrap([np.array([4.0, 8.0]), np.zeros(6)]) == (1, 2)
    assert compare.bootstrap([np.array([4.0, 8.0]), np.array([1.0])]) is None
    curves = np.random.default_rng(0).normal(size=(5, 3))  # (runs, evaluations)
    low, high = compare.bootstrap([curves])
    assert np.allclose((low[1], high[1]), compare.bootstrap([curves[:, 1]]), atol=0.05)


@pytest.mark.parametrize(
    ("frequency", "evaluations", "mean"),
    [
        (10_000, 30, 29.5),  # 285,000 < 290,000, 300,000
        (5_000, 60, 59),  # 285,000 itself is outside: 58, 59, 60
        (100, 2, 2),
    ],
)
def test_final_return_is_of_the_last_twentieth(tmp_path, frequency, evaluations, mean):
    returns = np.arange(1.0, evaluations + 1)
    run = run_table.read_run(
        write_run(tmp_path, returns=returns, eval_frequency=frequency)
    )
    assert run["final"] == mean


# --- The table ------------------------------------------------------------------------
@pytest.fixture
def runs(tmp_path):
    """Two environments; SAC's mean final return is 100 on Hopper and 20 on Swimmer."""
    root = tmp_path / "runs"
    for seed, returns in enumerate([(50, 120, 130), (10, 20, 110), (10, 20, 30)], 1):
        write_run(root, seed=seed, returns=returns)
    for seed, returns in enumerate([(10, 80, 90), (10, 100, 110)], 1):
        write_run(root, SAC, seed, returns, cpu="Z80" if seed == 1 else "6502")
    for seed in (1, 2):
        write_run(root, SAC, seed, (0, 10 * seed, 20), env="Swimmer-v4")
        write_run(root, MEOW, seed, (0, 10, 30 * seed), env="Swimmer-v4")
    write_run(root, "sb3_td3", 4, (0, 10, 40), script="sb3_baselines.py")
    return root


def test_table(runs, run_compare):
    code, text, _ = run_compare(runs)
    assert code == 0
    some, none = "1 of 2 seeds", "not reached"
    hopper, swimmer = "Hopper-v4", "Swimmer-v4"
    two, three = "2 (1, 2)", "3 (1, 2, 3)"
    reached = ["30 (2 of 3 seeds)", "3.0 (2 of 3 seeds)"]
    meow = ["90.0", "30.0 to 130.0", "130.0, 110.0, 30.0", *reached]
    sac = ["100.0", "90.0 to 110.0", "90.0, 110.0", some, some]
    td3 = ["40.0", "-", "40.0", none, none]
    meow_swims = ["45.0", "30.0 to 60.0", "30.0, 60.0", "30", "3.0"]
    sac_swims = ["20.0", "20.0 to 20.0", "20.0, 20.0", "25", "2.5"]
    assert cells(text) == [
        [hopper, "MEow", "30", three, *meow, MODE],
        [hopper, "SAC", "30", two, *sac, MODE],
        [hopper, "TD3 (SB3)", "30", "1 (4)", *td3, MODE],
        [swimmer, "MEow", "30", two, *meow_swims, MODE],
        [swimmer, "SAC", "30", two, *sac_swims, MODE],
    ]
    scores = [0.3, 1.1, 1.3, 1.5, 3.0]
    assert f"| MEow | 3 + 2 | {stats.trim_mean(scores, 0.25):.3f} |" in text
    assert (
        f"SAC's mean final return: Hopper-v4 (30 steps, {MODE}) by 100.0, Swimmer"
        in text
    )
    assert "| TD3 (SB3) | 1 | no finished run of 30 steps on Swimmer-v4 | - |" in text
    assert "differ in commit, library versions or machine: 2.\n" in text
    assert "- commit: c0ffee\n- versions: python None, mujoco 4.0\n" in text
    assert (
        "- machine: Z80, device cpu, 1 thread(s), compiled; 6502, device cpu, 1" in text
    )
    words = "python meow_continuous_action.py --env-id Hopper-v4 --seed $seed"
    # as recorded, without the folders of its machine
    assert f"\nfor seed in 1 2 3; do {words}; done\n" in text
    assert "python sb3_baselines.py --env-id Hopper-v4 --seed $seed; done" in text


def test_iqm_is_of_the_task_with_most_algorithms(tmp_path, run_compare):
    for total, names in ((3, [MEOW, SAC]), (4, [SAC])):
        for name in names:
            write_run(tmp_path / "runs", name, total, range(1, total + 1))
    write_run(tmp_path / "runs", env="Swimmer-v4")
    _, text, _ = run_compare(tmp_path / "runs")
    assert "| MEow | 1 | 1.000 | - |" in text
    divisors = f"Hopper-v4 (30 steps, {MODE}) by 3.000. Left out, without a positive"
    assert f"{divisors} divisor: Swimmer-v4.\n" in text
    shutil.rmtree(tmp_path / "runs" / f"Hopper-v4__{SAC}__3__1")
    shutil.rmtree(tmp_path / "runs" / f"Hopper-v4__{SAC}__4__1")
    assert (
        "None: SAC's mean final return is missing" in run_compare(tmp_path / "runs")[1]
    )


def test_what_differs_is_not_averaged(tmp_path, run_compare):
    changes = [
        {},
        {"alpha": 0.5},
        {"returns": (1, 2, 3, 4)},
        {"deterministic_eval": False},
    ]
    changes += [{"eval_episodes": 3}, {"torch_threads": 2, "runs_dir": "elsewhere"}]
    changes += [{"script": "other.py"}]
    for seed, change in enumerate(changes, 1):
        write_run(tmp_path / "runs", seed=seed, **change)
    _, text, _ = run_compare(tmp_path / "runs")
    alpha, other = (
        f"MEow, alpha=0.2, script={MEOW}.py",
        f"MEow, alpha=0.5, script={MEOW}.py",
    )
    assert [[*line[1:4], line[-1]] for line in cells(text)] == [
        [alpha, "30", "2 (1, 6)", MODE],
        ["MEow, alpha=0.2, script=other.py", "30", "1 (7)", MODE],
        [other, "30", "1 (2)", MODE],
        [alpha, "30", "1 (5)", "deterministic, 3 episodes"],
        [alpha, "30", "1 (4)", "stochastic, 10 episodes"],
        [alpha, "40", "1 (3)", MODE],
    ]


def test_runs_of_other_versions_are_averaged_if_equal_in_what_matters(
    tmp_path, run_compare
):
    """Options that came or went count as their default where they aren't recorded."""
    gone = {"shift_units": "nats", "replay_pre_tanh": False, "bf16": False}
    new = {"env_kwargs": "{}", "flatten": False, "max_episode_steps": None}
    changes = [{}, gone, new | {"eval_envs": 3}, {"bf16": True}, {"flatten": True}]
    for seed, change in enumerate(changes, 1):
        write_run(tmp_path / "runs", seed=seed, **change)
    rows = [line[1:4] for line in cells(run_compare(tmp_path / "runs")[1])]
    assert rows == [
        ["MEow, bf16=False, flatten=False", "30", "3 (1, 2, 3)"],
        ["MEow, bf16=False, flatten=True", "30", "1 (5)"],
        ["MEow, bf16=True, flatten=False", "30", "1 (4)"],
    ]


def test_a_label_tells_experiments_apart(tmp_path, run_compare):
    """Which have the same label, or are one that is called as a label."""
    for name in (MEOW, "meow_isaacgym", "SAC", SAC):
        write_run(tmp_path / "runs", name)
    labels = [line[1] for line in cells(run_compare(tmp_path / "runs")[1])]
    expected = [f"MEow ({MEOW})", f"SAC ({SAC})", "MEow (meow_isaacgym)", "SAC (SAC)"]
    assert labels == expected


def test_of_runs_alike_the_newer_one_counts(tmp_path, run_compare):
    """By the time in their names, or else of their files."""
    old = write_run(tmp_path / "runs", returns=(7, 8, 9), time=1795198115)
    new = write_run(tmp_path / "runs", time=1795198116)
    code, text, err = run_compare(old.parent, "--copy")
    assert code == 0
    assert cells(text)[0][2:5] == ["30", "1 (1)", "3.000"]
    why = "have the same settings and seed: the second, newer one counts"
    assert err == f"warning: {old} and {new} {why}\n"
    assert not (tmp_path / "out" / old.name).exists()
    for tag in ("0a1b0c1d2e", "4256792868"):  # digests; the second is no time yet
        digest = write_run(tmp_path / "runs", returns=(4, 5, 6), time=tag)
        for moment, counts in ((1795198114, "3.000"), (1795198117, "6.000")):
            os.utime(digest / "metrics.csv", (moment, moment))
            assert cells(run_compare(old.parent)[1])[0][4] == counts
        shutil.rmtree(digest)


def test_several_settings_have_no_iqm(tmp_path, run_compare):
    for name, alpha in ((MEOW, 0.2), (MEOW, 0.5), (SAC, 0.2)):
        write_run(tmp_path / "runs", name, alpha=alpha, time=alpha)
    assert (
        "| MEow | 0 | several settings on Hopper-v4 | - |"
        in run_compare(tmp_path / "runs")[1]
    )
    write_run(tmp_path / "runs", SAC, alpha=0.5)
    _, text, _ = run_compare(tmp_path / "runs")
    assert "None: SAC's mean final return is missing" in text
    assert [line[7] for line in cells(text)] == ["-"] * 4


def test_not_run_and_unfinished(tmp_path, run_compare):
    root = tmp_path / "runs"
    write_run(root)
    write_run(root, seed=2, total_timesteps=50)
    write_run(root, seed=6, total_timesteps=50)
    write_run(root, seed=3, returns=(1, math.nan, 3))
    write_run(root, seed=7, returns=(), total_timesteps=50, eval_episodes=0)
    empty = write_run(root, seed=4)
    (empty / "metrics.csv").write_text("step,seconds,name,value\n")
    # 3.0 becomes 3: still a number, but cut off
    torn = write_run(root, seed=5) / "metrics.csv"
    torn.write_text(
        torn.read_text()[: torn.read_text().rindex("eval/return_mean") + 18]
    )
    _, text, err = run_compare(root, "--envs", "Ant-v4", "--algos", "sac", "new")
    assert f"{torn}: its last line is incomplete" in err
    table = [line[:5] for line in cells(text)]
    assert table[:8] == [
        ["Hopper-v4", "MEow", "30", "1 (1)", "3.000"],
        ["Hopper-v4", "MEow", "30", "1 (3)", "return is not finite at step 20"],
        ["Hopper-v4", "MEow", "30", "1 (4)", "stopped at step 0"],
        ["Hopper-v4", "MEow", "30", "1 (5)", "stopped at step 30"],
        ["Hopper-v4", "MEow", "50", "1 (7)", "not evaluated"],
        ["Hopper-v4", "MEow", "50", "1 (2)", "stopped at step 30"],
        ["Hopper-v4", "MEow", "50", "1 (6)", "stopped at step 30"],
        ["Hopper-v4", "SAC", "-", "0", "not run"],
    ]
    assert [line[1] for line in table[-4:]] == ["new", "MEow", "SAC", "new"]
    assert (
        "python tools/compare.py RUNS --out OUT --envs Ant-v4 --algos sac new`" in text
    )


def test_a_stopped_run_says_where(tmp_path, run_compare):
    """As its checkpoint says, or as far as its log goes; a copy of it, too."""
    killed = write_run(tmp_path / "runs", total_timesteps=5000, eval_frequency=1000)
    with open(killed / "metrics.csv", "a") as f:
        f.write("3100,1.000,charts/episodic_return,5.0\n")
    stopped = write_run(tmp_path / "runs", seed=2, returns=(), total_timesteps=5000)
    torch.save({"step": 1468, "rows": torch.zeros(9)}, stopped / "checkpoint.pt")
    damaged = write_run(tmp_path / "runs", seed=3, total_timesteps=5000)
    (damaged / "checkpoint.pt").write_text("not a checkpoint")
    robots = write_run(
        tmp_path / "runs", seed=4, returns=(), total_timesteps=5000, num_envs=16
    )
    torch.save({"step": 10}, robots / "checkpoint.pt")
    _, text, _ = run_compare(tmp_path / "runs", "--copy")
    assert sorted(line[3:5] for line in cells(text)) == [
        ["1 (1)", "stopped at step 3,100"],
        ["1 (2)", "stopped at step 1,468"],
        ["1 (3)", "stopped at step 30"],
        ["1 (4)", "stopped at step 160"],
    ]
    assert run_compare(tmp_path / "out", out=tmp_path / "again")[1] == text


def test_steps_of_many_environments_are_environment_steps(tmp_path, run_compare):
    for name, returns in (("meow_isaacgym", (1, 5, 9)), ("sac_isaacgym", (1, 2, 5))):
        write_run(tmp_path / "runs", name, 1, returns, env="Ant", num_envs=128)
    meow, sac = cells(run_compare(tmp_path / "runs")[1])
    assert meow[1:3] == ["MEow", "3,840"]
    assert sac[1:3] == ["SAC", "3,840"]
    assert (
        meow[7] == "2,560"
    )  # step 20 of 30 has SAC's final return, in each of 128 environments


# --- Curves of other code -------------------------------------------------------------
def write_curve(file, returns=(1, 2, 3), name="eval/return_mean"):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{10 * i},1,{name},{value}" for i, value in enumerate(returns, 1)]
    file.write_text("\n".join(["step,seconds,name,value", *rows]) + "\n")
    return file


def test_curves_of_other_code_are_added(tmp_path, run_compare):
    """Environment and seed from the path or as given; never averaged with ours."""
    root = write_run(tmp_path / "runs").parent
    for seed in (1, 2):
        write_run(root, SAC, seed)
        write_curve(tmp_path / "clean" / "Hopper-v4" / f"seed_{seed}.csv", (seed, 9))
        write_curve(tmp_path / "their" / f"Ant-v4__sac__{seed}__17" / "metrics.csv")
    file = write_curve(tmp_path / "some.csv", name="return")
    words = [f"CleanRL={tmp_path}/clean", f"MEow={tmp_path}/their"]
    words.append(f"Mine={file},env=Swimmer-v4,seed=7,name=return")
    code, text, _ = run_compare(root, "--add", *words)
    assert code == 0
    theirs = "of other code"
    assert [[*line[:5], line[-1]] for line in cells(text)] == [
        ["Hopper-v4", "MEow", "30", "1 (1)", "3.000", MODE],
        ["Hopper-v4", "SAC", "30", "2 (1, 2)", "3.000", MODE],
        ["Hopper-v4", "CleanRL (added)", "20", "2 (1, 2)", "9.000", theirs],
        ["Ant-v4", "MEow (added)", "30", "2 (1, 2)", "3.000", theirs],
        ["Swimmer-v4", "Mine (added)", "30", "1 (7)", "3.000", theirs],
    ]
    assert f"- files of other code: `{file}`" in text
    assert f" --add {shlex.join(words)}`" in text
    assert len(cells(run_compare("--add", *words)[1])) == 3  # without any of ours


BAD_ADDED = {
    "LABEL": "it must look like LABEL=PATH[,env=ID][,seed=N][,name=NAME]",
    "=a.csv": "it must look like LABEL=PATH",
    "L=a.csv,env=": "it must look like LABEL=PATH",
    "L=a.csv,seed=x": "it must look like LABEL=PATH",
    "L=a.csv,colour=red": "it must look like LABEL=PATH",
    "L=nowhere": "there is no nowhere",
    "L=empty": "there is no csv file in empty",
    "L=a.csv,seed=1": "a.csv: no environment such as Ant-v4 in its path: give it with",
    "L=a.csv,env=Ant-v4": "a.csv: no seed such as seed_3 in its path: give it",
    "L=a.csv,env=Ant-v4,seed=1": "a.csv: it has no eval/return_mean, but r: give one",
    "L=b.csv,env=Ant-v4,seed=1": "b.csv: it must begin with step,seconds,name,value",
}


@pytest.mark.parametrize("words", BAD_ADDED)
def test_bad_additions(words, tmp_path, run_compare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_curve(tmp_path / "a.csv", name="r")
    (tmp_path / "b.csv").write_text("step,value\n1,2\n")
    (tmp_path / "empty").mkdir()
    code, text, err = run_compare("--add", words)
    assert (code, text) == (2, "")
    assert err.startswith("error: --add")
    assert BAD_ADDED[words] in err
    assert err.count("\n") == 1


# --- At the same steps ---------------------------------------------------------------
def test_algorithms_at_the_same_steps(tmp_path, run_compare):
    """Means of the last quarter; of a seed the longest run, also if it was stopped."""
    root, step = tmp_path / "runs", dict(eval_frequency=10_000)
    nine = [9, 9, 9, 9, 9, 9, 20, 30, 70]
    write_run(root, MEOW, 1, nine, **step)
    write_run(
        root,
        MEOW,
        1,
        [9] * 6 + [100, 100, 100, 4],
        time=2,
        total_timesteps=10**6,
        **step,
    )
    write_run(root, MEOW, 2, [0] * 8, **step)
    write_run(root, MEOW, 3, [50] * 30, env="Ant-v4", **step)
    write_run(root, SAC, 1, [3] * 29 + [11], **step)
    write_run(root, "sql_continuous_action", 1, nine, **step)
    write_run(root, SAC, 1, nine, env="Swimmer-v4", **step)
    write_run(root, SAC, 2, [9, 9], eval_frequency=60_000)  # none near 90,000
    _, text, _ = run_compare(root)
    table = text.split("## At the same steps\n\n")[1].split("\n\n")[0]
    header, _, hopper, cheetah, _, ant, humanoid = table.splitlines()
    names = "90k MEow | 90k SAC | 300k MEow | 300k SAC | the paper"
    assert header == f"| task | {names} |"
    assert hopper == "| Hopper-v4 | 100 (1) | 3 (1) |  | 4 (1) | 3333 (1.5M) |"
    assert cheetah == "| HalfCheetah-v4 |  |  |  |  | 10981 (1.5M) |"
    assert ant == "| Ant-v4 | 50 (1) |  | 50 (1) |  | 6586 (4M) |"
    assert humanoid == "| Humanoid-v4 |  |  |  |  | 6923 (5M) |"
    hopper, ant = text.split("### Hopper-v4\n\n")[1].split("\n\n### Ant-v4\n\n")
    assert hopper.splitlines()[2:] == [
        "| 90,000 | MEow | 100 | 100 |  |",
        "| 90,000 | SAC | 3 | 3 |  |",
        "| 90,000 | SQL | 40 | 40 |  |",
        "| 300,000 | SAC | 4 | 4 |  |",
    ]
    assert ant.splitlines()[2] == "| 90,000 | MEow | 50 | 50 |  |"
    write_run(root, MEOW, 9, [7] * 9, deterministic_eval=False, **step)
    table = run_compare(root)[1].split("## At the same steps\n\n")[1]
    assert table.startswith(f"| task | 90k MEow, {MODE} | ")
    assert "| Hopper-v4 | 100 (1) | 7 (1) | 3 (1) |  | 4 (1) |" in table


def test_seeds_are_tested_beside_sac(tmp_path, run_compare):
    """By ranks, from three seeds a side on; not beside two settings of SAC."""
    step = dict(eval_frequency=10_000)
    for seed in (1, 2, 3):
        write_run(tmp_path, SAC, seed, [seed] * 9, **step)
        write_run(tmp_path, MEOW, seed, [9 + seed] * 9, **step)
    for seed in (1, 2):
        write_run(tmp_path, "sql_continuous_action", seed, [2] * 9, **step)
    lines = [
        "| 90,000 | MEow | 11 | 10, 11, 12 | 0.10 |",  # 2 of 20 orders are so extreme
        "| 90,000 | SAC | 2 | 1, 2, 3 |  |",
        "| 90,000 | SQL | 2 | 2, 2 |  |",
    ]
    assert "\n".join(lines) in run_compare(tmp_path)[1]
    write_run(tmp_path, SAC, 4, [4] * 9, tau=0.5, **step)
    assert "| 10, 11, 12 |  |" in run_compare(tmp_path)[1]
    write_run(tmp_path / "other", "sql_continuous_action", 1, [2] * 9, **step)
    text = run_compare(tmp_path / "other")[1]
    assert "| 90,000 | SQL | 2 | 2 |  |" in text
    assert "| the paper |" not in text


def test_a_run_without_evaluations_hides_none_and_nan_is_shown(tmp_path, run_compare):
    step = dict(eval_frequency=10_000)
    write_run(tmp_path, MEOW, 1, [], total_timesteps=50_000, **step)
    write_run(tmp_path, MEOW, 1, [5] * 9, time=2, **step)
    write_run(tmp_path, MEOW, 2, [5] * 8 + [math.nan], **step)
    assert "| 90,000 | MEow | nan | 5, nan |  |" in run_compare(tmp_path)[1]


# --- Published returns ----------------------------------------------------------------
def test_published_returns_are_shown_as_far_as_ours_go(tmp_path, run_compare):
    for env, frequency in (("Hopper-v4", 50_000), ("Ant-v4", 500_000)):
        write_run(tmp_path / "runs", SAC, env=env, eval_frequency=frequency)
    write_run(tmp_path / "runs", SAC, env="Hopper-v5", eval_frequency=50_000)
    _, text, _ = run_compare(tmp_path / "runs")
    lines = text.split("## Published returns\n\n")[1].split("\n\n")
    theirs = "MEow, authors' code"
    assert lines[0].splitlines()[2:] == [
        "| Hopper-v4 | MEow in the paper | 150,000 | 5 | 1389 | - |",
        "| Hopper-v4 | SAC published by SimbaV2 | 150,000 | 10 | 1183 | 568 |",
        "| Ant-v4 | MEow in the paper | 1,200,000 | 5 | 4560 | - |",
        "| Ant-v4 | SAC published by SimbaV2 | 1,500,000 | 10 | 4340 | 3066 |",
        f"| Ant-v4 | {theirs} (meow-replication) | 1,000,000 | 3 | 2936 | 484 |",
        f"| Ant-v4 | {theirs} (FoldAndCutNetworks) | 1,000,000 | 3 | 1300 | - |",
    ]
    assert "another evaluation protocol and another MuJoCo" in lines[1]
    write_run(tmp_path / "other", SAC)
    assert "Published" not in run_compare(tmp_path / "other")[1]


# --- Copies and figures ---------------------------------------------------------------
def test_figures_of_thinned_copies_have_the_same_bytes(tmp_path, run_compare):
    out, again = tmp_path / "out", tmp_path / "again"
    for seed, returns in ((1, (50, 120, 130)), (2, (10, 20, 110))):
        write_run(tmp_path / "runs", SAC, seed, returns, eval_frequency=20_000)
    assert run_compare(tmp_path / "runs", "--copy")[0] == 0
    assert run_compare(*out.iterdir(), out=again)[0] == 0  # the figures are no folders
    for name in (
        "comparison.md",
        "learning_curves.png",
        "learning_curves.svg",
        "iqm.svg",
    ):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    figure = (out / "learning_curves.svg").read_text()
    for source in ("MEow in the paper", "SAC published by SimbaV2"):
        assert f"<!-- {source} -->" in figure
    thin = ""
    for i, value in enumerate((50.0, 120.0, 130.0), 1):
        for name, number in (("charts/SPS", 100.0), ("eval/return_mean", value)):
            thin += f"{20_000 * i},{60 * i}.000,{name},{number}\n"
    copy = out / f"Hopper-v4__{SAC}__1__1"
    assert (copy / "metrics.csv").read_text() == "step,seconds,name,value\n" + thin
    assert str(tmp_path) not in (copy / "args.json").read_text()


def test_copies_count_once_and_replace_no_fuller_file(tmp_path, run_compare):
    full, out = write_run(tmp_path / "full"), tmp_path / "out"
    before = (full / "metrics.csv").read_bytes()
    _, text, _ = run_compare(full, "--copy")
    code, again, err = run_compare(full, out, "--copy")
    assert (code, again) == (0, text)
    assert "copies of one run: counted once" in err
    code, _, err = run_compare(out, "--copy", out=full.parent)
    assert code == 2
    assert "not overwritten" in err
    run_compare(full, "--copy", out=full.parent)  # onto itself
    assert (full / "metrics.csv").read_bytes() == before


def test_figures_have_a_panel_for_each_environment(tmp_path):
    """In the paper's order; each row in one look of its own, in one legend."""
    envs = ("Humanoid-v4", "Ant-v4", "Walker2d-v4", "HalfCheetah-v4", "Hopper-v4")
    for env in envs:
        for seed, alpha in enumerate((0.1, 0.1, 0.2, 0.3), 1):
            write_run(tmp_path, seed=seed, env=env, alpha=alpha)
    table = run_table.number_rows(run_table.find_runs((tmp_path,)))
    figure = compare.draw_curves(table)
    assert [ax.get_title() for ax in figure.axes] == list(reversed(envs))
    for ax in figure.axes:
        looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
        assert len(looks) == len(ax.lines) == 3
        assert len(ax.collections) == 1  # an interval where there are two seeds
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [
        "MEow, alpha=0.1 (2 seeds)",
        "MEow, alpha=0.2 (1 seed)",
        "MEow, alpha=0.3 (1 seed)",
    ]


def test_panels_are_figures_of_their_own(tmp_path, run_compare):
    for env in ("Ant-v4", "Hopper-v4"):
        write_run(tmp_path / "runs", env=env)
    run_compare(tmp_path / "runs", "--panels", out=tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out").glob("learning_curves*.png")}
    starts = "", "_Ant-v4", "_Hopper-v4"
    assert names == {f"learning_curves{start}" for start in starts}
    run_compare(write_run(tmp_path, env="own/Foo-v0"), "--panels", out=tmp_path / "own")
    assert (tmp_path / "own/learning_curves_own_Foo-v0.svg").exists()


def test_figures_show_stopped_runs_of_algorithms_without_a_finished_one(tmp_path):
    for env in ("Ant-v4", "Hopper-v4", "Walker2d-v4"):
        write_run(tmp_path, env=env, eval_frequency=50_000, total_timesteps=10**6)
    write_run(tmp_path, env="Hopper-v4", seed=2, eval_frequency=50_000)
    write_run(tmp_path, env="Walker2d-v4", seed=3, returns=(), total_timesteps=10**6)
    write_run(tmp_path, env="HalfCheetah-v4", returns=(1, math.nan))
    runs = run_table.find_runs((tmp_path,))
    table = run_table.number_rows(runs, algos=("SAC",))
    figure = compare.draw_curves(table)
    shown = {
        ax.get_title(): [line.get_label() for line in ax.lines] for ax in figure.axes
    }
    theirs = ["MEow in the paper", "SAC published by SimbaV2"]
    stopped = "MEow, stopped (1 seed)"
    assert shown == {
        "Hopper-v4": ["MEow (1 seed)", *theirs],
        "Walker2d-v4": [stopped, theirs[1]],  # the paper's begins later
        "Ant-v4": [stopped, *theirs],
    }
    for ax in figure.axes:
        ours = ax.lines[0]
        assert (ours.get_marker() == "x") == (ours.get_label() == stopped)
        assert max(line.get_xdata()[-1] for line in ax.lines) == 150_000


@pytest.mark.parametrize("folder", ["results", "results/isaac"])
def test_the_committed_runs_give_the_committed_report(folder, run_compare):
    assert (
        run_compare(ROOT / folder)[1] == (ROOT / folder / "comparison.md").read_text()
    )


def test_the_pages_have_the_tables_at_the_same_steps():
    report = (ROOT / "results/comparison.md").read_text()
    section = report.split("## At the same steps\n\n")[1].split("\n\n![")[0]
    table, *others = section.split("\n\n")
    assert table in (ROOT / "README.md").read_text()
    for table in others[1::2]:  # below their environment's name
        assert table in (ROOT / "docs/results.md").read_text()


# --- Bad input ------------------------------------------------------------------------
DAMAGES = [  # in the file, what becomes what; END: its end
    ("args.json", "}", ""),
    ("args.json", '"script"', '"s"'),
    ("args.json", '"command"', '"s"'),
    ("args.json", '"seed"', '"s"'),
    ("args.json", '"seed": 1', '"seed": "1"'),
    ("args.json", '"total_timesteps": 30', '"total_timesteps": 0'),
    ("args.json", '"eval_episodes": 10', '"eval_episodes": null'),
    ("args.json", '"alpha": 0.2', '"num_envs": "two"'),
    ("args.json", '"git_commit": "c0ffee"', '"git_commit": null'),
    ("args.json", '"env_id": "Hopper-v4"', '"env_id": 4'),
    ("metrics.csv", "step,seconds,name,value\n", ""),
    ("metrics.csv", "charts", "\udcff"),
    ("metrics.csv", "180.000", "inf"),
    ("metrics.csv", "END", "30,1\n"),
    ("metrics.csv", "END", "31,1,a,1,2\n"),
    ("metrics.csv", "END", "x,1,a,1\n"),
    ("metrics.csv", "END", "30,999.0,eval/return_mean,1.0\n"),
    ("metrics.csv", "END", "40,999.0,eval/return_mean,1.0\n"),
    ("metrics.csv", "30,180.000,eval/return_mean,3.0", "30,180.000,eval/return_mean,x"),
]


@pytest.mark.parametrize(("name", "before", "after"), DAMAGES)
def test_damaged_runs(tmp_path, run_compare, name, before, after):
    write_run(tmp_path / "runs", seed=2)
    file = write_run(tmp_path / "runs") / name
    text = (file.read_text() + "END").replace(before, after).replace("END", "")
    file.write_bytes(text.encode(errors="surrogateescape"))
    code, text, err = run_compare(tmp_path / "runs")
    assert (code, text) == (2, "")
    assert re.fullmatch(f"error: {re.escape(str(file))} .*\n", err)
    if after == '"s"':
        assert f"it lacks {before.strip(chr(34))}\n" in err
    file.unlink()
    _, _, err = run_compare(tmp_path / "runs")
    assert err.startswith(f"error: {file.parent} has no {name}")
    assert ("--add LABEL=" in err) == (name == "args.json")


def test_runs_of_one_name(tmp_path, run_compare):
    a = write_run(tmp_path / "a")
    c = write_run(tmp_path / "c", returns=(7, 8, 9))
    d = write_run(tmp_path / "d", alpha=0.5)  # a's returns
    for other in (c, d):
        code, _, err = run_compare(a, other)
        assert code == 2
        assert f"{a} and {other} have the same name but differ" in err
    code, text, _ = run_compare(a, a, a / ".." / a.name)
    assert code == 0
    assert cells(text)[0][3] == "1 (1)"


def test_mujoco_versions_do_not_mix(tmp_path, run_compare):
    write_run(tmp_path / "runs")
    write_run(tmp_path / "runs", seed=2, mujoco="3.1")
    code, text, err = run_compare(tmp_path / "runs")
    assert (code, text) == (2, "")
    assert "different MuJoCo versions: 3.1 (" in err
    code, text, _ = run_compare(tmp_path / "runs", "--allow-mixed-versions")
    assert code == 0
    assert "differ in commit, library versions or machine: 1.\n" in text


def test_usage_errors(tmp_path, run_compare):
    run, file = write_run(tmp_path / "runs"), tmp_path / "file"
    file.write_text("")
    (tmp_path / "nothing").mkdir()
    for words in ((), ("nowhere",), (tmp_path / "nothing",), (file,)):
        code, _, err = run_compare(*words)
        assert code == 2, words
        assert re.search(r"error: (no runs found|there is no nowhere)", err)
    assert run_compare(run, out=file)[0] == 2


def test_missing_package(tmp_path):
    (tmp_path / "scipy.py").write_text("raise ModuleNotFoundError(name='scipy')")
    shutil.copy(ROOT / "tools" / "compare.py", tmp_path)
    words = [sys.executable, "compare.py", "runs"]
    result = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    expected = "error: scipy is missing: pip install '.[bench]'\n"
    assert (result.returncode, result.stderr) == (1, expected)


@pytest.mark.parametrize("name", ["meow", "meow_auto", "sac"])
def test_a_kept_run_has_each_option_or_the_value_it_had(name):
    """Or runs from before an option would be rows of their own beside new ones."""
    script = importlib.import_module(f"{name}_continuous_action")
    options = {field.name for field in dataclasses.fields(script.Args)}
    files = list((ROOT / "results").glob(f"*__{name}_continuous_action__*/args.json"))
    assert files
    for file in files:
        about = json.loads(file.read_text())
        known = about["args"].keys() | about.get("settings", {}).keys()
        assert options <= known | run_table.DEFAULTS.keys() | run_table.NEUTRAL


@pytest.mark.parametrize("name", ["meow", "meow_auto", "sac"])
def test_the_kept_runs_have_the_settings_of_today(name):
    """Whoever changes a default must run them again, or name them otherwise."""
    script = importlib.import_module(f"{name}_continuous_action")
    files = (ROOT / "results").glob(f"*__{name}_continuous_action__*/args.json")
    for file in files:
        about = json.loads(file.read_text())
        had = {**run_table.DEFAULTS, **about.get("settings", {}), **about["args"]}
        today = dataclasses.asdict(script.Args.for_env(had["env_id"]))
        changed = {k for k in today.keys() - run_table.NEUTRAL if had[k] != today[k]}
        assert changed == set(), file
