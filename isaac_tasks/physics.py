"""N worlds of one MuJoCo model, stepped together: on CPU threads or on an NVIDIA GPU.

Both classes show their worlds as torch tensors that share the simulator's memory: a write to
`qpos` is the worlds' position in the next step. CPU: float64; GPU: float32.
"""

import copy
import warnings

import mujoco
import torch
from mujoco.batch import Batch, SimulationError

from isaac_tasks.simulator import SimulatorError

STATE = ("qpos", "qvel", "qacc_warmstart", "ctrl")


class CpuPhysics:
    """mujoco.batch: a C++ thread pool; the results don't depend on the number of threads."""

    dtype = torch.float64

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int):
        self.model = model
        try:
            self.batch = Batch(model, num_envs, threads)
        except (MemoryError, TypeError, ValueError):  # too large for the memory or for an integer
            text = f"{num_envs} environments on {threads} thread(s) don't fit into memory"
            raise SimulatorError(text) from None
        with warnings.catch_warnings():  # sensordata is read-only, and only read
            warnings.filterwarnings("ignore", message=".*not writable.*")
            for name in (*STATE, "sensordata"):
                setattr(self, name, torch.from_numpy(self.batch.bind(name)))

    def step(self, substeps: int):
        try:
            self.batch.step(nstep=substeps)
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
    """mujoco-warp: all worlds on one GPU; the steps of one control step are one CUDA graph."""

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

    def step(self, substeps: int):
        if self.qpos.device.type == "cpu":
            self._launch(substeps)
            return
        if self.graph is None:
            self.graph = self._capture(substeps)
        stream = self.warp.stream_from_torch(torch.cuda.current_stream(self.qpos.device))
        self.warp.capture_launch(self.graph, stream=stream)

    def _launch(self, substeps: int):
        with self.warp.ScopedDevice(self.device):
            for _ in range(substeps):
                self.mujoco_warp.step(self.warp_model, self.warp_data)

    def _capture(self, substeps: int):
        """A graph of the steps; compiling them for it leaves the state as it was."""
        saved = self.state_dict()
        torch.cuda.synchronize(self.qpos.device)
        self._launch(1)
        with self.warp.ScopedDevice(self.device), self.warp.ScopedCapture() as capture:
            self._launch(substeps)
        self.warp.synchronize_device(self.device)
        self.load_state_dict(saved)
        torch.cuda.synchronize(self.qpos.device)
        return capture.graph

    def data(self, world: int) -> mujoco.MjData:
        data = mujoco.MjData(self.model)
        data.qpos[:], data.qvel[:] = self.qpos[world].cpu(), self.qvel[world].cpu()
        return data

    state_dict, load_state_dict = CpuPhysics.state_dict, CpuPhysics.load_state_dict
