#!/usr/bin/env bash
# ./benchmark.sh [OPTIONS] [-- EXTRA...] trains every algorithm on every environment with each seed.
# The same command again goes on. EXTRA: options of all runs. PYTHON: the interpreter. Options:
#   --algos LIST            of meow,sac,sql,td3,ddpg,ppo,sb3-sac (default: meow,sac)
#   --envs LIST             Gymnasium ids (default: the paper's five MuJoCo tasks)
#   --seeds LIST            numbers and ranges (default: 1-5)
#   --total-timesteps N     steps of each run (default: the script's own for the environment)
#   --workers N             runs at a time (one per GPU of CUDA_VISIBLE_DEVICES, else one per core)
#   --out FOLDER            folder of the runs and their logs/ (default: runs)
#   --dry-run               print the commands or, with --slurm, the array script; do nothing
#   --slurm                 submit one job array, each element requeued until its run is finished;
#       --slurm-options "..."   more for sbatch, e.g. "--partition=gpu --gres=gpu:1 --time=24:00:00"
set -euo pipefail -f # -f: names are no patterns
fail() { echo "error: $*" >&2 && exit 2; }
algos=meow,sac envs=Hopper-v4,HalfCheetah-v4,Walker2d-v4,Ant-v4,Humanoid-v4 seeds=1-5 out=runs
total_timesteps='' workers='' dry_run='' slurm='' slurm_options='' extra=()
here=$(dirname "$(realpath "$0")") && printf -v again ' %q' "$here/benchmark.sh" "$@"
while (($#)); do
  case $1 in
    --) extra=("${@:2}") && break ;;
    --help | -h) sed -n '2,/^set/s/^# //p' "$here/benchmark.sh" && exit ;;
    --dry-run | --slurm) set -- "$1" yes "${@:2}" ;;
    --workers | --total-timesteps) [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "$1 ${2-}: not 1, 2, ..." ;;
    --algos | --envs | --seeds | --out) [[ ${2:---} != --* ]] || fail "$1 needs a value" ;;
    --slurm-options) [[ ${2-} ]] || fail "$1 needs a value" ;;
    *) fail "unknown option $1; ./benchmark.sh --help lists all" ;;
  esac
  name=${1#--} && printf -v "${name//-/_}" %s "$2" && shift 2
done
[[ " ${extra[*]//_/-}" != *\ --@(env-id|seed|total-timesteps|runs-dir|algo|resume|evaluate)* ]] ||
  fail "-- ${extra[*]}: would name other runs"

commands=() logs=() numbers=() pids=() running=() failed=() finished=0 next=0 signal='' stopped=''
for s in ${seeds//,/ }; do
  [[ $s =~ ^[0-9]+(-[0-9]+)?$ && 10#${s%-*} -le 10#${s#*-} ]] || fail "--seeds $s: not as in 1-5,8"
  numbers+=($(seq "${s%-*}" "${s#*-}"))
done
for algo in ${algos//,/ }; do for env in ${envs//,/ }; do for seed in "${numbers[@]}"; do
  program=("$here/${algo}_continuous_action.py")
  [[ $algo != @(td3|ddpg|ppo|sb3-sac) ]] || program=("$here/sb3_baselines.py" --algo "${algo#sb3-}")
  [[ -e ${program[0]} ]] || fail "--algos $algo: known are meow,sac,sql,td3,ddpg,ppo,sb3-sac"
  words=("${PYTHON:-python}" "${program[@]}" --env-id "$env" --seed "$seed" --runs-dir "$out")
  words+=(--resume auto ${total_timesteps:+--total-timesteps $total_timesteps} "${extra[@]}")
  name="${env}__${algo}__$seed${extra[*]:+__${extra[*]}}" && name=${name//[^[:alnum:]_.=-]/_}
  printf -v "commands[${#logs[@]}]" '%q ' "${words[@]}"
  logs+=("$out/logs/${name:0:150}.log")
done; done; done
((n = ${#commands[@]})) || fail "--algos, --envs or --seeds names nothing"
[[ $dry_run ]] || mkdir -p -- "$out/logs" 2>/dev/null || fail "--out $out: can't make folders there"

if [[ $slurm && ! ${SLURM_ARRAY_TASK_ID-} ]]; then
  if [[ $dry_run ]]; then sbatch() { cat; }; fi
  sbatch <<END || fail "--slurm: sbatch didn't take the array"
#!/bin/bash
#SBATCH --array=0-$((n - 1))${workers:+%$workers} --requeue --open-mode=append --signal=B:USR1@120
#SBATCH --job-name=benchmark --output="$out/logs/slurm-%A_%a.log" $slurm_options
PYTHON=$(printf %q "${PYTHON:-python}") exec${again/ --dry-run/}
END
  exit
elif [[ $dry_run ]]; then printf '%s\n' "${commands[@]}" && exit; fi

gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\).*/\1/p' || :)}
gpus=($(tr , ' ' <<<"${gpus/#-*/}")) # -1: none
workers=${workers:-$((${#gpus[@]} ? ${#gpus[@]} : $(env -u OMP_NUM_THREADS nproc)))}
if [[ $slurm ]]; then next=$SLURM_ARRAY_TASK_ID n=$((next + 1)) workers=1; fi # one of the array
for name in HUP INT TERM USR1; do trap "signal=$name" "$name"; done
# last_line LOG: the error of the last attempt in it, else what it wrote last
last_line() { tr '\r' '\n' <"$1" | awk '/^# /{e=""} /^error: /{e=$0} NF{l=$0} END{print e?e:l}'; }
{ while ((next < n || ${#pids[@]})); do # { }: read whole, so that this file can be edited meanwhile
  for ((slot = 0; slot < workers; slot++)); do
    if [[ ${pids[slot]-} ]] && ! kill -0 "${pids[slot]}" 2>/dev/null; then
      wait "${pids[slot]}" && code=0 || code=$?
      log=${running[slot]} && unset "pids[slot]" "running[slot]"
      if ((code == 0)); then
        finished=$((finished + 1)) && echo "finished: $log"
      elif [[ ! $stopped || $code -le 128 ]]; then
        failed+=("failed: $log: exit code $code: $(last_line "$log")") && echo "${failed[-1]}"
      fi
    elif [[ ! ${pids[slot]-} && $next -lt $n ]]; then
      if ((${#gpus[@]})); then export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}; fi
      printf '\n# %s\n' "$(date +%FT%T) ${commands[next]}" >>"${logs[next]}" || true # a full disk
      eval "exec setsid ${commands[next]}" </dev/null >>"${logs[next]}" 2>&1 & # no Ctrl-C for it
      pids[slot]=$! running[slot]=${logs[next]} next=$((next + 1))
    fi
  done
  if [[ $signal ]]; then
    stopped=$signal signal='' next=$n status=$((128 + $(kill -l "$stopped")))
    echo "stopping: the runs write their checkpoints (a second signal stops them at once)"
    [[ $slurm$stopped == yesTERM ]] || kill -TERM "${pids[@]}" 2>/dev/null || true # Slurm's: to all
  fi
  if ((SECONDS >= 30)); then
    SECONDS=0 && echo "$finished finished, ${#failed[@]} failed, $((n - next)) waiting; running:"
    for log in "${running[@]}"; do echo "  $log: $(last_line "$log")"; done
  fi
  sleep 0.1 || true # a signal may end it
done
printf '%s\n' "$finished runs are finished, ${#failed[@]} failed" "${failed[@]}"
if [[ $slurm$stopped == yesUSR1 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
if [[ $stopped ]]; then echo "stopped; go on with the same command:$again" >&2; fi
exit "${status:-$((${#failed[@]} > 0))}"; }
