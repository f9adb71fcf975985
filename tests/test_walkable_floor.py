"""studies/walkable_floor/physics.py: which constraints act in which arm.

Each arm is a process of its own, as it is for a user: it changes classes for good.
"""

import sys

import pytest
from conftest import ROOT, only_run, options, run

TOOL = ROOT / "studies/walkable_floor/physics.py"
PUSHED = """
import sys
sys.path.insert(0, sys.argv[1])
import physics
physics.ARMS[sys.argv[2]]()
import torch
from isaac_tasks import make_simulator
envs = make_simulator("mujoco", "Ant", 4, seed=1)
envs.reset()
low, high = torch.tensor(envs.model.jnt_range[1:]).unbind(-1)
overshoot, lowest = 0.0, 1.0
for _ in range(100):
    envs.step(torch.where(envs.physics.qvel[:, 6:] < 0, -1.0, 1.0))
    q = envs.physics.qpos
    beyond = torch.maximum(q[:, 7:] - high, low - q[:, 7:])
    overshoot, lowest = max(overshoot, beyond.max()), min(lowest, q[:, 2].min())
limits = envs.physics.limits
print(len(limits.joints.zone), len(limits.floor), limits.floor.thickness)
print(float(overshoot), float(lowest))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "held"),
    [
        ("today", "8 13 0.01"),
        ("own", "0 0 0.01"),
        ("own_floor", "8 0 0.01"),
        ("own_limits", "0 13 0.01"),
        ("soft", "8 13 0.03"),
    ],
)
def test_who_holds_joints_and_feet(arm, held, tmp_path):
    """Joints and spheres on which ours act; how far pushed joints and torsos get."""
    result = run([sys.executable, "-c", PUSHED, TOOL.parent, arm], tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == held
    overshoot, lowest = map(float, second.split())
    assert (overshoot > 0.2) == held.startswith("0 ")
    assert lowest > 0.1  # nobody falls through the floor


@pytest.mark.slow
def test_a_run_is_named_after_its_arm(tmp_path):
    words = options(env_id="Ant", total_timesteps=6, num_envs=2, batch_size=4)
    words += options(learning_starts=3, eval_episodes=0, compile=False)
    tool = [sys.executable, TOOL]
    result = run([*tool, "own_floor", "meow_isaacgym.py", *words], tmp_path)
    assert result.returncode == 0, result.stderr
    assert only_run(tmp_path).name.startswith("Ant__meow_isaacgym_own_floor__1__")
    result = run([*tool, "own", "nothing.py"], tmp_path)
    assert result.returncode == 2
    assert "error: there is no nothing.py" in result.stderr
    assert run([*tool, "nothing", "meow_isaacgym.py"], tmp_path).returncode == 2
