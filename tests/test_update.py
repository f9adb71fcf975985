"""MEow's target, loss and whole update; the training loops of the three scripts."""

import copy
import itertools

import numpy as np
import pytest
import torch
from stepped_run import RANDOM_STEPS, adam_steps, random_batch, trained

import meow_continuous_action as meow
import sac_continuous_action as sac
import sql_continuous_action as sql
from harness.envs import TrainingEnv
from harness.functional import (
    Hardware,
    adam,
    adam_moments,
    flatten_parameters,
    make_policy,
)
from harness.replay import split_batch
from meow_continuous_action import clip_gradient, soft_target

SCRIPTS = [meow, sac, sql]
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_flow(dtype=torch.float32, **settings):
    """A flow, S = 5 and A = 3, whose every parameter is random, and its settings."""
    args = meow.Args(**dict(learning_rate=1e-2, tau=0.1) | settings)
    flow = meow.make_flow(args, 5, 3).to(dtype)
    for p in flow.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return flow, args


def test_soft_target_by_hand():
    """The smaller value counts; a termination ends the future, a time-out doesn't."""
    reward, terminated = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0.0, 1.0, 0.0])
    v_next = torch.tensor([[10.0, 20.0], [10.0, 20.0], [3.0, -4.0]])
    target = soft_target(reward, terminated, v_next, gamma=0.9)
    torch.testing.assert_close(target, torch.tensor([10.0, 1.0, -5.6]))


def test_loss_by_hand():
    q, target = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([0.0, 2.0])
    expected = ((0.5 * 1 + 0.5 * 4) + (0.5 * 4 + 0.5 * 4)) / 2
    assert meow.meow_loss(q, target).item() == pytest.approx(expected)


def test_adam_is_pytorchs():
    theta = torch.randn(50, dtype=torch.float64)
    reference = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.Adam([reference], lr=1e-2)
    m, v, decay = adam_moments(theta)
    for _ in range(20):
        grad = torch.randn_like(theta)
        theta, m, v, decay = adam(theta, m, v, decay, grad, 1e-2)
        reference.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(theta, reference.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_clipping_is_pytorchs(scale):
    parameter = torch.nn.Parameter(torch.zeros(20))
    parameter.grad = scale * torch.randn(20)
    grad, norm = clip_gradient(parameter.grad.clone(), 30.0)
    expected = torch.nn.utils.clip_grad_norm_([parameter], 30.0)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("shifting", ["clipped", "single", "none"])
def test_update_against_autograd_and_torch_optim(shifting):
    """Three whole updates equal ordinary PyTorch: backward, clip_grad_norm_, Adam, Polyak."""
    network, args = make_flow(
        torch.float64, reward_shifting=shifting, max_grad_norm=0.05
    )
    flow, target_flow = (
        copy.deepcopy(network).requires_grad_(True),
        copy.deepcopy(network),
    )
    theta = flatten_parameters(network)
    state = [theta, theta.clone(), *adam_moments(theta)]
    update = torch.no_grad()(meow.make_update(network, 5, 3, args))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(3):
        batch, keep = random_batch(), torch.rand(4, 2, 32, 64) > 0.1
        metrics = update(*state, batch, keep)

        obs, action, next_obs, reward, terminated = split_batch(batch, 5, 3)
        v_next = target_flow.soft_values(next_obs)
        y = reward + 0.99 * (1 - terminated) * v_next.min(-1).values
        q = flow.q_values(obs, action, keep)
        loss = sum(0.5 * ((q[:, k] - y) ** 2).mean() for k in range(q.shape[1]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()
        for p, p_target in zip(
            flow.parameters(), target_flow.parameters(), strict=True
        ):
            p_target.copy_(0.9 * p_target + 0.1 * p.detach())

        gap = (q[:, 0] - q[:, -1]).abs().mean()
        expected = [loss, norm, q.mean(), v_next.mean(), y.mean(), gap]
        assert metrics.tolist() == pytest.approx([x.item() for x in expected], rel=1e-9)
        for vector, module in zip(state, (flow, target_flow), strict=False):
            expected = torch.nn.utils.parameters_to_vector(module.parameters())
            torch.testing.assert_close(vector, expected.detach(), rtol=1e-7, atol=1e-9)


def test_parameters_are_views_of_theta():
    flow, _ = make_flow()
    theta = flatten_parameters(flow)
    before = flow.q_values(torch.ones(1, 5), torch.zeros(1, 3))
    theta.mul_(1.5)
    assert (flow.q_values(torch.ones(1, 5), torch.zeros(1, 3)) != before).all()


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.0}, {"coupling": "affine"}, {"bf16": True}]
)
def test_loss_falls_on_a_fixed_batch(settings):
    run, rng, losses = trained(meow, **settings), np.random.default_rng(0), []
    run.replay.sample(rng)
    for step in range(25):
        run.learners[0].update(rng)
        losses.append(run.learners[0].read_metrics(step)["losses/loss"])
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_masks_have_the_right_rate_and_differ():
    keep, rng = meow.Keep(4, 2, 32, 64, dropout=0.1), np.random.default_rng(0)
    masks = []
    for _ in range(20):
        keep.fill(rng)
        masks.append(keep.tensor.clone())
    rate = 1 - torch.stack(masks).float().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / (20 * masks[0].numel())) ** 0.5
    assert all((a != b).any() for a, b in itertools.pairwise(masks))
    units = (
        torch.stack(masks).float().mean((0, 3))
    )  # no unit, layer or coupling is left out
    assert (units.std() < 0.05).item()


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_rounds_the_shifts_and_nothing_else(bf16):
    torch.manual_seed(0)
    exact, _ = make_flow()
    rounded = meow.make_flow(meow.Args(bf16=bf16), 5, 3)
    rounded.load_state_dict(exact.state_dict())
    obs, action = torch.randn(64, 5), torch.rand(64, 3) - 0.5
    gap = (rounded.shifts(obs) - exact.shifts(obs)).abs().max().item()
    assert (1e-6 < gap < 0.05) if bf16 else gap == 0
    torch.testing.assert_close(
        rounded.log_prob(obs, action), exact.log_prob(obs, action)
    )


def test_shifting_ablations_change_only_the_shifts():
    """log pi is the same in all; 'single' keeps one shift, 'none' gives the flow's own Q and V."""
    flows = [make_flow(reward_shifting=s)[0] for s in ("clipped", "single", "none")]
    own = flows[0].state_dict()
    for flow in flows[1:]:
        flow.load_state_dict({k: v for k, v in own.items() if k in flow.state_dict()})
    obs, action = torch.randn(8, 5), torch.rand(8, 3) - 0.5
    clipped, single, none = (flow.q_values(obs, action) for flow in flows)
    torch.testing.assert_close(single, clipped[:, :1])
    shift = flows[0].alpha * flows[0].shifts(obs)
    torch.testing.assert_close(none, clipped[:, :1] - shift[:, :1])
    log_probs = [flow.log_prob(obs, action) for flow in flows]
    torch.testing.assert_close(log_probs[1], log_probs[0])
    torch.testing.assert_close(log_probs[2], log_probs[0])


@pytest.mark.parametrize(("units", "ratio"), [("nats", 100.0), ("reward", 1.0)])
def test_how_fast_the_shifts_learn(units, ratio):
    """Adam's first step moves each output by as much: in nats it moves V in proportion to alpha."""
    moved = []
    for alpha in (1.0, 0.01):
        flow, args = make_flow(torch.float64, alpha=alpha, shift_units=units)
        batch, theta = random_batch(), flatten_parameters(flow)
        batch[:, -2] = (
            1e6  # rewards far above Q: the gradient has the same signs with either alpha
        )
        before = flow.alpha * flow.shifts(batch[:, :5])
        keep = torch.ones(4, 2, 32, 64, dtype=torch.bool)
        update = torch.no_grad()(meow.make_update(flow, 5, 3, args))
        update(theta, theta.clone(), *adam_moments(theta), batch, keep)
        moved.append(flow.alpha * flow.shifts(batch[:, :5]) - before)
    torch.testing.assert_close(moved[0], ratio * moved[1], rtol=1e-3, atol=0)


def test_affine_couplings_change_only_the_couplings():
    """With the scale outputs at zero an affine flow is the additive one."""
    additive, affine = (make_flow(coupling=c)[0] for c in ("additive", "affine"))
    state = additive.state_dict()
    for name, value in affine.state_dict().items():
        if (
            value.shape != state[name].shape
        ):  # the output layer holds scale first, then t
            state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    affine.load_state_dict(state)
    obs, action, z = torch.randn(8, 5), torch.rand(8, 3) - 0.5, torch.randn(8, 3)
    torch.testing.assert_close(
        affine.q_values(obs, action), additive.q_values(obs, action)
    )
    torch.testing.assert_close(affine.sample(obs, z)[0], additive.sample(obs, z)[0])


@every_script
def test_one_update_per_step_once_learning_has_begun(script):
    """None before learning_starts; then Adam counts one step and the parameters move each time."""
    counts, thetas = [], []

    def look(run):
        theta, *_, decay = run.learners[0].state[:5]
        counts.append(adam_steps(decay))
        thetas.append(theta.clone())

    run = trained(script, 6, after=look)
    assert counts == [0] * RANDOM_STEPS + [1, 2, 3, 4, 5, 6]
    assert all(
        (a != b).any() for a, b in itertools.pairwise(thetas[RANDOM_STEPS - 1 :])
    )
    assert run.metrics[:RANDOM_STEPS] == [{}] * RANDOM_STEPS
    assert all(metrics for metrics in run.metrics[RANDOM_STEPS:])


@every_script
def test_the_target_follows_by_tau_after_every_update(script):
    seen = []
    trained(
        script,
        4,
        after=lambda r: seen.append([t.clone() for t in r.learners[0].state[:2]]),
    )
    seen = seen[RANDOM_STEPS - 1 :]
    assert torch.equal(*seen[0])
    for (_, before), (theta, target) in itertools.pairwise(seen):
        torch.testing.assert_close(target, 0.9 * before + 0.1 * theta)
        assert (target != theta).any()


@every_script
def test_the_target_network_gets_no_gradient(script):
    """With tau = 1e-9 theta' stays, though theta moves."""
    run = trained(script, tau=1e-9)
    theta, target = (t.clone() for t in run.learners[0].state[:2])
    run.update(np.random.default_rng(0))
    assert (run.learners[0].state[0] - theta).abs().max() > 1e-4
    torch.testing.assert_close(run.learners[0].state[1], target, rtol=0, atol=1e-7)


@every_script
def test_acting_draws_from_the_policy_without_dropout(script):
    """The stored action is `sample` of the policy before the update and of the run's own noise."""
    policies, settings = [], {"dropout": 0.9} if script is meow else {}

    def look(run):
        policies.append(copy.deepcopy(next(iter(run.policy.values()))))

    run = trained(script, 3, after=look, **settings)
    rng = np.random.default_rng(run.args.seed)
    rng.uniform(-1, 1, (RANDOM_STEPS, 3))
    z = torch.from_numpy(rng.standard_normal((1, 3), dtype=np.float32))
    obs, action = run.replay.rows[RANDOM_STEPS, None].split([5, 3, 7], -1)[:2]
    close = dict(
        rtol=1e-5, atol=1e-6
    )  # products may round by where an array lies in memory
    expected = policies[RANDOM_STEPS - 1].sample(obs, z)[0]
    torch.testing.assert_close(action, expected, **close)
    both, z = torch.cat([obs, -obs]), torch.cat([z, -z])
    played = run.evaluator.policy(both, z)
    torch.testing.assert_close(played, policies[-1].sample(both, z)[0], **close)
    assert torch.equal(run.evaluator.policy(both, z), played)


def test_replay_pre_tanh_is_the_same_run_but_for_rounding(monkeypatch):
    """The buffer keeps u, the environment and every evaluation get a = tanh(u)."""
    played, step = [], TrainingEnv.step
    monkeypatch.setattr(
        TrainingEnv, "step", lambda env, a: played.append(a) or step(env, a)
    )
    usual, run = trained(meow, 8), trained(meow, 8, replay_pre_tanh=True)
    before, after = torch.from_numpy(np.array(played)).split(len(played) // 2)
    close, n = dict(rtol=1e-3, atol=1e-4), RANDOM_STEPS + 8
    torch.testing.assert_close(after, before, **close)
    torch.testing.assert_close(usual.replay.rows[:n, 5:8], before, rtol=0, atol=0)
    torch.testing.assert_close(torch.tanh(run.replay.rows[:n, 5:8]), after)
    assert (run.replay.rows[:n, 5:8] - after).abs().max() > 1
    torch.testing.assert_close(
        run.learners[0].state[0], usual.learners[0].state[0], **close
    )
    saved = meow.load_evaluator(run.args, {"flow": run.policy["flow"].state_dict()})
    obs, z = torch.randn(2, 5), 3 * torch.randn(2, 3)
    expected = torch.tanh(run.policy["flow"].sample(obs, z)[0])
    for evaluator in (run.evaluator, saved):
        torch.testing.assert_close(evaluator.policy(obs, z), expected)


@every_script
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_has_no_noise_unless_asked_for(script, deterministic, tmp_path):
    run, noises = trained(script, deterministic_eval=deterministic), []
    policy = run.evaluator.policy
    run.evaluator.policy = lambda obs, z: noises.append(z.clone()) or policy(obs, z)
    returns, lengths = run.evaluator.run(0, tmp_path / "unused.mp4")
    assert lengths == [4, 4]
    assert returns[0] != returns[1]
    assert torch.stack(noises).any().item() is not deterministic


@every_script
def test_a_restored_run_goes_on_exactly(script):
    """Networks, Adam's moments, target, replay and random numbers, bit for bit."""
    checkpoints = []
    whole = trained(script, 6, after=lambda run: checkpoints.append(run.checkpointed()))
    rest = trained(script, 6, restored=checkpoints[RANDOM_STEPS + 2])
    assert rest.metrics == whole.metrics[-3:]
    for one, other in zip(whole.learners, rest.learners, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state, other.state, strict=True)
        )


@every_script
@pytest.mark.parametrize("what", ["target network", "reward"])
def test_training_stops_at_an_update_that_is_not_finite(script, what):
    """It says where, and which number."""

    def spoil(run):
        if run.step == RANDOM_STEPS + 2:
            if what == "target network":
                run.learners[0].state[1].fill_(float("nan"))
            else:
                run.replay.rows[:, -2] = float("inf")

    error = rf"the update at step {RANDOM_STEPS + 2} gave losses/\w+ = (nan|inf)"
    with pytest.raises(FloatingPointError, match=error):
        trained(script, 6, after=spoil)


@pytest.mark.parametrize("n", [1, 3])
def test_policy_gives_the_flows_actions(n):
    run, rng = trained(meow), np.random.default_rng(n)
    flow, theta = run.policy["flow"], run.learners[0].state[0]
    policy = make_policy(flow, theta, 5, 3, n, run.hardware)
    obs, z = (rng.standard_normal((n, dim), dtype=np.float32) for dim in (5, 3))
    close = dict(rtol=1e-5, atol=1e-6)
    expected = flow.to_action(torch.from_numpy(obs), torch.from_numpy(z))[0]
    torch.testing.assert_close(policy(obs, z), expected, **close)
    mode = flow.mode_action(torch.from_numpy(obs))
    torch.testing.assert_close(policy(obs, np.zeros_like(z)), mode, **close)


@pytest.mark.slow
@every_script
def test_compiled_equals_eager(script):
    """Metrics, parameters, target, moments and actions after six steps of training."""
    eager, compiled = trained(script, 6), trained(script, 6, compiled=True)
    for one, other in zip(eager.learners, compiled.learners, strict=True):
        torch.testing.assert_close(other.metrics, one.metrics, rtol=1e-3, atol=1e-3)
        for a, b in zip(one.state, other.state, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-2, atol=2e-3)
    obs, z = torch.ones(2, 5), torch.full((2, 3), 0.5)
    actions = [run.evaluator.policy(obs, z) for run in (eager, compiled)]
    torch.testing.assert_close(*actions, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_compiled_updates_keep_their_own_settings():
    """Functions of one process, compiled without guards, don't share each other's constants."""

    def make(gamma):
        return lambda x: gamma * x

    hardware, one = Hardware(cuda=False, torch_threads=1, compile=True), torch.ones(3)
    half, third = (hardware.compile(make(gamma)) for gamma in (0.5, 0.25))
    assert [half(one)[0], third(one)[0], half(one)[0]] == [0.5, 0.25, 0.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
@every_script
def test_cuda_graphs(script, compiled):
    """Capture leaves the state alone; replays draw new numbers, move theta and stay finite."""
    cpu, gpu = trained(script), trained(script, cuda=True, compiled=compiled)
    for one, other in zip(cpu.learners, gpu.learners, strict=True):
        for a, b in zip(one.state, other.state, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0)
    theta, rng, drawn = gpu.learners[0].state[0].clone(), np.random.default_rng(0), []
    for _ in range(3):
        gpu.update(rng)
        drawn.append(
            [x.tensor.clone() for learner in gpu.learners for x in learner.random]
        )
    assert all((a != b).any() for a, b in zip(drawn[0], drawn[1], strict=True))
    assert (gpu.learners[0].state[0] != theta).any()
    for learner in gpu.learners:
        learner.read_metrics(3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_follows_the_cpu(compiled):
    """Five updates of MEow without dropout, which need no random numbers."""
    runs = [
        trained(meow, dropout=0.0),
        trained(meow, dropout=0.0, cuda=True, compiled=compiled),
    ]
    runs[1].replay.load_state_dict(runs[0].replay.state_dict())
    rngs = [np.random.default_rng(3) for _ in runs]
    for _ in range(5):
        for run, rng in zip(runs, rngs, strict=True):
            run.update(rng)
    theta, other = (run.learners[0].state[0].cpu() for run in runs)
    torch.testing.assert_close(other, theta, rtol=1e-3, atol=1e-3)
