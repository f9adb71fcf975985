"""N worlds of one MuJoCo model, stepped together: on CPU threads or on an NVIDIA GPU.

Both classes show their worlds as torch tensors that share the simulator's memory: a
write to `qpos` is the worlds' position in the next step. CPU: float64; GPU: float32.
"""

import copy
import warnings
from abc import ABC, abstractmethod
from contextlib import ExitStack

import mujoco
import numpy as np
import psutil
import torch
from mujoco.batch import Batch, SimulationError
from torch import Tensor

from isaac_tasks.interface import SimulatorError
from isaac_tasks.limits import FIELDS, Array, Limits

POSES = ("geom_xpos", "cvel", "subtree_com")
STATE = ("qpos", "qvel", "qacc_warmstart", "ctrl")


def check_memory(model: mujoco.MjModel, num_envs: int):
    """Raises SimulatorError if so many environments don't fit into free memory."""
    state = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)
    # Copies included.
    numbers = 5 * state + 2 * model.nsensordata + 8 * (model.njnt + model.npair)
    numbers += 3 * model.ngeom + 9 * model.nbody
    need = 8 * num_envs * numbers / 2**30
    free = psutil.virtual_memory().available / 2**30
    if need > free:
        raise SimulatorError(
            f"{num_envs} environments need {need:.1f} GiB of memory, "
            f"and {free:.1f} are free"
        )


def without_forces(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy that only moves: cheap to ask where bodies are."""
    copied = copy.copy(model)
    bits = mujoco.mjtDisableBit
    for bit in (
        bits.mjDSBL_CONSTRAINT,
        bits.mjDSBL_CONTACT,
        bits.mjDSBL_SENSOR,
        bits.mjDSBL_SPRING,
        bits.mjDSBL_DAMPER,
        bits.mjDSBL_GRAVITY,
        bits.mjDSBL_ACTUATION,
    ):
        copied.opt.disableflags |= bit.value
    return copied


class Physics(ABC):
    """What both have in common; qpos (N, nq) and the like are tensors."""

    limits: Limits
    state: tuple[Array, Array]
    """positions (N, nq) and velocities (N, nv), which share the simulator's memory"""

    @abstractmethod
    def _step(self):
        """One step of all worlds."""

    @abstractmethod
    def _look(self):
        """Tells the floor where bodies are."""

    def step(self, substeps: int):
        qpos, qvel = self.state
        limits, floor = self.limits, self.limits.floor
        if floor:
            self._look()
        for _ in range(substeps):
            limits.update(qpos, qvel)
            self._step()
            limits.joints.clamp(qpos)
            if floor:
                self._look()
                floor.lift(qpos)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict):
        for name in STATE:
            getattr(self, name).copy_(state[name])


class CpuPhysics(Physics):
    """mujoco.batch: a C++ thread pool; results don't depend on its size."""

    dtype = torch.float64

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int):
        self.model = model
        check_memory(model, num_envs)
        try:
            self.batch = Batch(model, num_envs, threads)
            joints = [self.batch.expand(f"jnt_{name}") for name in FIELDS]
            pairs = [self.batch.expand(f"pair_{name}") for name in FIELDS]
            self.looker = Batch(without_forces(model), num_envs, threads)
            # filled by the coming calls
            self.poses = [self.looker.bind(name) for name in POSES]
        except (MemoryError, TypeError, ValueError):  # such as of too many threads
            raise SimulatorError(
                f"{num_envs} environments on {threads} thread(s) don't fit into memory"
            ) from None
        with warnings.catch_warnings():  # sensordata is read-only, and only read
            warnings.filterwarnings("ignore", message=".*not writable.*")
            for name in (*STATE, "sensordata"):
                setattr(self, name, torch.from_numpy(self.batch.bind(name)))
        self.state = self.batch.bind("qpos"), self.batch.bind("qvel")
        self.seen = self.looker.bind("qpos"), self.looker.bind("qvel")
        self.limits = Limits(model, joints, pairs)

    def _step(self):
        try:
            self.batch.step()
        except SimulationError as error:
            raise SimulatorError(str(error)) from None

    def _look(self):
        """Only at robots that have moved since the last look and are near the floor."""
        floor, changed = self.limits.floor, False
        for now, seen in zip(self.state, self.seen, strict=True):
            changed |= (now != seen).any(-1)
            seen[:] = now
        if changed.any():
            high = floor.high(*self.state)
            near = np.flatnonzero(changed & ~high)
            self.looker.forward(near, mujoco.mjtStage.mjSTAGE_VEL.value)
            floor.look(*self.poses)
            floor.height[high] = floor.far
            floor.near = not high.all()

    def data(self, world: int) -> mujoco.MjData:
        """The state of one world, e.g. to render it."""
        return self.batch.get_data(world)


class WarpPhysics(Physics):
    """mujoco-warp: all worlds on one GPU; torch can record a step in a CUDA graph."""

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
            import warp

            # Else it prints each kernel that it loads.
            warp.config.log_level = warp.LOG_WARNING
            import mujoco_warp
        except ModuleNotFoundError as error:
            install = f"pip install mujoco-warp=={mujoco.__version__}"
            hint = f"{install}, or simulate on the CPU with --no-cuda"
            text = f"simulating on a GPU needs {error.name}: {hint}"
            raise SimulatorError(text) from None
        self.model, self.device = model, device
        self.warp, self.mujoco_warp = warp, mujoco_warp
        with warp.ScopedDevice(device):
            # It never resets by itself and refuses the flag.
            accepted = copy.copy(model)
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
        self.state = self.qpos, self.qvel
        self.poses = [warp.to_torch(getattr(self.warp_data, name)) for name in POSES]
        joints, pairs = self._limits("jnt", num_envs), self._limits("pair", num_envs)
        self.limits = Limits(model, joints, pairs)
        warp.synchronize_device(device)  # from here on torch's stream orders everything

    def _limits(self, kind: str, num_envs: int) -> list[Tensor]:
        """The model's parameters of the limits, one row for each environment."""
        vec5 = self.warp.types.vector(length=5, dtype=float)
        limits = []
        for name, dtype in zip(FIELDS, (None, self.warp.vec2, vec5), strict=True):
            shared = torch.from_numpy(getattr(self.model, f"{kind}_{name}"))
            shared = shared.to(self.qpos)
            limits.append(shared.expand(num_envs, *shared.shape).contiguous())
            if len(shared):
                own = self.warp.from_torch(limits[-1], dtype=dtype)
                setattr(self.warp_model, f"{kind}_{name}", own)
        return limits

    def _step(self):
        self._run("step")

    def _look(self):
        self._run("kinematics", "com_pos", "com_vel")
        self.limits.floor.look(*self.poses)

    def _run(self, *functions: str):
        """Calls these functions of mujoco_warp.

        On a GPU in torch's stream and CUDA graph.
        """
        warp = self.warp
        with ExitStack() as stack:
            stack.enter_context(warp.ScopedDevice(self.device))
            if self.qpos.is_cuda:
                current = torch.cuda.current_stream(self.qpos.device)
                stream = warp.stream_from_torch(current)
                stack.enter_context(warp.ScopedStream(stream, sync_enter=False))
                if torch.cuda.is_current_stream_capturing():
                    capture = warp.ScopedCapture(stream=stream, external=True)
                    stack.enter_context(capture)
            for name in functions:
                getattr(self.mujoco_warp, name)(self.warp_model, self.warp_data)

    def data(self, world: int) -> mujoco.MjData:
        data = mujoco.MjData(self.model)
        data.qpos[:], data.qvel[:] = self.qpos[world].cpu(), self.qvel[world].cpu()
        return data
