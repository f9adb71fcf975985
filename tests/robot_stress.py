"""Under three kinds of actions no robot diverges, breaks its joints or sinks in."""

import math

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch

from isaac_tasks import TASKS
from isaac_tasks.mujoco_simulator import MujocoSimulator

UNSTUCK = {"AllegroHand": 3}  # steps after which all joints are within their limits


def stress(name: str, variant: str, check=None):
    """500 steps of random, extreme and adversarial actions, 64 environments each.

    check(simulator, step): what else must hold after each step.
    """
    simulator = MujocoSimulator(TASKS[name], 192, 0, variant=variant)
    simulator.reset()
    model, physics = simulator.model, simulator.physics
    joints = np.flatnonzero(model.jnt_limited)
    positions = model.jnt_qposadr[joints]
    low, high = torch.tensor(model.jnt_range[joints]).unbind(-1)
    slide = torch.tensor(model.jnt_type[joints] == mujoco.mjtJoint.mjJNT_SLIDE)
    allowed = torch.where(slide, 0.003, math.radians(3))
    bodies = Batch(model, 192, 1)
    _ = bodies.geom_xpos, bodies.geom_xmat  # filled by `forward`
    for step, action in enumerate(stress_actions(simulator, 500)):
        obs, reward, _, _, final_obs = simulator.step(action)
        assert simulator.diverged == 0
        for values in (obs, final_obs, reward, physics.qpos, physics.qvel):
            assert values.isfinite().all()
        assert reward.abs().max() < 1000
        q = physics.qpos[:, positions]
        beyond = torch.maximum(q - high, low - q)
        unstuck = simulator.progress > UNSTUCK.get(name, 0)
        assert (beyond[unstuck] < allowed).all()
        if model.npair:  # it stands on the floor
            bodies.qpos = physics.qpos.numpy()
            bodies.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)
            # Ant ige's feet start in the floor.
            started = simulator.progress.numpy() == 0
            assert (depths(model, bodies)[~started] < 0.005).all()
        if check:
            check(simulator, step)


def stress_actions(simulator, steps):
    """For 192 environments: 64 random ones, 64 extreme ones, 64 adversarial ones.

    Adversarial: 24 push each joint the way that it moves, which excites it at its
    resonance; in 20 signs flip together or alternating, after 1 to 10 steps, whatever
    resonates; 20 push for 100.
    """
    act_dim, model = simulator.act_dim, simulator.model
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(20)[:, None]
    driven = [*model.actuator_trnid[:, 0]]
    joints = []
    if len(driven) == act_dim and model.njnt > act_dim:
        joints = model.jnt_dofadr[driven]
    for step in range(steps):
        random, extreme = 2 * torch.rand(2, 64, act_dim, generator=generator) - 1
        together = step // (1 + number // 2)
        alternating = torch.arange(act_dim) * (number % 2)
        flips = (-1.0) ** (together + alternating)
        if step % 100 == 0:
            held = extreme[:20].sign()
        moving = held.repeat(2, 1)[:24]
        if len(joints):
            moving = simulator.physics.qvel[128:152, joints].sign().float()
        yield torch.cat([random, extreme.sign(), moving, flips, held])


def depths(model, batch):
    """Of each world's lowest point below z = 0, m: an array (worlds,)."""
    geoms = np.flatnonzero(
        own_shapes(model) & (model.body_mocapid[model.geom_bodyid] < 0)
    )
    kind, size = model.geom_type[geoms], model.geom_size[geoms]
    up = abs(batch.geom_xmat.reshape(-1, model.ngeom, 3, 3)[:, geoms, 2])
    # The extent of a box is up . size; that of the others, along their axis and across
    # it:
    axis, across = up[..., 2], np.sqrt((1 - up[..., 2] ** 2).clip(0))
    box = kind == mujoco.mjtGeom.mjGEOM_BOX
    cylinder = kind == mujoco.mjtGeom.mjGEOM_CYLINDER
    # A sphere's size[1] is 0.
    round_ones = size[:, 1] * axis + size[:, 0] * np.where(cylinder, across, 1)
    extent = np.where(box, (up * size).sum(-1), round_ones)
    return (extent - batch.geom_xpos[:, geoms, 2]).max(1)


def own_shapes(model):
    """Which geoms are the robot's own, not the spheres that stand for them."""
    return (model.geom_bodyid > 0) & ~np.isin(np.arange(model.ngeom), model.pair_geom2)
