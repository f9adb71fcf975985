"""studies/walkable_floor/physics.py: which constraints act in which arm."""

import contextlib
import importlib
import json
import sys

import pytest
import torch
from conftest import ROOT, only_run, options

from isaac_tasks import limits, make_simulator

sys.path.insert(0, str(ROOT / "studies/walkable_floor"))
physics = importlib.import_module("physics")


@pytest.mark.parametrize(
    ("arm", "joints", "spheres", "thickness", "damping"),
    [
        ("today", 8, 13, 0.01, 0.8),
        ("own", 0, 0, 0.01, 0.8),
        ("own_floor", 8, 0, 0.01, 0.8),
        ("own_limits", 0, 13, 0.01, 0.8),
        ("soft", 8, 13, 0.03, 0.4),
    ],
)
def test_who_holds_joints_and_feet(arm, joints, spheres, thickness, damping):
    """Joints and spheres on which ours act; how far pushed joints and torsos get."""
    with physics.physics_of(arm):
        envs = make_simulator("mujoco", "Ant", 4, seed=1)
        floor = envs.physics.limits.floor
        assert len(envs.physics.limits.joints.zone) == joints
        assert len(floor) == spheres
        assert (floor.thickness, floor.damping) == (thickness, damping)
        overshoot, lowest = pushed(envs)
    assert (overshoot > 0.2) == (joints == 0)
    assert lowest > 0.1  # nobody falls through the floor
    assert (limits.Floor.thickness, limits.Floor.damping) == (0.01, 0.8)
    assert len(make_simulator("mujoco", "Ant", 1, seed=1).physics.limits.floor) == 13


def pushed(envs) -> tuple[float, float]:
    """How far joints get beyond their limits, rad; the lowest height of a torso, m."""
    envs.reset()
    low, high = torch.tensor(envs.model.jnt_range[1:]).unbind(-1)
    overshoot, lowest = 0.0, 1.0
    for _ in range(100):
        envs.step(torch.where(envs.physics.qvel[:, 6:] < 0, -1.0, 1.0))
        q = envs.physics.qpos
        beyond = torch.maximum(q[:, 7:] - high, low - q[:, 7:])
        overshoot = max(overshoot, beyond.max().item())
        lowest = min(lowest, q[:, 2].min().item())
    return overshoot, lowest


def test_a_run_is_named_after_its_arm(tmp_path, capsys):
    words = options(env_id="Ant", total_timesteps=6, num_envs=2, batch_size=4)
    words += options(learning_starts=3, eval_episodes=0, compile=False)
    with contextlib.chdir(tmp_path):
        assert physics.main(["own_floor", "meow_isaacgym.py", *words]) == 0
    run = only_run(tmp_path)
    assert run.name.startswith("Ant__meow_isaacgym_own_floor__1__")
    begins = "python studies/walkable_floor/physics.py own_floor meow_isaacgym.py --"
    assert json.loads((run / "args.json").read_text())["command"].startswith(begins)
    assert physics.main(["own", "nothing.py"]) == 2
    assert "error: there is no nothing.py" in capsys.readouterr().err
    assert physics.main(["nothing", "meow_isaacgym.py"]) == 2
