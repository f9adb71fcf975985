"""Environment, replay buffer and the transitions that training stores."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import meow_continuous_action as meow
from meow_continuous_action import Args, ReplayBuffer, TrainingEnv, UsageError, make_env

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


@pytest.mark.parametrize(("name", "message"), BAD_SPACES.items())
def test_unsuitable_spaces_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        make_env(f"scripted_env:{name}-v0")


@pytest.mark.parametrize(
    "env_id", ["Nope-v4", "Hopper-v99", "nomodule:X-v0", "CartPole-v1", "a b", ""]
)
def test_unusable_ids_are_refused(env_id):
    with pytest.raises(UsageError, match="--env-id"):
        make_env(env_id)


def test_actions_are_rescaled():
    """-1 and 1 are the environment's own bounds, Humanoid's +-0.4 among them."""
    env = make_env("scripted_env:Scripted-v0")
    env.reset(seed=0)
    for action in ([-1, -1], [0, 0], [1, 1]):
        env.step(np.float32(action))
    np.testing.assert_allclose(env.unwrapped.received, [[-0.4, 2], [0, 2.5], [0.4, 3]], rtol=1e-6)
    humanoid = make_env("Humanoid-v4")
    humanoid.reset(seed=0)
    humanoid.step(np.ones(17, np.float32))
    np.testing.assert_allclose(humanoid.unwrapped.data.ctrl, 0.4, rtol=1e-6)


def recorded_transitions(monkeypatch, tmp_path, env_id, steps, **settings):
    """Trains and returns the replay rows and metrics.csv."""
    made = []
    original = ReplayBuffer.__init__
    monkeypatch.setattr(
        ReplayBuffer,
        "__init__",
        lambda self, *a, **k: (made.append(self), original(self, *a, **k))[1],
    )
    defaults = dict(learning_starts=20, batch_size=8, eval_episodes=1, eval_frequency=10**6)
    args = Args(
        env_id=env_id,
        total_timesteps=steps,
        compile=False,
        runs_dir=str(tmp_path),
        **(defaults | settings),
    )
    result = meow.train(args)
    with open(f"{result['run_dir']}/metrics.csv") as f:
        return made[0], list(csv.DictReader(f))


def test_stored_transitions_and_episode_statistics(monkeypatch, tmp_path):
    """Every row, bootstrap flag and episodic return of 30 scripted steps."""
    replay, metrics = recorded_transitions(monkeypatch, tmp_path, "scripted_env:Scripted-v0", 30)
    obs, action, next_obs, reward, terminated = replay.rows.split(replay.splits, dim=-1)
    expected, statistics, episode, step = [], [], 1, 0
    while step < 30:
        kind = (episode - 1) % 3
        length = 3 + kind
        for t in range(1, length + 1):
            expected.append(
                [episode, t - 1, episode, t, 10 * episode + t, t == length and kind != 1]
            )
        step += length
        if step <= 30:
            statistics.append((step, 10 * episode * length + length * (length + 1) / 2, length))
        episode += 1
    stored = torch.cat([obs, next_obs, reward, terminated], dim=-1)
    torch.testing.assert_close(stored, torch.tensor(expected[:30], dtype=torch.float32))
    assert (action.abs() <= 1).all()
    returns = [
        (int(r["step"]), float(r["value"]))
        for r in metrics
        if r["name"].endswith("episodic_return")
    ]
    lengths = [
        (int(r["step"]), float(r["value"]))
        for r in metrics
        if r["name"].endswith("episodic_length")
    ]
    assert returns == [(s, r) for s, r, _ in statistics]
    assert lengths == [(s, n) for s, _, n in statistics]


@pytest.mark.parametrize(
    ("name", "value"), [("OneState", 10.0), ("OneStateTerminating", 4.0951 / 2)]
)
def test_time_outs_bootstrap_and_terminations_do_not(monkeypatch, tmp_path, name, value):
    """gamma = 0.9, reward 1, hardly any entropy: V = 10 through time-outs, far less if they end."""
    settings = dict(gamma=0.9, alpha=1e-3, tau=0.1, learning_rate=1e-2, reward_shifting="single")
    _, metrics = recorded_transitions(
        monkeypatch, tmp_path, f"scripted_env:{name}-v0", 2500, **settings
    )
    q = [float(r["value"]) for r in metrics if r["name"] == "flow/q"][-1]
    assert (q > 0.9 * value) if name == "OneState" else (q < 2 * value)


def test_replay_buffer_wraps_and_keeps_rows():
    replay = ReplayBuffer(5, 2, 1)
    assert len(replay) == 0
    for i in range(7):
        replay.add([i, i + 0.5], [-i], [i + 1, i + 1.5], 10.0 * i, i == 6)
    assert len(replay) == 5
    assert replay.rows.dtype == torch.float32
    assert sorted(replay.rows[:, 0].tolist()) == [2, 3, 4, 5, 6]
    assert replay.rows[1].tolist() == [6, 6.5, -6, 7, 7.5, 60, 1]


def test_replay_buffer_state_is_the_filled_part_and_fits_a_larger_one():
    replay, larger = ReplayBuffer(10, 2, 1), ReplayBuffer(1000, 2, 1)
    for i in range(4):
        replay.add([i, i], [i], [i, i], i, False)
    state = replay.state_dict()
    assert state["rows"].untyped_storage().nbytes() == 4 * 7 * 4
    larger.load_state_dict(state)
    assert torch.equal(larger.rows[:4], replay.rows[:4])
    larger.add([9, 9], [9], [9, 9], 9, True)
    assert larger.rows[4, 0] == 9


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1", "HalfCheetah-v5"])
def test_environment_state_is_restored_exactly(env_id):
    """A restored environment goes on with the same observations, rewards and ends, bit for bit."""
    env, other = TrainingEnv(env_id, 3), TrainingEnv(env_id, 3)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (400, env.act_dim)).astype(np.float32)
    env.reset(0)

    def play(env, actions):
        rows = []
        for action in actions:
            next_obs, reward, terminated, truncated = env.step(action, 0)
            rows.append(
                (*next_obs, reward, terminated, truncated, env.episode, env.episodic_return)
            )
            if terminated or truncated:
                env.reset(0)
        return rows

    play(env, actions[:137])
    other.load_state_dict(env.state_dict(), 0)
    assert play(other, actions[137:]) == play(env, actions[137:])


def test_evaluation_seeds_are_fresh_and_repeatable():
    """Other steps and seeds give other episodes; the same ones give the same returns."""
    seen = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        args = Args(env_id="Pendulum-v1", seed=seed, eval_episodes=3)
        evaluator = meow.Evaluator(args, lambda _obs, z: z)
        seen.append(tuple(evaluator.run(step, Path("unused"))[0]))
    assert len(set(seen)) == 3
    assert seen[0] == seen[3]
    assert len(set(seen[0])) == 3


def test_stochastic_evaluation_draws_latents_and_deterministic_does_not():
    for deterministic in (True, False):
        latents = []
        args = Args(env_id="Pendulum-v1", eval_episodes=2, deterministic_eval=deterministic)
        evaluator = meow.Evaluator(
            args, lambda _obs, z, latents=latents: latents.append(z.copy()) or z
        )
        evaluator.run(0, Path("unused"))
        std = np.std(latents)
        assert std == 0 if deterministic else 0.9 < std < 1.1


def test_evaluation_is_gymnasiums_own_loop():
    """Returns equal a plain loop over one environment at a time with the same seeds."""
    args = Args(env_id="Hopper-v4", eval_episodes=3)
    returns, lengths = meow.Evaluator(args, lambda obs, _z: np.tanh(obs[:, :3])).run(
        7, Path("unused")
    )
    for i in range(3):
        env = gym.make("Hopper-v4")
        obs, _ = env.reset(seed=meow.derive_seed(args.seed, 1, 7, i))
        total, length, done = 0.0, 0, False
        while not done:
            action = np.tanh(np.float32(obs)[:3])
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, done = total + reward, length + 1, terminated or truncated
        assert (total, length) == (pytest.approx(returns[i]), lengths[i])
