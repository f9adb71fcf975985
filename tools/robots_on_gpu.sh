#!/usr/bin/env bash
# Trains a robot task with 4,096 environments and prints its speed and its returns.
#
#     tools/robots_on_gpu.sh Ant --tau 0.0025                          # on the GPU
#     tools/robots_on_gpu.sh Humanoid --tau 0.005 --total-timesteps 20000
#     tools/robots_on_gpu.sh Ant --num-envs 16 --batch-size 64 --total-timesteps 400 \
#       --log-frequency 100 --eval-frequency 200 --no-cuda             # small, on a CPU
#
# Options are those of meow_isaacgym.py. The run stays in runs/gpu/, or in $RUNS; the
# newest 1,000 vector steps are kept, which is about 1 GB for Ant.
set -uo pipefail
cd "$(dirname "$0")/.."

task=${1:?say which robot: Ant, Humanoid, Ingenuity, Anymal, AllegroHand or FrankaCabinet}
runs=${RUNS:-runs/gpu}
python meow_isaacgym.py --env-id "$task" --num-envs 4096 --buffer-size 1000 --total-timesteps 10000 \
  --log-frequency 500 --eval-frequency 1000 --runs-dir "$runs" "${@:2}"
status=$?
newest=$(ls -td "$runs"/*/ 2>/dev/null | head -1)
if [[ -e $newest/metrics.csv ]]; then
  echo "vector step, environment steps/s or return:"
  grep -E "charts/env_SPS|eval/return_mean" "$newest/metrics.csv" | cut -d, -f1,3,4 | tr , " "
fi
exit $status
