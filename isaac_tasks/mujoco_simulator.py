"""The embedded simulator: a task on MuJoCo.

An episode is reset inside the step that ends it.
"""

import mujoco
import numpy as np
import torch
from torch import Tensor

from isaac_tasks.interface import SimulatorError
from isaac_tasks.physics import CpuPhysics, WarpPhysics
from isaac_tasks.task import State, Task


class MujocoSimulator:
    """N environments of a task; `isaac_tasks.Simulator` says what its methods return.

    threads: of the CPU. On a CUDA device physics, observations, rewards and resets stay
    there.
    """

    valid = None
    diverged = 0
    one_per_process = False
    fastest = 1e3  # m/s, rad/s: beyond it the physics is taken to have broken down

    def __init__(
        self,
        task: type[Task],
        num_envs: int,
        seed: int,
        device="cpu",
        threads=1,
        variant="oige",
    ):
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        self.exact_resume = not cuda  # Warp's contacts come in another order each time
        dtype = WarpPhysics.dtype if cuda else CpuPhysics.dtype
        self.task = task(variant, device=self.device, dtype=dtype)
        model = self.task.spec().compile()
        if cuda:
            sizes = self.task.contacts, self.task.constraints
            self.physics = WarpPhysics(model, num_envs, str(self.device), *sizes)
        else:
            self.physics = CpuPhysics(model, num_envs, threads)
        self.num_envs, self.model = num_envs, model
        self.obs_dim, self.act_dim = self.task.obs_dim, self.task.act_dim
        self.max_steps = self.task.episode_length - 1
        self.fps = round(1 / (self.task.substeps * self.task.time_step))
        self.generator = torch.Generator(self.device).manual_seed(seed)
        kind = dict(dtype=dtype, device=self.device)
        self.progress = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.memory = torch.zeros(num_envs, self.task.memory_dim, **kind)
        self.action = torch.zeros(num_envs, self.act_dim, **kind)
        self.recorded = cuda  # whether steps are replayed from a CUDA graph
        self.graph = None
        self.renderer = None

    def reset(self, seed: int | None = None) -> Tensor:
        if seed is not None:
            self.generator.manual_seed(seed)
        everywhere = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        fresh = self.task.initial(self._uniform)
        self._start(everywhere, self._state(), fresh)
        return self._observe(fresh, torch.zeros_like(self.action))

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        self.action.copy_(action.clamp(-1, 1))
        *result, valid = self._replay() if self.recorded else self._advance()
        self.diverged = self.num_envs - int(valid.sum())
        self.valid = valid if self.diverged else None
        return tuple(result)

    def _advance(self) -> tuple[Tensor, ...]:
        """What `step` returns, and valid (N,)."""
        before, fresh = self._before()
        self.physics.step(self.task.substeps)
        return self._after(before, fresh)

    def _before(self) -> tuple[State, State]:
        """Writes controls and memory; returns the state and fresh first states."""
        fresh = self.task.initial(self._uniform)
        self.memory.copy_(self.task.before_step(self._state(), self.progress, fresh))
        control, memory = self.task.act(self._state(), self.action)
        self.physics.ctrl.copy_(control)
        self.memory.copy_(memory)
        return self._state().clone(), fresh

    def _after(self, before: State, fresh: State) -> tuple[Tensor, ...]:
        """Observations, rewards and ends; starts new episodes."""
        self.progress += 1
        sound = self._sound(self._state())
        state = self.task.limit(self._state())  # `_start` writes it
        reward = self.task.reward(before, state, self.action).float()
        rows = zip(vars(state).values(), vars(fresh).values(), strict=True)
        both = State(*map(torch.cat, rows))  # one call for both is faster
        actions = torch.cat([self.action, torch.zeros_like(self.action)])
        final_obs, first_obs = self._observe(both, actions).chunk(2)
        valid = sound & reward.isfinite() & final_obs.isfinite().all(-1)
        terminated = self.task.failed(state) & valid
        truncated = (self.progress >= self.max_steps) & ~terminated & valid
        done = terminated | truncated
        self._start(done | ~valid, state, fresh)
        obs = torch.where((done | ~valid)[:, None], first_obs, final_obs)
        final_obs = torch.where(valid[:, None], final_obs, first_obs)
        reward = reward.where(valid, 0.0)
        return obs, reward, terminated, truncated, final_obs, valid

    def _sound(self, state: State) -> Tensor:
        """(N,) bool: where the physics gave numbers, and no absurd ones."""
        speed = state.qvel.abs().amax(-1)
        return state.qpos.isfinite().all(-1) & (speed < self.fastest)

    def _start(self, mask: Tensor, state: State, fresh: State):
        """Starts new episodes where mask (N,) is set."""
        choose = mask[:, None]
        pairs = zip(vars(fresh).values(), vars(state).values(), strict=True)
        self._write(State(*(torch.where(choose, new, old) for new, old in pairs)))
        self.physics.qacc_warmstart.masked_fill_(choose, 0)
        self.progress.masked_fill_(mask, 0)

    def _state(self) -> State:
        physics = self.physics
        return State(physics.qpos, physics.qvel, physics.sensordata, self.memory)

    def _write(self, state: State):
        self.physics.qpos.copy_(state.qpos)
        self.physics.qvel.copy_(state.qvel)
        self.memory.copy_(state.memory)

    def _observe(self, state: State, action: Tensor) -> Tensor:
        limit = self.task.clip_obs
        return self.task.observe(state, action).clamp(-limit, limit).float()

    def _uniform(self, low: float, high: float, n: int) -> Tensor:
        numbers = self.action.new_empty(self.num_envs, n)
        return numbers.uniform_(low, high, generator=self.generator)

    def _replay(self) -> tuple[Tensor, ...]:
        """`_advance` as a CUDA graph."""
        if self.graph is None:
            try:
                self._record()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                text = f"can't record a step on {self.device} as a CUDA graph: {reason}"
                raise SimulatorError(text) from None
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)

    def _record(self):
        """Records `_advance` as a CUDA graph; leaves the state as it was."""
        saved, stream = self.state_dict(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # let the libraries compile and allocate before
                self._advance()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as Warp's
            self.outputs = self._advance()
        self.graph = graph
        self.load_state_dict(saved)

    def measures(self) -> dict[str, Tensor]:
        """What the task is about, now: see `Task.measures`."""
        return self.task.measures(self._state().clone())

    def render(self) -> np.ndarray:
        """An image (480, 640, 3) of environment 0, uint8. Raises: SimulatorError."""
        try:
            self.renderer = self.renderer or mujoco.Renderer(self.model, 480, 640)
            data = self.physics.data(0)
            self.task.show(data, self.memory[0])
            mujoco.mj_forward(self.model, data)
            self.renderer.update_scene(data, camera="track")
            return self.renderer.render()
        except Exception as error:  # whatever the graphics libraries raise
            raise SimulatorError(
                f"can't render: {type(error).__name__}: {error}"
            ) from None

    def state_dict(self) -> dict:
        """Everything that the coming steps depend on, but for the action."""
        return {
            "physics": self.physics.state_dict(),
            "progress": self.progress.clone(),
            "memory": self.memory.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict):
        self.physics.load_state_dict(state["physics"])
        self.progress.copy_(state["progress"])
        self.memory.copy_(state["memory"])
        self.generator.set_state(state["generator"])
