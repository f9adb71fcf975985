"""Soft Q-learning: value estimate, kernel, Stein direction, and the whole update."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from stepped_run import RANDOM_STEPS, random_batch, trained

import sql_continuous_action as sql
from harness.compiling import flatten_parameters
from sql_continuous_action import Args, adam_moments, split_batch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_update(dtype=torch.float64, critic=None, **settings):
    """Networks, S = 5 and A = 3, the update's state, and the update itself, eager."""
    args = Args(**dict(q_lr=1e-2, policy_lr=1e-2) | settings)
    sampler, own_critic = (net.to(dtype) for net in sql.make_networks(args, 5, 3))
    phi, theta = flatten_parameters(sampler), flatten_parameters(own_critic)
    state = [theta, theta.clone(), *adam_moments(theta), phi, *adam_moments(phi)]
    update = torch.no_grad()(sql.make_update(sampler, critic or own_critic, args))
    return sampler, own_critic, state, update


def mixture_log_density(x):
    """Gaussians of sigma 0.3 at (-1, 0) and (1, 0), the right one thrice as likely."""
    left = -(x - torch.tensor([-1.0, 0.0])).square().sum(-1) / (2 * 0.3**2)
    right = -(x - torch.tensor([1.0, 0.0])).square().sum(-1) / (2 * 0.3**2)
    both = torch.stack([left + math.log(0.25), right + math.log(0.75)])
    return torch.logsumexp(both, 0)


def test_reward_scales_are_the_papers():
    expected = dict(Hopper=30, HalfCheetah=30, Walker2d=10, Ant=300, Humanoid=100)
    for name, scale in expected.items():
        assert Args.for_env(f"{name}-v4").reward_scale == scale


def test_soft_value_of_a_constant_is_exact():
    """Q = c: V = log int over [-1, 1]^A of exp(c) = c + A log 2, for any number M."""
    for m, act_dim in ((1, 1), (16, 3), (7, 17)):
        v = sql.soft_value(torch.full((4, m), 2.5), act_dim)
        torch.testing.assert_close(v, torch.full((4,), 2.5 + act_dim * math.log(2)))


def test_soft_value_against_a_closed_form():
    """Q = w a in one dimension: V = log(2 sinh(w) / w), by 200,000 uniform actions."""
    w = 1.7
    q = w * (2 * torch.rand(1, 200_000, dtype=torch.float64) - 1)
    expected = math.log(2 * math.sinh(w) / w)
    assert sql.soft_value(q, 1).item() == pytest.approx(expected, abs=0.01)


def test_soft_value_survives_large_q():
    q = torch.tensor([[1e4, 1e4], [-1e4, -2e4]])
    expected = torch.tensor([1e4, -1e4 - math.log(2)]) + math.log(2)
    torch.testing.assert_close(sql.soft_value(q, 1), expected)


def test_target_and_loss_by_hand():
    reward, terminated = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    y = sql.soft_target(reward, terminated, torch.tensor([10.0, 10.0]), 30.0, 0.9)
    torch.testing.assert_close(y, torch.tensor([39.0, 60.0]))
    q, target = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert sql.critic_loss(q, target).item() == 1.0


def test_kernel_and_its_gradient():
    """Each value by hand; the gradient is autograd's at constant h."""
    fixed, updated = torch.randn(4, 8, 3).double(), torch.randn(4, 5, 3).double()
    kappa, gradient = sql.kernel(fixed, updated)
    for b in range(4):
        squared = torch.cdist(fixed[b], updated[b]).square()
        h = np.median(squared.numpy()) / math.log(8)
        torch.testing.assert_close(kappa[b], torch.exp(-squared / h))
        for j in range(5):
            x = fixed[b].clone().requires_grad_(True)
            torch.exp(-(x - updated[b, j]).square().sum(-1) / h).sum().backward()
            torch.testing.assert_close(gradient[b, :, j], x.grad)


def test_bandwidth_depends_on_the_particles_and_not_on_the_batch():
    fixed, updated = torch.randn(6, 8, 2), torch.randn(6, 8, 2)
    pairs = zip(fixed.split(1), updated.split(1), strict=True)
    alone = torch.cat([sql.kernel(*pair)[0] for pair in pairs])
    torch.testing.assert_close(sql.kernel(fixed, updated)[0], alone)
    twice = fixed.repeat(1, 2, 1)  # log 16 instead of log 8
    doubled = sql.kernel(twice, updated)[0][:, :8]
    torch.testing.assert_close(doubled, alone ** (math.log(16) / math.log(8)))


def test_bandwidth_has_a_floor():
    """Coinciding particles: kappa = 1, no division by zero."""
    kappa, gradient = sql.kernel(torch.zeros(1, 8, 2), torch.zeros(1, 8, 2))
    assert (kappa == 1).all()
    assert (gradient == 0).all()


def test_stein_direction_against_autograd():
    """Against loops over particles, with the score of a known density from autograd."""
    fixed, updated = torch.randn(3, 6, 2), torch.randn(3, 4, 2)
    score = torch.func.grad(lambda x: mixture_log_density(x).sum())(fixed)
    direction = sql.stein_direction(score, fixed, updated)
    for b in range(3):
        squared = torch.cdist(fixed[b], updated[b]).square()
        h = float(np.median(squared.numpy())) / math.log(6)
        for j in range(4):
            total = torch.zeros(2)
            for i in range(6):
                x = fixed[b, i].clone().requires_grad_(True)
                log_p = mixture_log_density(x)
                (grad_log_p,) = torch.autograd.grad(log_p, x)
                kappa = torch.exp(-(x - updated[b, j]).square().sum() / h)
                (grad_kappa,) = torch.autograd.grad(kappa, x)
                total += kappa.detach() * grad_log_p + grad_kappa
            torch.testing.assert_close(direction[b, j], total / 6, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_particles_find_a_mixture():
    """Particles that follow the direction end around both modes, as spread as they."""
    torch.manual_seed(0)
    x = 0.5 * torch.randn(1, 60, 2)
    gradient = torch.func.grad(lambda x: mixture_log_density(x).sum())
    for _ in range(1500):
        x = x + 0.05 * sql.stein_direction(gradient(x), x, x)
    right = x[0, x[0, :, 0] > 0]
    left = x[0, x[0, :, 0] < 0]
    assert len(right) > 10
    assert len(left) > 10
    for mode, center in ((right, 1.0), (left, -1.0)):
        assert mode.mean(0).tolist() == pytest.approx([center, 0.0], abs=0.1)
        assert 0.12 < mode[:, 1].std() < 0.4


class TwoSided(sql.Critic):
    """A fixed Q with modes at a_1 = -0.6 and 0.6."""

    def q_values(self, _obs, action):
        modes = torch.tensor([[-0.6, 0.0, 0.0], [0.6, 0.0, 0.0]])
        squared = (action[..., None, :] - modes).square().sum(-1)
        return torch.logsumexp(-squared / (2 * 0.3**2), dim=-1, keepdim=True)


@pytest.mark.slow
def test_sampler_learns_a_two_sided_q():
    """Its actions come from both modes."""
    critic = TwoSided(5, 3)
    sampler, _, state, update = make_update(torch.float32, critic, policy_lr=1e-3)
    for _ in range(500):
        uniform, noise = 2 * torch.rand(32, 16, 3) - 1, torch.randn(32, 16, 3)
        update(*state, random_batch(dtype=torch.float32), uniform, noise)
    action, _ = sampler.sample(torch.randn(2000, 5), torch.randn(2000, 3))
    assert (action[:, 0] > 0.3).float().mean() > 0.25
    assert (action[:, 0] < -0.3).float().mean() > 0.25
    assert action[:, 1:].abs().mean() < 0.3


def test_update_against_autograd_and_torch_optim():
    """Three updates equal ordinary PyTorch: two torch Adams, particles in loops."""
    sampler, critic, state, update = make_update(reward_scale=3.0)
    theta, phi = state[0], state[5]
    sampler, critic, targets = map(copy.deepcopy, (sampler, critic, critic))
    sampler.requires_grad_(True)
    critic.requires_grad_(True)
    q_adam = torch.optim.Adam(critic.parameters(), lr=1e-2)
    f_adam = torch.optim.Adam(sampler.parameters(), lr=1e-2)
    for _ in range(3):
        batch = random_batch()
        uniform = 2 * torch.rand(32, 16, 3).double() - 1
        noise = torch.randn(32, 16, 3).double()
        metrics = update(*state, batch, uniform, noise)

        obs, action, next_obs, reward, terminated = split_batch(batch, 5, 3)
        with torch.no_grad():
            q = [targets.q_values(next_obs, uniform[:, j])[:, 0] for j in range(16)]
            v = (sum(x.exp() for x in q) / 16).log() + 3 * math.log(2)
            y = 3.0 * reward + 0.99 * (1 - terminated) * v
        loss = (0.5 * (critic.q_values(obs, action)[:, 0] - y) ** 2).mean()
        q_adam.zero_grad()
        loss.backward()
        q_adam.step()
        drawn = [sampler.sample(obs, noise[:, j])[0] for j in range(16)]
        fixed = torch.stack(drawn[:8], 1).detach().requires_grad_(True)
        q = torch.stack([critic.q_values(obs, fixed[:, i])[:, 0] for i in range(8)], 1)
        log_p = q + torch.log(1 - fixed**2 + 1e-6).sum(-1)
        (score,) = torch.autograd.grad(log_p.sum(), fixed)
        updated = torch.stack(drawn[8:], 1)
        direction = sql.stein_direction(score, fixed.detach(), updated.detach())
        f_adam.zero_grad()
        updated.backward(-direction / (32 * 8))
        f_adam.step()

        assert metrics[0].item() == pytest.approx(loss.item(), rel=1e-9)
        assert metrics[2].item() == pytest.approx(y.mean().item(), rel=1e-9)
        for vector, module in ((theta, critic), (phi, sampler)):
            expected = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
            torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-8)


def test_target_network_frequency():
    """tau 1, frequency 3: each third update theta' becomes theta, else it stays."""
    seen = []

    def look(run):
        seen.append([t.clone() for t in run.parts["learner"][:2]])

    trained(sql, 6, after=look, tau=1.0, target_network_frequency=3)
    pairs = itertools.pairwise(seen[RANDOM_STEPS - 1 :])
    for i, ((_, before), (theta, target)) in enumerate(pairs, start=1):
        assert torch.equal(target, theta if i % 3 == 0 else before)


def test_uniform_actions_cover_the_box():
    numbers, rng, seen = torch.zeros(32, 16, 3), np.random.default_rng(0), []
    for _ in range(5):
        sql.draw_uniform(numbers, rng)
        seen.append(numbers.clone())
    seen = torch.stack(seen)
    assert -1 <= seen.min() < -0.99
    assert 0.99 < seen.max() <= 1
    assert abs(seen.mean().item()) < 0.02
    assert (seen[0, 0] != seen[0, 1]).any()  # other actions for each state
    assert (seen[0] != seen[1]).any()


def test_random_numbers_are_drawn_in_one_order():
    """Action, batch, uniform actions, noise."""
    run = trained(sql, 4, seed=5)
    rng = np.random.default_rng(5)
    rng.uniform(-1, 1, (RANDOM_STEPS, 3))
    for step in range(RANDOM_STEPS, RANDOM_STEPS + 4):
        rng.standard_normal((1, 3), dtype=np.float32)
        index = rng.integers(0, step, 32)
        uniform = 2 * rng.random((32, 16, 3), dtype=np.float32) - 1
        noise = rng.standard_normal((32, 16, 3), dtype=np.float32)
    assert run.rng.bit_generator.state == rng.bit_generator.state
    assert torch.equal(run.replay.batch, run.replay.rows[index])
    *_, own_uniform, own_noise = run.tensors["the update"]
    np.testing.assert_array_equal(own_uniform.numpy(), uniform)
    np.testing.assert_array_equal(own_noise.numpy(), noise)


def quick_run(tmp_path, env_id="Pendulum-v1", *words):
    """A run of 60 steps; its folder, or the exit code."""
    command = f"--env-id {env_id} --total-timesteps 60 --learning-starts 20"
    command += " --batch-size 8 --eval-episodes 1 --no-compile"
    words = [*command.split(), "--runs-dir", str(tmp_path), *map(str, words)]
    code = sql.main(Args, sql.train, sql.evaluate_saved, words)
    return next(tmp_path.iterdir(), None) if code == 0 else code


def test_composition_keeps_both_q_functions_and_acts_on_their_mean(tmp_path):
    """The composed run holds the two critics unchanged, and trains its sampler."""
    one = quick_run(tmp_path / "1", "Pendulum-v1", "--seed", 1)
    two = quick_run(tmp_path / "2", "Pendulum-v1", "--seed", 2)
    compose = ("--seed", 3, "--compose", one, two)
    both = quick_run(tmp_path / "both", "Pendulum-v1", *compose)
    files = [run / "policy_final.pt" for run in (both, one, two)]
    composed, *singles = [torch.load(file, weights_only=True) for file in files]
    for i, single in enumerate(singles):
        for name, value in single["critic"].items():
            assert torch.equal(composed["critic"][name.replace("q.0", f"q.{i}")], value)
    args = Args(seed=3, compose=("one", "two"))
    start, critic = sql.make_networks(args, 3, 1)  # as the run began
    critic.load_state_dict(composed["critic"])
    obs, action, parts = torch.randn(4, 3), torch.rand(4, 1), []
    for single in singles:
        part = sql.make_networks(Args(), 3, 1)[1]
        part.load_state_dict(single["critic"])
        parts.append(part.q_values(obs, action))
    torch.testing.assert_close(critic.q_values(obs, action), (parts[0] + parts[1]) / 2)
    for name, value in start.state_dict().items():
        assert (composed["sampler"][name] != value).any()


def test_composition_of_unfit_runs_is_refused(tmp_path, capsys):
    pendulum, scripted = quick_run(tmp_path / "a"), "scripted_env:Scripted-v0"
    compose = ("--compose", pendulum, pendulum)
    assert quick_run(tmp_path / "b", scripted, *compose) == 2
    assert "other dimensions" in capsys.readouterr().err
    compose = ("--compose", "nowhere", pendulum)
    assert quick_run(tmp_path / "c", "Pendulum-v1", *compose) == 2
    assert "--compose nowhere" in capsys.readouterr().err
