"""Draws the embedded robots, one panel each.

python tools/robot_pictures.py docs/robots.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness.environments  # noqa: F401 (chooses an off-screen renderer)
from isaac_tasks import TASKS, make_simulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch


@dataclass
class Options:
    out: Annotated[Path, tyro.conf.Positional]
    """picture to write"""


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.7), layout="constrained")
    for name, panel in zip(TASKS, axes.flat, strict=True):
        envs = make_simulator("mujoco", name, 1, seed=1)
        envs.reset()
        for _ in range(20):
            envs.step(torch.zeros(1, envs.act_dim))
        panel.imshow(envs.render())
        panel.set_title(name, fontsize=9)
        panel.axis("off")
    figure.savefig(options.out, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
