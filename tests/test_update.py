"""Target, loss, optimiser and the whole update, eager and compiled."""

import dataclasses

import numpy as np
import pytest
import torch

import meow_continuous_action as meow
from meow_continuous_action import Args, Learner, ReplayBuffer, soft_target


def make_learner(compiled=False, dtype=torch.float32, **settings):
    """A learner with random parameters and 64 random transitions, S = 5 and A = 3."""
    args = Args(batch_size=32, learning_rate=1e-2, tau=0.1, **settings)
    torch.manual_seed(0)
    replay = ReplayBuffer(64, 5, 3)
    rng = np.random.default_rng(0)
    for i in range(64):
        replay.add(
            rng.normal(size=5), rng.uniform(-1, 1, 3), rng.normal(size=5), rng.normal(), i % 4 == 0
        )
    flow = meow.make_flow(args, 5, 3)
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return Learner(flow.to(dtype), replay, args, compiled)


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
    torch.manual_seed(0)
    theta = torch.randn(50, dtype=torch.float64)
    reference = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.Adam([reference], lr=1e-2)
    m, v, decay = torch.zeros_like(theta), torch.zeros_like(theta), torch.ones(2).double()
    for _ in range(20):
        grad = torch.randn_like(theta)
        theta, m, v, decay = meow.adam(theta, m, v, decay, grad, 1e-2)
        reference.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(theta, reference.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_clipping_is_pytorchs(scale):
    parameter = torch.nn.Parameter(torch.zeros(20))
    parameter.grad = scale * torch.randn(20)
    grad, norm = meow.clip_gradient(parameter.grad.clone(), 30.0)
    expected = torch.nn.utils.clip_grad_norm_([parameter], 30.0)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("shifting", ["clipped", "single", "none"])
def test_update_against_autograd_and_torch_optim(shifting):
    """Three whole updates equal ordinary PyTorch: backward, clip_grad_norm_, Adam, Polyak."""
    learner = make_learner(dtype=torch.float64, reward_shifting=shifting, max_grad_norm=0.05)
    args, state = Args(), [t.clone() for t in learner.state]
    flow, target_flow = (
        meow.EnergyFlow(5, 3, 0.2, -5.0, -0.3, reward_shifting=shifting).double() for _ in "12"
    )
    for module in (flow, target_flow):
        module.load_state_dict(learner.flow.state_dict())
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    update = meow.make_update(
        learner.flow,
        learner.replay.splits,
        dataclasses.replace(args, learning_rate=1e-2, tau=0.1, max_grad_norm=0.05),
    )
    for _ in range(3):
        batch = learner.replay.rows[torch.randint(64, (32,))].double()
        keep = torch.rand(4, 2, 32, 64) > 0.1
        metrics = update(*state, batch, keep)
        obs, action, next_obs, reward, terminated = batch.split(learner.replay.splits, dim=-1)
        with torch.no_grad():
            v_next = target_flow.soft_values(next_obs).min(-1).values
            y = reward[:, 0] + 0.99 * (1 - terminated[:, 0]) * v_next
        q = flow.q_values(obs, action, keep)
        loss = sum(0.5 * ((q[:, k] - y) ** 2).mean() for k in range(q.shape[1]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.05)
        optimizer.step()
        for p, p_target in zip(flow.parameters(), target_flow.parameters(), strict=True):
            p_target.data = 0.9 * p_target.data + 0.1 * p.data
        assert metrics[0].item() == pytest.approx(loss.item(), rel=1e-9)
        assert metrics[1].item() == pytest.approx(norm.item(), rel=1e-9)
        for vector, module in zip(state, (flow, target_flow), strict=False):
            expected = torch.cat([p.detach().flatten() for p in module.parameters()])
            torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-9)


def test_target_equals_online_at_the_start():
    learner = make_learner()
    theta, target_theta = learner.state[:2]
    assert torch.equal(theta, target_theta)
    assert theta.data_ptr() != target_theta.data_ptr()


def test_parameters_are_views_of_theta():
    learner = make_learner()
    before = learner.flow.q_values(torch.ones(1, 5), torch.zeros(1, 3))
    learner.state[0].mul_(1.5)
    assert (learner.flow.q_values(torch.ones(1, 5), torch.zeros(1, 3)) != before).all()


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.0}, {"coupling": "affine"}, {"bf16": True}])
def test_loss_falls_on_a_fixed_batch(settings):
    learner, rng = make_learner(**settings), np.random.default_rng(0)
    learner.update(rng)
    first = learner.read_metrics(0)["losses/loss"]
    for _ in range(60):
        learner.update(rng)
    assert learner.read_metrics(60)["losses/loss"] < 0.7 * first


def test_no_update_of_the_target_with_gradients():
    """With tau = 1e-9 the target parameters stay, though theta moves: no gradient reaches them."""
    learner, rng = make_learner(), np.random.default_rng(0)
    before = [t.clone() for t in learner.state[:2]]
    learner._update = meow.make_update(
        learner.flow, learner.replay.splits, Args(batch_size=32, tau=1e-9)
    )
    learner.update(rng)
    assert (learner.state[0] - before[0]).abs().max() > 1e-4
    torch.testing.assert_close(learner.state[1], before[1], rtol=0, atol=1e-7)


def test_dropout_masks_have_the_right_rate_and_differ():
    learner, rng, masks = make_learner(), np.random.default_rng(0), []
    for _ in range(20):
        learner.update(rng)
        masks.append(learner.keep.clone())
    rate = 1 - torch.stack(masks).float().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / (20 * learner.keep.numel())) ** 0.5
    assert all((a != b).any() for a, b in zip(masks[1:], masks, strict=False))
    units = torch.stack(masks).float().mean((0, 3))  # no unit, layer or coupling is left out
    assert (units.std() < 0.05).item()


@pytest.mark.parametrize("what", ["theta", "batch"])
def test_a_non_finite_update_raises_and_says_what(what):
    learner, rng = make_learner(), np.random.default_rng(0)
    if what == "theta":
        learner.state[0][0] = float("nan")
    else:
        learner.replay.rows[:, -2] = float("inf")
    learner.update(rng)
    with pytest.raises(FloatingPointError, match=r"step 17 is not finite: losses/loss = (nan|inf)"):
        learner.read_metrics(17)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_rounds_the_shifts_and_nothing_else(bf16):
    learner = make_learner(bf16=bf16)
    exact = make_learner()
    obs, action = torch.randn(64, 5), torch.rand(64, 3) - 0.5
    gap = (learner.flow.shifts(obs) - exact.flow.shifts(obs)).abs().max().item()
    assert (1e-6 < gap < 0.05) if bf16 else gap == 0
    torch.testing.assert_close(learner.flow.log_prob(obs, action), exact.flow.log_prob(obs, action))


def test_compiled_equals_eager():
    """Loss, parameters and target after five updates with the same batches and dropout masks."""
    eager, compiled = make_learner(), make_learner(compiled=True)
    rngs = [np.random.default_rng(3) for _ in "12"]
    for _ in range(5):
        for learner, rng in zip((eager, compiled), rngs, strict=True):
            learner.update(rng)
        assert torch.equal(eager.keep, compiled.keep)
        torch.testing.assert_close(compiled.metrics, eager.metrics, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.state[0], eager.state[0], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(compiled.state[1], eager.state[1], rtol=1e-4, atol=2e-4)
    obs, z = np.ones((1, 5), np.float32), np.full((1, 3), 0.5, np.float32)
    actions = [learner.make_actor(1)(obs, z) for learner in (eager, compiled)]
    np.testing.assert_allclose(*actions, atol=1e-4)


def test_compiled_learners_keep_their_own_settings():
    """Learners in one process, compiled without guards, don't share each other's constants."""
    slow, fast = make_learner(compiled=True, gamma=0.0), make_learner(compiled=True)
    for learner in (slow, fast):
        learner.update(np.random.default_rng(0))
    assert slow.read_metrics(0)["flow/target"] != fast.read_metrics(0)["flow/target"]


@pytest.mark.parametrize("n", [1, 3])
def test_actor_gives_the_flows_actions(n):
    learner = make_learner()
    act = learner.make_actor(n)
    rng = np.random.default_rng(n)
    obs, z = (rng.standard_normal((n, dim), dtype=np.float32) for dim in (5, 3))
    expected = learner.flow.to_action(torch.from_numpy(obs), torch.from_numpy(z))[0]
    close = dict(rtol=1e-5, atol=1e-6)  # products may round by where an array lies in memory
    np.testing.assert_allclose(act(obs, z), expected.numpy(), **close)
    mode = learner.flow.mode_action(torch.from_numpy(obs))
    np.testing.assert_allclose(act(obs, np.zeros_like(z)), mode.numpy(), **close)


def test_shifting_ablations_change_only_the_shifts():
    """log pi is the same in all; 'single' keeps one shift, 'none' gives the flow's own Q and V."""
    flows = [make_learner(reward_shifting=s).flow for s in ("clipped", "single", "none")]
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


def test_affine_couplings_change_only_the_couplings():
    """With the scale outputs at zero an affine flow is the additive one."""
    additive, affine = (make_learner(coupling=c).flow for c in ("additive", "affine"))
    state = additive.state_dict()
    for name, value in affine.state_dict().items():
        if value.shape != state[name].shape:  # the output layer holds scale first, then t
            state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
            assert state[name].shape == value.shape
    affine.load_state_dict(state)
    obs, action = torch.randn(8, 5), torch.rand(8, 3) - 0.5
    torch.testing.assert_close(affine.q_values(obs, action), additive.q_values(obs, action))
    z = torch.randn(8, 3)
    torch.testing.assert_close(affine.to_action(obs, z)[0], additive.to_action(obs, z)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph(compiled):
    """Capture leaves the state alone; replays draw new masks and follow the CPU's update."""
    cpu = make_learner(dropout=0.0)
    args = Args(batch_size=32, learning_rate=1e-2, tau=0.1, dropout=0.0)
    replay = ReplayBuffer(64, 5, 3, "cuda")
    replay.load_state_dict(cpu.replay.state_dict())
    flow = meow.make_flow(args, 5, 3)
    flow.load_state_dict(cpu.flow.state_dict())
    gpu = Learner(flow.cuda(), replay, args, compiled)
    torch.testing.assert_close(gpu.state[0].cpu(), cpu.state[0], rtol=0, atol=0)
    rngs = [np.random.default_rng(3) for _ in "12"]
    for _ in range(5):
        for learner, rng in zip((cpu, gpu), rngs, strict=True):
            learner.update(rng)
    torch.testing.assert_close(gpu.state[0].cpu(), cpu.state[0], rtol=1e-3, atol=1e-3)
    args = dataclasses.replace(args, dropout=0.1)
    gpu = Learner(meow.make_flow(args, 5, 3).cuda(), replay, args, compiled)
    masks = []
    for _ in range(2):
        gpu.update(rngs[0])
        masks.append(gpu.keep.clone())
    assert (masks[0] != masks[1]).any()
    assert abs(masks[0].float().mean().item() - 0.9) < 0.02
