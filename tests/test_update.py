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
from harness.compiling import Compiler, flatten_parameters, function_of_parameters
from harness.errors import RunError
from meow_continuous_action import (
    adam,
    adam_moments,
    clip_gradient,
    make_policy,
    soft_target,
    split_batch,
)

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
    """Three whole updates equal ordinary PyTorch: backward, clip_grad_norm_, Adam,
    Polyak.
    """
    network, args = make_flow(
        torch.float64, reward_shifting=shifting, max_grad_norm=0.05
    )
    flow, target_flow = (
        copy.deepcopy(network).requires_grad_(True),
        copy.deepcopy(network),
    )
    theta = flatten_parameters(network)
    state = [theta, theta.clone(), *adam_moments(theta)]
    update = torch.no_grad()(meow.make_update(network, args))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(3):
        batch, kept = random_batch(), torch.rand(4, 2, 32, 64) > 0.1
        metrics = update(*state, batch, kept)

        obs, action, next_obs, reward, terminated = split_batch(batch, 5, 3)
        v_next = target_flow.soft_values(next_obs)
        y = reward + 0.99 * (1 - terminated) * v_next.min(-1).values
        q = flow.q_values(obs, action, kept)
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


def learned(run, name="learner"):
    """The tensors that the run's learner changes: theta, theta', ..."""
    return run.parts[name]


def learners(run):
    """All of them."""
    return [part for name, part in run.parts.items() if "learner" in name]


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.0}, {"coupling": "affine"}], ids=str
)
def test_loss_falls_on_a_fixed_batch(settings):
    run, rng = trained(meow, **settings), np.random.default_rng(0)
    flow, losses = run.policy["flow"], []
    update = torch.no_grad()(meow.make_update(flow, run.args))
    kept = torch.ones(4, 2, 32, 64, dtype=torch.bool)
    batch = run.replay.sample(rng)
    for _ in range(25):
        meow.draw_dropout(kept, run.args.dropout, rng)
        losses.append(update(*run.parts["learner"], batch, kept)[0].item())
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_masks_have_the_right_rate_and_differ():
    kept, rng = torch.ones(4, 2, 32, 64, dtype=torch.bool), np.random.default_rng(0)
    masks = []
    for _ in range(20):
        meow.draw_dropout(kept, 0.1, rng)
        masks.append(kept.clone())
    rate = 1 - torch.stack(masks).float().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / (20 * masks[0].numel())) ** 0.5
    assert all((a != b).any() for a, b in itertools.pairwise(masks))
    # no unit, layer or coupling is left out
    units = torch.stack(masks).float().mean((0, 3))
    assert (units.std() < 0.05).item()


def test_without_dropout_nothing_is_drawn():
    kept, rng = torch.ones(4, 2, 32, 64, dtype=torch.bool), np.random.default_rng(0)
    before = rng.bit_generator.state
    meow.draw_dropout(kept, 0.0, rng)
    assert kept.all()
    assert rng.bit_generator.state == before


def test_shifting_ablations_change_only_the_shifts():
    """log pi is the same in all; 'single' keeps one shift, 'none' gives the flow's
    own Q and V.
    """
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


def test_how_fast_the_shifts_learn():
    """Adam's first step moves each output by as much: V in proportion to alpha."""
    moved = []
    for alpha in (1.0, 0.01):
        flow, args = make_flow(torch.float64, alpha=alpha)
        batch, theta = random_batch(), flatten_parameters(flow)
        # rewards far above Q: the gradient has the same signs with either alpha
        batch[:, -2] = 1e6
        before = flow.alpha * flow.shifts(batch[:, :5])
        update = torch.no_grad()(meow.make_update(flow, args))
        update(theta, theta.clone(), *adam_moments(theta), batch)
        moved.append(flow.alpha * flow.shifts(batch[:, :5]) - before)
    torch.testing.assert_close(moved[0], 100 * moved[1], rtol=1e-3, atol=0)


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
    """None before learning_starts; then Adam counts one step and theta moves each
    time.
    """
    counts, thetas = [], []

    def look(run):
        theta, *_, decay = learners(run)[0][:5]
        counts.append(adam_steps(decay))
        thetas.append(theta.clone())

    run = trained(script, 6, after=look)
    assert counts == [0] * RANDOM_STEPS + [1, 2, 3, 4, 5, 6]
    moving = itertools.pairwise(thetas[RANDOM_STEPS - 1 :])
    assert all((a != b).any() for a, b in moving)
    assert run.metrics[:RANDOM_STEPS] == [{}] * RANDOM_STEPS
    assert all(metrics for metrics in run.metrics[RANDOM_STEPS:])


@every_script
def test_the_target_follows_by_tau_after_every_update(script):
    seen = []

    def look(run):
        seen.append([t.clone() for t in learners(run)[0][:2]])

    trained(script, 4, after=look)
    seen = seen[RANDOM_STEPS - 1 :]
    assert torch.equal(*seen[0])
    for (_, before), (theta, target) in itertools.pairwise(seen):
        torch.testing.assert_close(target, 0.9 * before + 0.1 * theta)
        assert (target != theta).any()


@every_script
def test_the_target_network_gets_no_gradient(script):
    """With tau = 1e-9 theta' stays, though theta moves."""
    run = trained(script, 1, tau=1e-9)
    first = trained(script, tau=1e-9)
    (theta, target), (theta_0, target_0) = learners(run)[0][:2], learners(first)[0][:2]
    assert (theta - theta_0).abs().max() > 1e-4
    torch.testing.assert_close(target, target_0, rtol=0, atol=1e-7)


@every_script
def test_acting_draws_from_the_policy_without_dropout(script):
    """The stored action is `sample` of the policy before the update, of the run's
    noise.
    """
    policies, settings = [], {"dropout": 0.9} if script is meow else {}

    def look(run):
        policies.append(copy.deepcopy(next(iter(run.policy.values()))))

    run = trained(script, 3, after=look, **settings)
    rng = np.random.default_rng(run.args.seed)
    rng.uniform(-1, 1, (RANDOM_STEPS, 3))
    z = torch.from_numpy(rng.standard_normal((1, 3), dtype=np.float32))
    obs, action = run.replay.rows[RANDOM_STEPS, None].split([5, 3, 7], -1)[:2]
    # products may round by where an array lies in memory
    close = dict(rtol=1e-5, atol=1e-6)
    expected = policies[RANDOM_STEPS - 1].sample(obs, z)[0]
    torch.testing.assert_close(action, expected, **close)


@every_script
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_has_no_noise_unless_asked_for(script, deterministic, monkeypatch):
    """Each of its actions is `sample` of the policy: with z = 0, or with drawn
    numbers.
    """
    seen, original = [], script.make_policy

    def make_policy(network, theta, n, *rest):
        policy = original(network, theta, n, *rest)

        def watched(obs, z):
            action = policy(obs, z)
            if n == 2:
                both = torch.from_numpy(obs), torch.from_numpy(z)
                expected = network.sample(*both)[0].numpy()
                np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)
                seen.append(z.copy())
            return action

        return watched

    monkeypatch.setattr(script, "make_policy", make_policy)
    run = trained(script, deterministic_eval=deterministic)
    ((step, returns),) = run.evaluations
    assert step == RANDOM_STEPS
    assert returns[0] != returns[1]
    assert len(seen) == 4  # steps of an episode
    assert np.any(seen) != deterministic


@every_script
def test_a_restored_run_goes_on_exactly(script):
    """Networks, Adam's moments, target, replay and random numbers, bit for bit."""
    checkpoints = []

    def look(run):
        checkpoints.append(run.checkpointed())

    whole = trained(script, 6, after=look)
    rest = trained(script, 6, restored=checkpoints[RANDOM_STEPS + 2])
    assert rest.metrics == whole.metrics[-3:]
    for one, other in zip(learners(whole), learners(rest), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_script
@pytest.mark.parametrize("what", ["target network", "reward"])
def test_an_update_that_is_not_finite_is_seen_at_once(script, what):
    """The run gets the numbers of the very step, and stops (see test_run.py)."""

    def spoil(run):
        if run.step == RANDOM_STEPS + 2:
            if what == "target network":
                learners(run)[0][1].fill_(float("nan"))
            else:
                run.replay.rows[:, -2] = float("inf")

    run = trained(script, 3, after=spoil, eval_episodes=0)
    finite = [np.isfinite(list(m.values())).all() for m in run.metrics[RANDOM_STEPS:]]
    assert finite == [True, True, False]


@pytest.mark.parametrize("n", [1, 3])
def test_policy_gives_the_flows_actions(n):
    run, rng = trained(meow), np.random.default_rng(n)
    flow, theta = run.policy["flow"], run.parts["learner"][0]
    policy = make_policy(flow, theta, n, run, "acting")
    obs, z = (rng.standard_normal((n, dim), dtype=np.float32) for dim in (5, 3))
    close = dict(rtol=1e-5, atol=1e-6)
    expected = flow.to_action(torch.from_numpy(obs), torch.from_numpy(z))[0].numpy()
    np.testing.assert_allclose(policy(obs, z), expected, **close)
    mode = flow.mode_action(torch.from_numpy(obs)).numpy()
    np.testing.assert_allclose(policy(obs, np.zeros_like(z)), mode, **close)


# --- Compiled -------------------------------------------------------------------------
def compiler(enabled=True):
    return Compiler(enabled, torch.device("cpu"), on_pause=print)


@pytest.mark.slow
@every_script
def test_compiled_equals_eager(script):
    """Metrics, parameters, target and moments after six steps of training."""
    eager, compiled = trained(script, 6), trained(script, 6, compiled=True)
    for one, other in zip(eager.metrics, compiled.metrics, strict=True):
        assert other == pytest.approx(one, rel=1e-2, abs=1e-2)
    for one, other in zip(learners(eager), learners(compiled), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
def test_compiled_functions_keep_their_own_settings(capsys):
    """Functions of one process don't share constants; compiling says when it ends."""

    def make(gamma):
        return lambda x: gamma * x

    one = torch.ones(3)
    half, third = (compiler()("scaling", make(gamma), one) for gamma in (0.5, 0.25))
    assert [half()[0], third()[0], half()[0]] == [0.5, 0.25, 0.5]
    text = capsys.readouterr().err
    assert text.count("compiling scaling, up to a minute the first time ...\n") == 2
    assert text.count("compiling scaling: done in ") == 2


@pytest.mark.slow
def test_compiling_leaves_the_tensors_alone():
    """The first run is the function's first, though it ran once to be compiled."""
    count = torch.zeros(1)
    add = compiler()("adding", lambda x: x.add_(1), count)
    for expected in (1, 2, 3):
        add()
        assert count.item() == expected


@pytest.mark.slow
def test_an_older_torch_compiles_too(monkeypatch):
    """Without isolated recompilation and without the guard filter: plain
    torch.compile.
    """
    original = torch.compile

    def older(model, *, fullgraph=False, dynamic=None, options=None):
        assert "guard_filter_fn" not in options
        return original(model, fullgraph=fullgraph, dynamic=dynamic, options=options)

    monkeypatch.setattr(torch, "compile", older)
    monkeypatch.delattr(torch.compiler, "skip_all_guards_unsafe")
    eager, compiled = trained(meow, 6), trained(meow, 6, compiled=True)
    for a, b in zip(learned(eager), learned(compiled), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
def test_what_can_not_be_compiled_says_what_to_do(monkeypatch):
    """Such as a cache that can't be written."""

    def fails(*_args, **_options):
        def function(*_tensors):
            raise PermissionError(13, "Permission denied", "/cache")

        return function

    monkeypatch.setattr(torch, "compile", fails)
    run = compiler()("nothing", lambda x: x, torch.ones(1))
    with pytest.raises(
        RunError, match=r"--no-compile does without .*Permission denied"
    ):
        run()


# --- On a GPU -------------------------------------------------------------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@every_script
def test_cuda_graphs(script, compiled):
    """Capture leaves the state alone; training draws new numbers and stays finite."""
    cpu, gpu = trained(script), trained(script, cuda=True, compiled=compiled)
    for one, other in zip(learners(cpu), learners(gpu), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0)
    thetas = []
    run = trained(
        script,
        3,
        cuda=True,
        compiled=compiled,
        after=lambda run: thetas.append(learners(run)[0][0].clone()),
    )
    assert all((a != b).any() for a, b in itertools.pairwise(thetas[-4:]))
    assert all(np.isfinite(list(m.values())).all() for m in run.metrics)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_follows_the_cpu(compiled):
    """Five updates of MEow without dropout, which need no random numbers."""
    run = trained(meow, dropout=0.0)
    rows = run.replay.sample(np.random.default_rng(3))
    results = []
    for device in ("cpu", "cuda"):
        flow = copy.deepcopy(run.policy["flow"]).to(device)
        theta = flatten_parameters(flow)
        state = [theta, theta.clone(), *adam_moments(theta)]
        batch = rows.to(device)
        compile = Compiler(compiled, torch.device(device), on_pause=print)
        update = compile("it", meow.make_update(flow, run.args), *state, batch)
        for _ in range(5):
            update()
        results.append(theta.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_a_function_of_parameters_is_the_method():
    flow, _ = make_flow()
    theta = flatten_parameters(flow)
    obs = torch.randn(4, 5)
    values = function_of_parameters(flow.soft_values)
    assert torch.equal(values(theta, obs), flow.soft_values(obs))
    assert (values(0.5 * theta, obs) != flow.soft_values(obs)).any()
