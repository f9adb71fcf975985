"""N worlds of one MuJoCo model, stepped together: on CPU threads or on an NVIDIA GPU.

Both classes show their worlds as torch tensors that share the simulator's memory: a write to
`qpos` is the worlds' position in the next step. CPU: float64; GPU: float32.
"""

import copy
import warnings

import mujoco
import numpy as np
import psutil
import torch
from mujoco.batch import Batch, SimulationError
from torch import Tensor

from isaac_tasks.interface import SimulatorError

STATE = ("qpos", "qvel", "qacc_warmstart", "ctrl")


class JointLimits:
    """Stops joints at their limits although steps are long: looks one step ahead, as PhysX does.

    MuJoCo's limits act on a joint once it is beyond them: at 50 rad/s and 120 Hz by 24 degrees.
    `update` lets them act on joints that the coming step might bring there. It writes, for each
    environment, from where a limit acts (`jnt_margin`), its stiffness (`jnt_solref`) and the share
    of other accelerations that it takes away (`jnt_solimp`); see "Solver parameters" in MuJoCo's
    documentation. Only for the integrator mjINT_DISCRETE, where a step ends as its limits say.
    """

    zone = 0.1
    """share of a joint's range: what motors and collisions may at most move it within a step"""
    hardness = 0.98
    """largest share of other accelerations that a limit takes away from a joint not yet there"""
    push_back = 0.2
    """share of its way back that a joint beyond its limit goes in a step"""
    tolerance = (0.04, 0.002)
    """rad, m: nothing moves a joint further beyond its limit"""

    def __init__(self, model: mujoco.MjModel, margin: Tensor, solref: Tensor, solimp: Tensor):
        """(N, joints), (N, joints, 2), (N, joints, 5): the parameters of the same names."""
        slide = model.jnt_type == mujoco.mjtJoint.mjJNT_SLIDE
        hinge = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
        implicit = model.opt.integrator == mujoco.mjtIntegrator.mjINT_DISCRETE
        joints = np.flatnonzero(model.jnt_limited * implicit & (slide | hinge))
        indices = joints, model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self.joints, self.q, self.v = (places(i, margin.device) for i in indices)
        self.margin, self.solref, self.solimp = margin, solref, solimp
        self.step = model.opt.timestep
        lower, upper = torch.from_numpy(model.jnt_range[joints]).to(margin).unbind(-1)
        self.middle, self.range = (lower + upper) / 2, upper - lower
        tolerance = np.where(slide[joints], self.tolerance[1], self.tolerance[0])
        beyond = torch.from_numpy(tolerance).to(margin)
        self.lowest, self.highest = lower - beyond, upper + beyond
        solref[:, self.joints] = 0

    def update(self, qpos: Tensor, qvel: Tensor):
        """Before each step, from the positions (N, nq) and velocities (N, nv)."""
        if not len(self.range):
            return
        offset = qpos[:, self.q] - self.middle
        distance = self.range / 2 - offset.abs()  # to the nearer limit
        way = self.step * offset.sign() * qvel[:, self.v]  # towards it, if nothing accelerates
        target = distance.where(distance > 0, self.push_back * distance)  # the way to go
        room, zone = target - way, self.zone * self.range
        hardness = (1 - room / zone).clamp(1e-4, self.hardness)
        # A spring of stiffness k / step^2 that is shortened by `length` turns `way` into
        # (way - k length) / (1 + k): into `target`, and fast ones near the limit into less.
        fast = (4 * way / zone).abs().clamp(max=1)
        stiffness = (-room).clamp(min=0) / target.clamp(min=1e-3 * zone) + hardness * fast
        length = -target.clamp(max=-1e-6 * zone)
        self.margin[:, self.joints] = (distance + length).where(room < zone, 0.0)
        self.solref[:, self.joints, 0] = -stiffness * hardness / self.step**2
        self.solimp[:, self.joints, 0] = hardness
        self.solimp[:, self.joints, 1] = hardness

    def clamp(self, qpos: Tensor):
        """After each step: puts the rare joint beyond the tolerance there."""
        qpos[:, self.q] = qpos[:, self.q].clamp(self.lowest, self.highest)


def places(indices: np.ndarray, device: torch.device) -> slice | Tensor:
    """What selects columns: a slice, which is faster, where they follow one another."""
    if len(indices) and np.all(np.diff(indices) == 1):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return torch.tensor(indices, device=device).long()


def check_memory(model: mujoco.MjModel, num_envs: int):
    """Raises SimulatorError if so many environments don't fit into the memory that is free."""
    state = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)
    numbers = 4 * state + 2 * model.nsensordata + 8 * model.njnt  # state: copies of a step, too
    need, free = 8 * num_envs * numbers / 2**30, psutil.virtual_memory().available / 2**30
    if need > free:
        text = f"{num_envs} environments need {need:.1f} GiB of memory, and {free:.1f} are free"
        raise SimulatorError(text)


class CpuPhysics:
    """mujoco.batch: a C++ thread pool; the results don't depend on the number of threads."""

    dtype = torch.float64

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int):
        self.model = model
        check_memory(model, num_envs)
        try:
            self.batch = Batch(model, num_envs, threads)
            limits = [self.batch.expand(f"jnt_{name}") for name in ("margin", "solref", "solimp")]
        except (MemoryError, TypeError, ValueError):  # for one, threads beyond what the system has
            text = f"{num_envs} environments on {threads} thread(s) don't fit into memory"
            raise SimulatorError(text) from None
        with warnings.catch_warnings():  # sensordata is read-only, and only read
            warnings.filterwarnings("ignore", message=".*not writable.*")
            for name in (*STATE, "sensordata"):
                setattr(self, name, torch.from_numpy(self.batch.bind(name)))
        self.limits = JointLimits(model, *map(torch.from_numpy, limits))

    def step(self, substeps: int):
        try:
            for _ in range(substeps):
                self.limits.update(self.qpos, self.qvel)
                self.batch.step()
                self.limits.clamp(self.qpos)
        except SimulationError as error:
            raise SimulatorError(str(error)) from None

    def data(self, world: int) -> mujoco.MjData:
        """The state of one world, e.g. to render it."""
        return self.batch.get_data(world)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict):
        for name in STATE:
            getattr(self, name).copy_(state[name])


class WarpPhysics:
    """mujoco-warp: all worlds on one GPU; a step is a CUDA graph."""

    dtype = torch.float32

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        device: str,
        contacts: int,
        constraints: int,
    ):
        try:
            import mujoco_warp
            import warp
        except ModuleNotFoundError as error:
            hint = f"pip install mujoco-warp=={mujoco.__version__}"
            raise SimulatorError(f"simulating on a GPU needs {error.name}: {hint}") from None
        self.model, self.device, self.graph = model, device, None
        self.warp, self.mujoco_warp = warp, mujoco_warp
        warp.config.quiet = True
        with warp.ScopedDevice(device):
            accepted = copy.copy(model)  # it never resets by itself and refuses the flag
            accepted.opt.disableflags &= ~mujoco.mjtDisableBit.mjDSBL_AUTORESET.value
            self.warp_model = mujoco_warp.put_model(accepted)
            sizes = dict(nconmax=contacts, njmax=constraints)
            try:
                self.warp_data = mujoco_warp.make_data(model, nworld=num_envs, **sizes)
            except RuntimeError as error:  # such as too little memory
                reason = str(error).partition("\n")[0]
                text = f"can't make {num_envs} environments on {device}: {reason}"
                raise SimulatorError(text) from None
        for name in (*STATE, "sensordata"):
            setattr(self, name, warp.to_torch(getattr(self.warp_data, name)))
        self.limits = JointLimits(model, *self._limits(num_envs))

    def _limits(self, num_envs: int) -> list[Tensor]:
        """The model's parameters of the limits, one row for each environment."""
        limits, vec5 = [], self.warp.types.vector(length=5, dtype=float)
        for name, dtype in (("margin", None), ("solref", self.warp.vec2), ("solimp", vec5)):
            shared = torch.from_numpy(getattr(self.model, f"jnt_{name}")).to(self.qpos)
            limits.append(shared.expand(num_envs, *shared.shape).contiguous())
            setattr(self.warp_model, f"jnt_{name}", self.warp.from_torch(limits[-1], dtype=dtype))
        return limits

    def step(self, substeps: int):
        for _ in range(substeps):
            self.limits.update(self.qpos, self.qvel)
            self._step()
            self.limits.clamp(self.qpos)

    def _step(self):
        if self.qpos.device.type == "cpu":
            self._launch()
            return
        if self.graph is None:
            self.graph = self._capture()
        stream = self.warp.stream_from_torch(torch.cuda.current_stream(self.qpos.device))
        self.warp.capture_launch(self.graph, stream=stream)

    def _launch(self):
        with self.warp.ScopedDevice(self.device):
            self.mujoco_warp.step(self.warp_model, self.warp_data)

    def _capture(self):
        """A graph of one step; compiling it leaves the state as it was."""
        saved = self.state_dict()
        torch.cuda.synchronize(self.qpos.device)
        self._launch()
        try:
            with self.warp.ScopedDevice(self.device), self.warp.ScopedCapture() as capture:
                self._launch()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            text = f"can't record a step on {self.device} as a CUDA graph: {reason}"
            raise SimulatorError(text) from None
        self.warp.synchronize_device(self.device)
        self.load_state_dict(saved)
        torch.cuda.synchronize(self.qpos.device)
        return capture.graph

    def data(self, world: int) -> mujoco.MjData:
        data = mujoco.MjData(self.model)
        data.qpos[:], data.qvel[:] = self.qpos[world].cpu(), self.qvel[world].cpu()
        return data

    state_dict, load_state_dict = CpuPhysics.state_dict, CpuPhysics.load_state_dict
