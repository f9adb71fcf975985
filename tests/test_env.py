"""Environments: which ones can be used, training in them, restoring and evaluating."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT

from harness.args import RunArgs
from harness.envs import EvaluationEnvs, Evaluator, TrainingEnv, derive_seed, make_env
from harness.files import RunError, UsageError

UNUSED = Path("unused")
BAD_SPACES = {
    "DictObs": "observation must be one flat vector",
    "ImageObs": "observation must be one flat vector",
    "DiscreteObs": "observation must be one flat vector",
    "Unbounded": "must be bounded",
    "HalfBounded": "must be bounded",
    "EmptyRange": "must be bounded",
    "IntegerBox": "must be continuous",
    "MultiDiscrete": "must be continuous",
    "MatrixAction": "one flat vector",
}


# --- What can be trained in -----------------------------------------------------------------------
@pytest.mark.parametrize(("name", "message"), BAD_SPACES.items())
def test_unsuitable_spaces_are_refused(name, message):
    with pytest.raises(
        UsageError, match=f"--env-id scripted_env:{name}-v0: .*{message}"
    ):
        make_env(f"scripted_env:{name}-v0")


@pytest.mark.parametrize(
    "env_id",
    [
        "Nope-v4",
        "Hopper-v99",
        "nomodule:X-v0",
        "scripted_env:X-v0",
        "CartPole-v1",
        "a b",
        "",
    ],
)
def test_unusable_ids_are_refused(env_id):
    with pytest.raises(UsageError, match=f"--env-id {env_id}: ") as refused:
        make_env(env_id)
    assert "\n" not in str(refused.value)


def test_an_environment_that_can_not_render_is_refused():
    with pytest.raises(UsageError, match="leave out --capture-video"):
        make_env("scripted_env:Scripted-v0", "rgb_array")


def test_a_module_in_this_folder_is_found(tmp_path, monkeypatch):
    """`my_env:My-v0` may lie where the user is, which isn't where the script is."""
    source = "import gymnasium, scripted_env\ngymnasium.register('My-v0', scripted_env.OneState)\n"
    (tmp_path / "my_env.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with mock.patch("sys.path", ["", str(Path(__file__).parent)]):
        assert make_env("my_env:My-v0").action_space.shape == (1,)


@pytest.mark.parametrize(
    ("env_id", "bounds"),
    [
        ("scripted_env:Scripted-v0", [[-0.4, 2], [0.4, 3]]),
        ("Humanoid-v4", [[-0.4] * 17, [0.4] * 17]),
    ],
)
def test_actions_are_rescaled(env_id, bounds):
    """-1 and 1 are the environment's own bounds."""
    env = make_env(env_id)
    low, high = np.float32(bounds)
    with mock.patch.object(env.unwrapped, "step", wraps=env.unwrapped.step) as step:
        env.reset(seed=0)
        for action in (-1, 0, 1):
            env.step(np.full(len(low), action, np.float32))
    received = [call.args[0] for call in step.call_args_list]
    np.testing.assert_allclose(received, [low, (low + high) / 2, high], rtol=1e-6)


# --- Training -------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1", "HalfCheetah-v5"])
def test_environment_state_is_restored_exactly(env_id):
    """In the middle of an episode; it goes on with the same rows and episodes, bit for bit."""
    env, other = TrainingEnv(env_id, 3), TrainingEnv(env_id, 3)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (400, env.act_dim)).astype(np.float32)
    env.reset()

    def play(env, actions):
        rows = []
        for action in actions:
            _, _, next_obs, reward, terminated = env.step(action)
            end = tuple(env.episode_metrics(False).values())
            rows.append(
                (*next_obs, *env.obs, reward, terminated, env.episode, env.steps, *end)
            )
        return rows

    play(env, actions[:137])
    assert env.actions
    other.load_state_dict(env.state_dict())
    assert other.episode_metrics(False) == {}
    assert play(other, actions[137:]) == play(env, actions[137:])


def test_mujocos_warnings_are_shown_once():
    """Not once for each of the environments of training and evaluation."""
    code = "import harness.envs as e; [e.make_env('HalfCheetah-v4') for _ in range(3)]"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.count("Warning") == done.stderr.count("'settotalmass'") == 1


def test_each_episode_and_seed_starts_differently():
    starts = []
    for seed in (0, 1, 2**32 - 1):
        env = TrainingEnv("Pendulum-v1", seed)
        for _ in range(2):
            env.reset()
            starts.append(tuple(env.obs))
    assert len(set(starts)) == 6


def test_numbers_that_are_not_finite_stop_training():
    """Where and when is said: an action, an observation, a reward."""
    for name, needle in (
        ("NanObs", r"observation\[0\] = nan"),
        ("InfReward", "reward = inf"),
    ):
        env = TrainingEnv(f"scripted_env:{name}-v0", 1)
        env.reset()
        for _ in range(24):
            env.step(np.zeros(1, np.float32))
        with pytest.raises(
            RunError, match=rf"scripted_env:{name}-v0: {needle} at step 24; "
        ):
            env.step(np.zeros(1, np.float32))
        assert env.steps == 24
    with pytest.raises(RunError, match=r"action\[0\] = nan at step 24"):
        env.step(np.full(1, np.nan, np.float32))


# --- Evaluation -----------------------------------------------------------------------------------
def evaluator(policy, env_id="Pendulum-v1", **settings):
    args = RunArgs(env_id=env_id, **settings)
    return Evaluator(args, EvaluationEnvs(args), policy)


def test_evaluation_seeds_are_fresh_and_repeatable():
    """Other steps and seeds give other episodes; the same ones give the same returns."""
    seen = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        run = evaluator(lambda _obs, z: z, seed=seed, eval_episodes=3)
        run.run(9, UNUSED)  # what was played before makes no difference
        seen.append(tuple(run.run(step, UNUSED)[0]))
    assert len({x for returns in seen for x in returns}) == 9
    assert seen[0] == seen[3]


def test_stochastic_evaluation_draws_and_deterministic_does_not():
    for deterministic in (True, False):
        drawn = []

        def policy(_obs, z, drawn=drawn):
            drawn.append(z.clone())
            return z.clamp(-1, 1)

        run = evaluator(policy, eval_episodes=2, deterministic_eval=deterministic)
        returns = [run.run(0, UNUSED)[0] for _ in range(2)]
        assert returns[0] == returns[1]
        std = torch.stack(drawn).std().item()
        assert std == 0 if deterministic else 0.9 < std < 1.1


def test_evaluation_is_gymnasiums_own_loop():
    """Each episode is that of one environment alone, whatever the other rows do meanwhile."""
    run = evaluator(
        lambda obs, _z: torch.tanh(obs[:, :3]), "Hopper-v4", eval_episodes=3
    )
    returns, lengths = run.run(7, UNUSED)
    assert len(set(lengths)) > 1
    for i in range(3):
        env = make_env("Hopper-v4")
        obs, _ = env.reset(seed=derive_seed(run.args.seed, 1, 7, i))
        total, length, done = 0.0, 0, False
        while not done:
            action = torch.tanh(torch.from_numpy(obs[:3].astype(np.float32))).numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, done = total + reward, length + 1, terminated or truncated
        assert (total, length) == (returns[i], lengths[i])


def test_numbers_that_are_not_finite_stop_an_evaluation():
    with pytest.raises(RunError, match=r"Pendulum-v1: action\[1, 0\] = nan at step 5"):
        evaluator(lambda _o, z: z + torch.tensor([[0], [np.nan]]), eval_episodes=2).run(
            5, UNUSED
        )
    run = evaluator(lambda _obs, z: z, "scripted_env:InfReward-v0", eval_episodes=2)
    run.envs.envs.envs[1].unwrapped.at = 3
    with pytest.raises(RunError, match=r"reward\[1\] = inf at step 5"):
        run.run(5, UNUSED)
