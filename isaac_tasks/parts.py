"""Parts of the models that are built from code: floor and light, boxes, masses, drives.

Units: metres, kg, kg m^2; of a drive N m, N m/rad, N m s/rad, or N, N/m, N s/m.
"""

import mujoco
import numpy as np

Vector = tuple[float, float, float]
Box = tuple[Vector, Vector]
"""its lowest and its highest corner, in the body's axes"""


def add_floor_and_light(spec: mujoco.MjSpec, colour=(0.3, 0.35, 0.4, 1), **options):
    """The plane z = 0, a geom named "floor", with a light above it.

    options: of the geom.
    """
    world = spec.worldbody
    world.add_light(pos=(0, 0, 10), type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    world.add_geom(name="floor", type=plane, size=(0, 0, 1), rgba=colour, **options)


def add_box(body: mujoco.MjsBody, box: Box, **options) -> mujoco.MjsGeom:
    """A geom that fills the box; options: of the geom."""
    low, high = np.array(box)
    kind = mujoco.mjtGeom.mjGEOM_BOX
    return body.add_geom(
        type=kind, pos=(low + high) / 2, size=(high - low) / 2, **options
    )


def set_mass(body: mujoco.MjsBody, mass: float, centre, inertia):
    """Mass, its centre (3,) in the body's axes, and the inertia about it.

    inertia: xx, yy, zz, in axes of inertia; or xx, yy, zz, xy, xz, yz.
    """
    body.explicitinertial = True
    body.mass = mass
    body.ipos = centre
    if len(inertia) == 3:
        body.inertia = inertia
    else:
        body.fullinertia = inertia


def box_inertia(mass: float, box: Box) -> np.ndarray:
    """xx, yy, zz (3,) of a solid box about its middle."""
    x, y, z = np.square(np.subtract(box[1], box[0]))
    return mass / 12 * np.array([y + z, x + z, x + y])


def add_drive(
    spec: mujoco.MjSpec,
    joint: mujoco.MjsJoint,
    stiffness: float,
    damping: float,
    effort: float,
):
    """A spring and damper from the joint to its target, whose effort is limited."""
    drive = spec.add_actuator(name=joint.name, target=joint.name)
    drive.trntype = mujoco.mjtTrn.mjTRN_JOINT
    drive.set_to_position(kp=stiffness, kv=damping)
    drive.forcerange = -effort, effort
