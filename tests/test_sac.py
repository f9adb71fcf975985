"""SAC: the policy's density, targets and losses, and whole updates against ordinary PyTorch."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

import sac_continuous_action as sac
from sac_continuous_action import Actor, Args, Critics, Learner, ReplayBuffer

SCALE = torch.tensor([0.4, 1.0, 3.0], dtype=torch.float64)


def make_actor(obs_dim=5, scale=SCALE):
    torch.manual_seed(0)
    actor = Actor(obs_dim, len(scale)).double().requires_grad_(False)
    actor.action_scale.copy_(scale)
    return actor


def make_learner(compiled=False, dtype=torch.float32, **settings):
    """A learner with 64 random transitions, S = 5 and A = 3, actions scaled by SCALE."""
    args = Args(**(dict(batch_size=32, q_lr=1e-2, policy_lr=1e-2, tau=0.1) | settings))
    torch.manual_seed(0)
    replay, rng = ReplayBuffer(64, 5, 3), np.random.default_rng(0)
    for i in range(64):
        obs, next_obs = rng.normal(size=5), rng.normal(size=5)
        replay.add(obs, rng.uniform(-1, 1, 3), next_obs, rng.normal(), i % 4 == 0)
    actor, critics = sac.make_networks(args, 5, 3, SCALE)
    for p in critics.b.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return Learner(actor.to(dtype), critics.to(dtype), replay, args, compiled)


def test_log_prob_is_pytorchs_with_the_action_scale():
    """The density over the environment's own actions, scale tanh(u), of torch.distributions."""
    actor, obs = make_actor(), torch.randn(50, 5, dtype=torch.float64)
    noise = torch.randn(50, 3, dtype=torch.float64)
    action, log_prob = actor.to_action(obs, noise)
    mean, log_std = actor.gaussian(obs)
    transforms = [TanhTransform(cache_size=1), AffineTransform(0.0, SCALE)]
    reference = TransformedDistribution(Normal(mean, log_std.exp()), transforms)
    expected = Independent(reference, 1).log_prob(action * SCALE)
    torch.testing.assert_close(log_prob, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actor.log_prob(obs, action), expected, rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    """Over the environment's actions [-0.4, 0.4]: quadrature in float64."""
    actor = make_actor(scale=torch.tensor([0.4], dtype=torch.float64))
    action = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    density = actor.log_prob(torch.randn(1, 5).double().expand(len(action), -1), action).exp()
    assert torch.trapezoid(density, 0.4 * action[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_log_sigma_stays_between_its_bounds():
    actor = make_actor()
    _, log_std = actor.gaussian(1e4 * torch.randn(100, 5, dtype=torch.float64))
    assert log_std.min() >= -5
    assert log_std.max() <= 2
    assert (log_std.max() - log_std.min()) > 6


def test_targets_and_losses_by_hand():
    """min over the critics, entropy bonus, termination; sum of squares; the actor's minimum."""
    q, log_prob, alpha = torch.tensor([[3.0, 5.0], [9.0, 8.0]]), torch.tensor([-2.0, 1.0]), 0.5
    reward, terminated = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
    y = sac.soft_target(reward, terminated, q, log_prob, torch.tensor(alpha), 0.9)
    torch.testing.assert_close(y, torch.tensor([1 + 0.9 * (3 + 1.0), 1.0]))
    target = torch.tensor([2.0, 8.0])
    assert sac.critic_loss(q, target).item() == pytest.approx((1 + 9 + 1 + 0) / 2)
    loss = sac.actor_loss(q, log_prob, torch.tensor(alpha))
    assert loss.item() == pytest.approx((-1.0 - 3 + 0.5 - 8) / 2)
    log_alpha = torch.tensor([math.log(0.5)])
    assert sac.temperature_loss(log_alpha, log_prob, -3.0).item() == pytest.approx(0.5 * 3.5)


@pytest.mark.parametrize(
    "settings", [{}, {"autotune": False}, {"reward_shifting": "clipped"}], ids=str
)
def test_updates_against_autograd_and_torch_optim(settings):
    """Four critic and four actor updates equal ordinary PyTorch with three torch Adams."""
    learner = make_learner(dtype=torch.float64, **settings)
    args, splits = Args(**settings), learner.replay.splits
    shifting = args.reward_shifting == "clipped"
    actor, critics, targets = make_actor(), *(Critics(5, 3, shifting).double() for _ in "12")
    actor.action_scale.copy_(learner.actor.action_scale)  # which has been through float32
    with torch.no_grad():
        for module, theta in ((actor, learner.phi), (critics, learner.theta)):
            torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
        torch.nn.utils.vector_to_parameters(learner.theta.clone(), targets.parameters())
    actor.requires_grad_(True)
    log_alpha = learner.log_alpha.clone().requires_grad_(True)
    q_adam = torch.optim.Adam(critics.parameters(), lr=1e-2)
    pi_adam = torch.optim.Adam(actor.parameters(), lr=1e-2)
    alpha_adam = torch.optim.Adam([log_alpha], lr=1e-2)
    for _ in range(4):
        batch = learner.replay.rows[torch.randint(64, (32,))].double()
        noise = torch.randn(2, 32, 3, dtype=torch.float64)
        critic_state = (*learner.critic_state, learner.phi, learner.log_alpha)
        critic_metrics = learner._critic(*critic_state, batch, noise[0])
        actor_metrics = learner._actor(*learner.actor_state, learner.theta, batch, noise[1])

        obs, action, next_obs, reward, terminated = batch.split(splits, dim=-1)
        with torch.no_grad():
            next_action, log_prob = actor.to_action(next_obs, noise[0])
            q_next = targets.q_values(next_obs, next_action).min(-1).values
            soft_v = q_next - log_alpha.exp() * log_prob
            y = reward[:, 0] + 0.99 * (1 - terminated[:, 0]) * soft_v
        q = critics.q_values(obs, action)
        loss = ((q[:, 0] - y) ** 2).mean() + ((q[:, 1] - y) ** 2).mean()
        q_adam.zero_grad()
        loss.backward()
        q_adam.step()
        with torch.no_grad():
            for p, p_target in zip(critics.parameters(), targets.parameters(), strict=True):
                p_target.copy_(0.9 * p_target + 0.1 * p)
        new_action, log_prob = actor.to_action(obs, noise[1])
        q_pi = critics.q_values(obs, new_action).min(-1).values
        pi_loss = (log_alpha.exp().detach() * log_prob - q_pi).mean()
        pi_adam.zero_grad()
        pi_loss.backward()
        pi_adam.step()
        alpha_loss = (-log_alpha.exp() * (log_prob.detach() - 3)).mean()
        if args.autotune:
            alpha_adam.zero_grad()
            alpha_loss.backward()
            alpha_adam.step()

        assert critic_metrics[0].item() == pytest.approx(loss.item(), rel=1e-9)
        assert actor_metrics[:2].tolist() == pytest.approx([pi_loss.item(), alpha_loss.item()])
        assert learner.log_alpha.item() == pytest.approx(log_alpha.item(), rel=1e-9)
        for vector, module in (
            (learner.theta, critics),
            (learner.critic_state[1], targets),
            (learner.phi, actor),
        ):
            expected = torch.cat([p.detach().flatten() for p in module.parameters()])
            torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-9)
    assert learner.log_alpha.item() != 0 or not args.autotune


def test_temperature_moves_entropy_to_its_target():
    """alpha falls while the entropy is above -A and grows while it is below."""
    for log_prob, grows in ((torch.full((8,), 9.0), True), (torch.full((8,), -9.0), False)):
        log_alpha = torch.zeros(1)
        grad = torch.func.grad(sac.temperature_loss)(log_alpha, log_prob, -3.0)
        assert (grad.item() < 0) is grows


def test_fixed_temperature_stays():
    learner, rng = make_learner(autotune=False, alpha=0.7), np.random.default_rng(0)
    for _ in range(6):
        learner.update(rng)
    assert learner.log_alpha.exp().item() == pytest.approx(0.7)
    assert learner.read_metrics(0)["losses/alpha"] == pytest.approx(0.7)


def test_the_actor_is_updated_with_a_delay_and_as_often():
    """policy_frequency 3: nothing in updates 1 and 2, three actor updates in the third."""
    learner, rng = make_learner(policy_frequency=3), np.random.default_rng(0)
    calls = []
    actor_update = learner._actor
    learner._actor = lambda *inputs: (calls.append(1), actor_update(*inputs))[1]
    for i in range(1, 7):
        before = learner.phi.clone()
        learner.update(rng)
        assert (learner.phi != before).any() == (i % 3 == 0)
        assert len(calls) == 3 * (i // 3)


def test_reward_shifts_start_at_zero_and_leave_the_actor_alone():
    """b_k depends on the state alone: equal Q differences, so the same gradient for the actor."""
    args, obs = Args(reward_shifting="clipped"), torch.randn(8, 5)
    critics = sac.make_networks(args, 5, 3)[1]
    plain = Critics(5, 3)
    plain.load_state_dict({k: v for k, v in critics.state_dict().items() if k.startswith("q.")})
    action = torch.rand(8, 3) - 0.5
    torch.testing.assert_close(critics.q_values(obs, action), plain.q_values(obs, action))
    for p in critics.b.parameters():
        p.data += torch.randn_like(p)
    gap = critics.q_values(obs, action) - plain.q_values(obs, action)
    other = critics.q_values(obs, -action) - plain.q_values(obs, -action)
    assert gap.abs().min() > 1e-3
    torch.testing.assert_close(gap, other)
    learner, rng = make_learner(reward_shifting="clipped"), np.random.default_rng(0)
    before = learner.theta.clone()
    for _ in range(3):
        learner.update(rng)
    n_shift = sum(p.numel() for p in critics.b.parameters())
    assert (learner.theta != before)[-n_shift:].float().mean() > 0.5


def test_loss_falls_on_a_fixed_batch():
    learner, rng = make_learner(gamma=0.0), np.random.default_rng(0)
    learner.update(rng)
    first = learner.read_metrics(0)["losses/qf_loss"]
    for _ in range(60):
        learner.update(rng)
    assert learner.read_metrics(60)["losses/qf_loss"] < 0.7 * first


@pytest.mark.parametrize("what", ["theta", "phi", "batch"])
def test_a_non_finite_update_raises_and_says_what(what):
    learner, rng = make_learner(), np.random.default_rng(0)
    if what == "batch":
        learner.replay.rows[:, -2] = float("inf")
    else:
        getattr(learner, what)[0] = float("nan")
    for _ in range(2):
        learner.update(rng)
    with pytest.raises(FloatingPointError, match=r"step 17 is not finite: losses/\w+ = (nan|inf)"):
        learner.read_metrics(17)


def test_compiled_equals_eager():
    eager, compiled = make_learner(), make_learner(compiled=True)
    rngs = [np.random.default_rng(3) for _ in "12"]
    for _ in range(6):
        for learner, rng in zip((eager, compiled), rngs, strict=True):
            learner.update(rng)
        torch.testing.assert_close(compiled.metrics, eager.metrics, rtol=1e-4, atol=1e-4)
    for a, b in zip(compiled.state, eager.state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    obs, z = np.ones((1, 5), np.float32), np.full((1, 3), 0.5, np.float32)
    actions = [learner.make_actor(1)(obs, z) for learner in (eager, compiled)]
    np.testing.assert_allclose(*actions, atol=1e-3)


def test_the_environments_own_action_range_enters_the_density(tmp_path):
    """Training Humanoid-like bounds stores half the range; evaluation doesn't need it."""
    args = Args(
        env_id="scripted_env:Scripted-v0",
        total_timesteps=30,
        learning_starts=20,
        batch_size=8,
        eval_episodes=1,
        compile=False,
        runs_dir=str(tmp_path),
    )
    result = sac.train(args)
    saved = sac.load_file(sac.find_policy(result["run_dir"]))
    torch.testing.assert_close(saved["actor"]["action_scale"], torch.tensor([0.4, 0.5]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs(compiled):
    """Capture leaves the state alone; replays draw new noise."""
    cpu = make_learner()
    replay = ReplayBuffer(64, 5, 3, "cuda")
    replay.load_state_dict(cpu.replay.state_dict())
    torch.manual_seed(0)
    args = Args(batch_size=32, q_lr=1e-2, policy_lr=1e-2, tau=0.1)
    actor, critics = sac.make_networks(args, 5, 3, SCALE)
    gpu = Learner(actor.cuda(), critics.cuda(), replay, args, compiled)
    for a, b in zip(cpu.state, gpu.state, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0)
    rng, noises = np.random.default_rng(0), []
    for _ in range(4):
        gpu.update(rng)
        noises.append(gpu.noise.clone())
    assert all((a != b).any() for a, b in zip(noises[1:], noises, strict=False))
    assert all(map(math.isfinite, gpu.read_metrics(4).values()))
