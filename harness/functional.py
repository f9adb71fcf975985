"""Updates as functions of flat tensors, each one compiled function or, on a GPU, one CUDA graph."""

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


def flatten_parameters(network: nn.Module) -> Tensor:
    """Moves a network's parameters into one vector theta (P,): changing it changes the network."""
    theta = nn.utils.parameters_to_vector(network.parameters()).detach()
    nn.utils.vector_to_parameters(theta, network.parameters())
    return theta


def functional(method):
    """f(theta (P,), *inputs) = method(*inputs), as a pure function of its network's parameters."""
    module = nn.Module()  # torch.func.functional_call can only call `forward`
    module.network, module.forward = method.__self__, method
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}

    def function(theta: Tensor, *inputs):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        views = {n: part.view(shapes[n]) for n, part in zip(shapes, parts, strict=True)}
        return torch.func.functional_call(module, views, inputs)

    return function


def adam_moments(theta: Tensor) -> list[Tensor]:
    """m (P,), v (P,) and (beta1^0, beta2^0) before the first step of Adam."""
    zeros = torch.zeros_like(theta)
    return [zeros, zeros.clone(), theta.new_ones(2, dtype=torch.float64)]


def adam(theta: Tensor, m: Tensor, v: Tensor, decay: Tensor, grad: Tensor, lr: float):
    """One step of Adam [Kingma and Ba, algorithm 1]; decay (2,) holds (beta1^t, beta2^t)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    decay = torch.stack([beta1 * decay[0], beta2 * decay[1]])
    m_hat, v_hat = m / (1 - decay[0]).to(m.dtype), v / (1 - decay[1]).to(v.dtype)
    return theta - lr * m_hat / (torch.sqrt(v_hat) + eps), m, v, decay


class Hardware:
    """The device, and how functions run on it; sets the threads of the whole process."""

    def __init__(self, cuda: bool, torch_threads: int, compile: bool):
        torch.set_flush_denormal(
            True
        )  # zero-initialised networks are full of slow denormals
        torch.set_num_threads(torch_threads)
        if (
            sys.platform == "linux"
        ):  # keep freed memory: else updates fault 1,300 pages in again
            for m_threshold, size in ((-3, 2**25), (-1, 2**30)):  # of mmap, of trim
                ctypes.CDLL(None).mallopt(m_threshold, size)
        self.cuda = cuda and torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        compiler = headers and shutil.which(os.environ.get("CXX", "g++"))
        self.compiled = compile and (self.cuda or bool(compiler))
        if compile and not self.compiled:
            missing = "g++ or Python's headers (python3-dev) not found"
            print(
                f"warning: {missing}: running uncompiled, much slower", file=sys.stderr
            )

    def compile(self, function):
        """The function compiled for its one set of shapes, or as it is."""
        if not self.compiled:
            return torch.no_grad()(function)
        one = dict(
            fullgraph=True, dynamic=False, isolate_recompiles=True
        )  # hence no guards needed
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options["cpp_wrapper"] = not self.cuda  # less Python between the kernels
        return torch.no_grad()(torch.compile(function, **one, options=options))

    def capture(self, function, state: list[Tensor]):
        """function; on CUDA its graph's replay, captured with state and generator as they were."""
        if not self.cuda:
            return function
        saved, rng_state = (
            [t.clone() for t in state],
            torch.cuda.get_rng_state(self.device),
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(
                3
            ):  # compile and let the libraries allocate before the capture
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
    """Runs update(*state, *inputs, *random) -> metrics on the same tensors, as a CUDA graph needs.

    It changes `state` in place; random: objects whose `fill(rng)` draws their `tensor` anew.
    """

    def __init__(
        self, update, state: list[Tensor], inputs, random, names, hardware: Hardware
    ):
        self.metrics = torch.zeros(len(names), device=hardware.device)
        self.state, self.random, self.names, self.rng = (
            [*state, self.metrics],
            random,
            names,
            None,
        )
        update = hardware.compile(update)
        tensors = [*state, *inputs, *(numbers.tensor for numbers in random)]

        def run():
            for numbers in random:
                numbers.fill(self.rng)
            self.metrics.copy_(update(*tensors))

        self._run = hardware.capture(run, self.state)

    def update(self, rng: np.random.Generator):
        """One update, with random numbers from `rng` (on CUDA: from torch's generator)."""
        self.rng = rng
        self._run()

    def read_metrics(self, step: int) -> dict[str, float]:
        """The last update's metrics (waits for a GPU). Raises: FloatingPointError: not finite."""
        values = dict(zip(self.names, self.metrics.tolist(), strict=True))
        if bad := [
            f"{name} = {x}" for name, x in values.items() if not math.isfinite(x)
        ]:
            hint = "try a smaller learning rate; the last checkpoint is intact"
            raise FloatingPointError(
                f"the update at step {step} gave {', '.join(bad)}; {hint}"
            )
        return values

    def state_dict(self) -> dict:
        return {"state": [tensor.cpu() for tensor in self.state]}

    def load_state_dict(self, saved: dict):
        for tensor, value in zip(self.state, saved["state"], strict=True):
            tensor.copy_(value)


def make_policy(
    network: nn.Module, theta: Tensor, obs_dim: int, act_dim: int, n: int, hardware
):
    """`network.sample` compiled for n rows: policy(obs (n, S), noise (n, A)) -> actions (n, A)."""
    inputs = torch.zeros(n, obs_dim + act_dim, device=hardware.device)
    action = torch.zeros(n, act_dim, device=hardware.device)
    sample = functional(network.sample)
    draw = hardware.compile(
        lambda theta, x: sample(theta, *x.split([obs_dim, act_dim], -1))[0]
    )
    run = hardware.capture(lambda: action.copy_(draw(theta, inputs)), [])

    @torch.no_grad()
    def policy(obs, noise) -> Tensor:
        both = torch.cat([torch.as_tensor(obs), torch.as_tensor(noise)], -1)
        inputs.copy_(both)
        run()
        return action.to(both.device, copy=True)

    return policy
