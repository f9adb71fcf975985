"""TD3, DDPG, PPO and SAC of Stable-Baselines3, measured like our own scripts.

    python sb3_baselines.py --algo td3 --env-id HalfCheetah-v4           # or ddpg, ppo, sac
    python sb3_baselines.py --resume runs/<run_name>                     # go on exactly
    python sb3_baselines.py --evaluate runs/<run_name> --capture-video

Algorithms and training loop are theirs (`model.learn`), with the settings of RL Baselines3 Zoo;
environments, seeds, evaluation, options and files are ours. What differs from their own runs:
B1  Each training episode starts from its own seed, so that a resumed run can play it again.
B2  Observations are float32 from the start; theirs stores MuJoCo's float64 and rounds later.
B3  PPO stops at exactly --total-timesteps, even within a rollout, which is then not learned from.
"""

import io
import sys
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from harness.envs import EvaluationEnvs, Evaluator, TrainingEnv

from harness.args import RunArgs
from harness.runs import Run, main

try:
    import stable_baselines3 as sb3
    from stable_baselines3.common import callbacks, logger, noise, save_util, vec_env
except ModuleNotFoundError as error:
    print(f'error: {error.name} is missing: pip install ".[bench]"', file=sys.stderr)
    sys.exit(2)

# --- Settings -------------------------------------------------------------------------------------
# From hyperparams/*.yml of RL Baselines3 Zoo 2.9.2, these tasks' v4; what SB3 defaults to is left
# out. (The package rl_zoo3 has the files, but needs 30 more packages that nothing else here does.)
PPO_COLUMNS = (
    "n_steps batch_size gamma learning_rate ent_coef clip_range n_epochs gae_lambda"
)
PPO_COLUMNS += " max_grad_norm vf_coef policy_kwargs"
LARGE = dict(
    log_std_init=-2, ortho_init=False, activation_fn=torch.nn.ReLU, net_arch=[256, 256]
)
PPO_TUNED = {
    "Hopper": (
        512,
        32,
        0.999,
        9.80828e-5,
        0.00229519,
        0.2,
        5,
        0.99,
        0.7,
        0.835671,
        LARGE,
    ),
    "HalfCheetah": (
        512,
        64,
        0.98,
        2.0633e-5,
        0.000401762,
        0.1,
        20,
        0.92,
        0.8,
        0.58096,
        LARGE,
    ),
    "Walker2d": (
        512,
        32,
        0.99,
        5.05041e-5,
        0.000585045,
        0.1,
        20,
        0.95,
        1,
        0.871923,
        {},
    ),
    "Ant": (),
    "Humanoid": (
        512,
        256,
        0.95,
        3.56987e-5,
        0.00238306,
        0.3,
        5,
        0.9,
        2,
        0.431892,
        LARGE,
    ),
}
ZOO = {"td3": {}, "ddpg": {}, "ppo": {}, "sac": {}}
for task, row in PPO_TUNED.items():
    ZOO["td3"][task] = ZOO["ddpg"][task] = dict(learning_starts=10_000, noise_std=0.1)
    ZOO["ppo"][task] = dict(
        zip(PPO_COLUMNS.split(), row, strict=bool(row)), normalize=True
    )
    ZOO["sac"][task] = dict(learning_starts=10_000)


@dataclass
class Args(RunArgs):
    algo: Literal["td3", "ddpg", "ppo", "sac"] = "td3"  # algorithm of Stable-Baselines3
    exp_name: str = (
        "sb3_td3"  # name of the experiment; by default sb3_ and the algorithm
    )
    compile: bool = False  # not possible here

    def __post_init__(self):
        super().__post_init__()
        if self.exp_name in [f"sb3_{algo}" for algo in ZOO]:
            self.exp_name = f"sb3_{self.algo}"
        self.check("compile", lambda x: not x, "off: Stable-Baselines3 doesn't compile")
        if not self.deterministic_eval and self.algo in ("td3", "ddpg"):
            raise ValueError(
                f"--no-deterministic-eval: the policy of {self.algo} is deterministic"
            )

    def zoo_settings(self) -> dict:
        """The Zoo's entry, whose v4 serves v5 too; empty where it has none: SB3's defaults."""
        task, _, version = self.env_id.rpartition("-v")
        return ZOO[self.algo].get(task, {}) if version in ("4", "5") else {}


# --- Environment, model and policy ----------------------------------------------------------------
class Env(gym.Env):
    """The training environment for SB3, with actions in the units in which the Zoo tuned PPO."""

    def __init__(self, training: TrainingEnv):
        self.training = training
        own = training.env.env.action_space  # below the rescaling to [-1, 1]
        half = (own.high / 2 - own.low / 2).astype(np.float32)  # Humanoid: 0.4
        self.action_space = gym.spaces.Box(-half, half)
        self.observation_space = gym.spaces.Box(
            -np.inf, np.inf, (training.obs_dim,), np.float32
        )

    def reset(self, **_options):
        return self.training.obs, {}  # its episodes start by themselves  # B1

    def step(self, action: np.ndarray):
        unit = np.clip(action / self.action_space.high, -1, 1)
        _, _, obs, reward, terminated = self.training.step(unit)
        ended = not self.training.actions  # there are none yet in the next episode
        return obs, reward, terminated, ended and not terminated, {}


class Normalizer(vec_env.VecNormalize):
    """SB3's normalisation of observations and rewards; saves its statistics as tensors."""

    names = "obs_rms.mean obs_rms.var obs_rms.count ret_rms.mean ret_rms.var ret_rms.count returns"

    def state_dict(self) -> dict:
        values = {
            name: save_util.recursive_getattr(self, name) for name in self.names.split()
        }
        return {
            name: torch.as_tensor(x, dtype=torch.float64) for name, x in values.items()
        }

    def load_state_dict(self, state: dict):
        for name, value in state.items():
            save_util.recursive_setattr(self, name, value.numpy())


def make_model(args: Args, training: TrainingEnv, device, saved: dict | None = None):
    """SB3's model with the Zoo's settings or as it was saved, and what of it a policy holds."""
    settings = dict(args.zoo_settings())
    env, parts = vec_env.DummyVecEnv([lambda: Env(training)]), {}
    if settings.pop("normalize", False):
        env = parts["normalizer"] = Normalizer(env, gamma=settings.get("gamma", 0.99))
    if std := settings.pop("noise_std", None):
        settings["action_noise"] = noise.NormalActionNoise(
            np.zeros(training.act_dim), std
        )
    algorithm = getattr(sb3, args.algo.upper())
    model = algorithm("MlpPolicy", env, seed=args.seed, device=device, **settings)
    model.set_logger(logger.Logger(None, []))
    if (
        saved and "model" in saved
    ):  # a checkpoint: this unpickles, so resume only what you trust
        file = io.BytesIO(saved["model"].numpy().tobytes())
        model = algorithm.load(file, env, device, force_reset=False)
    parts["policy"] = model.policy
    for name, part in parts.items() if saved else ():
        part.load_state_dict(saved[name])
    return model, parts


def make_evaluator(args: Args, model) -> Evaluator:
    """Evaluation of SB3's `predict`."""
    normalizer = model.get_vec_normalize_env()

    def policy(obs: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        obs = normalizer.normalize_obs(obs.numpy()) if normalizer else obs.numpy()
        with (
            torch.random.fork_rng()
        ):  # SB3 draws from the generator that training goes on with
            torch.manual_seed(int(z.numpy().view(np.uint32)[0, 0]))
            action, _ = model.predict(obs, deterministic=args.deterministic_eval)
        return torch.from_numpy(action / model.action_space.high)

    return Evaluator(args, EvaluationEnvs(args), policy)


# --- Training -------------------------------------------------------------------------------------
class RunCallback(callbacks.BaseCallback):
    """Tells the run of SB3's steps, and is the part of its checkpoints that holds SB3's state.

    A step ends when SB3 has learned from it, as the next rollout begins; within PPO's rollouts at
    once. There a checkpoint is of the rollout's beginning: a resumed run plays it again, unlogged.
    """

    def __init__(self, run: Run, env: TrainingEnv, model, parts: dict):
        super().__init__()
        self.run, self.env, self.model, self.parts = (
            run,
            env,
            model,
            parts | {"env": env},
        )
        self.replay = getattr(model, "replay_buffer", None)  # PPO has none

    def _on_rollout_start(self):
        self.began = None  # what the last rollout left
        self.began = None if self.replay else self.state_dict()
        self._end_step()

    def _on_step(self) -> bool:
        if (
            not self.replay and self.num_timesteps % self.model.n_steps
        ):  # within PPO's rollout
            self._end_step()
        return self.run.step < self.run.args.total_timesteps  # B3

    def _end_step(self):
        losses = self.logger.name_to_value.items()
        if self.model.num_timesteps > self.run.step:
            self.run.log({k.replace("train/", "losses/"): float(x) for k, x in losses})
        else:
            self.env.episode_metrics(False)  # logged before

    def state_dict(self) -> dict:
        if self.began:
            return self.began
        file, (kind, keys, *position) = io.BytesIO(), np.random.get_state()
        self.model.save(file, include=["_logger", "_custom_logger"])
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {
            "numpy_rng": (kind, keys.tolist(), *position),
            "torch_rng": torch.get_rng_state(),
        }
        state["model"] = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        if self.replay:  # SB3 would save its empty rows too
            state["position"], rows = (
                (self.replay.pos, self.replay.full),
                self.replay.size(),
            )
            arrays = {
                k: x for k, x in vars(self.replay).items() if isinstance(x, np.ndarray)
            }
            state["rows"] = {k: torch.from_numpy(x[:rows]) for k, x in arrays.items()}
        return state

    def load_state_dict(self, state: dict):
        self.env.load_state_dict(state["env"])
        np.random.set_state(state["numpy_rng"])
        torch.set_rng_state(state["torch_rng"])
        if self.replay:
            self.replay.pos, self.replay.full = state["position"]
            for name, rows in state["rows"].items():
                getattr(self.replay, name)[: len(rows)] = rows.numpy()


def train(args: Args, run: Run):
    """SB3's `learn`, from the run's checkpoint if it has one."""
    torch.distributions.Distribution.set_default_validate_args(
        False
    )  # NaN: the run says where
    env = TrainingEnv(args.env_id, args.seed)
    model, parts = make_model(
        args, env, run.device, run.checkpoint and run.checkpoint["sb3"]
    )
    callback, evaluator = (
        RunCallback(run, env, model, parts),
        make_evaluator(args, model),
    )
    run.start(env, evaluator, parts, model.action_space.np_random, sb3=callback)
    if not args.env_id.endswith("-v4") or not args.zoo_settings():
        used = (
            "those of its v4" if args.zoo_settings() else "Stable-Baselines3's defaults"
        )
        print(
            f"note: the Zoo has no {args.algo} settings for it: {used}", file=sys.stderr
        )
    next(run.steps())  # from here on a signal ends the run after a step
    steps = args.total_timesteps - model.num_timesteps
    model.learn(steps, callback, log_interval=None, reset_num_timesteps=False)
    callback.on_rollout_start()  # ends the last step


def load_evaluator(args: Args, saved: dict) -> Evaluator:
    """Evaluation of a saved policy."""
    model, _ = make_model(args, TrainingEnv(args.env_id, args.seed), "cpu", saved)
    return make_evaluator(args, model)


if __name__ == "__main__":
    sys.exit(main(Args, train, load_evaluator))
