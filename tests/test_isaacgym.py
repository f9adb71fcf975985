"""MEow and SAC on many environments: replay, normalisation, updates, evaluation, runs.

Flow, target, loss and update are copies of the MuJoCo scripts' (test_parity.py), tested
there. Runs here are quick ones on the CPU, most of them within the test's own process.
"""

import contextlib
import copy
import csv
import ctypes.util
import math
import os
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch
from conftest import ISAAC_SCRIPTS, ROOT
from stepped_run import SteppedRun, adam_steps, check_average
from test_isaac_simulators import HOW, stand_ins, timeline  # noqa: F401 (a fixture)

import meow_auto_isaacgym as auto
import meow_isaacgym as meow
import sac_isaacgym as sac
from harness.compiling import flatten_parameters
from harness.errors import UsageError
from harness.runs import main
from isaac_tasks import TASKS, SimulatorError, make_simulator
from isaac_tasks.ingenuity import Ingenuity
from isaac_tasks.mujoco_simulator import MujocoSimulator
from meow_isaacgym import EpisodeStatistics, RunningMeanStd, VectorReplayBuffer

ALL = [meow, auto, sac]
all_scripts = pytest.mark.parametrize("script", ALL, ids=lambda s: s.__name__)
QUICK = {
    "--env-id": "Ingenuity", "--num-envs": "4", "--total-timesteps": "60",
    "--learning-starts": "10", "--batch-size": "16", "--eval-frequency": "40",
    "--eval-episodes": "2", "--log-frequency": "5", "--checkpoint-frequency": "20",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    """Ingenuity's time-outs come after 24 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ingenuity, "episode_length", 25)
        yield


def quick(script=None, **options):
    """The words of a quick run; keyword a_b replaces option --a-b.

    script: its options that change training, those of `auto` alone.
    """
    if script is auto:
        options = dict(recent_size=10, policy_average=0.3) | options
    merged = QUICK | {f"--{k.replace('_', '-')}": str(v) for k, v in options.items()}
    return [*(word for pair in merged.items() for word in pair), "--no-compile"]


def command(script, words, folder):
    """The exit code of a command line, run in this process in a folder of its own."""
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        return main(
            script.Args, script.train, script.evaluate_saved, list(map(str, words))
        )


# --- Replay buffer --------------------------------------------------------------------
class Counter:
    """N environments; an observation names environment, episode and step."""

    max_steps = 5

    def __init__(self, n, seed=0, late=False):
        self.n, self.rng, self.late = n, np.random.default_rng(seed), late
        self.episode, self.step_in_episode = np.zeros(n, int), np.zeros(n, int)
        self.clock, self.dead = 0, np.zeros(n, bool)

    def obs(self):
        columns = (np.arange(self.n), self.episode, self.step_in_episode)
        return torch.tensor(np.stack(columns, -1), dtype=torch.float32)

    def step(self):
        """A vector step: as `VectorReplayBuffer.add` takes it."""
        before, self.clock = self.obs(), self.clock + 1
        action = torch.full((self.n, 2), float(self.clock))
        valid = torch.from_numpy(~self.dead)
        self.step_in_episode[~self.dead] += 1
        self._start(
            self.dead
        )  # late resets: the row goes from a dead state to a new episode
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
    """A replay buffer after vector steps, and the last `capacity` of them as rows."""
    env = Counter(n, late=late)
    replay = make_replay(capacity, n)
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


def make_replay(capacity, n=3):
    return VectorReplayBuffer(capacity, n, 3, 2, Counter.max_steps, batch_size=10_000)


def gathered(replay):
    """10,000 transitions (20,000 of `stored`)."""
    return replay.sample(np.random.default_rng(1)).clone()


@pytest.mark.parametrize("late", [False, True], ids=["same-step", "late"])
@pytest.mark.parametrize(
    ("capacity", "steps"), [(50, 7), (50, 50), (17, 200), (4, 9), (1, 5)]
)
def test_replay_returns_the_last_transitions_and_nothing_else(capacity, steps, late):
    """Exactly the stored rows, through time-outs, terminations and the ring's end.

    next_obs is the final observation wherever the target looks at it. Late resets' rows
    are never drawn.
    """
    replay, rows = filled(capacity, steps, late)
    if not len(rows):
        pytest.skip("the one step kept was a late reset everywhere")
    drawn = gathered(replay)
    for table in (drawn, rows):
        table[table[:, -1] == 1, 5:8] = 0  # terminated: next_obs has no meaning
    assert torch.equal(drawn.unique(dim=0), rows.unique(dim=0))
    assert len(rows.unique(dim=0)) == len(rows)


def test_replay_draws_uniformly():
    replay, rows = filled(capacity=20, steps=50)
    _, counts = gathered(replay).unique(dim=0, return_counts=True)
    mean = 10_000 / len(rows)
    assert len(counts) == len(rows)
    assert (counts.double() - mean).abs().max() < 6 * math.sqrt(mean)


@pytest.mark.parametrize(("steps", "recent"), [(15, 10), (50, 10), (8, 10), (50, 0)])
def test_half_of_a_batch_is_of_the_newest_vector_steps(steps, recent):
    """Each of them as often as it should be, late resets' rows never."""
    env, batch_size = Counter(3, late=True), 40_000
    sizes = 20, 3, 3, 2, Counter.max_steps, batch_size
    replay = auto.RecentVectorReplayBuffer(recent, *sizes)
    evenly = VectorReplayBuffer(*sizes)
    for buffer in (replay, evenly):
        buffer.start(env.obs())
    added = []
    for _ in range(steps):
        *step, valid = env.step()
        for buffer in (replay, evenly):
            buffer.add(*step, valid)
        added.append(valid)
    slots = {step % 21: i for i, step in enumerate(range(steps)[-20:])}
    if recent == 0:
        drawn = [b.draw(np.random.default_rng(0), batch_size) for b in (replay, evenly)]
        assert np.array_equal(*drawn)
        return
    slot, robot = np.divmod(replay.draw(np.random.default_rng(0), batch_size)[0], 3)
    place = np.array([slots[number] for number in slot]) * 3 + robot
    kept = torch.stack(added[-20:]).numpy().flatten()
    for half, among in (place[:20_000], recent), (place[20_000:], 20):
        valid = kept.copy()
        valid[: max(len(kept) - 3 * among, 0)] = False
        counts = np.bincount(half, minlength=len(kept))
        assert (counts[~valid] == 0).all()
        expected = 20_000 / valid.sum()
        assert np.abs(counts[valid] - expected).max() < 6 * expected**0.5


def test_replay_holds_each_observation_once():
    replay = VectorReplayBuffer(15_000, 128, 60, 8, max_steps=999, batch_size=1)
    floats = sum(
        t.numel() for t in vars(replay).values() if isinstance(t, torch.Tensor)
    )
    assert floats < 1.05 * 15_000 * 128 * (60 + 8 + 3)
    assert replay.obs.shape == (15_001, 128, 60)


def test_replay_survives_a_checkpoint_and_forgets_an_outcome_after_a_reset():
    replay, _ = filled(capacity=20, steps=50)
    copy = make_replay(20)
    copy.load_state_dict(replay.state_dict())
    assert torch.equal(gathered(copy), gathered(replay))
    last = replay.obs[replay.added % 21]
    assert torch.equal(copy.last_obs(), last)
    copy.start(last + 1)
    assert len(gathered(copy).unique(dim=0)) == len(gathered(replay).unique(dim=0)) - 3


def test_replay_that_does_not_fit_is_refused():
    with pytest.raises(
        UsageError, match="--buffer-size 1000000: the replay buffer needs"
    ):
        VectorReplayBuffer(1_000_000, 1_000_000, 60, 8, max_steps=999, batch_size=1)


# --- Observation normalisation --------------------------------------------------------
def test_norm_is_that_of_all_observations_together():
    torch.manual_seed(0)
    batches = [
        3 * torch.randn(n, 4) + torch.tensor([0.0, 1e4, -5.0, 2.0]) for n in (1, 7, 128)
    ]
    batches[1][:, 2] = -5.0
    norm = RunningMeanStd(4)
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


# --- Training, step by step -----------------------------------------------------------
STARTS = 3


def stepped(script, after=None, total=9, **options):
    """A run of `total` vector steps without files; after each, after(run) looks."""
    sizes = dict(num_envs=4, batch_size=16, learning_starts=STARTS, eval_episodes=2)
    sizes |= dict(env_id="Ingenuity", total_timesteps=total)
    args = script.Args(**sizes | options)
    run = SteppedRun(args, after=after)
    script.train(args, run)
    return run


def updates_made(script, run):
    """Steps of Adam for the networks: of the flow, or of critics and actor."""
    decays = [4, 8] if script is sac else [4]  # of the learner's tensors
    return [adam_steps(run.parts["learner"][i]) for i in decays]


def action_of(script, network, obs, z):
    """An action of the policy; MEow without tuning gives it before tanh."""
    action = network.sample(obs, z)[0]
    return torch.tanh(action) if script is auto else action


@all_scripts
@pytest.mark.parametrize("per_step", [1, 3])
def test_updates_per_vector_step(script, per_step):
    """None while acting at random, then as many as asked for, actor included."""
    seen = []
    stepped(
        script,
        lambda run: seen.append(updates_made(script, run)),
        updates_per_step=per_step,
    )
    networks = 2 if script is sac else 1
    assert seen == [
        [per_step * max(0, step - STARTS)] * networks for step in range(1, 10)
    ]


def test_a_rarer_actor_catches_up():
    """--policy-frequency 2: two updates of the actor after two of the critics."""
    seen = []
    stepped(sac, lambda run: seen.append(updates_made(sac, run)), policy_frequency=2)
    assert seen[STARTS:] == [[n, n - n % 2] for n in range(1, 7)]


def recorded_steps(monkeypatch, num_envs, before=lambda _simulator: None):
    """A list that gets (observations acted on, actions) of each vector step.

    Only of simulators with `num_envs` environments, each of which `before` sees.
    """
    steps, acted_on = [], {}
    reset, step = MujocoSimulator.reset, MujocoSimulator.step

    def recorded_reset(self, seed=None):
        acted_on[self] = reset(self, seed)
        return acted_on[self]

    def recorded_step(self, action):
        if self.num_envs == num_envs:
            before(self)
            steps.append((acted_on[self].clone(), action.clone()))
        result = step(self, action)
        acted_on[self] = result[0]
        return result

    monkeypatch.setattr(MujocoSimulator, "reset", recorded_reset)
    monkeypatch.setattr(MujocoSimulator, "step", recorded_step)
    return steps


def test_robots_without_tuning_have_the_papers_sizes():
    assert set(auto.SIZES) == set(meow.PAPER_SETTINGS)
    for task, sizes in auto.SIZES.items():
        assert set(sizes) == {"total_timesteps", "num_envs", "batch_size"}
        assert sizes.items() <= meow.PAPER_SETTINGS[task].items()


@pytest.mark.parametrize("autotune", [False, True])
def test_robots_act_by_tanh_of_what_is_stored(autotune, monkeypatch):
    """alpha moves only when asked: once an update, by the mean density."""
    steps, alphas, moments = recorded_steps(monkeypatch, num_envs=4), [0.1], [None]

    def after(run):
        alphas.append(float(run.policy["flow"].alpha))
        moments.append(copy.deepcopy(run.parts["rewards"]))

    rates = dict(temperature=0.6, alpha_lr=0.1, updates_per_step=2)
    run = stepped(auto, after, autotune=autotune, **rates)
    played = torch.stack([action for _, action in steps])
    rows = run.parts["replay"].rows[:9]
    torch.testing.assert_close(played, torch.tanh(rows[..., :6]))
    assert rows[..., :6].abs().max() > 1
    for i in range(9):
        alpha = torch.tensor(alphas[i])
        density = -run.metrics[i].get("flow/entropy", 0.0) / 6
        for _ in range(2 if autotune and i >= STARTS else 0):
            auto.follow_entropy(alpha, density, run.args)
        assert alphas[i + 1] == pytest.approx(float(alpha))
    assert (alphas[-1] != pytest.approx(0.1)) == autotune
    torch.testing.assert_close(
        moments[-1].var[0], rows[..., 6].double().var(correction=0)
    )
    unit = auto.reward_unit(moments[-2])
    for reward in run.parts["replay"].batch[:, -2]:
        assert (rows[..., 6] / unit - reward).abs().min() < 1e-5


def test_m_learns_from_near_actions_and_the_policy_from_all():
    """Gradients of the update: m's are of the weighted loss, the others' of the plain
    one. alpha was moved, and rho with it."""
    torch.manual_seed(0)
    args = auto.Args(temperature=0.3, sigma_max=2.0, max_grad_norm=1e9)
    flow = auto.make_flow(args, 5, 2)
    for parameter in flow.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    flow.alpha.fill_(0.75)
    learner = copy.deepcopy(flow).requires_grad_(True)
    theta = flatten_parameters(flow)
    state = [theta, theta.clone(), *auto.adam_moments(theta)]
    batch = torch.randn(64, 5 + 2 + 5 + 2)
    batch[:, -1] = (batch[:, -1] > 1).float()
    obs, u, next_obs, reward, terminated = auto.split_batch(batch, 5, 2)
    y = reward + 0.99 * (1 - terminated) * flow.soft_values(next_obs)

    q, x = learner.q_values(obs, u), learner.to_x(u, obs)
    energy = 0.5 * (learner.kappa(obs) * x * x).sum(-1)
    w = torch.where(y > q, torch.exp(1.5 - energy).clamp(max=1), 1.0).detach()
    assert (w < 0.5).any()
    assert (energy[w == 1] > 1.5).any()  # far ones that are worth less
    weighted = 0.5 * (w * (q - y).square()).mean()
    plain = 0.5 * (q - y).square().mean()
    names, parameters = zip(*learner.named_parameters(), strict=True)
    near = torch.autograd.grad(weighted, parameters, retain_graph=True)
    every = torch.autograd.grad(plain, parameters)
    pairs = zip(names, near, every, strict=True)
    grads = [of_m if name.startswith("m.") else other for name, of_m, other in pairs]
    expected = torch.cat([grad.flatten() for grad in grads])

    metrics = auto.make_update(flow, args)(*state, batch)
    torch.testing.assert_close(10 * state[2], expected, rtol=1e-4, atol=1e-5)
    assert metrics[0].item() == pytest.approx((weighted + plain).item(), rel=1e-5)


def test_the_average_of_theta_is_evaluated_and_saved():
    """By default it is theta."""
    thetas = []
    run = stepped(
        auto,
        lambda run: thetas.append(run.parts["learner"][0].clone()),
        policy_average=0.25,
        learning_rate=1e-2,
    )
    check_average(run, thetas, STARTS - 1)
    run = stepped(auto)
    assert torch.equal(run.tensors["evaluation"][0], run.tensors["acting"][0])


def test_rewards_of_steps_that_join_two_episodes_do_not_count(monkeypatch):
    """Of 9 vector steps of 4 environments one has 2 valid rows, and one has none."""
    step, masks = MujocoSimulator.step, iter([[1, 1, 0, 0], [0] * 4] + [[1] * 4] * 7)

    def masked_step(self, action):
        result = step(self, action)
        if self.num_envs == 4:  # not an evaluation's
            self.valid = torch.tensor(next(masks), dtype=torch.bool)
        return result

    monkeypatch.setattr(MujocoSimulator, "step", masked_step)
    rewards = stepped(auto).parts["rewards"]
    assert rewards.count.item() == 2 + 7 * 4
    assert rewards.var.isfinite()


@all_scripts
def test_networks_see_observations_normalised_by_all_before(script, monkeypatch):
    """Acting, and batches: nothing but observations, and without tuning the rewards."""
    raw, norms, acted, batches, units = [], [], [], [], []
    sample, update = script.VectorReplayBuffer.sample, script.RunningMeanStd.update
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def recorded_sample(self, rng):
        raw.append(sample(self, rng).clone())
        return self.batch

    def recorded_update(self, obs):
        update(self, obs)
        if len(self.mean) > 1:  # not of rewards
            norms.append(copy.deepcopy(self))

    monkeypatch.setattr(script.VectorReplayBuffer, "sample", recorded_sample)
    monkeypatch.setattr(script.RunningMeanStd, "update", recorded_update)
    monkeypatch.setattr(torch, "randn", lambda *_args, **_kwargs: noise)
    steps = recorded_steps(monkeypatch, num_envs=4)

    def after(run):
        network = run.policy["actor" if script is sac else "flow"]
        acted.append(copy.deepcopy(network))
        batches.append(run.parts["replay"].batch.clone())
        units.append(run.metrics[-1].get("flow/reward_unit", 1.0))

    run = stepped(script, after)
    seen, actions = zip(*steps, strict=True)
    for i in range(STARTS, 9):
        so_far = torch.cat(seen[: i + 1]).double()
        assert norms[i].count.item() == len(so_far)
        torch.testing.assert_close(norms[i].mean, so_far.mean(0))
        torch.testing.assert_close(norms[i].var, so_far.var(0, correction=0))
        expected = action_of(script, acted[i - 1], norms[i](seen[i]), noise)
        torch.testing.assert_close(actions[i], expected)
        batch, expected = batches[i], raw[i - STARTS].clone()
        for part in (expected[:, :13], expected[:, 19:32]):  # obs and next_obs
            part.copy_(norms[i](part))
        expected[:, -2].div_(torch.tensor([units[i]], dtype=torch.float64))
        assert torch.equal(batch, expected)
        assert not torch.equal(batch, raw[i - STARTS])
    assert run.policy["norm"].count.item() == 4 * 10


def evaluated(script, run, step):
    """Returns and lengths of an evaluation of a run's networks as they are."""
    network = run.policy["actor" if script is sac else "flow"]
    envs = script.make_eval_envs(run.args, run.parts["simulator"])
    norm = run.policy["norm"]
    policy = partial(action_of, script, network)
    return script.evaluate(run.args, envs, policy, norm, step, run)


@all_scripts
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_plays_the_policy_on_normalised_observations(
    script, deterministic, monkeypatch
):
    """Without noise, or with normal noise; the same each time, as while training."""
    run = stepped(script, deterministic_eval=deterministic)
    network = run.policy["actor" if script is sac else "flow"]
    norm = run.policy["norm"]
    steps = recorded_steps(monkeypatch, num_envs=2)
    count, state = norm.count.item(), torch.get_rng_state()
    returns, lengths = evaluated(script, run, 9)
    obs, played = map(torch.cat, zip(*steps, strict=True))
    modes = action_of(script, network, norm(obs), torch.zeros(len(obs), 6))
    equal = torch.isclose(played, modes, atol=1e-6)
    assert equal.all() if deterministic else not equal.any(0).all()
    assert max(lengths) == len(steps)
    assert run.evaluations == [(9, returns)]
    assert evaluated(script, run, 9)[0] == returns
    assert evaluated(script, run, 10)[0] != returns
    assert norm.count.item() == count  # evaluations leave training as it is
    assert torch.equal(torch.get_rng_state(), state)


@all_scripts
def test_no_episodes_no_evaluation(script):
    assert stepped(script, eval_episodes=0).evaluations == [(9, [])]


def test_statistics_of_episodes():
    """Three environments: one ends twice, one resets late, one never ends."""
    episodes = EpisodeStatistics(3)
    simulator = SimpleNamespace(valid=None, diverged=0)
    rewards = torch.tensor([[1.0, 10, 100], [2, 20, 200], [3, 0, 300], [4, 40, 400]])
    done = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    for i in range(4):
        simulator.valid = torch.tensor([True, i != 2, True])
        simulator.diverged = int(i == 3)
        episodes.add(simulator, rewards[i], done[i])
    restored = EpisodeStatistics(3)
    restored.load_state_dict(copy.deepcopy(episodes.state_dict()))
    for statistics in (episodes, restored):
        assert statistics.returns.tolist() == [0, 40, 1000]
        assert statistics.lengths.tolist() == [0, 1, 4]
        assert statistics.take() == {
            "charts/diverged": 1,
            "charts/episodes": 3,
            "charts/episodic_return": pytest.approx((3 + 30 + 7) / 3),
            "charts/episodic_length": 2,
        }
        assert statistics.take() == {"charts/diverged": 1, "charts/episodes": 0}


# --- Whole runs -----------------------------------------------------------------------
def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def metrics(run):
    """metrics.csv without times and speeds."""
    with open(run / "metrics.csv") as f:
        rows = [(int(r["step"]), r["name"], r["value"]) for r in csv.DictReader(f)]
    return [row for row in rows if not row[1].endswith("SPS")]


def same(one, other):
    """Whether two checkpoints hold the same, but for times and what names the run."""
    if isinstance(one, dict):
        keys = [
            k for k in one if k not in ("args", "description", "csv_bytes", "seconds")
        ]
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in keys)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def load(run, name="checkpoint.pt"):
    """A run's file; the replay buffer without the place of the next step."""
    content = torch.load(run / name, weights_only=True)
    if replay := content.get("replay"):
        for part in ("rows", "invalid"):
            replay[part] = replay[part][: replay["added"]]
    return content


@pytest.fixture(scope="module", params=ALL, ids=lambda s: s.__name__)
def finished(request, tmp_path_factory):
    """A script and the folder of an uninterrupted quick run of it."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    assert command(request.param, quick(request.param), folder) == 0
    return request.param, only_run(folder)


def test_files_of_a_run(finished):
    script, run = finished
    assert {f.name for f in run.iterdir()} >= {
        "args.json",
        "metrics.csv",
        "policy_final.pt",
    }
    assert run.name.startswith(f"Ingenuity__{script.__name__}__1__")
    evaluated = [step for step, name, _ in metrics(run) if name == "eval/return_mean"]
    assert evaluated == [40, 60]
    losses = [step for step, name, _ in metrics(run) if name.startswith("losses/")]
    assert min(losses) == 15
    assert (
        sum(float(v) for _, name, v in metrics(run) if name == "charts/episodes") >= 8
    )
    saved = load(run)
    assert (
        saved["norm"]["count"].item() == 4 * 61
    )  # the first observations and one a step
    assert saved["replay"]["added"] == 60


def resumed_is_the_whole_run(finished, tmp_path, *words):
    script, whole = finished
    assert command(script, ["--resume", only_run(tmp_path), *words], tmp_path) == 0
    assert metrics(only_run(tmp_path)) == metrics(whole)
    for name in ("checkpoint.pt", "policy_final.pt"):
        assert same(load(only_run(tmp_path), name), load(whole, name)), name


def at_steps(patch, actions):
    """actions[i](simulator) is called before vector step i (from 0) of a quick run."""
    step, counts = MujocoSimulator.step, {}

    def watched(self, action):
        if self.num_envs == int(QUICK["--num-envs"]):
            counts[self] = counts.get(self, -1) + 1
            actions.get(counts[self], id)(self)
        return step(self, action)

    patch.setattr(MujocoSimulator, "step", watched)


@pytest.mark.slow
def test_stopped_and_resumed_run_is_the_uninterrupted_one(
    finished, tmp_path, monkeypatch
):
    """SIGTERM in the middle of a step: the run ends it, saves, and later goes on."""
    with monkeypatch.context() as patch:
        at_steps(patch, {36: lambda _: os.kill(os.getpid(), signal.SIGTERM)})
        words = quick(finished[0], checkpoint_frequency=0)
        with pytest.raises(SystemExit) as stop:
            command(finished[0], words, tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    assert load(only_run(tmp_path))["step"] == 37
    resumed_is_the_whole_run(finished, tmp_path)


@pytest.mark.slow
def test_broken_and_resumed_run_is_the_uninterrupted_one(
    finished, tmp_path, monkeypatch, capsys
):
    """From its last checkpoint, in the middle of episodes, with other threads."""

    def broken(_simulator):
        raise SimulatorError("pulled the plug")

    with monkeypatch.context() as patch:
        at_steps(patch, {37: broken})
        assert command(finished[0], quick(finished[0]), tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: the simulator failed: pulled the plug; the last check"
    )
    assert load(only_run(tmp_path))["step"] == 20
    assert metrics(only_run(tmp_path))[-1][0] == 35
    resumed_is_the_whole_run(finished, tmp_path, "--sim-threads", 2)


def test_evaluation_repeats_the_runs_last_one(finished, tmp_path, capsys):
    script, run = finished
    assert command(script, ["--evaluate", run], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [float(line.split("return ")[1].split(",")[0]) for line in lines[:2]]
    last = [
        v
        for s, n, v in metrics(run)
        if s == 60 and n in ("eval/return_0", "eval/return_1")
    ]
    assert printed == pytest.approx(list(map(float, last)), abs=0.02, rel=1e-3)
    assert (
        command(script, ["--evaluate", run, "--no-deterministic-eval"], tmp_path) == 0
    )
    assert "2 stochastic episodes" in capsys.readouterr().out


@pytest.mark.parametrize("name", TASKS)
def test_each_task_measures_what_it_is_about(name):
    simulator = make_simulator("mujoco", name, 3, seed=1)
    simulator.reset()
    before = simulator.measures()
    kept = {key: values.clone() for key, values in before.items()}
    for _ in range(5):
        simulator.step(torch.ones(3, simulator.act_dim))
    after = simulator.measures()
    assert before.keys() == after.keys() != set()
    for key, values in after.items():
        assert values.shape == (3,)
        assert torch.equal(before[key], kept[key])  # copies
    moved = any(not torch.equal(after[key], kept[key]) for key in after)
    assert moved == (name != "FrankaCabinet")  # its drawer stays closed


renders = pytest.mark.skipif(
    not (ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa")),
    reason="needs an off-screen renderer: libegl1 or libosmesa6",
)


@renders
@pytest.mark.slow
@pytest.mark.parametrize("finished", ALL[:1], indirect=True)
def test_video_shows_the_robot(finished, tmp_path):
    """On a machine without a screen: one frame per step, and the robot moves in it."""
    _, run = finished
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY")}
    words = [
        sys.executable,
        str(ISAAC_SCRIPTS[0]),
        "--evaluate",
        str(run),
        "--capture-video",
    ]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (run / "videos").glob("*.mp4")
    assert f"video of episode 0: {path}" in done.stdout
    frames = [frame.astype(float) for frame in imageio.get_reader(path)]
    assert abs(len(frames) - int(done.stdout.split("length ")[1].split()[0])) <= 1
    assert all(frame.std() > 10 for frame in frames)
    assert np.abs(frames[-1] - frames[0]).max() > 50


BAD = [
    (dict(env_id="Bee"), 2, "--env-id Bee"),
    (dict(env_id="Isaac-Ant-Direct-v0"), 2, "isaaclab_tasks is not installed"),
    (dict(simulator="isaacgym"), 2, "isaacgymenvs is not installed"),
    (dict(num_envs=10**10), 2, "10000000000 environments need"),
    (
        dict(num_envs=100, buffer_size=10**9, total_timesteps=10**9),
        2,
        "--num-envs 100, --buffer-size 1000000000: the replay",
    ),
]
BAD_WITHOUT_TUNING = [
    (dict(recent_size=9), "--recent-size 9: must be 0 or at least 10"),
    (dict(policy_average=0), "--policy-average 0.0: must be above 0 and at most 1"),
]


@all_scripts
@pytest.mark.parametrize(("options", "code", "needle"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_sentence(script, options, code, needle, tmp_path, capsys):
    one_sentence(command(script, quick(**options), tmp_path), code, needle, capsys)


@pytest.mark.parametrize(("options", "needle"), BAD_WITHOUT_TUNING)
def test_bad_options_without_tuning(options, needle, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(auto, quick(**options), tmp_path)
    assert stop.value.code == 2
    assert needle in capsys.readouterr().err


def one_sentence(code, expected_code, needle, capsys):
    (error,) = [
        x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")
    ]
    assert code == expected_code
    assert needle in error


@all_scripts
@pytest.mark.parametrize("name", ["num_envs", "updates_per_step", "sim_threads"])
def test_counts_are_positive(script, name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(script, quick(**{name: 0}), tmp_path)
    assert stop.value.code == 2
    assert (
        f"--{name.replace('_', '-')} 0: must be at least 1" in capsys.readouterr().err
    )


def test_a_policy_of_another_task_is_refused(finished, tmp_path, capsys):
    script, run = finished
    words = ["--evaluate", run, "--env-id", "Ant", "--track"]
    needle = "was made with other settings: --env-id Ingenuity --no-track"
    one_sentence(command(script, words, tmp_path), 2, needle, capsys)


def test_runs_of_the_other_script_are_refused(finished, tmp_path, capsys):
    script, run = finished
    other = next(other for other in ALL if other is not script)
    needle = f"was not written by this version of {other.__name__}.py"
    one_sentence(command(other, ["--resume", run], tmp_path), 1, needle, capsys)


@all_scripts
def test_a_diverging_update_stops_the_run(script, tmp_path, capsys):
    rate = dict(q_lr=1e30) if script is sac else dict(learning_rate=1e30)
    one_sentence(command(script, quick(**rate), tmp_path), 1, "at step 1", capsys)


@all_scripts
def test_a_diverged_environment_is_counted_and_never_learned_from(
    script, monkeypatch, tmp_path
):
    """World 2 breaks down at steps 5 and 30: no such row in the buffer, on it goes."""

    def broken(simulator):
        simulator.physics.qpos[2, 0] = math.nan

    at_steps(monkeypatch, {5: broken, 30: broken})
    assert command(script, quick(eval_frequency=100, total_timesteps=40), tmp_path) == 0
    run = only_run(tmp_path)
    counts = {
        step: float(v) for step, name, v in metrics(run) if name == "charts/diverged"
    }
    assert (counts[5], counts[10], counts[30], counts[35]) == (0, 1, 1, 2)
    replay = load(run)["replay"]
    assert replay["invalid"].nonzero().tolist() == [[5, 2], [30, 2]]


# --- NVIDIA's simulators, played by the stand-ins of tests/stand_ins ------------------
NVIDIA = [
    ("isaacgym", "Ant"),
    pytest.param("isaacgym", "Ingenuity", marks=pytest.mark.slow),
    ("auto", "Isaac-Ant-Direct-v0"),
]


def stored(run):
    """All transitions that the replay buffer of a stand-in's run can return.

    Rows (environment, episode, step, terminated); checks that next_obs is one step on
    in the same episode wherever the target looks at it, and that no reward is that of a
    reset.
    """
    state = load(run)["replay"]
    obs_dim, width = state["obs"].shape[-1], state["rows"].shape[-1]
    limit = 7 if obs_dim == 4 else 6
    replay = VectorReplayBuffer(state["added"], 5, obs_dim, width - 3, limit, 20_000)
    replay.load_state_dict(state)
    widths = [obs_dim, width - 3, obs_dim, 1, 1]
    obs, _, next_obs, reward, terminated = gathered(replay).split(widths, -1)
    going_on = terminated[:, 0] == 0
    place, after = 64 * obs[:, :3], 64 * next_obs[:, :3]
    assert torch.equal(place[going_on] + torch.tensor([0, 0, 1]), after[going_on])
    assert (reward < 2).all()
    return {
        tuple(row)
        for row in torch.cat([place, terminated], -1).long().unique(dim=0).tolist()
    }


@pytest.mark.slow
@all_scripts
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("simulator", "env_id"), NVIDIA)
def test_nvidias_simulators(script, simulator, env_id, tmp_path, capsys):
    """Trains, resumes with new episodes and evaluates.

    What is learned from are all steps of all episodes: only falls terminate, not
    time-outs, and no row that a late reset leaves behind is among them.
    """
    sizes = dict(num_envs=5, total_timesteps=80, learning_starts=70)
    words = quick(simulator=simulator, env_id=env_id, **sizes)
    assert command(script, words, tmp_path) == 0
    assert "no evaluation while training" in capsys.readouterr().err
    run = only_run(tmp_path)
    names = {name for _, name, _ in metrics(run)}
    assert "charts/episodic_return" in names
    assert "eval/return_mean" not in names
    rows = [
        (i, row) for i in range(5) for row in timeline(i, 1, 80, **HOW[env_id]) if row
    ]
    assert stored(run) == {(i, *before, fell) for i, (before, _, fell, _) in rows}
    resume = ["--resume", run, "--total-timesteps", 100]
    assert command(script, resume, tmp_path) == 0
    assert "their episodes start anew" in capsys.readouterr().err
    stored(run)
    assert command(script, ["--evaluate", run], tmp_path) == 0
    assert "2 deterministic episodes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [script.__name__ for script in ALL])
def test_the_scripts_import_isaac_gym_before_torch(name):
    """As the real one demands; the stand-in does so here."""
    code = f"import {name}; from isaac_tasks import make_simulator as make\n"
    code += "print(make('isaacgym', 'Ant', 2, seed=1).obs_dim)"
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}/tests/stand_ins",
        "STRICT_IMPORT_ORDER": "1",
    }
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "5\n", done.stderr
