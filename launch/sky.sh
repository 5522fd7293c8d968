#!/usr/bin/env bash
# Trains as a managed job of SkyPilot (https://docs.skypilot.co), on TPUs or GPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/sky.sh --accelerators=TYPE[:COUNT] [OPTIONS] TRAINING ARGUMENTS...

Gives the version to SkyPilot as a managed job. SkyPilot finds machines, installs the version there and trains.
When the machines are preempted, it starts again on others; training continues from the newest checkpoint. Needs
sky, with a cloud set up (pip install 'skypilot[gcp]').

  --accelerators TYPE[:COUNT]
                     chips of each machine: tpu-v5litepod-16, tpu-v6e-8, ... or H100:8, A100-80GB:8, L4:1, ...
  --num-nodes N      number of machines with GPUs (default: 1); a TPU slice counts as one, with all its hosts
  --infra PLACE      for example gcp/us-central1 (default: gcp for TPUs, the cheapest place for GPUs)
  --no-spot          takes machines on demand (default: preemptible machines)
  --name NAME        name of the job (default: richhf-jax)
USAGE
}

option+=([accelerators]="" [num-nodes]=1 [infra]="" [no-spot]=no [name]=richhf-jax)
parse_arguments "$@"
need_options accelerators
pin_version
check_training

accelerators=${option[accelerators]}
changes=(-e "s/^  accelerators: .*/  accelerators: $accelerators/")
if [[ $accelerators == tpu-* ]]; then
  task=tpu.yaml
  type=${accelerators#tpu-}
  type=${type%:1}
  add_partitioning "$(tpu_partitioning "$type")"
  changes+=(-e "s/^    runtime_version: .*/    runtime_version: $(tpu_runtime "$type")/")
  ((${option[num-nodes]} == 1)) ||
    die "--num-nodes=${option[num-nodes]}: SkyPilot can't join TPU slices; use tpu_vm.sh or xpk.sh"
else
  task=gpu.yaml
  count=1
  if [[ $accelerators == *:* ]]; then count=${accelerators#*:}; fi
  add_partitioning "$(gpu_partitioning "${option[num-nodes]}" "$count")"
fi

flags=(--name="${option[name]}" --num-nodes="${option[num-nodes]}")
if [[ -n ${option[infra]} ]]; then flags+=(--infra="${option[infra]}"); fi
if [[ ${option[no-spot]} == yes ]]; then flags+=(--no-use-spot); fi

build=$root/build
unpack_version "$build"
run sed -i "${changes[@]}" "$build/$version/launch/sky/$task"
run sky jobs launch --yes "${flags[@]}" --workdir="$build/$version" \
  --env="TRAINING_ARGUMENTS=$(quoted "${training[@]}")" "$build/$version/launch/sky/$task"
