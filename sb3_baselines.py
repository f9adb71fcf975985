"""TD3, DDPG, PPO and SAC of Stable-Baselines3, measured like our own scripts.

    python sb3_baselines.py --algo td3 --env-id HalfCheetah-v4
    python sb3_baselines.py --resume runs/<run_name>                     # go on exactly
    python sb3_baselines.py --evaluate runs/<run_name> --capture-video

Their algorithms, unchanged, with the settings of RL Baselines3 Zoo (the table `ZOO`; any other
environment gets Stable-Baselines3's defaults). Our measurement: environments, seeds, evaluation
and the files of a run are those of meow_continuous_action.py.

`advance` is SB3's `learn` cut into pieces, so that evaluations and checkpoints fall between two
steps; it ends with the same networks, bit for bit (tested). What differs from plain SB3:
- Each training episode starts from its own seed, so that a checkpoint can replay it.
- Observations are float32 from the start; SB3 stores MuJoCo's float64 and rounds in the network.
- PPO stops at exactly --total-timesteps, even within a rollout, which is then not learned from.
On a stop signal PPO first ends its rollout or reaches the next row of metrics.csv (seconds).
"""

# --- 1. Imports -----------------------------------------------------------------------------------
import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import math
import random
import signal
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn

import meow_continuous_action as meow
from meow_continuous_action import Interrupted, RunError, UsageError

try:
    from stable_baselines3 import DDPG, PPO, SAC, TD3
    from stable_baselines3.common.buffers import RolloutBuffer
    from stable_baselines3.common.logger import Logger as Recorder
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    text = f"error: the package {error.name} is missing: pip install -r requirements-benchmark.txt"
    print(text, file=sys.stderr)
    sys.exit(2)

# --- 2. Settings ----------------------------------------------------------------------------------
# RL Baselines3 Zoo 2.9.2 (github.com/DLR-RM/rl-baselines3-zoo), hyperparams/{td3,ddpg,sac,ppo}.yml,
# entries Hopper-v4 ... Humanoid-v4; one environment at a time and constant learning rates
# throughout. What isn't listed is Stable-Baselines3's default. n_timesteps is the Zoo's budget, for
# information: --total-timesteps decides.
TD3_AND_DDPG = dict(n_timesteps=1_000_000, learning_starts=10_000, learning_rate=1e-3)
TD3_AND_DDPG |= dict(batch_size=256, train_freq=1, gradient_steps=1)
TD3_AND_DDPG |= dict(noise_std=0.1, policy_kwargs=dict(net_arch=[400, 300]))  # normal noise
LARGE = dict(log_std_init=-2, ortho_init=False, activation_fn=nn.ReLU)  # else: 64 x 64, tanh
LARGE |= dict(net_arch=dict(pi=[256, 256], vf=[256, 256]))
# fmt: off
PPO_COLUMNS = ("n_timesteps", "batch_size", "gamma", "learning_rate", "ent_coef", "clip_range",
               "n_epochs", "gae_lambda", "max_grad_norm", "vf_coef", "policy_kwargs")
PPO_TUNED = {
    "Hopper":      (1e6, 32, 0.999, 9.80828e-5, 0.00229519, 0.2, 5, 0.99, 0.7, 0.835671, LARGE),
    "HalfCheetah": (1e6, 64, 0.98, 2.0633e-5, 0.000401762, 0.1, 20, 0.92, 0.8, 0.58096, LARGE),
    "Walker2d":    (1e6, 32, 0.99, 5.05041e-5, 0.000585045, 0.1, 20, 0.95, 1, 0.871923, {}),
    "Humanoid":    (1e7, 256, 0.95, 3.56987e-5, 0.00238306, 0.3, 5, 0.9, 2, 0.431892, LARGE),
}
# fmt: on
TASKS = ("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid")
ZOO = {
    "td3": {task: TD3_AND_DDPG for task in TASKS},
    "ddpg": {task: TD3_AND_DDPG for task in TASKS},
    "sac": {task: dict(n_timesteps=1_000_000, learning_starts=10_000) for task in TASKS},
    "ppo": {  # normalize: observations by running mean and variance, rewards by variance
        task: dict(zip(PPO_COLUMNS, row, strict=True), n_steps=512, normalize=True)
        for task, row in PPO_TUNED.items()
    },
}
for off_policy in ("td3", "ddpg", "sac"):
    ZOO[off_policy]["Humanoid"] = ZOO[off_policy]["Humanoid"] | dict(n_timesteps=2_000_000)
ZOO["ppo"]["Ant"] = dict(n_timesteps=1_000_000, normalize=True)  # the Zoo tunes nothing else here
ALGORITHMS = {"td3": TD3, "ddpg": DDPG, "ppo": PPO, "sac": SAC}


@dataclass
class Args:
    # Experiment
    algo: Literal["td3", "ddpg", "ppo", "sac"] = "td3"
    """algorithm of Stable-Baselines3"""
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id; flat observation, bounded continuous action; `module:Env-v0` imports module"""
    exp_name: str | None = None
    """name of the experiment, a part of the run name; by default sb3_ and the algorithm"""
    seed: int = 1
    """seed of networks, exploration, replay, training and evaluation episodes"""
    total_timesteps: int = 1_000_000
    """environment steps in all (the Zoo's: 1M; Humanoid 2M, with PPO 10M)"""
    resume: str | None = None
    """run folder or checkpoint to continue exactly; its own settings become the defaults"""
    evaluate: str | None = None
    """run folder, checkpoint or policy to play instead of training; prints each return"""

    # Evaluation and logging
    eval_frequency: int = 10_000
    """environment steps between evaluations (the last step is always evaluated)"""
    eval_episodes: int = 10
    """episodes per evaluation, in separate environments, with fresh seeds derived from --seed"""
    deterministic_eval: bool = True
    """evaluate the mean action; --no-deterministic-eval (PPO and SAC) draws from the policy"""
    log_frequency: int = 1_000
    """environment steps between rows of losses and speed in metrics.csv"""
    checkpoint_frequency: int = 50_000
    """environment steps between checkpoints (0: only when interrupted and at the end)"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    capture_video: bool = False
    """write an mp4 of the first episode of each evaluation to the run's videos/"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "meow"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""

    # Hardware and speed
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads; networks this small gain little from a second and nothing from more"""

    def __post_init__(self):
        self.exp_name = self.exp_name or f"sb3_{self.algo}"
        counts = "total_timesteps eval_frequency eval_episodes log_frequency torch_threads"
        for name in counts.split():
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "checkpoint_frequency"):
            self._check(name, 0 <= getattr(self, name) < 2**32, "from 0 to 2^32 - 1")
        if not self.deterministic_eval and self.algo in ("td3", "ddpg"):
            raise ValueError(f"--no-deterministic-eval: the policy of {self.algo} is deterministic")
        if self.resume and self.evaluate:
            raise ValueError("--resume and --evaluate exclude each other")

    def _check(self, name: str, valid: bool, allowed: str):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")


# What may differ from the checkpoint when a run goes on, and when a policy is evaluated.
RESUME_MAY_CHANGE = "resume total_timesteps checkpoint_frequency capture_video track"
RESUME_MAY_CHANGE += " wandb_project_name wandb_entity cuda torch_threads"
EVALUATE_MAY_CHANGE = "evaluate seed eval_episodes deterministic_eval capture_video torch_threads"


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """Args of the command line, and the content of the file given to --resume or --evaluate."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("algo", "resume", "evaluate"):
        peek.add_argument(f"--{name}")
    try:
        given = peek.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # an option without its value: tyro explains it below
        given = argparse.Namespace(algo=None, resume=None, evaluate=None)
    saved = content = None
    if given.resume or given.evaluate:
        find = meow.find_checkpoint if given.resume else meow.find_policy
        file = find(given.resume or given.evaluate)
        content = load_file(file)
        saved = Args(**content["args"])
    default = saved or Args(given.algo if given.algo in ALGORITHMS else Args.algo)
    try:
        args = tyro.cli(Args, default=default, description=__doc__.split("\n\n    ")[0], args=argv)
    except ValueError as error:
        raise UsageError(error) from None
    if saved:
        may_change = (RESUME_MAY_CHANGE if given.resume else EVALUATE_MAY_CHANGE).split()
        asked, stored = dataclasses.asdict(args), dataclasses.asdict(saved)
        conflicts = [k for k in asked if asked[k] != stored[k] and k not in may_change]
        if conflicts:
            named = [f"--{k.replace('_', '-')} {asked[k]} (saved: {stored[k]})" for k in conflicts]
            text = f"{file} was made with other settings: {', '.join(named)}"
            raise UsageError(f"{text}. Leave these options out.")
    return args, content


def zoo_settings(args: Args) -> dict:
    """The Zoo's entry; its v4 serves v5 too. Empty where it has none: SB3's defaults."""
    task, _, version = args.env_id.rpartition("-v")
    entry = ZOO[args.algo].get(task) if version in ("4", "5") else None
    return entry or {}


# --- 3. Environment and model ---------------------------------------------------------------------
def to_unit(action: np.ndarray, half: np.ndarray, step: int) -> np.ndarray:
    """SB3's actions (..., A) in [-half, half] to [-1, 1]. Raises: FloatingPointError if NaN."""
    if not np.isfinite(action).all():
        hint = "the last checkpoint is intact"
        raise FloatingPointError(f"the policy's action at step {step} is not finite; {hint}")
    return np.clip(action / half, -1, 1)


class Env(gym.Env):
    """meow's TrainingEnv for SB3; counts the steps and logs each episode.

    Actions run from -half to half, half the width of the environment's own range (Humanoid: 0.4):
    the units in which the Zoo tuned PPO (an asymmetric range is centred). The other algorithms
    rescale them to [-1, 1] themselves.
    """

    def __init__(self, env_id: str, seed: int):
        self.training = meow.TrainingEnv(env_id, seed)
        own = self.training.env.env.action_space  # below the rescaling
        self.half = (own.high / 2 - own.low / 2).astype(np.float32)
        self.action_space = gym.spaces.Box(-self.half, self.half)
        shape = (self.training.obs_dim,)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.steps, self.log = 0, None

    def reset(self, *, seed=None, options=None):  # noqa: ARG002 (TrainingEnv has its own seeds)
        self.training.reset(self.steps)
        return self.training.obs, {}

    def step(self, action: np.ndarray):
        action = to_unit(action, self.half, self.steps)
        obs, reward, terminated, truncated = self.training.step(action, self.steps)
        self.steps += 1
        if terminated or truncated:
            self.log(self.steps, self.training.episode_metrics())
        return obs, reward, terminated, truncated, {}


class Rollout(RolloutBuffer):
    """SB3's rollout buffer, which several calls of `collect_rollouts` fill in turn."""

    def reset(self):
        if self.full or self.pos == 0:
            super().reset()

    def compute_returns_and_advantage(self, last_values, dones):
        if self.full:
            super().compute_returns_and_advantage(last_values, dones)


def make_model(args: Args, settings: dict, env: Env):
    """SB3's model with the Zoo's settings."""
    settings = copy.deepcopy(settings)  # SB3 writes into policy_kwargs
    settings.pop("n_timesteps", None)
    venv = DummyVecEnv([lambda: env])
    if settings.pop("normalize", False):
        venv = VecNormalize(venv, gamma=settings.get("gamma", 0.99))
    if noise := settings.pop("noise_std", None):
        mean = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(mean, mean + noise)
    if args.algo == "ppo":
        settings["rollout_buffer_class"] = Rollout
    torch.set_num_threads(args.torch_threads)
    device = "cuda" if args.cuda and torch.cuda.is_available() else "cpu"
    algorithm = ALGORITHMS[args.algo]
    model = algorithm("MlpPolicy", venv, seed=args.seed, device=device, **settings)
    model.set_logger(Recorder(None, []))
    return model


def advance(model, callback, steps: int, total: int):
    """At most `steps` steps of SB3's `learn`: collects, and trains where it would."""
    if isinstance(model, PPO):
        rollout = model.rollout_buffer
        steps = min(steps, model.n_steps - rollout.pos)
        model.collect_rollouts(model.env, callback, rollout, n_rollout_steps=steps)
        if rollout.full:
            model._update_current_progress_remaining(model.num_timesteps, total)
            model.train()
            rollout.reset()
        return
    replay, noise, starts = model.replay_buffer, model.action_noise, model.learning_starts
    model.collect_rollouts(model.env, callback, model.train_freq, replay, noise, starts)
    if model.num_timesteps > starts:
        model.train(batch_size=model.batch_size, gradient_steps=model.gradient_steps)


def read_losses(model) -> dict[str, float]:
    """What SB3 recorded of its last update, e.g. losses/critic_loss."""
    recorded = model.logger.name_to_value.items()
    return {k.replace("train/", "losses/"): float(v) for k, v in recorded if "train/" in k}


@contextlib.contextmanager
def explain_divergence(model):
    """torch.distributions raises a ValueError when a network returns NaN: says so."""
    try:
        yield
    except ValueError:
        if all(p.isfinite().all() for p in model.policy.parameters()):
            raise
        text = f"the networks at step {model.num_timesteps} are not finite"
        raise FloatingPointError(f"{text}; the last checkpoint is intact") from None


def make_act(args: Args, model):
    """act(obs (n, S), z (n, A)) -> actions (n, A) in [-1, 1] for meow's Evaluator."""
    normalizer = model.get_vec_normalize_env()

    def act(obs: np.ndarray, z: np.ndarray) -> np.ndarray:
        obs = normalizer.normalize_obs(obs) if normalizer else obs
        with torch.random.fork_rng(enabled=not args.deterministic_eval):  # training's is untouched
            if not args.deterministic_eval:
                torch.manual_seed(int(z.view(np.uint32)[0, 0]))
            action = model.predict(obs, deterministic=args.deterministic_eval)[0]
        return to_unit(action, model.action_space.high, model.num_timesteps)

    return act


# --- 4. State of a run ----------------------------------------------------------------------------
FORMAT = "sb3_baselines/1"


def load_file(path: Path) -> dict:
    """Reads a checkpoint or a policy. Raises: RunError if it is damaged or of another program."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch.load itself doesn't compare the checksums
                raise zipfile.BadZipFile(damaged)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"can't read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path} was not written by this script ({FORMAT})")
    try:
        Args(**content["args"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} holds settings that this version doesn't know: {error}") from None
    return content


def buffer_arrays(model) -> tuple:
    """The replay or rollout buffer, and its arrays by name; their rows are steps."""
    buffer = model.rollout_buffer if isinstance(model, PPO) else model.replay_buffer
    return buffer, {k: v for k, v in vars(buffer).items() if isinstance(v, np.ndarray)}


def statistics(model) -> dict[str, dict]:
    """The attributes of VecNormalize's two running means and variances (none without it)."""
    norm = model.get_vec_normalize_env()
    return {"obs": vars(norm.obs_rms), "return": vars(norm.ret_rms)} if norm else {}


def policy_state(model) -> dict:
    """What acting needs, as tensors and plain numbers."""
    numbers = {
        name: {k: np.asarray(v).tolist() for k, v in attributes.items()}
        for name, attributes in statistics(model).items()
    }
    return {"policy": model.policy.state_dict(), "statistics": numbers}


def load_policy(model, saved: dict):
    """Undoes `policy_state`. Raises: RunError if the networks have other sizes."""
    try:
        model.policy.load_state_dict(saved["policy"])
    except RuntimeError:
        raise RunError("the saved networks are not of this version's settings") from None
    for name, attributes in statistics(model).items():
        attributes.update({k: np.array(v) for k, v in saved["statistics"][name].items()})


def learner_state(model) -> dict:
    """All else that SB3's model holds, without the environment, as tensors and plain numbers."""
    buffer, arrays = buffer_arrays(model)
    rows = buffer.buffer_size if buffer.full else buffer.pos
    modules, tensors = model._get_torch_save_params()  # tensors: SAC's log temperature
    parameters, norm = model.get_parameters(), model.get_vec_normalize_env()
    kind, keys, *rest = np.random.get_state()
    counters = "num_timesteps _n_updates _episode_num".split()
    return {
        "optimizers": {name: parameters[name] for name in modules if name != "policy"},
        "tensors": {name: getattr(model, name).detach() for name in tensors},
        "counters": {name: getattr(model, name) for name in counters},
        "recorded": {k: float(v) for k, v in model.logger.name_to_value.items()},
        "rows": {name: torch.from_numpy(array[:rows]) for name, array in arrays.items()},
        "position": (buffer.pos, buffer.full),
        "discounted_return": norm.returns.tolist() if norm else None,
        "python_rng": random.getstate(),
        "numpy_rng": (kind, keys.tolist(), *rest),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
        "action_rng": model.action_space.np_random.bit_generator.state,
    }


def load_learner(model, state: dict, env: Env):
    """Undoes `learner_state`; policy and environment have been restored."""
    model.set_parameters({"policy": model.policy.state_dict(), **state["optimizers"]})
    for name, value in state["tensors"].items():
        getattr(model, name).data.copy_(value)
    for name, value in state["counters"].items():
        setattr(model, name, value)
    model.logger.name_to_value.update(state["recorded"])
    buffer, arrays = buffer_arrays(model)
    for name, rows in state["rows"].items():
        arrays[name][: len(rows)] = rows.numpy()
    buffer.pos, buffer.full = state["position"]
    obs, norm = env.training.obs[None], model.get_vec_normalize_env()
    if norm:
        obs, norm.returns = norm.normalize_obs(obs), np.array(state["discounted_return"])
    model._last_obs, model._last_episode_starts = obs, np.array([not env.training.actions])
    random.setstate(state["python_rng"])
    np.random.set_state(state["numpy_rng"])
    torch.set_rng_state(state["torch_rng"])
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    model.action_space.np_random.bit_generator.state = state["action_rng"]


# --- 5. Training and evaluation -------------------------------------------------------------------
def train(args: Args, checkpoint: dict | None = None) -> dict:
    """Trains, from a checkpoint's content if given (and empties it).

    Returns {"run_dir", "step", "return_mean"}: the last evaluation's mean return.
    """
    settings = zoo_settings(args)
    env = Env(args.env_id, args.seed)
    model = make_model(args, settings, env)
    evaluator = meow.Evaluator(args, make_act(args, model))
    description = meow.describe_run(args, model.device, compiled=False)
    description["versions"]["stable_baselines3"] = importlib.metadata.version("stable_baselines3")
    description["settings"] = json.loads(json.dumps(settings, default=lambda cls: cls.__name__))
    run_dir = meow.open_run(args, description, checkpoint)
    step, best, return_mean = 0, -math.inf, math.nan

    def policy() -> dict:
        settings = dataclasses.asdict(dataclasses.replace(args, resume=None))
        return {"format": FORMAT, "args": settings, "step": step, **policy_state(model)}

    def save_checkpoint():
        content = policy() | logger.state_dict() | {"best": best, "return_mean": return_mean}
        content |= {"learner": learner_state(model), "env": env.training.state_dict()}
        meow.save_file(run_dir / "checkpoint.pt", content | {"description": description})

    logger = meow.Logger(args, run_dir, description, checkpoint)
    env.log = logger.log
    _, callback = model._setup_learn(args.total_timesteps)
    if checkpoint:
        step, best, return_mean = (checkpoint[k] for k in ("step", "best", "return_mean"))
        load_policy(model, checkpoint)
        env.training.load_state_dict(checkpoint["env"], step)
        env.steps = step
        load_learner(model, checkpoint["learner"], env)
        checkpoint.clear()  # it holds the replay buffer a second time
    print(f"{args.env_id} on {description['device']}, files in {run_dir}", file=sys.stderr)
    if not args.env_id.endswith("-v4") or not settings:
        used = "those of its v4" if settings else "Stable-Baselines3's defaults"
        print(f"note: the Zoo has no {args.algo} settings for it: {used}", file=sys.stderr)
    starts = model.n_steps if args.algo == "ppo" else model.learning_starts
    if starts >= args.total_timesteps:
        print(f"warning: nothing is learned before step {starts}", file=sys.stderr)

    frequencies = (args.log_frequency, args.eval_frequency, args.checkpoint_frequency)
    with contextlib.closing(logger), meow.StopSignals() as stop, explain_divergence(model):
        while step < args.total_timesteps:
            due_in = [f - step % f for f in frequencies if f] + [args.total_timesteps - step]
            advance(model, callback, min(due_in), args.total_timesteps)
            step = model.num_timesteps
            last = step == args.total_timesteps

            if step % args.log_frequency == 0 or last:
                logger.log(step, {"charts/SPS": logger.speed(step), **read_losses(model)})
            if step % args.eval_frequency == 0 or last:
                video = run_dir / "videos" / f"step-{step:09d}.mp4"
                evaluation = meow.evaluation_metrics(*evaluator.run(step, video))
                logger.log(step, evaluation)
                return_mean = evaluation["eval/return_mean"]
                if return_mean > best:
                    best = return_mean
                    meow.save_file(run_dir / "policy_best.pt", policy())
            logger.show(step, train=env.training.last_return, eval=return_mean)
            if last:
                meow.save_file(run_dir / "policy_final.pt", policy())
            due = args.checkpoint_frequency and step % args.checkpoint_frequency == 0
            if due or last or stop.received:
                save_checkpoint()
            if stop.received and not last:
                again = f"python {Path(sys.argv[0]).name} --resume {run_dir}"
                raise Interrupted(stop.received, f"stopped at step {step}; go on with: {again}")
    return {"run_dir": str(run_dir), "step": step, "return_mean": return_mean}


def evaluate_file(args: Args, saved: dict) -> dict:
    """`--evaluate PATH`: plays a saved policy on the CPU and prints the return of each episode."""
    file = meow.find_policy(args.evaluate)
    video_path = file.parent / "videos" / f"evaluate-{file.stem}-seed{args.seed}.mp4"
    settings = zoo_settings(args) | ({} if args.algo == "ppo" else {"buffer_size": 1})
    model = make_model(dataclasses.replace(args, cuda=False), settings, Env(args.env_id, args.seed))
    load_policy(model, saved)
    evaluator = meow.Evaluator(args, make_act(args, model))
    with explain_divergence(model):
        returns, lengths = evaluator.run(saved["step"], video_path)
    for i, (episodic_return, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {episodic_return:.2f}, length {length}")
    mode = "deterministic" if args.deterministic_eval else "stochastic"
    text = f"{len(returns)} {mode} episodes of {file} (step {saved['step']}) on {args.env_id}"
    print(f"{text}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    if args.capture_video:
        print(f"video of episode 0: {video_path}")
    return {"returns": returns, "lengths": lengths}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 (run), 2 (usage) or 128 + signal."""
    try:
        args, saved = parse_args(argv)
        evaluate_file(args, saved) if args.evaluate else train(args, saved)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UsageError, RunError, FloatingPointError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
