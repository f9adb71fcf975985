"""Stable-Baselines3's algorithms under our measurement: settings, exactness, files, bad input."""

import ast
import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("stable_baselines3")

import scripted_env

import meow_continuous_action as meow
import sb3_baselines as sb3

OFF_POLICY = dict(learning_starts=200, batch_size=32, policy_kwargs=dict(net_arch=[32, 32]))
SMALL = {  # in place of the Zoo's settings for Hopper
    "td3": OFF_POLICY | dict(noise_std=0.1),
    "ddpg": OFF_POLICY | dict(noise_std=0.1),
    "sac": OFF_POLICY,
    "ppo": dict(n_steps=64, batch_size=32, n_epochs=2, normalize=True),
}
QUICK = dict(
    env_id="Hopper-v4", total_timesteps=380, eval_frequency=150, eval_episodes=2, log_frequency=50,
    checkpoint_frequency=90,
)  # fmt: skip
ALGORITHMS = ("td3", "ddpg", "sac", "ppo")


@pytest.fixture
def small(monkeypatch):
    """Small networks and an early start of learning for Hopper."""
    for algo, settings in SMALL.items():
        monkeypatch.setitem(sb3.ZOO[algo], "Hopper", settings)


def quick(algo, folder, **changes):
    return sb3.Args(algo=algo, **(QUICK | dict(runs_dir=str(folder)) | changes))


def words(algo, folder, **changes):
    """The command line of `quick`."""
    options = QUICK | dict(algo=algo, runs_dir=folder) | changes
    return [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def metrics(folder):
    """metrics.csv without times and speeds."""
    with open(f"{folder}/metrics.csv") as f:
        rows = [(r["step"], r["name"], r["value"]) for r in csv.DictReader(f)]
    return [row for row in rows if row[1] != "charts/SPS"]


def only_run(folder):
    (run,) = folder.iterdir()
    return run


def is_one_sentence(code, err, expected, *needles):
    assert code == expected, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    for needle in needles:
        assert str(needle) in errors[0]


# --- Settings -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("algo", "env_id", "expected"),
    [
        ("td3", "HalfCheetah-v4", {"learning_rate": 1e-3, "batch_size": 256, "gamma": 0.99}),
        ("td3", "Humanoid-v4", {"learning_starts": 10_000, "policy_delay": 2, "tau": 0.005}),
        ("ddpg", "Ant-v4", {"learning_rate": 1e-3, "policy_delay": 1, "buffer_size": 1_000_000}),
        ("sac", "Walker2d-v4", {"learning_starts": 10_000, "learning_rate": 3e-4}),
        ("ppo", "Hopper-v4", {"n_steps": 512, "gamma": 0.999, "batch_size": 32, "n_epochs": 5}),
        ("ppo", "HalfCheetah-v4", {"learning_rate": 2.0633e-05, "ent_coef": 0.000401762}),
        ("ppo", "Humanoid-v4", {"gae_lambda": 0.9, "max_grad_norm": 2, "vf_coef": 0.431892}),
        ("ppo", "Walker2d-v5", {"n_epochs": 20, "learning_rate": 5.05041e-05}),
        ("ppo", "Ant-v4", {"n_steps": 2048, "learning_rate": 3e-4, "n_epochs": 10}),
        ("td3", "Pendulum-v1", {"learning_starts": 100, "action_noise": None}),
    ],
)
def test_the_model_has_the_zoos_settings(algo, env_id, expected):
    args = sb3.Args(algo=algo, env_id=env_id)
    model = sb3.make_model(args, sb3.zoo_settings(args), sb3.Env(env_id, 1))
    assert {k: getattr(model, k) for k in expected} == expected
    tuned = env_id != "Pendulum-v1"
    if algo in ("td3", "ddpg"):
        sizes = [p.shape[0] for p in model.actor.parameters()][::2]
        assert sizes[:2] == [400, 300]
        assert len(model.critic.q_networks) == (2 if algo == "td3" else 1)
        if tuned:
            assert (model.action_noise._sigma == 0.1).all()
    if algo == "ppo":
        assert model.get_vec_normalize_env().gamma == model.gamma
        hidden = model.policy.mlp_extractor.policy_net
        large = env_id.split("-")[0] not in ("Ant", "Walker2d")
        assert hidden[0].out_features == (256 if large else 64)
        assert isinstance(hidden[1], torch.nn.ReLU if large else torch.nn.Tanh)
        assert (model.policy.log_std == (-2 if large else 0)).all()


def test_budgets_and_one_entry_per_task():
    budgets = {a: {t: int(s["n_timesteps"]) for t, s in sb3.ZOO[a].items()} for a in ALGORITHMS}
    assert all(set(tasks) == set(sb3.TASKS) for tasks in budgets.values())
    assert budgets["td3"]["Humanoid"] == budgets["sac"]["Humanoid"] == 2_000_000
    assert budgets["ppo"]["Humanoid"] == 10_000_000
    assert {b for a in ALGORITHMS for t, b in budgets[a].items() if t != "Humanoid"} == {1_000_000}


def test_building_models_leaves_the_table_alone():
    """SB3's DDPG writes n_critics into the policy_kwargs that it is given."""
    before = json.dumps(sb3.ZOO, default=str)
    args = sb3.Args(algo="ddpg", env_id="Ant-v4")
    sb3.make_model(args, sb3.zoo_settings(args), sb3.Env("Ant-v4", 1))
    assert json.dumps(sb3.ZOO, default=str) == before


# --- Training -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run of each algorithm."""
    with pytest.MonkeyPatch.context() as patch:
        for algo, settings in SMALL.items():
            patch.setitem(sb3.ZOO[algo], "Hopper", settings)
        folder = tmp_path_factory.mktemp("finished")
        for algo in ALGORITHMS:
            assert sb3.main(words(algo, folder)) == 0
    return {algo: next(folder.glob(f"*sb3_{algo}*")) for algo in ALGORITHMS}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_files_of_a_run(finished, algo):
    folder = finished[algo]
    files = {"args.json", "metrics.csv", "checkpoint.pt", "policy_best.pt", "policy_final.pt"}
    assert {f.name for f in folder.iterdir()} == files
    assert folder.name.startswith(f"Hopper-v4__sb3_{algo}__1__")
    described = json.loads((folder / "args.json").read_text())
    assert described["args"]["algo"] == algo
    assert described["settings"] == SMALL[algo]
    assert "stable_baselines3" in described["versions"]
    rows = metrics(folder)
    names = {name for _, name, _ in rows}
    assert names >= {"charts/episodic_return", "charts/episodic_length", "eval/return_1"}
    assert ("losses/loss" if algo == "ppo" else "losses/critic_loss") in names
    assert [s for s, name, _ in rows if name == "eval/return_mean"] == ["150", "300", "380"]
    steps = [int(s) for s, _, _ in rows]
    assert steps == sorted(steps)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 380


@pytest.mark.parametrize("algo", ["sac", "ppo"])
@pytest.mark.usefixtures("small")
def test_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path, algo):
    for seed in (1, 2):
        run = sb3.train(quick(algo, tmp_path, seed=seed, exp_name=str(seed)))["run_dir"]
        assert (metrics(run) == metrics(finished[algo])) is (seed == 1)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.usefixtures("small")
def test_the_loop_is_sb3s_own(tmp_path, algo):
    """Evaluations, logging and checkpoints leave the networks of SB3's `learn`, bit for bit."""
    args = quick(algo, tmp_path, total_timesteps=256, eval_frequency=70)
    run = sb3.train(args)["run_dir"]
    env = sb3.Env(args.env_id, args.seed)
    env.log = lambda *_: None
    model = sb3.make_model(args, sb3.zoo_settings(args), env)
    if algo == "ppo":
        model.rollout_buffer.__class__ = sb3.RolloutBuffer
    model.learn(256)
    saved = sb3.load_file(sb3.Path(run, "policy_final.pt"))["policy"]
    assert model._n_updates > 0
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, saved[name]), name


def run_with_signal(arguments, signum, step, monkeypatch):
    """`main`, which gets a signal when it has made `step` steps."""
    show = meow.Logger.show

    def show_and_signal(logger, now, **fields):
        show(logger, now, **fields)
        if now >= step and not signalled:
            signalled.append(signal.raise_signal(signum))

    signalled = []
    with monkeypatch.context() as patch:
        patch.setattr(meow.Logger, "show", show_and_signal)
        return sb3.main(arguments)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.usefixtures("small")
def test_stopped_and_resumed_run_is_the_uninterrupted_one(
    finished, tmp_path, algo, monkeypatch, capsys
):
    arguments = words(algo, tmp_path, checkpoint_frequency=0)
    assert run_with_signal(arguments, signal.SIGTERM, 60, monkeypatch) == 128 + signal.SIGTERM
    run = only_run(tmp_path)
    assert f"--resume {run}" in capsys.readouterr().err
    assert 60 <= torch.load(run / "checkpoint.pt", weights_only=True)["step"] <= 64
    assert run_with_signal(["--resume", str(run)], signal.SIGINT, 275, monkeypatch) == 130
    np.random.seed(0)  # whatever a new process has drawn
    torch.manual_seed(0)
    assert sb3.main(["--resume", str(run)]) == 0
    assert metrics(run) == metrics(finished[algo])
    final = [torch.load(f / "policy_final.pt", weights_only=True) for f in (run, finished[algo])]
    for name, value in final[0]["policy"].items():
        assert torch.equal(value, final[1]["policy"][name]), name


def wait_for(condition, process):
    deadline = time.time() + 300  # starting takes minutes on a crowded machine
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.time() < deadline, "the run is stuck"
        time.sleep(0.02)


@pytest.mark.parametrize("algo", ["td3", "ppo"])
@pytest.mark.usefixtures("small")
def test_killed_and_resumed_run_is_the_uninterrupted_one(finished, tmp_path, algo):
    """SIGKILL somewhere after the first checkpoint changes nothing."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sb3_baselines as sb3\n"
    code += f"sb3.ZOO[{algo!r}]['Hopper'] = {SMALL[algo]!r}\nsys.exit(sb3.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words(algo, tmp_path)], stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")), process)
    process.kill()
    process.wait()
    run = only_run(tmp_path)
    assert len(metrics(run)) < len(metrics(finished[algo]))
    assert sb3.main(["--resume", str(run), "--torch-threads", "1"]) == 0
    assert metrics(run) == metrics(finished[algo])


@pytest.mark.parametrize("algo", ["ddpg", "ppo"])
@pytest.mark.usefixtures("small")
def test_a_longer_total_continues_a_finished_run(finished, tmp_path, algo, capsys):
    """PPO goes on in the middle of its rollout."""
    assert sb3.main(words(algo, tmp_path, total_timesteps=330)) == 0
    run = str(only_run(tmp_path))
    assert sb3.main(["--resume", run, "--total-timesteps", "380"]) == 0
    resumed = {(s, n): v for s, n, v in metrics(run)}
    whole = {(s, n): v for s, n, v in metrics(finished[algo])}
    assert {k: resumed[k] for k in whole} == whole
    capsys.readouterr()
    is_one_sentence(sb3.main(["--resume", run]), capsys.readouterr().err, 2, "already at step 380")


# --- Environment and evaluation -------------------------------------------------------------------
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_actions_reach_the_environments_bounds(algo):
    """Bounds [-0.4, 0.4] and [2, 3]: explored from end to end and never left."""
    args = sb3.Args(algo=algo, env_id="scripted_env:Scripted-v0")
    env = sb3.Env(args.env_id, 1)
    env.log = lambda *_: None
    settings = {"ppo": dict(n_steps=128), "sac": {}}.get(algo, dict(noise_std=0.5))
    model = sb3.make_model(args, settings, env)
    model.learn(110)
    received = np.array(env.training.env.unwrapped.received)
    low, high = scripted_env.Scripted.action_space.low, scripted_env.Scripted.action_space.high
    assert (received >= low - 1e-6).all()
    assert (received <= high + 1e-6).all()
    reach = 0.05 * (high - low)
    assert (received.min(0) < low + reach).all()
    assert (received.max(0) > high - reach).all()


def test_humanoids_actions_keep_their_units():
    """Half-widths 0.4 as in the environment, so that PPO's standard deviation means the same."""
    env = sb3.Env("Humanoid-v4", 1)
    assert (env.action_space.high == np.float32(0.4)).all()
    received = []
    inner = env.training.env.unwrapped
    step, inner.step = inner.step, lambda a: received.append(a) or step(a)
    env.reset()
    for value in (0.4, -0.4, 0.1):
        env.step(np.full(17, value, np.float32))
    assert np.allclose(received, [[0.4] * 17, [-0.4] * 17, [0.1] * 17], atol=1e-7)


def test_replay_holds_true_final_observations_and_tells_time_outs():
    """Scripted episodes end by termination (3 steps), time-out (4), both (5)."""
    args = sb3.Args(algo="sac", env_id="scripted_env:Scripted-v0")
    env = sb3.Env(args.env_id, 1)
    logged = []
    env.log = lambda step, values: logged.append((step, *values.values()))
    model = sb3.make_model(args, {}, env)
    model.learn(12)
    buffer = model.replay_buffer
    ends = [2, 6, 11]
    assert np.flatnonzero(buffer.dones[:12, 0]).tolist() == ends
    assert np.flatnonzero(buffer.timeouts[:12, 0]).tolist() == [6]
    assert buffer.next_observations[ends, 0].tolist() == [[1, 3], [2, 4], [3, 5]]
    assert buffer.observations[[0, 3, 7], 0].tolist() == [[1, 0], [2, 0], [3, 0]]
    assert logged == [(3, 36, 3), (7, 90, 4), (12, 165, 5)]


@pytest.mark.parametrize("algo", ["td3", "ppo"])
@pytest.mark.usefixtures("small")
def test_evaluation_is_a_plain_loop(finished, algo):
    """The last evaluation, played again with SB3's predict in the bare environment."""
    saved = sb3.load_file(finished[algo] / "policy_final.pt")
    args = sb3.Args(**saved["args"])
    model = sb3.make_model(args, sb3.zoo_settings(args), sb3.Env(args.env_id, 1))
    sb3.load_policy(model, saved)
    norm, env = model.get_vec_normalize_env(), gym.make(args.env_id)
    for i in range(2):
        obs, _ = env.reset(seed=meow.derive_seed(1, 1, 380, i))
        episodic_return, over = 0.0, False
        while not over:
            obs = obs.astype(np.float32)
            action, _ = model.predict(norm.normalize_obs(obs) if norm else obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            episodic_return, over = episodic_return + reward, terminated or truncated
        logged = next(
            v for s, n, v in metrics(finished[algo]) if (s, n) == ("380", f"eval/return_{i}")
        )
        assert episodic_return == pytest.approx(float(logged), rel=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
@pytest.mark.usefixtures("small")
def test_evaluation_changes_nothing(algo):
    """A stochastic one draws, and leaves the random state and the statistics alone."""
    args = quick(algo, "unused", deterministic_eval=False)
    model = sb3.make_model(args, sb3.zoo_settings(args), sb3.Env(args.env_id, 1))
    evaluator = meow.Evaluator(args, sb3.make_act(args, model))
    before = torch.get_rng_state(), json.dumps(sb3.policy_state(model)["statistics"])
    returns = [evaluator.run(step, None)[0] for step in (1, 1, 2)]
    assert returns[0] == returns[1] != returns[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert json.dumps(sb3.policy_state(model)["statistics"]) == before[1]


@pytest.mark.parametrize("algo", ["td3", "ppo"])
@pytest.mark.usefixtures("small")
def test_evaluate_prints_the_last_evaluation(finished, algo, capsys):
    folder = finished[algo]
    for path in (folder, folder / "checkpoint.pt"):
        assert sb3.main(["--evaluate", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "2 deterministic episodes" in lines[2]
        logged = [
            float(v)
            for s, n, v in metrics(folder)
            if s == "380" and n in ("eval/return_0", "eval/return_1")
        ]
        printed = [float(line.split("return ")[1].split(",")[0]) for line in lines[:2]]
        assert printed == pytest.approx(logged, abs=0.02, rel=1e-3)


@pytest.mark.parametrize("algo", ["td3", "ppo"])
@pytest.mark.usefixtures("small")
def test_diverged_networks_stop_the_run(tmp_path, algo, monkeypatch, capsys):
    train = sb3.ALGORITHMS[algo].train

    def diverge(model, *args, **kwargs):
        train(model, *args, **kwargs)
        for p in model.policy.parameters():
            p.data.fill_(torch.nan)

    monkeypatch.setattr(sb3.ALGORITHMS[algo], "train", diverge)
    code = sb3.main(words(algo, tmp_path))
    is_one_sentence(code, capsys.readouterr().err, 1, "not finite", "at step")


# --- Bad input ------------------------------------------------------------------------------------
BAD = [
    (["--algo", "a2c"], "algo"), (["--total-timesteps", "0"], "total-timesteps"),
    (["--seed", "-1"], "seed"), (["--eval-episodes", "0"], "eval-episodes"),
    (["--eval-frequency", "-5"], "eval-frequency"), (["--log-frequency", "0"], "log-frequency"),
    (["--torch-threads", "0"], "torch-threads"), (["--total-timesteps", "1e6"], "total-timesteps"),
    (["--checkpoint-frequency", "-1"], "checkpoint-frequency"), (["--compile"], "compile"),
    (["--no-deterministic-eval"], "deterministic"), (["--env-id", "Nope-v4"], "Nope"),
    (["--env-id", "CartPole-v1"], "continuous"), (["--resume", "nowhere"], "nowhere"),
    (["--evaluate", "nowhere"], "nowhere"), (["--algo"], "algo"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "needle"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_exits_with_2(arguments, needle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = sb3.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    text = capsys.readouterr()
    assert code == 2
    assert needle in text.err + text.out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_other_settings_are_named(finished, capsys):
    arguments = ["--resume", str(finished["td3"]), "--algo", "ppo", "--seed", "5"]
    code = sb3.main(arguments)
    needles = "--algo ppo (saved: td3)", "--seed 5 (saved: 1)"
    is_one_sentence(code, capsys.readouterr().err, 2, *needles)
    code = sb3.main(["--resume", str(finished["td3"] / "policy_final.pt")])
    is_one_sentence(code, capsys.readouterr().err, 2, "a policy alone")


@pytest.mark.parametrize("how", ["truncated", "flipped", "text", "foreign", "meow", "code"])
def test_damaged_and_foreign_checkpoints(finished, tmp_path, how, capsys):
    path = tmp_path / "checkpoint.pt"
    content = bytearray((finished["td3"] / "checkpoint.pt").read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 3] ^= 64
        path.write_bytes(content)
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif how == "meow":
        meow.save_file(path, {"args": dataclasses.asdict(meow.Args())})
    else:
        torch.save({"format": sb3.FORMAT, "run": os.system}, path)
    for option in ("--resume", "--evaluate"):
        is_one_sentence(sb3.main([option, str(path)]), capsys.readouterr().err, 1, path)


def test_a_missing_package_is_named():
    code = "import sys, runpy; sys.modules['stable_baselines3'] = None\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\n"
    code += "runpy.run_path(sys.path[0] + '/sb3_baselines.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    needle = "pip install -r requirements-benchmark.txt"
    is_one_sentence(result.returncode, result.stderr, 2, "stable_baselines3", needle)


def test_every_option_is_documented_and_read():
    source = (ROOT / "sb3_baselines.py").read_text()
    body = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args").body
    for field, doc in pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(doc, ast.Expr), f"{field.target.id} has no docstring"
    source += (ROOT / "meow_continuous_action.py").read_text()  # reads those it shares
    shared = {field.name for field in dataclasses.fields(meow.Args)}
    for field in dataclasses.fields(sb3.Args):
        assert field.name == "algo" or field.name in shared
        assert re.search(rf"args\.{field.name}\b", source), field.name


def test_help_teaches(capsys):
    with contextlib.suppress(SystemExit):
        sb3.main(["--algo", "ppo", "--help"])
    text = capsys.readouterr().out
    assert "sb3_ppo" in text
    assert "Stable-Baselines3" in text
