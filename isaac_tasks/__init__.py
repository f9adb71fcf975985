"""The Isaac Gym tasks of the MEow paper on MuJoCo, and adapters to Isaac Gym and Isaac Lab.

    simulator = make_simulator("mujoco", "Ant", num_envs=128, seed=1)
    obs = simulator.reset()
    obs, reward, terminated, truncated, final_obs = simulator.step(action)

`simulator.Simulator` says what these are, `task.Task` how to add a task.
"""

from isaac_tasks.ant import Ant
from isaac_tasks.franka_cabinet import FrankaCabinet
from isaac_tasks.humanoid import Humanoid
from isaac_tasks.ingenuity import Ingenuity
from isaac_tasks.simulator import Simulator, SimulatorError, make_simulator

__all__ = ["TASKS", "Simulator", "SimulatorError", "make_simulator"]

TASKS = {
    "Ant": Ant,
    "Humanoid": Humanoid,
    "Ingenuity": Ingenuity,
    "FrankaCabinet": FrankaCabinet,
}
