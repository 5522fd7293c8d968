#!/usr/bin/env bash
# Runs a program in several processes on this machine, which share the work.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/local.sh [--processes=N] [--devices_per_process=M] [--dry-run] [--python PYTHON] \
         -- train|eval|infer ARGUMENTS...

Runs richhf_jax.train, .eval or .infer in N processes that share the work. Each has devices of its own: GPUs, or
simulated ones on the CPU if there are no GPUs. The arguments are those of the program:

  bash launch/local.sh --processes=2 --devices_per_process=4 -- \
    train --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=runs/mine

Ctrl-C or SIGTERM saves a checkpoint and exits with 0. When one process fails, the others are ended, too. The same
command continues from the last checkpoint, also with another number of processes.

  --processes=N            number of processes (default: 2)
  --devices_per_process=M  number of devices of each (default: 1)
  --dry-run                prints the commands and stops
  --python PYTHON          makes the virtual environment with this Python (3.11 to 3.13)
  --help                   prints this

The virtual environment is .venv in the repository, or $VENV. Each output line begins with its process's index.
USAGE
}

processes=2
devices=1
dry_run=
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --processes=*) processes=${1#*=} ;;
    --devices_per_process=*) devices=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --python=*) PYTHON=${1#*=} ;;
    --processes | --devices_per_process | --python)
      (($# > 1)) || die "$1 needs a value; see --help"
      case $1 in
        --processes) processes=$2 ;;
        --devices_per_process) devices=$2 ;;
        --python) PYTHON=$2 ;;
      esac
      shift ;;
    --) shift; break ;;
    *) die "what is '$1'? See --help" ;;
  esac
  shift
done
for number in "$processes" "$devices"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "'$number' is no number of processes or devices"
done
(($#)) || die "what shall run? Give -- train|eval|infer and its arguments; see --help"
[[ $1 == train || $1 == eval || $1 == infer ]] || die "'$1' is neither train, eval nor infer; see --help"
module=$1
arguments=("${@:2}")

# is_free PORT: whether nobody listens on the port.
is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

port=$((20000 + RANDOM % 10000)) # below the ports that the system gives to outgoing connections
until is_free "$port"; do port=$((port + 1)); done

# command_of INDEX: sets `command` to the command of process INDEX.
command_of() {
  local first=$(($1 * devices))
  # GPUs of its own. Without GPUs, the gin binding makes as many CPU devices.
  command=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + devices - 1)))"
    "$venv/bin/python" -m "richhf_jax.$module" "${arguments[@]}"
    "--gin.PjitPartitioner.num_cpu_devices=$devices" "--coordinator_address=127.0.0.1:$port"
    "--process_count=$processes" "--process_index=$1")
}

if [[ $dry_run ]]; then
  for ((index = 0; index < processes; index++)); do
    command_of "$index"
    line=$(printf ' %q' "${command[@]}")
    echo "${line# }"
  done
  exit
fi

setup_venv train
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
pids=()
printers=()
# After the signal, the programs save and exit by themselves.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

for ((index = 0; index < processes; index++)); do
  command_of "$index"
  exec {output}> >(trap '' INT && exec sed -u "s/^/[$index] /")
  printers+=($!)
  # In a session of its own, so that Ctrl-C reaches it once, by our trap: a second signal would stop it at once.
  setsid "${command[@]}" >&"$output" 2>&1 &
  pids+=($!)
  exec {output}>&-
done

# Waits until one process fails, or all are done.
while ((${#pids[@]})); do
  status=0
  wait -n -p ended "${pids[@]}" || status=$?
  [[ ${ended:-} ]] || continue # A signal to this script ended `wait`.
  for index in "${!pids[@]}"; do
    [[ ${pids[index]} == "$ended" ]] && break
  done
  unset "pids[index]"
  ((status == 0)) && continue
  # The others print their messages within seconds; after that they only wait for the one that failed.
  sleep 5
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait "${printers[@]}"
  die "process $index failed with exit code $status, and the others were ended; the same command continues" \
    "from the last checkpoint"
done
wait "${printers[@]}"
