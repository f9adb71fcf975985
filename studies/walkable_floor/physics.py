"""A script with another floor, or other joint limits: the arms of this study.

    python studies/walkable_floor/physics.py own meow_isaacgym.py --env-id Humanoid
    python studies/walkable_floor/physics.py own tools/robot_physics.py Ant Humanoid

`today` is the physics as it is (isaac_tasks/limits.py), `own` has MuJoCo's own contacts
and joint limits, `own_floor` and `own_limits` one of the two, and `soft` today's with a
floor that stops feet over 3 cm instead of 1 and damps them half as much. All else is
the script's; its runs are named after the arm (meow_isaacgym_own).
"""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from isaac_tasks import limits


def leave_to_mujoco(kind: type):
    """MuJoCo's own constraints instead of JointLimits or of Floor."""
    init = kind.__init__

    def init_with_none(self, *arrays):
        with mock.patch.object(limits, "looks_ahead", return_value=False):
            init(self, *arrays)

    kind.__init__ = init_with_none


def today():
    pass


def own_floor():
    leave_to_mujoco(limits.Floor)


def own_limits():
    leave_to_mujoco(limits.JointLimits)


def own():
    own_floor()
    own_limits()


def soft():
    limits.Floor.thickness, limits.Floor.damping = 0.03, 0.4


ARMS = {f.__name__: f for f in (today, own, own_floor, own_limits, soft)}


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in ARMS:
        print(__doc__, end="")
        return 2
    arm, script, *words = argv
    if not importlib.util.find_spec(Path(script).stem):
        print(f"error: there is no {script}", file=sys.stderr)
        return 2
    ARMS[arm]()
    module = importlib.import_module(Path(script).stem)
    if not hasattr(module, "train"):
        sys.argv = [script, *words]
        return module.main() or 0
    words = ["--exp-name", f"{Path(script).stem}_{arm}", *words]
    return module.main(module.Args, module.train, module.evaluate_saved, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
