"""Where a vector step of a robot's training spends its time, and what makes it shorter.

    python studies/robots_on_a_cpu/measure.py --env-id Ant

Times the parts of meow_isaacgym.py's step with the task's own settings, without checks,
files and evaluation: acting, drawing a batch, the update, the simulator. Then whole
steps, in turns: as in the script on one and on two threads of PyTorch or of the
simulator, and with the simulator in a thread of its own beside the update, which needs
nothing of the step that it runs beside: the results are the same.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

import meow_isaacgym as script
from harness.compiling import Compiler, flatten_parameters, function_of_parameters
from harness.machine import configure_process


@dataclass
class Options:
    env_id: str = "Ant"
    """a task of isaac_tasks"""

    steps: int = 50
    """vector steps in a round"""

    rounds: int = 5
    """rounds of each way, in turns"""


class Training:
    """The step of meow_isaacgym.py, in parts."""

    def __init__(self, args):
        self.args, self.rng = args, np.random.default_rng(args.seed)
        device = torch.device("cpu")
        self.simulators = {}  # by their number of threads
        for threads in (1, 2):
            args.sim_threads = threads
            made = script.make_envs(args, args.num_envs, args.seed, device)
            self.simulators[threads] = made
        simulator = self.simulators[1]
        sizes = [simulator.obs_dim, simulator.act_dim]
        self.sizes, self.norm = sizes, script.RunningMeanStd(sizes[0])
        more = simulator.max_steps, args.batch_size
        self.replay = script.VectorReplayBuffer(1000, args.num_envs, *sizes, *more)
        flow = script.make_flow(args, *sizes)
        self.theta = theta = flatten_parameters(flow)
        learner = [theta, theta.clone(), *script.adam_moments(theta)]
        shape = (flow.n_couplings, 2, args.batch_size, flow.hidden)
        self.kept = torch.ones(shape, dtype=torch.bool)
        compiler = Compiler(args.compile, device, lambda _: None)
        update = script.make_update(flow, args)
        batch = self.replay.batch
        self.update = compiler("the update", update, *learner, batch, self.kept)
        self.obs_in = torch.zeros(args.num_envs, sizes[0])
        self.z_in = torch.zeros(args.num_envs, sizes[1])
        sample = function_of_parameters(flow.sample)
        self.draw = compiler("acting", sample, theta, self.obs_in, self.z_in)
        self.other = ThreadPoolExecutor(1)
        self.threads = 1
        for simulator in self.simulators.values():
            self.obs = simulator.reset()
        self.replay.start(self.obs)
        self.norm.update(self.obs)

    def act(self) -> torch.Tensor:
        self.obs_in.copy_(self.norm(self.obs))
        self.z_in.normal_()
        return self.draw()[0].clone()

    def draw_batch(self):
        self.norm.normalise(self.replay.sample(self.rng), *self.sizes)
        script.draw_dropout(self.kept, self.args.dropout, self.rng)

    def simulate(self, action):
        return self.simulators[self.threads].step(action)

    def keep(self, action, result):
        self.obs, reward, terminated, truncated, final_obs = result
        self.norm.update(self.obs)
        ends = terminated, truncated, final_obs
        self.replay.add(action, reward, *ends, self.obs)

    def step(self):
        """As in the script."""
        action = self.act()
        if len(self.replay):
            self.draw_batch()
            self.update()
        self.keep(action, self.simulate(action))

    def step_beside(self):
        """The same, with the simulator beside the update."""
        action = self.act()
        result = self.other.submit(self.simulate, action)
        self.draw_batch()
        self.update()
        self.keep(action, result.result())


def milliseconds(function, times: int) -> float:
    """The mean time of a call."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return 1e3 * (time.perf_counter() - start) / times


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    configure_process(torch_threads=1)
    made = {}  # by the threads that it was compiled for
    for threads in (2, 1):
        torch.set_num_threads(threads)
        made[threads] = Training(script.Args.for_env(options.env_id))
        for _ in range(20):
            made[threads].step()
    training, action = made[1], made[1].act()
    parts = {
        "acting": training.act,
        "drawing a batch": training.draw_batch,
        "the update": training.update,
        "the simulator": lambda: training.simulate(action),
    }
    ways = {  # threads of PyTorch, of the simulator, the step
        "as in the script": (1, 1, "step"),
        "two threads of PyTorch": (2, 1, "step"),
        "two threads of the simulator": (1, 2, "step"),
        "two threads of both": (2, 2, "step"),
        "the simulator beside the update": (1, 1, "step_beside"),
    }
    times = {name: [] for name in (*parts, *ways)}
    for _ in range(options.rounds):
        for name, part in parts.items():
            times[name].append(milliseconds(part, options.steps))
        for name, (torch_threads, threads, step) in ways.items():
            torch.set_num_threads(torch_threads)
            made[torch_threads].threads = threads
            step = getattr(made[torch_threads], step)
            step()
            times[name].append(milliseconds(step, options.steps))
        torch.set_num_threads(1)
        training.threads = 1
    print(f"{options.env_id}\n\n| | ms (min to max) |\n|---|---|")
    for name, values in times.items():
        middle = f"{statistics.median(values):.1f}"
        print(f"| {name} | {middle} ({min(values):.1f} to {max(values):.1f}) |")
    for each in made.values():
        each.other.shutdown()


if __name__ == "__main__":
    main()
