"""A script with another floor, or other joint limits: the arms of this study.

    python studies/walkable_floor/physics.py own meow_isaacgym.py --env-id Humanoid
    python studies/walkable_floor/physics.py own tools/robot_physics.py Ant Humanoid

`today` is the physics as it is (isaac_tasks/limits.py), `own` has MuJoCo's own contacts
and joint limits, `own_floor` and `own_limits` one of the two, and `soft` today's with a
floor that stops feet over 3 cm instead of 1 and damps them half as much. All else is
the script's; its runs are named after the arm (meow_isaacgym_own).
"""

import contextlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from isaac_tasks import limits


def left_to_mujoco(kind: type):
    """A patch: MuJoCo's own constraints instead of JointLimits or of Floor."""
    init = kind.__init__

    def init_with_none(self, *arrays):
        with mock.patch.object(limits, "looks_ahead", return_value=False):
            init(self, *arrays)

    return mock.patch.object(kind, "__init__", init_with_none)


OWN_FLOOR = left_to_mujoco(limits.Floor)
OWN_LIMITS = left_to_mujoco(limits.JointLimits)
ARMS = {
    "today": [],
    "own": [OWN_FLOOR, OWN_LIMITS],
    "own_floor": [OWN_FLOOR],
    "own_limits": [OWN_LIMITS],
    "soft": [mock.patch.multiple(limits.Floor, thickness=0.03, damping=0.4)],
}


@contextlib.contextmanager
def physics_of(arm: str):
    """Simulators that are made meanwhile have the physics of this arm."""
    with contextlib.ExitStack() as stack:
        for patch in ARMS[arm]:
            stack.enter_context(patch)
        yield


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in ARMS:
        print(__doc__, end="")
        return 2
    arm, script, *words = argv
    name = Path(script).stem
    if not importlib.util.find_spec(name):
        print(f"error: there is no {script}", file=sys.stderr)
        return 2
    module = importlib.import_module(name)
    with physics_of(arm):
        if hasattr(module, "train"):
            launcher = ["python", "studies/walkable_floor/physics.py", *argv[:2]]
            words = ["--exp-name", f"{name}_{arm}", *words]
            train, evaluate_saved = module.train, module.evaluate_saved
            return module.main(module.Args, train, evaluate_saved, words, launcher)
        with mock.patch("sys.argv", [script, *words]):
            return module.main() or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
