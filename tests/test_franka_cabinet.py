"""FrankaCabinet: model, observation, reward, drives, episodes, an open drawer.

Expected numbers are those of the task's definition; poses come from MuJoCo's own
kinematics.
"""

import math
from functools import cache

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from robot_stress import stress
from robots import every_variant

from isaac_tasks import TASKS
from isaac_tasks.mujoco_simulator import MujocoSimulator
from isaac_tasks.task import State

ARM = [f"link_{i}" for i in range(1, 8)]
JOINTS = [*ARM, "left_finger", "right_finger"]
LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973, 0, 0])
HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973, 0.04, 0.04])
EFFORTS = np.array([87] * 4 + [12] * 3 + [200] * 2)
SPEEDS = np.array([2.175] * 4 + [2.61] * 3 + [0.2] * 2)
DEFAULT = np.array([1.157, -1.066, -0.155, -2.239, -1.841, 1.003, 0.469, 0.035, 0.035])
STEPS = {
    "oige": np.array([0.125] * 7 + [0.0125] * 2),
    "ige": np.array([0.1245] * 7 + [0.01245] * 2),
}
MASSES = {  # kg
    "link_1": 2.975, "link_2": 3.004, "link_3": 2.329, "link_4": 2.374,
    "link_5": 3.419, "link_6": 1.435, "link_7": 0.446,
    "hand": 0.709, "left_finger": 0.022, "right_finger": 0.022,
}  # fmt: skip
DRAWER_MASS = {"oige": 5.33 + 0.2, "ige": 5.33 + 3.28}


@cache
def compiled(variant):
    task = TASKS["FrankaCabinet"](variant)
    return task, task.spec().compile()


def make_state(
    joints=DEFAULT, opening=0.0, speeds=(0,) * 9, drawer_speed=0.0, targets=None
):
    """One environment."""
    targets = joints if targets is None else targets
    rows = [opening, *joints], [drawer_speed, *speeds], [], targets
    return State(*(torch.tensor(np.array([row], dtype=float)) for row in rows))


def random_state(rng):
    joints = rng.uniform(LOW, HIGH)
    return make_state(joints, rng.uniform(0, 0.4), 5 * rng.normal(size=9), rng.normal())


def forward(model, state):
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = state.qpos[0], state.qvel[0]
    mujoco.mj_forward(model, data)
    return data


def grip_and_axes(data):
    """The grip's place and its axes: link 7's, turned by -45 degrees about z."""
    link = data.body("link_7")
    axes, half = link.xmat.reshape(3, 3), math.sqrt(0.5)
    turn = np.array([[half, half, 0], [-half, half, 0], [0, 0, 1]])
    return link.xpos + axes @ [0, 0.04, 0.1654], axes @ turn


def no_action(n=1):
    return torch.zeros(n, 9, dtype=torch.float64)


def make_simulator(variant, num_envs=4, seed=0, **kwargs):
    simulator = MujocoSimulator(
        TASKS["FrankaCabinet"], num_envs, seed, variant=variant, **kwargs
    )
    simulator.reset()
    return simulator


# --- Model ---


@every_variant
def test_model(variant):
    task, model = compiled(variant)
    assert [model.joint(i).name for i in range(model.njnt)] == ["drawer", *JOINTS]
    assert [model.actuator(i).name for i in range(model.nu)] == JOINTS
    assert model.actuator_trnid[:, 0].tolist() == list(range(1, 10))
    assert_allclose(model.jnt_range[1:], np.stack([LOW, HIGH], 1))
    assert_allclose(model.joint("drawer").range, (0, 0.4))
    assert model.jnt_limited.all()
    for body, mass in (MASSES | {"drawer": DRAWER_MASS[variant]}).items():
        assert_allclose(model.body(body).mass, mass)
    assert_allclose(model.body_mass.sum(), sum(MASSES.values()) + DRAWER_MASS[variant])
    assert_allclose(model.joint("drawer").damping, 10)
    assert_allclose(model.joint("drawer").axis, (1, 0, 0))
    assert (task.obs_dim, task.act_dim) == (23, 9)
    assert (task.episode_length, task.clip_obs) == (500, 5)
    assert_allclose(task.time_step * task.substeps, 0.0166)
    assert (model.opt.gravity == 0).all()
    assert_allclose(model.jnt_solref, [(0.0166, 1)] * 10)  # stiff limits: two steps
    assert_allclose(model.jnt_solimp[:, :2], [(0.99, 0.999)] * 10)


@every_variant
def test_default_pose(variant):
    """Places and vector to the handle of the original's robot, in metres."""
    task, model = compiled(variant)
    state = make_state()
    data = forward(model, state)
    gripper = {key: value[0] for key, value in task.gripper(state).items()}
    places = {
        "link_7": (0.8306, -0.0813, 0.8118),
        "left_finger": (0.7591, 0.0710, 0.8287),
        "right_finger": (0.7576, 0.0618, 0.7593),
        "drawer": (0.0515, 0, 0.7172),
    }
    for body, place in places.items():
        assert_allclose(data.body(body).xpos, place, atol=5e-5)
    assert_allclose(gripper["grip"], (0.7844, 0.0823, 0.8199), atol=6e-5)
    assert_allclose(gripper["left"], places["left_finger"], atol=5e-5)
    assert_allclose(gripper["right"], places["right_finger"], atol=5e-5)
    to_handle = task.observe(state, no_action())[0, 18:21]
    assert_allclose(to_handle, (-0.4329, -0.0723, -0.1027), atol=6e-5)
    assert_allclose(np.linalg.norm(to_handle), 0.4507, atol=5e-5)
    assert_allclose(-gripper["forward"][0], 0.4369, atol=5e-5)
    assert_allclose(gripper["across"][2], 0.9912, atol=6e-5)
    assert_allclose(task.reward(state, state, no_action()), 1.6750, atol=5e-5)


@every_variant
def test_what_collides(variant):
    """The robot with drawer, cabinet and floor; nothing else."""
    _, model = compiled(variant)
    assert forward(model, make_state()).ncon == 0
    rng, pairs, overlap = np.random.default_rng(0), set(), math.inf
    first, last = (model.body(name).geomadr[0] for name in ("link_2", "hand"))
    for _ in range(500):
        data = forward(model, random_state(rng))
        overlap = min(
            overlap, mujoco.mj_geomDistance(model, data, first, last, 1.0, None)
        )
        for geoms in data.contact.geom:
            pairs.add(
                frozenset(model.body(model.geom_bodyid[geom]).name for geom in geoms)
            )
    assert overlap < 0
    fixed = {"world", "cabinet", "drawer"}
    assert all(
        len(pair & fixed) == 1 and len(pair & set(MASSES)) == 1 for pair in pairs
    )
    touching = set().union(*pairs)
    assert touching >= fixed
    assert touching >= {"link_4", "link_5", "link_6", "link_7", "hand", "left_finger"}


# --- Drives ---


@every_variant
def test_targets(variant):
    """Steps add up, may run ahead of the joints, and end at the limits."""
    task, _ = compiled(variant)
    rng = np.random.default_rng(0)
    action, targets = rng.uniform(-1, 1, 9), rng.uniform(LOW, HIGH)
    state = make_state(targets=targets)
    control, memory = task.act(state, torch.tensor(action)[None])
    expected = np.clip(targets + STEPS[variant] * action, LOW, HIGH)
    assert_allclose(control[0], expected)
    assert torch.equal(control, memory)
    for side, limits in ((1, HIGH), (-1, LOW)):
        control, _ = task.act(
            make_state(targets=limits), torch.full((1, 9), float(side)).double()
        )
        assert_allclose(control[0], limits)
    simulator = make_simulator(variant)
    start = simulator.memory.clone().numpy()
    simulator.step(torch.full((4, 9), 0.5))
    simulator.step(torch.full((4, 9), 0.25))
    expected = np.clip(start + 0.5 * STEPS[variant], LOW, HIGH) + 0.25 * STEPS[variant]
    assert_allclose(simulator.memory, np.clip(expected, LOW, HIGH))
    assert torch.equal(simulator.physics.ctrl, simulator.memory)


def test_strength_of_the_drives():
    """Spring and damper at small errors (80 in all), the most torque at large ones."""
    _, model = compiled("oige")
    data = forward(model, make_state())
    stiffness = np.array([400] * 7 + [1e5] * 2)
    error = 0.5 * EFFORTS / stiffness
    data.ctrl[:] = DEFAULT + error
    mujoco.mj_forward(model, data)
    assert_allclose(data.qfrc_actuator[1:], 0.5 * EFFORTS)
    data.ctrl[:] = DEFAULT - 100 * error
    mujoco.mj_forward(model, data)
    assert_allclose(data.qfrc_actuator[1:], -EFFORTS)
    slow = forward(model, make_state(speeds=[0.01] * 7 + [0.001] * 2))
    slow.ctrl[:] = DEFAULT
    mujoco.mj_forward(model, slow)
    damping = -(slow.qfrc_actuator + slow.qfrc_passive)[1:]
    assert_allclose(damping, [0.8] * 7 + [1.0] * 2)


@every_variant
def test_joint_speeds(variant):
    """A full action drives joints at full speed; slow hinges are 0.2 s behind."""
    simulator = make_simulator(variant, num_envs=3)
    action = torch.zeros(3, 9)
    action[0, 0], action[1, 0], action[2, 8] = -1, -0.02, -1
    simulator.physics.qpos[:, -2:] = simulator.memory[:, -2:] = 0.04
    start = simulator.physics.qpos.clone()
    fastest = 0
    for _ in range(60):
        simulator.step(action)
        fastest = np.maximum(fastest, simulator.physics.qvel.abs().numpy())
    assert_allclose(fastest[0, 1], SPEEDS[0], rtol=0.02)
    assert_allclose(fastest[2, 9], SPEEDS[8], rtol=0.05)
    assert_allclose(simulator.physics.qpos[2, 9], 0, atol=1e-3)
    behind = simulator.physics.qpos[1, 1] - simulator.memory[1, 0]
    assert_allclose(behind / (0.02 * 7.5), 0.2 - 0.0133, atol=0.002)  # set 0.0166 s ago
    assert simulator.physics.qpos[1, 1] < start[1, 1] - 0.1


@every_variant
def test_limits_of_the_state(variant):
    """Speeds are cut, slides stop; hinges stop 0.05 rad beyond their limits."""
    task, _ = compiled(variant)
    state = make_state(HIGH + 0.01, 0.41, [*[3] * 4, *[-3] * 3, 0.3, 0.3], 2.0)
    cut = task.limit(state)
    assert_allclose(cut.qpos[0], [0.4, *(HIGH + 0.01)[:7], 0.04, 0.04])
    assert_allclose(cut.qvel[0], [0, *[2.175] * 4, *[-2.61] * 3, 0, 0])
    far = task.limit(make_state(HIGH + 0.1, speeds=[1] * 9))
    assert_allclose(far.qpos[0, 1:8], HIGH[:7] + 0.05)
    assert (far.qvel == 0).all()
    inside = make_state(opening=0.2, speeds=0.9 * SPEEDS, drawer_speed=5.0)
    cut = task.limit(inside)
    assert torch.equal(cut.qpos, inside.qpos)
    assert torch.equal(cut.qvel, inside.qvel)


# --- Observation and reward ---


@every_variant
def test_observation(variant):
    task, model = compiled(variant)
    rng = np.random.default_rng(0)
    for _ in range(20):
        state = random_state(rng)
        grip, _ = grip_and_axes(forward(model, state))
        x, v = state.qpos[0].numpy(), state.qvel[0].numpy()
        expected = np.concatenate([
            (2 * x[1:] - HIGH - LOW) / (HIGH - LOW),
            0.1 * v[1:],
            (0.3515 + x[0], 0.01, 0.7172) - grip,
            x[:1],
            v[:1],
        ])  # fmt: skip
        assert_allclose(task.observe(state, no_action())[0], expected, atol=1e-9)
    simulator = make_simulator(variant)
    simulator.physics.qvel[0, 0] = 9.0
    obs, *_ = simulator.step(torch.zeros(4, 9))
    assert obs[0, 22] == 5


def expected_reward(variant, data, handle, action):
    """Straight from the definition, for MuJoCo's data and the handle's place."""
    grip, axes = grip_and_axes(data)
    x, d = data.qpos[0], np.linalg.norm(grip - handle)
    left, right = data.body("left_finger").xpos, data.body("right_finger").xpos
    near = (1 / (1 + d**2)) ** 2 * (2 if d <= 0.02 else 1)
    c1, c2 = axes[:, 2] @ [-1, 0, 0], axes[:, 1] @ [0, 0, 1]
    turned = (np.sign(c1) * c1**2 + np.sign(c2) * c2**2) / 2
    if variant == "oige":  # which reads the left finger twice
        closing = 0.08 - data.qpos[-2:].sum() if d <= 0.03 else 0
        reward = 2 * near + 0.5 * turned + 7.5 * x + 10 * closing + 0.5 * (x > 0.01)
        return reward - 0.01 * np.square(action).sum(), set()
    around = 0.5 if left[2] > handle[2] > right[2] else 0
    fingers = 0
    if around:
        fingers = 0.08 - abs(left[2] - handle[2]) - abs(right[2] - handle[2])
    reward = 2 * near + 0.5 * turned + 0.25 * around
    reward += 7.5 * (x * around + x) + 5 * fingers
    reward += 0.5 * (x > 0.01) + around * (x > 0.2) + 2 * around * (x > 0.39)
    reward -= 0.01 * np.square(action).sum()
    behind = min(left[0], right[0]) < handle[0] - 0.04
    seen = {name for name, true in (("around", around), ("behind", behind)) if true}
    return -1 if behind else reward, seen


@every_variant
def test_reward(monkeypatch, variant):
    """On random states, with the handle put as near the grip as each rule needs it."""
    task, model = compiled(variant)
    rng, seen, closed = np.random.default_rng(0), set(), (0.3515, 0.01, 0.7172)
    for i in range(400):
        state, action = random_state(rng), rng.uniform(-1, 1, 9)
        state.qpos[0, 0] = rng.choice([0, 0.009, 0.011, 0.199, 0.201, 0.389, 0.391])
        data = forward(model, state)
        grip, _ = grip_and_axes(data)
        opening = np.array([data.qpos[0], 0, 0])
        handle = grip + rng.choice([0.01, 0.018, 0.1, 0.3]) * rng.normal(size=3)
        handle = handle if i % 4 else closed + opening  # its true place
        monkeypatch.setattr(task, "handle", torch.tensor(handle - opening))
        expected, rules = expected_reward(variant, data, handle, action)
        reward = task.reward(state, state, torch.tensor(action)[None])
        assert_allclose(reward, expected, rtol=0, atol=1e-9)
        distance = np.linalg.norm(grip - handle)
        seen |= rules | {
            name for name, most in (("0.02", 0.02), ("0.03", 0.03)) if distance < most
        }
        assert task.failed(state).item() == (data.qpos[0] > 0.39)
    assert seen >= (
        {"0.02", "0.03"} | ({"around", "behind"} if variant == "ige" else set())
    )


# --- Episodes ---


@every_variant
@pytest.mark.parametrize("way", ["reset", "step"])
def test_first_states(variant, way):
    simulator = make_simulator(variant, num_envs=2000, threads=2)
    if way == "step":
        simulator.progress[:] = simulator.max_steps - 1
        simulator.step(torch.rand(2000, 9))
    drawer, joints = simulator.physics.qpos.split([1, 9], -1)
    assert (simulator.progress == 0).all()
    assert (drawer == 0).all()
    assert (simulator.physics.qvel == 0).all()
    assert torch.equal(simulator.memory, joints)
    noise = joints[:, :7].numpy() - DEFAULT[:7]
    assert_allclose(noise.min(0), -0.125, atol=0.002)
    assert_allclose(noise.max(0), 0.125, atol=0.002)
    assert_allclose(noise.std(0), 0.25 / math.sqrt(12), rtol=0.05)
    fingers = joints[:, 7:]
    assert fingers.min() == 0
    assert fingers.max() == 0.04
    assert abs(((fingers == 0) | (fingers == 0.04)).double().mean() - 0.84) < 0.02
    assert abs(torch.corrcoef(joints.T).tril(-1)).max() < 0.1


@every_variant
@pytest.mark.parametrize("end", ["opened", "time-out", "both"])
def test_end_of_an_episode(variant, end):
    """final_obs is the true last observation, obs the first one of the next episode."""
    simulator = make_simulator(variant, num_envs=3)
    task, physics = simulator.task, simulator.physics
    simulator.step(torch.rand(3, 9))
    if end != "time-out":
        away = np.array([2.8, 0, 0, -1.5, 0, 1.5, 0, 0.02, 0.02])
        simulator.memory[1] = torch.tensor(away)
        physics.qpos[1], physics.qvel[1] = make_state(away, 0.389).qpos[0], 0
        physics.qvel[1, 0] = 0.5
    if end != "opened":
        simulator.progress[1] = simulator.max_steps - 1
    before, action = simulator._state().clone(), torch.rand(3, 9)
    world = physics.data(1)
    control, memory = task.act(before, action.double())
    world.ctrl[:] = control[1]
    # What the episode's last step does.
    mujoco.mj_step(simulator.model, world, task.substeps)
    rows = [
        torch.tensor(row)[None] for row in (world.qpos, world.qvel, world.sensordata)
    ]
    last = task.limit(State(*rows, memory[1:2]))
    obs, reward, terminated, truncated, final_obs = simulator.step(action)
    assert terminated.tolist() == [False, end != "time-out", False]
    assert truncated.tolist() == [False, end == "time-out", False]
    assert simulator.progress.tolist() == [2, 0, 2]
    assert_allclose(
        final_obs[1:2], task.observe(last, no_action()), rtol=1e-6, atol=1e-6
    )
    expected = task.reward(last, last, action[1:2].double())
    assert_allclose(reward[1:2], expected, rtol=1e-5)
    first = State(physics.qpos[1:2], physics.qvel[1:2], rows[2], simulator.memory[1:2])
    assert torch.equal(obs[1:2], task.observe(first, no_action()).float())
    assert (obs[1, 9:18] == 0).all()
    assert obs[1, 21:].tolist() == [0, 0]
    assert torch.equal(simulator.memory[1], physics.qpos[1, 1:])
    assert torch.equal(obs[[0, 2]], final_obs[[0, 2]])
    assert simulator.max_steps == 499


@every_variant
def test_resume(variant):
    """From the middle of an episode, through time-outs, bit by bit; targets too."""
    one = make_simulator(variant)
    actions = 2 * torch.rand(20, 4, 9, generator=torch.Generator().manual_seed(0)) - 1
    for action in actions[:8]:
        one.step(action)
    one.progress[:] = one.max_steps - 3
    saved = one.state_dict()
    expected = [one.step(action) for action in actions[8:]]
    other = make_simulator(variant, seed=9, threads=2)
    other.load_state_dict(saved)
    for action, row in zip(actions[8:], expected, strict=True):
        got = other.step(action)
        assert all(torch.equal(a, b) for a, b in zip(got, row, strict=True))
    assert any(truncated.all() for _, _, _, truncated, _ in expected)


# --- The drawer ---


class Controller:
    """Reaches for the handle, one finger above and one below, closes them and pulls."""

    # Middle of the bar, where the finger tips go.
    handle = np.array([0.345, 0.0, 0.7264])
    # Of the hand: fingers forward, upright.
    axes = np.array([[0, 0, -1.0], [-1, 0, 0], [0, 1, 0]])

    def __init__(self, simulator, world, grips=True):
        self.simulator, self.world, self.grips = simulator, world, grips
        self.steps = STEPS[simulator.task.variant]
        self.phase, self.waited = "approach", 0

    def action(self):
        model, data = self.simulator.model, self.simulator.physics.data(self.world)
        mujoco.mj_forward(model, data)
        hand = data.body("hand")
        axes = hand.xmat.reshape(3, 3)
        tips = hand.xpos + axes @ [0, 0, 0.1034]
        ahead = {"approach": 0.1, "reach": 0.0, "grip": 0.0, "pull": 0.15}[self.phase]
        to_goal = self.handle - tips
        to_goal[0] += data.qpos[0] + ahead
        turn = sum(np.cross(axes[:, i], self.axes[:, i]) for i in range(3)) / 2
        self.advance(np.linalg.norm(to_goal), np.linalg.norm(turn))
        jacobian = np.zeros((6, model.nv))
        mujoco.mj_jac(model, data, jacobian[:3], jacobian[3:], tips, hand.id)
        arm = jacobian[:, 1:8]
        velocity = 4 * np.concatenate(
            [to_goal * min(1, 0.1 / np.linalg.norm(to_goal)), turn]
        )
        speeds = arm.T @ np.linalg.solve(arm @ arm.T + 1e-3 * np.eye(6), velocity)
        ahead_of_joints = 0.2 * speeds  # drives are 0.2 s behind their targets
        targets = self.simulator.memory[self.world].numpy()[:7]
        arm_action = (data.qpos[1:8] + ahead_of_joints - targets) / self.steps[:7]
        closes = self.grips and self.phase in ("grip", "pull")
        return np.clip([*arm_action, *[-1 if closes else 1] * 2], -1, 1)

    def advance(self, distance, angle):
        """To the next phase when this one's goal is reached."""
        self.waited += self.phase == "grip"
        if self.phase == "approach" and distance < 0.02 and angle < 0.1:
            self.phase = "reach"
        elif self.phase == "reach" and distance < 0.01:
            self.phase = "grip"
        elif self.waited == 25:
            self.phase = "pull"


@pytest.mark.slow
@every_variant
def test_a_controller_opens_the_drawer(variant):
    """By gripping and pulling the handle; with open fingers it doesn't move.

    Fingers don't rattle on the handle, and the rewards grow.

    """
    simulator = make_simulator(variant, num_envs=3)
    controllers = [Controller(simulator, world, grips=world < 2) for world in range(3)]
    opened, rewards, rattle = torch.zeros(3, dtype=torch.bool), [], 0.0
    for _ in range(260):
        actions = np.array([controller.action() for controller in controllers])
        _, reward, terminated, _, _ = simulator.step(torch.tensor(actions))
        opened |= terminated
        rewards.append(reward)
        if controllers[0].phase == "pull" and not opened[0]:
            rattle = max(rattle, simulator.physics.qvel[0, 8:].abs().max().item())
        if opened[:2].all():
            break
    assert opened.tolist() == [True, True, False]
    assert controllers[2].phase == "pull"
    assert rattle < 0.1  # m/s
    assert simulator.physics.qpos[2, 0] < 0.005
    assert rewards[0].max() < 2 < 5 < max(reward[0] for reward in rewards)


# --- Stress ---


def deepest_contacts(simulator):
    """Metres, of any body and world: below the floor; inside cabinet or drawer."""
    model, data, deepest = simulator.model, mujoco.MjData(simulator.model), np.zeros(2)
    for qpos in simulator.physics.qpos.numpy():
        data.qpos[:] = qpos
        mujoco.mj_fwdPosition(model, data)
        of_floor = (data.contact.geom == model.geom("floor").id).any(1)
        for i, group in enumerate((of_floor, ~of_floor)):
            deepest[i] = max(deepest[i], -data.contact.dist[group].min(initial=0))
    return deepest


@pytest.mark.slow
@every_variant
def test_stress(variant):
    """With floor and the drawer's front (27 mm thick), which nothing gets through."""

    def check(simulator, step):
        if step % 20 == 19:
            in_floor, in_cabinet = deepest_contacts(simulator)
            assert in_floor < 0.005
            assert in_cabinet < 0.03

    stress("FrankaCabinet", variant, check)
