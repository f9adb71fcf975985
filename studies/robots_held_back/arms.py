"""A change to meow_auto_isaacgym.py: the arms of this study.

    python studies/robots_held_back/arms.py split --env-id Humanoid \
        --temperature 1.5 --dropout 0

`split` fits V to the policy's own actions, and the policy to all: in the loss m learns
little from an action that is far and worth more than Q says, the couplings and kappa
learn from every action in full. All options are the script's; the run is named after
the arm (auto_split).
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

ROOT = Path(__file__).parents[2]


def split(script: ModuleType):
    """With the energy e = 1/2 sum_i kappa_i x_i^2 = rho d / 2, on average rho / 2 of
    the policy's own actions, the loss is the batch mean of

        w (Q - y)^2 / 2, of m alone,   w = exp(rho - e) where y > Q, at most 1
        (Q - y)^2 / 2,   of kappa and g alone
    """
    rho = []  # of the newest flow

    class EnergyFlow(script.EnergyFlow):
        def __init__(self, obs_dim: int, act_dim: int, args):
            super().__init__(obs_dim, act_dim, args)
            rho[:] = [args.temperature]

    def meow_loss(q: Tensor, d: Tensor, target: Tensor) -> Tensor:
        e = 0.5 * rho[0] * d
        of_m = q + e - e.detach()  # Q, with the gradient of m
        of_flow = q.detach() + e.detach() - e  # Q, with that of kappa and g
        w = torch.exp((2 - d) * (rho[0] / 2)).clamp(max=1)
        w = torch.where(target > q, w, 1.0).detach()
        for_m = 0.5 * (w * (of_m - target).square()).mean()
        return for_m + 0.5 * (of_flow - target).square().mean()

    script.EnergyFlow, script.meow_loss = EnergyFlow, meow_loss


ARMS = {"split": split}


def changed_script(arm: str) -> ModuleType:
    """A script of its own with this change."""
    path = ROOT / "meow_auto_isaacgym.py"
    spec = importlib.util.spec_from_file_location(f"robots_{arm}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    ARMS[arm](script)
    return script


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__, end="")
        return 2
    if argv[0] not in ARMS:
        print(f"error: {argv[0]} is not one of {', '.join(ARMS)}", file=sys.stderr)
        return 2
    script = changed_script(argv[0])
    launcher = ["python", "studies/robots_held_back/arms.py", argv[0]]
    words = ["--exp-name", f"auto_{argv[0]}", *argv[1:]]
    train, evaluate_saved = script.train, script.evaluate_saved
    return script.main(script.Args, train, evaluate_saved, words, launcher)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
