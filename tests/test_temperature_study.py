"""studies/temperature/arms.py: what each change does, and that runs go on with it."""

import contextlib
import io
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, interrupting, metrics, only_run, quick

sys.path.insert(0, str(ROOT / "studies/temperature"))

import arms
import drift
import slopes

MEOW = "normal scaled recent plain bounded trunk conservative near held student".split()
MEOW += "straight averaged noise errors returns noise+bound".split()
DRAWING_ANEW = ("held", "student")  # a resumed run has other noise
KEEPING_THE_IDENTITY = "base normal plain bounded trunk student straight".split()


def flow_of(arm, obs_dim=3, act_dim=1, **options):
    """A float64 flow of this arm with random parameters, and its script."""
    script = arms.changed_script(arm)
    flow = script.make_flow(script.Args(**options), obs_dim, act_dim).double()
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return flow, script


def launch(argv, cwd, signals=None):
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stderr(io.StringIO()) as err,
        interrupting(signals or {}),
    ):
        try:
            code = arms.main(argv)
        except SystemExit as stopped:
            code = stopped.code
    return code, err.getvalue()


@pytest.mark.parametrize("arm", KEEPING_THE_IDENTITY)
def test_v_is_still_the_soft_value_of_q(arm):
    torch.manual_seed(0)
    flow, script = flow_of(arm)
    if arm == "normal":
        flow.mean.copy_(torch.randn(3))
        flow.scale.copy_(torch.rand(3) + 0.5)
    obs = torch.randn(5, 3, dtype=torch.float64)
    n = 40_000
    u = torch.sinh(torch.linspace(-9, 9, n, dtype=torch.float64))  # a far tail as well
    for alpha in (0.02, 0.1, 1.0):
        flow.alpha.fill_(alpha)
        for i in range(5):
            q = flow.q_values(obs[i].expand(n, 3), u[:, None])
            inside = torch.exp(q / alpha + script.log_tanh_slope(u)[:, None])  # da / du
            v = alpha * torch.log(torch.trapezoid(inside, u, dim=0))
            exact = flow.soft_values(obs[i][None])[0]
            tail = 1e-4 if arm == "student" else 1e-6  # beyond the grid
            torch.testing.assert_close(v, exact, rtol=0, atol=tail)


def test_normal_has_the_mean_and_deviation_of_what_came():
    script = arms.changed_script("normal")
    replay = script.ReplayBuffer(50, 3, 1, 4, "cpu")
    flow = script.make_flow(script.Args(), 3, 1)
    rng = np.random.default_rng(0)
    seen = (5 + 3 * rng.standard_normal((70, 3))).astype(np.float32)
    for obs in seen:
        replay.add(obs, [0.0], obs, 0.0, False)
    torch.testing.assert_close(flow.mean.numpy(), seen.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(flow.scale.numpy(), 1 / seen.std(0), rtol=1e-5, atol=0)
    far = torch.from_numpy(seen[:1]) * 1000
    assert flow.normal(far).abs().max() == 10
    # a resumed buffer tells a new flow
    again = arms.changed_script("normal")
    other = again.ReplayBuffer(50, 3, 1, 4, "cpu")
    new = again.make_flow(again.Args(), 3, 1)
    other.load_state_dict(replay.state_dict())
    assert torch.equal(new.mean, flow.mean)
    assert torch.equal(new.scale, flow.scale)


def test_scaled_divides_by_the_spread_of_returns():
    script = arms.changed_script("scaled")
    replay = script.ReplayBuffer(50, 1, 1, 4, "cpu")
    totals, total = [], 0.0
    for t in range(20):
        reward = 7.0 * (t % 3)
        total = reward if t == 10 else reward + 0.99 * total  # an episode begins at 10
        totals.append(total)
        obs = np.float32([t if t < 10 else t + 100])
        replay.add(obs, [0.0], obs + 1, reward, False)
    scale = max(np.std(totals), max(totals) / 5)
    batch = replay.sample(np.random.default_rng(0))
    index = torch.from_numpy(np.random.default_rng(0).integers(0, 20, 4))
    torch.testing.assert_close(batch[:, -2], replay.rows[index, -2] / scale)
    assert replay.rows[:20, -2].max() == 14  # the rows themselves stay


def test_recent_draws_half_from_the_newest():
    script = arms.changed_script("recent")
    replay = script.ReplayBuffer(30_000, 1, 1, 400, "cpu")
    replay.rows[:, 0] = torch.arange(30_000)
    replay.added = 42_000  # rows 2,000 to 11,999 are the newest 10,000
    batch = replay.sample(np.random.default_rng(0))[:, 0]
    assert batch[:200].min() >= 2_000
    assert batch[:200].max() < 12_000
    assert batch[200:].max() > 20_000


def test_conservative_adds_the_gap_of_v_and_q():
    torch.manual_seed(0)
    flow, script = flow_of("conservative")
    flow.weight.fill_(0.05)
    obs, u = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    q = flow.q_values(obs, u)
    log_prob = flow.log_prob(obs, u)
    gap = -0.05 * flow.alpha * log_prob
    torch.testing.assert_close(q[:, 2], gap)
    target = torch.randn(8).double()
    td = 0.5 * (q[:, :2] - target[:, None]).square().sum(-1).mean()
    torch.testing.assert_close(script.meow_loss(q, target), td + gap.mean())
    replay = script.ReplayBuffer(50, 3, 1, 4, "cpu")
    replay.added = 45_000
    replay.sample(np.random.default_rng(0))
    assert float(flow.weight) == pytest.approx(0.025)


def test_near_weighs_by_the_latents_mean_square():
    torch.manual_seed(0)
    flow, script = flow_of("near", act_dim=2)
    plain = super(type(flow), flow)  # the script's own q_values
    obs = torch.randn(6, 3).double()
    z = torch.tensor([[0.1, 0.5], [2, 2], [2.5, 2], [3, 3], [9, 9], [-2, 2]]).double()
    sigma = torch.sqrt(flow.alpha / flow.kappa(obs))
    u = flow.to_u(sigma * z, obs)
    q, target = flow.q_values(obs, u), torch.randn(6).double()
    torch.testing.assert_close(q[:, :2], plain.q_values(obs, u))
    d = z.square().mean(-1)
    torch.testing.assert_close(q[:, 2], d)
    weight = [1, 1, math.exp((4 - 5.125) / 2), math.exp((4 - 9) / 2), 0.02, 1]
    errors = (q[:, :2] - target[:, None]).square().sum(-1)
    wanted = 0.5 * (torch.tensor(weight).double() * errors).mean()
    torch.testing.assert_close(script.meow_loss(q, target), wanted)


def test_plain_has_no_layer_norm_in_m_and_h():
    obs, u = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    for arm, count in (("base", 0), ("plain", 6)):
        flow, _ = flow_of(arm)
        networks = (*flow.m, flow.h)
        norms = [norm for network in networks for norm in network.norms]
        assert sum(isinstance(norm, torch.nn.Identity) for norm in norms) == count
        flow.q_values(obs, u)
    assert all(isinstance(n, torch.nn.LayerNorm) for t in flow.t for n in t.norms)


def test_bounded_translations_are_at_most_2():
    x, obs = torch.randn(50, 2).double(), torch.randn(50, 3).double()
    largest = {}
    for arm in ("base", "bounded"):
        torch.manual_seed(0)
        flow, _ = flow_of(arm, act_dim=2)
        for network in flow.t:
            network.layers[-1].weight.mul_(20)
        largest[arm] = [flow.translation(i, x, obs).abs().max() for i in range(4)]
    assert min(largest["base"]) > 2
    assert max(largest["bounded"]) <= 2


def test_layers_put_a_layer_norm_before_each_relu():
    script = arms.changed_script("sac+layers")
    for network in script.make_networks(script.Args(), 3, 1):
        kinds = [type(part).__name__ for part in network.modules()]
        assert kinds.count("LayerNorm") == kinds.count("ReLU") > 0


def test_heads_of_a_trunk_differ():
    script = arms.changed_script("trunk")
    flow = script.make_flow(script.Args(), 3, 1)
    shifts = flow.shifts(torch.randn(4, 3))
    assert shifts.shape == (4, 2)
    assert (shifts[:, 0] != shifts[:, 1]).all()


def test_students_actions_have_its_density():
    torch.manual_seed(0)
    flow, script = flow_of("student")
    obs = torch.randn(1, 3).double()
    run, n = SimpleNamespace(args=SimpleNamespace(seed=0)), 100_000
    other = arms.changed_script("base")
    many = obs.expand(n, 3)
    other.make_policy = lambda *_: lambda _, z: flow.sample(many, torch.from_numpy(z))
    arms.student(other)
    policy = other.make_policy(flow, None, n, run, "acting")
    u, log_prob = policy(None, np.random.default_rng(1).standard_normal((n, 1)))
    torch.testing.assert_close(log_prob, flow.log_prob(many, u))
    grid = torch.sinh(torch.linspace(-9, 9, 40_000).double())
    slope = script.log_tanh_slope(grid)
    density = torch.exp(flow.log_prob(obs.expand(40_000, 3), grid[:, None]) + slope)
    middle = float(u.median())
    for bound in (middle - 1, middle - 0.2, middle, middle + 0.1, middle + 0.5):
        below = grid <= bound
        share = float(torch.trapezoid(density[below], grid[below]))
        assert float((u <= bound).double().mean()) == pytest.approx(share, abs=0.006)


def test_straight_couplings_see_the_state_alone():
    torch.manual_seed(0)
    obs, x = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    moved = {}
    for arm in ("base", "straight"):
        flow, _ = flow_of(arm, act_dim=2)
        moved[arm] = (flow.to_u(x, obs) - x) - flow.to_u(0 * x, obs)
    assert moved["straight"].abs().max() < 1e-12
    assert moved["base"].abs().max() > 1e-3


def test_averaged_acts_with_the_running_average():
    script, seen = arms.changed_script("base"), []
    script.make_policy = lambda *given: seen.append(given)
    arms.averaged(script)

    def train():
        learner = ["theta", "theta'"]
        script.make_policy("flow", learner[0], 1, "run", "acting")

    train()
    assert seen == [("flow", "theta'", 1, "run", "acting")]


def test_alpha_moves_by_at_most_a_thousandth():
    for wanted, ends in ((9.0, 0.1 * math.exp(1e-3)), (0.10005, 0.10005)):
        alpha = torch.tensor(0.1, dtype=torch.float64)
        arms.move(alpha, wanted)
        assert float(alpha) == pytest.approx(ends)


def train_with(script, alpha, log_prob, args, **now):
    """Calls `tune` from a function with the variables of `train`."""
    learner, flow = [], now["flow"]
    values, obs, reward = now.get("values"), now.get("obs"), now.get("reward")
    terminated, truncated = now.get("terminated", False), now.get("truncated", False)
    script.tune(alpha, log_prob, args)
    return learner, flow, values, obs, reward, terminated, truncated


def tuner(arm):
    """A flow of this arm, and a function that calls its `tune` and returns alpha."""
    script = arms.changed_script(arm)
    args, alpha = script.Args(), torch.tensor(0.1, dtype=torch.float64)
    flow = script.make_flow(args, 3, 2)

    def call(log_prob=0.0, **now):
        train_with(script, alpha, log_prob, args, flow=flow, **now)
        return float(alpha)

    return flow, call


def test_noise_follows_the_mean_square_of_the_td_error():
    flow, call = tuner("noise")
    assert call(values=torch.tensor([4.004])) == pytest.approx(0.05 * 4.004**0.5)
    call(values=torch.tensor([5.004]))
    assert float(flow.memory) == pytest.approx(4.005)


def test_errors_follow_those_of_the_actions_just_played():
    flow, call = tuner("errors")
    first, second = np.float32([1, 0, 2]), np.float32([0, 3, 1])
    v = [
        float(flow.soft_values(torch.from_numpy(s)[None]).min())
        for s in (first, second)
    ]
    call(log_prob=-0.3, obs=first, reward=9.0)
    q = v[0] + 0.1 * 2 * -0.3  # log pi is per dimension
    assert float(flow.memory[1]) == pytest.approx(q)
    call(obs=second, reward=2.0)
    assert float(flow.memory[0]) == pytest.approx(abs(2 + 0.99 * v[1] - q), rel=1e-6)
    mean, q = flow.memory[:2].tolist()
    call(obs=first, reward=50.0, truncated=True)  # its next state is not known here
    assert float(flow.memory[0]) == mean
    mean, q = flow.memory[:2].tolist()
    call(obs=first, reward=-7.0, terminated=True)
    assert float(flow.memory[0]) == pytest.approx(mean + 1e-3 * (abs(-7 - q) - mean))


def test_returns_follow_the_largest_discounted_one():
    flow, call = tuner("returns")
    rewards, ends = [100, -500, 3, 4], [False, True, False, False]
    for reward, terminated in zip(rewards, ends, strict=True):
        alpha = call(reward=float(reward), terminated=terminated)
    assert flow.memory.tolist() == pytest.approx([4 + 0.99 * 3, 500 - 0.99 * 100])
    assert alpha == pytest.approx(0.1 * math.exp(1e-3 * (-1 + 1 + 1 + 1)))


def test_bound_moves_sigma_max_to_the_entropys_target():
    flow, call = tuner("noise+bound")
    before = float(flow.sigma_max)
    call(log_prob=0.65 + 0.4, values=torch.tensor([4.0]))  # too narrow
    assert float(flow.sigma_max) == pytest.approx(before)  # at its bound already
    call(log_prob=0.65 - 0.4, values=torch.tensor([4.0]))  # too wide
    assert float(flow.sigma_max) == pytest.approx(before * math.exp(-0.4e-3))
    flow.sigma_max.fill_(0.3)
    call(log_prob=0.65 + 9, values=torch.tensor([4.0]))
    assert float(flow.sigma_max) == pytest.approx(0.3 * math.exp(1e-3))
    obs = torch.randn(50, 3)
    assert torch.sqrt(flow.alpha / flow.kappa(obs)).max() <= 0.3003
    assert float(flow.memory) > 0  # alpha is tuned too


def test_held_noise_lasts_some_steps():
    script, seen = arms.changed_script("base"), []
    run = SimpleNamespace(args=script.Args())
    script.make_policy = lambda *_: lambda _, z: seen.append(float(z[0, 0]))
    arms.held(script)
    acting = script.make_policy(None, None, 1, run, "acting")
    for i in range(2000):
        acting(None, np.full((1, 1), i))
    starts = [i for i in range(2000) if i == 0 or seen[i] != seen[i - 1]]
    assert all(seen[i] == i for i in starts)
    lengths = np.diff(starts)
    assert 0.5 < (lengths == 1).mean() < 0.7  # 1 / zeta(2) = 0.61
    assert lengths.max() > 10
    evaluation = script.make_policy(None, None, 1, run, "evaluation")
    evaluation(None, np.full((1, 1), -1.0))
    assert seen[-1] == -1


@pytest.mark.parametrize("arm", [*MEOW, "sac+normal+scaled+layers"])
def test_a_run_of_an_arm_goes_on(arm, tmp_path):
    """From a checkpoint at step 46, exactly (but for the noise that is held)."""
    (tmp_path / "whole").mkdir()
    assert launch([arm, *quick()], tmp_path / "whole")[0] == 0
    words = [arm, *quick(resume="auto")]
    code, _ = launch(words, tmp_path, {46: signal.SIGTERM})
    assert code == 128 + signal.SIGTERM
    code, said = launch(words, tmp_path)
    assert code == 0, said
    if arm not in DRAWING_ANEW:
        assert metrics(only_run(tmp_path)) == metrics(only_run(tmp_path / "whole"))
    assert f"_{arm.replace('sac+', '').replace('+', '_')}__1__" in said


def test_drift_of_a_run(tmp_path, capsys, monkeypatch):
    """Of actions that the policy has just played, d is the mean square of its noise."""
    assert launch(["base", *quick(exp_name="meow_auto")], tmp_path)[0] == 0
    folder = only_run(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    d, error, alpha = drift.latents_and_errors(saved)
    assert d.shape == error.shape == (60,)
    assert (d >= 0).all()
    assert alpha == saved["alpha"][0]
    # an action of this very policy
    flow = drift.script.make_flow(drift.script.Args(**saved["args"]), *saved["sizes"])
    flow.load_state_dict(saved["flow"])
    row = saved["replay"]["rows"][:1]
    z = torch.tensor([[1.5]])
    row[0, 4:5] = flow.sample(row[:, :4], z)[0][0]
    assert float(drift.latents_and_errors(saved)[0][0]) == pytest.approx(2.25, rel=1e-3)
    monkeypatch.setattr(sys, "argv", ["drift.py", str(folder)])
    assert drift.main() == 0
    assert "recent actions: median d" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["drift.py", str(tmp_path / "nothing")])
    assert drift.main() == 2


def test_slopes_are_of_the_true_simulator(tmp_path, capsys, monkeypatch):
    """y is that of real steps; a policy that knows it has correlation 1."""
    words = quick(env_id="Hopper-v4", exp_name="meow_auto")
    assert launch(["base", *words], tmp_path)[0] == 0
    folder = only_run(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    y, q = slopes.values_of_actions(saved, 3)
    assert y.shape == q.shape == (3, 32, 2)
    assert y.mean(1).abs().max() < 1e-5
    assert (y.std(1) > 0).all()
    assert slopes.correlation(y, 3 * y) == pytest.approx(1)
    # y of an action by hand, with values of the next state
    flow, args = slopes.flow_of(saved)
    env = slopes.script.make_env(args).env
    env.reset(seed=0)
    state, u = slopes.simulator_state(env), torch.tensor([[0.3, -0.2, 0.1]])
    next_obs, reward, terminated, _, _ = env.step(np.tanh(u[0].numpy()))
    worth = slopes.worth(flow, env, state, u, 0.9)
    v = flow.soft_values(torch.from_numpy(next_obs).float()[None])
    assert not terminated
    torch.testing.assert_close(worth, reward + 0.9 * v)
    monkeypatch.setattr(sys, "argv", ["slopes.py", str(folder), "--states", "2"])
    assert slopes.main() == 0
    assert "correlation of Q and y" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["slopes.py", str(tmp_path / "nothing")])
    assert slopes.main() == 2


def test_a_wrong_word_says_which_there_are(tmp_path):
    code, _ = launch(["nonsense"], tmp_path)
    assert "nonsense is not one of base, sac, normal" in code
    for arm in ("layers", "sac+near"):
        code, _ = launch([arm, *quick()], tmp_path)
        assert "is no change of" in code
