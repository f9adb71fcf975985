#!/usr/bin/env bash
# Algorithms x environments x seeds, one process per run; the same command again goes on.
set -euo pipefail
set -f # names are no patterns

usage() {
  cat <<'END'
Usage: ./benchmark.sh [OPTIONS] [-- EXTRA...]

Trains every algorithm on every environment with every seed. The same command again skips finished
runs and resumes interrupted ones. Lists are separated by commas or spaces.

  --algos LIST          meow sac sql td3 ddpg ppo sb3-sac (default: meow sac)
  --envs LIST           default: Hopper-v4 HalfCheetah-v4 Walker2d-v4 Ant-v4 Humanoid-v4
  --seeds LIST          numbers and ranges such as 1-5 (default: 1-5)
  --workers N           runs at a time (default: one per CPU core; with GPUs, one per GPU);
                        with --slurm: array elements at a time (default: as many as Slurm allows)
  --total-timesteps N   environment steps of each run (default: the script's own for the task)
  --out FOLDER          run folders, logs/ and abandoned/ (default: runs)
  --dry-run             print the commands (with --slurm: the array script) and do nothing
  --slurm               submit the runs as one Slurm job array, requeued until they are finished
  --slurm-options "..." more options of sbatch, e.g. "--partition=gpu --gres=gpu:1 --time=24:00:00"
  -- EXTRA...           options for every new run, e.g. -- --no-compile

PYTHON names the interpreter (default: python). GPUs: CUDA_VISIBLE_DEVICES, else all of nvidia-smi.
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# --- 1. Options -----------------------------------------------------------------------------------
items() { # the items of a list, one per line, without repetitions
  tr -s ', \t\n' '\n' <<<"$1" | awk 'NF && !seen[$0]++'
}

number() { # number OPTION TEXT LOWEST: the whole number without leading zeros
  if ! [[ $2 =~ ^[0-9]{1,12}$ ]] || ((10#$2 < $3)); then
    fail "$1 $2: must be a whole number from $3 up"
  fi
  echo $((10#$2))
}

seed_numbers() { # the seeds of a list of numbers and ranges, one per line
  local item low high
  for item in $(items "$1"); do
    [[ $item =~ ^([0-9]{1,10})(-([0-9]{1,10}))?$ ]] ||
      fail "--seeds $item: must be whole numbers and ranges such as 1-5"
    low=$((10#${BASH_REMATCH[1]})) high=$((10#${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}))
    ((low <= high && high < 2 ** 32)) || fail "--seeds $item: must rise and stay below 2^32"
    ((high - low < 1000)) || fail "--seeds $item: more than 1,000 seeds"
    seq "$low" "$high"
  done
}

algorithm() { # exp_name and script, with its options, of an algorithm
  case $1 in
    meow | sac | sql) echo "${1}_continuous_action ${1}_continuous_action.py" ;;
    td3 | ddpg | ppo) echo "sb3_$1 sb3_baselines.py --algo $1" ;;
    sb3-sac) echo "sb3_sac sb3_baselines.py --algo sac" ;;
    *) fail "--algos $1: unknown; known are meow, sac, sql, td3, ddpg, ppo and sb3-sac" ;;
  esac
}

algos="meow sac" envs="Hopper-v4 HalfCheetah-v4 Walker2d-v4 Ant-v4 Humanoid-v4" seeds=1-5
workers='' total_timesteps='' out=runs dry='' slurm='' slurm_options='' element='' extra=()
python=${PYTHON:-python}
printf -v again ' %q' "$0" "$@"
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --) extra=("${@:2}") && break ;;
    --help | -h) usage && exit ;;
    --dry-run) dry=1 && shift && continue ;;
    --slurm) slurm=1 && shift && continue ;;
    --algos | --envs | --seeds | --workers | --total-timesteps | --out | --slurm-options | \
      --element)
      [[ -n ${2-} && ($2 != --* || $1 == --slurm-options) ]] || fail "$1 needs a value" ;;
    *) fail "unknown option $1; ./benchmark.sh --help lists all" ;;
  esac
  option=${1#--}
  printf -v "${option//-/_}" %s "$2"
  shift 2
done
total=${total_timesteps:+$(number --total-timesteps "$total_timesteps" 1)}
workers=${workers:+$(number --workers "$workers" 1)}
for word in "${extra[@]}"; do
  case ${word//_/-} in
    --env-id* | --seed* | --runs-dir* | --exp-name* | --total-timesteps* | --algo* | --resume* | \
      --evaluate*)
      fail "${word%%=*} can't stand after --: it would name other runs" ;;
  esac
done
seeds=$(seed_numbers "$seeds") # here, so that a mistake ends the script
labels=() keys=() names=() commands=() # of each run: for people, env exp seed, file name, script
for algo in $(items "$algos"); do
  command=$(algorithm "$algo")
  for env in $(items "$envs"); do
    for seed in $(items "$seeds"); do
      labels+=("$algo $env seed $seed") keys+=("$env ${command%% *} $seed")
      names+=("${env//[^a-zA-Z0-9_.-]/_}__${command%% *}__$seed") commands+=("${command#* }")
    done
  done
done
((${#keys[@]})) || fail "--algos, --envs or --seeds names nothing"
[[ -z $element ]] || ((element < ${#keys[@]})) || fail "--element $element: there are fewer runs"

# --- 2. What is there and what is to do -----------------------------------------------------------
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
scripts=$here/
if [[ $PWD == "$here" ]]; then scripts=''; fi # shorter commands

survey() { # survey KEY...: of each run state|folders|step|goal|steps per second|return
  local interpreter
  interpreter=$(command -v /usr/bin/python3 || command -v python3 || echo "$python")
  "$interpreter" -I -c '
import json, os, re, sys

NUMBER = r"nan|-?inf|-?\d+\.?\d*(?:e[-+]\d+)?"
out, asked = sys.argv[1], int(sys.argv[2])
names = sorted(os.listdir(out)) if os.path.isdir(out) else []

def look(folder, env):
    """Total steps (0: unknown) and the rows of one run folder; None if it is of another task."""
    own, rows = 0, ""
    try:
        with open(folder + "/args.json") as f:
            args = json.load(f)["args"]
        if args.get("env_id", env) != env:
            return None
        own = int(args["total_timesteps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing or half written
    try:
        with open(folder + "/metrics.csv", "rb") as f:
            f.seek(max(0, os.path.getsize(f.name) - 2**18))
            rows = f.read().decode(errors="replace")
    except OSError:
        pass
    return own, re.findall(r"^(\d+),[^,\n]*,([^,\n]+),(" + NUMBER + r")\n", rows, re.M)

def latest(rows, name):
    found = [value for _, metric, value in rows if metric == name]
    return format(float(found[-1]), ".1f") if found else "-"

for key in sys.argv[3:]:
    env, exp_name, seed = key.split(" ")
    prefix = "__".join((re.sub(r"[^\w.-]", "_", env), exp_name, seed, ""))
    best, shown, abandoned = (0, -1), None, []
    for name in names:
        found = re.fullmatch(re.escape(prefix) + r"\d+", name) and look(out + "/" + name, env)
        if not found:
            continue
        own, rows = found
        goal, step = asked or own, int(rows[-1][0]) if rows else 0
        evaluated = {int(s) for s, metric, _ in rows if metric == "eval/return_mean"}
        checkpoint = os.path.isfile(out + "/" + name + "/checkpoint.pt")
        if own == goal and goal in evaluated:
            state = 2, "finished"
        elif checkpoint and (step < goal or own in (0, goal)):
            state = 1, "resume"
        elif checkpoint or own in evaluated:
            continue  # complete, or too far, for another total: it stays
        else:
            state = 0, "new"
            abandoned.append(name)
        if (state[0], step) > best:
            speed, result = latest(rows, "charts/SPS"), latest(rows, "eval/return_mean")
            best, shown = (state[0], step), (state[1], name, step, goal, speed, result)
    state, name, *progress = shown or ("new", "", 0, asked, "-", "-")
    print(state, " ".join(abandoned) if state == "new" else name, *progress, sep="|")
' "$out" "${total:-0}" "$@"
}

find_devices() { # GPUs, worker slots and the CPU threads of each
  local listed=()
  mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    mapfile -t listed < <(items "$CUDA_VISIBLE_DEVICES")
    if ((${#gpus[@]} || ${#listed[@]} > 1)); then gpus=("${listed[@]}"); fi
    if [[ ${listed[0]:-} == -* ]]; then gpus=(); fi # -1: none
  fi
  local cores
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
  if [[ -n $element ]]; then workers=1 cores=${SLURM_CPUS_ON_NODE:-$cores}; fi
  if ((${#gpus[@]})); then workers=${workers:-${#gpus[@]}}; else workers=${workers:-$cores}; fi
  threads=$((cores > workers ? cores / workers : 1))
}

prepare() { # prepare RUN SLOT SURVEY: sets state, folders, note and the words of the command
  local step goal cpu=(--torch-threads "$threads")
  if [[ " ${extra[*]//_/-}" == *" --torch-threads"* ]]; then cpu=(); fi # a run keeps its own
  IFS='|' read -r state folders step goal _ <<<"$3"
  words=(env "OMP_NUM_THREADS=$threads")
  if [[ ${gpus[*]} ]]; then words+=("CUDA_VISIBLE_DEVICES=${gpus[$2 % ${#gpus[@]}]}"); fi
  read -ra script <<<"${commands[$1]}"
  words+=("$python" "$scripts${script[0]}" "${script[@]:1}")
  read -r env _ seed <<<"${keys[$1]}"
  case $state in
    finished) note="skip ${labels[$1]}: $out/$folders is finished" ;;
    resume)
      note="resume ${labels[$1]} at step $step of $goal"
      words+=(--resume "$out/$folders" "${cpu[@]}")
      if ((goal)); then words+=(--total-timesteps "$goal"); fi ;;
    new)
      note="new ${labels[$1]}${folders:+; without a checkpoint, to $out/abandoned/: $folders}"
      words+=(--env-id "$env" --seed "$seed" --runs-dir "$out" "${cpu[@]}")
      words+=(${total:+--total-timesteps "$total"} "${extra[@]}") ;;
    *) fail "can't tell what $out holds" ;;
  esac
}

dry_run() { # prints the commands
  local i slot=0
  for i in "${!queue[@]}"; do
    prepare "${queue[i]}" $((slot % workers)) "${lines[i]}"
    echo "# $note"
    if [[ $state == finished ]]; then continue; fi
    printf '%q ' "${words[@]}" | sed 's/ $/\n/'
    slot=$((slot + 1))
  done
}

array_script() { # the job array of --slurm
  local folder options=(--algos "$algos" --envs "$envs" --seeds "${seeds//$'\n'/ }")
  folder=$(realpath -m -- "$out")
  options+=(--out "$folder" ${total:+--total-timesteps "$total"} --element)
  cat <<END
#!/bin/bash
#SBATCH --job-name=benchmark
#SBATCH --array=0-$((${#keys[@]} - 1))${workers:+%$workers}
#SBATCH --requeue --open-mode=append --signal=B:TERM@120
#SBATCH --output="$folder/logs/slurm-%A_%a.log"
${slurm_options:+#SBATCH $slurm_options}
cd $(printf %q "$PWD") || exit
export PYTHON=$(printf %q "$python")
# exec: the warning before the time limit reaches benchmark.sh, which then requeues the run
exec $(printf '%q ' "$here/benchmark.sh" "${options[@]}") \\
  "\$SLURM_ARRAY_TASK_ID"$(printf ' %q' -- "${extra[@]}")
END
}

# --- 3. Training ----------------------------------------------------------------------------------
train() { # train RUN SLOT: becomes the training process, which holds the run's lock until it ends
  local folder waited=''
  exec 9>"$out/.locks/${names[$1]}.lock" >>"$out/logs/${names[$1]}.log" 2>&1 </dev/null
  until flock --nonblock 9; do # e.g. a training that outlived a killed benchmark.sh
    if [[ -z $waited ]]; then echo "# $(date +%FT%T) waits for another process with this run"; fi
    waited=1
    sleep 1
  done
  prepare "$1" "$2" "$(survey "${keys[$1]}")"
  echo "# $(date +%FT%T) $note"
  if [[ $state == finished ]]; then exit; fi
  if [[ $state == new ]]; then
    for folder in $folders; do
      mkdir -p -- "$out/abandoned"
      mv --backup=numbered -T -- "$out/$folder" "$out/abandoned/$folder"
    done
  fi
  echo "# ${words[*]@Q}"
  exec "${words[@]}"
}

last_error() { # the last error line of the last attempt in a log file, else its last line
  awk '/^# /{e = l = ""; next} /^error: /{e = $0} NF{l = $0} END{print e ? e : l}' "$1"
}

catches_term() { # whether a process has a handler for SIGTERM
  local status=''
  IFS= read -r -d '' status 2>/dev/null <"/proc/$1/status" || true
  [[ $status =~ SigCgt:[[:space:]]*([0-9a-f]+) ]] && ((16#${BASH_REMATCH[1]} & 1 << 14))
}

forward() { # SIGTERM to the runs that have not had it: a second one stops a training at once
  local slot
  if [[ $forwarded ]] && ((SECONDS - forwarded < 5)); then return; fi
  if [[ -z $forwarded ]]; then
    say "stopping: the runs write their checkpoints (a second signal stops them at once)"
    sleep 1 || true # a signal to everybody (timeout, Slurm) has arrived at the runs by now
  fi
  for slot in "${!pids[@]}"; do
    if [[ $forwarded || -z ${caught[slot]:-} ]] || catches_term "${pids[slot]}"; then
      kill -TERM "${pids[slot]}" 2>/dev/null || true
    fi
  done
  forwarded=$SECONDS
}

collect() { # collect SLOT: the result of the run that has ended there
  local run=${running[$1]} code=0 log state='' reason
  wait "${pids[$1]}" || code=$?
  unset "pids[$1]" "running[$1]" "caught[$1]"
  log=$out/logs/${names[run]}.log
  IFS='|' read -r state _ < <(survey "${keys[run]}") || true
  if [[ $state == finished ]] && ((code == 0)); then
    part[run]=1000000 finished=$((finished + 1))
    say "finished: ${labels[run]}"
  elif [[ -z $stopping ]] || ((code <= 128)); then
    reason=$(last_error "$log")
    if ((code == 0)); then reason="it ended without its last evaluation"; fi
    failed+=("${labels[run]}: exit code $code, $log: ${reason:-(nothing in the log)}")
    part[run]=1000000 begun[run]=1000000 # no part of the ETA
    say "failed: ${failed[-1]}"
  fi
}

# --- 4. Overview ----------------------------------------------------------------------------------
say() { # a line that stays, after taking back the overview on a terminal
  if ((drawn)); then printf '\e[%dA\e[J' "$drawn"; fi
  drawn=0
  echo "$*"
}

eta() { # workers at the speed so far; at least what the longest run needs by itself
  local run own left=0 longest=0 gained=0
  for run in "${queue[@]}"; do
    own=$((1000000 - part[run])) gained=$((gained + part[run] - begun[run]))
    left=$((left + own)) longest=$((own > longest ? own : longest))
  done
  if ((gained <= 0)); then echo unknown && return; fi
  left=$((left / workers > longest ? left / workers : longest))
  left=$((left * busy / gained)) # busy: seconds of all workers together
  printf '%d:%02d:%02d' $((left / 3600)) $((left / 60 % 60)) $((left % 60))
}

overview() { # one line for each running run and one for all, redrawn in place on a terminal
  local slots=("${!running[@]}") lines=() text=() asked=() i run step goal speed result rows columns
  for i in "${slots[@]}"; do asked+=("${keys[running[i]]}"); done
  mapfile -t lines < <(survey "${asked[@]}")
  for i in "${!lines[@]}"; do
    run=${running[slots[i]]}
    IFS='|' read -r _ _ step goal speed result <<<"${lines[i]}"
    if ((goal)); then part[run]=$((step < goal ? step * 1000000 / goal : 1000000)); fi
    text+=("  ${labels[run]}: step $step/$goal, $speed steps/s, return $result")
  done
  i=$((${#queue[@]} - finished - ${#failed[@]} - ${#running[@]}))
  i="$finished/${#queue[@]} finished, ${#running[@]} running, ${#failed[@]} failed, $i waiting"
  i+=", ETA $(eta)"
  if [[ -t 1 ]]; then
    read -r rows columns < <(stty size <&3 2>/dev/null || echo 24 80)
    if ((rows < 3 || columns < 2)); then rows=24 columns=80; fi # it doesn't know its size
    text=("${text[@]:0:rows-2}" "$i")
    say "$(printf '%s\n' "${text[@]}" | cut -c "1-$((columns - 1))")"
    drawn=${#text[@]}
  else
    printf '%s\n' "${text[@]}" "$i"
  fi
} 3>&1 # for stty, whose own output is read

requeue() { # after Slurm's warning; a job that was cancelled or requeued already is left alone
  local id=${SLURM_ARRAY_JOB_ID:-}_${SLURM_ARRAY_TASK_ID:-}
  if [[ $(squeue --noheader --jobs="$id" --format=%T) == RUNNING ]]; then scontrol requeue "$id"; fi
}

# --- 5. All runs ----------------------------------------------------------------------------------
main() { # a function, so that editing this file doesn't disturb a benchmark that runs
  asked=() queue=("${!keys[@]}") # never changes: the elements of a Slurm array count on it
  if [[ $slurm && -z $dry ]]; then
    command -v sbatch >/dev/null || fail "--slurm: there is no sbatch here"
    mkdir -p -- "$out/logs" 2>/dev/null || fail "--out $out: can't make folders there"
    array_script | sbatch || exit 1
    exit
  fi
  if [[ $slurm ]]; then array_script && exit; fi
  if [[ $element ]]; then queue=("$element"); fi
  find_devices
  for run in "${queue[@]}"; do asked+=("${keys[run]}"); done
  mapfile -t lines < <(survey "${asked[@]}")
  ((${#lines[@]} == ${#queue[@]})) || fail "can't tell what $out holds"
  if [[ $dry ]]; then dry_run && exit; fi
  command -v -- "$python" >/dev/null || fail "PYTHON $python: there is no such program"
  command -v flock >/dev/null || fail "there is no flock here: install util-linux"
  mkdir -p -- "$out/logs" "$out/.locks" 2>/dev/null || fail "--out $out: can't make folders there"

  pids=() running=() caught=() # of each worker slot in use: process, run, has had a handler
  waiting=() failed=() part=() begun=() # part, begun: millionths done of each run, and at the start
  finished=0 stopping='' rang='' forwarded='' drawn=0 shown=-1000 next=0
  busy=0 counted=0 SECONDS=0
  if [[ -t 1 ]]; then period=2; else period=30; fi # seconds
  for name in INT TERM HUP; do
    # shellcheck disable=SC2064 # this name
    trap "stopping=\${stopping:-$name} rang=1" "$name"
  done

  for i in "${!lines[@]}"; do
    run=${queue[i]} begun[run]=0
    IFS='|' read -r state _ step goal _ <<<"${lines[i]}"
    if [[ $state == resume ]] && ((step < goal)); then begun[run]=$((step * 1000000 / goal)); fi
    if [[ $state == finished ]]; then
      begun[run]=1000000 finished=$((finished + 1))
    else
      waiting+=("$run")
    fi
    part[run]=${begun[run]}
  done
  echo "${#queue[@]} runs in $out: $finished finished before, $workers at a time," \
    "CPU threads $threads${gpus[*]:+, GPUs ${gpus[*]}}"

  while :; do
    for ((slot = 0; slot < workers && slot < ${#waiting[@]}; slot++)); do
      if [[ ${pids[slot]:-} ]] && kill -0 "${pids[slot]}" 2>/dev/null; then
        if catches_term "${pids[slot]}"; then caught[slot]=1; fi
        continue
      fi
      if [[ ${pids[slot]:-} ]]; then collect "$slot"; fi
      if [[ -z $stopping ]] && ((next < ${#waiting[@]})); then
        train "${waiting[next]}" "$slot" &
        pids[slot]=$! running[slot]=${waiting[next]} next=$((next + 1))
      fi
    done
    if ((${#pids[@]} == 0)); then break; fi
    if [[ $rang ]]; then rang='' && forward; fi
    busy=$((busy + ${#pids[@]} * (SECONDS - counted))) counted=$SECONDS
    if ((SECONDS - shown >= period)); then overview && shown=$SECONDS; fi
    sleep 0.3 || true # a signal may end it
  done

  say "$finished of ${#queue[@]} runs are finished"
  if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[@]}" >&2; fi
  if [[ $stopping ]] && ((finished + ${#failed[@]} < ${#queue[@]})); then
    if [[ $element ]]; then requeue; else echo "stopped; go on with the same command:$again" >&2; fi
    exit $((128 + $(kill -l "$stopping")))
  fi
  ((${#failed[@]} == 0))
}

main; exit # on one line: bash reads nothing after main
