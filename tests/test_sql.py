"""Soft Q-learning: value estimate, kernel, Stein direction, and the whole update."""

import math

import numpy as np
import pytest
import torch

import sql_continuous_action as sql
from sql_continuous_action import PAPER_SETTINGS, Args, Learner, ReplayBuffer, UsageError


def make_learner(compiled=False, dtype=torch.float32, **settings):
    """A learner with 64 random transitions, S = 5 and A = 3."""
    args = Args(**(dict(batch_size=32, q_lr=1e-2, policy_lr=1e-2, tau=0.1) | settings))
    torch.manual_seed(0)
    replay, rng = ReplayBuffer(64, 5, 3), np.random.default_rng(0)
    for i in range(64):
        obs, next_obs = rng.normal(size=5), rng.normal(size=5)
        replay.add(obs, rng.uniform(-1, 1, 3), next_obs, rng.normal(), i % 4 == 0)
    sampler, critic = sql.make_networks(args, 5, 3)
    return Learner(sampler.to(dtype), critic.to(dtype), replay, args, compiled)


def mixture_log_density(x):
    """Two Gaussians of sigma 0.3 at (-1, 0) and (1, 0), the right one three times as likely."""
    left = -(x - torch.tensor([-1.0, 0.0])).square().sum(-1) / (2 * 0.3**2)
    right = -(x - torch.tensor([1.0, 0.0])).square().sum(-1) / (2 * 0.3**2)
    return torch.logsumexp(torch.stack([left + math.log(0.25), right + math.log(0.75)]), 0)


def test_reward_scales_are_the_papers():
    scales = {name: s["reward_scale"] for name, s in PAPER_SETTINGS.items() if ":" not in name}
    expected = {"Hopper": 30, "HalfCheetah": 30, "Walker2d": 10, "Ant": 300, "Humanoid": 100}
    assert scales == expected


def test_soft_value_of_a_constant_is_exact():
    """Q = c: log int over [-1, 1]^A of exp(c) = c + A log 2, with any number of particles."""
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
    assert sql.critic_loss(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])).item() == 1.0


def test_kernel_and_its_gradient():
    """Each value by hand; the gradient by the fixed actions is autograd's at constant h."""
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    fixed, updated = torch.randn(6, 8, 2), torch.randn(6, 8, 2)
    alone = torch.cat([sql.kernel(f[None], u[None])[0] for f, u in zip(fixed, updated)])  # noqa: B905
    torch.testing.assert_close(sql.kernel(fixed, updated)[0], alone)
    doubled = sql.kernel(fixed.repeat(1, 2, 1), updated)[0][:, :8]  # log 16 instead of log 8
    torch.testing.assert_close(doubled, alone ** (math.log(16) / math.log(8)))


def test_bandwidth_has_a_floor():
    """Coinciding particles: kappa = 1, no division by zero."""
    kappa, gradient = sql.kernel(torch.zeros(1, 8, 2), torch.zeros(1, 8, 2))
    assert (kappa == 1).all()
    assert (gradient == 0).all()


def test_stein_direction_against_autograd():
    """Against loops over particles, with the score of a known density from autograd."""
    torch.manual_seed(0)
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


def test_particles_find_a_mixture():
    """Particles that follow the direction end around both modes with the mixture's spread."""
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


def test_sampler_learns_a_two_sided_q():
    """Trained on a fixed Q with modes at a_1 = -0.6 and 0.6, its actions come from both."""
    learner, rng = make_learner(policy_lr=1e-3), np.random.default_rng(0)
    modes = torch.tensor([[-0.6, 0.0, 0.0], [0.6, 0.0, 0.0]])

    def q_values(_obs, action):
        squared = (action[..., None, :] - modes).square().sum(-1)
        return torch.logsumexp(-squared / (2 * 0.3**2), dim=-1, keepdim=True)

    args, critic = Args(policy_lr=1e-3), sql.make_networks(Args(), 5, 3)[1]
    critic.q_values = q_values
    update = sql.make_update(learner.sampler, critic, learner.replay.splits, args)
    learner._update = torch.no_grad()(update)
    for _ in range(500):
        learner.update(rng)
    torch.manual_seed(0)
    action = learner.sampler.to_action(torch.randn(2000, 5), torch.randn(2000, 3))
    assert (action[:, 0] > 0.3).float().mean() > 0.25
    assert (action[:, 0] < -0.3).float().mean() > 0.25
    assert action[:, 1:].abs().mean() < 0.3


def test_update_against_autograd_and_torch_optim():
    """Three updates equal ordinary PyTorch: backward, two torch Adams, particles in loops."""
    learner = make_learner(dtype=torch.float64, reward_scale=3.0)
    splits = learner.replay.splits
    sampler, critic = (m.double() for m in sql.make_networks(Args(), 5, 3))
    for module, theta in ((sampler, learner.phi), (critic, learner.theta)):
        torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
        module.requires_grad_(True)
    targets = sql.make_networks(Args(), 5, 3)[1].double()
    targets.load_state_dict(critic.state_dict())
    q_adam = torch.optim.Adam(critic.parameters(), lr=1e-2)
    f_adam = torch.optim.Adam(sampler.parameters(), lr=1e-2)
    for _ in range(3):
        batch = learner.replay.rows[torch.randint(64, (32,))].double()
        uniform, noise = 2 * torch.rand(32, 16, 3).double() - 1, torch.randn(32, 16, 3).double()
        metrics = learner._update(*learner.state, batch, uniform, noise)
        obs, action, next_obs, reward, terminated = batch.split(splits, dim=-1)
        with torch.no_grad():
            q = [targets.q_values(next_obs, uniform[:, j])[:, 0].exp() for j in range(16)]
            v = (sum(q) / 16).log() + 3 * math.log(2)
            y = 3.0 * reward[:, 0] + 0.99 * (1 - terminated[:, 0]) * v
        loss = (0.5 * (critic.q_values(obs, action)[:, 0] - y) ** 2).mean()
        q_adam.zero_grad()
        loss.backward()
        q_adam.step()
        drawn = [sampler.to_action(obs, noise[:, j]) for j in range(16)]
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
        for vector, module in ((learner.theta, critic), (learner.phi, sampler)):
            expected = torch.cat([p.detach().flatten() for p in module.parameters()])
            torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-8)


def test_target_network_frequency():
    """tau 1 and frequency 3: theta' is a copy of theta after each third update, else it stays."""
    learner, rng = make_learner(tau=1.0, target_network_frequency=3), np.random.default_rng(0)
    assert torch.equal(learner.theta, learner.target_theta)
    for i in range(1, 7):
        before = learner.target_theta.clone()
        learner.update(rng)
        expected = learner.theta if i % 3 == 0 else before
        torch.testing.assert_close(learner.target_theta, expected, rtol=0, atol=0)
    learner = make_learner(tau=0.25)
    before = learner.theta.clone()
    learner.update(rng)
    torch.testing.assert_close(learner.target_theta, 0.75 * before + 0.25 * learner.theta)


def test_uniform_actions_cover_the_box():
    learner, rng, seen = make_learner(), np.random.default_rng(0), []
    inner = learner._update
    learner._update = lambda *inputs: (seen.append(inputs[-2]), inner(*inputs))[1]
    for _ in range(5):
        learner.update(rng)
    seen = torch.stack(seen)
    assert -1 <= seen.min() < -0.99
    assert 0.99 < seen.max() <= 1
    assert abs(seen.mean().item()) < 0.02
    assert (seen[0, 0] != seen[0, 1]).any()  # other actions for each state


def test_compiled_equals_eager():
    eager, compiled = make_learner(), make_learner(compiled=True)
    rngs = [np.random.default_rng(3) for _ in "12"]
    for _ in range(5):
        for learner, rng in zip((eager, compiled), rngs, strict=True):
            learner.update(rng)
        torch.testing.assert_close(compiled.metrics, eager.metrics, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled.theta, eager.theta, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled.phi, eager.phi, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("what", ["theta", "phi", "batch"])
def test_a_non_finite_update_raises_and_says_what(what):
    learner, rng = make_learner(), np.random.default_rng(0)
    if what == "batch":
        learner.replay.rows[:, -2] = float("inf")
    else:
        getattr(learner, what)[0] = float("nan")
    learner.update(rng)
    with pytest.raises(FloatingPointError, match=r"step 17 is not finite: \w+/\w+ = (nan|inf)"):
        learner.read_metrics(17)


def quick_run(tmp_path, env_id="Pendulum-v1", **settings):
    args = Args(
        env_id=env_id,
        total_timesteps=60,
        learning_starts=20,
        batch_size=8,
        eval_episodes=1,
        compile=False,
        runs_dir=str(tmp_path),
        **settings,
    )
    return sql.train(args)["run_dir"]


def test_composition_keeps_both_q_functions_and_acts_on_their_mean(tmp_path):
    """The composed run holds the two critics unchanged, and trains its sampler."""
    runs = tuple(quick_run(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    composed = sql.load_file(
        sql.find_policy(quick_run(tmp_path / "composed", seed=3, compose=runs))
    )
    singles = [sql.load_file(sql.find_policy(run)) for run in runs]
    for i, single in enumerate(singles):
        for name, value in single["critic"].items():
            assert torch.equal(composed["critic"][name.replace("q.0", f"q.{i}")], value)
    critic = sql.make_networks(Args(compose=runs), 3, 1)[1]
    critic.load_state_dict(composed["critic"])
    obs, action, parts = torch.randn(4, 3), torch.rand(4, 1), []
    for single in singles:
        part = sql.make_networks(Args(), 3, 1)[1]
        part.load_state_dict(single["critic"])
        parts.append(part.q_values(obs, action))
    torch.testing.assert_close(critic.q_values(obs, action), (parts[0] + parts[1]) / 2)
    torch.manual_seed(3)  # the networks as the run began
    start = sql.make_networks(Args(compose=runs), 3, 1)[0].state_dict()
    assert all((composed["sampler"][name] != value).any() for name, value in start.items())


def test_composition_of_unfit_runs_is_refused(tmp_path):
    pendulum = quick_run(tmp_path / "a")
    with pytest.raises(UsageError, match="other dimensions"):
        quick_run(tmp_path / "b", env_id="scripted_env:Scripted-v0", compose=(pendulum, pendulum))
    with pytest.raises(UsageError, match="--compose nowhere"):
        quick_run(tmp_path / "c", compose=("nowhere", pendulum))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph(compiled):
    """Capture leaves the state alone; replays draw new particles."""
    cpu = make_learner()
    replay = ReplayBuffer(64, 5, 3, "cuda")
    replay.load_state_dict(cpu.replay.state_dict())
    torch.manual_seed(0)
    args = Args(batch_size=32, q_lr=1e-2, policy_lr=1e-2, tau=0.1)
    sampler, critic = sql.make_networks(args, 5, 3)
    gpu = Learner(sampler.cuda(), critic.cuda(), replay, args, compiled)
    for a, b in zip(cpu.state, gpu.state, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(3):
        gpu.update(rng)
        drawn.append((gpu.noise.clone(), gpu.uniform.clone()))
    assert all((a != b).any() for a, b in zip(drawn[0], drawn[1], strict=True))
    assert all(map(math.isfinite, gpu.read_metrics(3).values()))
