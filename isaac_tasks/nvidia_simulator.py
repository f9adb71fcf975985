"""What the adapters to NVIDIA's simulators share: they draw and save nothing."""

import numpy as np

from isaac_tasks.interface import SimulatorError


class NvidiaSimulator:
    """Half of an adapter; `isaac_tasks.Simulator` says what its methods return."""

    name: str
    """for messages"""
    diverged = 0  # neither of them says
    exact_resume = False
    one_per_process = True
    fps = 60

    def render(self) -> np.ndarray:
        raise SimulatorError(
            f"{self.name} runs without graphics here: leave out --capture-video"
        )

    def state_dict(self) -> dict:
        """Empty: the physics can't be saved. A resumed run starts new episodes."""
        return {}

    def load_state_dict(self, state: dict):
        """Does nothing: see `state_dict`."""


def first_line(error: BaseException) -> str:
    """Kind and message of an error, without the lines after the first."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
