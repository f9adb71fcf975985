"""How a robot with a free root touches the floor: with spheres, a contact pair each."""

import itertools
import math

import mujoco
import numpy as np

GEOM = mujoco.mjtGeom


def stand_on_floor(spec: mujoco.MjSpec, friction: float):
    """Lets the robot touch the geom "floor" (z = 0) with spheres.

    On these `limits.Floor` acts. On a plane a capsule is the two spheres at its ends, a
    box its corners.
    """
    # Neither is of use to one small robot.
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_WARMSTART
    model = spec.compile()
    floor = spec.geom("floor")
    geoms = [geom for geom in spec.geoms if geom.name != floor.name]
    collides_with_itself = any(a.contype & b.conaffinity for a in geoms for b in geoms)
    if not collides_with_itself:
        for geom in geoms:
            geom.contype = geom.conaffinity = 0
    floor.contype = floor.conaffinity = 0
    shape = dict(type=GEOM.mjGEOM_SPHERE, mass=0, contype=0, conaffinity=0, margin=0)
    for i, (body, place, radius) in enumerate(touching_spheres(model)):
        sphere = spec.body(model.body(body).name).add_geom(name=f"touch_{i}", **shape)
        sphere.pos = place
        sphere.size[0] = radius
        sphere.group = 4  # not drawn
        pair = spec.add_pair(geomname1=floor.name, geomname2=sphere.name, condim=3)
        pair.friction[:2] = friction


def touching_spheres(model: mujoco.MjModel) -> list[tuple[int, np.ndarray, float]]:
    """The spheres with which a robot can touch a plane: body, place in it (3,), radius.

    Left out are those that the others of a body keep off every plane, and those that
    are always where another body has one, such as at a knee.
    """
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((3, 5000))
    directions /= np.linalg.norm(directions, axis=0)
    poses = [mujoco.MjData(model) for _ in range(2)]
    for data in poses:
        data.qpos[7:] = rng.uniform(*model.jnt_range[1:].T)
        mujoco.mj_kinematics(model, data)
    solid = (model.geom_contype | model.geom_conaffinity) > 0
    spheres, seen = [], []
    for body in range(1, model.nbody):
        geoms = np.flatnonzero(solid & (model.geom_bodyid == body))
        rows = [row for geom in geoms for row in ends(model, geom)]
        if not rows:
            continue
        heights = [place @ directions + radius for place, radius in rows]
        touching_first = np.unique(np.argmax(heights, 0))
        for i in touching_first:
            place, radius = rows[i]
            places = [d.xpos[body] + d.xmat[body].reshape(3, 3) @ place for d in poses]
            here = np.append(places, radius)
            if not seen or abs(np.array(seen) - here).max(1).min() > 1e-6:
                spheres.append((body, place, radius))
                seen.append(here)
    return spheres


def ends(model: mujoco.MjModel, geom: int) -> list[tuple[np.ndarray, float]]:
    """Centres (3,), in the body, and radii of the spheres whose hull is the geom.

    The hull of a sphere or capsule exactly, of a box with corners rounded by a
    millimetre, of a cylinder with 24 places of each rim, rounded as much.
    """
    kind, size = model.geom_type[geom], model.geom_size[geom]
    radius = size[0]
    if kind == GEOM.mjGEOM_SPHERE:
        places = [(0, 0, 0)]
    elif kind == GEOM.mjGEOM_CAPSULE:
        places = [(0, 0, -size[1]), (0, 0, size[1])]
    elif kind == GEOM.mjGEOM_BOX:
        radius = 1e-3
        places = np.array([*itertools.product((-1, 1), repeat=3)]) * (size - radius)
    elif kind == GEOM.mjGEOM_CYLINDER:
        radius = 1e-3
        r, z = size[:2] - radius
        places = []
        for turn in (i * math.pi / 12 for i in range(24)):
            x, y = r * math.cos(turn), r * math.sin(turn)
            places += [(x, y, -z), (x, y, z)]
    else:
        raise ValueError(
            f"{model.geom(geom).name}: no sphere, capsule, box or cylinder"
        )
    turned = np.zeros((len(places), 3))
    for row, place in zip(turned, places, strict=True):
        mujoco.mju_rotVecQuat(row, np.array(place, float), model.geom_quat[geom])
    return [(model.geom_pos[geom] + row, float(radius)) for row in turned]
