"""The flow's identities against integration, autograd and sampling."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

import meow_continuous_action
import meow_isaacgym
from meow_continuous_action import (
    Args,
    EnergyFlow,
    log_prior,
    log_tanh_slope,
)

OPTIONS = [
    {},
    {"coupling": "affine"},
    {"reward_shifting": "single"},
    {"reward_shifting": "none"},
]
EXACT = dict(rtol=0, atol=1e-8)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def integral_of_exp_q(flow, obs, u):
    """int exp(Q_1/alpha) da over (-1, 1)^A: trapezoids in u = atanh(a), da = (1 -
    a^2) du.
    """
    act_dim = flow.masks.shape[1]
    grids = torch.meshgrid(*[u] * act_dim, indexing="ij")
    points = torch.stack([g.flatten() for g in grids], dim=-1)
    with torch.no_grad():
        q = flow.q_values(obs.expand(len(points), -1), torch.tanh(points))[:, 0]
    density = torch.exp(q / flow.alpha + log_tanh_slope(points).sum(-1))
    return density.sum() * (u[1] - u[0]) ** act_dim


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("alpha", "low", "high"), [(0.25, -5.0, -0.3), (2.5, -2.0, 0.5)]
)
@pytest.mark.parametrize(("act_dim", "points"), [(1, 2001), (2, 161)])
def test_soft_value_is_the_integral(
    make_random_flow, alpha, low, high, options, act_dim, points
):
    """V = alpha log int exp(Q/alpha) da, the identity that makes MEow exact."""
    if act_dim == 2:
        low = max(low, -1.5)  # the coarser grid resolves sigma down to e^-1.5
    flow = make_random_flow(3, act_dim, alpha, low, high, **options)
    obs = torch.randn(1, 3, dtype=torch.float64)
    value = flow.soft_values(obs)[0, 0]
    integral = integral_of_exp_q(
        flow, obs, torch.linspace(-13, 13, points, dtype=torch.float64)
    )
    assert abs(value - alpha * torch.log(integral)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-8), (torch.float32, 1e-3)]
)
@pytest.mark.parametrize("script", [meow_continuous_action, meow_isaacgym])
def test_what_others_may_import(script, dtype, tol):
    """EnergyFlow(obs_dim, act_dim, args) in both precisions."""
    torch.manual_seed(0)
    args = script.Args(alpha=0.25, log_sigma_min=-2.0, log_sigma_max=0.5)
    flow = script.EnergyFlow(3, 1, args).to(dtype)
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs = torch.randn(9, 3, dtype=dtype)
    action, log_prob = flow.sample(obs)
    q, v = flow.q_values(obs, action), flow.soft_values(obs)
    assert (action.shape, log_prob.shape, q.shape, v.shape) == (
        (9, 1),
        (9,),
        (9, 2),
        (9, 2),
    )
    assert {x.dtype for x in (action, log_prob, q, v)} == {dtype}
    close = dict(rtol=0, atol=tol)
    torch.testing.assert_close(flow.log_prob(obs, action), log_prob, **close)
    torch.testing.assert_close(q - v, 0.25 * log_prob[:, None].expand(9, 2), **close)
    torch.testing.assert_close(flow.mode_action(obs), flow.sample(obs, 0 * action)[0])
    torch.testing.assert_close(q[:, 0] - q[:, 1], v[:, 0] - v[:, 1], **close)
    integral = integral_of_exp_q(
        flow, obs[:1], torch.linspace(-10, 10, 2001, dtype=dtype)
    )
    assert abs(v[0, 0] - 0.25 * torch.log(integral)) < tol


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("act_dim", [1, 2, 3, 8])
def test_q_v_and_log_prob(make_random_flow, act_dim, options):
    """Q_k - V_k = alpha log pi for each shift; sampled log-probabilities are those of
    log_prob.
    """
    flow = make_random_flow(5, act_dim, **options)
    obs = torch.randn(64, 5, dtype=torch.float64)
    action, log_prob = flow.sample(obs)
    assert action.shape == (64, act_dim)
    torch.testing.assert_close(flow.log_prob(obs, action), log_prob, **EXACT)
    q, v = flow.q_values(obs, action), flow.soft_values(obs)
    n_values = 1 if options.get("reward_shifting") in ("single", "none") else 2
    assert q.shape == v.shape == (64, n_values)
    torch.testing.assert_close(
        q - v, (flow.alpha * log_prob)[:, None].expand_as(q), **EXACT
    )


def test_units_of_the_shifts(make_random_flow):
    """If a network's output grows by 3, Q_k and V_k grow by 3 alpha; log pi doesn't."""
    flow = make_random_flow(3, 2, alpha=0.1)
    obs, action = torch.randn(6, 3).double(), torch.rand(6, 2).double() - 0.5
    q, v, log_prob = (
        flow.q_values(obs, action),
        flow.soft_values(obs),
        flow.log_prob(obs, action),
    )
    flow.b[0].layers[-1].bias.data += 3.0
    moved = torch.tensor([0.3, 0.0], dtype=torch.float64).expand(6, 2)
    torch.testing.assert_close(flow.q_values(obs, action) - q, moved, **EXACT)
    torch.testing.assert_close(flow.soft_values(obs) - v, moved, **EXACT)
    torch.testing.assert_close(flow.log_prob(obs, action), log_prob, rtol=0, atol=0)


def test_additive_couplings_have_volume_1(make_random_flow):
    """Their Jacobian's determinant is 1, as `to_prior` says by giving 0; affine:
    exp(s).
    """
    for options in OPTIONS[:2]:
        flow = make_random_flow(3, 4, **options)
        obs, x = torch.randn(1, 3).double(), torch.randn(1, 4).double()
        zero = torch.zeros(1).double()
        for method in (flow.to_prior, flow.from_prior):
            slope = jacobian(lambda x: method(x, zero, obs)[0], x)[0, :, 0]  # noqa: B023
            expected = torch.linalg.slogdet(slope)[1]
            found = method(x, zero, obs)[1][0]
            torch.testing.assert_close(found, expected, **EXACT)
            assert (found == 0) == (options == {})


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-7), (torch.float32, 1e-3)]
)
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("act_dim", [1, 2, 5])
def test_log_determinants_are_those_of_the_jacobian(
    make_random_flow, act_dim, options, dtype, tol
):
    flow = make_random_flow(4, act_dim, low=-1.0, high=0.3, **options).to(dtype)
    obs, z = torch.randn(1, 4, dtype=dtype), 0.5 * torch.randn(1, act_dim, dtype=dtype)
    action, nonlinear, linear = flow.to_action(obs, z)
    det = torch.linalg.slogdet(
        jacobian(lambda z: flow.to_action(obs, z)[0], z)[0, :, 0]
    )[1]
    close = dict(rtol=tol, atol=tol)
    torch.testing.assert_close(nonlinear + linear, det[None], **close)
    back, nonlinear_back, linear_back = flow.to_latent(obs, action)
    det = torch.linalg.slogdet(
        jacobian(lambda a: flow.to_latent(obs, a)[0], action)[0, :, 0]
    )[1]
    torch.testing.assert_close(nonlinear_back + linear_back, det[None], **close)
    torch.testing.assert_close(back, z, **close)
    torch.testing.assert_close(nonlinear_back, -nonlinear, **close)
    torch.testing.assert_close(linear_back, -linear, **close)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_linear_determinant_ignores_the_action(make_random_flow, options):
    flow = make_random_flow(4, 3, **options)
    obs = torch.randn(1, 4, dtype=torch.float64).expand(16, -1)
    linear = flow.to_latent(obs, torch.rand(16, 3, dtype=torch.float64) * 2 - 1)[2]
    assert (linear == linear[0]).all()
    torch.testing.assert_close(linear, -flow.log_sigma(obs).sum(-1), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_gradients(make_random_flow, options):
    """d/da and d/ds of Q, V and log pi against finite differences."""
    flow = make_random_flow(3, 3, **options)
    obs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    action = (torch.rand(4, 3, dtype=torch.float64) * 1.6 - 0.8).requires_grad_()
    for function, inputs in (
        (flow.q_values, (obs, action)),
        (flow.log_prob, (obs, action)),
        (flow.soft_values, (obs,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda z, s: flow.to_action(s, z)[0], (action, obs))


def test_samples_follow_the_density(make_random_flow):
    """Histogram of 50,000 samples against exp(log_prob): chi^2 within 5 standard
    deviations.
    """
    flow = make_random_flow(2, 1, low=-2.0, high=0.5)
    obs, n, bins = torch.randn(1, 2, dtype=torch.float64), 50_000, 60
    torch.manual_seed(1)
    with torch.no_grad():
        samples = flow.sample(obs.expand(n, -1))[0][:, 0].numpy()
        fine = torch.linspace(-1, 1, bins * 50 + 1, dtype=torch.float64)
        middle = (fine[1:] + fine[:-1])[:, None] / 2
        density = torch.exp(flow.log_prob(obs.expand(len(middle), -1), middle)).numpy()
    expected = n * density.reshape(bins, 50).mean(1) * 2 / bins
    counts = np.histogram(samples, bins=bins, range=(-1, 1))[0]
    full = expected > 20
    assert expected[full].sum() > 0.99 * n
    chi2 = ((counts - expected)[full] ** 2 / expected[full]).sum()
    assert chi2 < full.sum() + 5 * math.sqrt(2 * full.sum())


def test_mode_action_is_the_mode_before_tanh(make_random_flow):
    flow = make_random_flow(3, 2)
    obs = torch.randn(8, 3, dtype=torch.float64)
    mode = flow.mode_action(obs)
    latent, nonlinear, linear = flow.to_latent(obs, mode)
    torch.testing.assert_close(latent, torch.zeros_like(latent), rtol=0, atol=1e-9)
    before_tanh = (
        log_prior(latent)
        + nonlinear
        + log_tanh_slope(torch.atanh(mode)).sum(-1)
        + linear
    )
    for _ in range(20):
        action = flow.sample(obs)[0]
        latent, nonlinear, linear = flow.to_latent(obs, action)
        other = (
            log_prior(latent)
            + nonlinear
            + log_tanh_slope(torch.atanh(action)).sum(-1)
            + linear
        )
        assert (other < before_tanh).all()


def test_rows_are_independent(make_random_flow):
    """Permuting a batch permutes the results; single rows and odd batches work."""
    flow = make_random_flow(4, 3)
    obs = torch.randn(7, 4, dtype=torch.float64)
    action = flow.sample(obs)[0].detach()
    q, order = flow.q_values(obs, action), torch.randperm(7)
    torch.testing.assert_close(flow.q_values(obs[order], action[order]), q[order])
    torch.testing.assert_close(flow.q_values(obs[:1], action[:1]), q[:1])
    torch.testing.assert_close(
        flow.soft_values(obs[order]), flow.soft_values(obs)[order]
    )


def test_soft_values_never_run_the_flow(make_random_flow, monkeypatch):
    flow = make_random_flow(4, 3)
    fail = lambda *_: pytest.fail("the flow ran")  # noqa: E731
    monkeypatch.setattr(EnergyFlow, "translation", fail)
    assert flow.soft_values(torch.randn(5, 4, dtype=torch.float64)).shape == (5, 2)


def test_one_flow_pass_gives_both_q_values(make_random_flow, monkeypatch):
    flow, calls, original = make_random_flow(4, 3), [], EnergyFlow.translation
    monkeypatch.setattr(
        EnergyFlow, "translation", lambda *a: (calls.append(a[1]), original(*a))[1]
    )
    assert flow.q_values(
        torch.randn(5, 4).double(), torch.zeros(5, 3).double()
    ).shape == (5, 2)
    assert calls == [3, 2, 1, 0]


def test_initial_network():
    """The paper's: orthogonal couplings, zero h and b, beta = 1, sigma within its
    bounds.
    """
    flow = EnergyFlow(11, 3, Args())
    weight = flow.t[0].layers[1].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(64), rtol=0, atol=1e-5)
    for mlp in (flow.h, *flow.b):
        assert all(
            (layer.weight == 0).all() and (layer.bias != 0).any()
            for layer in mlp.layers
        )
        assert all(isinstance(norm, torch.nn.Identity) for norm in mlp.norms)
    assert all(isinstance(norm, torch.nn.LayerNorm) for norm in flow.t[3].norms)
    assert all(
        (s.beta == 1).all() for mlp in (flow.h, *flow.t, *flow.b) for s in mlp.swishes
    )
    widths = [
        [x.out_features for x in mlp.layers] for mlp in (flow.t[0], flow.h, flow.b[1])
    ]
    assert widths == [[64, 64, 3], [64, 64, 3], [256, 256, 1]]
    for p in flow.h.parameters():
        p.data.normal_(0, 10)
    log_sigma = flow.log_sigma(torch.randn(1000, 11) * 100)
    assert log_sigma.min() >= -5.0
    assert log_sigma.max() <= -0.3
    assert log_sigma.max() - log_sigma.min() > 4.6


def test_masks_alternate(make_random_flow):
    """Coupling i moves the units where its mask is 0 and reads only those where it is
    1.
    """
    flow = make_random_flow(2, 3)
    obs, x = torch.randn(1, 2).double(), torch.randn(1, 3).double()
    for i, mask in enumerate([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]]):
        mask = torch.tensor(mask).bool()
        slope = jacobian(lambda x, i=i: flow.translation(i, x, obs), x)[0, :, 0]
        assert (slope[mask] == 0).all()
        assert (slope[:, ~mask] == 0).all()
        assert (slope[~mask][:, mask] != 0).all()


def test_state_dict_round_trip(make_random_flow):
    flow, other = (
        make_random_flow(3, 2, alpha=0.7),
        make_random_flow(3, 2, alpha=0.1, seed=5),
    )
    other.load_state_dict(flow.state_dict())  # alpha too
    obs, action = torch.randn(4, 3).double(), torch.zeros(4, 2).double()
    assert torch.equal(other.q_values(obs, action), flow.q_values(obs, action))


def test_extreme_actions_stay_finite():
    """Actions at the bounds count as the nearest ones inside."""
    flow = EnergyFlow(3, 2, Args(alpha=0.25, log_sigma_max=2.0))
    obs = torch.randn(2, 3)
    action = torch.tensor([[1.0, -1.0], [1 - 1e-7, 0.0]])
    q = flow.q_values(obs, action)
    assert torch.isfinite(q).all()
    assert torch.equal(q, flow.q_values(obs, action.clamp(-(1 - 1e-5), 1 - 1e-5)))


def test_dropout_masks_units():
    """A hidden unit that isn't kept gives 0, the others 1/(1 - p) of what they gave."""
    flow = EnergyFlow(3, 2, Args(dropout=0.5))
    obs, action = torch.randn(16, 3), torch.rand(16, 2) - 0.5
    kept = torch.rand(4, 2, 16, 64) > 0.5
    assert (flow.q_values(obs, action, kept) != flow.q_values(obs, action)).all()
    mlp, x = flow.t[0], torch.randn(16, 5)
    y = mlp(x, kept[0])
    for i in range(2):
        x = mlp.swishes[i](mlp.norms[i](mlp.layers[i](x))) * kept[0, i] / 0.5
    torch.testing.assert_close(y, mlp.layers[2](x))
