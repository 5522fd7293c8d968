# Functions that the scripts share: they make one virtual environment for all, .venv in the repository.
# shellcheck shell=bash

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# usable_python COMMAND MODULE: whether all packages have wheels for this Python (TensorFlow has none for 3.14),
# and it has the module.
usable_python() {
  "$1" -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null
}

# find_python: prints the command of a usable Python.
find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if usable_python "$candidate" ensurepip; then
      echo "$candidate"
      return
    fi
  done
  if [[ -n ${PYTHON:-} ]]; then
    die "$PYTHON is no Python 3.11, 3.12 or 3.13 with the venv module"
  fi
  die "no Python 3.11, 3.12 or 3.13 with the venv module found (on Debian or Ubuntu: apt install" \
    "python3-venv); if it is not on the PATH, name it with --python"
}

# setup_venv EXTRA: makes the environment if needed, and installs the project with an extra, unless that was done
# since the last change of setup.py.
setup_venv() {
  local extra=$1 stamp=$venv/.installed-$1 python wanted
  wanted=$(cksum <"$root/setup.py")
  if ! usable_python "$venv/bin/python" pip; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
    echo "installing the project and its '$extra' packages into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[$extra]"
    echo "$wanted" >"$stamp"
  fi
}
