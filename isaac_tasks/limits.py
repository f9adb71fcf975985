"""What nothing passes although physics steps are long: the limits of joints and the floor.

MuJoCo's limits and contacts act on what is already beyond them: at 120 Hz on a joint at 50 rad/s
after 24 degrees, on a foot at 5 m/s after 4 cm. Here they act on what the coming step might bring
there, as PhysX's contacts do. Only for the integrator mjINT_DISCRETE, whose step ends as its
constraints say. See "Solver parameters" in MuJoCo's documentation: `margin` is the distance from
which a constraint acts, `solref` its stiffness and damping, `solimp` the share of other
accelerations that it takes away.
"""

import mujoco
import numpy as np
import torch
from torch import Tensor

HARDNESS = 0.98
"""largest share of other accelerations that is taken away from what is not beyond its limit yet"""
PUSH_BACK = 0.2
"""share of its way back that what is beyond its limit goes in a step"""


def look_ahead(distance: Tensor, way: Tensor, zone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How limits act in the coming step: margin, stiffness times step^2, share of accelerations.

    distance: to the limit. way: towards it in the coming step, if nothing accelerates. zone: what
    motors and collisions may at most add to that way. All of one shape, rad or m.
    """
    target = distance.where(distance > 0, PUSH_BACK * distance)  # the way to go
    room = target - way
    share = (1 - room / zone).clamp(1e-4, HARDNESS)
    # A spring of stiffness k / step^2 that is shortened by `length` turns `way` into
    # (way - k length) / (1 + k): into `target`, and fast ones near the limit into less.
    fast = (4 * way / zone).abs().clamp(max=1)
    stiffness = (-room).clamp(min=0) / target.clamp(min=1e-3 * zone) + share * fast
    length = -target.clamp(max=-1e-6 * zone)
    return (distance + length).where(room < zone, 0.0), stiffness, share


class JointLimits:
    """Of a model's hinges and slides, for N environments."""

    tolerance = (0.04, 0.002)
    """rad, m: nothing moves a joint further beyond its limit"""

    def __init__(self, model: mujoco.MjModel, margin: Tensor, solref: Tensor, solimp: Tensor):
        """(N, joints), (N, joints, 2), (N, joints, 5): the model's jnt_* of the same names."""
        slide = model.jnt_type == mujoco.mjtJoint.mjJNT_SLIDE
        hinge = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
        joints = np.flatnonzero(model.jnt_limited * (slide | hinge))
        indices = joints, model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self.joints, self.q, self.v = (places(i, margin.device) for i in indices)
        self.margin, self.solref, self.solimp = margin, solref, solimp
        self.step = model.opt.timestep
        lower, upper = torch.from_numpy(model.jnt_range[joints]).to(margin).unbind(-1)
        self.middle, self.half = (lower + upper) / 2, (upper - lower) / 2
        self.zone = 0.1 * (upper - lower)
        tolerance = np.where(slide[joints], self.tolerance[1], self.tolerance[0])
        beyond = torch.from_numpy(tolerance).to(margin)
        self.lowest, self.highest = lower - beyond, upper + beyond
        solref[:, self.joints] = 0

    def distance_and_way(self, qpos: Tensor, qvel: Tensor) -> tuple[Tensor, Tensor]:
        """To the nearer limit, from positions (N, nq) and velocities (N, nv)."""
        offset = qpos[:, self.q] - self.middle
        return self.half - offset.abs(), self.step * offset.sign() * qvel[:, self.v]

    def act(self, margin: Tensor, stiffness: Tensor, share: Tensor):
        self.margin[:, self.joints] = margin
        self.solref[:, self.joints, 0] = -stiffness * share / self.step**2
        self.solimp[:, self.joints, :2] = share[..., None]

    def clamp(self, qpos: Tensor):
        """After each step: puts the rare joint beyond the tolerance there."""
        qpos[:, self.q] = qpos[:, self.q].clamp(self.lowest, self.highest)


class Floor:
    """The plane z = 0 under the spheres of one robot (see `stand_on_floor`), for N environments.

    A sphere in the air is stopped without friction; one that touches is also damped, so that its
    friction stops it.
    """

    thickness = 0.01
    """m, of the zone above the floor in which accelerations towards it are taken away"""
    touching = 0.003
    """m: up to this height a sphere has friction"""
    damping = 0.8
    """of a sphere that touches, times the step"""
    tolerance = 0.004
    """m: a robot that is deeper in the floor is lifted"""

    def __init__(
        self,
        model: mujoco.MjModel,
        margin: Tensor,
        solref: Tensor,
        solimp: Tensor,
        dim: Tensor | None = None,
    ):
        """(N, spheres), (N, spheres, 2), (N, spheres, 5): the model's pair_* of the same names.

        dim (N, spheres): None where the simulator has one for all environments.
        """
        geoms = model.pair_geom2
        self.geoms = places(geoms, margin.device)
        self.bodies = places(model.geom_bodyid[geoms], margin.device)
        self.root = int(model.body_rootid[model.geom_bodyid[geoms]].max(initial=0))
        self.radius = torch.from_numpy(model.geom_size[geoms, 0]).to(margin)
        self.zone = torch.full_like(self.radius, self.thickness)
        self.margin, self.solref, self.solimp, self.dim = margin, solref, solimp, dim
        self.friction = 1 if dim is None else dim.clone()
        self.step = model.opt.timestep
        self.height = self.way = torch.zeros_like(margin)

    def __len__(self) -> int:
        return len(self.radius)

    def look(self, xpos: Tensor, cvel: Tensor, centre: Tensor):
        """Where the spheres are: the geoms' positions (N, geoms, 3), and the bodies' velocities
        (N, bodies, 6: angular, linear) at the centres of mass of their trees (N, bodies, 3).
        """
        position, velocity = xpos[:, self.geoms], cvel[:, self.bodies]
        x, y, _ = (position - centre[:, self.root, None]).unbind(-1)
        spin = velocity[..., 0] * y - velocity[..., 1] * x
        self.height = position[..., 2] - self.radius
        self.way = -self.step * (velocity[..., 5] + spin)

    def act(self, margin: Tensor, stiffness: Tensor, share: Tensor):
        touches = self.height < self.touching
        self.margin[:] = margin
        self.solref[..., 0] = -stiffness * share / self.step**2
        self.solref[..., 1] = -self.damping / self.step * share * touches
        self.solimp[..., :2] = share[..., None]
        if self.dim is not None:
            self.dim[:] = self.friction.where(touches, 1)

    def lift(self, qpos: Tensor):
        """After each step: lifts the rare robot that is too deep in the floor."""
        depth = (-self.tolerance - self.height).clamp(min=0).amax(-1)
        qpos[:, 2] += depth
        self.height = self.height + depth[:, None]


class Limits:
    """Joint limits and floor together; without mjINT_DISCRETE there is nothing that they do."""

    def __init__(self, model: mujoco.MjModel, joints: list[Tensor], pairs: list[Tensor]):
        self.joints, self.floor = JointLimits(model, *joints), Floor(model, *pairs)
        self.active = model.opt.integrator == mujoco.mjtIntegrator.mjINT_DISCRETE
        self.zone = torch.cat([self.joints.zone, self.floor.zone])

    def update(self, qpos: Tensor, qvel: Tensor):
        """Before each step, from positions (N, nq) and velocities (N, nv); after `floor.look`."""
        if not self.active:
            return
        distance, way = self.joints.distance_and_way(qpos, qvel)
        distance = torch.cat([distance, self.floor.height], -1)
        limits = look_ahead(distance, torch.cat([way, self.floor.way], -1), self.zone)
        sizes = [len(self.joints.zone), len(self.floor)]
        joints, floor = zip(*(values.split(sizes, -1) for values in limits), strict=True)
        self.joints.act(*joints)
        self.floor.act(*floor)


def places(indices: np.ndarray, device: torch.device) -> slice | Tensor:
    """What selects columns: a slice, which is faster, where they follow one another."""
    if len(indices) and np.all(np.diff(indices) == 1):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return torch.tensor(indices, device=device).long()
