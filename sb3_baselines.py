# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium==1.4.0",
#   "mujoco==4.0.0",
#   "numpy>=2.0,<3",
#   "tyro>=1.0.17",
#   "wandb>=0.26",
#   "tqdm>=4.66",
#   "psutil>=5.9",
#   "tensorboard>=2.18",
#   "imageio[ffmpeg]>=2.34",
#   "stable-baselines3==2.9.2",
# ]
# ///
"""TD3, DDPG, PPO and SAC of Stable-Baselines3, measured like our own scripts.

    python sb3_baselines.py --algo td3 --env-id HalfCheetah-v4  # or ddpg, ppo, sac
    python sb3_baselines.py --resume runs/<run_name>            # go on
    python sb3_baselines.py --evaluate runs/<run_name> --capture-video

Algorithms and training loop are theirs (`model.learn`), with the settings of RL
Baselines3 Zoo; environments, seeds, evaluation, options and files are ours. What
differs from their own runs:
B1  Each training episode starts from its own seed, so that a resumed run can play it
    again.
B2  Observations are float32 from the start; theirs stores MuJoCo's float64 and rounds
    later.
B3  PPO stops at exactly --total-timesteps, even within a rollout, which is then not
    learned from.
"""

import copy
import io
import json
import sys
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch

from harness import environments
from harness.args import RunArgs
from harness.errors import say
from harness.runs import Run, Session, main

try:
    import stable_baselines3 as sb3
    from stable_baselines3.common import callbacks, logger, noise, save_util, vec_env
except ModuleNotFoundError as error:
    print(f'error: {error.name} is missing: pip install ".[bench]"', file=sys.stderr)
    sys.exit(2)

# --- Settings -------------------------------------------------------------------------
# From hyperparams/*.yml of RL Baselines3 Zoo 2.9.2, these tasks' v4; what SB3 defaults
# to is left out. (The package rl_zoo3 has the files, but needs 30 more packages that
# nothing else here does.) `make_model` takes `normalize` and `noise_std` out of them.
ACTION_NOISE = dict(learning_starts=10_000, noise_std=0.1)  # of TD3 and DDPG
LARGE = dict(
    log_std_init=-2, ortho_init=False, activation_fn=torch.nn.ReLU, net_arch=[256, 256]
)
ZOO = {
    "td3": {
        "Hopper": ACTION_NOISE,
        "HalfCheetah": ACTION_NOISE,
        "Walker2d": ACTION_NOISE,
        "Ant": ACTION_NOISE,
        "Humanoid": ACTION_NOISE,
    },
    "ddpg": {
        "Hopper": ACTION_NOISE,
        "HalfCheetah": ACTION_NOISE,
        "Walker2d": ACTION_NOISE,
        "Ant": ACTION_NOISE,
        "Humanoid": ACTION_NOISE,
    },
    "sac": {
        "Hopper": dict(learning_starts=10_000),
        "HalfCheetah": dict(learning_starts=10_000),
        "Walker2d": dict(learning_starts=10_000),
        "Ant": dict(learning_starts=10_000),
        "Humanoid": dict(learning_starts=10_000),
    },
    "ppo": {
        "Hopper": dict(
            normalize=True,
            n_steps=512,
            batch_size=32,
            gamma=0.999,
            learning_rate=9.80828e-5,
            ent_coef=0.00229519,
            clip_range=0.2,
            n_epochs=5,
            gae_lambda=0.99,
            max_grad_norm=0.7,
            vf_coef=0.835671,
            policy_kwargs=LARGE,
        ),
        "HalfCheetah": dict(
            normalize=True,
            n_steps=512,
            batch_size=64,
            gamma=0.98,
            learning_rate=2.0633e-5,
            ent_coef=0.000401762,
            clip_range=0.1,
            n_epochs=20,
            gae_lambda=0.92,
            max_grad_norm=0.8,
            vf_coef=0.58096,
            policy_kwargs=LARGE,
        ),
        "Walker2d": dict(
            normalize=True,
            n_steps=512,
            batch_size=32,
            gamma=0.99,
            learning_rate=5.05041e-5,
            ent_coef=0.000585045,
            clip_range=0.1,
            n_epochs=20,
            gae_lambda=0.95,
            max_grad_norm=1,
            vf_coef=0.871923,
        ),
        "Ant": dict(normalize=True),
        "Humanoid": dict(
            normalize=True,
            n_steps=512,
            batch_size=256,
            gamma=0.95,
            learning_rate=3.56987e-5,
            ent_coef=0.00238306,
            clip_range=0.3,
            n_epochs=5,
            gae_lambda=0.9,
            max_grad_norm=2,
            vf_coef=0.431892,
            policy_kwargs=LARGE,
        ),
    },
}


@dataclass
class Args(RunArgs):
    algo: Literal["td3", "ddpg", "ppo", "sac"] = "td3"  # algorithm of Stable-Baselines3
    exp_name: str = "sb3_td3"  # name of the experiment (default: sb3_ and algorithm)
    compile: bool = False  # not possible here

    # Environment and evaluation
    env_kwargs: str = "{}"  # arguments of its constructor, as a JSON object
    flatten: bool = False  # flatten dictionaries and images to one vector
    max_episode_steps: int | None = None  # cap (default: the environment's, or 100,000)
    eval_frequency: int = 10_000  # steps between evaluations; the last step has one too
    eval_episodes: int = 10  # per evaluation, each time with fresh seeds (0: none)
    eval_envs: int = 10  # environments that play them at a time; returns are the same
    deterministic_eval: bool = True  # evaluate the policy's mode, else draw from it

    resume_may_change = RunArgs.resume_may_change + " eval_envs"
    evaluate_may_change = (
        RunArgs.evaluate_may_change
        + " eval_episodes eval_envs deterministic_eval max_episode_steps"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.exp_name in [f"sb3_{algo}" for algo in ZOO]:
            self.exp_name = f"sb3_{self.algo}"
        environments.json_object("--env-kwargs", self.env_kwargs)
        self.check("eval_frequency eval_envs", lambda x: x >= 1, "at least 1")
        self.check("eval_episodes", lambda x: x >= 0, "at least 0")
        if self.max_episode_steps is not None:
            self.check("max_episode_steps", lambda x: x >= 1, "at least 1")
        self.check("compile", lambda x: not x, "off: Stable-Baselines3 doesn't compile")
        if not self.deterministic_eval and self.algo in ("td3", "ddpg"):
            text = f"the policy of {self.algo} is deterministic"
            raise ValueError(f"--no-deterministic-eval: {text}")

    def zoo_settings(self) -> dict:
        """The Zoo's entry, whose v4 serves v5 too; empty where it has none."""
        task, _, version = self.env_id.rpartition("-v")
        if version not in ("4", "5"):
            return {}
        return ZOO[self.algo].get(task, {})

    def describe(self) -> str:
        """What is about to be trained."""
        if not self.zoo_settings():
            settings = "Stable-Baselines3's defaults: the Zoo has none for it"
        elif self.env_id.endswith("-v4"):
            settings = "the Zoo's settings"
        else:
            settings = "the Zoo's settings of its v4"
        algorithm = f"{self.algo.upper()} of Stable-Baselines3 (--algo {self.algo})"
        return f"{algorithm} on {self.env_id} with {settings}"


# --- Environment and evaluation -------------------------------------------------------
TRAINING, EVALUATION, NOISE = 0, 1, 2  # what a seed is for


def episode_seed(*key: int) -> int:
    """A seed below 2^31 from several numbers: the run's seed, its use, the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) % 2**31


def make_env(args: Args, render: bool = False) -> environments.ReplayableEnv:
    """The environment with actions in [-1, 1] and a time limit. Raises: UsageError."""
    options = json.loads(args.env_kwargs)
    env = environments.make(args.env_id, options, render)  # gym.make
    if args.flatten:
        env = environments.flatten(env, args.env_id)  # Gymnasium's wrapper
    own_limit = gym.spec(args.env_id.rpartition(":")[2]).max_episode_steps
    limit = args.max_episode_steps or own_limit or 100_000
    env = gym.wrappers.TimeLimit(env, limit)
    env = environments.check_spaces(env, args.env_id)
    one = env.action_space.dtype.type(1)
    env = gym.wrappers.RescaleAction(env, -one, one)
    return environments.ReplayableEnv(env, args.env_id)


def make_eval_envs(args: Args, session: Session) -> list[environments.ReplayableEnv]:
    """The environments that play an evaluation; the first one can be filmed."""
    count = min(args.eval_envs, args.eval_episodes)
    renders = [args.capture_video and i == 0 for i in range(count)]
    return [session.closing(make_env(args, render)) for render in renders]


def evaluate(
    args: Args,
    envs: list[environments.ReplayableEnv],
    policy,
    step: int,
    session: Session,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of --eval-episodes new episodes: --seed and `step` seed them.

    policy(obs (n, S), z (n, A)) -> actions (n, A). Episode i is row i, whichever of
    `envs` plays it, so that the returns don't depend on their number.
    """
    n = args.eval_episodes
    returns, lengths = [0.0] * n, [0] * n
    if n == 0:
        return returns, lengths
    obs = np.zeros((n, *envs[0].observation_space.shape), np.float32)
    z = np.zeros((n, *envs[0].action_space.shape), np.float32)
    with session.evaluation(envs[0].metadata.get("render_fps", 30)) as watch:
        for first in range(0, n, len(envs)):
            rng = np.random.default_rng(episode_seed(args.seed, NOISE, step))
            playing = dict(zip(range(first, n), envs, strict=False))
            for i, env in playing.items():
                obs[i], _ = env.reset(seed=episode_seed(args.seed, EVALUATION, step, i))
            while playing:
                watch.step(f"evaluation: episodes of {lengths} steps so far")
                if 0 in playing:
                    watch.film(envs[0])
                if not args.deterministic_eval:
                    rng.standard_normal(out=z, dtype=np.float32)
                action = policy(obs, z)
                for i, env in list(playing.items()):
                    obs[i], reward, terminated, truncated, _ = env.step(action[i])
                    returns[i] += reward
                    lengths[i] += 1
                    if terminated or truncated:
                        del playing[i]
    return returns, lengths


class ZooEnv(gym.Wrapper):
    """An environment for SB3: actions in the units in which the Zoo tuned PPO."""

    def __init__(self, env: environments.ReplayableEnv, seed: int):
        super().__init__(env)
        self.seed = seed
        own = env.env.env.action_space  # below the rescaling to [-1, 1]
        half = (own.high / 2 - own.low / 2).astype(np.float32)  # Humanoid: 0.4
        self.action_space = gym.spaces.Box(-half, half)
        shape = env.observation_space.shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)

    def reset(self, *, seed=None, options=None):
        """Each episode has a seed of its own, whatever SB3 asks for.  # B1"""
        seed = episode_seed(self.seed, TRAINING, self.env.episode_count)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        return self.env.step(np.clip(action / self.action_space.high, -1, 1))


# --- Model and policy -----------------------------------------------------------------
class Normalizer(vec_env.VecNormalize):
    """SB3's normalisation of observations and rewards, with its state as tensors."""

    names = (
        "obs_rms.mean obs_rms.var obs_rms.count "
        "ret_rms.mean ret_rms.var ret_rms.count returns"
    )

    def state_dict(self) -> dict:
        state = {}
        for name in self.names.split():
            value = save_util.recursive_getattr(self, name)
            state[name] = torch.as_tensor(value, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict):
        for name, value in state.items():
            save_util.recursive_setattr(self, name, value.numpy())


def make_model(
    args: Args, env: environments.ReplayableEnv, device, saved: dict | None = None
):
    """SB3's model, and by name what of it a policy holds.

    With the Zoo's settings, or as it was saved: in a checkpoint or as a policy.
    """
    settings = dict(args.zoo_settings())
    venv, parts = vec_env.DummyVecEnv([lambda: ZooEnv(env, args.seed)]), {}
    if settings.pop("normalize", False):
        venv = Normalizer(venv, gamma=settings.get("gamma", 0.99))
        parts["normalizer"] = venv
    if std := settings.pop("noise_std", None):
        mean = np.zeros(env.action_space.shape)
        settings["action_noise"] = noise.NormalActionNoise(mean, std)
    algorithm = getattr(sb3, args.algo.upper())
    model = algorithm("MlpPolicy", venv, seed=args.seed, device=device, **settings)
    model.set_logger(logger.Logger(None, []))
    if saved and "model" in saved:
        # a checkpoint: this unpickles, so resume only what you trust
        file = io.BytesIO(saved["model"].numpy().tobytes())
        model = algorithm.load(file, venv, device, force_reset=False)
    parts["policy"] = model.policy
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    return model, parts


def make_eval_policy(args: Args, model):
    """policy(obs (n, S), z (n, A)) -> actions (n, A) in [-1, 1]: SB3's `predict`.

    SB3 draws from torch's generator, with which training goes on: z seeds another.
    """
    normalizer = model.get_vec_normalize_env()

    def policy(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        if normalizer:
            obs = normalizer.normalize_obs(obs)
        with torch.random.fork_rng():
            torch.manual_seed(int(z.view(np.uint32)[0, 0]))
            action, _ = model.predict(obs, deterministic=args.deterministic_eval)
        return action / model.action_space.high

    return policy


# --- Training -------------------------------------------------------------------------
class RunCallback(callbacks.BaseCallback):
    """Tells the run of SB3's steps; holds SB3's state, as a part of its checkpoints.

    A step ends when SB3 has learned from it, as the next rollout begins; within PPO's
    rollouts at once. There a checkpoint is of the rollout's beginning: a resumed run
    plays it again, unlogged. evaluate_now(): evaluates the policy and logs that.
    """

    def __init__(self, run: Run, env, model, parts: dict, evaluate_now):
        super().__init__()
        self.run, self.env, self.model, self.parts = run, env, model, parts
        self.evaluate_now = evaluate_now
        self.replay = getattr(model, "replay_buffer", None)  # PPO has none
        self.rollout_began = None  # PPO's state then, within a rollout

    def _on_rollout_start(self):
        if self.replay is None:
            self.rollout_began = copy.deepcopy(self.state_dict())
        self.end_step()

    def _on_rollout_end(self):
        self.rollout_began = None

    def _on_step(self) -> bool:
        """After a step of the environment. -> whether SB3 shall go on."""
        info = self.locals["infos"][0]
        if "episode" in info and self.model.num_timesteps > self.run.step:
            self.run.log_episode(info["episode"])
        if self.replay is None:
            rollout = self.model.rollout_buffer
            if rollout.pos + 1 < rollout.buffer_size:  # this step isn't its last one
                self.end_step()
        return self.run.step < self.run.args.total_timesteps  # B3

    def end_step(self):
        """Ends a step that the run hasn't ended before, begins the next one."""
        run = self.run
        if self.model.num_timesteps > run.step:
            losses = self.logger.name_to_value.items()
            run.log({k.replace("train/", "losses/"): float(x) for k, x in losses})
            run.end_step()
        goes_on = self.model.num_timesteps == run.step < run.args.total_timesteps
        if goes_on and run.due(run.args.eval_frequency):
            self.evaluate_now()

    def state_dict(self) -> dict:
        if self.rollout_began:
            return self.rollout_began
        file = io.BytesIO()
        self.model.save(file, include=["_logger", "_custom_logger"])
        kind, keys, *position = np.random.get_state()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["env"] = self.env.state_dict()
        state["model"] = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        state["numpy_rng"] = (kind, keys.tolist(), *position)
        state["torch_rng"] = torch.get_rng_state()
        if self.replay is not None:
            state["position"] = self.replay.pos, self.replay.full
            state["rows"] = self._filled_rows()
        return state

    def _filled_rows(self) -> dict:
        """The replay buffer's arrays without the empty rows, which SB3 would save."""
        size, filled = self.replay.size(), {}
        for name, value in vars(self.replay).items():
            if isinstance(value, np.ndarray):
                filled[name] = torch.from_numpy(value[:size])
        return filled

    def load_state_dict(self, state: dict):
        """All but the model and its policy, which `make_model` loads."""
        self.env.load_state_dict(state["env"])
        venv, normalizer = self.model.get_env(), self.model.get_vec_normalize_env()
        obs = venv.unwrapped.reset()  # plays the episode again
        self.model._last_obs = normalizer.normalize_obs(obs) if normalizer else obs
        if self.replay is not None:
            self.replay.pos, self.replay.full = state["position"]
            for name, rows in state["rows"].items():
                getattr(self.replay, name)[: len(rows)] = rows.numpy()
        # last: making an environment may draw random numbers
        np.random.set_state(state["numpy_rng"])
        torch.set_rng_state(state["torch_rng"])


def train(args: Args, run: Run):
    """SB3's `learn`, from the run's checkpoint if it has one."""
    say(args.describe())
    # NaN: the run says where
    torch.distributions.Distribution.set_default_validate_args(False)
    env = run.closing(make_env(args))
    eval_envs = make_eval_envs(args, run)
    saved = None
    if run.checkpoint:
        environments.check_sizes(run.checkpoint, env.sizes, args.env_id)
        saved = run.checkpoint["sb3"]
    model, parts = make_model(args, env, run.device, saved)
    eval_policy = make_eval_policy(args, model)

    def evaluate_now():
        run.log_evaluation(*evaluate(args, eval_envs, eval_policy, run.step, run))

    callback = RunCallback(run, env, model, parts, evaluate_now)
    run.start(parts, model.action_space.np_random, env.sizes, sb3=callback)
    next(run.steps())  # from here on a signal ends the run after a step
    steps = args.total_timesteps - model.num_timesteps
    model.learn(steps, callback, log_interval=None, reset_num_timesteps=False)
    callback.end_step()  # the last one, learned from by now
    evaluate_now()


def evaluate_saved(args: Args, saved: dict, session: Session):
    """Returns and lengths of episodes with a saved policy, on the CPU."""
    envs = make_eval_envs(args, session)
    environments.check_sizes(saved, envs[0].sizes, args.env_id)
    model, _ = make_model(args, envs[0], "cpu", saved)
    policy = make_eval_policy(args, model)
    return evaluate(args, envs, policy, saved["step"], session)


if __name__ == "__main__":
    sys.exit(main(Args, train, evaluate_saved))
