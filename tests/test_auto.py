"""MEow without tuning: its identities at every temperature, what moves it, updates."""

import copy
import math

import numpy as np
import pytest
import torch
from stepped_run import RANDOM_STEPS, check_average, random_batch, trained
from torch.autograd.functional import jacobian

import meow_auto_continuous_action as auto
from harness import environments
from harness.compiling import Compiler, flatten_parameters

EXACT = dict(rtol=0, atol=1e-8)
ALPHAS = [0.003, 0.1, 2.0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_flow(obs_dim=3, act_dim=2, alpha=None, **settings):
    """A float64 flow whose every parameter is random; alpha: moved there afterwards."""
    args = auto.Args(**dict(sigma_max=7.4) | settings)
    flow = auto.make_flow(args, obs_dim, act_dim).double()
    for p in flow.parameters():
        p.add_(0.1 * torch.randn_like(p))
    if alpha is not None:
        flow.alpha.fill_(alpha)
    return flow, args


def integral_of_exp_q(flow, obs, u):
    """int exp(Q/alpha) da over (-1, 1)^A by trapezoids in u = atanh(a)."""
    grids = torch.meshgrid(*[u] * flow.act_dim, indexing="ij")
    points = torch.stack([grid.flatten() for grid in grids], dim=-1)
    q = flow.q_values(obs.expand(len(points), -1), points)
    density = torch.exp(q / flow.alpha + auto.log_tanh_slope(points).sum(-1))
    return density.sum() * (u[1] - u[0]) ** flow.act_dim


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("act_dim", "points"), [(1, 4001), (2, 301)])
def test_soft_value_is_the_integral_at_every_temperature(alpha, act_dim, points):
    """V = alpha log int exp(Q/alpha) da, of one network whose alpha was moved."""
    flow, _ = make_flow(act_dim=act_dim, alpha=alpha, sigma_start=0.5)
    obs = torch.randn(1, 3).double()
    value = flow.soft_values(obs)[0]
    sigma = float(torch.sqrt(flow.alpha / flow.kappa(obs)).max())
    centre = float(flow.to_u(torch.zeros(1, act_dim).double(), obs).abs().max())
    reach = centre + 8 * sigma + 2
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    integral = integral_of_exp_q(flow, obs, grid)
    assert abs(value - alpha * torch.log(integral)) < 1e-5 * max(1, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_policy_is_exp_of_q_minus_v(alpha):
    flow, _ = make_flow(5, 3, alpha=alpha)
    obs = torch.randn(64, 5).double()
    u, log_prob = flow.sample(obs)
    torch.testing.assert_close(flow.log_prob(obs, u), log_prob, **EXACT)
    difference = flow.q_values(obs, u) - flow.soft_values(obs)
    torch.testing.assert_close(difference, alpha * log_prob, **EXACT)


def test_the_critic_stays_when_alpha_moves():
    """m and kappa don't see it: Q moves by the tanh term and kappa's floor."""
    flow, args = make_flow(alpha=0.1)
    obs, u = torch.randn(16, 3).double(), torch.randn(16, 2).double()
    q, m, kappa = flow.q_values(obs, u), flow.m(obs), flow.kappa(obs)
    flow.alpha.fill_(0.3)
    torch.testing.assert_close(flow.m(obs), m, **EXACT)
    floor = 0.2 / args.sigma_max**2
    torch.testing.assert_close(flow.kappa(obs), kappa + floor, **EXACT)
    x = flow.to_x(u, obs)
    moved = 0.5 * floor * x.square().sum(-1) + 0.2 * auto.log_tanh_slope(u).sum(-1)
    torch.testing.assert_close(flow.q_values(obs, u), q - moved, **EXACT)


def test_the_values_derivative_by_alpha_is_the_entropy():
    """For fixed kappa, dV/dalpha = 1/2 sum log(2 pi e alpha / kappa), u's entropy."""
    flow, _ = make_flow(sigma_max=1e6)  # no floor
    obs, values = torch.randn(8, 3).double(), []
    for alpha in (0.1 - 1e-5, 0.1 + 1e-5):
        flow.alpha.fill_(alpha)
        values.append(flow.soft_values(obs))
    flow.alpha.fill_(0.1)
    slope = (values[1] - values[0]) / 2e-5
    entropy = 0.5 * torch.log(2 * math.pi * math.e * 0.1 / flow.kappa(obs)).sum(-1)
    torch.testing.assert_close(slope, entropy, rtol=1e-5, atol=1e-5)
    z = torch.randn(100_000, 2).double()
    u, log_prob = flow.sample(obs[:1].expand(len(z), -1), z)
    sampled = -(log_prob + auto.log_tanh_slope(u).sum(-1)).mean()
    torch.testing.assert_close(sampled, entropy[0], rtol=0, atol=0.03)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_round_trips_and_volume(alpha):
    """g^-1(g(u)) = u, |det dg/du| = 1, sigma at most its bound."""
    flow, args = make_flow(4, 3, alpha=alpha)
    obs, u = torch.randn(1, 4).double(), torch.randn(1, 3).double()
    torch.testing.assert_close(flow.to_u(flow.to_x(u, obs), obs), u, **EXACT)
    slope = jacobian(lambda u: flow.to_x(u, obs), u)[0, :, 0]
    assert torch.linalg.slogdet(slope)[1].abs() < 1e-9
    for p in flow.h.parameters():
        p.normal_(0, 30)
    sigma = torch.sqrt(flow.alpha / flow.kappa(100 * torch.randn(999, 4).double()))
    assert sigma.max() <= args.sigma_max + 1e-9


def test_samples_follow_the_density():
    """Histogram of 50,000 samples against exp(log_prob): chi^2 within 5 s.d."""
    flow, _ = make_flow(2, 1, alpha=0.05, sigma_start=0.5)
    obs, n, bins = torch.randn(1, 2).double(), 50_000, 60
    u = flow.sample(obs.expand(n, -1))[0][:, 0]
    counts = np.histogram(torch.tanh(u).numpy(), bins=bins, range=(-1, 1))[0]
    fine = torch.linspace(-1, 1, bins * 50 + 1, dtype=torch.float64)
    middle = torch.atanh((fine[1:] + fine[:-1])[:, None] / 2)
    density = torch.exp(flow.log_prob(obs.expand(len(middle), -1), middle)).numpy()
    expected = n * density.reshape(bins, 50).mean(1) * 2 / bins
    full = expected > 20
    assert expected[full].sum() > 0.98 * n
    chi2 = ((counts - expected)[full] ** 2 / expected[full]).sum()
    assert chi2 < full.sum() + 5 * math.sqrt(2 * full.sum())


def test_the_policy_starts_around_zero_as_wide_as_asked():
    for settings in ({}, {"temperature": 1.5, "sigma_start": 1.5, "sigma_max": 7.4}):
        args = auto.Args(**settings)
        flow = auto.make_flow(args, 4, 3)
        sigma = torch.sqrt(flow.alpha / flow.kappa(torch.randn(9, 4)))
        torch.testing.assert_close(sigma, torch.full((9, 3), args.sigma_start))
        assert (flow.m(torch.randn(9, 4)) == 0).all()
        assert (flow.mode_action(torch.randn(9, 4)) == 0).all()


@pytest.mark.parametrize("act_dim", [1, 5])
def test_the_noise_costs_the_same_in_any_number_of_dimensions(act_dim):
    """Q falls by rho / 2 on average, but for the tanh term, whatever the network."""
    flow, args = make_flow(3, act_dim, temperature=0.3)
    obs = torch.randn(1, 3).double().expand(20_000, -1)

    def q_without_tanh(u):
        return flow.q_values(obs, u) + flow.alpha * auto.log_tanh_slope(u).sum(-1)

    u, _ = flow.sample(obs)
    mode, _ = flow.sample(obs, torch.zeros_like(u))
    cost = q_without_tanh(mode) - q_without_tanh(u)
    assert float(cost.mean()) == pytest.approx(args.temperature / 2, rel=0.05)


def test_curvature_is_bounded():
    """kappa_0 exp(10 tanh(h/10)) + alpha / sigma_max^2, for the largest h too."""
    flow, args = make_flow(3, 2)
    obs = torch.randn(5, 3).double()
    floor = flow.alpha / args.sigma_max**2
    kappa_0 = math.exp(flow.log_kappa_start)
    for h in (-1e3, -3.0, 0.0, 3.0, 1e3):
        flow.h.forward = lambda obs, h=h: obs.new_full((len(obs), 2), h)
        expected = floor + kappa_0 * math.exp(10 * math.tanh(h / 10))
        torch.testing.assert_close(flow.kappa(obs), expected.double().expand(5, 2))


# --- The unit of rewards --------------------------------------------------------------
@pytest.mark.parametrize(
    ("rewards", "unit"),
    [
        ([2.0, 12.0], 5),  # the deviation
        ([-90.0, -110.0], 10),  # both the same
        ([99.0, 101.0], 10),  # a tenth of the mean
        ([-3.0, -3.0, -3.0], 0.3),
        ([0.0, 0.0], 1),
    ],
)
def test_rewards_are_measured_by_their_deviation(rewards, unit):
    moments = auto.RunningMeanStd(1)
    for reward in rewards:
        moments.update(torch.tensor([[reward]], dtype=torch.float64))
    assert float(auto.reward_unit(moments)) == pytest.approx(unit)


@pytest.mark.parametrize("factor", [64.0, 2.0**-20])
def test_the_unit_of_rewards_changes_no_bit(factor, monkeypatch):
    """By a power of 2, which rounds nothing: the same updates, the same policy."""
    run, step = trained(auto, 4), environments.ReplayableEnv.step

    def scaled_step(self, action):
        obs, reward, *rest = step(self, action)
        return obs, factor * reward, *rest

    monkeypatch.setattr(environments.ReplayableEnv, "step", scaled_step)
    other = trained(auto, 4)
    rewards, others = (x.replay.rows[: RANDOM_STEPS + 4, -2] for x in (run, other))
    assert torch.equal(others, factor * rewards)
    for ours, theirs in zip(run.metrics, other.metrics, strict=True):
        if ours:
            ours["flow/reward_unit"] *= factor
        assert ours == theirs
    for one, two in zip(run.parts["learner"], other.parts["learner"], strict=True):
        assert torch.equal(one, two)


# --- The temperature ------------------------------------------------------------------
def test_alpha_grows_while_the_policy_is_narrow():
    """By at most eta; it stays where the entropy is the target's."""
    args = auto.Args(target_entropy=-0.5, alpha_lr=0.01)
    for log_prob, moved in ((0.5, 0), (0.8, 0.3), (9, 1), (0.2, -0.3), (-9, -1)):
        alpha = torch.tensor(0.1, dtype=torch.float64)
        auto.follow_entropy(alpha, log_prob, args)
        assert math.log(alpha / 0.1) == pytest.approx(0.01 * moved)
    alpha = torch.tensor(1e-6)
    auto.follow_entropy(alpha, -9, args)
    assert alpha > 0


@pytest.mark.parametrize("start", [0.01, 1.0])
def test_the_dual_comes_to_rest_at_the_target_entropy(start):
    """With the critic fixed, from both sides."""
    flow, args = make_flow(alpha=start, alpha_lr=0.01, target_entropy=-0.4)
    obs, alphas = torch.randn(1, 3).double(), []
    for _ in range(4000):
        log_prob = float(flow.sample(obs)[1]) / 2
        auto.follow_entropy(flow.alpha, log_prob, args)
        alphas.append(float(flow.alpha))
    flow.alpha.fill_(np.mean(alphas[-2000:]))
    log_probs = flow.sample(obs.expand(20_000, -1))[1] / 2
    assert abs(-log_probs.mean() + 0.4) < 0.1


# --- The loss -------------------------------------------------------------------------
def test_the_policys_own_actions_are_at_distance_one():
    """d is the mean square of the latent z that the action was made of."""
    flow, _ = make_flow(3, 4, alpha=0.03)
    obs, z = torch.randn(500, 3).double(), torch.randn(500, 4).double()
    u, _ = flow.sample(obs, z)
    q, d = flow.q_and_distance(obs, u)
    torch.testing.assert_close(d, z.square().mean(-1))
    assert float(d.mean()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(q, flow.q_values(obs, u), **EXACT)


def test_a_far_action_worth_more_weighs_less():
    """One that is worth less than Q says weighs in full."""
    d = torch.tensor([0.0, 1, 4, 5, 8, 50]).double()
    weight = torch.tensor([1, 1, 1, math.exp(-0.5), math.exp(-2), 0.02]).double()
    torch.testing.assert_close(auto.far_weight(d), weight)
    q = torch.randn(6).double()
    for error, w in ((3.0, weight), (-3.0, torch.ones(6).double())):
        d.requires_grad_(True)
        q = q.detach().requires_grad_(True)
        loss = auto.meow_loss(q, d, q.detach() + error)
        torch.testing.assert_close(loss.detach(), (0.5 * w * 9).mean())
        slope_q, slope_d = torch.autograd.grad(loss, [q, d], allow_unused=True)
        torch.testing.assert_close(slope_q, -w * error / 6)
        assert slope_d is None


# --- Training -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_update_against_autograd_and_torch_optim(compiled):
    """Updates equal ordinary PyTorch's while alpha moves; it gets no gradient."""
    settings = dict(learning_rate=1e-2, tau=0.1, max_grad_norm=0.05, sigma_start=0.9)
    network, args = make_flow(5, 3, **settings)
    flow, target_flow = copy.deepcopy(network), copy.deepcopy(network)
    flow.requires_grad_(True)
    theta = flatten_parameters(network)
    state = [theta, theta.clone(), *auto.adam_moments(theta)]
    batch, kept = random_batch(), torch.rand(4, 2, 32, 64) > 0.1
    compiler = Compiler(compiled, torch.device("cpu"), on_pause=print)
    function = auto.make_update(network, args)
    update = compiler("the update", function, *state, batch, kept)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    weights = []
    for alpha in (0.1, 0.1, 0.02, 0.5):
        for module in (network, flow, target_flow):
            module.alpha.fill_(alpha)
        metrics = update()

        obs, u, next_obs, reward, terminated = auto.split_batch(batch, 5, 3)
        v_next = target_flow.soft_values(next_obs)
        y = reward + 0.99 * (1 - terminated) * v_next
        q, d = flow.q_and_distance(obs, u, kept)
        w = torch.exp((4 - d.detach()) / 2).clamp(0.02, 1)
        w[y <= q] = 1
        weights += w.tolist()
        loss = 0.5 * (w * (q - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.05)
        optimizer.step()
        pairs = zip(flow.parameters(), target_flow.parameters(), strict=True)
        for p, p_target in pairs:
            p_target.copy_(0.9 * p_target + 0.1 * p.detach())
        assert metrics[:2].tolist() == pytest.approx([loss.item(), norm.item()])
        means = [q.mean(), v_next.mean(), y.mean(), d.median()]
        assert metrics[2:].tolist() == pytest.approx([m.item() for m in means])
        for vector, module in zip(state, (flow, target_flow), strict=False):
            expected = torch.nn.utils.parameters_to_vector(module.parameters())
            torch.testing.assert_close(vector, expected.detach(), rtol=1e-6, atol=1e-8)
    assert min(weights) == 0.02
    assert any(0.02 < w < 1 for w in weights)


@pytest.mark.parametrize(("n", "recent_size"), [(80, 30), (150, 30), (20, 30)])
def test_half_of_a_batch_is_of_the_newest(n, recent_size):
    """Of n transitions in a ring of 100, each as often as it should be."""
    replay = auto.RecentReplayBuffer(recent_size, 100, 1, 1, 60_000, "cpu")
    for i in range(n):
        replay.add([i], [0], [0], 0, False)
    drawn = replay.sample(np.random.default_rng(0))[:, 0].long()
    for half, kept in (drawn[:30_000], recent_size), (drawn[30_000:], 100):
        counts = torch.bincount(half, minlength=n)
        kept = min(kept, n)
        assert counts[: n - kept].sum() == 0
        expected = 30_000 / kept
        assert (counts[-kept:] - expected).abs().max() < 6 * expected**0.5


def test_without_recent_ones_a_batch_is_drawn_evenly():
    sizes = 50, 1, 1, 8, "cpu"
    buffers = auto.ReplayBuffer(*sizes), auto.RecentReplayBuffer(0, *sizes)
    for replay in buffers:
        for i in range(70):
            replay.add([i], [0], [0], 0, False)
    batches = [replay.sample(np.random.default_rng(0)) for replay in buffers]
    assert torch.equal(*batches)


def test_the_average_of_theta_is_evaluated_and_saved():
    """Of b = 1 it is theta."""
    thetas = []

    def look(run):
        thetas.append(run.parts["learner"][0].clone())

    run = trained(auto, 4, after=look, policy_average=0.25)
    check_average(run, thetas, RANDOM_STEPS - 1)
    run = trained(auto, 4, policy_average=1)
    assert torch.equal(run.tensors["evaluation"][0], run.tensors["acting"][0])


def test_acting_stores_u():
    """The policy sees normalised observations, the buffer has its u, the environment
    gets tanh(u)."""
    policies = []
    run = trained(auto, 3, after=lambda run: policies.append(copy.deepcopy(run.policy)))
    rng = np.random.default_rng(run.args.seed)
    rng.uniform(-1, 1, (RANDOM_STEPS, 3))
    z = torch.from_numpy(rng.standard_normal((1, 3), dtype=np.float32))
    obs, u = run.replay.rows[RANDOM_STEPS, None].split([5, 3, 7], -1)[:2]
    before, after = policies[RANDOM_STEPS - 1 : RANDOM_STEPS + 1]
    normal = after["norm"](obs)  # it has this observation
    expected, _ = before["flow"].sample(normal, z)
    torch.testing.assert_close(u, expected, rtol=1e-5, atol=1e-6)
    played = torch.from_numpy(run.env.current.actions[0])
    torch.testing.assert_close(played, torch.tanh(u[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autotune", [False, True])
def test_alpha_moves_only_when_asked(autotune):
    run = trained(auto, 1, autotune=autotune, alpha_lr=0.1)
    log_prob = -run.metrics[-1]["flow/entropy"] / 3
    alpha = torch.tensor(run.args.temperature / 3)
    if autotune:
        auto.follow_entropy(alpha, log_prob, run.args)
        assert alpha != np.float32(run.args.temperature / 3)
    torch.testing.assert_close(run.policy["flow"].alpha, alpha)


def test_batches_are_normalised_and_the_buffer_is_not():
    """Each observation that was acted on counts once, clipped to 5 deviations."""
    run = trained(auto, 1)
    rows, norm = run.replay.rows, run.policy["norm"]
    obs = rows[: RANDOM_STEPS + 1, :5]
    torch.testing.assert_close(norm.mean, obs.double().mean(0))
    assert float(norm.count) == RANDOM_STEPS + 1
    for part in (slice(0, 5), slice(8, 13)):
        stored = norm(rows[: RANDOM_STEPS + 1, part])
        for row in run.replay.batch[:, part]:
            assert (row - stored).abs().sum(-1).min() < 1e-5
    far = 1e6 * torch.ones(1, 5)
    assert (norm(far) == 5).all()


def test_rewards_of_a_batch_are_in_their_unit():
    """That of all rewards before the step; the buffer keeps them as they came."""
    units = []

    def look(run):
        units.append(auto.reward_unit(run.parts["rewards"]).item())

    run = trained(auto, 1, after=look)
    before = run.replay.rows[:RANDOM_STEPS, -2]
    deviation = float(before.double().std(correction=0))
    unit = max(deviation, abs(float(before.double().mean())) / 10)
    assert units[RANDOM_STEPS - 1] == pytest.approx(unit)
    for reward in run.replay.batch[:, -2]:
        assert (before / unit - reward).abs().min() < 1e-5


def test_a_restored_run_goes_on_exactly():
    """With temperature, average of theta and unit of the rewards where they were."""
    checkpoints = []
    moving = dict(autotune=True, policy_average=0.3, recent_size=20)

    def keep(run):
        checkpoints.append(run.checkpointed())

    whole = trained(auto, 6, after=keep, **moving)
    rest = trained(auto, 6, restored=checkpoints[RANDOM_STEPS + 2], **moving)
    assert rest.metrics == whole.metrics[-3:]
    assert len({m["flow/alpha"] for m in rest.metrics}) == 3
    assert rest.policy["flow"].alpha == whole.policy["flow"].alpha
    for name in ("flow", "rewards", "norm"):
        parts = [(run.parts | run.policy)[name] for run in (rest, whole)]
        states = [part.state_dict() for part in parts]
        torch.testing.assert_close(*states, rtol=0, atol=0)
