"""SAC: density, targets and losses; whole updates against ordinary PyTorch."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from stepped_run import RANDOM_STEPS, SCALE, adam_steps, random_batch, trained
from torch.distributions import (
    AffineTransform,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

import sac_continuous_action as sac
from harness.compiling import flatten_parameters
from sac_continuous_action import Actor, Args, Critics, adam_moments, split_batch

CRITICS_UPDATE, ACTORS_UPDATE = "the critics' update", "the actor's update"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_actor(obs_dim=5, scale=SCALE):
    actor = Actor(obs_dim, len(scale), scale, alpha=1.0).double().requires_grad_(False)
    actor.action_scale.copy_(scale)  # which has been through float32
    return actor


def test_log_prob_is_pytorchs_with_the_action_scale():
    """Over the environment's own actions, scale tanh(u), by torch.distributions."""
    actor = make_actor()
    obs = torch.randn(50, 5, dtype=torch.float64)
    noise = torch.randn(50, 3, dtype=torch.float64)
    action, log_prob = actor.sample(obs, noise)
    mean, log_std = actor.gaussian(obs)
    transforms = [TanhTransform(cache_size=1), AffineTransform(0.0, SCALE)]
    reference = TransformedDistribution(Normal(mean, log_std.exp()), transforms)
    expected = Independent(reference, 1).log_prob(action * SCALE)
    close = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_prob, expected, **close)
    torch.testing.assert_close(actor.log_prob(obs, action), expected, **close)


def test_density_integrates_to_one():
    """Over the environment's actions [-0.4, 0.4]: quadrature in float64."""
    actor = make_actor(scale=torch.tensor([0.4], dtype=torch.float64))
    action = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    obs = torch.randn(1, 5).double().expand(len(action), -1)
    density = actor.log_prob(obs, action).exp()
    integral = torch.trapezoid(density, 0.4 * action[:, 0])
    assert integral.item() == pytest.approx(1, abs=1e-4)


def test_log_sigma_stays_between_its_bounds():
    actor = make_actor()
    _, log_std = actor.gaussian(1e4 * torch.randn(100, 5, dtype=torch.float64))
    assert log_std.min() >= -5
    assert log_std.max() <= 2
    assert (log_std.max() - log_std.min()) > 6


def test_targets_and_losses_by_hand():
    """Minimum of the critics, entropy bonus, termination; sum of squares."""
    q = torch.tensor([[3.0, 5.0], [9.0, 8.0]])
    log_prob, alpha = torch.tensor([-2.0, 1.0]), torch.tensor(0.5)
    reward, terminated = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
    y = sac.soft_target(reward, terminated, q, log_prob, alpha, 0.9)
    torch.testing.assert_close(y, torch.tensor([1 + 0.9 * (3 + 1.0), 1.0]))
    target = torch.tensor([2.0, 8.0])
    assert sac.critic_loss(q, target).item() == pytest.approx((1 + 9 + 1 + 0) / 2)
    loss = sac.actor_loss(q, log_prob, alpha)
    assert loss.item() == pytest.approx((-1.0 - 3 + 0.5 - 8) / 2)
    loss = sac.temperature_loss(alpha.log()[None], log_prob, -3.0)
    assert loss.item() == pytest.approx(0.5 * 3.5)


@pytest.mark.parametrize(
    "settings", [{}, {"autotune": False}, {"reward_shifting": "clipped"}], ids=str
)
def test_updates_against_autograd_and_torch_optim(settings):
    """Four updates of each kind equal ordinary PyTorch with three torch Adams."""
    args = Args(q_lr=1e-2, policy_lr=1e-2, tau=0.1, **settings)
    networks = [net.double() for net in sac.make_networks(args, 5, 3, SCALE)]
    for p in networks[1].parameters():
        p.add_(0.1 * torch.randn_like(p))
    actor, critics = copy.deepcopy(networks)
    targets = copy.deepcopy(critics)
    actor.requires_grad_(True)
    critics.requires_grad_(True)
    phi, theta = map(flatten_parameters, networks)
    log_alpha = networks[0].log_alpha
    critic_state = [theta, theta.clone(), *adam_moments(theta)]
    actor_state = [phi, *adam_moments(phi), log_alpha, *adam_moments(log_alpha)]
    critic_update = torch.no_grad()(sac.make_critic_update(*networks, args))
    actor_update = torch.no_grad()(sac.make_actor_update(*networks, args))
    own_log_alpha = log_alpha.clone().requires_grad_(True)
    q_adam = torch.optim.Adam(critics.parameters(), lr=1e-2)
    pi_adam = torch.optim.Adam(actor.parameters(), lr=1e-2)
    alpha_adam = torch.optim.Adam([own_log_alpha], lr=1e-2)
    for _ in range(4):
        batch, noise = random_batch(), torch.randn(2, 32, 3, dtype=torch.float64)
        critic_metrics = critic_update(*critic_state, phi, log_alpha, batch, noise[0])
        actor_metrics = actor_update(*actor_state, theta, batch, noise[1])

        obs, action, next_obs, reward, terminated = split_batch(batch, 5, 3)
        with torch.no_grad():
            alpha = own_log_alpha.exp()
            next_action, log_prob = actor.sample(next_obs, noise[0])
            q_next = targets.q_values(next_obs, next_action).min(-1).values
            y = reward + 0.99 * (1 - terminated) * (q_next - alpha * log_prob)
        q = critics.q_values(obs, action)
        loss = ((q[:, 0] - y) ** 2).mean() + ((q[:, 1] - y) ** 2).mean()
        q_adam.zero_grad()
        loss.backward()
        q_adam.step()
        pairs = zip(critics.parameters(), targets.parameters(), strict=True)
        with torch.no_grad():
            for p, p_target in pairs:
                p_target.copy_(0.9 * p_target + 0.1 * p)
        new_action, log_prob = actor.sample(obs, noise[1])
        q_pi = critics.q_values(obs, new_action).min(-1).values
        pi_loss = (alpha * log_prob - q_pi).mean()
        pi_adam.zero_grad()
        pi_loss.backward()
        pi_adam.step()
        alpha_loss = (-own_log_alpha.exp() * (log_prob.detach() - 3)).mean()
        if args.autotune:
            alpha_adam.zero_grad()
            alpha_loss.backward()
            alpha_adam.step()

        expected = [loss.item(), *q.mean(0).tolist(), y.mean().item()]
        assert critic_metrics.tolist() == pytest.approx(expected, rel=1e-9)
        expected = [pi_loss, alpha_loss, own_log_alpha.exp(), -log_prob.mean()]
        expected = [x.item() for x in expected]
        assert actor_metrics.tolist() == pytest.approx(expected, rel=1e-9)
        pairs = (theta, critics), (critic_state[1], targets), (phi, actor)
        for vector, module in pairs:
            expected = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
            torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-9)
        assert log_alpha.item() == pytest.approx(own_log_alpha.item(), rel=1e-9)


def test_temperature_moves_entropy_to_its_target():
    """alpha falls while the entropy is above -A and grows while it is below."""
    for log_prob, grows in ((9.0, True), (-9.0, False)):
        log_alpha, log_probs = torch.zeros(1), torch.full((8,), log_prob)
        grad = torch.func.grad(sac.temperature_loss)(log_alpha, log_probs, -3.0)
        assert (grad.item() < 0) is grows


def test_entropy_is_rewarded():
    """With Q = 0 the actor's updates raise the entropy, which raises the target."""
    run, rng, entropies = trained(sac), np.random.default_rng(0), []
    actor, noise = run.policy["actor"], run.tensors[ACTORS_UPDATE][-1]
    for theta in run.parts["learner"][:2]:
        theta.zero_()
    for _ in range(60):
        run.replay.sample(rng)
        sac.draw_normal(noise, rng)
        entropies.append(run.functions[ACTORS_UPDATE]()[3].item())
    assert np.mean(entropies[-10:]) > np.mean(entropies[:10]) + 0.5
    assert entropies[-1] > 0
    actor.log_alpha.fill_(2.0)  # alpha = e^2
    target = run.functions[CRITICS_UPDATE]()[3]
    reward = split_batch(run.replay.batch, 5, 3)[3].mean()
    assert target > reward + 1


def test_fixed_temperature_stays():
    run = trained(sac, 6, autotune=False, alpha=0.7)
    assert run.policy["actor"].log_alpha.exp().item() == pytest.approx(0.7)
    assert run.metrics[-1]["losses/alpha"] == pytest.approx(0.7)


def test_the_learned_temperature_is_saved_with_the_actor():
    run = trained(sac, 6)
    saved = run.policy["actor"].state_dict()["log_alpha"].item()
    assert math.exp(saved) == pytest.approx(run.metrics[-1]["losses/alpha"])
    assert saved != 0


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_the_actors_updates_are_delayed_and_as_many(frequency):
    """Every so many steps as many updates of actor and temperature; none in between."""
    counts, phis = [], []

    def look(run):
        phi, _, _, decay, _, _, _, decay_alpha = run.tensors[ACTORS_UPDATE][:8]
        counts.append((adam_steps(decay), adam_steps(decay_alpha)))
        phis.append(phi.clone())

    run = trained(sac, 6, after=look, policy_frequency=frequency)
    expected = [frequency * (i // frequency) for i in range(1, 7)]
    assert counts == [(0, 0)] * RANDOM_STEPS + [(n, n) for n in expected]
    pairs = itertools.pairwise(phis[RANDOM_STEPS - 1 :])
    moved = [(before != after).any().item() for before, after in pairs]
    assert moved == [i % frequency == 0 for i in range(1, 7)]
    assert list(run.metrics[-1]) == sac.CRITIC_METRICS + sac.ACTOR_METRICS


def test_the_actors_losses_are_repeated_until_its_next_update():
    """Also by a run that goes on from a checkpoint between two of its updates."""
    checkpoints = []

    def look(run):
        checkpoints.append(run.checkpointed())

    whole = trained(sac, 6, after=look, policy_frequency=3)
    losses = [row["losses/actor_loss"] for row in whole.metrics[RANDOM_STEPS:]]
    assert losses[0] == losses[1] == 0
    assert losses[2] == losses[3] == losses[4] != 0
    assert losses[5] not in (0, losses[4])
    restored = checkpoints[RANDOM_STEPS + 3]  # after four updates of the critics
    rest = trained(sac, 6, restored=restored, policy_frequency=3)
    assert rest.metrics == whole.metrics[RANDOM_STEPS + 4 :]


def test_random_numbers_are_drawn_in_one_order():
    """Action, batch, the critics' noise, and noise for each of the actor's updates."""
    run = trained(sac, 4, seed=5)
    rng = np.random.default_rng(5)
    rng.uniform(-1, 1, (RANDOM_STEPS, 3))
    for step in range(RANDOM_STEPS, RANDOM_STEPS + 4):
        rng.standard_normal((1, 3), dtype=np.float32)
        index = rng.integers(0, step, 32)
        for _ in range(3 if step % 2 else 1):
            noise = rng.standard_normal((32, 3), dtype=np.float32)
    assert run.rng.bit_generator.state == rng.bit_generator.state
    assert torch.equal(run.replay.batch, run.replay.rows[index])
    np.testing.assert_array_equal(run.tensors[ACTORS_UPDATE][-1].numpy(), noise)


def test_reward_shifts_start_at_zero_and_leave_the_actor_alone():
    """b_k depends on the state alone: equal Q differences, the same actor gradient."""
    _, critics = sac.make_networks(Args(reward_shifting="clipped"), 5, 3)
    state, plain = critics.state_dict(), Critics(5, 3)
    plain.load_state_dict({k: v for k, v in state.items() if k.startswith("q.")})
    obs, action = torch.randn(8, 5), torch.rand(8, 3) - 0.5

    def gap(action):
        return critics.q_values(obs, action) - plain.q_values(obs, action)

    assert (gap(action) == 0).all()
    for p in critics.b.parameters():
        p.add_(torch.randn_like(p))
    assert gap(action).abs().min() > 1e-3
    torch.testing.assert_close(gap(action), gap(-action))


def test_the_environments_own_action_range_enters_the_density(tmp_path):
    """Training stores half the range, here of unlike bounds; evaluation reads it."""
    words = "--env-id scripted_env:Scripted-v0 --total-timesteps 30 --batch-size 8"
    words += (
        f" --learning-starts 20 --eval-episodes 1 --no-compile --runs-dir {tmp_path}"
    )
    assert sac.main(Args, sac.train, sac.evaluate_saved, words.split()) == 0
    (folder,) = tmp_path.iterdir()
    saved = torch.load(folder / "policy_final.pt", weights_only=True)
    torch.testing.assert_close(saved["actor"]["action_scale"], torch.tensor([0.4, 0.5]))
    words = ["--evaluate", str(folder)]
    assert sac.main(Args, sac.train, sac.evaluate_saved, words) == 0
