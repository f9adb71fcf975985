"""The multi-goal world of the soft Q-learning and MEow papers.

    python meow_continuous_action.py --env-id multi_goal:MultiGoal-v0   # or sac_, sql_
    python -m multi_goal.figure --run runs/RUN_A runs/RUN_B --out results

A point walks to one of four goals. Importing this package registers `MultiGoal-v0`, and
two worlds with two of its goals each, whose Q-functions
`sql_continuous_action.py --compose` can join.
"""

import gymnasium as gym
import numpy as np

GOALS = np.float32([(5, 0), (-5, 0), (0, 5), (0, -5)])
WALL = 7.0  # the world is [-WALL, WALL]^2
RADIUS = 1.0  # closer than this to a goal, the episode ends
# Steps. MEow's authors cut after 1000, softlearning after about 30. A learned policy
# takes 10 to 30; with 1000, one that is stuck spends a quarter of the 4,000 training
# steps in one place.
TIME_LIMIT = 100


def distances(position: np.ndarray, goals: np.ndarray = GOALS) -> np.ndarray:
    """Distance to each of the G goals (G, 2). (..., 2) -> (..., G)."""
    return np.linalg.norm(position[..., None, :] - goals.astype(np.float64), axis=-1)


def move(
    position: np.ndarray, action: np.ndarray, goals: np.ndarray = GOALS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step: new position (..., 2) in float32, reward (...), whether it ends there.

    Actions are clipped to [-1, 1], positions to the walls. Reward: -30 |a|^2 - d^2,
    where d is the distance from the new position to the nearest goal, and 10 more on
    arrival (d < 1).
    """
    action = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
    position = np.clip(position + action, -WALL, WALL).astype(np.float32)
    nearest = distances(position, goals).min(-1)
    arrived = nearest < RADIUS
    effort = 30.0 * np.square(action, dtype=np.float64).sum(-1)
    return position, 10.0 * arrived - effort - nearest**2, arrived


class MultiGoalEnv(gym.Env):
    """A point that moves by its action, a velocity, and observes its position."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-WALL, WALL, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(
        self, render_mode: str | None = None, goals: tuple[int, ...] = (0, 1, 2, 3)
    ):
        if render_mode not in (None, "rgb_array"):
            text = f"render_mode {render_mode!r}: only 'rgb_array' is supported"
            raise ValueError(text)
        self.render_mode, self.state = render_mode, np.zeros(2, np.float32)
        self.goals = GOALS[list(goals)]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts at N(0, 0.1^2 I), or at the position `options["state"]`."""
        super().reset(seed=seed)
        start = (options or {}).get("state", 0.1 * self.np_random.standard_normal(2))
        self.state = np.clip(np.reshape(start, 2), -WALL, WALL).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action: np.ndarray):
        action = np.reshape(action, 2)
        self.state, reward, arrived = move(self.state, action, self.goals)
        return self.state.copy(), float(reward), bool(arrived), False, {}

    def render(self) -> np.ndarray | None:
        """Goals with their radius, and the point. (280, 280, 3): 20 pixels a unit."""
        if self.render_mode is None:
            return None
        axis = (np.arange(280) + 0.5) / 20 - WALL
        pixels = np.stack(np.meshgrid(axis, -axis), axis=-1)  # (280, 280, 2)
        nearest = distances(pixels, self.goals).min(-1)
        image = np.full((280, 280, 3), 255, np.uint8)
        image[nearest < RADIUS] = (255, 214, 214)
        image[nearest < 0.15] = (214, 39, 40)
        image[np.linalg.norm(pixels - self.state, axis=-1) < 0.25] = (31, 119, 180)
        return image


def register(name: str, goals: tuple[int, ...]):
    options = {"max_episode_steps": TIME_LIMIT, "kwargs": {"goals": goals}}
    gym.register(name, "multi_goal:MultiGoalEnv", **options)


register("MultiGoal-v0", (0, 1, 2, 3))
# two tasks to compose: they share the goal in the east
register("MultiGoalNorthEast-v0", (0, 2))
register("MultiGoalSouthEast-v0", (0, 3))
