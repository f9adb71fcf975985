"""The table of the embedded tasks, and the one place that chooses and makes a simulator."""

import importlib.util

import torch

from isaac_tasks.allegro_hand import AllegroHand
from isaac_tasks.ant import Ant
from isaac_tasks.anymal import Anymal
from isaac_tasks.franka_cabinet import FrankaCabinet
from isaac_tasks.humanoid import Humanoid
from isaac_tasks.ingenuity import Ingenuity
from isaac_tasks.interface import Simulator, SimulatorError
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
    return "isaaclab" if env_id.startswith(("Isaac-", "IsaacContrib-")) else "isaacgym"


def make_simulator(
    name: str,
    env_id: str,
    num_envs: int,
    seed: int,
    device: torch.device | str = "cpu",
    threads: int = 1,
    variant: str = "oige",
) -> Simulator:
    """The simulator `name` (of interface.NAMES) with `num_envs` environments of the task `env_id`.

    threads: of the CPU (mujoco); variant: which task's constants (mujoco). Raises: SimulatorError.
    """
    known = f"the embedded tasks are {', '.join(TASKS)}"
    chosen = choose_simulator(name, env_id)
    if chosen not in ("mujoco", "isaacgym", "isaaclab"):
        text = "must be one of auto, isaacgym, isaaclab, mujoco"
        raise SimulatorError(f"simulator {chosen}: {text}")
    if num_envs < 1:
        raise SimulatorError(f"{num_envs} environments: must be at least 1")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SimulatorError(f"device {device}: there is no usable GPU here; take cpu")
    if chosen == "mujoco":
        if env_id not in TASKS:
            raise SimulatorError(
                f"the embedded simulator has no task {env_id}; {known}"
            )
        if variant not in TASKS[env_id].variants:
            allowed = ", ".join(TASKS[env_id].variants)
            raise SimulatorError(f"variant {variant}: must be one of {allowed}")
        return MujocoSimulator(TASKS[env_id], num_envs, seed, device, threads, variant)
    package = {"isaacgym": "isaacgymenvs", "isaaclab": "isaaclab_tasks"}[chosen]
    if importlib.util.find_spec(package) is None:
        raise SimulatorError(
            f"{env_id} needs {chosen}, and {package} is not installed; {known}"
        )
    # Only now: both start NVIDIA's software when they are imported.
    if chosen == "isaacgym":
        from isaac_tasks.isaacgym_simulator import IsaacGymSimulator

        return IsaacGymSimulator(env_id, num_envs, seed, device)
    from isaac_tasks.isaaclab_simulator import IsaacLabSimulator

    return IsaacLabSimulator(env_id, num_envs, seed, device)
