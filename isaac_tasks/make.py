"""The table of the embedded tasks, and the one place that makes a simulator."""

import difflib
import importlib.util
from typing import get_args

import torch

from isaac_tasks.allegro_hand import AllegroHand
from isaac_tasks.ant import Ant
from isaac_tasks.anymal import Anymal
from isaac_tasks.franka_cabinet import FrankaCabinet
from isaac_tasks.humanoid import Humanoid
from isaac_tasks.ingenuity import Ingenuity
from isaac_tasks.interface import Simulator, SimulatorError, SimulatorName
from isaac_tasks.mujoco_simulator import MujocoSimulator

TASKS = {
    "Ant": Ant,
    "Humanoid": Humanoid,
    "Ingenuity": Ingenuity,
    "Anymal": Anymal,
    "AllegroHand": AllegroHand,
    "FrankaCabinet": FrankaCabinet,
}


def choose_simulator(name: str, env_id: str) -> str:
    """What "auto" means: the embedded tasks on MuJoCo, ids Isaac-... on Isaac Lab."""
    if name != "auto":
        return name
    if env_id in TASKS:
        return "mujoco"
    if env_id.startswith(("Isaac-", "IsaacContrib-")):
        return "isaaclab"
    return "isaacgym"


def make_simulator(
    name: SimulatorName,
    env_id: str,
    num_envs: int,
    seed: int,
    device: torch.device | str = "cpu",
    threads: int = 1,
    variant: str = "oige",
) -> Simulator:
    """The simulator `name` with `num_envs` environments of the task `env_id`.

    threads: of the CPU (mujoco). variant: which task's constants (mujoco).
    Raises: SimulatorError.
    """
    if name not in get_args(SimulatorName):
        allowed = ", ".join(get_args(SimulatorName))
        raise SimulatorError(f"simulator {name}: must be one of {allowed}")
    if num_envs < 1:
        raise SimulatorError(f"{num_envs} environments: must be at least 1")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SimulatorError(f"device {device}: there is no usable GPU here; take cpu")

    chosen = choose_simulator(name, env_id)
    if chosen == "mujoco":
        task = find_task(env_id, variant)
        return MujocoSimulator(task, num_envs, seed, device, threads, variant)

    # NVIDIA's software starts when it is imported, so only where it is wanted.
    if chosen == "isaacgym":
        check_installed("isaacgymenvs", env_id, chosen)
        from isaac_tasks.isaacgym_simulator import IsaacGymSimulator

        return IsaacGymSimulator(env_id, num_envs, seed, device)
    check_installed("isaaclab_tasks", env_id, chosen)
    from isaac_tasks.isaaclab_simulator import IsaacLabSimulator

    return IsaacLabSimulator(env_id, num_envs, seed, device)


def find_task(env_id: str, variant: str) -> type:
    """The embedded task. Raises: SimulatorError for an unknown task or variant."""
    if env_id not in TASKS:
        raise SimulatorError(
            f"the embedded simulator has no task {env_id}; {known_tasks(env_id)}"
        )
    variants = TASKS[env_id].variants
    if variant not in variants:
        allowed = ", ".join(variants)
        raise SimulatorError(f"variant {variant}: must be one of {allowed}")
    return TASKS[env_id]


def check_installed(package: str, env_id: str, simulator: str):
    """Raises: SimulatorError where the simulator's package can't be imported."""
    if importlib.util.find_spec(package) is None:
        raise SimulatorError(
            f"{env_id} needs {simulator}, and {package} is not installed; "
            + known_tasks(env_id)
        )


def known_tasks(env_id: str) -> str:
    """Names the embedded tasks, and the one that was probably meant."""
    text = f"the embedded tasks are {', '.join(TASKS)}"
    names = {name.lower(): name for name in TASKS}
    similar = difflib.get_close_matches(env_id.lower(), names, n=1, cutoff=0.75)
    if similar:
        text += f"; did you mean {names[similar[0]]}?"
    return text
