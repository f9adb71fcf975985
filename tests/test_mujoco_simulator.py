"""The embedded simulator with each task: resets, ends, resume, images, CUDA graphs."""

import math

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from robot_tables import LAYOUT, RANGES, START_HEIGHT
from robots import (
    actions,
    every_free_task,
    every_task,
    make_simulator,
    near_the_end,
    quaternion,
    rollout,
    same,
    zero_action,
)
from torch.overrides import TorchFunctionMode

from isaac_tasks import TASKS, SimulatorError
from isaac_tasks.mujoco_simulator import MujocoSimulator
from isaac_tasks.physics import STATE, CpuPhysics
from isaac_tasks.task import State

# --- Episodes ---


def test_unknown_variant():
    with pytest.raises(ValueError, match="oige, ige"):
        TASKS["Ant"]("isaac")


@every_task
def test_reset(name, variant):
    """Starts new episodes everywhere, also in the middle of others."""
    simulator = make_simulator(name, variant)
    rollout(simulator, 3)
    old = simulator._state().clone()
    obs = simulator.reset()
    state = simulator._state()
    assert (state.qpos != old.qpos).any(-1).all()
    assert (simulator.progress == 0).all()
    first = State(state.qpos, state.qvel, torch.zeros_like(state.sensors), state.memory)
    action = torch.zeros(4, simulator.act_dim, dtype=torch.float64)
    assert torch.equal(obs, simulator.task.observe(first, action).float())


@every_task
def test_rollouts_depend_on_the_seed_only(name, variant):
    """Bit by bit, resets included, for any number of threads."""
    rollouts = []
    for seed, threads in ((1, 1), (1, 2), (2, 1)):
        simulator = make_simulator(name, variant, seed=seed, threads=threads)
        near_the_end(simulator)
        rollouts.append(rollout(simulator))
    obs, reward, terminated, truncated, final_obs = rollouts[0]
    assert obs.shape == final_obs.shape == (12, 4, simulator.obs_dim)
    assert reward.shape == terminated.shape == truncated.shape == (12, 4)
    assert {t.dtype for t in (obs, reward, final_obs)} == {torch.float32}
    assert {t.dtype for t in (terminated, truncated)} == {torch.bool}
    assert torch.equal(
        obs[~truncated & ~terminated], final_obs[~truncated & ~terminated]
    )
    assert simulator.fps == {"Ant": 60, "Humanoid": 60, "Ingenuity": 100}.get(
        name, simulator.fps
    )
    assert truncated.any(0).all()  # each environment has been reset
    assert same(rollouts[0], rollouts[1])
    assert not torch.equal(rollouts[0][0], rollouts[2][0])
    assert torch.equal(simulator.reset(seed=5), simulator.reset(seed=5))
    assert not torch.equal(simulator.reset(seed=5), simulator.reset())


@pytest.mark.slow
@every_task
def test_batch_equals_single_environments(name, variant):
    batch = make_simulator(name, variant, num_envs=3)
    rollout(batch, 3)
    singles = []
    for i in range(3):
        single = make_simulator(name, variant, num_envs=1, seed=9)
        for field in STATE:
            getattr(single.physics, field)[0] = getattr(batch.physics, field)[i]
        single.memory[0], single.progress[0] = batch.memory[i], batch.progress[i]
        singles.append(single)
    alive, steps = torch.ones(3, dtype=torch.bool), 0
    for action in actions(batch, 26):
        alone = zip(
            *(s.step(action[i : i + 1]) for i, s in enumerate(singles)), strict=True
        )
        obs, *rest = batch.step(action)
        obs_alone, *rest_alone = (torch.cat(column) for column in alone)
        assert same([t[alive] for t in rest], [t[alive] for t in rest_alone])
        alive &= ~(rest[1] | rest[2])  # resets draw other numbers
        assert torch.equal(obs[alive], obs_alone[alive])
        steps += alive.any()
    assert steps == 26


@every_free_task
def test_clipping_of_observations(name, variant):
    simulator = MujocoSimulator(TASKS[name], 1, 0, variant=variant)
    simulator.reset()
    simulator.physics.qpos[0, 2] = 3
    simulator.physics.qvel[0, :3] = torch.tensor([70.0, -70.0, 0.0])
    _, _, _, _, obs = simulator.step(torch.zeros(1, simulator.act_dim))
    if name == "Ingenuity":
        assert obs[0, 7:9].tolist() == [5, -5]
    else:
        assert_allclose(obs[0, 1:3], (70, -70), rtol=0.1)


def fail(simulator, world):
    """Puts a world into a state in which the task terminates within the next step."""
    low, high = simulator.model.jnt_range[1:].T
    pose = {
        "Ant": (0, 0, 0.28, 0, 1, 0, 0),  # on its back
        "Humanoid": (0, 0, 0.75, *quaternion(pitch=math.pi / 2)),  # lying
        "Ingenuity": (0, 0, 0.45, 1, 0, 0, 0),
    }[type(simulator.task).__name__]
    joints = [*np.clip(0, low, high)]
    simulator.physics.qpos[world] = torch.tensor([*pose, *joints], dtype=torch.float64)
    simulator.physics.qvel[world] = 0


@every_free_task
@pytest.mark.parametrize("end", ["failure", "time-out", "failure in the last step"])
def test_end_of_an_episode(name, variant, end):
    """final_obs is the true last observation, obs the first one of the next episode."""
    simulator = make_simulator(name, variant, num_envs=3)
    task, physics = simulator.task, simulator.physics
    rollout(simulator, 2)
    if end != "time-out":
        fail(simulator, 1)
    if end != "failure":
        simulator.progress[1] = simulator.max_steps - 1
    action = next(actions(simulator, 1))
    before = simulator._state().clone()  # of all worlds
    world = CpuPhysics(simulator.model, 1, 1)  # what the episode's last step does
    for field in STATE:
        getattr(world, field)[0] = getattr(physics, field)[1]
    world.ctrl[:] = task.control(action[1:2].double())
    world.step(task.substeps)
    target = before.memory[1]
    last = task.limit(State(world.qpos, world.qvel, world.sensordata, target[None]))

    obs, reward, terminated, truncated, final_obs = simulator.step(action)
    assert terminated.tolist() == [False, end != "time-out", False]
    assert truncated.tolist() == [False, end == "time-out", False]
    assert simulator.progress.tolist() == [3, 0, 3]
    expected = task.observe(last, action[1:2].double()).clamp(
        -task.clip_obs, task.clip_obs
    )
    assert_allclose(final_obs[1:2], expected, rtol=1e-6, atol=1e-6)
    old = State(*(t[1:2] for t in vars(before).values()))
    expected = task.reward(old, last, action[1:2].double())[0]
    assert_allclose(reward[1], expected, rtol=1e-5)
    assert torch.equal(obs[[0, 2]], final_obs[[0, 2]])
    now = [physics.qpos[1:2], physics.qvel[1:2], torch.zeros_like(last.sensors)]
    first = State(*now, simulator.memory[1:2])
    assert torch.equal(obs[1:2], task.observe(first, zero_action(task)).float())
    if name == "Ingenuity":
        assert obs[1, 7:].tolist() == [0] * 6
        assert not torch.equal(simulator.memory[1], target)
    else:
        feet = LAYOUT[name, variant][3]
        assert obs[1, 0] == torch.tensor(START_HEIGHT.get((name, variant), 1.34))
        assert (obs[1, 1:7] == 0).all()
        # Neither a wrench at the feet nor an action yet.
        assert (obs[1, feet:] == 0).all()
        assert (final_obs[1, feet:] != 0).all()
    assert (physics.qacc_warmstart[1] == 0).all()
    simulator.step(action)
    assert simulator.progress.tolist() == [4, 1, 4]


@every_task
def test_time_outs_come_after_l_minus_1_steps(name, variant):
    simulator = make_simulator(name, variant)
    assert simulator.max_steps == simulator.task.episode_length - 1
    simulator = make_simulator(name, variant, num_envs=2)
    simulator.max_steps = 5
    ends = []
    for action in actions(simulator, 15):
        if name == "Ingenuity":
            simulator.physics.qpos[:, 2] = 4
        _, _, terminated, truncated, _ = simulator.step(action)
        assert not terminated.any()
        ends.append(truncated.tolist())
    assert ends == [[step % 5 == 0] * 2 for step in range(1, 16)]


@every_task
def test_resume(name, variant):
    """From the middle of episodes, in another simulator, through resets, bit by bit.

    The saved state stays as it was while the simulator goes on.
    """
    simulator = make_simulator(name, variant)
    near_the_end(simulator)
    rollout(simulator, 4)
    saved = simulator.state_dict()
    expected = rollout(simulator)
    assert expected[3].any()
    other = make_simulator(name, variant, seed=7)
    other.load_state_dict(saved)
    assert same(rollout(other), expected)
    simulator.load_state_dict(saved)
    assert same(rollout(simulator), expected)


class BrokenPhysics(CpuPhysics):
    """Its second world breaks down: each step leaves `number`, if set, in `field`."""

    number, field = None, "qpos"

    def step(self, substeps):
        super().step(substeps)
        if self.number is not None:
            getattr(self, self.field)[1, 2] = self.number


@every_task
@pytest.mark.parametrize(
    ("field", "number"), [("qpos", math.nan), ("qvel", math.inf), ("qvel", -1e5)]
)
def test_a_diverged_environment_starts_anew(monkeypatch, name, variant, field, number):
    """It is not valid and says nothing about the task; the others don't notice."""
    sound = make_simulator(name, variant, num_envs=3)
    monkeypatch.setattr("isaac_tasks.mujoco_simulator.CpuPhysics", BrokenPhysics)
    broken = make_simulator(name, variant, num_envs=3)
    kept = torch.tensor([0, 2])
    for step, action in enumerate(actions(broken, 4)):
        broken.physics.field = field
        broken.physics.number = number if step == 1 else None
        rows, expected = broken.step(action), sound.step(action)
        assert same([t[kept] for t in rows], [t[kept] for t in expected])
        assert all(t.isfinite().all() for t in rows)
        if step == 1:
            obs, reward, terminated, truncated, final_obs = rows
            assert broken.valid.tolist() == [True, False, True]
            assert (reward[1], terminated[1], truncated[1]) == (0, False, False)
            assert torch.equal(obs[1], final_obs[1])
            assert broken.progress[1] == 0
            assert (broken._state().qpos[1] != sound._state().qpos[1]).any()
        else:
            assert broken.valid is None
        assert broken.diverged == (step == 1)
    assert broken.progress.tolist() == [4, 2, 4]


# --- Images ---


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["Ingenuity", *(pytest.param(n, marks=SLOW) for n in RANGES)]
)
def test_render(name):
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>")).close()
    except Exception as error:
        pytest.skip(f"no off-screen renderer works here: {error}")
    simulator = make_simulator(name, "oige")
    simulator.step(torch.zeros(4, simulator.act_dim))
    simulator.physics.qpos[0, 0] = 5
    before = simulator.state_dict()
    image = simulator.render()
    # It follows the robot.
    assert abs(simulator.renderer.scene.camera[0].pos[0] - 5) < 1
    assert image.shape == (480, 640, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5
    assert same(before["physics"].values(), simulator.state_dict()["physics"].values())


def test_render_error(monkeypatch):
    def broken(*_args):
        raise RuntimeError("no display")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(SimulatorError, match="no display"):
        make_simulator("Ant", "oige").render()


# --- CUDA graphs ---


class NoHostNumbers(TorchFunctionMode):
    """Forbids to make tensors from Python's or NumPy's numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.tensor,
            torch.as_tensor,
            torch.from_numpy,
            torch.Tensor.new_tensor,
        )
        return func(*args, **(kwargs or {}))


@every_task
def test_steps_copy_nothing_from_the_host(name, variant):
    """CUDA graphs can't record such copies."""
    simulator = make_simulator(name, variant)
    with NoHostNumbers():
        simulator.step(torch.zeros(4, simulator.act_dim))


def test_what_cannot_be_recorded_as_a_graph_is_one_sentence(monkeypatch):
    def refuse(_simulator):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(MujocoSimulator, "_record", refuse)
    simulator = make_simulator("Ant", "oige")
    simulator.recorded = True
    text = "^can't record a step on cpu as a CUDA graph: no luck$"
    with pytest.raises(SimulatorError, match=text):
        simulator.step(simulator.action)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_task
def test_cuda_graphs(name, variant):
    """The recorded steps give what the functions themselves do, resets included."""
    graphs, functions = (make_simulator(name, variant, device="cuda") for _ in range(2))
    functions.recorded = False
    for simulator in (graphs, functions):
        near_the_end(simulator)
    ended = torch.zeros(4, dtype=torch.bool, device="cuda")
    for action in actions(graphs, 12):
        got, expected = graphs.step(action.cuda()), functions.step(action.cuda())
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(graphs.memory, functions.memory)
        assert torch.equal(graphs.progress, functions.progress)
        ended |= got[3]
    assert ended.all()
    assert graphs.graph
    kept = graphs.step(action.cuda())
    copies = [t.clone() for t in kept]
    graphs.step(-action.cuda())
    assert same(kept, copies)
