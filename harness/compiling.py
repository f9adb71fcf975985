"""Functions of flat tensors, compiled; on a GPU each one is a CUDA graph."""

import inspect
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import RunError, is_memory_error, say


def flatten_parameters(network: nn.Module) -> Tensor:
    """Moves a network's parameters into a vector theta (P,): they become its views."""
    theta = nn.utils.parameters_to_vector(network.parameters()).detach()
    nn.utils.vector_to_parameters(theta, network.parameters())
    return theta


def function_of_parameters(method) -> Callable:
    """f(theta (P,), *inputs) = method(*inputs) of a network with parameters theta."""
    module = nn.Module()  # torch.func.functional_call can only call `forward`
    module.network, module.forward = method.__self__, method
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}

    def function(theta: Tensor, *inputs):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes, parts, strict=True)
        views = {name: part.view(shapes[name]) for name, part in named}
        return torch.func.functional_call(module, views, inputs)

    return function


class Compiler:
    """Compiles functions that run again and again on the same tensors.

    on_pause(seconds): told of the time that compiling took.
    """

    def __init__(self, enabled: bool, device: torch.device, on_pause):
        self.device, self.on_pause = device, on_pause
        self.enabled = enabled and can_compile(device)

    def __call__(self, name: str, function, *tensors: Tensor) -> Callable:
        """run() = function(*tensors), with what these tensors hold then.

        The function may change its tensors in place. On a GPU the result is the same
        tensor each time.
        """
        if self.enabled:
            function = torch.compile(function, **self._options())
        function = torch.no_grad()(function)
        run = None

        def first_or_later_run():
            nonlocal run
            if run is None:
                run = self._prepare(name, function, tensors)
            return run()

        return first_or_later_run

    def _options(self) -> dict:
        """Of torch.compile: one function for one set of shapes needs no guards."""
        options = {"cpp_wrapper": self.device.type == "cpu"}  # less Python in between
        if hasattr(torch.compiler, "skip_all_guards_unsafe"):
            options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
        one = {"fullgraph": True, "dynamic": False, "options": options}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            one["isolate_recompiles"] = True
        else:  # then functions that share code share their number of compilations
            options.pop("guard_filter_fn", None)
        return one

    def _prepare(self, name: str, function, tensors) -> Callable:
        """Compiles the function for these tensors, whose values stay as they are."""
        if not self.enabled and self.device.type == "cpu":
            return lambda: function(*tensors)
        saved = [tensor.clone() for tensor in tensors]
        if self.enabled:
            say(f"compiling {name}, up to a minute the first time ...")
        start = time.perf_counter()
        try:
            run = self._warm_up(function, tensors)
        except (OSError, RuntimeError) as error:
            if not self.enabled or is_memory_error(error):
                raise
            reason = " ".join(str(error).split())[:200]
            hint = "--no-compile does without"
            raise RunError(f"can't compile {name}: {hint} ({reason})") from error
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        seconds = time.perf_counter() - start
        self.on_pause(seconds)
        if self.enabled:
            say(f"compiling {name}: done in {seconds:.0f} s")
        return run

    def _warm_up(self, function, tensors) -> Callable:
        """Runs the function, so that it is compiled, and on a GPU records its graph."""
        if self.device.type == "cpu":
            function(*tensors)
            return lambda: function(*tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries allocate before the graph is recorded
                function(*tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*tensors)

        def replay():
            graph.replay()
            return result

        return replay


def can_compile(device: torch.device) -> bool:
    """Whether there is a C++ compiler, which only a CPU needs; else says so."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if device.type == "cuda" or (headers and compiler):
        return True
    missing = "g++ or Python's headers (python3-dev) not found"
    say(f"warning: {missing}: running uncompiled, much slower")
    return False
