"""Runs the MEow authors' own code on HalfCheetah-v4, measured like ours.

    git clone https://github.com/ChienFeng-hub/meow && git -C meow checkout b786d27
    python studies/two_gaits/authors_code.py --repository meow --seed 1 --out 1.csv

Needs an environment of its own: torch 2.13.0, gymnasium 0.29.1, mujoco 2.3.7, numpy <
2, stable-baselines3 2.3.2, tyro, tensorboard. For the physics of ours put mujoco 4.0.0
before it, with DIR in PYTHONPATH:

    pip install --target DIR --no-deps mujoco==4.0.0 mujoco-core==4.0.0

Their script is imported and not changed, but for two names: `RescaleAction` leaves
vector environments alone (it can't wrap them, and these actions lie in [-1, 1]
already), and `evaluate`, on the same ten seeds as theirs, writes what it measures.
`--compile` replaces three more.
"""

import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

BACK_THIGH, SECONDS_PER_STEP, FIRST, LAST = 2, 0.05, 200, 1000


@dataclass
class Options:
    repository: Path
    """clone of github.com/ChienFeng-hub/meow"""
    out: Path
    """csv file to write: step,return,stride"""
    seed: int = 1
    """seed of their run"""
    total_timesteps: int = 90_000
    """environment steps"""
    compile: bool = False
    """compile their Q and V, fuse their Adam: the same arithmetic and random numbers,
    rounded otherwise (an update on one thread of an AMD EPYC: 19 ms instead of 27)"""


def stride_frequency(angles: np.ndarray) -> float:
    """As in stride.py, which needs newer packages."""
    x = angles[FIRST:LAST]
    power = np.abs(np.fft.rfft(x - x.mean())) ** 2
    return float(np.fft.rfftfreq(len(x), SECONDS_PER_STEP)[power.argmax()])


def make_evaluate(file):
    """Their `evaluate`, which also writes a row; called every 10,000 steps."""
    step = 10_000  # learning starts here; the first evaluation is 10,000 steps later

    @torch.no_grad()
    def evaluate(envs, policy, deterministic=True, device="cpu"):  # noqa: ARG001 (their signature)
        nonlocal step
        step += 10_000
        policy.eval()
        obs, _ = envs.reset(seed=range(envs.num_envs))
        returns, angles = np.zeros(envs.num_envs), []
        for _ in range(1000):  # the length of every episode
            angles.append(obs[:, BACK_THIGH])
            action, _ = policy.sample(
                envs.num_envs, obs=obs, deterministic=deterministic
            )
            obs, reward, *_ = envs.step(action.numpy())
            returns += reward
        stride = np.median(
            [stride_frequency(episode) for episode in np.array(angles).T]
        )
        file.write(f"{step},{returns.mean():.1f},{stride:.3f}\n")
        return returns.mean()

    return evaluate


def main():
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    torch.set_num_threads(1)
    sys.path.insert(0, str(options.repository / "cleanrl" / "cleanrl"))
    import gymnasium as gym

    import meow_continuous_action as theirs

    rescale, vector = gym.wrappers.RescaleAction, gym.vector.VectorEnv
    gym.wrappers.RescaleAction = lambda env, **bounds: (
        env if isinstance(env, vector) else rescale(env, **bounds)
    )
    if options.compile:
        torch._inductor.config.fallback_random = True  # eager PyTorch's dropout masks
        for name in ("get_v", "get_qv"):
            setattr(
                theirs.FlowPolicy, name, torch.compile(getattr(theirs.FlowPolicy, name))
            )
        theirs.optim.Adam = functools.partial(torch.optim.Adam, fused=True)
    with (
        open(options.out, "x", buffering=1) as file,
        tempfile.TemporaryDirectory() as folder,
    ):
        file.write("step,return,stride\n")
        theirs.evaluate = make_evaluate(file)
        settings = dict(
            env_id="HalfCheetah-v4", tau=0.003, alpha=0.25, learning_starts=10_000
        )
        settings |= dict(
            sigma_max=2.0, sigma_min=-5.0, deterministic_action=True, cuda=False
        )
        steps = (
            options.total_timesteps + 1
        )  # their evaluation falls after a step's update
        theirs.train(
            theirs.Args(
                seed=options.seed, total_timesteps=steps, description=folder, **settings
            )
        )


if __name__ == "__main__":
    main()
