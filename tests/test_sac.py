"""SAC: the policy's density, targets and losses, and whole updates against ordinary PyTorch."""

import itertools
import math

import numpy as np
import pytest
import torch
from stepped_run import ENV_ID, SCALE, SteppedRun, adam_steps
from torch.distributions import (
    AffineTransform,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

import sac_continuous_action as sac
from harness.files import load_file
from harness.replay import split_batch
from harness.runs import main
from sac_continuous_action import Actor, Args, Critics

FAST = dict(env_id=ENV_ID, learning_starts=64, batch_size=32, eval_episodes=1)
FAST |= dict(q_lr=1e-2, policy_lr=1e-2, tau=0.1)


def make_actor(obs_dim=5, scale=SCALE):
    torch.manual_seed(0)
    actor = Actor(obs_dim, len(scale), scale, alpha=1.0).double().requires_grad_(False)
    actor.action_scale.copy_(scale)
    return actor


def trained(updates=0, compiled=False, cuda=False, after=None, **settings):
    """A run of `train` after 64 random transitions and so many updates; S = 5 and A = 3."""
    args = Args(**FAST | dict(total_timesteps=64 + updates) | settings)
    run = SteppedRun(args.total_timesteps, compiled, cuda, after)
    sac.train(args, run)
    run.args, run.replay = args, run.parts["replay"]
    run.critics, run.actor = run.parts["critic_learner"], run.parts["actor_learner"]
    return run


def update(run, rng, actor_updates=1):
    run.replay.sample(rng)
    run.critics.update(rng)
    for _ in range(actor_updates):
        run.actor.update(rng)


def test_log_prob_is_pytorchs_with_the_action_scale():
    """The density over the environment's own actions, scale tanh(u), of torch.distributions."""
    actor, obs = make_actor(), torch.randn(50, 5, dtype=torch.float64)
    noise = torch.randn(50, 3, dtype=torch.float64)
    action, log_prob = actor.sample(obs, noise)
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
    run = trained(**settings)
    args, shifting = run.args, run.args.reward_shifting == "clipped"
    for p in run.policy["critics"].b.parameters():
        p.data += 0.1 * torch.randn_like(p)
    run.critics.state[1].copy_(run.critics.state[0])
    q_state, pi_state = ([t.double() for t in x.state] for x in (run.critics, run.actor))
    actor, critics, targets = make_actor(), *(Critics(5, 3, shifting).double() for _ in "12")
    actor.action_scale.copy_(run.policy["actor"].action_scale)  # which has been through float32
    with torch.no_grad():
        for module, theta in ((actor, pi_state[0]), (critics, q_state[0]), (targets, q_state[1])):
            torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
    networks = make_actor(), Critics(5, 3, shifting).double()  # their parameters are not used
    networks[0].action_scale.copy_(actor.action_scale)
    critic_update = torch.no_grad()(sac.make_critic_update(*networks, 5, 3, args))
    actor_update = torch.no_grad()(sac.make_actor_update(*networks, 5, 3, args))
    actor.requires_grad_(True)
    log_alpha = pi_state[4].clone().requires_grad_(True)
    q_adam = torch.optim.Adam(critics.parameters(), lr=1e-2)
    pi_adam = torch.optim.Adam(actor.parameters(), lr=1e-2)
    alpha_adam = torch.optim.Adam([log_alpha], lr=1e-2)
    for _ in range(4):
        batch = run.replay.rows[torch.randint(64, (32,))].double()
        noise = torch.randn(2, 32, 3, dtype=torch.float64)
        critic_metrics = critic_update(*q_state, pi_state[0], pi_state[4], batch, noise[0])
        actor_metrics = actor_update(*pi_state, q_state[0], batch, noise[1])

        obs, action, next_obs, reward, terminated = batch.split([5, 3, 5, 1, 1], dim=-1)
        with torch.no_grad():
            next_action, log_prob = actor.sample(next_obs, noise[0])
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
        new_action, log_prob = actor.sample(obs, noise[1])
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

        expected = [loss.item(), *q.mean(0).tolist(), y.mean().item()]
        assert critic_metrics.tolist() == pytest.approx(expected, rel=1e-9)
        expected = [pi_loss, alpha_loss, log_alpha.exp(), -log_prob.mean()]
        assert actor_metrics.tolist() == pytest.approx([x.item() for x in expected], rel=1e-9)
        assert pi_state[4].item() == pytest.approx(log_alpha.item(), rel=1e-9)
        for vector, module in ((q_state[0], critics), (q_state[1], targets), (pi_state[0], actor)):
            expected = torch.cat([p.detach().flatten() for p in module.parameters()])
            torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-9)
    assert pi_state[4].item() != 0 or not args.autotune


def test_temperature_moves_entropy_to_its_target():
    """alpha falls while the entropy is above -A and grows while it is below."""
    for log_prob, grows in ((torch.full((8,), 9.0), True), (torch.full((8,), -9.0), False)):
        log_alpha = torch.zeros(1)
        grad = torch.func.grad(sac.temperature_loss)(log_alpha, log_prob, -3.0)
        assert (grad.item() < 0) is grows


def test_entropy_is_rewarded():
    """With Q = 0 the actor's updates raise the entropy, and a high entropy raises the target."""
    run, rng = trained(), np.random.default_rng(0)
    run.critics.state[0].zero_()
    run.critics.state[1].zero_()
    entropy = []
    for _ in range(60):
        run.replay.sample(rng)
        run.actor.update(rng)
        entropy.append(run.actor.read_metrics(0)["sac/entropy"])
    assert np.mean(entropy[-10:]) > np.mean(entropy[:10]) + 0.5
    run.actor.state[4].fill_(2.0)  # alpha = e^2
    run.critics.update(rng)
    reward = split_batch(run.replay.batch, 5, 3)[3].mean().item()
    assert entropy[-1] > 0
    assert run.critics.read_metrics(0)["sac/target"] > reward + 1


def test_fixed_temperature_stays():
    run = trained(6, autotune=False, alpha=0.7)
    assert run.policy["actor"].log_alpha.exp().item() == pytest.approx(0.7)
    assert run.metrics[-1]["losses/alpha"] == pytest.approx(0.7)
    assert adam_steps(run.actor.state[-1]) == 0


def test_the_learned_temperature_is_saved_with_the_actor():
    run = trained(6)
    assert run.policy["actor"].log_alpha.item() == run.actor.state[4].item() != 0


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_updates_in_training(frequency):
    """None before learning_starts, then one per step; the actor's delayed and as often."""
    counts, states = [], []

    def look(run):
        learners = run.parts["critic_learner"], run.parts["actor_learner"]
        counts.append(
            tuple(adam_steps(x.state[4 if i == 0 else 3]) for i, x in enumerate(learners))
        )
        states.append([x.state[0].clone() for x in learners])

    run = trained(6, after=look, policy_frequency=frequency)
    assert counts[:64] == [(0, 0)] * 64
    assert counts[64:] == [(i, frequency * (i // frequency)) for i in range(1, 7)]
    assert adam_steps(run.actor.state[-1]) == counts[-1][1]  # of the temperature
    for i in range(1, 7):
        (theta, phi), (new_theta, new_phi) = states[62 + i], states[63 + i]
        assert (new_theta != theta).any()
        assert (new_phi != phi).any() == (i % frequency == 0)
    assert run.metrics[:64] == [{}] * 64
    assert list(run.metrics[64]) == sac.CRITIC_METRICS + sac.ACTOR_METRICS


def test_the_target_follows_by_tau_after_every_update():
    seen = []

    def look(run):
        seen.append([t.clone() for t in run.parts["critic_learner"].state[:2]])

    trained(4, after=look, tau=0.25)
    assert torch.equal(*seen[63])
    for (_, before), (theta, target) in itertools.pairwise(seen[63:]):
        torch.testing.assert_close(target, 0.75 * before + 0.25 * theta)
        assert (target != theta).float().mean() > 0.5


def test_random_numbers_are_drawn_in_one_order():
    """Action, batch, the critics' noise, and noise for each of the actor's updates."""
    run = trained(4, seed=5)
    rng = np.random.default_rng(5)
    for _ in range(64):
        rng.uniform(-1, 1, 3)
    for step in range(64, 68):
        rng.standard_normal((1, 3), dtype=np.float32)
        rng.integers(0, step, 32)
        for _ in range(3 if step % 2 else 1):
            noise = rng.standard_normal((32, 3), dtype=np.float32)
    assert run.rng.bit_generator.state == rng.bit_generator.state
    np.testing.assert_array_equal(run.actor.random[0].tensor.numpy(), noise)


def test_acting_and_evaluation_draw_from_the_same_sampler():
    """`act` took the stored actions; the evaluator's policy and `sample` agree with it."""
    run = trained(1)
    actor, row = run.policy["actor"], run.replay.rows[64]
    rng = np.random.default_rng(run.args.seed)
    rng.uniform(-1, 1, (64, 3))
    z = torch.from_numpy(rng.standard_normal((1, 3), dtype=np.float32))
    obs = row[None, :5]
    # policy_frequency 2: the first update leaves the actor as it was
    torch.testing.assert_close(row[None, 5:8], actor.sample(obs, z)[0], rtol=1e-5, atol=1e-6)
    played = run.evaluator.policy(obs, z)
    torch.testing.assert_close(played, actor.sample(obs, z)[0], rtol=1e-5, atol=1e-6)
    mode = run.evaluator.policy(obs, torch.zeros(1, 3))
    torch.testing.assert_close(mode, torch.tanh(actor.gaussian(obs)[0]), rtol=1e-5, atol=1e-6)


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
    run, n_shift = trained(3, reward_shifting="clipped"), 0
    for b, fresh in zip(
        run.policy["critics"].b.parameters(),
        sac.make_networks(run.args, 5, 3)[1].b.parameters(),
        strict=True,
    ):
        n_shift += (b != fresh).sum().item()
    assert n_shift > 0.5 * sum(p.numel() for p in critics.b.parameters())


def test_loss_falls_on_a_fixed_batch():
    run, rng = trained(gamma=0.0), np.random.default_rng(0)
    update(run, rng)
    first = run.critics.read_metrics(0)["losses/qf_loss"]
    for _ in range(60):
        update(run, rng)
    assert run.critics.read_metrics(60)["losses/qf_loss"] < 0.7 * first


@pytest.mark.parametrize("what", ["theta", "phi", "batch"])
def test_a_non_finite_update_raises_and_says_what(what):
    run, rng = trained(), np.random.default_rng(0)
    if what == "batch":
        run.replay.rows[:, -2] = float("inf")
    else:
        (run.critics if what == "theta" else run.actor).state[0][0] = float("nan")
    update(run, rng)
    update(run, rng)
    for learner in (run.critics, run.actor):
        error = r"step 17 is not finite: losses/\w+ = (nan|inf)"
        with pytest.raises(FloatingPointError, match=error):
            learner.read_metrics(17)


def test_training_stops_at_a_non_finite_update():
    def spoil(run):
        if len(run.metrics) == 66:
            run.parts["critic_learner"].state[0][0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 66 is not finite: losses/qf_loss = nan"):
        trained(6, after=spoil)


@pytest.mark.slow
def test_compiled_equals_eager():
    eager, compiled = trained(), trained(compiled=True)
    rngs = [np.random.default_rng(3) for _ in "12"]
    for _ in range(6):
        for run, rng in zip((eager, compiled), rngs, strict=True):
            update(run, rng, actor_updates=2)
        for a, b in ((eager.critics, compiled.critics), (eager.actor, compiled.actor)):
            torch.testing.assert_close(b.metrics, a.metrics, rtol=1e-4, atol=1e-4)
    for a, b in ((eager.critics, compiled.critics), (eager.actor, compiled.actor)):
        for one, other in zip(a.state, b.state, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    obs, z = torch.ones(1, 5), torch.full((1, 3), 0.5)
    actions = [run.evaluator.policy(obs, z) for run in (eager, compiled)]
    torch.testing.assert_close(*actions, rtol=0, atol=1e-3)


def test_the_environments_own_action_range_enters_the_density(tmp_path):
    """Training with Humanoid-like bounds stores half the range; evaluation doesn't need it."""
    words = "--env-id scripted_env:Scripted-v0 --total-timesteps 30 --learning-starts 20"
    words += f" --batch-size 8 --eval-episodes 1 --no-compile --runs-dir {tmp_path}"
    assert main(Args, sac.train, sac.load_evaluator, words.split()) == 0
    (folder,) = tmp_path.iterdir()
    saved = load_file(folder / "policy_final.pt", "sac_continuous_action")
    torch.testing.assert_close(saved["actor"]["action_scale"], torch.tensor([0.4, 0.5]))
    assert main(Args, sac.train, sac.load_evaluator, ["--evaluate", str(folder)]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs(compiled):
    """Capture leaves the state alone; replays draw new noise."""
    cpu, gpu = trained(), trained(cuda=True, compiled=compiled)
    for a, b in ((cpu.critics, gpu.critics), (cpu.actor, gpu.actor)):
        for one, other in zip(a.state, b.state, strict=True):
            torch.testing.assert_close(other.cpu(), one, rtol=0, atol=0)
    rng, noises = np.random.default_rng(0), []
    for _ in range(4):
        for learner in (gpu.critics, gpu.actor):
            gpu.replay.sample(rng)
            learner.update(rng)
            noises.append(learner.random[0].tensor.clone())
    assert all((a != b).any() for a, b in zip(noises[1:], noises, strict=False))
    for learner in (gpu.critics, gpu.actor):
        assert all(map(math.isfinite, learner.read_metrics(4).values()))
