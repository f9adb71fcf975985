"""Ingenuity: a helicopter with two rotors flies to targets on Mars. Built from code alone."""

import math

import mujoco
import torch
from torch import Tensor

from isaac_tasks.floor import stand_on_floor
from isaac_tasks.task import State, Task, Uniform, rotation_matrix, shorten

ROTORS = {"lower_rotor": 0.0, "upper_rotor": 0.025}  # m above the chassis' centre


class Ingenuity(Task):
    """Observation (13): vector to the target / 3, quaternion (oige w,x,y,z; ige x,y,z,w),
    velocity / 2, angular velocity / pi, all in world axes. Action (6): x, y, z of the lower and of
    the upper rotor. Memory: the target (3).
    """

    obs_dim, act_dim, memory_dim = 13, 6, 3
    episode_length, clip_obs = 2000, 5.0
    max_thrust, max_spin = 20.0, 4 * math.pi  # N, rad/s
    new_target_every = 500

    def __init__(self, variant: str = "oige", **kwargs):
        super().__init__(variant, **kwargs)
        oige = variant == "oige"
        self.identity = self.tensor([1.0, 0.0, 0.0, 0.0])
        self.time_step, self.substeps = (0.01, 1) if oige else (0.005, 2)
        self.target_width = 1.0 if oige else 5.0
        self.start_width, self.start_height = (
            (0.5, (0.5, 1.5)) if oige else (1.5, (0.8, 2.5))
        )
        self.position_weight = 2.5 if oige else 1.0
        self.upright, self.upright_weight = (1.0, 30.0) if oige else (5.0, 1.0)
        self.spin_weight = 10.0 if oige else 1.0
        self.lost_distance = 20.0 if oige else 8.0

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        self.set_options(spec)
        spec.option.gravity = (0, 0, -3.721)
        world = spec.worldbody
        plane, box = mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX
        floor = dict(size=(0, 0, 1), rgba=(0.6, 0.35, 0.2, 1), contype=0, conaffinity=1)
        world.add_geom(name="floor", type=plane, **floor)
        world.add_light(pos=(0, 0, 10), type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
        world.add_site(name="world")
        marker = world.add_body(name="target", mocap=True)
        sphere = dict(
            type=mujoco.mjtGeom.mjGEOM_SPHERE, size=(0.1, 0, 0), rgba=(0.1, 0.8, 0.1, 1)
        )
        marker.add_geom(mass=0, contype=0, conaffinity=0, **sphere)
        chassis = world.add_body(name="chassis", pos=(0, 0, 1))
        chassis.add_freejoint(name="root")
        solid = dict(contype=1, conaffinity=0)  # with the floor only
        chassis.add_geom(type=box, size=(0.06, 0.06, 0.06), density=50, **solid)
        look = dict(mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM, pos=(0, -3, 1))
        chassis.add_camera(name="track", xyaxes=(1, 0, 0, 0, 0.3, 1), **look)
        for name, z in ROTORS.items():
            rotor = chassis.add_body(name=name, pos=(0, 0, z))
            disc = dict(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=(0.15, 0.005, 0))
            rotor.add_geom(density=1000, rgba=(0.3, 0.3, 0.3, 1), **disc, **solid)
            rotor.add_site(name=name)
            for axis, direction in zip(
                "xyz", ((1, 0, 0), (0, 1, 0), (0, 0, 1)), strict=True
            ):
                thrust = spec.add_actuator(name=f"{name}_{axis}", target=name)
                thrust.trntype = mujoco.mjtTrn.mjTRN_SITE
                thrust.gear = (*direction, 0, 0, 0)
                if (
                    self.variant == "oige"
                ):  # along the world's axes, else along the rotor's
                    thrust.refsite = "world"
        stand_on_floor(spec, friction=1.0)
        return spec

    def control(self, action: Tensor) -> Tensor:
        """The force on each rotor, N: lateral ones are a fraction of the thrust F_z = 20 a_z."""
        lateral, vertical = action.unflatten(-1, (2, 3)).split([2, 1], -1)
        thrust = self.max_thrust * vertical
        tilt = 0.2 * lateral if self.variant == "oige" else lateral.clamp(-0.2, 0.2)
        return torch.cat([thrust * tilt, thrust], -1).flatten(1)

    def initial(self, uniform: Uniform) -> State:
        position = torch.cat(
            [uniform(-1, 1, 2) * self.start_width, uniform(*self.start_height, 1)], -1
        )
        target = torch.cat(
            [uniform(-1, 1, 2) * self.target_width, uniform(1, 2, 1)], -1
        )
        n = len(position)
        upright = self.identity.expand(n, 4)
        zeros = position.new_zeros
        return State(
            torch.cat([position, upright], -1), zeros(n, 6), zeros(n, 0), target
        )

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
        quat = quat if self.variant == "oige" else quat.roll(-1, -1)
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
