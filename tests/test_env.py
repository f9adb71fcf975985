"""Environments: which can be used, what they may return, going on, evaluating."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT

from harness import environments
from harness.environments import ReplayableEnv, full_id
from harness.errors import RunError, UsageError, UserCodeError
from meow_continuous_action import Args, episode_seed, evaluate, make_env

ZERO = np.zeros(1, np.float32)
BAD_SPACES = {
    "Actionless": "its action_space must be one of gymnasium.spaces",
    "ForeignObs": "its observation_space must be one of gymnasium.spaces",
    "DictObs": "observation must be one flat vector, .* --flatten makes it one",
    "ImageObs": "observation must be one flat vector, .* --flatten makes it one",
    "DiscreteObs": "observation must be one flat vector, .* --flatten makes it one",
    "SequenceObs": "observation must be one flat vector, not Sequence[^;]*$",
    "Unbounded": "must be bounded",
    "HalfBounded": "must be bounded",
    "EmptyRange": "must be bounded",
    "TooWide": "wider than its numbers can tell",
    "IntegerBox": "must be continuous",
    "MultiDiscrete": "must be continuous",
    "MatrixAction": "one flat vector",
}


def scripted(name, **settings):
    return make_env(Args(env_id=f"scripted_env:{name}-v0", **settings))


def made(env_id, **settings):
    return make_env(Args(env_id=env_id, **settings))


@contextlib.contextmanager
def closed_once():
    """An environment that can't be used is closed, or its processes would live on."""
    with mock.patch("scripted_env.OneState.close") as close:
        yield
    close.assert_called_once_with()


# --- Which can be used ----------------------------------------------------------------
@pytest.mark.parametrize(("name", "message"), BAD_SPACES.items())
def test_unsuitable_spaces_are_refused(name, message):
    refused = f"--env-id scripted_env:{name}-v0: .*{message}"
    with closed_once(), pytest.raises(UsageError, match=refused):
        scripted(name)


def test_a_space_that_can_not_be_flattened_is_refused():
    with closed_once(), pytest.raises(UsageError, match="--flatten can't make"):
        scripted("OwnObs", flatten=True)


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
        made(env_id)
    assert "\n" not in str(refused.value)


def test_an_id_without_its_module_gets_a_hint():
    for env_id in ("MyEnv-v0", "package/MyEnv-v0"):
        with pytest.raises(UsageError, match=f"--env-id my_module:{env_id}"):
            made(env_id)


def test_an_id_without_version_is_the_newest_one():
    assert full_id("HalfCheetah") == "HalfCheetah-v5"
    assert full_id("scripted_env:OneState") == "scripted_env:OneState-v0"
    for env_id in ("HalfCheetah-v4", "Nope", "nomodule:X", ""):
        assert full_id(env_id) == env_id


@pytest.mark.parametrize("name", ["Plain", "Function"])
def test_an_environment_without_render_mode_is_used_but_not_filmed(name):
    """Its constructor has no such argument; gym.make(id) works, so training does."""
    assert scripted(name).reset(seed=0)[0].shape == (1,)
    args = Args(env_id=f"scripted_env:{name}-v0", capture_video=True)
    with pytest.raises(UsageError, match="leave out --capture-video"):
        make_env(args, render=True)


def test_an_environment_that_can_not_render_is_refused():
    args = Args(env_id="scripted_env:OneState-v0")
    refused = pytest.raises(UsageError, match="leave out --capture-video")
    with closed_once(), refused:
        make_env(args, render=True)


def test_a_module_in_this_folder_is_found(tmp_path, monkeypatch):
    """`my_env:My-v0` may lie where the user is, which isn't where the script is."""
    source = "import gymnasium, scripted_env\n"
    source += "gymnasium.register('My-v0', scripted_env.OneState)\n"
    (tmp_path / "my_env.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with mock.patch("sys.path", ["", str(Path(__file__).parent)]):
        assert made("my_env:My-v0").action_space.shape == (1,)


def test_a_module_that_fails_keeps_its_error(tmp_path, monkeypatch):
    """Not "there is no module": what it imports is missing, or it has a mistake."""
    for name, line in (("one", "import not_there"), ("two", "1 / 0")):
        (tmp_path / f"failing_{name}.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, kind in (("one", ModuleNotFoundError), ("two", ZeroDivisionError)):
        with pytest.raises(UserCodeError, match=f"importing failing_{name} f") as error:
            made(f"failing_{name}:X-v0")
        assert isinstance(error.value.__cause__, kind)


def test_constructor_arguments():
    env = scripted("Scaled", env_kwargs='{"scale": 3.5}')
    env.reset(seed=0)
    assert env.step(np.zeros(1, np.float32))[1] == 3.5
    with pytest.raises(UsageError, match=r"scala.*see --env-kwargs"):
        scripted("Scaled", env_kwargs='{"scala": 3.5}')
    for text in ("3", "{", "[1]", "", "{'a': 1}"):
        with pytest.raises(ValueError, match="must be a JSON object"):
            Args(env_kwargs=text)


def test_a_constructor_that_fails_keeps_its_error():
    with pytest.raises(UserCodeError, match="can't make this environment") as error:
        scripted("Scaled", env_kwargs='{"scale": "a"}')
    assert isinstance(error.value.__cause__, ValueError)
    silent = mock.patch("scripted_env.Scaled.__init__", side_effect=AssertionError)
    with silent, pytest.raises(UserCodeError, match="environment: AssertionError"):
        scripted("Scaled")


@pytest.mark.parametrize(("name", "size"), [("DictObs", 2), ("ImageObs", 192)])
def test_flatten_makes_a_vector(name, size):
    with mock.patch("scripted_env.Spaces.natural", True):
        env = scripted(name, flatten=True)
        obs, _ = env.reset(seed=0)
        assert obs.shape == (size,)
        assert obs.dtype == np.float32
        assert env.step(np.zeros(2, np.float32))[0].shape == (size,)


@pytest.mark.parametrize(
    ("env_id", "bounds"),
    [
        ("scripted_env:Scripted-v0", [[-0.4, 2], [0.4, 3]]),
        ("Humanoid-v4", [[-0.4] * 17, [0.4] * 17]),
    ],
)
def test_actions_are_rescaled(env_id, bounds):
    """-1 and 1 are the environment's own bounds."""
    env = made(env_id)
    low, high = np.float32(bounds)
    inner = env.unwrapped
    with mock.patch.object(inner, "step", wraps=inner.step) as step:
        env.reset(seed=0)
        for action in (-1, 0, 1):
            env.step(np.full(len(low), action, np.float32))
    received = [call.args[0] for call in step.call_args_list]
    np.testing.assert_allclose(received, [low, (low + high) / 2, high], rtol=1e-6)


@pytest.mark.parametrize("name", ["OneState", "Float64"])
def test_actions_of_both_precisions_are_rescaled_silently(name, recwarn):
    space = scripted(name).action_space
    assert (space.low == -1).all()
    assert (space.high == 1).all()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 1000), ({"max_episode_steps": 7}, 7)],
)
def test_episodes_have_a_time_limit(settings, length):
    """The environment's own, or that of the command line."""
    env = made("HalfCheetah-v4", **settings)
    env.reset(seed=0)
    for step in range(length):
        *_, terminated, truncated, info = env.step(np.zeros(6, np.float32))
        assert not terminated
        assert truncated == (step == length - 1)
    assert info["episode"]["l"] == length


def test_an_environment_without_a_limit_gets_one():
    """100,000 steps, as the page about a task of one's own says."""
    env = scripted("Endless")
    env.reset(seed=0)
    env.env.env._elapsed_steps = 99_998  # as if so many had been taken
    assert [env.step(ZERO)[3] for _ in range(2)] == [False, True]


# --- What they may return -------------------------------------------------------------
BAD_RESULTS = {
    "reward=None": "its reward must be one number, not None",
    "reward=[1.0, 2.0]": r"its reward must be one number, not \[1.0, 2.0\] \(list\)",
    "reward='big'": "its reward must be one number, not 'big'",
    "reward=float('inf')": "reward = inf",
    "reward=1e39": r"reward = 1e\+39 .*not a finite 32-bit number",
    "terminated=None": "its terminated must be one number, not None",
    "info=['text']": r"its info must be a dict, not \['text'\] \(list\)",
    "obs=None": "an observation",
    "obs='text'": "an observation that is no vector",
    "obs=[1.0, 2.0]": r"an observation of shape \(2,\)",
    "obs=[float('nan')]": r"observation\[0\] = nan",
}


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS.items())
def test_bad_results_are_named(change, message):
    """With environment and step."""
    env = scripted("Returning", env_kwargs=f'{{"change": "{change}"}}')
    env.reset(seed=0)
    for _ in range(3):
        env.step(ZERO)
    with pytest.raises(RunError, match=rf"scripted_env:Returning-v0: .*{message}") as e:
        env.step(ZERO)
    assert "at step 3" in str(e.value)


GOOD_RESULTS = {
    "reward=np.array([2.0])": 2.0,
    "reward=np.float32(2)": 2.0,
    "reward=np.array(2)": 2.0,
    "reward=True": 1.0,
    "reward=torch.tensor([2.0])": 2.0,
    "info=None": 1.0,
    "terminated=np.array([False])": 1.0,
    "truncated=np.bool_(False)": 1.0,
    "obs=[0.25]": 1.0,
}


@pytest.mark.parametrize(("change", "reward"), GOOD_RESULTS.items())
def test_odd_results_are_taken(change, reward):
    """The same in training and in evaluation, which use the same environments."""
    env = scripted("Returning", env_kwargs=f'{{"change": "{change}"}}')
    env.reset(seed=0)
    for _ in range(4):
        obs, got, terminated, truncated, info = env.step(ZERO)
    assert (got, terminated, truncated) == (reward, False, False)
    assert obs.dtype == np.float32
    assert isinstance(info, dict)


def play_from_the_start(name, **settings):
    env = scripted(name, **settings)
    env.reset(seed=0)
    env.step(ZERO)
    env.step(ZERO)
    env.close()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("OldStep", RunError, "its step must return .*, not 4 values, at step 0"),
        ("OldReset", RunError, "its reset must return .observation, info., not"),
        ("Seedless", UsageError, "its reset takes no `options`"),
    ],
)
def test_the_old_api_is_named(name, error, message):
    with pytest.raises(error, match=message):
        play_from_the_start(name)


@pytest.mark.parametrize("method", ["reset", "step", "close"])
def test_an_error_of_the_environment_keeps_its_traceback(method):
    """Whatever it is called: a ConnectionResetError or "CUDA error" is none of ours."""
    kwargs = f'{{"method": "{method}"}}'
    message = f"its {method} raised ConnectionResetError at step"
    with pytest.raises(UserCodeError, match=message) as error:
        play_from_the_start("Raising", env_kwargs=kwargs)
    assert isinstance(error.value.__cause__, ConnectionResetError)


def test_numbers_that_are_not_finite_stop_training():
    """Where and when is said: an action, an observation, a reward."""
    cases = [("NanObs", r"observation\[0\] = nan"), ("InfReward", "reward = inf")]
    for name, needle in cases:
        env = scripted(name)
        env.reset(seed=0)
        for _ in range(4):
            env.reset(seed=0)
            for _ in range(5):
                env.step(ZERO)
        env.reset(seed=0)
        for _ in range(4):
            env.step(ZERO)
        place = f"scripted_env:{name}-v0"
        with pytest.raises(RunError, match=rf"{place}: {needle} at step 24"):
            env.step(ZERO)
    with pytest.raises(RunError, match=r"action\[0\] = nan at step 24"):
        env.step(np.full(1, np.nan, np.float32))


def test_mujocos_warnings_are_shown_once():
    """Not once for each of the environments of training and evaluation."""
    code = "from meow_continuous_action import Args, make_env\n"
    code += "[make_env(Args(env_id='HalfCheetah-v4')) for _ in range(3)]"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("Warning") == done.stderr.count("'settotalmass'") == 1


# --- Going on -------------------------------------------------------------------------
def play(env, actions, seed, done=True):
    """Rows of what the loop of a script sees."""
    rows = []
    for action in actions:
        if done:
            key = episode_seed(seed, 0, env.episode_count)
            rows.append(tuple(env.reset(seed=key)[0]))
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        rows.append((*obs, reward, done, *info.get("episode", {}).values()))
    return rows


@pytest.mark.parametrize("steps", [137, 1, 400])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1", "HalfCheetah-v5"])
def test_an_environment_goes_on_exactly(env_id, steps, capsys):
    """In the middle of an episode: the same rows and episodes, bit for bit."""
    env, other = made(env_id), made(env_id)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (650, *env.action_space.shape)).astype(np.float32)
    play(env, actions[:steps], seed=3)
    within = bool(env.current.actions)
    other.load_state_dict(env.state_dict())
    rest = play(env, actions[steps:], seed=3, done=not within)
    gone_on = play(other, actions[steps:], seed=3)
    assert gone_on[int(within) :] == rest
    assert (other.episode_count, other.steps) == (env.episode_count, env.steps)
    assert "warning" not in capsys.readouterr().err


def test_an_episode_that_has_ended_goes_on_with_the_next(capsys):
    """A checkpoint between two episodes."""
    env, other = scripted("Scripted"), scripted("Scripted")
    actions = np.zeros((12, 2), np.float32)
    play(env, actions[:3], seed=1)
    assert env.episode_count == 1
    other.load_state_dict(env.state_dict())
    assert play(other, actions, seed=1) == play(env, actions, seed=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["Drifting", "Leaking", "LeakingReset", "LeakingReward"]
)
@pytest.mark.parametrize("steps", [10, 12])
def test_an_environment_that_does_not_replay_is_announced(name, steps, capsys):
    """Random, or with a memory over reset(seed): also where no episode is under way."""
    env, other = scripted(name), scripted(name)
    actions = np.zeros((steps, 1), np.float32)
    play(env, actions, seed=1)
    other.load_state_dict(env.state_dict())
    play(other, actions[:1], seed=1)
    warning = f"warning: scripted_env:{name}-v0 did not replay its episode exactly"
    assert warning in capsys.readouterr().err
    assert other.episode_count == env.episode_count
    assert other.steps == steps + 1


def test_each_episode_and_seed_starts_differently():
    starts = []
    for seed in (0, 1, 2**32 - 1):
        env = made("Pendulum-v1")
        for episode in range(2):
            starts.append(tuple(env.reset(seed=episode_seed(seed, 0, episode))[0]))
    assert len(set(starts)) == 6


def test_seeds_fit_into_32_bits_with_a_sign():
    """Some environments store them so; those that always did are as they were."""
    keys = [(run, 0, episode) for run in (0, 1, 2**32 - 1) for episode in range(50)]
    drawn = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys]
    seeds = [episode_seed(*key) for key in keys]
    assert max(drawn) >= 2**31 > max(seeds)
    assert len(set(seeds)) == len(seeds)
    assert all(s == d for s, d in zip(seeds, drawn, strict=True) if d < 2**31)


# --- Evaluation -----------------------------------------------------------------------
class Silent:
    """A session in which nothing is shown."""

    @contextlib.contextmanager
    def evaluation(self, fps):
        assert fps > 0
        yield self

    def step(self, text):
        assert re.match("evaluation: ", text)

    def film(self, env):
        """Nothing to film."""


def evaluated(policy, step=0, env_id="Pendulum-v1", envs=None, **settings):
    args = Args(env_id=env_id, **settings)
    count = min(args.eval_envs, args.eval_episodes)
    envs = envs or [make_env(args) for _ in range(count)]
    return evaluate(args, envs, policy, step, Silent())


def noise(_obs, z):
    return z.clip(-1, 1)


def test_evaluation_seeds_are_fresh_and_repeatable():
    """Other steps and seeds give other episodes; the same ones give the same
    returns.
    """
    seen = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        settings = dict(seed=seed, eval_episodes=3)
        envs = [made("Pendulum-v1") for _ in range(3)]
        evaluated(noise, 9, envs=envs, **settings)  # played before: no difference
        seen.append(tuple(evaluated(noise, step, envs=envs, **settings)[0]))
    assert len({x for returns in seen for x in returns}) == 9
    assert seen[0] == seen[3]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("eval_envs", [1, 2, 3])
def test_fewer_environments_give_the_same_returns(deterministic, eval_envs):
    """Episode i is row i of the policy's inputs, whenever it is played."""
    weights = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)

    def policy(obs, z):
        assert obs.shape == (5, 11)
        return np.tanh(obs @ weights + z)

    settings = dict(eval_episodes=5, deterministic_eval=deterministic)
    expected = evaluated(policy, 7, "Hopper-v4", **settings)
    assert len(set(expected[1])) > 1
    fewer = evaluated(policy, 7, "Hopper-v4", eval_envs=eval_envs, **settings)
    assert fewer == expected


def test_stochastic_evaluation_draws_and_deterministic_does_not():
    for deterministic in (True, False):
        drawn = []

        def policy(_obs, z, drawn=drawn):
            drawn.append(z.copy())
            return z.clip(-1, 1)

        settings = dict(eval_episodes=2, deterministic_eval=deterministic)
        returns = [evaluated(policy, **settings)[0] for _ in range(2)]
        assert returns[0] == returns[1]
        std = np.std(drawn)
        assert std == 0 if deterministic else 0.9 < std < 1.1


def test_evaluation_is_gymnasiums_own_loop():
    """Each episode is that of one environment alone, whatever the other rows do."""

    def policy(obs, _z):
        return np.tanh(obs[:, :3])

    settings = dict(eval_episodes=3)
    returns, lengths = evaluated(policy, 7, "Hopper-v4", **settings)
    assert len(set(lengths)) > 1
    for i in range(3):
        env = gym.make("Hopper-v4")
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        obs, _ = env.reset(seed=episode_seed(1, 1, 7, i))
        total, length, done = 0.0, 0, False
        while not done:
            action = np.tanh(obs[:3].astype(np.float32))
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, done = total + reward, length + 1, terminated or truncated
        assert (total, length) == (returns[i], lengths[i])


def test_no_episodes_are_no_evaluation():
    assert evaluated(noise, eval_episodes=0) == ([], [])


def test_numbers_that_are_not_finite_stop_an_evaluation():
    bad = np.float32([[0], [np.nan]])
    with pytest.raises(RunError, match=r"Pendulum-v1: action\[0\] = nan at step 0"):
        evaluated(lambda _obs, z: z + bad, eval_episodes=2)
    envs = [scripted("InfReward")]
    for _ in range(4):
        evaluated(noise, eval_episodes=1, envs=envs)
    with pytest.raises(RunError, match=r"InfReward-v0: reward = inf at step 24"):
        evaluated(noise, eval_episodes=1, envs=envs)


def test_the_wrapper_is_the_only_one_of_ours():
    """Between Gymnasium's own wrappers: checks inside, replaying outside."""
    env, found = made("Hopper-v4"), []
    while isinstance(env, gym.Wrapper):
        found.append(type(env))
        env = env.env
    wrappers = gym.wrappers
    ours = [ReplayableEnv, wrappers.RescaleAction, wrappers.TimeLimit]
    assert found[:4] == [*ours, environments.CheckedEnv]
