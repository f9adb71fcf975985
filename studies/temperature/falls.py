"""What V says of states, above all before a fall, and what came of them.

    python studies/temperature/falls.py runs/RUN_NAME

Of the newest 10,000 transitions of a run that is shorter than its replay buffer: all
states of which is known what came, and those 1, 10 and 40 steps before an episode
terminated. A state from which the policy falls whatever it does should be worth what
still comes. Then what the loss's dropout does to Q of the policy's own actions, and how
far the actions that it learns from are from the policy.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from slopes import parts_of

import meow_auto_continuous_action as script
from harness.files import load_file
from harness.runs import explain

RECENT, STEPS, MASKS = 10_000, (1, 10, 40), 8
KEPT = 1_000, 10_000, 100_000
ENOUGH = 400
"""steps after which what came is known: with gamma 0.99 the rest weighs under 2 %"""


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""


def begins(saved: dict) -> Tensor:
    """The rows that begin an episode. (N,) bool."""
    parts = script.split_batch(saved["replay"]["rows"], *saved["sizes"])
    obs, _, next_obs, _, _ = parts
    first = torch.ones(len(obs), dtype=torch.bool)
    first[1:] = (obs[1:] != next_obs[:-1]).any(-1)
    return first


@torch.no_grad()
def of_all(saved: dict) -> tuple[Tensor, Tensor]:
    """V(s) and the discounted return that came, where it is known. (N,) each.

    It is known where the episode terminated, or went on for `ENOUGH` steps.
    """
    flow, norm, args, unit = parts_of(saved)
    parts = script.split_batch(saved["replay"]["rows"], *saved["sizes"])
    obs, _, _, reward, terminated = parts
    first, came = begins(saved), torch.zeros(len(obs))
    known = torch.zeros(len(obs), dtype=torch.bool)
    total, steps, fell = 0.0, 0, False
    for row in reversed(range(len(obs))):
        if row + 1 == len(obs) or first[row + 1]:  # an episode's last step
            total, steps, fell = 0.0, 0, bool(terminated[row])
        total, steps = float(reward[row]) + args.gamma * total, steps + 1
        came[row] = total
        known[row] = fell or steps >= ENOUGH
    known[:-RECENT] = False
    return unit * flow.soft_values(norm(obs[known])), came[known]


@torch.no_grad()
def before_falls(saved: dict, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """V(s), the discounted return to the end, and d, of states `steps` before. (N,).

    d is the mean square of the action's latent z: about 1 where today's policy would
    play it. The end's own state is 1 step before it. Shorter episodes are left out.
    """
    flow, norm, args, unit = parts_of(saved)
    parts = script.split_batch(saved["replay"]["rows"], *saved["sizes"])
    obs, u, _, reward, terminated = parts
    ends = terminated.nonzero()[:, 0]
    ends = ends[(ends >= len(obs) - RECENT) & (ends >= steps - 1)]
    window = ends[:, None] + torch.arange(1 - steps, 1)  # rows to the end, (N, steps)
    window = window[~begins(saved)[window[:, 1:]].any(-1)]
    discounts = args.gamma ** torch.arange(steps)
    here, u = norm(obs[window[:, 0]]), u[window[:, 0]]
    d = (flow.kappa(here) * flow.to_x(u, here) ** 2 / flow.alpha).mean(-1)
    return unit * flow.soft_values(here), (discounts * reward[window]).sum(-1), d


@torch.no_grad()
def by_dropout(saved: dict) -> tuple[Tensor, Tensor, Tensor]:
    """At the newest states, of one action of the policy: Q without dropout less its
    mean with it, in reward units; d without, and with it. (N,) each."""
    flow, norm, args, unit = parts_of(saved)
    torch.manual_seed(0)
    rows = saved["replay"]["rows"][-RECENT:]
    obs = norm(script.split_batch(rows, *saved["sizes"])[0])
    u, _ = flow.sample(obs)
    q, d = flow.q_and_distance(obs, u)
    shape = (MASKS, flow.n_couplings, 2, len(obs), flow.hidden)
    masks = torch.rand(shape) >= args.dropout
    tried = [flow.q_and_distance(obs, u, kept) for kept in masks]
    q_dropped, d_dropped = map(torch.stack, zip(*tried, strict=True))
    return unit * (q - q_dropped.mean(0)), d, d_dropped.mean(0)


@torch.no_grad()
def of_kept(saved: dict, newest: int) -> Tensor:
    """d of the actions of so many newest transitions, without dropout. (N,)."""
    flow, norm, *_ = parts_of(saved)
    rows = saved["replay"]["rows"][-newest:]
    obs, u, *_ = script.split_batch(rows, *saved["sizes"])
    return flow.q_and_distance(norm(obs), u)[1]


def tell(what: str, values: Tensor, returns: Tensor, d: Tensor | None = None):
    """Prints means of values and returns (N,), and the median of d (N,)."""
    text = "none of the newest episodes"
    if len(values):
        text = f"V {values.mean():.3g}, what came {returns.mean():.3g}"
        text += "" if d is None else f", median d {d.median():.3g}"
        text += f" (of {len(values)})"
    print(f"{what}: {text}")


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        saved = load_file("run", options.run, script.__name__)
        tell("all states", *of_all(saved))
        for steps in STEPS:
            tell(f"{steps} before a fall", *before_falls(saved, steps))
        less, d, d_dropped = by_dropout(saved)
        text = f"Q less by {less.mean():.2g}, median d {d_dropped.median():.2g}"
        print(f"dropout: {text} (without: {d.median():.2g})")
        for newest in KEPT:
            d = of_kept(saved, newest)
            print(f"the newest {len(d):,} actions: median d {d.median():.2g}")
    except Exception as error:
        return explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
