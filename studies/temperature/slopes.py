"""How much actions matter at a state, and how much of it Q knows.

    python studies/temperature/slopes.py runs/RUN_NAME

At states of the final policy's own episodes, 32 actions of the policy are tried in the
simulator, each from the same state: y = r + gamma (1 - terminated) V(s') says what each
is worth, Q(s,a) what the critic believes. For runs of meow_auto_continuous_action.py
and its arms on Gymnasium's MuJoCo tasks.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import meow_auto_continuous_action as script
from harness.files import load_file, load_network
from harness.runs import explain

ACTIONS, EVERY = 32, 3  # actions tried at a state; steps between such states


@dataclass
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run"""

    states: int = 100
    """states at which actions are tried"""


def parts_of(saved: dict):
    """Of a checkpoint: flow, normalisation, settings, and the unit of its rewards.

    Raises: RunError if it is of an arm with other networks.
    """
    args = script.Args(**saved["args"])
    norm = script.RunningMeanStd(saved["sizes"][0])
    norm.load_state_dict(saved["norm"])
    flow = script.make_flow(args, *saved["sizes"])
    load_network(flow, saved, "flow")
    rewards = script.RunningMeanStd(1)
    rewards.load_state_dict(saved["rewards"])
    return flow, norm, args, float(script.reward_unit(rewards))


def simulator_state(env) -> tuple[np.ndarray, ...]:
    data = env.unwrapped.data
    return data.qpos.copy(), data.qvel.copy(), data.qacc_warmstart.copy()


def restore(env, state: tuple[np.ndarray, ...]):
    """The environment, brought to this state."""
    env.unwrapped.set_state(*state[:2])
    env.unwrapped.data.qacc_warmstart[:] = state[2]
    return env


def step_each(envs, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of actions u (n, A), one for each environment: next obs, reward, terminated."""
    outcomes = []
    for env, action in zip(envs, np.tanh(u.numpy()), strict=True):
        next_obs, reward, terminated, _, _ = env.unwrapped.step(env.action(action))
        outcomes.append((*next_obs, reward, terminated))
    outcomes = torch.from_numpy(np.array(outcomes, np.float32))
    return outcomes[:, :-2], outcomes[:, -2], outcomes[:, -1]


def worth(flow, norm, unit: float, env, state, u: Tensor, gamma: float) -> Tensor:
    """y of actions u (n, A), each from this state. -> (n,), in units."""
    envs = (restore(env, state) for _ in u)
    next_obs, reward, terminated = step_each(envs, u)
    v_next = flow.soft_values(norm(next_obs))
    return script.soft_target(reward / unit, terminated, v_next, gamma)


@torch.no_grad()
def values_of_actions(saved: dict, states: int) -> tuple[Tensor, Tensor]:
    """y and Q, (states, ACTIONS) each, in units, less their means at each state."""
    torch.manual_seed(0)
    flow, norm, args, unit = parts_of(saved)
    env = script.make_env(args).env  # its rescaling: env.action(a)
    obs, _ = env.reset(seed=0)
    y, q = [], []
    for step in range(EVERY * states):
        here = norm(torch.from_numpy(obs).float()[None])
        if step % EVERY == 0:
            state = simulator_state(env)
            many = here.expand(ACTIONS, -1)
            u, _ = flow.sample(many)
            y.append(worth(flow, norm, unit, env, state, u, args.gamma))
            q.append(flow.q_values(many, u))
            restore(env, state)
        u, _ = flow.sample(here)
        obs, _, terminated, truncated, _ = env.step(np.tanh(u[0].numpy()))
        if terminated or truncated:
            obs, _ = env.reset()
    y, q = torch.stack(y), torch.stack(q)
    return y - y.mean(1, keepdim=True), q - q.mean(1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    try:
        saved = load_file("run", options.run, script.__name__)
        y, q = values_of_actions(saved, options.states)
    except Exception as error:
        return explain(error)
    print(f"step {saved['step']}, alpha = {float(saved['alpha'][0]):.2g}")
    print(f"y: standard deviation at a state {y.std(1).mean():.2g}")
    print(f"Q: standard deviation at a state {q.std(1).mean():.2g}")
    print(f"correlation of Q and y {correlation(q, y):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
