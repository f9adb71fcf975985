#!/usr/bin/env bash
# Trains a robot task with 4,096 environments and prints its speed and its returns.
#
#     tools/robots_on_gpu.sh                                           # Ant, on the GPU
#     tools/robots_on_gpu.sh --env-id Humanoid --tau 0.005 --total-timesteps 20000
#     tools/robots_on_gpu.sh --num-envs 16 --batch-size 64 --total-timesteps 400 \
#       --log-frequency 100 --eval-frequency 200 --no-cuda             # small, on a CPU
#
# Options are those of meow_isaacgym.py. The run stays in runs/gpu/, or in $RUNS.
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${RUNS:-runs/gpu}
python meow_isaacgym.py --env-id Ant --tau 0.0025 --num-envs 4096 --total-timesteps 10000 \
  --log-frequency 500 --eval-frequency 1000 --runs-dir "$runs" "$@"
newest=$(ls -td "$runs"/*/ | head -1)
echo "vector step, environment steps/s or return:"
grep -E "charts/env_SPS|eval/return_mean" "$newest"metrics.csv | cut -d, -f1,3,4 | tr , " "
