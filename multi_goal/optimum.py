"""The soft-optimal policy of the multi-goal world, by value iteration on a grid.

    python -m multi_goal.optimum

V(s) <- alpha log int exp((r(s,a) + gamma V(s')) / alpha) da, the integral as a midpoint
sum, V between grid points linear: what maximum-entropy methods would learn in the end.
Prints V at the origin, and where walks of this policy from the origin end.
"""

import sys
from dataclasses import dataclass

import numpy as np
import tyro
from scipy.ndimage import map_coordinates
from scipy.special import logsumexp

from multi_goal import TIME_LIMIT, WALL, move
from multi_goal.figure import action_cells, count_goals


@dataclass
class Options:
    alpha: float = 2.5
    """temperature"""
    gamma: float = 0.9
    """discount factor"""
    points: int = 57
    """grid points along each axis of the plane"""
    cells: int = 31
    """cells along each axis of the action"""
    walks: int = 200
    """walks from the origin"""
    seed: int = 0
    """of the walks"""


def soft_q(value: np.ndarray, position: np.ndarray, actions: np.ndarray, gamma: float):
    """Q (B, M) of M actions at positions (B, 2); value (points, points)."""
    pairs = np.broadcast_arrays(position[:, None], actions)
    after, reward, arrived = move(*pairs)
    index = (after + WALL) / (2 * WALL) * (len(value) - 1)
    future = map_coordinates(value, index.reshape(-1, 2).T, order=1)
    return reward + gamma * np.where(arrived, 0.0, future.reshape(reward.shape))


def soft_value(options: Options, actions: np.ndarray) -> np.ndarray:
    """V on the grid, (points, points): first axis x, second y."""
    axis = np.linspace(-WALL, WALL, options.points, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    cell = (2 / options.cells) ** 2  # area
    alpha, value = options.alpha, np.zeros((options.points, options.points))
    while True:
        q = soft_q(value, grid, actions, options.gamma)
        new = alpha * (logsumexp(q / alpha, axis=1) + np.log(cell)).reshape(value.shape)
        if np.abs(new - value).max() < 1e-3:
            return new
        value = new


def walk(options: Options, value: np.ndarray, actions: np.ndarray) -> list[np.ndarray]:
    """Walks from the origin, each (T + 1, 2), with a ~ exp(Q(s,a) / alpha)."""
    rng = np.random.default_rng(options.seed)
    walks = []
    for _ in range(options.walks):
        positions, arrived = [np.zeros(2, np.float32)], False
        while not arrived and len(positions) <= TIME_LIMIT:
            q = soft_q(value, positions[-1][None], actions, options.gamma)[0]
            best = np.argmax(q / options.alpha + rng.gumbel(size=len(q)))
            position, _, arrived = move(positions[-1], actions[best])
            positions.append(position)
        walks.append(np.stack(positions))
    return walks


def main() -> int:
    options = tyro.cli(Options, description=__doc__.split("\n\n")[0])
    actions = action_cells(options.cells).numpy()
    value = soft_value(options, actions)
    walks = walk(options, value, actions)
    middle = options.points // 2
    print(f"V at the origin: {value[middle, middle]:.2f}")
    counts = ", ".join(map(str, count_goals(walks)))
    print(f"walks that end east, west, north, south, nowhere: {counts}")
    length = np.mean([len(positions) - 1 for positions in walks])
    print(f"mean length: {length:.1f} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
