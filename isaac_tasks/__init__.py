"""The Isaac Gym tasks of the MEow paper on MuJoCo; adapters to Isaac Gym and Isaac Lab.

    simulator = make_simulator("mujoco", "Ant", num_envs=128, seed=1)
    obs = simulator.reset()
    obs, reward, terminated, truncated, final_obs = simulator.step(action)

`interface.Simulator` says what these are, `task.Task` what a task is, `make.TASKS`
lists them. Imports go one way: interface <- simulators and tasks <- make.
"""

from isaac_tasks.interface import Simulator, SimulatorError, SimulatorName
from isaac_tasks.make import TASKS, make_simulator

__all__ = ["TASKS", "Simulator", "SimulatorError", "SimulatorName", "make_simulator"]
