"""studies/walkable_floor/physics.py: which constraints act in which arm."""

import contextlib
import importlib
import sys

import pytest
import torch
from conftest import ROOT, only_run, options

from isaac_tasks import limits, make_simulator

sys.path.insert(0, str(ROOT / "studies/walkable_floor"))
physics = importlib.import_module("physics")


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What an arm changes is as before after the test."""
    for kind in (limits.Floor, limits.JointLimits):
        monkeypatch.setattr(kind, "__init__", kind.__init__)
    for name in ("thickness", "damping"):
        monkeypatch.setattr(limits.Floor, name, getattr(limits.Floor, name))


@pytest.mark.parametrize(
    ("arm", "joints", "spheres"),
    [
        ("today", 8, 13),
        ("own", 0, 0),
        ("own_floor", 8, 0),
        ("own_limits", 0, 13),
        ("soft", 8, 13),
    ],
)
def test_who_holds_joints_and_feet(arm, joints, spheres):
    physics.ARMS[arm]()
    envs = make_simulator("mujoco", "Ant", 4, seed=1)
    assert len(envs.physics.limits.joints.zone) == joints
    assert len(envs.physics.limits.floor) == spheres
    assert limits.Floor.thickness == (0.03 if arm == "soft" else 0.01)
    envs.reset()
    overshoot = 0.0
    low, high = torch.tensor(envs.model.jnt_range[1:]).unbind(-1)
    for _ in range(100):
        envs.step(torch.where(envs.physics.qvel[:, 6:] < 0, -1.0, 1.0))
        q = envs.physics.qpos[:, 7:]
        overshoot = max(overshoot, torch.maximum(q - high, low - q).max().item())
        assert envs.physics.qpos[:, 2].min() > 0.1  # nobody falls through the floor
    assert (overshoot > 0.2) == (joints == 0)


def test_a_run_is_named_after_its_arm(tmp_path):
    words = options(env_id="Ant", total_timesteps=6, num_envs=2, batch_size=4)
    words += options(learning_starts=3, eval_episodes=0, compile=False)
    with contextlib.chdir(tmp_path):
        assert physics.main(["own_floor", "meow_isaacgym.py", *words]) == 0
    assert only_run(tmp_path).name.startswith("Ant__meow_isaacgym_own_floor__1__")
    assert physics.main(["nothing", "meow_isaacgym.py"]) == 2
    assert physics.main(["own", "nothing.py"]) == 2
