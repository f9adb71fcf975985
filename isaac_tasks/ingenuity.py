"""Ingenuity: a helicopter with two rotors flies to targets on Mars.

Built from code alone.
"""

import math
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from isaac_tasks.floor import stand_on_floor
from isaac_tasks.parts import add_floor_and_light
from isaac_tasks.task import State, Task, Uniform, rotation_matrix, shorten

ROTORS = {"lower_rotor": 0.0, "upper_rotor": 0.025}  # m above the chassis' centre
SAND = (0.6, 0.35, 0.2, 1)
WITH_FLOOR_ONLY = dict(contype=1, conaffinity=0)


class Ingenuity(Task):
    """Observation (13): vector to the target / 3, quaternion (oige w,x,y,z; ige
    x,y,z,w), velocity / 2, angular velocity / pi, all in world axes. Action (6): x, y,
    z of the lower and of the upper rotor. Memory: the target (3).
    """

    variants: ClassVar = {
        "oige": dict(
            time_step=0.01,
            substeps=1,
            target_width=1.0,
            start_width=0.5,
            start_height=(0.5, 1.5),
            position_weight=2.5,
            upright=1.0,
            upright_weight=30.0,
            spin_weight=10.0,
            lost_distance=20.0,
        ),
        "ige": dict(
            time_step=0.005,
            substeps=2,
            target_width=5.0,
            start_width=1.5,
            start_height=(0.8, 2.5),
            position_weight=1.0,
            upright=5.0,
            upright_weight=1.0,
            spin_weight=1.0,
            lost_distance=8.0,
        ),
    }
    target_width: float
    start_width: float
    """m, of half the square around the origin where targets and starts lie"""
    start_height: tuple[float, float]
    """m, lowest and highest"""
    position_weight: float
    upright: float
    upright_weight: float
    spin_weight: float
    """of the reward, see `reward_terms`"""
    lost_distance: float
    """m from the target, ends the episode"""
    obs_dim, act_dim, memory_dim = 13, 6, 3
    episode_length, clip_obs = 2000, 5.0
    max_thrust, max_spin = 20.0, 4 * math.pi  # N, rad/s
    new_target_every = 500

    def __init__(self, variant: str = "oige", **kwargs):
        super().__init__(variant, **kwargs)
        self.identity = self.tensor([1.0, 0.0, 0.0, 0.0])

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        self.set_options(spec)
        spec.option.gravity = (0, 0, -3.721)
        add_floor_and_light(spec, SAND, contype=0, conaffinity=1)
        world = spec.worldbody
        world.add_site(name="world")
        marker = world.add_body(name="target", mocap=True)
        marker.add_geom(
            type=mujoco.mjtGeom.mjGEOM_SPHERE,
            size=(0.1, 0, 0),
            rgba=(0.1, 0.8, 0.1, 1),
            mass=0,
            contype=0,
            conaffinity=0,
        )
        chassis = world.add_body(name="chassis", pos=(0, 0, 1))
        chassis.add_freejoint(name="root")
        chassis.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=(0.06, 0.06, 0.06),
            density=50,
            **WITH_FLOOR_ONLY,
        )
        chassis.add_camera(
            name="track",
            mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM,
            pos=(0, -3, 1),
            xyaxes=(1, 0, 0, 0, 0.3, 1),
        )
        for name, height in ROTORS.items():
            self.add_rotor(spec, chassis, name, height)
        stand_on_floor(spec, friction=1.0)
        return spec

    def add_rotor(
        self, spec: mujoco.MjSpec, chassis: mujoco.MjsBody, name: str, height: float
    ):
        """A disc with thrust along each axis: the world's (oige) or its own (ige)."""
        rotor = chassis.add_body(name=name, pos=(0, 0, height))
        rotor.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=(0.15, 0.005, 0),
            density=1000,
            rgba=(0.3, 0.3, 0.3, 1),
            **WITH_FLOOR_ONLY,
        )
        rotor.add_site(name=name)
        axes = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
        for axis, direction in axes.items():
            thrust = spec.add_actuator(name=f"{name}_{axis}", target=name)
            thrust.trntype = mujoco.mjtTrn.mjTRN_SITE
            thrust.gear = (*direction, 0, 0, 0)
            if self.variant == "oige":
                thrust.refsite = "world"

    def control(self, action: Tensor) -> Tensor:
        """The force on each rotor, N.

        Lateral ones are a fraction of the thrust F_z = 20 a_z.
        """
        lateral, vertical = action.unflatten(-1, (2, 3)).split([2, 1], -1)
        thrust = self.max_thrust * vertical
        if self.variant == "oige":
            tilt = 0.2 * lateral
        else:
            tilt = lateral.clamp(-0.2, 0.2)
        return torch.cat([thrust * tilt, thrust], -1).flatten(1)

    def initial(self, uniform: Uniform) -> State:
        place = uniform(-1, 1, 2) * self.start_width
        height = uniform(*self.start_height, 1)
        target_place = uniform(-1, 1, 2) * self.target_width
        target_height = uniform(1, 2, 1)
        n, zeros = len(place), place.new_zeros
        qpos = torch.cat([place, height, self.identity.expand(n, 4)], -1)
        target = torch.cat([target_place, target_height], -1)
        return State(qpos, zeros(n, 6), zeros(n, 0), target)

    def before_step(self, state: State, progress: Tensor, fresh: State) -> Tensor:
        due = (progress > 0) & (progress % self.new_target_every == 0)
        return torch.where(due[:, None], fresh.memory, state.memory)

    def limit(self, state: State) -> State:
        """Isaac limits the angular velocity to 4 pi rad/s."""
        linear, angular = state.qvel.split([3, 3], -1)
        qvel = torch.cat([linear, shorten(angular, self.max_spin)], -1)
        return State(state.qpos, qvel, state.sensors, state.memory)

    def observe(self, state: State, action: Tensor) -> Tensor:
        position, quat = state.qpos.split([3, 4], -1)
        if self.variant == "ige":
            quat = quat.roll(-1, -1)
        linear, angular = state.qvel[:, :3], self.angular_velocity(state)
        parts = [(state.memory - position) / 3, quat, linear / 2, angular / math.pi]
        return torch.cat(parts, -1)

    def distance(self, state: State) -> Tensor:
        """(N,) m between helicopter and target."""
        return (state.memory - state.qpos[:, :3]).norm(dim=-1)

    def angular_velocity(self, state: State) -> Tensor:
        """In world axes: (N, 3)."""
        rotation = rotation_matrix(state.qpos[:, 3:7])
        return (rotation @ state.qvel[:, 3:, None])[..., 0]

    def reward_terms(
        self, before: State, state: State, action: Tensor
    ) -> dict[str, Tensor]:
        tilt = 1 - rotation_matrix(state.qpos[:, 3:7])[:, 2, 2]
        spin = self.angular_velocity(state)[:, 2]
        near = 1 / (1 + self.position_weight * self.distance(state) ** 2)
        return {
            "position": near,
            "upright": near * self.upright / (1 + self.upright_weight * tilt**2),
            "spin": near / (1 + self.spin_weight * spin**2),
        }

    def failed(self, state: State) -> Tensor:
        return (self.distance(state) > self.lost_distance) | (state.qpos[:, 2] < 0.5)

    def measures(self, state: State) -> dict[str, Tensor]:
        return {"distance to the target, m": self.distance(state)}

    def show(self, data: mujoco.MjData, memory: Tensor):
        data.mocap_pos[0] = memory.cpu() + torch.tensor([0, 0, 0.4])
