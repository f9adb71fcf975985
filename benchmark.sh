#!/usr/bin/env bash
# The experiments, one a line: take lines in and out as you like. The same command again
# skips finished runs and goes on with the others. Further options go to the end, where
# the last one of a name counts:
#
#     ./benchmark.sh --dry-run
#     ./benchmark.sh --env-ids Hopper-v4 --seeds 1-3 --total-timesteps 300000
#     ./benchmark.sh --slurm --slurm-options partition=gpu gres=gpu:1 time=24:00:00
#     ./benchmark.sh --help

envs=(Hopper-v4 HalfCheetah-v4 Walker2d-v4 Ant-v4 Humanoid-v4) # the paper's

experiments=(
  "meow_continuous_action.py"
  "sac_continuous_action.py"

  # More baselines:
  # "sql_continuous_action.py"
  # "sb3_baselines.py --algo td3"
  # "sb3_baselines.py --algo ddpg"
  # "sb3_baselines.py --algo ppo"
  # "sb3_baselines.py --algo sac"

  # Ablations:
  # "meow_continuous_action.py --exp-name meow_one_shift --reward-shifting single"
  # "meow_continuous_action.py --exp-name meow_no_shift --reward-shifting none"
  # "meow_continuous_action.py --exp-name meow_affine --coupling affine"
  # "meow_continuous_action.py --exp-name meow_stochastic --no-deterministic-eval"

  # Robots, each in an environment of its own:
  # "meow_isaacgym.py --env-id Ant"
  # "meow_auto_isaacgym.py --env-id Ant"
  # "sac_isaacgym.py --env-id Ant"
)

exec python "$(dirname "$0")/tools/benchmark.py" "${experiments[@]}" \
  --env-ids "${envs[@]}" --seeds 1-5 "$@"
