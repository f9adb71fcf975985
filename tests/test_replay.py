"""What training stores and draws again: the replay buffer and its transitions."""

import numpy as np
import pytest
import torch

from harness.errors import UsageError
from harness.machine import check_memory
from meow_continuous_action import Args, ReplayBuffer, make_env, split_batch


def numbered(i: int) -> tuple:
    """Transition i of S = 2, A = 1; every tenth is a termination."""
    return [i, i + 0.25], [-i], [i + 1, i + 1.25], 10.0 * i, i % 10 == 0


def filled(capacity: int, n: int, batch_size: int = 8) -> ReplayBuffer:
    replay = ReplayBuffer(capacity, 2, 1, batch_size, "cpu")
    for i in range(n):
        replay.add(*numbered(i))
    return replay


def flat(i: int) -> list[float]:
    obs, action, next_obs, reward, terminated = numbered(i)
    return [*obs, *action, *next_obs, reward, float(terminated)]


@pytest.mark.parametrize(("n", "kept"), [(0, []), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4])])
def test_rows_are_kept_in_float32(n, kept):
    replay = filled(5, n)
    assert len(replay) == n
    assert replay.rows.dtype == torch.float32
    assert replay.rows[:n].tolist() == [flat(i) for i in kept]


def test_the_oldest_rows_are_overwritten():
    replay = filled(5, 12)
    assert len(replay) == 5
    assert replay.rows.tolist() == [flat(i) for i in (10, 11, 7, 8, 9)]


@pytest.mark.parametrize("n", [4, 12])
def test_samples_are_whole_stored_transitions(n):
    """Each is drawn, all equally often, and next_obs is its own: not that of the row
    after it.
    """
    replay, rng, drawn = filled(5, n, batch_size=1000), np.random.default_rng(0), []
    stored = {float(i) for i in range(n)[-5:]}
    for _ in range(2):
        batch = replay.sample(rng)
        assert batch is replay.batch
        drawn.append(batch[:, 0].clone())
        for row in batch.unique(dim=0).tolist():
            assert row == flat(int(row[0]))
    assert (drawn[0] != drawn[1]).any()
    values, counts = torch.cat(drawn).unique(return_counts=True)
    assert set(values.tolist()) == stored
    assert counts.min() > 0.8 * 2000 / len(stored)


def test_split_batch_cuts_what_add_was_given():
    parts = split_batch(torch.tensor([flat(10), flat(3)]), 2, 1)
    assert [part.tolist() for part in parts] == [
        [[10, 10.25], [3, 3.25]],
        [[-10], [-3]],
        [[11, 11.25], [4, 4.25]],
        [100, 30],
        [1, 0],
    ]


@pytest.mark.parametrize("n", [4, 12])
def test_a_saved_buffer_goes_on_as_if_never_stopped(n):
    whole, restored = filled(10, n), ReplayBuffer(10, 2, 1, 8, "cpu")
    state = whole.state_dict()
    assert state["rows"].untyped_storage().nbytes() == 4 * 7 * min(
        n, 10
    )  # no empty rows
    restored.load_state_dict(state)
    for replay in (whole, restored):
        replay.add(*numbered(99))
    assert torch.equal(restored.rows[: len(whole)], whole.rows[: len(whole)])
    batches = [replay.sample(np.random.default_rng(1)) for replay in (whole, restored)]
    assert torch.equal(*batches)


def test_a_saved_buffer_fits_a_larger_one():
    larger = ReplayBuffer(1000, 2, 1, 8, "cpu")
    larger.load_state_dict(filled(10, 4).state_dict())
    larger.add(*numbered(7))
    assert larger.rows[:5].tolist() == [flat(i) for i in (0, 1, 2, 3, 7)]


def test_a_buffer_larger_than_the_memory_is_refused():
    with pytest.raises(UsageError, match=r"the buffer needs 1000000\.0 GB, more than"):
        check_memory("the buffer", 10**15, torch.device("cpu"))


def test_stored_transitions_are_the_environments_own():
    """Episodes end in turn by termination, time-out, both: only terminations are so.

    The next observation is the episode's true last one, not the next episode's first.
    """
    env = make_env(Args(env_id="scripted_env:Scripted-v0"))
    replay = ReplayBuffer(30, 2, 2, 8, "cpu")
    statistics, done = [], True
    for step in range(30):
        if done:
            obs, _ = env.reset(seed=step)
        action = np.float32([step / 30, -0.5])
        next_obs, reward, terminated, truncated, info = env.step(action)
        replay.add(obs, action, next_obs, reward, terminated)
        obs, done = next_obs, terminated or truncated
        if done:
            statistics.append((step + 1, info["episode"]["r"], info["episode"]["l"]))
    expected, ends = [], []
    for episode in range(1, 10):
        kind = (
            episode - 1
        ) % 3  # termination after 3 steps, time-out after 4, both after 5
        length = 3 + kind
        for t in range(1, length + 1):
            terminated = t == length and kind != 1
            expected.append([episode, t - 1, episode, t, 10 * episode + t, terminated])
        total = 10 * episode * length + length * (length + 1) / 2
        ends.append((len(expected), total, length))
    obs, action, next_obs, reward, terminated = split_batch(replay.rows, 2, 2)
    stored = torch.cat([obs, next_obs, reward[:, None], terminated[:, None]], -1)
    assert stored.tolist() == expected[:30]
    torch.testing.assert_close(action[:, 0], torch.arange(30) / 30)
    assert statistics == [end for end in ends if end[0] <= 30]
