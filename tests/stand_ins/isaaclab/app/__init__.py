"""Stand-in: `launch_simulation` keeps the physics running until its block is left."""

from contextlib import contextmanager

running = False


@contextmanager
def launch_simulation(cfg, launcher_args=None):  # noqa: ARG001
    global running
    running = True
    try:
        yield
    finally:
        running = False


class AppLauncher:
    """The way of Isaac Lab 2; the app runs until the process ends."""

    def __init__(self, launcher_args=None, **kwargs):  # noqa: ARG002
        global running
        running, self.app = True, object()
