#!/usr/bin/env bash
# A Slurm cluster of this one machine, to try `tools/benchmark.py --slurm` (Debian or Ubuntu, as root).
#
#     tools/single_node_slurm.sh         # install if needed, start; harmless if it runs
#     tools/single_node_slurm.sh stop
#
# Controller, node daemon and munge listen on loopback; no systemd, cgroups or database are needed.
set -euo pipefail

config=/etc/slurm/slurm.conf state=/var/lib/single_node_slurm
marker="# written by single_node_slurm.sh"

fail() {
  echo "error: $*" >&2
  exit 1
}

ours() { # whether Slurm's configuration is the one that this script wrote
  [[ -e $config ]] && grep -q "^$marker" "$config"
}

stop() { # ends the daemons that this script started and waits for them
  local name pid
  for name in slurmd slurmctld munged; do
    pid=$(cat "$state/$name.pid" 2>/dev/null) || continue
    if ! [[ -r /proc/$pid/comm && $(cat "/proc/$pid/comm") == "$name" ]]; then continue; fi
    kill "$pid"
    for _ in {1..100}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    rm -f "$state/$name.pid"
  done
}

install_packages() { # Debian's Slurm and munge
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
}

write_config() { # one node with all cores of this machine, one partition
  local host
  host=$(hostname -s)
  mkdir -p "$(dirname "$config")"
  cat >"$config" <<END
$marker
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job starts again after these seconds (default: 120).
AuthInfo=cred_expire=5,socket=$state/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/node
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

start_munge() { # the daemon that signs Slurm's messages, with its own key and socket
  mkdir -p "$state/munge"
  if ! [[ -e $state/munge/key ]]; then
    (umask 077 && head -c 1024 /dev/urandom >"$state/munge/key")
  fi
  chown -R munge: "$state/munge"
  runuser -u munge -- munged --force --key-file="$state/munge/key" \
    --socket="$state/munge/socket" --seed-file="$state/munge/seed" \
    --pid-file="$state/munge/munged.pid" --log-file="$state/munge/log"
  ln -sf munge/munged.pid "$state/munged.pid"
}

main() {
  [[ $# -eq 0 || $* == stop ]] || fail "usage: $0 [stop]"
  ((EUID == 0)) || fail "run it as root"
  if [[ -e $config ]] && ! ours; then fail "$config belongs to another Slurm: left as it is"; fi
  if [[ ${1-} == stop ]]; then stop && exit; fi
  if ours && timeout 20 scontrol ping 2>/dev/null | grep -q UP; then
    echo "Slurm runs already" && exit
  fi
  hash slurmctld slurmd sbatch munged 2>/dev/null || install_packages
  stop # what is left of an earlier start
  mkdir -p "$state"/{controller,node}
  chmod 755 "$state"
  write_config
  start_munge
  slurmctld
  slurmd
  for _ in {1..120}; do
    if sinfo --noheader --format=%T 2>/dev/null | grep -q -E '^(idle|mixed|allocated)$'; then
      echo "Slurm runs: see sinfo and squeue; logs in $state" && exit
    fi
    sleep 0.5
  done
  fail "the node did not become ready within a minute: see the logs in $state"
}

main "$@"
