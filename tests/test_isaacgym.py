"""MEow and SAC on many environments: replay, normalisation and whole runs.

Flow, target, loss and update are copies of the MuJoCo scripts' (test_parity.py), tested there.
"""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ISAAC_SCRIPTS, ROOT
from test_run import (
    environment,
    is_one_sentence,
    metrics,
    only_run,
    renders,
    run,
    shows_the_robot,
    wait_for,
)

import meow_isaacgym as meow
from meow_isaacgym import ObservationNorm, ReplayBuffer

QUICK = {
    "--env-id": "Ant", "--num-envs": "4", "--total-timesteps": "130", "--learning-starts": "20",
    "--batch-size": "16", "--eval-frequency": "80", "--eval-episodes": "2",
    "--log-frequency": "10", "--checkpoint-frequency": "50",
}  # fmt: skip


def command(*flags, script=ISAAC_SCRIPTS[0], **options):
    """The command line of a quick run; keyword a_b replaces option --a-b."""
    merged = QUICK | {f"--{k.replace('_', '-')}": str(v) for k, v in options.items()}
    words = [word for pair in merged.items() for word in pair]
    return [sys.executable, str(script), *words, "--no-compile", *flags]


# --- Replay buffer --------------------------------------------------------------------------------
class Counter:
    """N environments whose observation names environment, episode and step; max_steps = 5."""

    max_steps = 5

    def __init__(self, n, seed=0, late=False):
        self.n, self.rng, self.late = n, np.random.default_rng(seed), late
        self.episode, self.step_in_episode = np.zeros(n, int), np.zeros(n, int)
        self.clock, self.dead = 0, np.zeros(n, bool)

    def obs(self):
        columns = (np.arange(self.n), self.episode, self.step_in_episode)
        return torch.tensor(np.stack(columns, -1), dtype=torch.float32)

    def step(self):
        """action, reward, terminated, truncated, final_obs, obs, valid of one vector step."""
        before, self.clock = self.obs(), self.clock + 1
        action = torch.full((self.n, 2), float(self.clock))
        valid = torch.from_numpy(~self.dead)
        self.step_in_episode[~self.dead] += 1
        self._start(self.dead)  # late resets: the row goes from a dead state to a new episode
        failed = ~self.dead & (self.rng.random(self.n) < 0.15)
        timed_out = ~self.dead & ~failed & (self.step_in_episode == self.max_steps)
        final_obs, done = self.obs(), failed | timed_out
        self.dead = done if self.late else self.dead
        self._start(done & ~self.dead)
        reward = before[:, 2] + 100 * before[:, 0]
        flags = torch.from_numpy(failed), torch.from_numpy(timed_out)
        return action, reward, *flags, final_obs, self.obs(), valid

    def _start(self, mask):
        self.episode[mask] += 1
        self.step_in_episode[mask] = 0


def filled(capacity, steps, late=False, n=3):
    """A replay buffer after some vector steps, and the last `capacity` of them as rows."""
    env = Counter(n, late=late)
    replay = ReplayBuffer(capacity, n, 3, 2, env.max_steps)
    replay.start(env.obs())
    rows = []
    for _ in range(steps):
        obs = env.obs()
        *step, valid = env.step()
        replay.add(*step, valid if late else None)
        action, reward, terminated, _, final_obs, _ = step
        columns = (obs, action, final_obs, reward[:, None], terminated.float()[:, None])
        rows.append(torch.cat(columns, -1)[valid])
    return replay, torch.cat(rows[-capacity:])


def gathered(replay, n):
    places = replay.draw(np.random.default_rng(1), n)
    out = torch.empty(n, sum(replay.splits))
    replay.gather(torch.from_numpy(places), out)
    return out


@pytest.mark.parametrize("late", [False, True], ids=["same-step", "late"])
@pytest.mark.parametrize(("capacity", "steps"), [(50, 7), (50, 50), (17, 200), (4, 9), (1, 5)])
def test_replay_returns_the_last_transitions_and_nothing_else(capacity, steps, late):
    """Exactly the stored rows, through time-outs, terminations and the ring's end; next_obs is the
    final observation wherever the target looks at it. Late resets' rows are never drawn."""
    replay, rows = filled(capacity, steps, late)
    if not len(rows):
        pytest.skip("the one step kept was a late reset everywhere")
    drawn = gathered(replay, 200 * len(rows))
    for table in (drawn, rows):
        table[table[:, -1] == 1, 5:8] = 0  # terminated: next_obs has no meaning
    assert torch.equal(drawn.unique(dim=0), rows.unique(dim=0))
    assert len(rows.unique(dim=0)) == len(rows)


def test_replay_draws_uniformly():
    replay, rows = filled(capacity=20, steps=50)
    drawn = gathered(replay, 200 * len(rows))
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert counts.sum() == 200 * len(rows)
    assert (counts.double() - 200).abs().max() < 6 * math.sqrt(200)


def test_replay_holds_each_observation_once():
    replay = ReplayBuffer(15_000, 128, 60, 8, max_steps=999)
    floats = sum(t.numel() for t in vars(replay).values() if isinstance(t, torch.Tensor))
    assert floats < 1.05 * 15_000 * 128 * (60 + 8 + 3)
    assert replay.obs.shape == (15_001, 128, 60)


def test_replay_survives_a_checkpoint_and_forgets_an_outcome_after_a_reset():
    replay, _ = filled(capacity=20, steps=50)
    copy = ReplayBuffer(20, 3, 3, 2, max_steps=5)
    copy.load_state_dict(replay.state_dict())
    assert torch.equal(gathered(copy, 500), gathered(replay, 500))
    last = replay.obs[replay.added % 21]
    copy.start(last)  # as before: nothing is lost
    assert torch.equal(gathered(copy, 500), gathered(replay, 500))
    copy.start(last + 1)
    kept = gathered(copy, 5_000).unique(dim=0)
    assert len(kept) == len(gathered(replay, 5_000).unique(dim=0)) - 3


def test_replay_that_does_not_fit_is_refused():
    with pytest.raises(meow.UsageError, match="--buffer-size 1000000: the replay buffer needs"):
        ReplayBuffer(1_000_000, 1_000_000, 60, 8, max_steps=999)


# --- Observation normalisation --------------------------------------------------------------------
def test_norm_is_that_of_all_observations_together():
    torch.manual_seed(0)
    batches = [3 * torch.randn(n, 4) + torch.tensor([0.0, 1e4, -5.0, 2.0]) for n in (1, 7, 128)]
    batches[1][:, 2] = -5.0
    norm = ObservationNorm(4)
    for batch in batches:
        norm.update(batch)
    together = torch.cat(batches).double()
    assert norm.count.item() == 136
    assert torch.allclose(norm.mean, together.mean(0), rtol=1e-12)
    assert torch.allclose(norm.var, together.var(0, correction=0), rtol=1e-9)
    scaled = norm(batches[2])
    expected = (together[8:] - together.mean(0)) / together.std(0, correction=0)
    assert torch.allclose(scaled.double(), expected.clamp(-5, 5), atol=1e-5)
    assert norm(torch.full((1, 4), 1e6)).tolist() == [[5.0] * 4]


def test_updates_see_normalised_observations_and_acting_too():
    """One batch of a learner by hand; rewards, actions and flags stay as they are."""
    replay, _ = filled(capacity=20, steps=50)
    norm = ObservationNorm(3)
    norm.update(replay.obs.flatten(0, 1))
    args = meow.Args(batch_size=8, dropout=0.0)
    flow = meow.make_flow(args, 3, 2)
    for p in flow.parameters():
        p += 0.1 * torch.randn_like(p)
    learner = meow.Learner(flow, replay, norm, args, compiled=False)
    learner.update(np.random.default_rng(1))
    raw = gathered(replay, 8)
    expected = raw.clone()
    expected[:, :3], expected[:, 5:8] = norm(raw[:, :3]), norm(raw[:, 5:8])
    assert torch.equal(learner.batch, expected)
    assert not torch.equal(learner.batch, raw)
    obs, z = 10 * torch.randn(5, 3), torch.randn(5, 2)
    action = learner.make_actor(5)(obs, z)
    assert torch.allclose(action, flow.to_action(norm(obs), z)[0], atol=1e-6)


# --- Whole runs -----------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=ISAAC_SCRIPTS, ids=lambda path: path.stem)
def finished(request, tmp_path_factory):
    """A script and the folder of an uninterrupted quick run of it."""
    cwd = tmp_path_factory.mktemp(request.param.stem)
    result = run(command(script=request.param), cwd)
    assert result.returncode == 0, result.stderr
    return request.param, only_run(cwd), result


def rows(folder):
    return [row for row in metrics(folder) if row[1] != "charts/env_SPS"]


def test_files_of_a_run(finished):
    script, folder, result = finished
    files = {"args.json", "metrics.csv", "checkpoint.pt", "policy_best.pt", "policy_final.pt"}
    assert {f.name for f in folder.iterdir()} == files
    assert folder.name.startswith(f"Ant__{script.stem}__1__")
    evaluated = [step for step, name, _ in metrics(folder) if name == "eval/return_mean"]
    assert evaluated == ["80", "130"]
    assert "step 130/130, ETA 00:00" in result.stderr
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["norm"]["count"].item() == 4 * 131  # the first observations and one a step
    assert saved["replay"]["added"] == 130


def test_killed_and_resumed_run_is_the_uninterrupted_one(finished, tmp_path):
    """SIGKILL in the middle of episodes, then --resume with another number of threads."""
    script, folder, _ = finished
    words = command(script=script)
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    time.sleep(0.3)
    process.kill()
    process.wait()
    saved = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["step"] in (50, 100)
    resume = [sys.executable, str(script), "--resume", str(only_run(tmp_path))]
    result = run([*resume, "--sim-threads", "2"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows(only_run(tmp_path)) == rows(folder)


def test_evaluation_repeats_the_runs_last_one(finished, tmp_path):
    script, folder, _ = finished
    result = run([sys.executable, str(script), "--evaluate", str(folder)], tmp_path)
    assert result.returncode == 0, result.stderr
    printed = [float(x.split("return ")[1].split(",")[0]) for x in result.stdout.splitlines()[:2]]
    last = [v for s, n, v in metrics(folder) if s == "130" and n.startswith("eval/return_")]
    assert printed == pytest.approx(list(map(float, last[2:])), abs=0.02, rel=1e-3)
    words = [sys.executable, str(script), "--evaluate", str(folder), "--no-deterministic-eval"]
    assert "2 stochastic episodes" in run(words, tmp_path).stdout


@renders
@pytest.mark.parametrize("finished", ISAAC_SCRIPTS[:1], indirect=True)
def test_video_shows_the_robot(finished, tmp_path):
    script, folder, _ = finished
    words = [sys.executable, str(script), "--evaluate", str(folder), "--capture-video"]
    shows_the_robot(run(words, tmp_path), folder)


def test_bad_input_is_one_sentence(finished, tmp_path):
    script, folder, _ = finished
    (other,) = set(ISAAC_SCRIPTS) - {script}
    foreign = run([sys.executable, str(other), "--resume", str(folder)], tmp_path)
    is_one_sentence(foreign, 1, f"was not written by this script ({other.stem}/1)")
    for options, code, needle in (
        (dict(env_id="Bee"), 2, "--env-id Bee"),
        (dict(env_id="Isaac-Ant-Direct-v0"), 2, "isaaclab_tasks is not installed"),
        (dict(simulator="isaacgym"), 2, "isaacgymenvs is not installed"),
        (dict(num_envs=10**10), 2, "10000000000 environments on 1 thread(s) don't fit into memory"),
        (
            dict(buffer_size=10**9, total_timesteps=10**9),
            2,
            "--buffer-size 1000000000: the replay buffer needs",
        ),
    ):
        is_one_sentence(run(command(script=script, **options), tmp_path), code, needle)
    for name in ("num_envs", "updates_per_step", "sim_threads"):
        result = run(command(script=script, **{name: 0}), tmp_path)
        assert result.returncode == 2
        assert f"--{name.replace('_', '-')} 0: must be at least 1" in result.stderr
    rate = dict(learning_rate=1e30) if script.stem.startswith("meow") else dict(q_lr=1e30)
    is_one_sentence(run(command(script=script, **rate), tmp_path), 1, "is not finite")


def test_a_nan_from_an_environment_stops_the_run_and_names_it(tmp_path, monkeypatch):
    """World 2 of the physics is broken by hand before step 5."""
    monkeypatch.chdir(tmp_path)
    args = meow.Args(num_envs=4, total_timesteps=20, learning_starts=10, compile=False)
    step = meow.TrainingEnvs.step

    def broken(self, action, number):
        if number == 5:
            self.simulator.physics.qpos[2, 0] = math.nan
        return step(self, action, number)

    monkeypatch.setattr(meow.TrainingEnvs, "step", broken)
    with pytest.raises(meow.RunError, match=r"environment 2 of 4 of Ant .* = nan.* at step 5"):
        meow.train(args)


# --- NVIDIA's simulators, played by the stand-ins of tests/stand_ins ------------------------------
def with_stand_ins():
    """PYTHONPATH with the stand-ins; isaacgym then refuses to be imported after torch."""
    path = f"{ROOT}/tests/stand_ins:{ROOT}/tests"
    return environment(PYTHONPATH=path, STRICT_IMPORT_ORDER="1")


@pytest.mark.parametrize("script", ISAAC_SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("simulator", "env_id", "max_steps"),
    [("isaacgym", "Ant", 6), ("isaacgym", "Ingenuity", 6), ("auto", "Isaac-Ant-Direct-v0", 7)],
)
def test_nvidias_simulators(simulator, env_id, max_steps, script, tmp_path):
    """Trains, resumes with new episodes and evaluates; no row that is drawn joins two episodes."""
    words = command(script=script, simulator=simulator, env_id=env_id, num_envs=5)
    first = run(words, tmp_path, with_stand_ins())
    assert first.returncode == 0, first.stderr
    assert "no evaluation while training" in first.stderr
    folder = only_run(tmp_path)
    names = {name for _, name, _ in metrics(folder)}
    assert "charts/episodic_return" in names
    assert "eval/return_mean" not in names
    resume = [sys.executable, str(script), "--resume", str(folder), "--total-timesteps", "160"]
    resumed = run(resume, tmp_path, with_stand_ins())
    assert resumed.returncode == 0, resumed.stderr
    assert "their episodes start anew" in resumed.stderr
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]
    obs_dim, width = state["obs"].shape[-1], state["rows"].shape[-1]
    replay = ReplayBuffer(160, 5, obs_dim, width - 3, max_steps)
    replay.load_state_dict(state)
    drawn = gathered(replay, 20_000)
    obs, _, next_obs, reward, terminated = drawn.split(replay.splits, -1)
    going_on = terminated[:, 0] == 0
    place, after = 64 * obs[going_on, :3], 64 * next_obs[going_on, :3]
    assert torch.equal(place + torch.tensor([0, 0, 1]), after)  # environment, episode, step
    assert (reward < 2).all()  # spurious rows pay 100
    evaluate = [sys.executable, str(script), "--evaluate", str(folder)]
    played = run(evaluate, tmp_path, with_stand_ins())
    assert "2 deterministic episodes" in played.stdout, played.stderr
