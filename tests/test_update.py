"""Target, loss, optimiser and the whole update, eager and compiled."""

import numpy as np
import pytest
import torch

import meow_continuous_action as meow
from harness.functional import (
    Hardware,
    Keep,
    Learner,
    adam,
    adam_moments,
    clip_gradient,
    flatten_parameters,
    make_policy,
)
from harness.replay import ReplayBuffer, split_batch
from meow_continuous_action import Args, soft_target


class Rig:
    """Flow, replay and learner as `train` makes them: S = 5, A = 3, 64 random transitions."""

    def __init__(self, compiled=False, dtype=torch.float32, cuda=False, **settings):
        self.args = Args(**(dict(batch_size=32, learning_rate=1e-2, tau=0.1) | settings))
        self.hardware = Hardware(cuda, torch_threads=1, compile=compiled)
        device, n = self.hardware.device, self.args.batch_size
        self.replay = ReplayBuffer(64, 5, 3, n, device)
        rng = np.random.default_rng(0)
        for i in range(64):
            obs, next_obs = rng.normal(size=5), rng.normal(size=5)
            self.replay.add(obs, rng.uniform(-1, 1, 3), next_obs, rng.normal(), i % 4 == 0)
        self.flow = meow.make_flow(self.args, 5, 3)
        for p in self.flow.parameters():
            p.data += 0.1 * torch.randn_like(p)
        self.flow.to(device, dtype)
        self.theta = flatten_parameters(self.flow)
        self.state = [self.theta, self.theta.clone(), *adam_moments(self.theta)]
        self.keep = Keep(4, 2, n, 64, dropout=self.args.dropout, device=device)
        random = [self.keep] if self.args.dropout else []
        update, inputs = meow.make_update(self.flow, 5, 3, self.args), [self.replay.batch]
        arguments = (self.state, inputs, random, meow.METRICS, self.hardware)
        self.learner = Learner(update, *arguments)

    def update(self, rng):
        self.replay.sample(rng)
        self.learner.update(rng)


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
    rig = Rig(dtype=torch.float64, reward_shifting=shifting, max_grad_norm=0.05)
    flow, target_flow = (
        meow.EnergyFlow(5, 3, 0.2, -5.0, -0.3, reward_shifting=shifting).double() for _ in "12"
    )
    for module in (flow, target_flow):
        module.load_state_dict(rig.flow.state_dict())
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    update = meow.make_update(rig.flow, 5, 3, rig.args)
    for _ in range(3):
        batch = rig.replay.rows[torch.randint(64, (32,))].double()
        keep = torch.rand(4, 2, 32, 64) > 0.1
        metrics = update(*rig.state, batch, keep)
        obs, action, next_obs, reward, terminated = split_batch(batch, 5, 3)
        with torch.no_grad():
            v_next = target_flow.soft_values(next_obs).min(-1).values
            y = reward + 0.99 * (1 - terminated) * v_next
        q = flow.q_values(obs, action, keep)
        loss = sum(0.5 * ((q[:, k] - y) ** 2).mean() for k in range(q.shape[1]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()
        for p, p_target in zip(flow.parameters(), target_flow.parameters(), strict=True):
            p_target.data = 0.9 * p_target.data + 0.1 * p.data
        assert metrics[0].item() == pytest.approx(loss.item(), rel=1e-9)
        assert metrics[1].item() == pytest.approx(norm.item(), rel=1e-9)
        for vector, module in zip(rig.state, (flow, target_flow), strict=False):
            expected = torch.cat([p.detach().flatten() for p in module.parameters()])
            torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-9)


def test_target_equals_online_at_the_start():
    rig = Rig()
    theta, target_theta = rig.state[:2]
    assert torch.equal(theta, target_theta)
    assert theta.data_ptr() != target_theta.data_ptr()


def test_parameters_are_views_of_theta():
    rig = Rig()
    before = rig.flow.q_values(torch.ones(1, 5), torch.zeros(1, 3))
    rig.theta.mul_(1.5)
    assert (rig.flow.q_values(torch.ones(1, 5), torch.zeros(1, 3)) != before).all()


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.0}, {"coupling": "affine"}, {"bf16": True}])
def test_loss_falls_on_a_fixed_batch(settings):
    rig, rng = Rig(**settings), np.random.default_rng(0)
    rig.replay.sample(rng)
    losses = []
    for step in range(60):
        rig.learner.update(rng)
        losses.append(rig.learner.read_metrics(step)["losses/loss"])
    assert losses[-1] < 0.7 * losses[0]


def test_no_update_of_the_target_with_gradients():
    """With tau = 1e-9 the target parameters stay, though theta moves: no gradient reaches them."""
    rig, rng = Rig(tau=1e-9), np.random.default_rng(0)
    before = [t.clone() for t in rig.state[:2]]
    rig.update(rng)
    assert (rig.state[0] - before[0]).abs().max() > 1e-4
    torch.testing.assert_close(rig.state[1], before[1], rtol=0, atol=1e-7)


def test_dropout_masks_have_the_right_rate_and_differ():
    rig, rng, masks = Rig(), np.random.default_rng(0), []
    for _ in range(20):
        rig.update(rng)
        masks.append(rig.keep.tensor.clone())
    rate = 1 - torch.stack(masks).float().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / (20 * masks[0].numel())) ** 0.5
    assert all((a != b).any() for a, b in zip(masks[1:], masks, strict=False))
    units = torch.stack(masks).float().mean((0, 3))  # no unit, layer or coupling is left out
    assert (units.std() < 0.05).item()


@pytest.mark.parametrize("what", ["theta", "batch"])
def test_a_non_finite_update_raises_and_says_what(what):
    rig, rng = Rig(), np.random.default_rng(0)
    if what == "theta":
        rig.theta[0] = float("nan")
    else:
        rig.replay.rows[:, -2] = float("inf")
    rig.update(rng)
    with pytest.raises(FloatingPointError, match=r"step 17 is not finite: losses/loss = (nan|inf)"):
        rig.learner.read_metrics(17)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_rounds_the_shifts_and_nothing_else(bf16):
    rounded, exact = Rig(bf16=bf16), Rig()
    obs, action = torch.randn(64, 5), torch.rand(64, 3) - 0.5
    gap = (rounded.flow.shifts(obs) - exact.flow.shifts(obs)).abs().max().item()
    assert (1e-6 < gap < 0.05) if bf16 else gap == 0
    torch.testing.assert_close(rounded.flow.log_prob(obs, action), exact.flow.log_prob(obs, action))


@pytest.mark.slow
def test_compiled_equals_eager():
    """Loss, parameters and target after five updates with the same batches and dropout masks."""
    eager, compiled = Rig(), Rig(compiled=True)
    rngs = [np.random.default_rng(3) for _ in "12"]
    for _ in range(5):
        for rig, rng in zip((eager, compiled), rngs, strict=True):
            rig.update(rng)
        assert torch.equal(eager.keep.tensor, compiled.keep.tensor)
        metrics = compiled.learner.metrics, eager.learner.metrics
        torch.testing.assert_close(*metrics, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.state[0], eager.state[0], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(compiled.state[1], eager.state[1], rtol=1e-4, atol=2e-4)
    obs, z = np.ones((1, 5), np.float32), np.full((1, 3), 0.5, np.float32)
    first, second = (
        make_policy(rig.flow, rig.theta, 5, 3, 1, rig.hardware)(obs, z) for rig in (eager, compiled)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_updates_keep_their_own_settings():
    """Learners in one process, compiled without guards, don't share each other's constants."""
    slow, fast = Rig(compiled=True, gamma=0.0), Rig(compiled=True)
    for rig in (slow, fast):
        rig.update(np.random.default_rng(0))
    targets = [rig.learner.read_metrics(0)["flow/target"] for rig in (slow, fast)]
    assert targets[0] != targets[1]


@pytest.mark.parametrize("n", [1, 3])
def test_policy_gives_the_flows_actions(n):
    rig, rng = Rig(), np.random.default_rng(n)
    policy = make_policy(rig.flow, rig.theta, 5, 3, n, rig.hardware)
    obs, z = (rng.standard_normal((n, dim), dtype=np.float32) for dim in (5, 3))
    close = dict(rtol=1e-5, atol=1e-6)  # products may round by where an array lies in memory
    expected = rig.flow.to_action(torch.from_numpy(obs), torch.from_numpy(z))[0]
    torch.testing.assert_close(policy(obs, z), expected, **close)
    mode = rig.flow.mode_action(torch.from_numpy(obs))
    torch.testing.assert_close(policy(obs, np.zeros_like(z)), mode, **close)


def test_acting_is_without_dropout():
    """The same noise gives the same action however often the masks are drawn anew."""
    rig, rng = Rig(dropout=0.9), np.random.default_rng(0)
    policy = make_policy(rig.flow, rig.theta, 5, 3, 1, rig.hardware)
    obs, z = (rng.standard_normal((1, dim), dtype=np.float32) for dim in (5, 3))
    actions = []
    for _ in range(3):
        rig.keep.fill(rng)
        actions.append(policy(obs, z))
    assert torch.equal(actions[0], actions[1])
    assert torch.equal(actions[0], actions[2])


def test_shifting_ablations_change_only_the_shifts():
    """log pi is the same in all; 'single' keeps one shift, 'none' gives the flow's own Q and V."""
    flows = [Rig(reward_shifting=s).flow for s in ("clipped", "single", "none")]
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
    additive, affine = (Rig(coupling=c).flow for c in ("additive", "affine"))
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
    cpu, gpu = Rig(dropout=0.0), Rig(dropout=0.0, cuda=True, compiled=compiled)
    torch.testing.assert_close(gpu.theta.cpu(), cpu.theta, rtol=0, atol=0)
    for _ in range(5):
        for rig in (cpu, gpu):
            rig.update(np.random.default_rng(3))
    torch.testing.assert_close(gpu.theta.cpu(), cpu.theta, rtol=1e-3, atol=1e-3)
    gpu, masks = Rig(cuda=True, compiled=compiled), []
    for _ in range(2):
        gpu.update(np.random.default_rng(3))
        masks.append(gpu.keep.tensor.clone())
    assert (masks[0] != masks[1]).any()
    assert abs(masks[0].float().mean().item() - 0.9) < 0.02
