"""What actions of three kinds do to a robot: nothing diverges, breaks its joints or sinks in."""

import math

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch

from isaac_tasks import TASKS
from isaac_tasks.mujoco_simulator import MujocoSimulator

UNSTUCK = {"AllegroHand": 3}  # steps after which all joints are within their limits


def stress(name: str, variant: str, steps: int):
    """Random, extreme and adversarial actions, 64 environments each (see `stress_actions`)."""
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
    for action in stress_actions(simulator, steps):
        obs, reward, _, _, final_obs = simulator.step(action)
        assert simulator.diverged == 0
        for values in (obs, final_obs, reward, physics.qpos, physics.qvel):
            assert values.isfinite().all()
        assert reward.abs().max() < 1000
        q = physics.qpos[:, positions]
        beyond = torch.maximum(q - high, low - q)[simulator.progress > UNSTUCK.get(name, 0)]
        assert (beyond < allowed).all()
        if model.npair:  # it stands on the floor
            bodies.qpos = physics.qpos.numpy()
            bodies.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)
            started = simulator.progress.numpy() == 0  # Ant ige's feet start in the floor
            assert (depths(model, bodies)[~started] < 0.005).all()


def stress_actions(simulator, steps):
    """For 192 environments: 64 random ones, 64 extreme ones, 64 adversarial ones.

    Adversarial: a half pushes each joint the way that it moves, which excites it at its resonance;
    in the other half signs flip together or alternating, after 1 to 16 steps, whatever resonates.
    """
    act_dim, model = simulator.act_dim, simulator.model
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(32)[:, None]
    joints = model.jnt_dofadr[model.actuator_trnid[:, 0]] if model.njnt > act_dim else []
    for step in range(steps):
        random, extreme = 2 * torch.rand(2, 64, act_dim, generator=generator) - 1
        flips = (-1.0) ** (step // (1 + number // 2) + torch.arange(act_dim) * (number % 2))
        pushes = flips
        if len(joints) == act_dim:
            pushes = simulator.physics.qvel[128:160, joints].sign().float()
        yield torch.cat([random, extreme.sign(), pushes, flips])


def depths(model, batch):
    """Of each world's lowest point below z = 0, m: an array (worlds,)."""
    lowest = np.full(batch.nsim, np.inf)
    own = own_shapes(model) & (model.body_mocapid[model.geom_bodyid] < 0)
    for geom in np.flatnonzero(own):
        size, kind = model.geom_size[geom], model.geom_type[geom]
        up = abs(batch.geom_xmat.reshape(-1, model.ngeom, 3, 3)[:, geom, 2])
        if kind == mujoco.mjtGeom.mjGEOM_BOX:
            extent = up @ size
        elif kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
            extent = size[1] * up[:, 2] + size[0] * np.sqrt((1 - up[:, 2] ** 2).clip(0))
        else:  # a sphere's second size is 0
            extent = size[0] + size[1] * up[:, 2]
        lowest = np.minimum(lowest, batch.geom_xpos[:, geom, 2] - extent)
    return -lowest


def own_shapes(model):
    """Which geoms are the robot's own, not the spheres that touch the floor in their stead."""
    return (model.geom_bodyid > 0) & ~np.isin(np.arange(model.ngeom), model.pair_geom2)
