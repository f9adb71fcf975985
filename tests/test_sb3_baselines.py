"""Stable-Baselines3's algorithms under our measurement."""

import copy
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, options

pytest.importorskip("stable_baselines3")

import sb3_baselines as script
from harness.runs import Run, Session, main

ALGORITHMS = ("td3", "ddpg", "sac", "ppo")
SCRIPTED = "scripted_env:Scripted-v0"
QUICK = dict(
    env_id="Hopper-v4", total_timesteps=384, eval_frequency=150, eval_episodes=2
)
QUICK |= dict(log_frequency=50, checkpoint_frequency=90)
SMALL = dict(learning_starts=200, batch_size=32, buffer_size=300)
SMALL_PPO = dict(n_steps=64, batch_size=32, n_epochs=2, policy_kwargs={})


@pytest.fixture(scope="module", autouse=True)
def small_settings():
    """Hopper learns early, from a small replay buffer or in short rollouts."""
    with pytest.MonkeyPatch.context() as patch:
        for algo in ALGORITHMS:
            changes = SMALL_PPO if algo == "ppo" else SMALL
            patch.setitem(
                script.ZOO[algo], "Hopper", script.ZOO[algo]["Hopper"] | changes
            )
        yield


def start(*words, **settings):
    """The exit code of a command line."""
    words = [*words, *options(**settings)]
    try:
        return main(script.Args, script.train, script.evaluate_saved, words)
    except SystemExit as stopped:
        return stopped.code


def make(algo, env_id, **settings):
    """Args, environment, model and the parts of its policy, ready to learn."""
    args = script.Args(algo=algo, env_id=env_id, eval_episodes=1, **settings)
    env = script.make_env(args)
    return args, env, *script.make_model(args, env, "cpu")


def policy(folder):
    return torch.load(folder / "policy_final.pt", weights_only=True)


def assert_equal(states, expected):
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


# --- Settings, environment, evaluation ------------------------------------------------
EXPECTED = [
    (
        "td3",
        "Humanoid-v4",
        dict(learning_starts=10_000, learning_rate=1e-3, batch_size=256),
    ),
    ("ddpg", "Ant-v4", dict(learning_rate=1e-3, policy_delay=1, buffer_size=1_000_000)),
    (
        "sac",
        "Walker2d-v4",
        dict(learning_starts=10_000, learning_rate=3e-4, batch_size=256),
    ),
    (
        "ppo",
        "HalfCheetah-v4",
        dict(n_steps=512, learning_rate=2.0633e-5, ent_coef=0.000401762),
    ),
    ("ppo", "Walker2d-v5", dict(n_epochs=20, learning_rate=5.05041e-5, batch_size=32)),
    ("ppo", "Ant-v4", dict(n_steps=2048, learning_rate=3e-4, n_epochs=10)),
    ("td3", "Pendulum-v1", dict(learning_starts=100, action_noise=None)),
]


@pytest.mark.parametrize(("algo", "env_id", "expected"), EXPECTED)
def test_the_model_has_the_zoos_settings(algo, env_id, expected):
    """And making it leaves the table alone."""
    before = copy.deepcopy(script.ZOO)
    _, _, model, _ = make(algo, env_id)
    assert {k: getattr(model, k) for k in expected} == expected
    assert before == script.ZOO
    if algo in ("td3", "ddpg"):
        assert [p.shape[0] for p in model.actor.parameters()][0:4:2] == [400, 300]
        assert len(model.critic.q_networks) == (2 if algo == "td3" else 1)
        assert env_id == "Pendulum-v1" or np.all(model.action_noise._sigma == 0.1)
    if algo == "ppo":
        assert model.get_vec_normalize_env().gamma == model.gamma
        large = env_id.split("-")[0] not in ("Ant", "Walker2d")
        hidden = model.policy.mlp_extractor.policy_net
        assert (
            hidden[0].out_features == hidden[2].out_features == (256 if large else 64)
        )
        assert isinstance(hidden[1], torch.nn.ReLU if large else torch.nn.Tanh)
        assert (model.policy.log_std == (-2 if large else 0)).all()


def test_actions_have_the_environments_units():
    """Bounds [-0.4, 0.4] and [2, 3]: SB3 sees the second centred; none is left."""
    _, env, model, _ = make("ppo", SCRIPTED)
    model.get_env().reset()
    for action in ([0.1, -0.2], [9, -9]):
        model.get_env().step(np.float32([action]))
    assert np.allclose(env.unwrapped.received, [[0.1, 2.3], [0.4, 2.0]])


def test_replay_holds_true_final_observations_and_tells_time_outs():
    """Scripted episodes end by termination (3 steps), time-out (4), both (5)."""
    _, _, model, _ = make("sac", SCRIPTED)
    model.learn(12)
    replay, ends = model.replay_buffer, [2, 6, 11]
    assert np.flatnonzero(replay.dones[:12, 0]).tolist() == ends
    assert np.flatnonzero(replay.timeouts[:12, 0]).tolist() == [6]
    assert replay.next_observations[ends, 0].tolist() == [[1, 3], [2, 4], [3, 5]]
    assert replay.observations[[0, 3, 7], 0].tolist() == [[1, 0], [2, 0], [3, 0]]


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_evaluation_changes_nothing(algo):
    """A stochastic one draws, and leaves the random state and the statistics alone."""
    args, _, model, parts = make(algo, "Hopper-v4", deterministic_eval=False)
    before = (
        torch.get_rng_state(),
        copy.deepcopy({k: p.state_dict() for k, p in parts.items()}),
    )
    policy, session = script.make_eval_policy(args, model), Session(args, "cpu")
    envs = script.make_eval_envs(args, session)

    def returns(step):
        return script.evaluate(args, envs, policy, step, session)[0]

    first, second, other = [returns(step) for step in (1, 1, 2)]
    args.deterministic_eval = True
    assert first == second
    assert first not in (other, returns(1))
    assert_equal(
        (torch.get_rng_state(), {k: p.state_dict() for k, p in parts.items()}), before
    )


# --- Runs -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run of each algorithm."""
    folder = tmp_path_factory.mktemp("finished")
    assert [start(algo=algo, runs_dir=folder, **QUICK) for algo in ALGORITHMS] == [
        0
    ] * 4
    return {
        algo: next(folder.glob(f"Hopper-v4__sb3_{algo}__1__*")) for algo in ALGORITHMS
    }


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_has_our_files_and_the_networks_of_a_plain_learn(finished, algo):
    files = {f.name for f in finished[algo].iterdir() if "tfevents" not in f.name}
    assert files == {"args.json", "metrics.csv", "checkpoint.pt", "policy_final.pt"}
    rows = metrics(finished[algo])
    loss = "losses/loss" if algo == "ppo" else "losses/critic_loss"
    assert {name for _, name, _ in rows} >= {
        loss,
        "charts/episodic_return",
        "eval/return_1",
    }
    evaluated = [step for step, name, _ in rows if name == "eval/return_mean"]
    assert evaluated == ["150", "300", "384"]
    _, _, model, parts = make(algo, "Hopper-v4")
    model.learn(384)
    assert model._n_updates > 0
    for name, part in parts.items():
        assert_equal(dict(part.state_dict()), dict(policy(finished[algo])[name]))


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_stopped_and_resumed_run_is_the_uninterrupted_one(
    finished, tmp_path, algo, monkeypatch
):
    """Before learning starts and with a full replay; PPO: within, between rollouts."""
    end_step, stops = Run.end_step, [100, 320]

    def stop_and_end_step(run):
        if run.step + 1 in stops:
            stops.remove(run.step + 1)
            signal.raise_signal(signal.SIGTERM)
        end_step(run)

    monkeypatch.setattr(Run, "end_step", stop_and_end_step)
    assert start(algo=algo, runs_dir=tmp_path, **QUICK) == 128 + signal.SIGTERM
    (run,) = tmp_path.iterdir()
    assert max(int(step) for step, _, _ in metrics(run)) <= 100
    assert start("--resume", str(run)) == 128 + signal.SIGTERM
    np.random.seed(0)  # whatever a new process has drawn
    torch.manual_seed(0)
    assert start("--resume", str(run)) == 0
    assert metrics(run) == metrics(finished[algo])
    assert_equal(policy(run)["policy"], policy(finished[algo])["policy"])


@pytest.mark.slow
def test_ppo_stops_within_a_rollout_and_goes_on_from_there(finished, tmp_path):
    assert (
        start(algo="ppo", runs_dir=tmp_path, **QUICK | dict(total_timesteps=330)) == 0
    )
    (run,) = tmp_path.iterdir()
    assert policy(run)["step"] == int(metrics(run)[-1][0]) == 330
    assert start("--resume", str(run), total_timesteps=384) == 0
    assert set(metrics(run)) >= set(metrics(finished["ppo"]))


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["td3", "ppo"])
def test_evaluation_is_a_plain_loop_which_evaluate_repeats(finished, algo, capsys):
    """The last evaluation, played again with SB3's predict in the bare environment."""
    _, _, model, _ = make(algo, "Hopper-v4")
    saved, env = policy(finished[algo]), gym.make("Hopper-v4")
    model.policy.load_state_dict(saved["policy"])
    rows = metrics(finished[algo])
    logged = {name: float(x) for step, name, x in rows if step == "384"}
    assert start("--evaluate", str(finished[algo] / "checkpoint.pt")) == 0
    printed = capsys.readouterr().out
    for i in range(2):
        seed = script.episode_seed(1, script.EVALUATION, 384, i)
        (obs, _), returned, over = env.reset(seed=seed), 0.0, False
        while not over:
            if algo == "ppo":
                mean, var = (
                    saved["normalizer"][f"obs_rms.{x}"].numpy() for x in ("mean", "var")
                )
                obs = np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10)
            action, _ = model.predict(obs.astype(np.float32), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            returned, over = returned + reward, terminated or truncated
        assert returned == pytest.approx(logged[f"eval/return_{i}"], rel=1e-4)
        assert f"episode {i}: return {logged[f'eval/return_{i}']:.2f}," in printed


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["td3", "sac", "ppo"])
def test_diverged_networks_stop_the_run(tmp_path, algo, monkeypatch, capsys):
    def diverge(model, *_args, **_options):
        for p in model.policy.parameters():
            p.data.fill_(torch.nan)

    monkeypatch.setattr(getattr(script.sb3, algo.upper()), "train", diverge)
    assert start(algo=algo, runs_dir=tmp_path, **QUICK) == 1
    (error,) = [
        x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")
    ]
    assert "action[0] = nan at step" in error


# --- Messages -------------------------------------------------------------------------
BAD = {
    "--algo a2c": "algo",
    "--algo": "algo",
    "--compile": "compile",
    "--env-id Nope-v4": "Nope",
}
BAD |= {"--env-id CartPole-v1": "continuous", "--resume nowhere": "nowhere"}
BAD |= {"--algo ddpg --no-deterministic-eval": "policy of ddpg"}


@pytest.mark.parametrize(("words", "needle"), BAD.items())
def test_bad_input_exits_with_2(words, needle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start(*words.split()) == 2
    assert needle in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


ABOUT = {
    "Ant-v4": "the Zoo's settings",
    "Ant-v5": "the Zoo's settings of its v4",
    SCRIPTED: "Stable-Baselines3's defaults: the Zoo has none for it",
}


@pytest.mark.parametrize("env_id", ABOUT)
@pytest.mark.parametrize("algo", [None, "sac"])
def test_the_command_says_what_it_is_about_to_train(
    env_id, algo, tmp_path, capsys, monkeypatch
):
    """And takes TD3 where no algorithm is asked for."""
    monkeypatch.setattr(script.sb3.TD3, "learn", lambda *_a, **_k: sys.exit(0))
    monkeypatch.setattr(script.sb3.SAC, "learn", lambda *_a, **_k: sys.exit(0))
    words = ["--algo", algo] if algo else []
    assert start(*words, env_id=env_id, runs_dir=tmp_path) == 0
    algo = algo or "td3"
    said = f"{algo.upper()} of Stable-Baselines3 (--algo {algo}) on {env_id} with "
    assert capsys.readouterr().err.splitlines()[0] == said + ABOUT[env_id]


@pytest.mark.slow
def test_a_missing_package_is_named():
    code = "import sys, runpy; sys.modules['stable_baselines3'] = None\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\n"
    code += "runpy.run_path(sys.path[0] + '/sb3_baselines.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: stable_baselines3 is missing: pip install")


def test_another_size_than_when_saved_is_one_sentence(tmp_path, capsys):
    """The user has edited the environment; both sizes are named."""
    settings = dict(env_id="Pendulum-v1", total_timesteps=30, eval_episodes=1)
    assert start("--algo", "td3", **settings, runs_dir=tmp_path) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.name[0] != ".")
    for file in ("checkpoint.pt", "policy_final.pt"):
        content = torch.load(folder / file, weights_only=True)
        content["args"]["env_id"] = "Hopper-v4"
        torch.save(content, folder / file)
    resumed = start("--resume", str(folder), total_timesteps=60)
    played = start("--evaluate", str(folder))
    assert (resumed, played) == (2, 2)
    errors = capsys.readouterr().err.splitlines()
    sizes = "3 observations and 1 actions; Hopper-v4 now has 11 and 3"
    assert sum(sizes in line for line in errors if line.startswith("error: ")) == 2
