"""N worlds of one MuJoCo model, stepped together: on CPU threads or on an NVIDIA GPU.

Both classes show their worlds as torch tensors that share the simulator's memory: a write to
`qpos` is the worlds' position in the next step. CPU: float64; GPU: float32.
"""

import copy
import warnings
from collections.abc import Callable

import mujoco
import numpy as np
import psutil
import torch
from mujoco.batch import Batch, SimulationError
from torch import Tensor

from isaac_tasks.interface import SimulatorError
from isaac_tasks.limits import FIELDS, Limits

POSES = ("geom_xpos", "cvel", "subtree_com")
STATE = ("qpos", "qvel", "qacc_warmstart", "ctrl")


def check_memory(model: mujoco.MjModel, num_envs: int):
    """Raises SimulatorError if so many environments don't fit into the memory that is free."""
    state = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)
    numbers = 5 * state + 2 * model.nsensordata + 8 * (model.njnt + model.npair)  # with copies
    numbers += 3 * model.ngeom + 9 * model.nbody
    need, free = 8 * num_envs * numbers / 2**30, psutil.virtual_memory().available / 2**30
    if need > free:
        text = f"{num_envs} environments need {need:.1f} GiB of memory, and {free:.1f} are free"
        raise SimulatorError(text)


def without_forces(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy that only moves: cheap to ask where bodies are."""
    copied = copy.copy(model)
    for name in ("CONSTRAINT", "CONTACT", "SENSOR", "SPRING", "DAMPER", "GRAVITY", "ACTUATION"):
        copied.opt.disableflags |= getattr(mujoco.mjtDisableBit, f"mjDSBL_{name}").value
    return copied


class CpuPhysics:
    """mujoco.batch: a C++ thread pool; the results don't depend on the number of threads."""

    dtype = torch.float64

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int):
        self.model = model
        check_memory(model, num_envs)
        try:
            self.batch = Batch(model, num_envs, threads)
            joints = [self.batch.expand(f"jnt_{name}") for name in FIELDS]
            pairs = [self.batch.expand(f"pair_{name}") for name in FIELDS]
            self.poses = Batch(without_forces(model), num_envs, threads)
            self.seen = [self.poses.bind(name) for name in POSES]  # filled by the coming calls
        except (MemoryError, TypeError, ValueError):  # for one, threads beyond what the system has
            text = f"{num_envs} environments on {threads} thread(s) don't fit into memory"
            raise SimulatorError(text) from None
        with warnings.catch_warnings():  # sensordata is read-only, and only read
            warnings.filterwarnings("ignore", message=".*not writable.*")
            for name in (*STATE, "sensordata"):
                setattr(self, name, torch.from_numpy(self.batch.bind(name)))
        self.states = [(self.batch.bind(x), self.poses.bind(x)) for x in ("qpos", "qvel")]
        self.limits = Limits(model, joints, pairs)

    def step(self, substeps: int):
        limits, floor = self.limits, self.limits.floor
        qpos, qvel = (state for state, _ in self.states)
        try:
            if floor:
                self._look()
            for _ in range(substeps):
                limits.update(qpos, qvel)
                self.batch.step()
                limits.joints.clamp(qpos)
                if floor:
                    self._look()
                    floor.lift(qpos)
        except SimulationError as error:
            raise SimulatorError(str(error)) from None

    def _look(self):
        """Computes the poses of robots near the floor that have moved since the last look."""
        floor, changed = self.limits.floor, False
        for state, seen in self.states:
            changed |= (state != seen).any(-1)
            seen[:] = state
        if changed.any():
            high = floor.high(*(state for state, _ in self.states))
            self.poses.forward(np.flatnonzero(changed & ~high), mujoco.mjtStage.mjSTAGE_VEL.value)
            floor.look(*self.seen)
            floor.height[high] = floor.far
            floor.near = not high.all()

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
        self.model, self.device, self.graphs = model, device, {}
        self.warp, self.mujoco_warp = warp, mujoco_warp
        warp.config.quiet = True
        with warp.ScopedDevice(device):
            accepted, flags = copy.copy(model), mujoco.mjtDisableBit
            for never in (flags.mjDSBL_AUTORESET, flags.mjDSBL_MIDPHASE):  # refused, not needed
                accepted.opt.disableflags &= ~never.value
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
        self.seen = [warp.to_torch(getattr(self.warp_data, name)) for name in POSES]
        self.limits = Limits(model, *(self._limits(kind, num_envs) for kind in ("jnt", "pair")))

    def _limits(self, kind: str, num_envs: int) -> list[Tensor]:
        """The model's parameters of the limits, one row for each environment."""
        limits, vec5 = [], self.warp.types.vector(length=5, dtype=float)
        for name, dtype in zip(FIELDS, (None, self.warp.vec2, vec5), strict=True):
            shared = torch.from_numpy(getattr(self.model, f"{kind}_{name}")).to(self.qpos)
            limits.append(shared.expand(num_envs, *shared.shape).contiguous())
            if len(shared):
                own = self.warp.from_torch(limits[-1], dtype=dtype)
                setattr(self.warp_model, f"{kind}_{name}", own)
        return limits

    def step(self, substeps: int):
        limits, floor = self.limits, self.limits.floor
        if floor:
            self._run(self._poses)
            floor.look(*self.seen)
        for _ in range(substeps):
            limits.update(self.qpos, self.qvel)
            self._run(self._step)
            limits.joints.clamp(self.qpos)
            if floor:
                self._run(self._poses)
                floor.look(*self.seen)
                floor.lift(self.qpos)

    def _step(self):
        self.mujoco_warp.step(self.warp_model, self.warp_data)

    def _poses(self):
        for part in ("kinematics", "com_pos", "com_vel"):
            getattr(self.mujoco_warp, part)(self.warp_model, self.warp_data)

    def _run(self, function: Callable[[], None]):
        if self.qpos.device.type == "cpu":
            self._launch(function)
            return
        if function not in self.graphs:
            self.graphs[function] = self._capture(function)
        stream = self.warp.stream_from_torch(torch.cuda.current_stream(self.qpos.device))
        self.warp.capture_launch(self.graphs[function], stream=stream)

    def _launch(self, function: Callable[[], None]):
        with self.warp.ScopedDevice(self.device):
            function()

    def _capture(self, function: Callable[[], None]):
        """A graph of one call; compiling it leaves the state as it was."""
        saved = self.state_dict()
        torch.cuda.synchronize(self.qpos.device)
        self._launch(function)
        try:
            with self.warp.ScopedDevice(self.device), self.warp.ScopedCapture() as capture:
                function()
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
