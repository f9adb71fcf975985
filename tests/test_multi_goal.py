"""The multi-goal world by hand; its figure from random policies."""

import json
import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium.utils.env_checker import check_env

import meow_continuous_action as meow
import multi_goal
import sac_continuous_action as sac
import sql_continuous_action as sql
from harness.args import parse_args
from harness.files import load_file, save_file
from harness.runs import main
from multi_goal import figure, move, optimum

ENV_ID = "multi_goal:MultiGoal-v0"


def step_from(state, action):
    """One step from a state: new state, reward, terminated, truncated."""
    env = gym.make(ENV_ID, disable_env_checker=True)
    env.reset(seed=0, options={"state": state})
    return env.step(np.float32(action))[:4]


@pytest.mark.parametrize(
    ("state", "action", "new", "reward"),
    [
        ((0, 0), (0, 0), (0, 0), -25),
        # the nearest goal is on the right, above, on the left, below
        ((1, 1), (0.5, -0.25), (1.5, 0.75), -30 * 0.3125 - (3.5**2 + 0.75**2)),
        ((-1, 3), (0, -1), (-1, 2), -30 - (1 + 9)),
        ((-3, 0), (0.5, 0), (-2.5, 0), -7.5 - 6.25),
        ((0.5, -6.5), (0.5, 0), (1, -6.5), -7.5 - (1 + 2.25)),
        # the action is clipped, and the cost is the clipped one's
        ((0, 0), (5, -3), (1, -1), -60 - (16 + 1)),
        # stopped by the walls
        ((6.5, -6.5), (1, -1), (7, -7), -60 - (49 + 4)),
        ((-6.75, 6.75), (-1, 0.5), (-7, 7), -37.5 - (49 + 4)),
    ],
)
def test_dynamics_and_reward(state, action, new, reward):
    position, got, terminated, truncated = step_from(state, action)
    assert position.dtype == np.float32
    np.testing.assert_array_equal(position, np.float32(new))
    assert type(got) is float
    assert got == pytest.approx(reward, abs=1e-5)
    assert (terminated, truncated) == (False, False)


@pytest.mark.parametrize("goal", [(5, 0), (-5, 0), (0, 5), (0, -5)])
@pytest.mark.parametrize(
    ("distance", "arrives"), [(1.001, False), (1.0, False), (0.999, True)]
)
def test_arrival_ends_the_episode_and_pays_ten(goal, distance, arrives):
    """At the edge of each goal's disc, from two units away along the axis."""
    goal = np.float64(goal)
    start, end = goal * (5 - distance - 0.5) / 5, goal * (5 - distance) / 5
    position, reward, terminated, _ = step_from(start, end - start)
    np.testing.assert_allclose(position, end, atol=1e-6)
    assert terminated is arrives
    assert reward == pytest.approx(-7.5 - distance**2 + 10 * arrives, abs=1e-4)


def test_a_goal_can_be_crossed_without_arrival():
    """Only where a step ends counts, as in the papers' code."""
    assert step_from((3.99, 0.99), (0, 0))[2] is False


def test_time_limit():
    env = gym.make(ENV_ID)
    env.reset(seed=0)
    ends = [
        env.step(np.zeros(2, np.float32))[2:4] for _ in range(multi_goal.TIME_LIMIT)
    ]
    assert ends == [(False, False)] * (multi_goal.TIME_LIMIT - 1) + [(False, True)]


def test_the_seed_determines_the_episode():
    env = gym.make(ENV_ID)
    first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    starts = np.stack([env.reset()[0] for _ in range(2000)])
    np.testing.assert_allclose(starts.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(starts.std(0), 0.1, atol=0.01)


def test_observations_are_copies():
    env = multi_goal.MultiGoalEnv()
    obs, _ = env.reset(seed=0)
    obs[:] = 7
    obs = env.step(np.float32([0.5, 0]))[0]
    assert abs(obs[0] - 0.5) < 0.5
    obs[:] = 7
    assert abs(env.state[0] - 0.5) < 0.5


@pytest.mark.filterwarnings("error")
def test_gymnasium_accepts_it():
    check_env(gym.make(ENV_ID).unwrapped)
    check_env(gym.make(ENV_ID, render_mode="rgb_array").unwrapped)


def test_picture():
    env = gym.make(ENV_ID, render_mode="rgb_array")
    env.reset(seed=0, options={"state": (3, -6)})
    image = env.render()
    assert (image.shape, image.dtype) == ((280, 280, 3), np.uint8)
    rows, columns = np.nonzero((image == (31, 119, 180)).all(-1))  # the point
    np.testing.assert_allclose([columns.mean(), rows.mean()], [199.5, 259.5], atol=1)
    assert tuple(image[139, 240]) == tuple(image[240, 139]) == (214, 39, 40)  # goals
    with pytest.raises(ValueError, match="rgb_array"):
        multi_goal.MultiGoalEnv(render_mode="ansi")
    assert "render_fps" in env.metadata


def test_the_scripts_environment():
    env = meow.make_env(meow.Args.for_env(ENV_ID), render=True)
    assert env.observation_space.shape == env.action_space.shape == (2,)
    env.reset(seed=0)
    env.step(np.float32([1, -1]))
    np.testing.assert_allclose(env.unwrapped.state, [1, -1], atol=0.5)


def test_importing_it_needs_only_the_requirements():
    code = "import sys, multi_goal; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_counting_of_goals():
    made_up = [
        [(0, 0), (2, 0), (4.5, 0)],
        [(0, 0), (-4.5, 0), (0, -4.5)],  # the first arrival counts
        [(0, 0), (0, 4), (0, 6), (0, 7)],  # exactly 1 away never arrives
        [(0, 0), (0, 5.9)],
        [(0, 0), (0, -4.01)],
        [(0, 0), (0.5, -4.3)],
        [(0, 0)],
    ]
    counts = figure.count_goals([np.float32(t) for t in made_up])
    assert counts.tolist() == [1, 1, 1, 2, 2]


def test_trajectories_follow_the_world():
    """A policy that walks right or left, by the sign of its noise, without an end."""

    def sample(obs, noise):
        sign = torch.where(obs[:, :1] == 0, noise[:, :1].sign(), obs[:, :1].sign())
        return torch.cat([sign, 0 * sign], dim=-1), None

    policy = figure.Policy("scripted", "", None, sample, None)
    trajectories = figure.sample_trajectories(policy, 50)
    for trajectory in trajectories:  # 4 is exactly 1 away: the fifth step arrives
        np.testing.assert_array_equal(abs(trajectory[:, 0]), range(6))
    right, left, *others = figure.count_goals(trajectories)
    assert right + left == 50
    assert min(right, left) > 10
    assert others == [0, 0, 0]
    policy.sample = lambda _, noise: (0 * noise, None)
    still = figure.sample_trajectories(policy, 2)
    assert [len(t) for t in still] == [multi_goal.TIME_LIMIT + 1] * 2
    assert figure.count_goals(still).tolist() == [0, 0, 0, 0, 2]


def test_quadrature_gives_the_exact_value_of_the_flow(make_random_flow):
    """The figure integrates for SAC and soft Q-learning; MEow's V needs no integral."""
    flow = make_random_flow(2, 2, alpha=2.5, low=-1.5, high=-0.3)
    for mlp in flow.t:  # moderate couplings, so that the grid can resolve the density
        mlp.layers[-1].weight.data *= 0.2
    obs = torch.rand(2, 2, dtype=torch.float64) * 14 - 7
    exact = flow.soft_values(obs).min(-1).values.detach()
    assert (exact.max() - exact.min()) > 0.1
    for n, error in ((figure.QUADRATURE, 5e-3), (80, 2e-4)):
        value = figure.quadrature_value(flow.q_values, obs, 2.5, n)
        torch.testing.assert_close(value, exact, rtol=0, atol=error)


def test_quadrature_of_a_known_integral():
    """Q = -30 |a|^2: V = alpha log(pi alpha / 30) but for the tails, by the lower Q."""

    def q_values(_, action):
        q = -30 * action.square().sum(-1)
        return torch.stack([q + 1, q], dim=-1)

    for alpha in (0.2, 0.4, 2.5):
        value = figure.quadrature_value(q_values, torch.zeros(40, 2), alpha)
        inside = math.erf((30 / alpha) ** 0.5) ** 2  # of N(0, alpha / 60)
        expected = alpha * math.log(inside * math.pi * alpha / 30)
        np.testing.assert_allclose(value, expected, atol=1e-4)


def networks(script, args):
    """What a policy file of the script holds, by name: untrained networks."""
    if script is meow:
        return {"flow": meow.make_flow(args, 2, 2)}
    names = ("actor", "critics") if script is sac else ("sampler", "critic")
    return dict(zip(names, script.make_networks(args, 2, 2), strict=True))


def random_run(script, folder, env_id=ENV_ID, settings=(), **changes):
    """A run folder with the untrained policy of one of the scripts."""
    args = script.Args.for_env(env_id)
    args.seed = 7
    own = networks(script, args).items()
    state = {name: network.state_dict() for name, network in own}
    folder.mkdir(parents=True)
    content = {"args": vars(args) | dict(settings), "step": 4000, **state, **changes}
    save_file(folder / "policy_final.pt", content, script.__name__)
    (folder / "args.json").write_text(json.dumps({"script": f"{script.__name__}.py"}))
    return folder


def test_meow_value_is_the_lower_of_its_two(tmp_path):
    flow = meow.make_flow(meow.Args(alpha=2.5), 2, 2)
    flow.b[0].layers[-1].bias.fill_(3.0)
    flow.b[1].layers[-1].bias.fill_(-2.0)
    flow.h.layers[-1].bias.zero_()  # sigma(s) is in the middle between its bounds
    run = random_run(meow, tmp_path / "run", flow=flow.state_dict())
    obs = torch.zeros(1, 2)
    bounds = meow.Args.for_env(ENV_ID)
    expected = 2.5 * (bounds.log_sigma_min + bounds.log_sigma_max - 2.0)
    assert figure.load_policy(run).soft_value(obs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("script", [sac, sql])
def test_sac_and_sql_values_are_in_reward_units(script, tmp_path):
    """alpha log int exp(min_k Q_k / alpha) da; SQL's alpha is 1, its Q is scaled."""
    run = random_run(script, tmp_path / "run")
    saved = load_file("--run", run / "policy_final.pt", script.__name__)
    args = script.Args(**saved["args"])
    critics = list(networks(script, args).values())[-1]
    obs = torch.tensor([[1.0, -2.0]])
    actions = torch.rand(50_000, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    q = critics.q_values(obs.expand(len(actions), -1), actions).min(-1).values
    alpha, scale = (args.alpha, 1) if script is sac else (1, args.reward_scale)
    mean = torch.exp(q / alpha).mean()  # Monte Carlo over the square, whose area is 4
    expected = alpha * math.log(4 * mean) / scale
    assert (alpha, scale) == ((2.5, 1) if script is sac else (1, 0.4))
    assert figure.load_policy(run).soft_value(obs) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("script", [meow, sac, sql])
def test_densities_of_each_method(script, tmp_path):
    """The density integrates to 1 and has the mean of the sampled actions."""
    policy = figure.load_policy(random_run(script, tmp_path / "run"))
    density = figure.action_density(policy, (1.0, 2.0))
    cell = (2 / figure.BINS) ** 2
    assert density.sum() * cell == pytest.approx(1, abs=0.02)
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(3))
    obs = torch.tensor([[1.0, 2.0]]).expand(20_000, -1)
    mean = policy.sample(obs, noise)[0].mean(0)
    axis = (np.arange(figure.BINS) + 0.5) * 2 / figure.BINS - 1
    by_density = [density.sum(0) @ axis * cell, density.sum(1) @ axis * cell]  # x, y
    np.testing.assert_allclose(by_density, mean, atol=0.02)


def test_a_composed_run_shows_the_mean_of_its_two(tmp_path):
    args = sql.Args.for_env(ENV_ID)
    args.compose = ("runs/a", "runs/b")
    both = networks(sql, args)["critic"]
    run = random_run(sql, tmp_path / "run", settings={"compose": args.compose},
                     critic=both.state_dict())  # fmt: skip
    policy, obs = figure.load_policy(run), torch.tensor([[1.0, -2.0]])

    def mean(obs, action):
        x = torch.cat([obs, action], -1)
        return (both.q[0](x) + both.q[1](x)) / 2

    expected = figure.quadrature_value(mean, obs, 1.0) / 0.4
    assert policy.name == "mean of two soft Q"
    torch.testing.assert_close(policy.soft_value(obs), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_figure(tmp_path, monkeypatch, capsys):
    """A column per run, also where V is the same everywhere: MEow's, untrained."""
    monkeypatch.setattr(figure, "MAP_POINTS", 9)
    out = tmp_path / "new" / "out"
    east = "multi_goal:MultiGoalNorthEast-v0"
    runs = [str(random_run(s, tmp_path / s.__name__)) for s in (meow, sac)]
    runs.append(str(random_run(sql, tmp_path / "east", env_id=east)))
    for chosen in (runs, runs[2:]):
        assert (
            figure.main(["--run", *chosen, "--out", str(out), "--name", "goals"]) == 0
        )
        table = (out / "goals.md").read_text(encoding="utf-8")
        assert capsys.readouterr().out == table
        rows = [
            line.split(" | ") for line in table.splitlines() if line.startswith("| ")
        ][1:]
        names = [row[0].removeprefix("| ") for row in rows]
        assert names == ["MEow", "SAC", "Soft Q-learning (NorthEast)"][-len(chosen) :]
        for row in rows:
            assert row[1:3] == ["7", "4000"]
            assert sum(map(int, row[3:8])) == 200
        for name, start in (("goals.png", b"\x89PNG"), ("goals.svg", b"<?xml")):
            content = (out / name).read_bytes()
            assert content.startswith(start)
            assert len(content) > 20_000


def bad_runs(folder):
    """Name: (arguments, exit code, words of the sentence)."""
    good = str(random_run(meow, folder / "good"))
    nan = meow.make_flow(meow.Args(), 2, 2)
    nan.h.layers[-1].bias.fill_(math.nan)
    random_run(meow, folder / "nan", flow=nan.state_dict())
    random_run(meow, folder / "hopper", env_id="Hopper-v4")
    random_run(meow, folder / "unfitting", flow={})
    random_run(meow, folder / "option", settings={"no_such_option": 1})
    for name in ("empty", "damaged", "foreign", "nameless"):
        random_run(meow, folder / name)
    (folder / "empty" / "policy_final.pt").unlink()
    whole = (folder / "good" / "policy_final.pt").read_bytes()
    (folder / "damaged" / "policy_final.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign" / "args.json").write_text('{"script": "td3.py"}')
    (folder / "nameless" / "args.json").unlink()
    (folder / "file").write_text("")
    return {
        "no run": (["--run"], 2, ["--run"]),
        "missing": (["--run", good, "nowhere"], 2, ["nowhere"]),
        "empty folder": (["--run", f"{folder}/empty"], 2, ["empty", "policy_final.pt"]),
        "damaged": (["--run", f"{folder}/damaged"], 1, ["damaged"]),
        "no args.json": (["--run", f"{folder}/nameless"], 2, ["nameless/args.json"]),
        "another program": (
            ["--run", f"{folder}/foreign"],
            2,
            ["td3", "sac_continuous_action"],
        ),
        "another environment": (
            ["--run", f"{folder}/hopper"],
            2,
            ["Hopper-v4", "MultiGoal-v0"],
        ),
        "other networks": (
            ["--run", f"{folder}/unfitting"],
            1,
            ["unfitting", "another version"],
        ),
        "other options": (["--run", f"{folder}/option"], 1, ["no_such_option"]),
        "not finite": (["--run", f"{folder}/nan"], 1, ["MEow, seed 7", "not finite"]),
        "out is a file": (["--run", good, "--out", f"{folder}/file"], 1, ["file"]),
    }


def test_bad_input_gets_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure, "MAP_POINTS", 5)
    monkeypatch.chdir(tmp_path)
    for name, (words, code, needles) in bad_runs(tmp_path / "runs").items():
        assert figure.main(words) == code, name
        captured = capsys.readouterr()
        assert captured.err.startswith("error: "), name
        assert captured.err.count("\n") == 1, name
        assert all(needle in captured.err for needle in needles), (name, captured.err)
        assert captured.out == "", name
        assert not (tmp_path / "results").exists(), name


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    run = random_run(meow, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figure.main(["--run", str(run), "--out", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "script", [meow, pytest.param(sac, marks=slow), pytest.param(sql, marks=slow)]
)
def test_it_trains_and_the_figure_reads_the_run(script, tmp_path, monkeypatch, capsys):
    """From the command line of each script to the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figure, "MAP_POINTS", 5)
    words = f"--env-id {ENV_ID} --total-timesteps 40 --learning-starts 30"
    words += " --eval-episodes 1 --batch-size 8 --no-compile"
    assert main(script.Args, script.train, script.evaluate_saved, words.split()) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert figure.main(["--run", str(run), "--out", "out"]) == 0
    assert "| 1 | 40 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "goals"), [("NorthEast", (0, 2)), ("SouthEast", (0, 3))]
)
def test_worlds_to_compose_have_two_goals(name, goals):
    """Only their own goals end an episode and draw the point; MEow's settings hold."""
    env_id = f"multi_goal:MultiGoal{name}-v0"
    env = meow.make_env(meow.Args.for_env(env_id))
    for i, goal in enumerate(multi_goal.GOALS):
        env.reset(seed=0, options={"state": goal})
        _, reward, terminated, _, _ = env.step(np.zeros(2, np.float32))
        assert terminated is (i in goals)
        nearest = min(np.square(goal - multi_goal.GOALS[g]).sum() for g in goals)
        assert reward == pytest.approx(10.0 if i in goals else -nearest)
    assert parse_args(meow.Args, "meow", "", ["--env-id", env_id])[0].alpha == 2.5


def test_the_soft_optimal_policy():
    """V solves the soft Bellman equation, is as symmetric as the world, and walks."""
    options = optimum.Options(points=29, cells=15, walks=300)
    actions = figure.action_cells(options.cells).numpy()
    value = optimum.soft_value(options, actions)
    np.testing.assert_allclose(value, value[::-1], atol=0.01)
    np.testing.assert_allclose(value, value.T, atol=0.01)

    # by hand at the origin, where each action's successor is a point of the plane
    q = optimum.soft_q(value, np.zeros((1, 2), np.float32), actions, options.gamma)[0]
    area = (2 / 15) ** 2
    v = 2.5 * math.log(sum(math.exp(x / 2.5) * area for x in q))
    assert v == pytest.approx(value[14, 14], abs=0.01)
    still = q[7 * 15 + 7]  # the action (0, 0): stays, 5 away from all four goals
    assert still == pytest.approx(-25 + 0.9 * value[14, 14], abs=0.01)

    # without a future V is an integral over one reward
    near = optimum.soft_q(np.zeros((29, 29)), np.float32([(3.5, 0)]), actions, 0.0)[0]
    rewards = [move((3.5, 0), a)[1] for a in actions]
    np.testing.assert_allclose(near, rewards)
    # arriving ends it: from 1.5 away by (14/15, 0)
    lost = np.full((29, 29), -1000.0)
    arriving = optimum.soft_q(lost, np.float32([(3.5, 0)]), actions, 0.9)[0]
    assert arriving[7 * 15 + 14] == pytest.approx(rewards[7 * 15 + 14])
    assert arriving[7 * 15] == pytest.approx(rewards[7 * 15] - 900)

    walks = optimum.walk(options, value, actions)
    counts = figure.count_goals(walks)
    assert counts[-1] == 0
    assert min(counts[:4]) > 0
    # first steps are drawn from exp(Q / alpha): their log-probability is its mean
    log_prob = q / options.alpha - np.logaddexp.reduce(q / options.alpha)
    steps = [np.square(actions - positions[1]).sum(-1).argmin() for positions in walks]
    expected = (np.exp(log_prob) * log_prob).sum()
    assert log_prob[steps].mean() == pytest.approx(expected, abs=0.2)
