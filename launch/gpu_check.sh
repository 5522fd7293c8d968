#!/usr/bin/env bash
# Measures the model on a machine with an NVIDIA GPU, within minutes; see --help. It installs nothing.
#
#     bash launch/gpu_check.sh --minutes=8 --out=gpu_check
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

# run_with MODULE ARGUMENTS...: becomes the check, by the first Python that has the module.
run_with() {
  local candidate candidates=("$venv/bin/python" python3 python)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if usable_python "$candidate" "$1"; then
      PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$candidate" -m richhf_jax.benchmarks.gpu_check "${@:2}"
    fi
  done
  die "no Python 3.11, 3.12 or 3.13 with $1 among: ${candidates[*]}; name one with PYTHON=..."
}

usage() { run_with sys --help; }

for argument; do
  case $argument in
    --help | -h) usage ;;
  esac
done
run_with jax "$@"
