"""Updates as functions of flat tensors: parameters in one vector, Adam, torch.compile, CUDA graphs.

A network's parameters lie in one vector theta (P,), so that the whole update, optimiser and Polyak
averaging included, is one compiled function on CPU and one CUDA graph on a GPU.
"""

import ctypes
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


# --- Parameters and optimiser ---------------------------------------------------------------------
def split_parameters(network: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """Views of the vector theta (P,) with the names and shapes of the network's parameters."""
    parameters = dict(network.named_parameters())
    parts = theta.split([p.numel() for p in parameters.values()])
    named = zip(parts, parameters.items(), strict=True)
    return {name: part.view(p.shape) for part, (name, p) in named}


def flatten_parameters(network: nn.Module) -> Tensor:
    """Moves a network's parameters into one vector theta (P,): changing it changes the network."""
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])
    views = split_parameters(network, theta).values()
    for p, view in zip(network.parameters(), views, strict=True):
        p.data = view
    return theta


def functional(network: nn.Module, name: str):
    """f(theta (P,), *inputs) = `network.<name>(*inputs)` as a pure function of its parameters."""
    method = nn.Module()  # torch.func.functional_call can only call `forward`
    method.network, method.forward = network, getattr(network, name)

    def function(theta: Tensor, *inputs):
        return torch.func.functional_call(method, split_parameters(method, theta), inputs)

    return function


def clip_gradient(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales grad (P,) to at most max_norm; also returns the norm before, ()."""
    norm = torch.linalg.vector_norm(grad)
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


def adam_moments(theta: Tensor) -> list[Tensor]:
    """m (P,), v (P,) and (beta1^0, beta2^0) before the first step of Adam."""
    decay = torch.ones(2, dtype=torch.float64, device=theta.device)
    return [torch.zeros_like(theta), torch.zeros_like(theta), decay]


def adam(theta: Tensor, m: Tensor, v: Tensor, decay: Tensor, grad: Tensor, lr: float):
    """One step of Adam [Kingma and Ba, algorithm 1]; decay (2,) holds (beta1^t, beta2^t)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    decay = torch.stack([beta1 * decay[0], beta2 * decay[1]])
    m_hat, v_hat = m / (1 - decay[0]).to(m.dtype), v / (1 - decay[1]).to(v.dtype)
    return theta - lr * m_hat / (torch.sqrt(v_hat) + eps), m, v, decay


# --- Random inputs of an update -------------------------------------------------------------------
class Normal:
    """Standard normal numbers. On CPU NumPy's generator fills the tensor, on CUDA the graph."""

    def __init__(self, *shape: int, device="cpu"):
        self.tensor = torch.zeros(shape, device=device)

    def fill(self, rng: np.random.Generator):
        rng.standard_normal(out=self.tensor.numpy(), dtype=np.float32)

    def fill_on_device(self):
        self.tensor.normal_()


class Uniform(Normal):
    """Uniform numbers in [-1, 1]."""

    def fill(self, rng: np.random.Generator):
        rng.random(out=self.tensor.numpy(), dtype=np.float32)
        self.tensor.mul_(2).sub_(1)

    def fill_on_device(self):
        self.tensor.uniform_(-1, 1)


class Keep(Normal):
    """Which units dropout keeps, bool; their number must be a multiple of 4."""

    def __init__(self, *shape: int, dropout: float, device="cpu"):
        self.tensor, self.dropout = torch.ones(shape, dtype=torch.bool, device=device), dropout

    def fill(self, rng: np.random.Generator):
        """16 random bits a unit: many times faster than a float, exact to 1/65536."""
        bits = rng.integers(0, 2**64, self.tensor.numel() // 4, dtype=np.uint64).view(np.uint16)
        threshold = round(self.dropout * 2**16)
        np.greater_equal(bits.reshape(self.tensor.shape), threshold, out=self.tensor.numpy())

    def fill_on_device(self):
        self.tensor.bernoulli_(1 - self.dropout)


# --- Hardware -------------------------------------------------------------------------------------
class Hardware:
    """The device, and how functions run on it."""

    def __init__(self, cuda: bool, torch_threads: int, compile: bool):
        """Sets threads and floating-point modes of the whole process."""
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(True)  # zero-initialised networks are full of slow denormals
        torch.set_num_threads(torch_threads)
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if hasattr(libc, "mallopt"):  # keep freed memory: else updates fault 1,300 pages in again
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 2**25)
            libc.mallopt(m_trim_threshold, 2**30)
        self.cuda = cuda and torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        self.compiled = compile and (self.cuda or bool(compiler and headers))
        if compile and not self.compiled:
            missing = "Python's headers (python3-dev)" if compiler else "a C++ compiler (g++)"
            print(f"warning: {missing} not found: running uncompiled, much slower", file=sys.stderr)

    def compile(self, function):
        """The function compiled for its one set of shapes, or as it is."""
        if not self.compiled:
            return torch.no_grad()(function)
        one = dict(fullgraph=True, dynamic=False, isolate_recompiles=True)  # hence no guards needed
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options["cpp_wrapper"] = not self.cuda  # less Python between the kernels
        return torch.no_grad()(torch.compile(function, **one, options=options))

    def capture(self, function, state: list[Tensor]):
        """On CUDA a graph's replay of function(), state and random generator left as they were;
        elsewhere the function."""
        if not self.cuda:
            return function
        saved, rng_state = [t.clone() for t in state], torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile and let the libraries allocate before the capture
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        torch.cuda.set_rng_state(rng_state, self.device)
        return graph.replay


class Learner:
    """Runs an update again and again on the same tensors, which a CUDA graph needs.

    update(*state, *inputs, *random) changes `state` in place and returns `metrics`, named `names`.
    `update` doesn't wait for a GPU, which so works while the environment steps; `read_metrics`
    does. Its state holds the metrics too: an update may be rarer than checkpoints and log rows.
    """

    def __init__(self, update, state: list[Tensor], inputs, random, names, hardware: Hardware):
        self.state, self.inputs, self.random, self.names = state, inputs, random, names
        self.cuda = hardware.cuda
        self.metrics = torch.zeros(len(names), device=hardware.device)
        self._update = hardware.compile(update)
        self._run = hardware.capture(self._update_in_place, state)

    def update(self, rng: np.random.Generator):
        """One update, with random numbers from `rng` (on CUDA: from torch's generator)."""
        if not self.cuda:
            for numbers in self.random:
                numbers.fill(rng)
        self._run()

    def _update_in_place(self):
        if self.cuda:
            for numbers in self.random:
                numbers.fill_on_device()
        random = [numbers.tensor for numbers in self.random]
        self.metrics.copy_(self._update(*self.state, *self.inputs, *random))

    def read_metrics(self, step: int) -> dict[str, float]:
        """The last update's metrics. Raises: FloatingPointError if one is not finite."""
        values = dict(zip(self.names, self.metrics.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            bad = ", ".join(f"{k} = {x}" for k, x in values.items() if not math.isfinite(x))
            hint = "try a smaller learning rate; the last checkpoint is intact"
            raise FloatingPointError(f"the update at step {step} is not finite: {bad}; {hint}")
        return values

    def state_dict(self) -> dict:
        return {"state": [t.cpu() for t in (*self.state, self.metrics)]}

    def load_state_dict(self, state: dict):
        for tensor, value in zip((*self.state, self.metrics), state["state"], strict=True):
            tensor.copy_(value)


def make_policy(network: nn.Module, theta: Tensor, obs_dim: int, act_dim: int, n: int, hardware):
    """policy(obs (n, S), noise (n, A)) -> actions (n, A): `network.sample` with parameters theta.

    Compiled for n rows; takes arrays or tensors, returns a tensor where they lie.
    """
    inputs = torch.zeros(n, obs_dim + act_dim, device=hardware.device)
    action = torch.zeros(n, act_dim, device=hardware.device)

    sample = functional(network, "sample")

    def draw(theta, inputs):
        return sample(theta, *inputs.split([obs_dim, act_dim], dim=-1))[0]

    draw = hardware.compile(draw)
    run = hardware.capture(lambda: action.copy_(draw(theta, inputs)), [])

    @torch.no_grad()
    def policy(obs, noise) -> Tensor:
        both = torch.cat([torch.as_tensor(obs), torch.as_tensor(noise)], -1)
        inputs.copy_(both)
        run()
        return action.to(both.device, copy=True)

    return policy
