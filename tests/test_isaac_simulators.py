"""Adapters to Isaac Gym and Isaac Lab on stand-ins; what all simulators promise."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from torch import Tensor

import isaac_tasks
from isaac_tasks import TASKS, SimulatorError, make_simulator
from isaac_tasks.ingenuity import Ingenuity
from isaac_tasks.make import choose_simulator

STAND_INS = Path(__file__).parent / "stand_ins"
PACKAGES = {path.name for path in STAND_INS.iterdir()}
NEVER, LIMIT = 10**6, 7  # step of an episode at which its time-out comes: L - 1
FALLS = (3, NEVER, 6, 7, 1)  # of episode e in environment i: number (i + e) % 5
GYM = ["Ant", "Ingenuity", "Anymal", "OldAnt", "OldIngenuity"]
ALL = [
    ("mujoco", "Ingenuity"),
    *(("isaacgym", t) for t in GYM),
    ("isaaclab", "Isaac-Ant-Direct-v0"),
]


pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture
def stand_ins(monkeypatch):
    """Both simulators can be imported, in this test only."""
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setattr(Ingenuity, "episode_length", 12)
    registered = set(gym.registry)
    yield
    for name in list(sys.modules):
        if name.split(".")[0] in PACKAGES:
            del sys.modules[name]
    for name in set(gym.registry) - registered:
        del gym.registry[name]


def decode(obs: Tensor) -> list[tuple[int, int]]:
    """Episode and step of each environment; checks that each has its own row."""
    environment, episode, step = (64 * obs[:, :3]).long().T
    assert environment.tolist() == list(range(len(obs)))
    return list(zip(episode.tolist(), step.tolist(), strict=True))


def play(simulator, steps: int, obs: Tensor) -> list[list]:
    """Per environment the rows (obs, final obs, terminated, truncated).

    None where not valid.

    Checks each reward against the action of its row: 1 - |action - 0.5|^2.
    """
    timelines = [[] for _ in range(simulator.num_envs)]
    for step in range(steps):
        action = torch.full((simulator.num_envs, 2), step / 128)  # exact in float32
        before, expected = decode(obs), 1 - 2 * (step / 128 - 0.5) ** 2
        obs, reward, terminated, truncated, final_obs = simulator.step(action)
        valid = [True] * simulator.num_envs
        if simulator.valid is not None:
            valid = simulator.valid.tolist()
        after, flags = decode(final_obs), (terminated.tolist(), truncated.tolist())
        for i, timeline in enumerate(timelines):
            row = before[i], after[i], flags[0][i], flags[1][i]
            timeline.append(row if valid[i] else None)
            assert reward[i] == (expected if valid[i] else 0)
            assert valid[i] or row[2:] == (False, False)
    return timelines


def timeline(
    env, first, steps, start, late, falls=FALLS, stale=False, fall_wins=False
) -> list:
    """What `play` must return for environment `env`, from episode `first` on.

    start: the first step of an episode that can be observed; late: rows lost to a
    reset; stale: an episode after a fall is lost, too; fall_wins: at the time limit.
    """
    rows, episode = [], first
    while len(rows) < steps:
        fall = falls[(env + episode) % len(falls)]
        end = min(fall, LIMIT)
        terminated = fall < LIMIT or (fall_wins and fall == LIMIT)
        for step in range(start, end):
            last = step + 1 == end
            flags = last and terminated, last and not terminated
            rows.append(((episode, step), (episode, step + 1), *flags))
        burnt = stale and fall <= LIMIT
        rows += [None] * (late + burnt)
        episode += 1 + burnt
    return rows[:steps]


HOW = {
    "Ant": dict(start=0, late=1),
    "Ingenuity": dict(start=1, late=1),
    "Anymal": dict(start=0, late=1, falls=FALLS[:4], stale=True),
    "OldAnt": dict(start=0, late=1),
    "OldIngenuity": dict(start=1, late=1),
    "Isaac-Ant-Direct-v0": dict(start=0, late=0, fall_wins=True),
}


@pytest.mark.parametrize(("name", "env_id"), ALL[1:])
def test_every_row_of_every_episode_arrives_once(name, env_id):
    """Row by row: all ends of episodes; no row joins two, none is lost or doubled."""
    simulator = make_simulator(name, env_id, 5, seed=1)
    timelines = play(simulator, 60, simulator.reset())
    for i in range(5):
        assert timelines[i] == timeline(i, 1, 60, **HOW[env_id])


def test_the_rows_of_one_environment_written_out():
    """It falls at steps 6, 7 (the limit), 1 and 3: checks `timeline` itself."""
    rows = [((1, t), (1, t + 1), t == 5, False) for t in range(6)]  # the fall at step 6
    rows += [None]
    # a fall at the limit
    rows += [((2, t), (2, t + 1), False, t == 6) for t in range(7)]
    rows += [None, ((3, 0), (3, 1), True, False), None]
    rows += [((4, 0), (4, 1), False, False), ((4, 1), (4, 2), False, False)]
    rows += [((4, 2), (4, 3), True, False), None, ((5, 0), (5, 1), False, False)]
    assert timeline(1, 1, len(rows), **HOW["Ant"]) == rows


@pytest.mark.parametrize(("name", "env_id"), ALL[1:])
def test_observations_at_an_episodes_end(name, env_id):
    """Isaac Lab: the next episode's; Isaac Gym: the final one, then the next's."""
    simulator = make_simulator(name, env_id, 5, seed=1)
    simulator.reset()
    ends = 0
    for _ in range(40):
        obs, _, terminated, truncated, final_obs = simulator.step(torch.zeros(5, 2))
        now, final = decode(obs), decode(final_obs)
        for i in (terminated | truncated).nonzero()[:, 0].tolist():
            ends += 1
            assert now[i] == (final[i] if name == "isaacgym" else (final[i][0] + 1, 0))
        if name == "isaacgym":
            first = HOW[env_id]["start"]
            late = (~simulator.valid).nonzero()[:, 0].tolist()
            assert all(now[i][1] == first for i in late)
    assert ends > 20


@pytest.mark.parametrize("env_id", ["Ant", "Ingenuity", "Isaac-Ant-Direct-v0"])
@pytest.mark.parametrize("steps", [0, 1, 6, 7, 8])
def test_reset_starts_new_episodes_everywhere(env_id, steps):
    """Whatever the environments were doing, also in the middle of a late reset."""
    name = "isaaclab" if env_id.startswith("Isaac") else "isaacgym"
    simulator = make_simulator(name, env_id, 5, seed=1)
    play(simulator, steps, simulator.reset())
    obs = simulator.reset()
    assert simulator.valid is None or simulator.valid.all()
    assert {step for _, step in decode(obs)} == {HOW[env_id]["start"]}
    for i, rows in enumerate(play(simulator, 30, obs)):
        assert rows == timeline(i, decode(obs)[i][0], 30, **HOW[env_id])


@pytest.mark.parametrize(("name", "env_id"), ALL)
def test_protocol(name, env_id):
    """Shapes, types, flags and the distance of time-outs."""
    simulator = make_simulator(name, env_id, 4, seed=1)
    n, s = 4, simulator.obs_dim
    assert (simulator.num_envs, simulator.device) == (n, torch.device("cpu"))
    obs = simulator.reset()
    since, distances = torch.zeros(n), []
    for _ in range(70):
        assert obs.shape == (n, s)
        assert obs.dtype == torch.float32
        result = simulator.step(torch.empty(n, simulator.act_dim).uniform_(-1, 1))
        obs, reward, terminated, truncated, final_obs = result
        assert reward.shape == terminated.shape == truncated.shape == (n,)
        assert reward.dtype == final_obs.dtype == torch.float32
        assert terminated.dtype == truncated.dtype == torch.bool
        assert final_obs.shape == (n, s)
        assert not (terminated & truncated).any()
        assert all(t.device == simulator.device for t in result)
        done = terminated | truncated
        assert torch.equal(obs[~done], final_obs[~done])
        if simulator.valid is not None:
            assert (simulator.valid.shape, simulator.valid.dtype) == ((n,), torch.bool)
        since += 1
        distances += since[truncated].tolist()
        since[truncated] = 0
    assert min(distances) >= simulator.max_steps
    assert simulator.max_steps == {"mujoco": 11, "isaacgym": 6, "isaaclab": 7}[name]
    if "Ingenuity" in env_id or name == "isaaclab":  # as near as promised
        assert min(distances) == simulator.max_steps


@pytest.mark.parametrize(
    ("name", "env_id"), [("mujoco", "Ant"), ("mujoco", "Humanoid"), *ALL]
)
def test_results_stay_as_they_were(name, env_id):
    """Later steps change none of them, and they share no memory with each other."""
    simulator = make_simulator(name, env_id, 4, seed=1)
    rows, copies = [(simulator.reset(),)], []
    copies.append([t.clone() for t in rows[0]])
    for step in range(30):
        action = torch.full((4, simulator.act_dim), step / 30)
        rows.append((*simulator.step(action), simulator.valid))
        rows[-1] = [t for t in rows[-1] if t is not None]
        copies.append([t.clone() for t in rows[-1]])
        assert len({t.data_ptr() for t in rows[-1]}) == len(rows[-1])
    for row, copy in zip(rows, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, copy, strict=True))


@pytest.mark.parametrize(("name", "env_id"), [("mujoco", "Ant"), *ALL])
def test_actions_are_clipped_and_the_seed_decides(name, env_id):
    def results(seed, scale):
        """All numbers of 50 steps with actions of +-scale."""
        simulator = make_simulator(name, env_id, 4, seed)
        rows, generator = [(simulator.reset(),)], torch.Generator().manual_seed(0)
        for _ in range(50):
            bits = torch.randint(2, (4, simulator.act_dim), generator=generator)
            rows.append(simulator.step(scale * (bits * 2.0 - 1)))
        return torch.cat([t.flatten().float() for row in rows for t in row])

    once = results(seed=1, scale=1)
    assert torch.equal(once, results(seed=1, scale=2))
    assert not torch.equal(once, results(seed=2, scale=1))


@pytest.mark.parametrize(("name", "env_id"), ALL[1:])
def test_states_are_not_saved(name, env_id):
    simulator = make_simulator(name, env_id, 2, seed=1)
    assert (simulator.exact_resume, simulator.one_per_process) == (False, True)
    assert simulator.state_dict() == {}
    simulator.load_state_dict({})
    with pytest.raises(SimulatorError, match="leave out --capture-video"):
        simulator.render()


def refusal(name, env_id) -> str:
    with pytest.raises(SimulatorError) as info:
        make_simulator(name, env_id, 2, seed=1).reset()
    assert "\n" not in str(info.value)
    return str(info.value)


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "ShadowHand needs isaacgym, and isaacgymenvs is not installed" in refusal(
        "auto", "ShadowHand"
    )
    assert "isaaclab_tasks is not installed" in refusal("auto", "Isaac-Ant-Direct-v0")


def test_refusals_of_isaac_gym(monkeypatch):
    unknown = refusal("isaacgym", "Nope")
    reason = "LookupError: In 'config': Could not find 'task/Nope'"
    assert unknown == f"Isaac Gym can't make Nope: {reason}"
    import isaacgymenvs

    monkeypatch.setattr(isaacgymenvs, "make", lambda **_options: sys.exit())
    assert refusal("isaacgym", "Ant").startswith("Isaac Gym can't make Ant: SystemExit")
    del sys.modules["isaacgym"]
    monkeypatch.setenv("STRICT_IMPORT_ORDER", "1")
    assert "can't import Isaac Gym (its import must come before torch's)" in refusal(
        "auto", "ShadowHand"
    )


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Isaac-Nope-v0", "no task Isaac-Nope-v0; since 3.0 names have no ending -v0"),
        ("Isaac-Humanoid-Direct-v0", "no task Isaac-Humanoid-Direct-v0; since 3.0"),
        (
            "Isaac-Terms-v0",
            'Isaac-Terms-v0: observations "policy" must be one flat vector',
        ),
        (
            "Isaac-Image-v0",
            'Isaac-Image-v0: observations "policy" must be one flat vector',
        ),
        ("Isaac-Discrete-v0", "Isaac-Discrete-v0: actions must be one flat vector"),
    ],
)
def test_refusals_of_isaac_lab(env_id, message):
    assert message in refusal("isaaclab", env_id)


def test_an_isaac_lab_without_final_observations_is_refused(monkeypatch):
    """Without the option, and where it has no effect."""
    import isaaclab_tasks

    needed = "Isaac Lab 3.0 or newer is needed"
    with monkeypatch.context() as patch:
        original = isaaclab_tasks.EnvCfg.__init__

        def without_final_obs(self):
            original(self)
            del self.compute_final_obs

        patch.setattr(isaaclab_tasks.EnvCfg, "__init__", without_final_obs)
        assert needed in refusal("isaaclab", "Isaac-Ant-Direct-v0")
    simulator = make_simulator("isaaclab", "Isaac-Ant-Direct-v0", 5, seed=1)
    play(simulator, 8, simulator.reset())
    # No old one is taken instead.
    simulator.env.unwrapped.cfg.compute_final_obs = False
    with pytest.raises(SimulatorError, match="did not return the final observation"):
        play(simulator, 8, simulator.reset())


def test_an_isaac_lab_without_launch_simulation_starts_by_its_app_launcher(monkeypatch):
    import isaaclab.app

    monkeypatch.setattr(isaaclab.app, "running", False)
    monkeypatch.delattr(isaaclab.app, "launch_simulation")
    simulator = make_simulator("isaaclab", "Isaac-Ant-Direct-v0", 5, seed=1)
    play(simulator, 8, simulator.reset())


@pytest.mark.parametrize(
    ("name", "env_id", "options", "message"),
    [
        (
            "mujoco",
            "Bee",
            {},
            f"no task Bee; the embedded tasks are {', '.join(TASKS)}",
        ),
        (
            "isaac",
            "Ant",
            {},
            "simulator isaac: must be one of auto, isaacgym, isaaclab, mujoco",
        ),
        (
            "mujoco",
            "Ant",
            {"variant": "isaac"},
            "variant isaac: must be one of oige, ige",
        ),
        ("mujoco", "Ant", {"num_envs": 0}, "0 environments: must be at least 1"),
        ("mujoco", "Ant", {"num_envs": 10**9}, "1000000000 environments need "),
        (
            "mujoco",
            "Ant",
            {"device": "cuda"},
            "device cuda: there is no usable GPU here",
        ),
    ],
)
def test_bad_input(monkeypatch, name, env_id, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SimulatorError) as info:
        make_simulator(name, env_id, **({"num_envs": 2, "seed": 1} | options))
    assert message in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "env_id", "hint"),
    [
        ("auto", "ant", "; did you mean Ant?"),
        ("mujoco", "humanoid", "; did you mean Humanoid?"),
        ("auto", "ANYMALL", "; did you mean Anymal?"),
        ("auto", "ShadowHand", f"are {', '.join(TASKS)}"),
        ("mujoco", "Bee", f"are {', '.join(TASKS)}"),
    ],
)
def test_a_wrong_name_gets_a_hint(monkeypatch, name, env_id, hint):
    """Where an embedded robot is similar, whatever the case of its letters."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert refusal(name, env_id).endswith(hint)


def test_imports_go_one_way():
    """interface <- simulators and tasks <- make <- training, anywhere in a file."""
    package = Path(isaac_tasks.__file__).parent
    imported = {}
    for file in package.glob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        names = [
            node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)
        ]
        names = [name.partition(".") for name in names]
        ours = {inner for package, _, inner in names if package == "isaac_tasks"}
        imported[file.stem] = ours
        assert "" not in ours, f"{file.name} imports from the package itself"
    done = set()
    while ready := {name for name, needs in imported.items() if needs <= done} - done:
        done |= ready
    assert done == set(imported), f"a circle: {set(imported) - done}"
    assert imported["interface"] == imported["task"] == set()
    simulators = {"mujoco_simulator", "isaacgym_simulator", "isaaclab_simulator"}
    for name in simulators | {"physics"}:
        assert not imported[name] & {"make", "training"}
    for task in TASKS.values():  # a task knows no simulator
        module = task.__module__.split(".")[1]
        assert not imported[module] & {"make", "training", "physics"}


@pytest.mark.parametrize(
    ("name", "env_id", "chosen"),
    [
        ("auto", "Ant", "mujoco"),
        ("auto", "Ingenuity", "mujoco"),
        ("auto", "ShadowHand", "isaacgym"),
        ("auto", "Isaac-Ant-Direct-v0", "isaaclab"),
        ("auto", "Isaac-Ant-Direct", "isaaclab"),
        ("isaacgym", "Ant", "isaacgym"),
        ("mujoco", "Isaac-Ant-Direct-v0", "mujoco"),
    ],
)
def test_choice_of_the_simulator(name, env_id, chosen):
    assert choose_simulator(name, env_id) == chosen


@pytest.mark.slow
def test_a_fresh_process_with_the_imports_in_order():
    """As in a script: Isaac Gym before torch, and nothing closes the physics early."""
    code = """
import isaacgym, torch
from isaac_tasks import make_simulator
for name, env_id in ("isaacgym", "Ant"), ("isaaclab", "Isaac-Ant-Direct-v0"):
    simulator = make_simulator(name, env_id, 3, seed=1)
    simulator.reset()
    print(simulator.step(torch.full((3, 2), 0.5))[1].tolist())
"""
    paths = os.pathsep.join([str(STAND_INS), str(STAND_INS.parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "STRICT_IMPORT_ORDER": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1.0, 1.0, 1.0]\n" * 2
