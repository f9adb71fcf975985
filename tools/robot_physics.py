"""What the physics of a robot task does with it.

python tools/robot_physics.py Ant Humanoid

Prints for both variants: the return of doing nothing, the height of the robot's lowest
point after 3 s of that, and what 64 environments do in 1,000 steps of actions that push
each joint the way it moves: how far joints go beyond their limits, how fast, how deep
feet get into the floor (seen every 10 steps), and how many environments diverge.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import mujoco
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from isaac_tasks import TASKS, make_simulator


def return_of_doing_nothing(task: str, variant: str) -> float:
    """Mean over 16 episodes."""
    envs = make_simulator("mujoco", task, 16, seed=1, variant=variant)
    envs.reset()
    total, going_on = torch.zeros(16), torch.ones(16)
    for _ in range(envs.max_steps):
        _, reward, terminated, truncated, _ = envs.step(torch.zeros(16, envs.act_dim))
        total += going_on * reward
        going_on *= ~(terminated | truncated)
    return total.mean().item()


def lowest_point(task: str, variant: str) -> float:
    """Of geoms at the floor in one environment left alone for 3 s, mm above it."""
    envs = make_simulator("mujoco", task, 1, seed=1, variant=variant)
    envs.reset()
    for _ in range(3 * envs.fps):
        envs.step(torch.zeros(1, envs.act_dim))
    data = envs.physics.data(0)
    mujoco.mj_forward(envs.model, data)
    return 1e3 * min((contact.dist for contact in data.contact), default=np.nan)


def depth(envs) -> float:
    """How deep the spheres that touch the floor are in it, the deepest, mm."""
    spheres, deepest = envs.model.pair_geom2, 0.0
    for world in range(envs.num_envs):
        data = envs.physics.data(world)
        mujoco.mj_kinematics(envs.model, data)
        heights = data.geom_xpos[spheres, 2] - envs.model.geom_size[spheres, 0]
        deepest = max(deepest, -heights.min())
    return 1e3 * deepest


def pushed(task: str, variant: str) -> tuple[float, float, float, int]:
    """Largest overshoot (degrees), speed (rad/s) and depth (mm); diverged episodes."""
    envs = make_simulator("mujoco", task, 64, seed=1, variant=variant)
    envs.reset()
    low, high = torch.tensor(envs.model.jnt_range[1:]).unbind(-1)
    overshoot, speed, deepest, diverged = 0.0, 0.0, 0.0, 0
    for step in range(1000):
        envs.step(torch.where(envs.physics.qvel[:, 6:] < 0, -1.0, 1.0))
        joints = envs.physics.qpos[:, 7:]
        beyond = torch.maximum(joints - high, low - joints)
        overshoot = max(overshoot, beyond.max().item())
        speed = max(speed, envs.physics.qvel[:, 6:].abs().max().item())
        diverged += envs.diverged
        if step % 10 == 0:
            deepest = max(deepest, depth(envs))
    return np.degrees(overshoot), speed, deepest, diverged


@dataclass
class Options:
    tasks: Annotated[tuple[Literal["Ant", "Humanoid"], ...], tyro.conf.Positional]
    """robots with a free root and a motor for each joint"""


def main():
    for name in tyro.cli(Options, description=__doc__.split("\n\n")[0]).tasks:
        for variant in TASKS[name].variants:
            nothing = return_of_doing_nothing(name, variant)
            lowest = lowest_point(name, variant)
            overshoot, speed, deepest, diverged = pushed(name, variant)
            print(
                f"{name} {variant}: doing nothing {nothing:.0f}, "
                f"lowest point {lowest:.2f} mm, overshoot {overshoot:.1f} degrees, "
                f"{speed:.0f} rad/s, {deepest:.1f} mm deep, diverged {diverged}"
            )


if __name__ == "__main__":
    main()
