"""How far a run's policy is from the actions that it learned from, and how wrong Q is.

    python studies/temperature/drift.py runs/RUN_NAME

Of the transitions in the checkpoint of a run of meow_auto_continuous_action.py: d is
the mean square of an action's latent z, about 1 where today's policy would play it; the
error is y - Q(s,a), whose standard deviation is the noise in which Q has to
find what actions are worth: alpha / 2 per dimension.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from slopes import parts_of

import meow_auto_continuous_action as script
from harness.files import load_file
from harness.runs import explain

RECENT = 10_000


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""


@torch.no_grad()
def latents_and_errors(saved: dict) -> tuple[torch.Tensor, torch.Tensor, float]:
    """d (N,) and error (N,) of a checkpoint's transitions, oldest first; alpha."""
    flow, norm, args = parts_of(saved)
    parts = script.split_batch(saved["replay"]["rows"], *saved["sizes"])
    obs, u, next_obs, reward, terminated = parts
    obs, next_obs = norm(obs), norm(next_obs)
    q, x = flow.q_values(obs, u), flow.to_x(u, obs)
    d = (flow.kappa(obs) * x * x / flow.alpha).mean(-1)
    torch.nn.utils.vector_to_parameters(
        saved["learner"][1], flow.parameters()
    )  # theta'
    v_next = flow.soft_values(next_obs)
    error = script.soft_target(reward, terminated, v_next, args.gamma) - q
    return d, error, float(flow.alpha)


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        saved = load_file("run", options.run, script.__name__)
        d, error, alpha = latents_and_errors(saved)
    except Exception as error:
        return explain(error)
    start = saved["args"]["learning_starts"]
    newest = slice(max(start, len(d) - RECENT), None)
    groups = {"random": slice(0, start), "recent": newest}
    print(f"step {saved['step']}, alpha / 2 = {alpha / 2:.2g}")
    for name, part in groups.items():
        text = f"median d {d[part].median():.3g}, errors {error[part].std():.3g}"
        print(f"{name} actions: {text} (standard deviation)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
