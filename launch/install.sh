#!/usr/bin/env bash
# Installs the project and its packages on a machine that will train, in .venv beside launch/. A second call does
# nothing.
#
#     bash launch/install.sh train,gcs,tpu     # or train,gcs,cuda
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

(($# == 1)) && [[ $1 != -* ]] || die "name the packages: train,gcs,tpu or train,gcs,cuda"
if ! usable_python "$venv/bin/python" pip && ! (find_python) >/dev/null 2>&1; then
  # Cloud TPU's images come with Python 3.10.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --seed --python 3.11 "$venv"
fi
setup_venv "$1"
