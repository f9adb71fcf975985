"""Shared set-up: the scripts are importable and networks run on one thread."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = [ROOT / f"{name}_continuous_action.py" for name in ("meow", "sac", "sql")]
SCRIPT = SCRIPTS[0]
ISAAC_SCRIPTS = [ROOT / f"{name}_isaacgym.py" for name in ("meow", "sac")]
torch.set_num_threads(1)


@pytest.fixture
def make_random_flow():
    """make(obs_dim, act_dim, ...): a float64 flow whose every parameter is random."""
    from meow_continuous_action import EnergyFlow

    def make(obs_dim, act_dim, alpha=0.25, low=-3.0, high=-0.3, seed=0, **options):
        torch.manual_seed(seed)
        flow = EnergyFlow(obs_dim, act_dim, alpha, low, high, **options).double()
        for (
            p
        ) in flow.parameters():  # zero-initialised networks would hide the dependence on the state
            p.data += 0.1 * torch.randn_like(p)
        if flow.affine:  # moderate scales, so that a grid can resolve the density
            for mlp in flow.t:
                mlp.layers[-1].weight.data *= 0.2
        return flow

    return make
