"""How much of what V says of actions comes true, some steps later.

    python studies/temperature/ahead.py runs/RUN_NAME

At states of the policy's own episodes, actions of the policy are tried in the
simulator. y_1 = r + gamma V(s') says what each is worth. Then the policy goes on, with
the same noise after each action, and y_n counts n rewards, entropies and V after them.
Less their means at a state, y_n is regressed on y_1: the slope is 1 where what V said
of the actions comes true, and 0 where it was noise of V.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import slopes
from slopes import correlation, parts_of, restore, simulator_state, step_each

import meow_auto_continuous_action as script
from harness.files import load_file
from harness.runs import explain

ACTIONS, EVERY = 12, 15  # actions tried at a state; steps between such states


@dataclass
class Options(slopes.Options):
    states: int = 60
    """states at which actions are tried"""

    ahead: tuple[int, ...] = (5, 20, 40)
    """numbers of steps"""


def worth_ahead(flow, norm, envs: list[gym.Env], state, u: Tensor, gamma, ahead):
    """y_n of actions u (n, A), each in an environment of its own. -> (ahead, n)."""
    for env in envs:
        restore(env, state)
    total, alive, discount, y = torch.zeros(len(u)), torch.ones(len(u)), 1.0, []
    for step in range(1, max(ahead) + 1):
        obs, reward, terminated = step_each(envs, u)
        total += discount * alive * reward
        alive = alive * (1 - terminated)  # what comes after an end doesn't count
        discount *= gamma
        here = norm(obs)
        if step in ahead:
            y.append(total + discount * alive * flow.soft_values(here))
        z = torch.randn(1, flow.act_dim).expand(len(u), -1)
        u, log_prob = flow.sample(here, z)
        total -= discount * alive * flow.alpha * log_prob
    return torch.stack(y)


@torch.no_grad()
def differences(saved: dict, states: int, ahead: tuple[int, ...]) -> Tensor:
    """y_n of `ACTIONS` at each state, less their mean there. (ahead, states, n)."""
    torch.manual_seed(0)
    flow, norm, args = parts_of(saved)
    envs = [script.make_env(args).env for _ in range(ACTIONS)]  # their rescaling
    for env in envs:
        env.reset(seed=0)
    walker = script.make_env(args).env
    obs, _ = walker.reset(seed=1)
    y = []
    for step in range(1, EVERY * states + 1):
        here = norm(torch.from_numpy(obs).float()[None])
        if step % EVERY == 0:
            u, _ = flow.sample(here.expand(ACTIONS, -1))
            state = simulator_state(walker)
            y.append(worth_ahead(flow, norm, envs, state, u, args.gamma, ahead))
        u, _ = flow.sample(here)
        obs, _, terminated, truncated, _ = walker.step(np.tanh(u[0].numpy()))
        if terminated or truncated:
            obs, _ = walker.reset()
    y = torch.stack(y, dim=1)
    return y - y.mean(-1, keepdim=True)


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    ahead = tuple(sorted({1, *options.ahead}))
    try:
        saved = load_file("run", options.run, script.__name__)
        y = differences(saved, options.states, ahead)
    except Exception as error:
        return explain(error)
    for n, y_n in zip(ahead, y, strict=True):
        slope = (y[0] * y_n).sum() / y[0].square().sum()
        print(
            f"{n} ahead: standard deviation {y_n.std(-1).mean():.2g}, "
            f"slope {slope:.2f}, correlation {correlation(y[0], y_n):.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
