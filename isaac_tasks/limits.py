"""What nothing passes although physics steps are long: joints' limits and the floor.

MuJoCo's limits and contacts act on what is already beyond them: at 120 Hz on a joint at
50 rad/s after 24 degrees, on a foot at 5 m/s after 4 cm. Here they act on what the
coming step might bring there, as PhysX's contacts do. Only for the integrator
mjINT_DISCRETE, whose step ends as its constraints say. See "Solver parameters" in
MuJoCo's documentation: `margin` is the distance from which a constraint acts, `solref`
its stiffness and damping, `solimp` the share of other accelerations that it takes away.

Arrays are NumPy's, which are faster on a CPU, or torch's.
"""

import mujoco
import numpy as np
import torch

Array = np.ndarray | torch.Tensor

FIELDS = ("margin", "solref", "solimp")
"""of a model's joints and contact pairs, to be had for each environment"""

HARDNESS = 0.98
"""most of other accelerations that is taken from what is not beyond its limit yet"""
PUSH_BACK = 0.2
"""share of its way back that what is beyond its limit goes in a step"""


def look_ahead(distance: Array, way: Array, zone: Array) -> tuple[Array, Array, Array]:
    """How limits act in the coming step.

    Returns margin, stiffness times step^2, share of other accelerations.
    distance: to the limit. way: towards it in the coming step, if nothing accelerates.
    zone: what motors and collisions may at most add to that way.
    All of one shape, rad or m.
    """
    target = distance.clip(min=0) + PUSH_BACK * distance.clip(max=0)  # the way to go
    room = target - way
    share = (1 - room / zone).clip(1e-4, HARDNESS)
    # A spring of stiffness k / step^2 that is shortened by `length` turns `way` into
    # (way - k length) / (1 + k): into `target`, and fast ones near the limit into less.
    fast = abs(4 / zone * way).clip(max=1)
    stiffness = -room.clip(max=0) / target.clip(min=1e-3 * zone) + share * fast
    length = -target.clip(max=-1e-6 * zone)
    return (distance + length) * (room < zone), stiffness, share


class JointLimits:
    """Of a model's hinges and slides, for N environments."""

    tolerance = (0.04, 0.002)
    """rad, m: nothing moves a joint further beyond its limit"""

    def __init__(
        self, model: mujoco.MjModel, margin: Array, solref: Array, solimp: Array
    ):
        """margin (N, joints), solref (N, joints, 2), solimp (N, joints, 5).

        They are the model's jnt_* of the same names.
        """
        slide = model.jnt_type == mujoco.mjtJoint.mjJNT_SLIDE
        hinge = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
        limited = model.jnt_limited * (slide | hinge) * looks_ahead(model)
        joints = np.flatnonzero(limited)
        indices = joints, model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self.joints, self.q, self.v = (places(i, margin) for i in indices)
        self.margin, self.solref, self.solimp = margin, solref, solimp
        self.step = model.opt.timestep
        lower, upper = model.jnt_range[joints].T
        tolerance = np.where(slide[joints], self.tolerance[1], self.tolerance[0])
        self.zone = 0.1 * (upper - lower)
        self.middle = as_array((lower + upper) / 2, margin)
        self.half = as_array((upper - lower) / 2, margin)
        self.lowest = as_array(lower - tolerance, margin)
        self.highest = as_array(upper + tolerance, margin)
        solref[:, self.joints] = 0

    def distance_and_way(self, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        """To the nearer limit, from positions (N, nq) and velocities (N, nv)."""
        offset = qpos[:, self.q] - self.middle
        sign = 2.0 * (offset > 0) - 1
        return self.half - sign * offset, self.step * sign * qvel[:, self.v]

    def act(self, margin: Array, stiffness: Array, share: Array):
        self.margin[:, self.joints] = margin
        self.solref[:, self.joints, 0] = -stiffness * share / self.step**2
        self.solimp[:, self.joints, :2] = share[..., None]

    def clamp(self, qpos: Array):
        """After each step: puts the rare joint beyond the tolerance there."""
        qpos[:, self.q] = qpos[:, self.q].clip(self.lowest, self.highest)


class Floor:
    """The plane z = 0 under one robot's spheres (`stand_on_floor`), N environments.

    A sphere that comes near is stopped, one that touches is also damped: so friction
    stops it.
    """

    thickness = 0.01
    """m, of the zone above the floor where accelerations towards it are taken away"""
    touching = 0.003
    """m: up to this height a sphere touches"""
    damping = 0.8
    """of a sphere that touches, times the step"""
    tolerance = 0.003
    """m: a robot that is deeper in the floor is lifted"""
    far = 1e3
    """m: the height of spheres that need no look"""

    def __init__(
        self, model: mujoco.MjModel, margin: Array, solref: Array, solimp: Array
    ):
        """margin (N, spheres), solref (N, spheres, 2), solimp (N, spheres, 5).

        They are the model's pair_* of the same names.
        """
        geoms = model.pair_geom2 if looks_ahead(model) else model.pair_geom2[:0]
        bodies = model.geom_bodyid[geoms]
        self.geoms = places(geoms, margin)
        self.bodies = places(bodies, margin)
        self.root = int(model.body_rootid[bodies].max(initial=0))
        self.radius = as_array(model.geom_size[geoms, 0], margin)
        distances = [distance_to_root(model, geom) for geom in geoms]
        self.reach = 0.05 + max(distances, default=0)
        self.near = len(geoms) > 0
        self.zone = np.full(len(geoms), self.thickness)
        self.margin, self.solref, self.solimp = margin, solref, solimp
        self.step = model.opt.timestep

    def __len__(self) -> int:
        return len(self.zone)

    def high(self, qpos: Array, qvel: Array) -> Array:
        """(N,) bool: where the robot is too high to get to the floor in this step."""
        return qpos[:, 2] + 2 * self.step * qvel[:, 2].clip(max=0) > self.reach

    def look(self, xpos: Array, cvel: Array, centre: Array):
        """Where the spheres are and how they move.

        xpos (N, geoms, 3): the geoms' positions. cvel (N, bodies, 6): the bodies'
        velocities, angular and linear, at the centres of mass of their trees,
        centre (N, bodies, 3).
        """
        x, y, z = (xpos[..., i][:, self.geoms] for i in range(3))
        centre_x, centre_y = (centre[:, self.root : self.root + 1, i] for i in (0, 1))
        spin_x, spin_y, speed = (cvel[..., i][:, self.bodies] for i in (0, 1, 5))
        self.height = z - self.radius
        speed = speed + spin_x * (y - centre_y) - spin_y * (x - centre_x)
        self.way = -self.step * speed

    def act(self, margin: Array, stiffness: Array, share: Array):
        self.margin[:] = margin
        self.solref[..., 0] = -stiffness * share / self.step**2
        touches = self.height < self.touching
        self.solref[..., 1] = -self.damping / self.step * share * touches
        self.solimp[..., :2] = share[..., None]

    def lift(self, qpos: Array):
        """After each step: lifts the rare robot that is too deep in the floor."""
        depth = (-self.tolerance - self.height).clip(min=0)
        depth = depth.max(-1) if isinstance(depth, np.ndarray) else depth.amax(-1)
        qpos[:, 2] += depth
        self.height += depth[:, None]


class Limits:
    """Joint limits and floor together."""

    def __init__(self, model: mujoco.MjModel, joints: list[Array], pairs: list[Array]):
        """joints, pairs: FIELDS."""
        self.joints, self.floor = JointLimits(model, *joints), Floor(model, *pairs)
        zone = np.concatenate([self.joints.zone, self.floor.zone])
        self.zone = as_array(zone, joints[0])

    def update(self, qpos: Array, qvel: Array):
        """Before each step, after `floor.look`.

        From positions (N, nq) and velocities (N, nv).
        """
        if not len(self.zone):
            return
        distance, way = self.joints.distance_and_way(qpos, qvel)
        if self.floor.near:
            cat = np.concatenate if isinstance(qpos, np.ndarray) else torch.cat
            distance = cat([distance, self.floor.height], -1)
            way = cat([way, self.floor.way], -1)
        n = len(self.joints.zone)
        limits = look_ahead(distance, way, self.zone[: distance.shape[-1]])
        self.joints.act(*(values[:, :n] for values in limits))
        if self.floor.near:
            self.floor.act(*(values[:, n:] for values in limits))


def looks_ahead(model: mujoco.MjModel) -> bool:
    """Whether the integrator lets limits act so; with others MuJoCo's own act."""
    return model.opt.integrator == mujoco.mjtIntegrator.mjINT_DISCRETE


def distance_to_root(model: mujoco.MjModel, geom: int) -> float:
    """The most, in m, that a point of a sphere can be away from the root.

    Joints are hinges.
    """
    body, distance = model.geom_bodyid[geom], model.geom_size[geom, 0]
    distance += np.linalg.norm(model.geom_pos[geom])
    while model.body_parentid[body] > 0:
        anchors = model.jnt_pos[model.jnt_bodyid == body]
        turned = 2 * np.linalg.norm(anchors, axis=1).sum()
        distance += np.linalg.norm(model.body_pos[body]) + turned
        body = model.body_parentid[body]
    return distance


def as_array(values: np.ndarray, like: Array) -> Array:
    """The values as an array of this kind, type and device."""
    if isinstance(like, torch.Tensor):
        return torch.from_numpy(values).to(like)
    return values


def places(indices: np.ndarray, like: Array) -> slice | Array:
    """What selects columns: a slice, which is faster, where they follow one another."""
    if len(indices) and np.all(np.diff(indices) == 1):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    if isinstance(like, torch.Tensor):
        return torch.tensor(indices, device=like.device).long()
    return indices.astype(int)
